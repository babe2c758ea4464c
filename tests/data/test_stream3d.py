"""3D samples: what happens to an image happens to its camera, and boxes in space stay true."""

import importlib.util
import pickle

import numpy as np
import pytest

from jaxaccum.data import DataError
from jaxaccum.data.formats.kitti import KittiReport, KittiSource, Objects3D
from jaxaccum.data.stream3d import (
    Augment3D,
    Sample3D,
    TrainStream3D,
    augmented3d,
    eval_batches3d,
    letterbox3d,
    letterboxed_camera,
    mirrored,
    wrapped,
)
from jaxaccum.data.synthetic.streets import StreetsSource

OFF = Augment3D(translate=0, scale=0, hsv_h=0, hsv_s=0, hsv_v=0, fliplr=0)
P2 = np.array(
    [[90, 0, 52, 4.5], [0, 90, 21, 0.2], [0, 0, 1, 0.003]], np.float32
)  # of a camera with a fourth column, as KITTI's
COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)], np.uint8)


class Memory:
    """A source of images in memory; image i is (40 + i, 100 - i) and has i % 5 objects."""

    names = ("a", "b", "c")
    identity = "0" * 12

    def __init__(self, length=11, objects=None):
        self.report = KittiReport("memory")
        self.length = length
        self.count = objects

    def __len__(self):
        return self.length

    def image(self, index):
        rng = np.random.default_rng(index)
        return rng.integers(0, 255, (40 + index, 100 - index, 3), np.uint8)

    def objects(self, index):
        rng = np.random.default_rng(index + 1000)
        count = index % 5 if self.count is None else self.count
        corner = rng.uniform(0, 15, (count, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(10, 25, (count, 2))], axis=1)
        return Objects3D(
            boxes.astype(np.float32),
            rng.integers(0, 3, count).astype(np.int32),
            rng.uniform((-5, 1, 5), (5, 2, 50), (count, 3)).astype(np.float32),
            rng.uniform(0.5, 4, (count, 3)).astype(np.float32),
            rng.uniform(-np.pi, np.pi, count).astype(np.float32),
        )

    def labels(self, index):
        raise NotImplementedError

    def camera(self, index):
        camera = P2.copy()
        camera[0, 2] += index
        return camera

    def name(self, index):
        return f"{index}.png"


def stream(source=None, **changes):
    options = {"size": (32, 96), "max_objects": 12, "augment": Augment3D(), "seed": 5}
    return TrainStream3D(source or Memory(), **{**options, **changes})


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert first[key].dtype == second[key].dtype, key
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)


def joined(batches):
    batches = list(batches)
    return {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}


def corners(locations, dimensions, yaw):
    """(n, 8, 3) float64 corners of boxes in space, by the definition of KITTI's files."""
    signs = np.array([(a, b, c) for a in (-0.5, 0.5) for b in (-1, 0) for c in (-0.5, 0.5)])
    high, wide, long_ = dimensions.astype(np.float64).T
    local = signs * np.stack([long_, high, wide], axis=1)[:, None]
    cos, sin = np.cos(yaw.astype(np.float64))[:, None], np.sin(yaw.astype(np.float64))[:, None]
    x, y, z = np.moveaxis(local, 2, 0)
    turned = np.stack([cos * x + sin * z, y, -sin * x + cos * z], axis=2)
    return turned + locations.astype(np.float64)[:, None]


def projected(points, camera):
    """(..., 2) pixels and (...,) depth of (..., 3) points."""
    seen = points @ camera[:, :3].astype(np.float64).T + camera[:, 3].astype(np.float64)
    return seen[..., :2] / seen[..., 2:], seen[..., 2]


def swapped(values):
    """Corners (n, 8, ...) with left and right exchanged: so a mirrored box numbers them."""
    return values[:, [1, 0, 3, 2, 5, 4, 7, 6]]


