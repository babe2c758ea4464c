"""Images with seeded random damage: the pixels that another decoder reads too, or an error of ours.

JAXACCUM_FUZZ=1000 tries that many of each kind.
PYTHONPATH=. python tests/data/test_fuzz_images.py N
prints what became of them.
"""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from jaxaccum.data import DataError
from jaxaccum.data.images import Unreadable, decode_upright, read_header

CASES = int(os.environ.get("JAXACCUM_FUZZ", "30"))
MOST_MEMORY = 600  # MiB; the largest image that is allowed takes 400
LONGEST = 20.0  # seconds for one file, on a busy machine


def encoded(format, mode="RGB", orientation=0, **options):
    noise = np.random.default_rng(3).integers(0, 255, (6, 8, 3), np.uint8)
    image = PIL.Image.fromarray(np.asarray(cv2.resize(noise, (60, 40)))).convert(mode)
    if orientation:
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


KINDS = {
    "jpeg": encoded("JPEG"),
    "jpeg progressive": encoded("JPEG", progressive=True),
    "jpeg exif": encoded("JPEG", orientation=6),
    "png": encoded("PNG"),
    "png palette": encoded("PNG", "P"),
    "png exif": encoded("PNG", orientation=6),
    "bmp": encoded("BMP"),
    "bmp palette": encoded("BMP", "P"),
    "tiff": encoded("TIFF"),
    "tiff exif": encoded("TIFF", orientation=6),
    "tiff lzw": encoded("TIFF", compression="tiff_lzw"),
    "tiff zip": encoded("TIFF", compression="tiff_adobe_deflate"),
    "tiff jpeg": encoded("TIFF", compression="jpeg"),
    "tiff fax": encoded("TIFF", "1", compression="group4"),
    "bigtiff": encoded("TIFF", big_tiff=True),
    "webp": encoded("WEBP"),
    "webp lossless": encoded("WEBP", lossless=True),
    "webp exif": encoded("WEBP", orientation=6),
}
WORDS = (b"\xff\xff\xff\xff", b"\0\0\0\x7f", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\0\0\x40\0")


def damaged(whole: bytes, rng: random.Random) -> bytes:
    data = bytearray(whole)
    at = rng.randrange(len(data))
    match rng.randrange(5):
        case 0:
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case 1:  # in the header
            data[at % 200 % len(data)] = rng.choice([0, 1, 0x40, 0x7F, 0x80, 0xFF])
        case 2:
            del data[at : at + rng.randrange(1, 20)]
        case 3:
            data[at : at + 4] = rng.choice(WORDS)
        case 4:
            del data[at:]
    return bytes(data)


def outcome(data: bytes) -> str:
    """What becomes of an image. Anything but the words "refused", "as another decoder" or "nobody
    else decodes it" is a fault."""
    try:
        size = read_header(io.BytesIO(data)).size
        pixels = decode_upright(data, "a file")
    except (DataError, Unreadable) as error:
        return "refused" if str(error) else "an error without words"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if pixels.shape[:2] != size or pixels.dtype != np.uint8 or pixels.shape[2] != 3:
        return f"the header said {size}, and it is {pixels.shape}"
    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            image.load()
            turned = image.getexif().get(0x0112, 1)
            other = PIL.ImageOps.exif_transpose(image) if turned in range(1, 9) else image
            expected = np.asarray(other.convert("RGB")).astype(int)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, OverflowError, ArithmeticError):
        return "nobody else decodes it"
    if expected.shape != pixels.shape:
        return f"it is {pixels.shape}, and another decoder says {expected.shape}"
    # Decoders round colours differently.
    difference = np.abs(expected - pixels).mean()
    return "as another decoder" if difference < 3 else f"other pixels, by {difference:.1f}"


def peak() -> int:
    """Most memory that this process has ever asked for, in MiB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) // 1024 for line in file if line.startswith("VmPeak"))


def run(cases: int) -> dict[str, dict[str, int]]:
    outcomes: dict[str, dict[str, int]] = {}
    for kind, whole in KINDS.items():
        rng, counts = random.Random(f"{kind} of {cases}"), Counter[str]()
        assert outcome(whole) == "as another decoder", kind
        for _ in range(cases):
            data = damaged(whole, rng)
            before, start = peak(), time.monotonic()
            result = outcome(data)
            if peak() - before > MOST_MEMORY:
                result = f"{peak() - before} MiB"
            if time.monotonic() - start > LONGEST:
                result = "hang"
            counts[result] += 1
        outcomes[kind] = dict(counts)
    return outcomes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_damaged_images_are_right_or_refused():
    """In a process of its own, whose memory nothing else has taken."""
    done = subprocess.run(
        [sys.executable, __file__, str(CASES)], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    fine = {"refused", "as another decoder", "nobody else decodes it"}
    assert set(outcomes) == set(KINDS)
    for kind, counts in outcomes.items():
        assert set(counts) <= fine, f"{kind}: {counts}"
        assert sum(counts.values()) == CASES and counts["refused"] > 0
        assert counts.get("nobody else decodes it", 0) < max(CASES // 10, 3), kind


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]))))
