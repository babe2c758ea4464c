"""Augmentation: boxes follow pixels, and the draws follow the hyperparameters."""

import dataclasses

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxaccum.data import Augment, letterbox
from jaxaccum.data.augment import (
    FILL,
    Sample,
    affine,
    augmented,
    flips,
    hsv,
    mixup,
    mosaic,
    resize_long,
)

PLAIN = Augment(
    mosaic=0, translate=0, scale=0, hsv_h=0, hsv_s=0, hsv_v=0, fliplr=0
)  # every draw switched off
COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)], np.uint8)


def generator(seed=0):
    return np.random.default_rng(seed)


def marked(height, width, box, colour=0):
    """A grey image with one solid rectangle, and its box."""
    image = np.full((height, width, 3), 60, np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = COLOURS[colour]
    return Sample(image, np.array([box], np.float32), np.array([colour], np.int32))


def extent(image, colour=0):
    """Where a colour shows: xyxy, or None."""
    near = np.abs(image.astype(int) - COLOURS[colour].astype(int)).max(axis=2) < 90
    ys, xs = np.nonzero(near)
    return None if len(xs) == 0 else np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


rectangles = st.tuples(
    st.integers(0, 60), st.integers(0, 60), st.integers(20, 60), st.integers(20, 60)
).map(lambda r: (r[0], r[1], r[0] + r[2], r[1] + r[3]))


def test_defaults_are_the_reference():
    assert dataclasses.asdict(Augment()) == {
        "mosaic": 1.0,
        "mixup": 0.0,
        "degrees": 0.0,
        "translate": 0.1,
        "scale": 0.5,
        "shear": 0.0,
        "perspective": 0.0,
        "hsv_h": 0.015,
        "hsv_s": 0.7,
        "hsv_v": 0.4,
        "flipud": 0.0,
        "fliplr": 0.5,
    }
    closed = Augment(mixup=0.5).without_mosaic()
    assert (closed.mosaic, closed.mixup, closed.scale) == (0, 0, 0.5)


@pytest.mark.parametrize(
    "wrong", [{"mosaic": 1.1}, {"fliplr": -0.1}, {"degrees": 200}, {"perspective": 0.1}]
)
def test_hyperparameters_out_of_range_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} is .*, expected 0 to"):
        Augment(**wrong)
    with pytest.raises(ValueError, match="zoom images to nothing"):
        Augment(scale=1)