def redrawn(run, position, size, augment, shape):
    """The draws of a sample, as independent formulas: x -> gain * x + offset, then the mirror."""
    epoch, place = divmod(position, run._length)
    index = int(run.order(epoch)[place])
    rng = np.random.Generator(np.random.PCG64([run._seed, epoch, index]))
    zoom, dx, dy = rng.uniform(-1, 1, size=3)
    rng.uniform(-1, 1, size=3)  # HSV
    flip = rng.random() < augment.fliplr
    zoom = 1 + zoom * augment.scale
    height, width = size
    fit = min(height / shape[0], width / shape[1])
    inner = np.array([round(shape[1] * fit), round(shape[0] * fit)])
    pad = np.array(
        [round((side - new) / 2 - 0.1) for side, new in zip((width, height), inner, strict=True)]
    )
    centre = np.array([width, height]) / 2
    moved = np.array([dx, dy]) * augment.translate * (width, height)
    gain = zoom * inner / np.array([shape[1], shape[0]])
    return index, gain, zoom * (pad - centre) + centre + moved, flip


# --- the sample ---


def test_a_sample_has_its_shapes_and_types():
    sample = stream().sample(3)
    assert {key: (value.shape, value.dtype.name) for key, value in sample.items()} == {
        "image": ((32, 96, 3), "uint8"),
        "boxes": ((12, 4), "float32"),
        "classes": ((12,), "int32"),
        "valid": ((12,), "bool"),
        "locations": ((12, 3), "float32"),
        "dimensions": ((12, 3), "float32"),
        "yaw": ((12,), "float32"),
        "camera": ((3, 4), "float32"),
        "weight": ((), "float32"),
        "index": ((), "int32"),
        "epoch": ((), "int32"),
    }
    count = sample["valid"].sum()
    assert sample["weight"] == 1 and sample["valid"][:count].all()
    for key in ("boxes", "classes", "locations", "dimensions", "yaw"):
        assert not sample[key][count:].any()


def kitti_or_streets(name, request):
    if name == "streets":
        return StreetsSource("train", count=20)
    folder = request.getfixturevalue("shared") / "data" / "detect3d" / "kitti"
    if not folder.is_dir():
        pytest.skip(f"KITTI's development frames are not at {folder}")
    return KittiSource(folder, "train")


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("name", ["streets", "kitti"])
def test_projected_boxes_follow_the_image(name, compat, request):
    """Corners under the sample's camera are the augmentation of the original's, to 1e-3 px."""
    source, size = kitti_or_streets(name, request), (96, 320)
    augment = Augment3D(scale=0.5, translate=0.15)
    run = TrainStream3D(
        source, size=size, max_objects=40, augment=augment, seed=2, compat=compat, cache="none"
    )
    flips = checked = 0
    for position in range(2 * len(source)):
        sample = run.sample(position)
        objects = source.objects(int(sample["index"]))
        shape = source.image(int(sample["index"])).shape
        index, gain, offset, flip = redrawn(run, position, size, augment, shape)
        assert index == sample["index"]
        flips += flip

        def moved(points, gain=gain, offset=offset, flip=flip):
            points = points * gain + offset
            return np.stack([size[1] - points[..., 0], points[..., 1]], -1) if flip else points

        # Which of the original's objects were kept, by their 2D boxes.
        ends = moved(objects.boxes.reshape(-1, 2, 2).astype(np.float64))
        whole = np.concatenate([ends.min(axis=1), ends.max(axis=1)], axis=1)
        clipped = np.clip(whole, 0, [size[1], size[0]] * 2)
        sides = clipped[:, 2:] - clipped[:, :2]
        part = sides.prod(axis=1) / (whole[:, 2:] - whole[:, :2]).prod(axis=1)
        kept = (sides > 2).all(axis=1) & (part > 0.1)
        rows = sample["valid"]
        np.testing.assert_allclose(sample["boxes"][rows], clipped[kept], atol=1e-3)
        np.testing.assert_array_equal(sample["classes"][rows], objects.classes[kept])
        np.testing.assert_array_equal(sample["dimensions"][rows], objects.dimensions[kept])
        world = corners(objects.locations[kept], objects.dimensions[kept], objects.yaw[kept])
        before, depth = projected(world, source.camera(index))
        here = corners(sample["locations"][rows], sample["dimensions"][rows], sample["yaw"][rows])
        after, new_depth = projected(here, sample["camera"])
        front = (depth > 0.5).all(axis=1)  # a corner behind the camera has no pixel
        mirror = flip and not compat
        if mirror:
            before, depth = swapped(before), swapped(depth)
        np.testing.assert_allclose(after[front], moved(before[front]), atol=1e-3)
        np.testing.assert_allclose(new_depth, depth, rtol=1e-5, atol=1e-4)
        checked += front.sum()

        sign = np.array([-1, 1, 1]) if mirror else 1
        np.testing.assert_array_equal(sample["locations"][rows], objects.locations[kept] * sign)
        if mirror:
            turn = sample["yaw"][rows] + objects.yaw[kept] - np.pi
            np.testing.assert_allclose(np.sin(turn / 2), 0, atol=1e-6)
            assert (abs(sample["yaw"]) <= np.float32(np.pi)).all()
        else:
            np.testing.assert_array_equal(sample["yaw"][rows], objects.yaw[kept])
        assert (sample["camera"][0, 0] < 0) == (flip and compat)
    assert checked > 100 and 0.2 < flips / (2 * len(source)) < 0.8


