"""Speed and memory, measured in one run and written down: see docs/benchmarks.md.

python scripts/benchmark.py --out=docs/benchmarks.md [--results=FOLDER] [--only=update,memory,...]
    [--quick] [--again] [--torch=DIR] [--torch_python=PYTHON]
    [--kyolo_python=PYTHON] [--list]

Measures on what JAX computes on here, a CPU or one GPU. Every part of a measure runs in a process
of its own; its result is kept in FOLDER (by default beside the document) as soon as it is there, so
that an interrupted run goes on where it was, and results of other machines are kept beside. What is
there is measured anew with --again. The document is made from all results, after every part.

--quick uses tiny sizes: to see that everything works, not to know how fast it is.
--torch names the folder of a PyTorch that this Python does not find by itself:
    python -m pip install --target=DIR torch==2.13.0
--torch_python is the Python to run it with, where it is not for this one.
--kyolo_python is the Python of an environment with kyolo and a backend of Keras, jax or torch:
    python -m venv DIR && DIR/bin/pip install kyolo jax
Without PyTorch the comparisons with it are skipped, and listed as skipped; so are those with kyolo.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags
from benchmarks import harness, report
from benchmarks.measures import MEASURES, flags_of_xla

from jaxaccum.machine import host_memory

OUT = flags.DEFINE_string("out", "", "the document to write")
RESULTS = flags.DEFINE_string("results", "", "folder of results; that of --out without .md")
ONLY = flags.DEFINE_list("only", [], "measures or parts; all if empty")
QUICK = flags.DEFINE_bool("quick", False, "tiny sizes: to see that everything works")
AGAIN = flags.DEFINE_bool("again", False, "measure what has been measured before")
TORCH = flags.DEFINE_string("torch", "", "folder that PyTorch is installed in")
TORCH_PYTHON = flags.DEFINE_string(
    "torch_python", "", "Python that runs PyTorch; this one if empty"
)
KYOLO_PYTHON = flags.DEFINE_string(
    "kyolo_python", "", "Python of an environment with kyolo; without it kyolo is skipped"
)
LIST = flags.DEFINE_bool("list", False, "print the measures and end")
INSIDE = flags.DEFINE_string("inside", "", "used by this script itself: the part to measure here")
WARM = flags.DEFINE_bool("warm", False, "with --inside: only compile, to fill the caches")


def main(_) -> int:
    if LIST.value:
        print("\n".join(f"{key:<20} {m.title}" for m in MEASURES for key in m.keys))
        return 0
    if not OUT.value:
        raise app.UsageError("say where to write the document: --out=docs/benchmarks.md")
    out = Path(OUT.value)
    results = Path(RESULTS.value) if RESULTS.value else out.with_suffix("")
    if INSIDE.value:
        measure_here(results, INSIDE.value)
        return 0
    here = platform()
    wanted = [key for m in MEASURES for key in m.keys_on(here) if is_wanted(m, key)]
    unknown = set(ONLY.value) - {m.name for m in MEASURES} - {k for m in MEASURES for k in m.keys}
    if unknown:
        raise app.UsageError(f"no measure {', '.join(sorted(unknown))}; see --list")
    context = harness.Context(
        here, QUICK.value, TORCH.value, TORCH_PYTHON.value, KYOLO_PYTHON.value
    )
    failed = []
    for key in wanted:
        if not AGAIN.value and harness.is_done(results, key, context):
            print(f"{key}: there already", flush=True)
            continue
        print(f"{key}: measuring", flush=True)
        start = time.perf_counter()
        command = [sys.executable, __file__, *sys.argv[1:], f"--inside={key}"]
        # Two programs may share a GPU: each takes what it needs. Both have huge pages.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        environment |= host_memory.setting(environment)
        environment |= flags_of_xla(key, environment)
        status = subprocess.run(command, env=environment).returncode
        if status:
            failed.append(key)
        print(f"{key}: {'FAILED' if status else 'done'}, {time.perf_counter() - start:.0f} s")
        out.write_text(report.render(results, MEASURES))
    out.write_text(report.render(results, MEASURES))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def is_wanted(measure: harness.Measure, key: str) -> bool:
    """Whether --only names the measure or the part, or nothing at all."""
    return not ONLY.value or measure.name in ONLY.value or key in ONLY.value


def platform() -> harness.Platform:
    """What JAX computes on, asked in another process: this one holds no device.

    Raises:
      SystemExit: JAX does not work, or has several devices or another kind of them.
    """
    program = "import jax; print(jax.default_backend(), jax.local_device_count())"
    asked = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    words = asked.stdout.split()
    if asked.returncode or len(words) != 2 or words[0] not in ("cpu", "gpu") or words[1] != "1":
        raise SystemExit(f"this benchmark is for a CPU or one GPU; JAX has: {asked.stdout.strip()}")
    return "cpu" if words[0] == "cpu" else "gpu"


def measure_here(results: Path, key: str) -> None:
    """Measures one part and keeps its result."""
    import jax

    from jaxaccum.training import run

    run.use_compilation_cache()
    backend = jax.default_backend()
    context = harness.Context(
        "cpu" if backend == "cpu" else "gpu", QUICK.value, TORCH.value, TORCH_PYTHON.value,
        KYOLO_PYTHON.value, WARM.value, results,
    )  # fmt: skip
    name, _, part = key.partition(".")
    measure = next(m for m in MEASURES if m.name == name)
    start = time.perf_counter()
    try:
        found = measure.run(context, part)
    except harness.SkippedError as reason:
        print(f"{key}: skipped. {reason}", flush=True)
        if not WARM.value:
            harness.save_skipped(results, key, context, str(reason))
        return
    except harness.WarmedUp:
        print(f"{key}: compiled in {time.perf_counter() - start:.0f} s", flush=True)
        return
    if WARM.value:
        return  # nothing in it was to be compiled first
    for row in found.rows:
        print(f"  {row.label}: {report.figure(row)}  {row.note}")
    harness.save(results, key, context, found, time.perf_counter() - start)


if __name__ == "__main__":
    app.run(main)
