"""Point indices against brute force in numpy, the reference's numbers, and ties."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccum.models import points


def reduced_in_blocks(xyz, count, skip_origin=True):
    """Farthest points of one cloud by what the reference's kernel does, thread by thread."""
    n = len(xyz)
    threads = 1
    while threads * 2 <= min(n, 512):
        threads *= 2
    far = np.full(n, 1e10, xyz.dtype)
    valid = (xyz**2).sum(1) > 1e-3 if skip_origin else np.ones(n, bool)
    chosen = [0]
    while len(chosen) < count:
        best, place = np.full(threads, -1, xyz.dtype), np.zeros(threads, np.int64)
        for i in np.flatnonzero(valid):
            far[i] = min(far[i], ((xyz[i] - xyz[chosen[-1]]) ** 2).sum())
            if far[i] > best[i % threads]:
                best[i % threads], place[i % threads] = far[i], i
        stride = threads // 2
        while stride:
            for t in range(stride):
                if best[t + stride] > best[t]:
                    best[t], place[t] = best[t + stride], place[t + stride]
            stride //= 2
        chosen.append(int(place[0]))
    return chosen


def lattice(seed, n, dtype=np.float32):
    """Points with many exact ties and duplicates, whose squared distances are exact."""
    return np.random.default_rng(seed).integers(-4, 5, (n, 3)).astype(dtype) / 8


