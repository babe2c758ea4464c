"""Rectangles of an evaluation: few, large enough for each image, no larger than they must be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from jaxaccum import data
from jaxaccum.data import DataError, Objects, Report, Scenes, eval_batches, letterbox, rectangles
from jaxaccum.data.augment import long_sized, resize_long
from jaxaccum.data.rectangles import _COST, STRIDE, of_source, size_of
from jaxaccum.data.views import viewed


def sizes_of(seed, count=300):
    rng = np.random.default_rng(seed)
    aspect = np.exp(rng.normal(0.2, 0.5, count))
    long = rng.integers(20, 900, count)
    wide = np.where(aspect > 1, long, np.maximum(long * aspect, 10).astype(int))
    high = np.where(aspect > 1, np.maximum(long / aspect, 10).astype(int), long)
    return [(int(h), int(w)) for h, w in zip(high, wide, strict=True)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("most", [1, 3, 8])
def test_every_image_fits_one_of_a_few(seed, most):
    sizes = sizes_of(seed)
    found = rectangles.rectangles(sizes, 320, most)
    assert len(found.shapes) <= most and len(set(found.shapes)) == len(found.shapes)
    assert sorted(np.concatenate(found.order).tolist()) == list(range(len(sizes)))
    for (height, width), indices in found.groups():
        assert height % STRIDE == width % STRIDE == 0 and max(height, width) == 320
        aspects = [sizes[i][1] / sizes[i][0] for i in indices]
        assert aspects == sorted(aspects)
        for i in indices:  # as letterbox will fit it
            image = np.zeros((*sizes[i], 3), np.uint8)
            rows, columns = resize_long(image, 320).shape[:2]
            assert rows <= height and columns <= width


def test_no_other_choice_has_fewer_pixels():
    sizes = [s for s in sizes_of(3, 400) if max(s) / min(s) < 2.4]
    size, most = 160, 3
    found = rectangles.rectangles(sizes, size, most)
    fitted = [long_sized(*s, size) for s in sizes]
    needed = [tuple(-(-v // STRIDE) * STRIDE for v in s) for s in fitted]
    best = np.inf
    kinds = sorted(set(needed) | {(size, size)})
    for count in range(1, most + 1):
        for shapes in itertools.combinations(kinds, count):
            pixels = [
                min([h * w for h, w in shapes if h >= n[0] and w >= n[1]], default=np.inf)
                for n in needed
            ]
            best = min(best, sum(pixels) + count * _COST * size**2)
    ours = found.share * size**2 * len(sizes) + len(found.shapes) * _COST * size**2
    assert ours == pytest.approx(best)


def test_usual_data_sets():
    """One camera: one shape. Few images: not a program for each."""
    assert rectangles.rectangles([(480, 640)] * 1000, 640).shapes == ((480, 640),)
    assert rectangles.rectangles([(375, 1242)] * 9, 640).shapes == ((224, 640),)
    assert rectangles.rectangles([(500, 500)], 320).shapes == ((320, 320),)
    assert len(rectangles.rectangles([(480, 640)] * 5 + [(640, 480)] * 5, 640).shapes) == 1
    many = rectangles.rectangles([(480, 640)] * 500 + [(640, 480)] * 500, 640)
    assert many.shapes == ((640, 480), (480, 640)) and many.share == 0.75
    assert many.line() == (
        "rect: 2 shapes, height x width: 640 x 480 (500 images), 480 x 640 (500 images); 75% of "
        "the pixels of squares"
    )
    with pytest.raises(ValueError, match="rectangles of 0 images"):
        rectangles.rectangles([], 320)
    with pytest.raises(ValueError, match="size=330"):
        rectangles.rectangles([(4, 5)], 330)


class Memory:
    """Images of many sizes; some are gone."""

    names = ("a",)
    identity = "0" * 12

    def __init__(self, sizes, gone=()):
        self.sizes, self.gone, self.report = sizes, gone, Report("memory")

    def __len__(self):
        return len(self.sizes)

    def image(self, index):
        if index in self.gone:
            raise DataError(f"{index}: gone")
        rng = np.random.default_rng(index)
        return rng.integers(0, 255, (*self.sizes[index], 3), np.uint8)

    def objects(self, index):
        height, width = self.sizes[index]
        box = np.array([[1, 2, width - 3, height - 1]], np.float32)
        return Objects(box, np.zeros(1, np.int32))

    def name(self, index):
        return f"{index}.png"


def test_batches_hold_each_image_in_its_rectangle(monkeypatch):
    monkeypatch.setattr(rectangles, "_COST", 0)  # of small images
    source = Memory(sizes_of(1, 150))
    found = of_source(source, 128)
    assert len(found.shapes) > 1
    where = {i: shape for shape, indices in found.groups() for i in indices}
    prepared, seen = {}, []
    for batch in eval_batches(source, image_size=128, batch=8, rectangles=found, prepared=prepared):
        shape = batch["image"].shape[1:3]
        for row in np.flatnonzero(batch["weight"] > 0):
            index = int(batch["index"][row])
            seen.append(index)
            assert where[index] == shape
            canvas, ratio, pad = letterbox(source.image(index), 128, shape)
            np.testing.assert_array_equal(batch["image"][row], canvas)
            np.testing.assert_array_equal(batch["ratio"][row], ratio)
            np.testing.assert_array_equal(batch["pad"][row], pad)
            assert tuple(batch["size"][row]) == source.sizes[index]
            (box,) = batch["boxes"][row][batch["valid"][row]]
            mapped = source.objects(index).boxes[0] * np.tile(ratio, 2) + np.tile(pad, 2)
            np.testing.assert_allclose(box, mapped, rtol=1e-6)
            assert (box >= 0).all() and box[2] <= shape[1] and box[3] <= shape[0]
    assert seen == np.concatenate(found.order).tolist()
    assert sorted(prepared) == list(range(150)) and min(prepared.values()) > 0


def test_images_that_are_gone():
    source = Memory([(60, 80)] * 20, gone=(3, 7))
    with pytest.raises(DataError, match="gone"):
        of_source(source, 64)
    found, lost = of_source(source, 64, lenient=True), []
    rows = [
        int(i)
        for batch in eval_batches(source, image_size=64, batch=8, rectangles=found, lost=lost)
        for i in batch["index"][batch["weight"] > 0]
    ]
    assert sorted(rows) == [i for i in range(20) if i not in (3, 7)] and len(lost) == 2


def test_sizes_are_known_without_decoding(tmp_path, monkeypatch):
    """Of files by their headers, turned as the image is; of parts of a set; of scenes."""
    import PIL.Image

    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    for i, size in enumerate([(40, 30), (64, 20)]):
        PIL.Image.new("RGB", size).save(tmp_path / "images" / f"{i}.jpg", exif=exif)
        (tmp_path / "labels" / f"{i}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text("train: images\nval: images\nnames: [a]\n")
    source = data.open_source(str(tmp_path / "data.yaml"), "val")
    scenes = Scenes("val", size=64, length=4)
    pairs = [source, viewed(source, 0.5, True), scenes, Memory([(30, 20)])]
    told = [[one.image(i).shape[:2] for i in range(len(one))] for one in pairs]
    assert told[0] == [(40, 30), (64, 20)]
    monkeypatch.setattr(type(source), "image", None)
    monkeypatch.setattr(Scenes, "image", None)
    assert [[size_of(one, i) for i in range(len(one))] for one in pairs] == told