def test_pixels_are_where_the_camera_says():
    """Solid rectangles in the image stay under their projected corners, whatever is drawn."""
    image = np.full((60, 160, 3), 60, np.uint8)
    boxes = np.array([[20, 10, 50, 30], [90, 24, 130, 52], [66, 4, 80, 20]], np.float32)
    for box, colour in zip(boxes.astype(int), COLOURS[:3], strict=True):
        image[box[1] : box[3], box[0] : box[2]] = colour
    camera = np.array([[70, 0, 75, 5], [0, 70, 28, 0.2], [0, 0, 1, 0.003]], np.float64)
    # A plate in a plane of depth z, whose corners project to those of the box.
    depth = np.array([10.0, 20, 30])
    w = (depth + camera[2, 3])[:, None]
    low = (boxes[:, :2] * w - camera[:2, 3] - depth[:, None] * camera[:2, 2]) / 70
    high = (boxes[:, 2:] * w - camera[:2, 3] - depth[:, None] * camera[:2, 2]) / 70
    locations = np.stack([(low[:, 0] + high[:, 0]) / 2, high[:, 1], depth], axis=1)
    dimensions = np.stack(
        [high[:, 1] - low[:, 1], np.full(3, 1e-6), high[:, 0] - low[:, 0]], axis=1
    )
    objects = Objects3D(
        boxes,
        np.arange(3, dtype=np.int32),
        locations.astype(np.float32),
        dimensions.astype(np.float32),
        np.zeros(3, np.float32),
    )
    augment = Augment3D(scale=0.4, translate=0.2, hsv_h=0, hsv_s=0, hsv_v=0)
    found = 0
    for seed in range(30):
        sample = augmented3d(
            image, objects, camera, (70, 160), augment, np.random.default_rng(seed)
        )
        pixels, _ = projected(
            corners(sample.objects.locations, sample.objects.dimensions, sample.objects.yaw),
            sample.camera,
        )
        for label, points, box in zip(
            sample.objects.classes, pixels, sample.objects.boxes, strict=True
        ):
            near = abs(sample.image.astype(int) - COLOURS[label].astype(int)).max(axis=2) < 90
            rows, columns = np.nonzero(near)
            extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            hull = np.clip([*points.min(axis=0), *points.max(axis=0)], 0, [160, 70] * 2)
            np.testing.assert_allclose(extent, hull, atol=1.01)
            np.testing.assert_allclose(box, hull, atol=1e-3)
            found += 1
    assert found > 60


def test_mirroring_twice_is_nothing_and_keeps_an_ordinary_camera():
    source = Memory(objects=4)
    sample = Sample3D(source.image(2), source.objects(2), source.camera(2).astype(np.float64))
    once = mirrored(sample)
    width = sample.image.shape[1]
    depth, third = P2[2, 3], P2[0, 3]
    # Focal length as before, principal point mirrored, fourth column by the formula.
    np.testing.assert_allclose(once.camera[0], [90, 0, width - 54, width * depth - third])
    np.testing.assert_array_equal(once.camera[1:], sample.camera[1:])
    twice = mirrored(once)
    np.testing.assert_array_equal(twice.image, sample.image)
    np.testing.assert_allclose(twice.camera, sample.camera, atol=1e-12)
    np.testing.assert_array_equal(twice.objects.locations, sample.objects.locations)
    np.testing.assert_allclose(twice.objects.yaw, sample.objects.yaw, atol=1e-6)
    np.testing.assert_allclose(twice.objects.boxes, sample.objects.boxes, atol=1e-5)


