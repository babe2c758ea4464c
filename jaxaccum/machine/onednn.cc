// Convolutions of XLA's CPU programs by oneDNN, one thread of XLA's own pool to a piece of the
// work.
//
// oneDNN comes as a library that divides work among OpenMP's threads, and those would fight with
// XLA's for the cores. Here each primitive runs on one thread; a convolution is cut along its rows
// (images and the rows of an image, one after the other) and the pieces are taken by the threads
// of XLA's pool as they are free. The caller takes pieces too, so nobody waits for one that was
// never begun.
//
// Only functions of oneDNN's C interface are used (version 3, Apache-2.0), looked up by name in the
// library that the host loads: no header of it is needed. The numbers below are its enumerations.
#include <dlfcn.h>
#include <sched.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Dims = int64_t[12];
using Handle = void*;
struct Argument {
  int what;
  Handle memory;
};

enum { kF32 = 3, kAny = 1, kCpu = 1, kInOrder = 1, kDirect = 1, kUser = 1 };
enum { kForwardTraining = 64 };
enum { kSrc = 1, kDst = 17, kWeights = 33, kScratchpad = 80 };
enum { kDiffSrc = 129, kDiffDst = 145, kDiffWeights = 161 };
enum { kQueryWeights = 131, kQueryDiffWeights = 132, kQueryScratchpad = 136 };

// The functions of the library.
struct Version {
  int major, minor, patch;
};
struct Library {
  const Version* (*version)();
  int (*engine_create)(Handle*, int, size_t);
  int (*stream_create)(Handle*, Handle, unsigned);
  int (*stream_wait)(Handle);
  int (*attr_create)(Handle*);
  int (*attr_set_scratchpad_mode)(Handle, int);
  int (*md_create_with_strides)(Handle*, int, const int64_t*, int, const int64_t*);
  int (*md_create_with_tag)(Handle*, int, const int64_t*, int, int);
  size_t (*md_get_size)(Handle);
  int (*md_equal)(Handle, Handle);
  int (*forward_create)(Handle*, Handle, int, int, Handle, Handle, Handle, Handle, const int64_t*,
                        const int64_t*, const int64_t*, const int64_t*, Handle);
  int (*data_create)(Handle*, Handle, int, Handle, Handle, Handle, const int64_t*, const int64_t*,
                     const int64_t*, const int64_t*, Handle, Handle);
  int (*weights_create)(Handle*, Handle, int, Handle, Handle, Handle, Handle, const int64_t*,
                        const int64_t*, const int64_t*, const int64_t*, Handle, Handle);
  int (*reorder_create)(Handle*, Handle, Handle, Handle, Handle, Handle);
  Handle (*query_md)(Handle, int, int);
  int (*primitive_create)(Handle*, Handle);
  int (*execute)(Handle, Handle, int, const Argument*);
  int (*memory_create)(Handle*, Handle, Handle, void*);
  int (*memory_destroy)(Handle);
  void (*set_threads)(int);
  int (*get_threads)();
  Handle engine = nullptr;
  Handle attr = nullptr;
};
Library lib;

void check(int status, const char* what) {
  if (status != 0)
    throw std::runtime_error(std::string(what) + ": oneDNN's status " + std::to_string(status));
}

// OpenMP's threads of this thread are one while it lives.
class OneThread {
 public:
  OneThread() : before_(lib.get_threads()) { lib.set_threads(1); }
  ~OneThread() { lib.set_threads(before_); }

 private:
  int before_;
};

