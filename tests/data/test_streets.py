"""The embedded streets: deterministic, varied, and labelled exactly in the image and in space."""

import dataclasses
import pickle

import numpy as np
import pytest

from jaxaccum.data import DataError
from jaxaccum.data.formats.kitti import NAMES, KittiSource
from jaxaccum.data.synthetic.painting import paint
from jaxaccum.data.synthetic.streets import SIZE, StreetsSource, write

SAMPLE = 40


@pytest.fixture(scope="module")
def streets():
    return StreetsSource("train", count=SAMPLE)


def rows(source):
    """(index, labels, row) of every object that is no DontCare region."""
    for index in range(len(source)):
        labels = source.labels(index)
        for row, kind in enumerate(labels.kinds):
            if kind != "DontCare":
                yield index, labels, row


def corners(labels, row):
    """(8, 3) corners of a box in space, by the definition of KITTI's files."""
    height, width, length = labels.dimensions[row].astype(np.float64)
    yaw = float(labels.yaw[row])
    turn = np.array(
        [[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]], np.float64
    )
    local = [
        (a * length / 2, b * height, c * width / 2)
        for a in (-1, 1)
        for b in (-1, 0)
        for c in (-1, 1)
    ]
    return np.array(local) @ turn.T + labels.locations[row]


def projected(points, camera):
    seen = np.c_[points, np.ones(len(points))] @ camera.astype(np.float64).T
    return seen[:, :2] / seen[:, 2:]


def overlap(a, b):
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    both = np.prod(np.maximum(high - low, 0))
    return both / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - both)


def test_a_scene_is_a_function_of_seed_split_and_index():
    first, second = StreetsSource("train"), StreetsSource("train", count=9)
    second.image(5)  # what was drawn before must not matter
    np.testing.assert_array_equal(first.image(3), second.image(3))
    np.testing.assert_array_equal(first.labels(3).locations, second.labels(3).locations)
    np.testing.assert_array_equal(first.camera(3), second.camera(3))
    copy = pickle.loads(pickle.dumps(first))
    np.testing.assert_array_equal(first.image(7), copy.image(7))
    images = [
        first.image(0),
        first.image(1),
        StreetsSource("val").image(0),
        StreetsSource("train", seed=1).image(0),
    ]
    assert len({image.tobytes() for image in images}) == 4


def test_identity_follows_what_is_learned_from():
    assert StreetsSource("train").identity == StreetsSource("train").identity
    others = [
        StreetsSource("train"),
        StreetsSource("val"),
        StreetsSource("train", seed=1),
        StreetsSource("train", size=(96, 320)),
        StreetsSource("train", count=10),
    ]
    assert len({source.identity for source in others}) == len(others)
    assert all(len(source.identity) == 12 for source in others)


def test_images_and_objects_have_their_types(streets):
    assert streets.names == NAMES and len(StreetsSource("val")) == 128
    assert streets.name(3) == "street_train_00003"
    for index in range(4):
        image, objects, camera = streets.image(index), streets.objects(index), streets.camera(index)
        assert image.shape == (*SIZE, 3) and image.dtype == np.uint8
        assert camera.shape == (3, 4) and camera.dtype == np.float32
        count = len(objects)
        for value, shape in (
            (objects.boxes, (count, 4)),
            (objects.locations, (count, 3)),
            (objects.dimensions, (count, 3)),
            (objects.yaw, (count,)),
        ):
            assert value.shape == shape and value.dtype == np.float32
    small = StreetsSource("train", size=(64, 100))
    assert small.image(0).shape == (64, 100, 3)


