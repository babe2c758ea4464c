"""Clouds: sampling, cropping and poses by the rules of the references, and samples by position."""

import importlib.util
import itertools
import pickle
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxaccum.data import (
    CloudReport,
    CloudStream,
    DataError,
    SampleStream,
    cloud_batches,
    prepare_partial,
)
from jaxaccum.data.cloud_ops import (
    CORNERS,
    box_pose,
    farthest_points,
    fixed_crop,
    mirror_factors,
    random_crop,
    remainder,
    repeated,
    subsampled,
    unit_pose,
)

needs_grain = pytest.mark.skipif(
    importlib.util.find_spec("grain") is None, reason="grain is not installed"
)
BACKENDS = ["threads", pytest.param("grain", marks=needs_grain)]


def random(seed=0):
    return np.random.default_rng(seed)


def sphere(count, seed=0, radius=1.0):
    points = random(seed).standard_normal((count, 3))
    return (radius * points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def rows(points):
    return sorted(map(tuple, points.tolist()))


# --- farthest points ---


def kernel(points, count):
    """The reference's kernel, step by step: threads, each with its best, reduced in a tree."""
    points = points.astype(np.float32)
    n = len(points)
    threads = min(512, 2 ** int(np.log2(n)))
    far = np.full(n, 1e10, np.float32)
    chosen = [0]
    while len(chosen) < count:
        best, at = np.full(threads, -1, np.float32), np.zeros(threads, int)
        x1, y1, z1 = points[chosen[-1]]
        for k, (x, y, z) in enumerate(points):
            if x * x + y * y + z * z <= np.float32(1e-3):
                continue
            far[k] = min(far[k], (x - x1) ** 2 + (y - y1) ** 2 + (z - z1) ** 2)
            thread = k % threads
            if far[k] > best[thread]:
                best[thread], at[thread] = far[k], k
        half = threads // 2
        while half:
            for t in range(half):
                if best[t + half] > best[t]:
                    best[t], at[t] = best[t + half], at[t + half]
            half //= 2
        chosen.append(int(at[0]))
    return chosen


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 100])
def test_farthest_points_are_the_kernels(n):
    points = random(n).standard_normal((n, 3)).astype(np.float32)
    assert farthest_points(points, n).tolist() == kernel(points, n)


