"""The input pipeline: samples per second of one thread beside a plain OpenCV loader, and of more
and more loader processes."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from pathlib import Path

import cv2

from benchmarks.harness import Context, Found, Row, cores, interleaved, ratio_row
from benchmarks.opencv_loader import Loader
from jaxaccum import data
from jaxaccum.data.stream import suit_process
from jaxaccum.data.synthetic.scenes import Scenes

PARTS = ("core", "workers")


def pipeline(context: Context, part: str) -> Found:
    """Images per second with mosaic."""
    size, images = context.choose((64, 8), (640, 64), (640, 256))
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), size, images)
        if part == "core":
            return _one_thread(context, Path(folder), size)
        return _processes(context, Path(folder), size)


def write_images(folder: Path, size: int, count: int) -> None:
    """A YOLO data set of drawn scenes: JPEGs whose long side is `size`."""
    source = Scenes("train", size=size, length=count)
    for kind in ("images", "labels"):
        (folder / kind / "train").mkdir(parents=True)
    for i in range(count):
        image, objects = source.image(i), source.objects(i)
        height, width = image.shape[:2]
        cv2.imwrite(str(folder / f"images/train/{i:05}.jpg"), image[..., ::-1])
        lines = [
            f"{label} {(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height} "
            f"{(x2 - x1) / width} {(y2 - y1) / height}"
            for label, (x1, y1, x2, y2) in zip(
                objects.classes.tolist(), objects.boxes.tolist(), strict=True
            )
        ]
        (folder / f"labels/train/{i:05}.txt").write_text("\n".join(lines))
    names = ", ".join(source.names)
    (folder / "data.yaml").write_text(
        f"path: .\ntrain: images/train\nval: images/train\nnames: [{names}]\n"
    )


def _stream(folder: Path, size: int, cache: str) -> data.TrainStream:
    return data.TrainStream(
        data.open_source(str(folder / "data.yaml"), "train"), image_size=size, max_objects=300,
        augment=data.Augment(), seed=0, cache=cache,  # type: ignore[arg-type]
    )  # fmt: skip


def _one_thread(context: Context, folder: Path, size: int) -> Found:
    rounds, count = context.choose((2, 4), (7, 24), (7, 64))
    before = cv2.getNumThreads()
    suit_process()  # both: they share it
    rows = []
    try:
        for cache, words in (("none", "images from disk"), ("ram", "resized images in memory")):
            stream, loader = _stream(folder, size, cache), Loader(folder, size, cache == "ram")
            if cache == "ram":
                for i in range(len(loader.files)):
                    loader.load(i)
                    stream.sample(i)
            turns = itertools.count()

            def ours(stream=stream, turns=turns):
                start, first = time.perf_counter(), next(turns) * count
                for i in range(first, first + count):
                    stream.sample(i)
                return time.perf_counter() - start

            def theirs(loader=loader):
                start = time.perf_counter()
                for i in range(count):
                    loader.sample(i % len(loader.files))
                return time.perf_counter() - start

            times = interleaved({"ours": ours, "theirs": theirs}, rounds)
            rate = {name: count / statistics.median(values) for name, values in times.items()}
            rows.append(
                ratio_row(
                    f"{words}: ours / OpenCV loader", times["theirs"], times["ours"],
                    target=(">=", 1.0),
                    note=f"{rate['ours']:.1f} against {rate['theirs']:.1f} images/s per core",
                )
            )  # fmt: skip
    finally:
        cv2.setNumThreads(before)
    return Found(f"{size} px, mosaic, affine, HSV, flip; JPEGs of {size} px; one thread", rows)


def _processes(context: Context, folder: Path, size: int) -> Found:
    window, windows = context.choose((4, 3), (32, 6), (64, 12))
    numbers = context.choose((0, 1), (0, 1, 2, 4), (0, 1, 2, 4, 8))
    stream = _stream(folder, size, "none")
    rows = []
    for workers in numbers:
        start = time.perf_counter()
        batches = stream.windows(0, [window] * windows, workers=workers)
        next(batches)
        waited = time.perf_counter() - start
        took, last = [], time.perf_counter()
        for _ in batches:
            now = time.perf_counter()
            took.append(now - last)
            last = now
        rate = [window / seconds for seconds in took]
        name = "threads alone" if not workers else f"{workers} processes"
        rows.append(
            Row(
                f"loader: {name}", window * len(took) / sum(took), "images/s", low=min(rate),
                high=max(rate), note=f"first effective batch after {waited:.1f} s",
            )
        )  # fmt: skip
    notes = [f"On {cores()} processors, images from disk; what was made ahead comes at once."]
    return Found(
        f"{size} px, mosaic, affine, HSV, flip; effective batches of {window}", rows, notes
    )