def test_variety_and_report(streets):
    kinds = [labels.kinds[row] for _, labels, row in rows(streets)]
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    assert set(counts) == {"Car", "Van", "Truck", "Pedestrian", "Cyclist"}
    assert counts["Car"] > 3 * SAMPLE and min(counts.values()) >= 5
    assert counts["Pedestrian"] > SAMPLE
    yaw = np.array([labels.yaw[row] for _, labels, row in rows(streets)])
    assert (np.histogram(yaw, bins=8, range=(-np.pi, np.pi))[0] > 0).all()
    depth = np.array([labels.locations[row, 2] for _, labels, row in rows(streets)])
    assert depth.min() < 8 and depth.max() > 40
    occlusion = np.array([labels.occlusion[row] for _, labels, row in rows(streets)])
    assert (np.bincount(occlusion, minlength=3) > SAMPLE / 4).all() and occlusion.max() == 2
    assert len({float(streets.camera(i)[0, 0]) for i in range(SAMPLE)}) == SAMPLE
    report = streets.report
    assert (report.images, report.objects) == (SAMPLE, len(kinds))
    assert report.regions > 0
    assert f"{report.regions} DontCare regions" in report.lines()[0]


def test_boxes_in_the_image_are_those_in_space(streets):
    """The hull of a projected 3D box holds the drawn one, and is hardly larger."""
    height, width = SIZE
    overlaps = []
    for index, labels, row in rows(streets):
        pixels = projected(corners(labels, row), streets.camera(index))
        hull = np.concatenate([pixels.min(axis=0), pixels.max(axis=0)])
        clipped = np.clip(hull, 0, [width, height, width, height])
        box = labels.boxes[row].astype(np.float64)
        # A limb of a rider is as thick as at the depth of its middle: a little may stick out.
        assert (box[:2] >= clipped[:2] - 1.5).all() and (box[2:] <= clipped[2:] + 1.5).all()
        assert (box >= 0).all() and (box <= [width, height, width, height]).all()
        if labels.kinds[row] in ("Car", "Van", "Truck"):
            overlaps.append(overlap(box, clipped))
    assert np.median(overlaps) > 0.95 and min(overlaps) > 0.75


def test_objects_stand_on_the_ground_apart_from_each_other(streets):
    for index in range(len(streets)):
        objects = streets.objects(index)
        assert len(set(objects.locations[:, 1].tolist())) <= 1  # the ground is level
        assert (objects.locations[:, 1] > 1.4).all() and (objects.locations[:, 2] > 2).all()
    # Points of one footprint are in no other.
    for index in range(len(streets)):
        objects = streets.objects(index)
        for i in range(len(objects)):
            _, width, length = objects.dimensions[i]
            side = np.linspace(-0.5, 0.5, 9)
            a, b = (grid.ravel() for grid in np.meshgrid(side * length, side * width))
            cos, sin = np.cos(objects.yaw[i]), np.sin(objects.yaw[i])
            x = objects.locations[i, 0] + a * cos + b * sin
            z = objects.locations[i, 2] - a * sin + b * cos
            for j in set(range(len(objects))) - {i}:
                dx, dz = x - objects.locations[j, 0], z - objects.locations[j, 2]
                cos_, sin_ = np.cos(objects.yaw[j]), np.sin(objects.yaw[j])
                along, across = dx * cos_ - dz * sin_, dx * sin_ + dz * cos_
                _, wide, long_ = objects.dimensions[j]
                assert not ((abs(along) < long_ / 2) & (abs(across) < wide / 2)).any()


def test_alpha_truncation_and_difficulty(streets):
    height, width = SIZE
    cut = 0
    for _, labels, row in rows(streets):
        x, _, z = labels.locations[row].astype(np.float64)
        turn = labels.yaw[row] - np.arctan2(x, z) - labels.alpha[row]
        assert abs((turn + np.pi) % (2 * np.pi) - np.pi) < 1e-5
        assert -np.pi <= labels.alpha[row] <= np.pi and -np.pi <= labels.yaw[row] <= np.pi
        assert 0 <= labels.truncation[row] < 0.8
        box = labels.boxes[row]
        inside = (box[:2] > 0).all() and box[2] < width and box[3] < height
        assert (labels.truncation[row] == 0) == inside
        cut += not inside
        assert box[3] - box[1] >= 0.05 * height
    assert cut > 5


