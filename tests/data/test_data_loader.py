"""The loader: a sample is a function of its position, whatever fetches it."""

import importlib.util
import itertools
import pickle
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxaccum.data import Augment, DataError, Objects, Report, Scenes, TrainStream, eval_batches

needs_grain = pytest.mark.skipif(
    importlib.util.find_spec("grain") is None, reason="grain is not installed"
)


class Memory:
    """A source of random images in memory; image i has i % 5 objects. Counts what is read."""

    names = ("a", "b", "c")
    identity = "0" * 12

    def __init__(self, length=11, objects=None):
        self.report = Report("memory")
        self.length = length
        self.count = objects
        self.reads = Counter()

    def __len__(self):
        return self.length

    def image(self, index):
        self.reads[index] += 1
        rng = np.random.default_rng(index)
        return rng.integers(0, 255, (40 + index, 60 - index, 3), np.uint8)

    def objects(self, index):
        rng = np.random.default_rng(index + 1000)
        count = index % 5 if self.count is None else self.count
        corner = rng.uniform(0, 15, (count, 2))
        sides = rng.uniform(10, 25, (count, 2))
        boxes = np.concatenate([corner, corner + sides], axis=1).astype(np.float32)
        return Objects(boxes, rng.integers(0, 3, count).astype(np.int32))

    def name(self, index):
        return f"{index}.png"


def stream(source=None, **changes):
    settings_ = {"image_size": 32, "max_objects": 30, "augment": Augment(mixup=0.3), "seed": 5}
    return TrainStream(source or Memory(), **{**settings_, **changes})


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert first[key].dtype == second[key].dtype, key
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)


def joined(batches):
    batches = list(batches)
    return {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}


def test_a_sample_has_its_shapes_and_types():
    sample = stream().sample(3)
    assert {key: (value.shape, value.dtype.name) for key, value in sample.items()} == {
        "image": ((32, 32, 3), "uint8"),
        "boxes": ((30, 4), "float32"),
        "classes": ((30,), "int32"),
        "valid": ((30,), "bool"),
        "weight": ((), "float32"),
        "index": ((), "int32"),
        "epoch": ((), "int32"),
    }
    assert sample["weight"] == 1
    count = sample["valid"].sum()
    assert sample["valid"][:count].all() and not sample["boxes"][count:].any()


def test_an_epoch_is_a_permutation_of_seed_and_epoch_alone():
    first = stream()
    orders = [first.order(epoch) for epoch in range(4)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(11))
    assert len({tuple(order.tolist()) for order in orders}) == 4
    other = stream(image_size=64, augment=Augment(), cache="none", close_mosaic_at=0)
    np.testing.assert_array_equal(other.order(2), orders[2])
    assert not np.array_equal(stream(seed=6).order(2), orders[2])
    seen = [first.sample(n) for n in range(22)]
    assert [int(s["index"]) for s in seen] == orders[0].tolist() + orders[1].tolist()
    assert [int(s["epoch"]) for s in seen] == [0] * 11 + [1] * 11


def test_augmentation_differs_between_epochs_seeds_and_samples():
    one = Memory(length=1)
    images = [stream(one).sample(n)["image"].tobytes() for n in range(4)]
    images += [stream(one, seed=9).sample(n)["image"].tobytes() for n in range(4)]
    assert len(set(images)) == 8


def test_samples_draw_from_seed_epoch_and_index():
    """Pins the rule: change it and every run in progress changes."""
    from jaxaccum.data.augment import Sample, augmented, resize_long

    source, run = Memory(), stream()

    def load(index):
        image = source.image(index)
        resized = resize_long(image, 32)
        x, y = resized.shape[1] / image.shape[1], resized.shape[0] / image.shape[0]
        objects = source.objects(index)
        return Sample(resized, objects.boxes * np.array([x, y, x, y], np.float32), objects.classes)

    for position in (0, 13, 40):
        epoch, place = divmod(position, 11)
        index = int(run.order(epoch)[place])
        rng = np.random.Generator(np.random.PCG64([5, epoch, index]))
        expected = augmented(load, index, 11, 32, Augment(mixup=0.3), rng)
        sample = run.sample(position)
        np.testing.assert_array_equal(sample["image"], expected.image)
        np.testing.assert_array_equal(sample["boxes"][sample["valid"]], expected.boxes)
        np.testing.assert_array_equal(sample["classes"][sample["valid"]], expected.classes)


