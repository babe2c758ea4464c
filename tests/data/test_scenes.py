"""The embedded scenes: deterministic, varied, and labelled by what is visible."""

import dataclasses
import pickle

import numpy as np
import pytest

from jaxaccum.data import DataError, Scenes
from jaxaccum.data.synthetic.painting import paint
from jaxaccum.data.synthetic.scenes import NAMES


def test_a_scene_is_a_function_of_seed_split_and_index():
    first, second = Scenes("train"), Scenes("train")
    second.image(5)  # what was drawn before must not matter
    np.testing.assert_array_equal(first.image(3), second.image(3))
    np.testing.assert_array_equal(first.objects(3).boxes, second.objects(3).boxes)
    copy = pickle.loads(pickle.dumps(first))
    np.testing.assert_array_equal(first.image(7), copy.image(7))


def test_splits_seeds_and_indices_differ():
    images = [
        Scenes("train").image(0),
        Scenes("train").image(1),
        Scenes("val").image(0),
        Scenes("train", seed=1).image(0),
    ]
    assert len({image.tobytes() for image in images}) == len(images)


def test_identity_follows_what_is_learned_from():
    assert Scenes("train").identity == Scenes("train").identity
    others = [
        Scenes("train"),
        Scenes("val"),
        Scenes("train", seed=1),
        Scenes("train", size=160),
        Scenes("train", length=10),
    ]
    assert len({scene.identity for scene in others}) == len(others)
    assert all(len(scene.identity) == 12 for scene in others)


def test_defaults():
    train, val = Scenes("train"), Scenes("val")
    assert (len(train), len(val)) == (2048, 256)
    assert train.names == NAMES == ("house", "tree", "car", "balloon", "boat", "kite")
    for i in range(20):
        image = train.image(i)
        assert image.dtype == np.uint8 and image.shape[2] == 3
        assert max(image.shape[:2]) == 320 and min(image.shape[:2]) >= 240


def test_variety():
    scenes = Scenes("train", length=150)
    counts = [len(scenes.objects(i)) for i in range(150)]
    assert min(counts) == 0 and 6 <= max(counts) <= 8
    classes = np.concatenate([scenes.objects(i).classes for i in range(150)])
    assert np.bincount(classes, minlength=6).min() > 30
    boxes = np.concatenate([scenes.objects(i).boxes for i in range(150)])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert np.median(sides.max(axis=1)) > 0.15 * 320
    assert np.percentile(sides.min(axis=1), 5) > 0.05 * 320
    report = scenes.report
    assert (report.images, report.objects) == (150, len(boxes))
    assert report.backgrounds == counts.count(0) > 0


@pytest.mark.parametrize("index", range(0, 24, 2))
def test_boxes_are_the_extents_of_what_shows(index):
    """Repaints the scene with one object at a time in pure white on black, and measures it."""
    scenes = Scenes("train")
    plan, objects = scenes._plan(index)
    labelled = [k for k, item in enumerate(plan.items) if item.label >= 0]
    assert [plan.items[k].label for k in labelled] == objects.classes.tolist()
    for k, box in zip(labelled, objects.boxes, strict=True):
        flat = [
            dataclasses.replace(
                item,
                parts=[
                    part._replace(colour=(255, 255, 255) if i == k else (0, 0, 0))
                    for part in item.parts
                ],
            )
            for i, item in enumerate(plan.items)
        ]
        image = paint(
            dataclasses.replace(
                plan,
                rows=np.zeros_like(plan.rows),
                items=flat,
                contrast=1.0,
                brightness=0.0,
                tint=(1.0, 1.0, 1.0),
                noise=0.0,
                blur=0.0,
            )
        )
        ys, xs = np.nonzero(image[..., 0] > 100)
        extent = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        np.testing.assert_allclose(box, extent, atol=1.01)


def test_boxes_lie_in_the_image():
    scenes = Scenes("val", length=60)
    for i in range(60):
        height, width = scenes.image(i).shape[:2]
        boxes = scenes.objects(i).boxes
        assert boxes.dtype == np.float32 and scenes.objects(i).classes.dtype == np.int32
        assert (boxes >= 0).all() and (boxes <= [width, height, width, height]).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_wrong_arguments_say_what_was_expected():
    with pytest.raises(DataError, match="'test', expected 'train' or 'val'"):
        Scenes("test")
    with pytest.raises(DataError, match="size is 8, expected at least 32"):
        Scenes("train", size=8)
    with pytest.raises(DataError, match="length is 0"):
        Scenes("train", length=0)
    with pytest.raises(IndexError, match="scene 4 of 4"):
        Scenes("train", length=4).image(4)