@given(box=rectangles, seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_boxes_follow_pixels_under_shift_and_zoom(box, seed):
    sample = marked(120, 128, box)
    image, boxes, _ = affine(sample, 96, dataclasses.replace(Augment()), generator(seed))
    seen = extent(image)
    if len(boxes):
        np.testing.assert_allclose(boxes[0], seen, atol=1.01)
    else:
        # Dropped only for being too small, or out of view by nine tenths.
        assert seen is None or np.prod(seen[2:] - seen[:2]) < 0.25 * 120 * 128


@given(box=rectangles, seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_boxes_contain_pixels_under_every_warp(box, seed):
    warp = Augment(degrees=30, shear=10, perspective=0.0008, scale=0.3)
    image, boxes, _ = affine(marked(120, 128, box), 96, warp, generator(seed))
    seen = extent(image)
    if len(boxes) and seen is not None:
        assert (boxes[0][:2] <= seen[:2] + 1.01).all() and (boxes[0][2:] >= seen[2:] - 1.01).all()


def test_a_quarter_turn_is_exact():
    class Fixed:
        """Draws the largest rotation and nothing else."""

        def uniform(self, low, high, size):
            draw = np.zeros(size)
            draw[0] = high
            return draw

    turn = dataclasses.replace(PLAIN, degrees=90)
    image, boxes, _ = affine(marked(100, 100, (10, 20, 40, 70)), 100, turn, Fixed())
    np.testing.assert_allclose(boxes[0], [20, 60, 70, 90], atol=1e-4)
    np.testing.assert_array_equal(extent(image), [20, 60, 70, 90])


def test_affine_centres_a_smaller_image():
    sample = marked(60, 100, (10, 20, 40, 50))
    image, boxes, _ = affine(sample, 100, PLAIN, generator())
    np.testing.assert_array_equal(boxes[0], [10, 40, 40, 70])
    np.testing.assert_array_equal(image[20:80], sample.image)
    assert (image[:20] == FILL).all() and (image[80:] == FILL).all()


def test_affine_drops_what_is_hardly_left():
    class Shift:
        def uniform(self, low, high, size):
            draw = np.zeros(size)
            draw[6] = high
            return draw

    shift = dataclasses.replace(PLAIN, translate=0.5)  # by 50 pixels to the right
    image = np.zeros((100, 100, 3), np.uint8)
    boxes = np.array(
        [
            [40, 10, 90, 60],  # a fifth stays in view
            [46, 10, 96, 60],  # 8 % stay
            [10, 10, 11, 60],  # too thin
            [60, 10, 90, 60],  # gone
        ],
        np.float32,
    )
    out = affine(Sample(image, boxes, np.arange(4, dtype=np.int32)), 100, shift, Shift())
    assert out.classes.tolist() == [0]
    np.testing.assert_allclose(out.boxes, [[90, 10, 100, 60]])
    assert out.boxes.dtype == np.float32 and out.classes.dtype == np.int32


def test_a_box_is_measured_against_its_zoomed_self():
    class Zoom:
        def uniform(self, low, high, size):
            draw = np.zeros(size)
            draw[1] = self.sign
            return draw

    draw, zoom = Zoom(), dataclasses.replace(PLAIN, scale=0.75)
    draw.sign = -1  # to a quarter of the side: all in view at a sixteenth of the area
    small = affine(marked(100, 100, (20, 20, 60, 60)), 100, zoom, draw)
    np.testing.assert_allclose(small.boxes, [[42.5, 42.5, 52.5, 52.5]])
    draw.sign = 1  # 24 % of the old area in view, but only 8 % of the zoomed area
    assert len(affine(marked(100, 100, (77, 30, 97, 70)), 100, zoom, draw).boxes) == 0


@given(seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_mosaic_boxes_follow_pixels(seed):
    samples = [
        marked(64, 64, (4, 6, 60, 50), 0),
        marked(48, 64, (10, 8, 50, 40), 1),
        marked(64, 40, (2, 2, 38, 60), 2),
        marked(32, 64, (5, 5, 60, 30), 3),
    ]
    image, boxes, classes = mosaic(samples, 64, generator(seed))
    assert image.shape == (128, 128, 3)
    found = dict(zip(classes.tolist(), boxes, strict=True))
    for colour in range(4):
        seen = extent(image, colour)
        if seen is None:
            assert colour not in found
        else:
            np.testing.assert_array_equal(found[colour], seen)


def test_mosaic_centre_covers_its_range():
    whole = [marked(64, 64, (0, 0, 64, 64), colour) for colour in range(4)]
    centres = []
    for seed in range(200):
        _, boxes, _ = mosaic(whole, 64, generator(seed))
        centres.append(boxes[0][2:])
        assert len(boxes) == 4
    assert np.min(centres) >= 32 and np.max(centres) <= 96
    assert np.min(centres) < 36 and np.max(centres) > 92


@pytest.mark.parametrize("flip", ["flipud", "fliplr"])
def test_flips_mirror_pixels_and_boxes(flip):
    sample = marked(50, 80, (5, 10, 30, 20))
    out = flips(sample, dataclasses.replace(PLAIN, **{flip: 1.0}), generator())
    expected = [5, 30, 30, 40] if flip == "flipud" else [50, 10, 75, 20]
    np.testing.assert_array_equal(out.boxes[0], expected)
    np.testing.assert_array_equal(extent(out.image), expected)
    kept = flips(sample, PLAIN, generator())
    np.testing.assert_array_equal(kept.image, sample.image)


def test_mixup_blends_and_keeps_all_objects():
    first, second = marked(50, 50, (0, 0, 20, 20), 0), marked(50, 50, (30, 30, 50, 50), 1)
    _, boxes, classes = mixup(first, second, generator())
    assert classes.tolist() == [0, 1] and boxes.shape == (2, 4)
    ratios = []
    for seed in range(300):
        pixel = mixup(first, second, generator(seed)).image[5, 5, 0]
        ratios.append((pixel - 60) / (255 - 60))
    assert np.mean(ratios) == pytest.approx(0.5, abs=0.02)
    assert np.std(ratios) == pytest.approx(1 / np.sqrt(4 * 65), abs=0.01)  # Beta(32, 32)


def test_hsv_stays_in_its_gains_and_spares_grey():
    rng = generator()
    grey = np.full((8, 8, 3), 128, np.uint8)
    for _ in range(20):
        out = hsv(grey, Augment(hsv_v=0), rng)
        np.testing.assert_array_equal(out, grey)
    values = [int(hsv(grey, Augment(), generator(s)).max()) for s in range(300)]
    assert 128 * 0.6 - 1 <= min(values) < 85 and 170 < max(values) <= 128 * 1.4 + 1
    colour = np.full((8, 8, 3), (200, 120, 60), np.uint8)
    hues = [
        int(cv2.cvtColor(hsv(colour, Augment(), generator(s)), cv2.COLOR_RGB2HSV)[0, 0, 0])
        for s in range(200)
    ]
    base = int(cv2.cvtColor(colour, cv2.COLOR_RGB2HSV)[0, 0, 0])
    assert 2 <= max(np.abs(np.array(hues) - base)) <= 4  # 0.015 * 180 = 2.7
    gains = [
        int(cv2.cvtColor(hsv(colour, Augment(), generator(s)), cv2.COLOR_RGB2HSV)[0, 0, 1]) / 178
        for s in range(300)
    ]
    assert 0.28 < min(gains) < 0.35 and max(gains) == pytest.approx(255 / 178, abs=0.02)
    assert np.mean(np.array(gains) < 1) == pytest.approx(0.5, abs=0.1)
    np.testing.assert_array_equal(hsv(colour, PLAIN, rng), colour)


def test_resize_long():
    assert resize_long(np.zeros((100, 301, 3), np.uint8), 150).shape == (50, 150, 3)
    assert resize_long(np.zeros((301, 100, 3), np.uint8), 150).shape == (150, 50, 3)
    assert resize_long(np.zeros((10, 20, 3), np.uint8), 150).shape == (75, 150, 3)
    image = np.zeros((30, 50, 3), np.uint8)
    assert resize_long(image, 50) is image


@given(st.integers(10, 300), st.integers(10, 300), st.integers(32, 200))
@settings(max_examples=60, deadline=None)
def test_letterbox_maps_there_and_back(height, width, size):
    image = np.full((height, width, 3), 255, np.uint8)
    square, ratio, pad = letterbox(image, size)
    assert square.shape == (size, size, 3) and square.dtype == np.uint8
    ys, xs = np.nonzero((square == 255).all(axis=2))
    corners = np.array([[xs.min(), ys.min()], [xs.max() + 1, ys.max() + 1]])
    np.testing.assert_allclose((corners - pad) / ratio, [[0, 0], [width, height]], atol=1e-3)
    assert (square[(square != 255).any(axis=2)] == FILL).all()
    assert abs(ratio[0] - ratio[1]) <= 1 / min(height, width)


def test_letterbox_puts_the_odd_pixel_below_and_right():
    _, _, pad = letterbox(np.zeros((61, 100, 3), np.uint8), 100)
    assert pad.tolist() == [0, 19]  # 39 rows to fill: 19 above, 20 below


def test_augmented_draws_partners_from_the_whole_set():
    drawn = []

    def load(index):
        drawn.append(index)
        return marked(40, 40, (5, 5, 35, 35), index % 4)

    for seed in range(60):
        out = augmented(load, 3, 50, 40, Augment(mixup=1), generator(seed))
        assert out.image.shape == (40, 40, 3)
    assert len(drawn) == 60 * 8
    assert len(set(drawn)) == 50


def test_augmented_does_not_write_to_what_it_loads():
    image = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    image.flags.writeable = False
    sample = Sample(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int32))
    for augment in (Augment(mixup=1, flipud=1, fliplr=1), PLAIN):
        augmented(lambda _: sample, 0, 4, 40, augment, generator())