def test_angles_are_brought_into_one_turn():
    angles = np.array([0.0, np.pi, -np.pi, 3.5, -3.5, 7.0])
    expected = [0.0, -np.pi, -np.pi, 3.5 - 2 * np.pi, 2 * np.pi - 3.5, 7 - 2 * np.pi]
    np.testing.assert_allclose(wrapped(angles), expected, atol=1e-6)
    # A car that drives along x to the right drives to the left in the mirror.
    assert abs(wrapped(np.pi - np.array([0.0]))[0]) == pytest.approx(np.pi, abs=1e-6)


def test_without_augmentation_a_sample_is_the_letterbox():
    source = Memory()
    run = stream(source, augment=OFF)
    for position in range(11):
        sample = run.sample(position)
        index = int(sample["index"])
        image, ratio, pad = letterbox3d(source.image(index), (32, 96))
        np.testing.assert_array_equal(sample["image"], image)
        expected = letterboxed_camera(source.camera(index), ratio, pad)
        np.testing.assert_allclose(sample["camera"], expected, rtol=1e-6)
        np.testing.assert_allclose(
            sample["boxes"][sample["valid"]],
            source.objects(index).boxes * np.tile(ratio, 2) + np.tile(pad, 2),
            atol=1e-4,
        )


@pytest.mark.parametrize(
    ("shape", "size", "ratio", "pad"),
    [
        ((375, 1242), (192, 640), (636 / 1242, 192 / 375), (2, 0)),
        ((50, 200), (64, 128), (128 / 200, 32 / 50), (0, 16)),
        ((200, 50), (64, 128), (16 / 50, 64 / 200), (56, 0)),
        ((20, 30), (40, 60), (2, 2), (0, 0)),
        ((33, 60), (40, 60), (1, 1), (0, 3)),
    ],
)
def test_letterbox_of_rectangles(shape, size, ratio, pad):
    """Height and width are never swapped."""
    pixels = np.random.default_rng(0).integers(0, 255, (*shape, 3), np.uint8)
    image, got, padding = letterbox3d(pixels, size)
    assert image.shape == (*size, 3)
    np.testing.assert_allclose(got, ratio, rtol=1e-6)
    assert padding.tolist() == list(pad)
    left, top = pad
    if top:
        assert (image[:top] == 114).all() and (image[top] != 114).any()
    if left:
        assert (image[:, :left] == 114).all() and (image[:, left] != 114).any()


def test_objects_that_leave_the_picture_go_with_their_3d_rows():
    source = Memory(length=1, objects=30)
    run = stream(source, augment=Augment3D(scale=0.6, translate=0.6), max_objects=30)
    original = source.objects(0)
    gone = 0
    for position in range(20):
        sample = run.sample(position)
        rows = sample["valid"]
        gone += 30 - rows.sum()
        # Every kept row is one row of the original, found by its dimensions.
        at = [
            int(np.flatnonzero((original.dimensions == d).all(axis=1))[0])
            for d in sample["dimensions"][rows]
        ]
        assert at == sorted(at)
        np.testing.assert_array_equal(sample["classes"][rows], original.classes[at])
        np.testing.assert_array_equal(abs(sample["locations"][rows]), abs(original.locations[at]))
    assert gone > 50 and run.truncated == 0


def test_objects_beyond_the_limit_are_counted_and_the_smallest_go():
    source = Memory(objects=5)
    full, few = stream(source, augment=OFF), stream(source, augment=OFF, max_objects=2)
    batches = joined(few.windows(0, [4, 4], backend="threads"))
    assert few.truncated == 8 * 3 and full.truncated == 0
    for n in range(8):
        whole = full.sample(n)
        boxes = whole["boxes"][whole["valid"]]
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        largest = np.sort(np.argsort(-areas)[:2])
        for key in ("boxes", "classes", "locations", "dimensions", "yaw"):
            np.testing.assert_array_equal(batches[key][n], whole[key][largest], err_msg=key)