// Memory that a thread keeps from call to call.
class Buffer {
 public:
  ~Buffer() { free(data_); }
  void* of(size_t size) {
    if (size > size_) {
      free(data_);
      size_ = (size + 4095) / 4096 * 4096;
      data_ = aligned_alloc(4096, size_);
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

Handle stream() {
  static thread_local Handle made = nullptr;
  if (made == nullptr) check(lib.stream_create(&made, lib.engine, kInOrder), "stream");
  return made;
}

class Memory {
 public:
  Memory(Handle md, void* data) {
    check(lib.memory_create(&memory_, md, lib.engine, data), "memory");
  }
  ~Memory() { lib.memory_destroy(memory_); }
  operator Handle() const { return memory_; }

 private:
  Handle memory_ = nullptr;
};

enum Kind { kForward, kData, kKernel };

// A convolution: sizes of x (n, h, w, c), y (n, oh, ow, o), kernel (kh, kw, c / groups, o).
struct Shape {
  int64_t n, h, w, c, oh, ow, o, kh, kw, groups, sh, sw, top, bottom, left, right;
  std::array<int64_t, 16> key() const {
    return {n, h, w, c, oh, ow, o, kh, kw, groups, sh, sw, top, bottom, left, right};
  }
};

// A primitive of one shape; never freed, as many as there are shapes in a program.
struct Plan {
  Handle primitive = nullptr, reorder = nullptr;
  Handle x = nullptr, y = nullptr, plain = nullptr, packed = nullptr, scratchpad = nullptr;
  size_t scratch = 0, kernel = 0;
};

Handle image(int64_t n, int64_t h, int64_t w, int64_t c) {
  Dims dims = {n, c, h, w}, strides = {h * w * c, 1, w * c, c};
  Handle md = nullptr;
  check(lib.md_create_with_strides(&md, 4, dims, kF32, strides), "image");
  return md;
}

const Plan& plan(Kind kind, const Shape& s) {
  static std::mutex mutex;
  static std::map<std::pair<int, std::array<int64_t, 16>>, std::unique_ptr<Plan>> plans;
  std::lock_guard<std::mutex> guard(mutex);
  auto& found = plans[{kind, s.key()}];
  if (found) return *found;
  auto p = std::make_unique<Plan>();
  const int64_t in = s.c / s.groups, out = s.o / s.groups;
  Dims kernel = {s.o, in, s.kh, s.kw}, order = {1, s.o, s.kw * in * s.o, in * s.o};
  Dims grouped = {s.groups, out, in, s.kh, s.kw}, sorted = {out, 1, s.o, s.kw * in * s.o, in * s.o};
  const bool many = s.groups > 1;
  const int axes = many ? 5 : 4;
  Handle any = nullptr;
  check(lib.md_create_with_strides(&p->plain, axes, many ? grouped : kernel, kF32,
                                   many ? sorted : order),
        "kernel");
  check(lib.md_create_with_tag(&any, axes, many ? grouped : kernel, kF32, kAny), "kernel");
  p->x = image(s.n, s.h, s.w, s.c);
  p->y = image(s.n, s.oh, s.ow, s.o);
  Dims strides = {s.sh, s.sw}, none = {0, 0}, before = {s.top, s.left}, after = {s.bottom, s.right};
  Handle forward = nullptr, description = nullptr;
  check(lib.forward_create(&forward, lib.engine, kForwardTraining, kDirect, p->x, any, nullptr,
                           p->y, strides, none, before, after, lib.attr),
        "forward");
  if (kind == kForward) description = forward;
  if (kind == kData)
    check(lib.data_create(&description, lib.engine, kDirect, p->x, any, p->y, strides, none, before,
                          after, forward, lib.attr),
          "gradient of the input");
  if (kind == kKernel)
    check(lib.weights_create(&description, lib.engine, kDirect, p->x, any, nullptr, p->y, strides,
                             none, before, after, forward, lib.attr),
          "gradient of the kernel");
  p->packed = lib.query_md(description, kind == kKernel ? kQueryDiffWeights : kQueryWeights, 0);
  p->scratchpad = lib.query_md(description, kQueryScratchpad, 0);
  p->scratch = lib.md_get_size(p->scratchpad);
  p->kernel = lib.md_get_size(p->packed);
  check(lib.primitive_create(&p->primitive, description), "primitive");
  if (!lib.md_equal(p->packed, p->plain)) {
    Handle from = kind == kKernel ? p->packed : p->plain,
           to = kind == kKernel ? p->plain : p->packed;
    Handle reorder = nullptr;
    check(lib.reorder_create(&reorder, from, lib.engine, to, lib.engine, nullptr), "reorder");
    check(lib.primitive_create(&p->reorder, reorder), "reorder");
  }
  found = std::move(p);
  return *found;
}

// Rows first..last of the images n0..n1 (of one image, or all rows of several).
struct Segment {
  int64_t n0, n1, first, last;
};

// The segments of rows begin..end, counted through all images of `rows` rows.
std::vector<Segment> segments(int64_t begin, int64_t end, int64_t rows) {
  std::vector<Segment> found;
  while (begin < end) {
    const int64_t n = begin / rows, first = begin % rows;
    if (first == 0 && end - begin >= rows) {
      found.push_back({n, end / rows, 0, rows});
      begin = end / rows * rows;
    } else {
      const int64_t last = std::min(rows, first + end - begin);
      found.push_back({n, n + 1, first, last});
      begin = n * rows + last;
    }
  }
  return found;
}

// The convolution of a segment, and where its x and y begin.
struct Piece {
  Shape shape;
  int64_t x, y;
  bool empty() const { return shape.h <= 0 || shape.oh <= 0; }
};

int64_t up(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : 0; }

Piece piece(Kind kind, const Shape& s, const Segment& part) {
  Shape p = s;
  p.n = part.n1 - part.n0;
  int64_t x0 = 0, x1 = s.h, y0 = 0, y1 = s.oh;
  if (part.last - part.first == (kind == kData ? s.h : s.oh)) {
    // Whole images, with the rows that nothing reaches: the next image begins after them.
  } else if (kind == kData) {  // rows of x, and the rows of y that saw them
    x0 = part.first, x1 = part.last;
    y0 = up(x0 + s.top - s.kh + 1, s.sh), y1 = std::min(s.oh, (x1 - 1 + s.top) / s.sh + 1);
    y0 = std::min(y0, y1);
  } else {  // rows of y, and the rows of x that they saw
    y0 = part.first, y1 = part.last;
    x0 = std::max<int64_t>(0, y0 * s.sh - s.top),
    x1 = std::min(s.h, (y1 - 1) * s.sh - s.top + s.kh);
    x1 = std::max(x0, x1);
  }
  p.h = x1 - x0, p.oh = y1 - y0;
  p.top = x0 + s.top - y0 * s.sh;
  p.bottom = std::max<int64_t>(0, (p.oh - 1) * s.sh + s.kh - p.h - p.top);
  return {p, ((part.n0 * s.h + x0) * s.w) * s.c, ((part.n0 * s.oh + y0) * s.ow) * s.o};
}

// Work in numbered pieces that several threads take.
struct Job {
  std::function<void(int)> run;
  int pieces;
  std::atomic<int> next{0}, done{0};
  std::mutex mutex;
  std::string error;
  void take() {
    OneThread one;
    for (int i; (i = next.fetch_add(1)) < pieces;) {
      try {
        run(i);
      } catch (const std::exception& e) {
        std::lock_guard<std::mutex> guard(mutex);
        error = e.what();
      }
      done.fetch_add(1);
    }
  }
};

ffi::Error work(ffi::ThreadPool& pool, int pieces, std::function<void(int)> run) {
  auto job = std::make_shared<Job>();
  job->run = std::move(run);
  job->pieces = pieces;
  const int others = std::min<int64_t>(pieces, pool.num_threads()) - 1;
  for (int i = 0; i < others; ++i) pool.Schedule([job] { job->take(); });
  job->take();
  while (job->done.load() < pieces) sched_yield();
  if (!job->error.empty()) return ffi::Error::Internal(job->error);
  return ffi::Error::Success();
}

void execute(const Plan& p, std::initializer_list<Argument> arguments) {
  static thread_local Buffer buffer;
  Memory scratch(p.scratchpad, buffer.of(std::max<size_t>(p.scratch, 64)));
  std::vector<Argument> all(arguments);
  all.push_back({kScratchpad, scratch});
  check(lib.execute(p.primitive, stream(), static_cast<int>(all.size()), all.data()), "execute");
  check(lib.stream_wait(stream()), "wait");
}

void reorder(const Plan& p, Handle from, Handle to) {
  Argument arguments[] = {{kSrc, from}, {kDst, to}};
  check(lib.execute(p.reorder, stream(), 2, arguments), "reorder");
  check(lib.stream_wait(stream()), "wait");
}

constexpr double kSmall = 2e6;  // multiplications that are not worth a second thread

template <Kind kind>
ffi::Error convolve(ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer b,
                    ffi::Result<ffi::AnyBuffer> out, ffi::Span<const int64_t> strides,
                    ffi::Span<const int64_t> pads, int64_t groups, int64_t pieces) {
  try {
    auto x = kind == kData ? out->dimensions() : a.dimensions();
    auto y = kind == kForward ? out->dimensions() : kind == kData ? a.dimensions() : b.dimensions();
    auto w = kind == kKernel ? out->dimensions() : b.dimensions();
    const Shape s = {x[0], x[1],   x[2],       x[3],       y[1],    y[2],    y[3],    w[0],
                     w[1], groups, strides[0], strides[1], pads[0], pads[1], pads[2], pads[3]};
    const int64_t rows = kind == kData ? s.h : s.oh, total = s.n * rows;
    const double products = double(s.n) * s.oh * s.ow * s.o * s.kh * s.kw * (s.c / groups);
    int64_t count = products < kSmall ? 1 : std::max<int64_t>(1, pool.num_threads());
    count = std::min(pieces ? pieces : count, total);
    auto* pa = static_cast<float*>(a.untyped_data());
    auto* pb = static_cast<float*>(b.untyped_data());
    auto* po = static_cast<float*>(out->untyped_data());
    const size_t kernel = size_t(s.kh) * s.kw * (s.c / groups) * s.o;
    static thread_local Buffer shared;
    OneThread one;
    if (kind == kKernel) {
      auto* sums =
          static_cast<float*>(shared.of(kernel * sizeof(float) * std::max<int64_t>(1, count - 1)));
      auto error = work(pool, count, [&](int i) {
        static thread_local Buffer packed, again;
        float* sum = i == 0 ? po : sums + (i - 1) * kernel;
        float* target = sum;
        for (const auto& part : segments(total * i / count, total * (i + 1) / count, rows)) {
          const Piece q = piece(kind, s, part);
          if (q.empty()) continue;
          const Plan& p = plan(kind, q.shape);
          if (target != sum) target = static_cast<float*>(again.of(kernel * sizeof(float)));
          Memory mx(p.x, pa + q.x), my(p.y, pb + q.y), plain(p.plain, target);
          if (p.reorder) {
            Memory mk(p.packed, packed.of(p.kernel));
            execute(p, {{kSrc, mx}, {kDiffDst, my}, {kDiffWeights, mk}});
            reorder(p, mk, plain);
          } else {
            execute(p, {{kSrc, mx}, {kDiffDst, my}, {kDiffWeights, plain}});
          }
          if (target != sum)
            for (size_t j = 0; j < kernel; ++j) sum[j] += target[j];
          target = nullptr;  // further segments are added
        }
      });
      for (int64_t i = 1; i < count; ++i)
        for (size_t j = 0; j < kernel; ++j) po[j] += sums[(i - 1) * kernel + j];
      return error;
    }
    // The kernel as oneDNN wants it, once for each form that the pieces ask for.
    struct Todo {
      const Plan* plan;
      Piece piece;
      size_t kernel;
    };
    std::vector<std::vector<Todo>> todo(count);
    std::vector<std::pair<const Plan*, size_t>> forms;
    size_t size = 0;
    for (int64_t i = 0; i < count; ++i)
      for (const auto& part : segments(total * i / count, total * (i + 1) / count, rows)) {
        const Piece q = piece(kind, s, part);
        if (q.empty()) {  // rows that nothing reaches
          const Shape& e = q.shape;
          if (kind == kForward) memset(po + q.y, 0, sizeof(float) * e.n * e.oh * e.ow * e.o);
          if (kind == kData) memset(po + q.x, 0, sizeof(float) * e.n * e.h * e.w * e.c);
          continue;
        }
        const Plan& p = plan(kind, q.shape);
        size_t at = SIZE_MAX;
        if (p.reorder) {
          for (auto& form : forms)
            if (lib.md_equal(form.first->packed, p.packed)) at = form.second;
          if (at == SIZE_MAX) {
            forms.push_back({&p, at = size});
            size += (p.kernel + 63) / 64 * 64;
          }
        }
        todo[i].push_back({&p, q, at});
      }
    auto* packed = static_cast<char*>(shared.of(std::max<size_t>(size, 64)));
    for (auto& form : forms) {
      Memory plain(form.first->plain, pb), mk(form.first->packed, packed + form.second);
      reorder(*form.first, plain, mk);
    }
    return work(pool, count, [&](int i) {
      for (const auto& t : todo[i]) {
        const Plan& p = *t.plan;
        Memory mk(p.reorder ? p.packed : p.plain,
                  p.reorder ? static_cast<void*>(packed + t.kernel) : pb);
        Memory mx(p.x, (kind == kForward ? pa : po) + t.piece.x),
            my(p.y, (kind == kForward ? po : pa) + t.piece.y);
        if (kind == kForward)
          execute(p, {{kSrc, mx}, {kWeights, mk}, {kDst, my}});
        else
          execute(p, {{kDiffSrc, mx}, {kWeights, mk}, {kDiffDst, my}});
      }
    });
  } catch (const std::exception& e) {
    return ffi::Error::Internal(e.what());
  }
}

}  // namespace

// Looks the functions up; returns nullptr, or what is missing.
extern "C" const char* jaxaccum_onednn_open(const char* path) {
  static std::string missing;
  Handle h = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (h == nullptr) return (missing = dlerror()).c_str();
  auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(h, name));
    if (function == nullptr && missing.empty()) missing = std::string("no function ") + name;
  };
  find(lib.version, "dnnl_version");
  find(lib.engine_create, "dnnl_engine_create");
  find(lib.stream_create, "dnnl_stream_create");
  find(lib.stream_wait, "dnnl_stream_wait");
  find(lib.attr_create, "dnnl_primitive_attr_create");
  find(lib.attr_set_scratchpad_mode, "dnnl_primitive_attr_set_scratchpad_mode");
  find(lib.md_create_with_strides, "dnnl_memory_desc_create_with_strides");
  find(lib.md_create_with_tag, "dnnl_memory_desc_create_with_tag");
  find(lib.md_get_size, "dnnl_memory_desc_get_size");
  find(lib.md_equal, "dnnl_memory_desc_equal");
  find(lib.forward_create, "dnnl_convolution_forward_primitive_desc_create");
  find(lib.data_create, "dnnl_convolution_backward_data_primitive_desc_create");
  find(lib.weights_create, "dnnl_convolution_backward_weights_primitive_desc_create");
  find(lib.reorder_create, "dnnl_reorder_primitive_desc_create");
  find(lib.query_md, "dnnl_primitive_desc_query_md");
  find(lib.primitive_create, "dnnl_primitive_create");
  find(lib.execute, "dnnl_primitive_execute");
  find(lib.memory_create, "dnnl_memory_create");
  find(lib.memory_destroy, "dnnl_memory_destroy");
  find(lib.set_threads, "omp_set_num_threads");
  find(lib.get_threads, "omp_get_max_threads");
  if (!missing.empty()) return missing.c_str();
  if (lib.version()->major != 3) return "its version is not 3";
  if (lib.engine_create(&lib.engine, kCpu, 0) || lib.attr_create(&lib.attr) ||
      lib.attr_set_scratchpad_mode(lib.attr, kUser))
    return "oneDNN does not start";
  return nullptr;
}

// The version that was opened, as 1,000,000 major + 1,000 minor + patch.
extern "C" int jaxaccum_onednn_version() {
  const Version* v = lib.version();
  return v->major * 1000000 + v->minor * 1000 + v->patch;
}

#define HANDLER(name, kind)                                                    \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, convolve<kind>,                          \
                                ffi::Ffi::Bind()                               \
                                    .Ctx<ffi::ThreadPool>()                    \
                                    .Arg<ffi::AnyBuffer>()                     \
                                    .Arg<ffi::AnyBuffer>()                     \
                                    .Ret<ffi::AnyBuffer>()                     \
                                    .Attr<ffi::Span<const int64_t>>("strides") \
                                    .Attr<ffi::Span<const int64_t>>("pads")    \
                                    .Attr<int64_t>("groups")                   \
                                    .Attr<int64_t>("pieces"))

HANDLER(jaxaccum_onednn_forward, kForward);
HANDLER(jaxaccum_onednn_data, kData);
HANDLER(jaxaccum_onednn_kernel, kKernel);