@given(st.lists(st.tuples(*[st.integers(-2, 2)] * 3), min_size=1, max_size=40), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_ties_padding_and_too_few_points_are_the_kernels_too(points, count):
    """Points of a lattice: many equal distances, duplicates, and points at the origin."""
    points = np.array(points, np.float32) / 4
    assert farthest_points(points, count).tolist() == kernel(points, count)


def test_ties_beyond_the_threads_of_a_block():
    points = np.concatenate([[(9, 0, 0)], np.tile([(1, 0, 0), (0, 1, 0)], (700, 1))])
    points = points.astype(np.float32)
    assert farthest_points(points, 5).tolist() == kernel(points, 5)


def test_more_points_than_there_are_repeat_the_first_valid_one():
    points = np.array([(0, 0, 0), (1, 0, 0), (0, 2, 0), (0.01, 0, 0)], np.float32)
    chosen = farthest_points(points, 7).tolist()
    assert chosen[:3] == [0, 2, 1]  # point 0 starts, though it lies at the origin
    assert len(set(chosen[3:])) == 1 and chosen[3] in (1, 2)
    assert farthest_points(np.zeros((5, 3), np.float32), 3).tolist() == [0, 0, 0]


def test_farthest_points_are_those_of_the_models():
    points = pytest.importorskip("jaxaccum.models.points")
    lattice = (random(3).integers(-8, 9, (2, 500, 3)) / 8).astype(np.float32)
    expected = np.asarray(points.farthest_points(lattice, 200))
    for cloud, want in zip(lattice, expected, strict=True):
        np.testing.assert_array_equal(farthest_points(cloud, 200), want)


# --- cropping ---


def test_the_remainder_is_what_is_farthest_in_ascending_order():
    points, centre = sphere(200), np.array([0, 0, 1], np.float32)
    rest = remainder(points, centre, 50)
    distance = np.linalg.norm(points.astype(np.float64) - centre, axis=1)
    np.testing.assert_allclose(
        np.linalg.norm(rest - centre, axis=1), np.sort(distance)[50:], rtol=1e-5
    )
    assert set(rows(rest)) < set(rows(points))


@pytest.mark.parametrize(("mode", "left"), [("easy", 6144), ("median", 4096), ("hard", 2048)])
def test_evaluation_crops_the_nearest_part_from_a_corner(mode, left):
    points = sphere(8192)
    partial = fixed_crop(points, 3, mode)
    assert partial.shape == (2048, 3) and partial.dtype == np.float32
    towards = points @ CORNERS[3]
    limit = np.sort(towards)[left - 1]
    assert (partial @ CORNERS[3] <= limit + 1e-5).all()
    # The first is the one nearest the cut.
    np.testing.assert_allclose(partial[0] @ CORNERS[3], limit, atol=1e-5)
    assert len(set(rows(partial))) == 2048


def test_a_hard_crop_never_takes_points_near_the_origin():
    outer = sphere(20000)
    towards = outer @ CORNERS[6]
    near, opposite = outer[towards > 0.6][:6144], outer[towards < -0.6][:1948]
    inner = sphere(100, 1, 0.02)
    points = np.concatenate([near, inner, opposite])
    assert len(points) == 8192
    partial = fixed_crop(points, 6, "hard")
    found = Counter(rows(partial))
    # The first, nearest the cut, is taken whatever it is; then none of the inner ones is.
    start = remainder(points, CORNERS[6], 6144)[0]
    assert np.linalg.norm(start) < 0.03
    assert set(found) == {*rows(opposite), tuple(start.tolist())}
    # One point fills the room of the 99 others.
    assert sorted(found.values())[-2:] == [1, 100]


def test_training_crops_a_quarter_to_three_quarters_from_all_sides():
    points = sphere(400)
    left, sides = [], []
    for seed in range(200):
        crop = random_crop(points, random(seed))
        assert crop.shape == (2048, 3)
        rest = np.unique(crop, axis=0)
        left.append(len(rest))
        sides.append(rest.mean(axis=0))
    assert min(left) >= 100 and max(left) <= 300
    assert min(left) < 110 and max(left) > 290 and abs(np.mean(left) - 200) < 15
    assert (np.abs(np.mean(sides, axis=0)) < 0.08).all() and np.std(sides) > 0.1


def test_a_training_crop_draws_direction_then_count():
    """Pins the rule: change it and every run in progress changes."""
    points, rng = sphere(8192), random(4)
    crop = random_crop(points, random(4))
    direction = rng.standard_normal(3)
    direction = (direction / np.linalg.norm(direction)).astype(np.float32)
    removed = rng.integers(2048, 6144, endpoint=True)
    rest = remainder(points, direction, removed)
    np.testing.assert_array_equal(crop, rest[farthest_points(rest, 2048)])


# --- sampling, mirroring ---


def test_a_subsample_is_distinct_points_or_all_and_zeros():
    many, few = sphere(3000), sphere(1500)
    chosen = subsampled(many, random())
    assert len(set(rows(chosen))) == 2048 and set(rows(chosen)) < set(rows(many))
    assert rows(chosen) != rows(subsampled(many, random(1)))
    padded = subsampled(few, random())
    assert padded.shape == (2048, 3) and rows(padded[:1500]) == rows(few)
    assert not padded[1500:].any()
    assert not np.array_equal(padded[:1500], few)


@pytest.mark.parametrize("count", [1, 700, 1024, 1025, 2047, 2048, 2049, 5000])
def test_a_repeated_cloud_has_every_point_as_often_as_another(count):
    points = sphere(count)
    full = repeated(points, random())
    assert full.shape == (2048, 3)
    found = Counter(rows(full))
    if count >= 2048:
        assert len(found) == 2048
    else:
        assert set(found) == set(rows(points))
        doublings = 2 ** int(np.log2(2048 / count))
        assert min(found.values()) >= doublings and max(found.values()) <= 2 * doublings


def test_mirroring_has_four_equal_cases():
    drawn = [tuple(mirror_factors(random(seed)).tolist()) for seed in range(2000)]
    cases = {case: drawn.count(case) for case in set(drawn)}
    assert set(cases) == {(-1, 1, -1), (-1, 1, 1), (1, 1, -1), (1, 1, 1)}
    assert all(abs(count - 500) < 80 for count in cases.values())

    class Fixed:
        def __init__(self, value):
            self.random = lambda: value

    for value, factors in [
        (0.0, (-1, 1, -1)), (0.25, (-1, 1, -1)), (0.26, (-1, 1, 1)), (0.5, (-1, 1, 1)),
        (0.51, (1, 1, -1)), (0.75, (1, 1, -1)), (0.76, (1, 1, 1)),
    ]:  # fmt: skip
        assert tuple(mirror_factors(Fixed(value))) == factors


# --- poses ---


def test_the_unit_pose_and_its_way_back():
    points = sphere(300, 1) * (3, 1, 0.5) + (10, -4, 2)
    points = points.astype(np.float32)
    pose = unit_pose(points)
    unit = pose.apply(points)
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1).max(), 1, rtol=1e-6)
    np.testing.assert_allclose(pose.restore(unit), points, atol=1e-5)
    one = np.array([(3, 4, 5)], np.float32)
    np.testing.assert_array_equal(unit_pose(one).apply(one), [(0, 0, 0)])