BACKENDS = ["threads", pytest.param("grain", marks=needs_grain)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_are_the_samples_in_order(backend):
    expected = [stream().sample(n) for n in range(4, 25)]
    for sizes in ([21], [1] * 21, [2, 3, 16], [16, 5]):
        for prefetch in (0, 2):
            batches = list(stream().windows(4, sizes, prefetch=prefetch, backend=backend))
            assert [len(b["index"]) for b in batches] == sizes
            rows = joined(batches)
            for i, sample in enumerate(expected):
                assert_same({k: v[i] for k, v in rows.items()}, sample)


@pytest.mark.parametrize("backend", BACKENDS)
@given(start=st.integers(0, 40), sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4))
@settings(max_examples=8, deadline=None)
def test_resuming_anywhere_gives_the_same(backend, start, sizes):
    run = stream()
    whole = list(run.windows(start, sizes, backend=backend))
    again = list(run.windows(start + sizes[0], sizes[1:], backend=backend))
    for first, second in zip(whole[1:], again, strict=True):
        assert_same(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_may_be_endless_and_abandoned(backend):
    batches = stream().windows(0, itertools.repeat(3), backend=backend, prefetch=1)
    assert [len(next(batches)["index"]) for _ in range(4)] == [3] * 4
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("samples")]
    assert list(stream().windows(0, [], backend=backend)) == []


@pytest.mark.slow
@needs_grain
def test_worker_processes_give_the_same():
    """In a process of its own: workers import __main__, which must not be pytest's."""
    program = """
import numpy as np
from jaxaccum.data import Augment, Scenes, TrainStream

def rows(workers):
    run = TrainStream(Scenes("train", length=9, size=64), image_size=32, max_objects=3,
                      augment=Augment(), seed=1)
    batches = list(run.windows(3, [4, 5], workers=workers))
    return run.truncated, {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}

if __name__ == "__main__":
    (lost, here), (also_lost, there) = rows(0), rows(2)
    assert lost == also_lost > 0
    assert all(np.array_equal(here[k], there[k]) for k in here)
    print("same")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip().endswith("same"), done.stderr


@needs_grain
@pytest.mark.slow
def test_worker_processes_give_the_same_boxes_in_space_and_captions():
    """As above, of the streams of 3D detection and of clouds with captions."""
    program = """
import numpy as np
from jaxaccum.data import Augment3D, CloudStream, Shapes, TrainStream3D
from jaxaccum.data.captions import Texts
from jaxaccum.data.cloud_sources import CroppedClouds
from jaxaccum.data.synthetic.streets import StreetsSource
from jaxaccum.models.text import encoder

def streams():
    yield TrainStream3D(StreetsSource("train", count=5, size=(64, 96)), size=(32, 64),
                        max_objects=3, augment=Augment3D(), seed=1)
    clouds = CroppedClouds(Shapes("train", length=5), False, "median", 1, 2**28)
    texts = Texts.of(clouds, None, encoder("hashed-32"), None)
    yield CloudStream(clouds, seed=1, mirror=True, texts=texts)

def rows(stream, workers):
    batches = list(stream.windows(3, [4, 3], workers=workers))
    return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}

if __name__ == "__main__":
    for one, other in zip(streams(), streams()):
        here, there = rows(one, 0), rows(other, 2)
        assert all(np.array_equal(here[k], there[k]) for k in here), type(one)
        assert {"camera", "yaw"} <= set(here) or {"text", "caption"} <= set(here)
    print("same")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.stdout.strip().endswith("same"), done.stderr


def test_closing_mosaic_is_a_position_in_the_run():
    source = Memory(length=4)
    closed = stream(source, close_mosaic_at=6)
    plain = stream(source, augment=Augment(mosaic=0))
    opened = stream(source)
    for n in range(12):
        same_as = opened if n < 6 else plain
        assert_same(closed.sample(n), same_as.sample(n))
    assert not np.array_equal(opened.sample(6)["image"], closed.sample(6)["image"])