def test_regions_are_small_and_know_no_more_than_their_box(streets):
    found = 0
    for index in range(len(streets)):
        labels = streets.labels(index)
        for row in (i for i, kind in enumerate(labels.kinds) if kind == "DontCare"):
            found += 1
            assert labels.boxes[row, 3] - labels.boxes[row, 1] < 0.05 * SIZE[0]
            assert labels.dimensions[row].tolist() == [-1] * 3
            assert labels.locations[row].tolist() == [-1000] * 3
            assert (labels.alpha[row], labels.yaw[row], labels.occlusion[row]) == (-10, -10, -1)
        kinds = [kind for kind in labels.kinds if kind != "DontCare"]
        assert [NAMES[c] for c in streets.objects(index).classes] == kinds
    assert found > 5


@pytest.mark.parametrize("index", range(0, 12, 2))
def test_occlusion_is_what_is_painted_over(streets, index):
    """Repaints the scene with one object at a time in white, alone and among the others."""
    plan = streets._planned(index)
    plan = dataclasses.replace(
        plan, rows=np.zeros_like(plan.rows), contrast=1.0, brightness=0.0, tint=(1.0, 1.0, 1.0),
        noise=0.0, blur=0.0,
    )  # fmt: skip

    def coloured(item, value):
        parts = [part._replace(colour=(value,) * 3) for part in item.parts]
        return dataclasses.replace(item, parts=parts)

    def pixels(items):
        return int((paint(dataclasses.replace(plan, items=items))[..., 0] > 127).sum())

    first = next(k for k, item in enumerate(plan.items) if item.label >= 0)
    levels = []
    for k, item in enumerate(plan.items):
        if item.label < 0:
            continue
        white = coloured(item, 255.0)
        alone = pixels([white])
        among = pixels(
            [
                white if i == k else coloured(one, 0.0)
                for i, one in enumerate(plan.items)
                if i >= first
            ]
        )
        levels.append(among / max(alone, 1))
    labels = streets.labels(index)
    assert len(levels) == len(labels)
    # The labels are sorted by depth, the items from back to front: compare as sets of shares.
    labelled = [labels.occlusion[i] for i, k in enumerate(labels.kinds) if k != "DontCare"]
    clear = sum(level > 0.92 for level in levels)
    poor = sum(level < 0.53 for level in levels)
    regions = len(labels) - len(labelled)
    assert labelled.count(2) + regions >= poor >= labelled.count(2) - labels_near(levels, 0.55)
    assert labelled.count(0) + regions >= clear >= labelled.count(0) - labels_near(levels, 0.9)
    assert min(levels) > 0.05


def labels_near(levels, value):
    """How many shares lie so near a limit that antialiasing may decide."""
    return sum(abs(level - value) < 0.04 for level in levels)


def test_written_streets_are_a_kitti_folder(tmp_path):
    root = write(tmp_path / "kitti", train=3, val=2, size=(64, 200), seed=4)
    train, val = KittiSource(root, "train"), KittiSource(root, "val")
    assert (len(train), len(val)) == (3, 2) and not train.report.skipped
    source = StreetsSource("train", count=3, size=(64, 200), seed=4)
    for index in range(3):
        np.testing.assert_array_equal(train.image(index), source.image(index))
        np.testing.assert_allclose(train.camera(index), source.camera(index), rtol=1e-6)
        assert train.labels(index).kinds == source.labels(index).kinds
        a, b = train.objects(index), source.objects(index)
        np.testing.assert_array_equal(a.classes, b.classes)
        for key in ("boxes", "locations", "dimensions", "yaw"):
            np.testing.assert_allclose(getattr(a, key), getattr(b, key), atol=0.0051)
    with pytest.raises(DataError, match="such a folder already"):
        write(tmp_path / "kitti", train=1, val=1)


def test_wrong_arguments_say_what_was_expected(tmp_path):
    with pytest.raises(DataError, match="'test', expected 'train' or 'val'"):
        StreetsSource("test")
    with pytest.raises(DataError, match=r"size is \(8, 640\), expected \(height, width\)"):
        StreetsSource("train", size=(8, 640))
    with pytest.raises(DataError, match="count is 0"):
        StreetsSource("train", count=0)
    with pytest.raises(IndexError, match="street 4 of 4"):
        StreetsSource("train", count=4).image(4)
    with pytest.raises(DataError, match="count is 0"):
        write(tmp_path / "x", train=0)
    assert not (tmp_path / "x").exists()