def uniform(seed, *shape):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (*shape, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def golden():
    """The cloud for which the reference's indices are known."""
    x = np.random.RandomState(1000).uniform(-0.5, 0.5, (2, 2048, 3)).astype(np.float32)
    x[:, 5], x[:, 6] = 0, 0.01
    return x


def test_farthest_points_of_the_reference(golden):
    index = np.asarray(points.farthest_points(golden, 256))
    assert index.dtype == np.int32
    assert index[0, :12].tolist() == [0, 352, 999, 518, 854, 1897, 83, 37, 950, 434, 370, 1565]
    assert index[0, -4:].tolist() == [938, 1372, 344, 961]
    assert not np.isin(index, [5, 6]).any()
    assert np.array_equal(points.farthest_points(golden, 64), index[:, :64])


@pytest.mark.parametrize("n", [1, 2, 7, 64, 300, 512, 1300])
@pytest.mark.parametrize("skip_origin", [True, False])
def test_farthest_points_with_ties(n, skip_origin):
    """The lattice has origins among its points, and fewer distinct ones than are asked for."""
    clouds = np.stack([lattice(n + s, n) for s in range(3)])
    clouds[1, n // 2 :] = 0
    count = min(n + 3, 60)
    index = np.asarray(points.farthest_points(clouds, count, skip_origin))
    for cloud, row in zip(clouds, index, strict=True):
        assert row.tolist() == reduced_in_blocks(cloud, count, skip_origin)


def test_farthest_points_prefer_the_thread_that_reads_lowest_backwards():
    """Thread 1024 % 512 = 0 before 256 before 128; within a thread the lowest index."""
    xyz = np.zeros((1, 2048, 3), np.float32)
    xyz[0, 0], xyz[0, [1024, 1536, 256, 128, 1]] = 1, -1
    assert points.farthest_points(xyz, 2).tolist() == [[0, 1024]]
    xyz[0, [1024, 1536]] = 0
    assert points.farthest_points(xyz, 2).tolist() == [[0, 256]]
    xyz[0, 256] = 0
    assert points.farthest_points(xyz, 2).tolist() == [[0, 128]]


def test_farthest_points_run_out_of_valid_ones():
    xyz = np.zeros((3, 100, 3), np.float32)
    xyz[0, :3] = [[1, 0, 0], [0, 1, 0], [0, 0, 2]]
    xyz[1, 40:42] = [[1, 0, 0], [0.5, 0, 0]]
    index = np.asarray(points.farthest_points(xyz, 6))
    assert index[0].tolist() == [0, 2, 1, 0, 0, 0]
    assert index[1].tolist() == reduced_in_blocks(xyz[1], 6)  # the origin starts, never returns
    assert index[2].tolist() == [0] * 6


def test_farthest_points_skip_what_is_near_the_origin():
    xyz = np.zeros((1, 4, 3), np.float32)
    xyz[0, :, 1] = [-0.5, 0.031, 0.032, 0.0]  # 0.031^2 < 1e-3 < 0.032^2
    assert points.farthest_points(xyz, 3).tolist() == [[0, 2, 0]]
    assert points.farthest_points(xyz, 3, skip_origin=False).tolist() == [[0, 2, 3]]


def test_farthest_points_spread():
    """Every point is at most as far from the sample as the sample's points are apart."""
    cloud = uniform(1, 900)
    sample = cloud[np.asarray(points.farthest_points(cloud[None], 50, skip_origin=False))[0]]
    apart = np.linalg.norm(sample[:, None] - sample[None], axis=2) + 10 * np.eye(50)
    cover = np.linalg.norm(cloud[:, None] - sample[None], axis=2).min(1)
    assert cover.max() <= apart.min() * (1 + 1e-6)


def test_farthest_points_in_float64(x64, golden):
    index = points.farthest_points(golden.astype(np.float64), 256)
    assert index.dtype == jnp.int32
    assert np.array_equal(index, points.farthest_points(golden, 256))


def test_first_largest_is_argmax():
    rng = np.random.default_rng(0)
    for n in (1, 65, 300, 2048):
        rows = rng.integers(0, 3, (5, n)).astype(np.float32)
        rows[0] = -1
        assert np.array_equal(jax.jit(points._first_largest)(rows), rows.argmax(1))


def sorted_stably(query, cloud, k):
    distance = sum((query[:, :, None, i] - cloud[:, None, :, i]) ** 2 for i in range(3))
    return np.argsort(distance, axis=2, kind="stable")[..., :k]


@pytest.mark.parametrize(
    ("queries", "n", "k"),
    [(5, 1, 1), (7, 20, 20), (40, 96, 3), (40, 97, 3), (30, 103, 3), (25, 576, 8), (9, 2048, 16)],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nearest_with_ties(queries, n, k, dtype):
    query = np.stack([lattice(s, queries, dtype) for s in (1, 2)])
    cloud = np.stack([lattice(s, n, dtype) for s in (3, 4)])
    with jax.enable_x64(dtype == np.float64):
        index = points.nearest(query, cloud, k)
        assert index.dtype == jnp.int32
        assert np.array_equal(index, sorted_stably(query, cloud, k))


@pytest.mark.parametrize("k", [1, 8, 16])
def test_nearest_of_random_points(k):
    query, cloud = uniform(1, 2, 200), uniform(2, 2, 1000)
    expected = sorted_stably(query.astype(np.float64), cloud.astype(np.float64), k)
    assert np.array_equal(points.nearest(query, cloud, k), expected)


def test_nearest_does_not_cancel():
    """Differences of coordinates far from the origin keep their digits."""
    cloud = np.float32(100) + np.arange(200, dtype=np.float32)[None, :, None] * 2.0**-12
    cloud = np.broadcast_to(cloud, (1, 200, 3))
    assert np.array_equal(points.nearest(cloud, cloud, 1)[0, :, 0], np.arange(200))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_result_depends_on_the_batch(dtype):
    clouds = uniform(3, 8, 1024).astype(dtype)
    with jax.enable_x64(dtype == np.float64):
        for function in (
            lambda c: points.farthest_points(c, 200),
            lambda c: points.nearest(c[:, :300], c, 16),
            lambda c: points.nearest(c[:, :300], c[:, :256], 16),
        ):
            together = np.asarray(function(clouds))
            alone = np.concatenate([function(clouds[i : i + 1]) for i in range(8)])
            assert np.array_equal(together, alone)


def test_indices_of_nan_stay_within_range():
    cloud = uniform(4, 1, 301)
    cloud[0, 7:200] = np.nan
    for index in (points.nearest(cloud, cloud, 4), points.farthest_points(cloud, 100)):
        assert (np.asarray(index) >= 0).all() and (np.asarray(index) < 301).all()


def test_gather():
    values = np.random.default_rng(0).normal(size=(2, 9, 4)).astype(np.float32)
    index = np.random.default_rng(1).integers(0, 9, (2, 5, 3))
    expected = np.stack([values[b][index[b]] for b in range(2)])
    assert np.array_equal(points.gather(values, index), expected)
    gradient = jax.grad(lambda v: points.gather(v, index).sum())(values)
    uses = np.stack([np.bincount(index[b].ravel(), minlength=9) for b in range(2)])
    assert np.array_equal(gradient, np.broadcast_to(uses[..., None], values.shape))


def test_interpolate(x64):
    rng = np.random.default_rng(0)
    values, cloud = rng.normal(size=(2, 50, 4)), rng.normal(size=(2, 50, 3))
    query = rng.normal(size=(2, 20, 3))
    query[0, 0] = cloud[0, 9]
    result = np.asarray(points.interpolate(values, cloud, query))
    for b in range(2):
        for q in range(20):
            distance = np.linalg.norm(cloud[b] - query[b, q], axis=1)
            three = np.argsort(distance)[:3]
            weight = 1 / (distance[three] + 1e-8)
            expected = (weight / weight.sum()) @ values[b, three]
            np.testing.assert_allclose(result[b, q], expected, rtol=1e-12)
    np.testing.assert_allclose(result[0, 0], values[0, 9], rtol=1e-6)
    gradients = jax.grad(lambda *a: points.interpolate(*a).sum(), (0, 1, 2))(values, cloud, query)
    np.testing.assert_allclose(gradients[0].sum(axis=1), 20)  # the weights of a query sum to one
    assert not gradients[1].any() and not gradients[2].any()


def test_wrong_arguments_are_refused():
    cloud = uniform(0, 1, 10)
    with pytest.raises(ValueError, match="the 11 nearest of 10"):
        points.nearest(cloud, cloud, 11)
    with pytest.raises(ValueError, match="0 farthest of 10"):
        points.farthest_points(cloud, 0)
    with pytest.raises(ValueError, match="3 farthest of 0"):
        points.farthest_points(cloud[:, :0], 3)