def test_compat_differs_in_the_world_only():
    ours, theirs = (
        stream(augment=Augment3D(fliplr=1)),
        stream(augment=Augment3D(fliplr=1), compat=True),
    )
    differs = 0
    for position in range(11):
        a, b = ours.sample(position), theirs.sample(position)
        for key in ("image", "boxes", "classes", "valid", "dimensions"):
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
        np.testing.assert_array_equal(a["locations"] * [-1, 1, 1], b["locations"])
        differs += (a["yaw"] != b["yaw"]).any()
    assert differs > 4


# --- the stream ---

BACKENDS = [
    "threads",
    pytest.param(
        "grain",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("grain") is None, reason="grain is not installed"
        ),
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_are_the_samples_in_order(backend):
    expected = [stream().sample(n) for n in range(4, 25)]
    for sizes in ([21], [2, 3, 16]):
        batches = list(stream().windows(4, sizes, backend=backend))
        assert [len(b["index"]) for b in batches] == sizes
        rows = joined(batches)
        for i, sample in enumerate(expected):
            assert_same({k: v[i] for k, v in rows.items()}, sample)


def test_cache_pickling_and_history_change_nothing():
    expected = [stream(cache="none").sample(n) for n in range(30)]
    run = stream(cache_bytes=20_000)
    for n in (7, 3, 29, 3, 12):
        assert_same(run.sample(n), expected[n])
    copy = pickle.loads(pickle.dumps(run))
    assert not copy._images._kept
    assert_same(copy.sample(8), expected[8])
    others = [stream(seed=6), stream(augment=Augment3D(scale=0.1))]
    assert all((other.sample(3)["camera"] != expected[3]["camera"]).any() for other in others)


def test_wrong_arguments_say_what_was_expected():
    for wrong, said in [
        ({"size": (1, 640)}, r"size is \(1, 640\), expected at least 2"),
        ({"max_objects": 0}, "max_objects is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"cache_bytes": -1}, "cache_bytes is -1"),
        ({"cache": "disk"}, "cache is 'disk', expected 'ram' or 'none'"),
    ]:
        with pytest.raises(ValueError, match=said):
            stream(**wrong)
    for name in ("translate", "scale", "hsv_h", "fliplr"):
        with pytest.raises(ValueError, match=f"{name} is -0.1, expected 0 to 1"):
            Augment3D(**{name: -0.1})
    with pytest.raises(ValueError, match="zoom images to nothing"):
        Augment3D(scale=1.0)
    with pytest.raises(ValueError, match="batch 0"):
        eval_batches3d(Memory(), size=(32, 96), batch=0)


# --- evaluation ---


def test_evaluation_covers_the_set_once_and_maps_back():
    source = Memory()
    batches = list(eval_batches3d(source, size=(48, 96), batch=4))
    assert [len(b["index"]) for b in batches] == [4, 4, 4]
    rows = joined(batches)
    assert rows["index"].tolist() == [*range(11), -1]
    assert rows["weight"].tolist() == [1.0] * 11 + [0.0]
    assert (rows["image"][11] == 114).all() and not rows["valid"][11].any()
    # The camera of a filled up row projects without dividing by zero.
    assert np.isfinite(projected(np.array([[0.0, 0, 10]]), rows["camera"][11])[0]).all()
    for i in range(11):
        valid, objects = rows["valid"][i], source.objects(i)
        ratio, pad = rows["ratio"][i], rows["pad"][i]
        back = (rows["boxes"][i][valid].reshape(-1, 2, 2) - pad) / ratio
        np.testing.assert_allclose(back.reshape(-1, 4), objects.boxes, atol=1e-3)
        assert rows["size"][i].tolist() == [40 + i, 100 - i]
        for key in ("classes", "locations", "dimensions", "yaw"):
            np.testing.assert_array_equal(rows[key][i][valid], getattr(objects, key))
        world = corners(objects.locations, objects.dimensions, objects.yaw)
        here, _ = projected(world, rows["camera"][i])
        np.testing.assert_allclose(
            (here - pad) / ratio, projected(world, source.camera(i))[0], rtol=1e-5, atol=2e-3
        )


def test_evaluation_refuses_to_leave_objects_out():
    with pytest.raises(DataError, match=r"4\.png: 4 objects, but max_objects is 3.*at least 4"):
        eval_batches3d(Memory(), size=(32, 96), batch=4, max_objects=3)
    assert next(eval_batches3d(Memory(objects=0), size=(32, 96), batch=4))["boxes"].shape[1] == 1