def test_without_any_augmentation_a_sample_is_the_letterboxed_image():
    off = Augment(mosaic=0, translate=0, scale=0, hsv_h=0, hsv_s=0, hsv_v=0, fliplr=0)
    source = Memory()
    run = stream(source, augment=off)
    expected = next(eval_batches(source, image_size=32, batch=11))
    exact = 0
    for n in range(11):
        sample = run.sample(n)
        i = int(sample["index"])
        # An odd number of rows to fill cannot be split evenly: the affine moves half a pixel.
        np.testing.assert_allclose(
            sample["boxes"][sample["valid"]], expected["boxes"][i][expected["valid"][i]], atol=0.501
        )
        content = np.rint(expected["size"][i] * expected["ratio"][i][::-1])
        if (content % 2 == 0).all():
            np.testing.assert_array_equal(sample["image"], expected["image"][i])
            exact += 1
    assert exact >= 3


def test_the_cache_changes_no_pixel_and_keeps_its_bound():
    source = Memory()
    cached = stream(source)
    bytes_one = 32 * 32 * 3
    small = stream(source, cache_bytes=3 * bytes_one)
    none = stream(source, cache="none")
    for n in (0, 5, 3, 0, 20):
        expected = none.sample(n)
        assert_same(cached.sample(n), expected)
        assert_same(small.sample(n), expected)
        assert small._images._bytes <= 3 * bytes_one
        assert small._images._bytes == sum(i.nbytes for i, _ in small._images._kept.values())
    source.reads.clear()
    for n in range(44):
        cached.sample(n)
    for n in range(44):
        cached.sample(n)
    assert max(source.reads.values()) <= 1
    assert not none._images._kept


def test_the_stream_is_safe_among_threads():
    run = stream(cache_bytes=20_000)
    expected = [stream(cache="none").sample(n) for n in range(60)]
    with ThreadPoolExecutor(8) as pool:
        for got, want in zip(pool.map(run.sample, range(60)), expected, strict=True):
            assert_same(got, want)