@pytest.mark.parametrize("yaw", [0, 30, 145, -100])
def test_a_cars_box_becomes_its_frame(yaw):
    length, width, height, centre = 4.0, 1.6, 1.5, np.array([20.0, -3, -1])
    x, y, z = length / 2, width / 2, height / 2
    box = np.array([(-x, y, -z), (-x, -y, -z), (x, -y, -z), (x, y, -z),
                    (-x, y, z), (-x, -y, z), (x, -y, z), (x, y, z)])  # fmt: skip
    c, s = np.cos(np.radians(yaw)), np.sin(np.radians(yaw))
    turn = np.array([(c, -s, 0), (s, c, 0), (0, 0, 1)])
    pose = box_pose(box @ turn.T + centre)
    assert pose.scale == pytest.approx(length)
    inside = random(1).uniform(-1, 1, (50, 3)) * (x, y, z)
    framed = pose.apply(inside @ turn.T + centre)
    np.testing.assert_allclose(framed, inside[:, [0, 2, 1]] / length, atol=1e-6)
    np.testing.assert_allclose(pose.restore(framed), inside @ turn.T + centre, atol=1e-5)


def test_a_box_that_is_none():
    with pytest.raises(ValueError, match="no length"):
        box_pose(np.zeros((8, 3)))
    with pytest.raises(ValueError, match="expected 8 corners"):
        box_pose(np.zeros((4, 3)))


def test_any_cloud_is_prepared_and_brought_back():
    cloud = sphere(900, 2, 7) + np.float32(5)
    partial, pose = prepare_partial(cloud, normalise=True)
    assert partial.shape == (2048, 3) and partial.dtype == np.float32
    assert np.linalg.norm(partial, axis=1).max() == pytest.approx(1, rel=1e-5)
    back = pose.restore(partial)
    nearest = np.abs(back[:, None] - cloud[None]).sum(axis=-1).min(axis=1)
    assert nearest.max() < 1e-5
    plain, still = prepare_partial(cloud, normalise=False)
    assert set(rows(plain)) == set(rows(cloud))
    np.testing.assert_array_equal(still.restore(plain), plain)
    np.testing.assert_array_equal(prepare_partial(cloud, normalise=True)[0], partial)
    for wrong in (cloud[:0], cloud[:, :2], cloud[0]):
        with pytest.raises(ValueError, match="expected \\(n, 3\\)"):
            prepare_partial(wrong, normalise=True)


# --- samples by position ---


class Memory:
    """A source of random clouds in memory: the partial is any 2048 points of the complete."""

    names = ("a", "b")
    identity = "0" * 12
    points = 50

    def __init__(self, length=7):
        self.length = length
        self.report = CloudReport("memory")

    def __len__(self):
        return self.length

    def category(self, index):
        return index % 2

    def name(self, index):
        return str(index)

    def sample(self, index, rng):
        complete = sphere(50, index)
        rng = rng or random(index)
        return complete[rng.integers(0, 50, 2048)], complete


def stream(source=None, seed=5, mirror=True):
    return CloudStream(source or Memory(), seed=seed, mirror=mirror)


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
        "partial": ((2048, 3), "float32"),
        "complete": ((50, 3), "float32"),
        "weight": ((), "float32"),
        "index": ((), "int32"),
        "epoch": ((), "int32"),
    }
    assert sample["weight"] == 1