def test_streams_pickle_without_their_cache():
    run = stream()
    run.sample(0)
    copy = pickle.loads(pickle.dumps(run))
    assert not copy._images._kept
    assert_same(copy.sample(7), run.sample(7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_objects_beyond_the_limit_are_counted_and_the_smallest_go(backend):
    off = Augment(mosaic=0, translate=0, scale=0, fliplr=0)
    source = Memory(objects=5)
    full = stream(source, augment=off)
    few = stream(source, augment=off, max_objects=2)
    batches = joined(few.windows(0, [4, 4], backend=backend))
    assert few.truncated == 8 * 3 and full.truncated == 0
    few.sample(0)
    assert few.truncated == 9 * 3
    for n in range(8):
        whole = full.sample(n)
        boxes = whole["boxes"][whole["valid"]]
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        largest = np.sort(np.argsort(-areas)[:2])
        np.testing.assert_array_equal(batches["boxes"][n], boxes[largest])
        np.testing.assert_array_equal(batches["classes"][n], whole["classes"][largest])


class Broken(Memory):
    def image(self, index):
        if index == 7:
            raise DataError("7.png: damaged", file="7.png")
        return super().image(index)


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_reach_the_caller(backend):
    with pytest.raises(DataError, match=r"7\.png: damaged"):
        list(stream(Broken()).windows(0, [20], backend=backend))
    with pytest.raises(DataError, match=r"7\.png: damaged"):
        list(eval_batches(Broken(), image_size=32, batch=4))


def test_wrong_arguments_say_what_was_expected():
    for wrong, said in [
        ({"image_size": 1}, "image_size is 1, expected at least 2"),
        ({"max_objects": 0}, "max_objects is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"close_mosaic_at": -1}, "close_mosaic_at is -1"),
        ({"cache": "disk"}, "cache is 'disk', expected 'ram' or 'none'"),
    ]:
        with pytest.raises(ValueError, match=said):
            stream(**wrong)
    with pytest.raises(ValueError, match="must not be negative"):
        stream().windows(-1, [2])
    with pytest.raises(ValueError, match="an effective batch of 0 samples"):
        list(stream().windows(0, [0]))
    with pytest.raises(ValueError, match="backend is 'torch'"):
        stream().windows(0, [2], backend="torch")
    with pytest.raises(ValueError, match="worker processes need the backend 'grain'"):
        stream().windows(0, [2], workers=1, backend="threads")
    with pytest.raises(ValueError, match="batch 0"):
        eval_batches(Memory(), image_size=32, batch=0)


def test_without_grain_threads_serve_and_workers_are_refused(monkeypatch):
    expected = list(stream().windows(0, [3]))
    monkeypatch.setattr("jaxaccum.data.stream.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "grain", None)
    assert_same(next(stream().windows(0, [3])), expected[0])
    with pytest.raises(ImportError, match="pip install grain, or set workers=0"):
        stream().windows(0, [3], workers=2)
    with pytest.raises(ImportError, match="pip install grain"):
        stream().windows(0, [3], backend="grain")


def test_the_package_imports_without_grain_tfds_and_pillow():
    program = (
        "import sys\n"
        "for name in ('grain', 'tensorflow_datasets', 'PIL', 'jax'): sys.modules[name] = None\n"
        "from jaxaccum.data import Augment, Scenes, TrainStream\n"
        "run = TrainStream(Scenes('train', size=64), image_size=32, max_objects=9, seed=0,\n"
        "                  augment=Augment())\n"
        "print(next(run.windows(0, [2], backend='threads'))['image'].shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "(2, 32, 32, 3)", done.stderr


# --- evaluation ---


def test_evaluation_covers_the_set_once_and_fills_up_the_last_batch():
    source = Memory()
    batches = list(eval_batches(source, image_size=48, batch=4, max_objects=6))
    assert [len(b["index"]) for b in batches] == [4, 4, 4]
    rows = joined(batches)
    assert rows["weight"].tolist() == [1.0] * 11 + [0.0]
    assert rows["index"].tolist() == [*range(11), -1]
    assert not rows["valid"][11].any() and (rows["image"][11] == 114).all()
    assert rows["image"].shape == (12, 48, 48, 3) and rows["boxes"].shape == (12, 6, 4)
    for key in ("ratio", "pad", "size"):
        assert rows[key].shape == (12, 2) and rows[key].dtype == np.float32


def test_evaluation_boxes_map_back_to_the_original():
    source = Memory()
    rows = joined(eval_batches(source, image_size=48, batch=4))
    for i in range(11):
        ratio, pad = rows["ratio"][i], rows["pad"][i]
        boxes = rows["boxes"][i][rows["valid"][i]]
        back = (boxes.reshape(-1, 2, 2) - pad) / ratio
        np.testing.assert_allclose(back.reshape(-1, 4), source.objects(i).boxes, atol=1e-3)
        assert rows["size"][i].tolist() == [40 + i, 60 - i]
        np.testing.assert_array_equal(
            rows["classes"][i][rows["valid"][i]], source.objects(i).classes
        )


def test_evaluation_refuses_to_leave_objects_out():
    source = Memory()  # at most 4 objects
    with pytest.raises(DataError, match=r"4\.png: 4 objects, but max_objects is 3.*at least 4"):
        eval_batches(source, image_size=32, batch=4, max_objects=3)
    assert next(eval_batches(source, image_size=32, batch=4))["boxes"].shape[1] == 4
    assert next(eval_batches(Memory(objects=0), image_size=32, batch=4))["boxes"].shape[1] == 1


def test_scenes_train_and_evaluate():
    run = TrainStream(
        Scenes("train", size=64), image_size=64, max_objects=40, augment=Augment(), seed=0
    )
    batch = next(run.windows(0, [8]))
    assert batch["valid"].sum() > 8 and run.truncated == 0
    boxes = batch["boxes"][batch["valid"]]
    assert (boxes >= 0).all() and (boxes <= 64).all()
    assert (boxes[:, 2:] - boxes[:, :2] > 2).all()
    val = next(eval_batches(Scenes("val", size=64, length=5), image_size=64, batch=8))
    assert val["weight"].sum() == 5