def test_samples_draw_from_seed_epoch_and_index_and_mirror_last():
    """Pins the rule: change it and every run in progress changes."""
    run, factors = stream(), set()
    for position in (0, 3, 9, 10, 20, 22):
        epoch, place = divmod(position, 7)
        index = int(run.order(epoch)[place])
        rng = np.random.Generator(np.random.PCG64([5, epoch, index]))
        partial, complete = Memory().sample(index, rng)
        flips = mirror_factors(rng)
        sample = run.sample(position)
        np.testing.assert_array_equal(sample["partial"], partial * flips)
        np.testing.assert_array_equal(sample["complete"], complete * flips)
        assert (sample["index"], sample["epoch"]) == (index, epoch)
        plain = stream(mirror=False).sample(position)
        np.testing.assert_array_equal(plain["partial"], partial)
        factors.add(tuple(flips.tolist()))
    assert len(factors) > 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_are_the_samples_in_order_from_anywhere(backend):
    expected = [stream().sample(n) for n in range(4, 20)]
    for start, sizes in [(4, [16]), (4, [1, 5, 10]), (9, [3, 8])]:
        run = stream()
        found = joined(run.windows(start, sizes, backend=backend))
        assert run.truncated == 0
        for i, want in enumerate(expected[start - 4 : start - 4 + sum(sizes)]):
            assert_same({k: v[i] for k, v in found.items()}, want)
    endless = stream().windows(0, itertools.repeat(2), backend=backend)
    assert len(next(endless)["index"]) == 2
    endless.close()


@pytest.mark.slow
@needs_grain
def test_worker_processes_give_the_same():
    """In a process of its own: workers import __main__, which must not be pytest's."""
    program = """
import numpy as np
from jaxaccum.data import CloudStream, Shapes
from jaxaccum.data.cloud_sources import CroppedClouds

def rows(workers):
    source = CroppedClouds(Shapes("train", length=5), False, "easy", 1, 1 << 30)
    batches = list(CloudStream(source, seed=1, mirror=True).windows(3, [2, 3], workers=workers))
    return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}

if __name__ == "__main__":
    here, there = rows(0), rows(2)
    assert all(np.array_equal(here[k], there[k]) for k in here)
    print("same")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip().endswith("same"), done.stderr


def test_streams_pickle():
    copy = pickle.loads(pickle.dumps(stream()))
    assert_same(copy.sample(8), stream().sample(8))


def test_what_cannot_be_streamed_says_why():
    class Scans(Memory):
        points = 0

    with pytest.raises(ValueError, match="memory: no complete clouds to learn from"):
        stream(Scans())
    with pytest.raises(ValueError, match="seed is -1"):
        stream(seed=-1)
    with pytest.raises(ValueError, match="a data set of 0 samples"):
        CloudStream(Memory(0), seed=0)
    with pytest.raises(TypeError, match="abstract"):
        SampleStream(3, 0)
    with pytest.raises(ValueError, match="batch 0"):
        cloud_batches(Memory(), batch=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_reach_the_caller(backend):
    class Broken(Memory):
        def sample(self, index, rng):
            if index == 4:
                raise DataError("4.pcd: damaged", file="4.pcd")
            return super().sample(index, rng)

    with pytest.raises(DataError, match=r"4\.pcd: damaged"):
        list(stream(Broken()).windows(0, [7], backend=backend))
    with pytest.raises(DataError, match=r"4\.pcd: damaged"):
        list(cloud_batches(Broken(), batch=2))


def test_evaluation_covers_the_set_once_and_fills_up_the_last_batch():
    source = Memory()
    batches = list(cloud_batches(source, batch=3))
    assert [len(b["index"]) for b in batches] == [3, 3, 3]
    found = joined(batches)
    assert found["index"].tolist() == [*range(7), -1, -1]
    assert found["weight"].tolist() == [1] * 7 + [0, 0]
    assert not found["partial"][7:].any() and not found["complete"][7:].any()
    for i in range(7):
        partial, complete = source.sample(i, None)
        np.testing.assert_array_equal(found["partial"][i], partial)
        np.testing.assert_array_equal(found["complete"][i], complete)
    assert {k: v.dtype for k, v in found.items()} == {
        k: v.dtype for k, v in stream().sample(0).items()
    }
