"""KITTI's folders: where its frames, lists of frames and calibrations lie, read and checked."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jaxaccum.data.base import DataError, Objects, Report, identify
from jaxaccum.data.texts import MissingFileError, lines, number, read_text, shown, shown_path
from jaxaccum.metrics.kitti_labels import Labels

PICTURES, TEXTS = (".png", ".jpg", ".jpeg"), (".txt",)  # suffixes, upper case is taken as well
_LONGEST = 240  # characters of a name, and a suffix
_LARGEST_FOCAL = 1e5  # pixels
_LARGEST = 1e7  # of any number of a projection


def frames_folder(root: Path) -> Path:
    """The folder that holds image_2, label_2 and calib: `root` or its `training`.

    Raises:
      DataError: neither is.
    """
    for folder in (root / "training", root):
        if os.path.isdir(folder / "image_2"):
            return folder
    raise DataError(
        f"{shown_path(root)}: neither training/image_2 nor image_2 is there. Give the folder that "
        f"holds KITTI's training/{{image_2,label_2,calib}} and ImageSets.",
        file=str(root),
    )


def frame_file(folder: Path, part: str, frame: str, suffixes: tuple[str, ...]) -> Path | None:
    """A frame's file in a part of the folder, whatever the case of its suffix, or None.

    A picture must be a regular file. What else is there in place of a text is given back: reading
    it says what it is.
    """
    there = os.path.isfile if suffixes == PICTURES else os.path.lexists
    for cased in (str, str.upper, str.title):
        for suffix in suffixes:
            file = folder / part / f"{frame}{cased(suffix)}"
            if there(file):
                return file
    return None


def sample(count: int, chosen: int, seed: int) -> NDArray[np.bool_]:
    """Which of `count` belong to a random sample of `chosen`."""
    if seed < 0:
        raise DataError(f"seed is {seed}, expected at least 0.")
    part = np.zeros(count, bool)
    part[np.random.Generator(np.random.PCG64(seed)).permutation(count)[:chosen]] = True
    return part


def _list_folders(root: Path) -> list[Path]:
    """Where lists of frames may lie: in the root, in its training, or, where the root is the
    frames' own folder, beside it."""
    folder = frames_folder(root)
    places = [root, folder]
    if folder == root:
        # Not root.parent: the parent of "." is "." to pathlib.
        places.append(Path(os.path.dirname(os.path.abspath(root))))
    return [place / "ImageSets" for place in dict.fromkeys(places)]


def listed(root: Path, split: str, report: Report) -> tuple[list[str], str]:
    """The frames of a list of ImageSets, each once; and where it lies if that needs saying.

    Args:
      root: KITTI's folder.
      split: the list's name.
      report: takes the count of frames that are listed again.

    Raises:
      DataError: there is no such list, or it is empty or no text.
    """
    folders = _list_folders(root)
    files = [folder / f"{split}.txt" for folder in folders]
    for listing in files:
        try:
            text = read_text(listing)
            break
        except MissingFileError:
            continue
    else:
        there = sorted({file.stem for folder in folders for file in folder.glob("*.txt")})
        raise DataError(
            f"{shown_path(files[0])}: no such list of frames"
            + (f"; there are {', '.join(map(shown_path, there))}" if there else "")
            + ". Write one frame a line (000123), take the lists that others use, or make a "
            f"random train and val list: {_to_write_split(root)}",
            file=str(files[0]),
        )
    frames: dict[str, None] = {}
    for line, row in enumerate(lines(text), 1):
        frame = row.strip()
        if frame in frames:
            report.skip("frame listed again", shown_path(listing), line)
        elif max(map(len, frame.split("/"))) > _LONGEST:
            raise DataError(
                f"{shown_path(listing)}:{line}: {shown(frame)} is too long for the name of a "
                f"frame. Write one frame a line, such as 000123.",
                file=str(listing),
                line=line,
            )
        elif frame:
            frames[frame] = None
    if not frames:
        raise DataError(
            f"{shown_path(listing)}: the list is empty. Write one frame a line, such as 000123.",
            file=str(listing),
        )
    beside = "" if listing == files[0] else f"frames as listed in {shown_path(listing)}."
    return list(frames), beside


def _to_write_split(root: Path) -> str:
    """A command for a shell that calls `write_split`, whatever is in the path."""
    path = repr(str(root))
    if '"' not in path:  # the other quotes, which need no care inside a shell's
        path = f'"{path[1:-1]}"'
    call = f"from jaxaccum import data; data.write_split({path})"
    return f"python -c {shlex.quote(call)}"


def write_split(root: str | Path, fraction: float = 0.8, seed: int = 0) -> tuple[Path, Path]:
    """Writes ImageSets/train.txt and ImageSets/val.txt: a random split of all labelled frames.

    Frames that follow each other in a video are alike, and a random split has them on both sides:
    for numbers to compare with others', use the lists that they use.

    Args:
      root: KITTI's folder.
      fraction: part of the frames that goes to train; at least one goes to each.
      seed: of the choice.

    Returns:
      The two files.

    Raises:
      DataError: one of the lists is there already, there is nothing to split, or they cannot be
        written.
    """
    root = Path(root)
    if not 0 < fraction < 1:
        raise DataError(f"fraction is {fraction}, expected more than 0 and less than 1.")
    folder = frames_folder(root)
    for place in _list_folders(root):
        for file in (place / "train.txt", place / "val.txt"):
            if os.path.lexists(file):
                raise DataError(
                    f"{shown_path(file)}: there is such a list already, and it is not "
                    f"overwritten. Move it away to make another.",
                    file=str(file),
                )
    labels = sorted((folder / "label_2").glob("*.[tT][xX][tT]"))
    frames = [
        label.stem
        for label in labels
        if frame_file(folder, "image_2", label.stem, PICTURES)
        and frame_file(folder, "calib", label.stem, TEXTS)
    ]
    if len(frames) < 2:
        raise DataError(
            f"{shown_path(folder)}: {len(frames)} frames with an image, a label file and a "
            f"calibration; expected at least 2 to split.",
            file=str(folder),
        )
    count = min(max(round(len(frames) * fraction), 1), len(frames) - 1)
    chosen = sample(len(frames), count, seed)
    train, val = (root / "ImageSets" / f"{name}.txt" for name in ("train", "val"))
    try:
        train.parent.mkdir(exist_ok=True)
        for file, part in ((train, chosen), (val, ~chosen)):
            kept = [frame for frame, one in zip(frames, part, strict=True) if one]
            file.write_text("".join(f"{frame}\n" for frame in kept), encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{shown_path(train.parent)}: the lists cannot be written ({error.strerror}). Make "
            f"the folder writable, or write the lists elsewhere and link them there.",
            file=str(train.parent),
        ) from error
    except UnicodeEncodeError as error:
        raise DataError(
            f"{shown_path(folder)}: a frame's name is not UTF-8: {shown(error.object)}. Rename it.",
            file=str(folder),
        ) from error
    return train, val


def read_calibration(file: str | Path) -> NDArray[np.float32]:
    """The left colour camera of a KITTI calibration file, its row P2: (3, 4) float32.

    Raises:
      DataError: naming file, line and fix.
    """
    name = shown_path(file)
    for line, text in enumerate(lines(read_text(file)), 1):
        key, _, row = text.partition(":")
        if key.strip() != "P2":
            continue
        try:
            values = np.array([number(v) for v in row.split()], np.float64)
        except ValueError:
            values = np.zeros(0)
        if len(values) != 12 or not np.isfinite(values).all():
            problem = f"expected P2: and 12 numbers (3 rows of 4), found {shown(text.strip())}"
        else:
            problem = _no_camera(values.reshape(3, 4))
        if problem:
            raise DataError(
                f"{name}:{line}: {problem}. Correct the row, or take the file from KITTI's calib.",
                file=str(file),
                line=line,
            )
        return values.reshape(3, 4).astype(np.float32)
    raise DataError(
        f"{name}: no row P2, the projection of the left colour camera. Add `P2:` and its 12 "
        f"numbers, or take the file from KITTI's calib.",
        file=str(file),
    )


def _no_camera(projection: NDArray[np.float64]) -> str:
    """What is wrong with a projection (3, 4) of finite numbers, or ""."""
    if np.abs(projection).max() > _LARGEST:
        return (
            f"P2 is no camera: it has {np.abs(projection).max():g}, expected at most {_LARGEST:g}"
        )
    # A camera that mirrors or flattens the world has a determinant that is not positive.
    determinant = np.linalg.det(projection[:, :3])
    if determinant <= 0:
        return (
            f"P2 is no camera: its left 3 x 3 block has the determinant {determinant:g}, expected "
            f"more than 0"
        )
    if np.abs(projection[2, :3] - (0, 0, 1)).max() > 1e-3:
        return (
            f"P2 is no rectified camera: its third row is {shown(projection[2].tolist())}, "
            f"expected 0 0 1 and a shift"
        )
    across, down = projection[0, 0], projection[1, 1]
    if not 1 <= min(across, down) <= max(across, down) <= _LARGEST_FOCAL:
        return (
            f"P2 is no camera: its focal lengths are {across:g} and {down:g} pixels, expected 1 "
            f"to {_LARGEST_FOCAL:g}"
        )
    return ""


def identity_of(
    names: Sequence[str],
    images: Iterable[tuple[str, tuple[int, int], Objects]],
    labels: Sequence[Labels],
    cameras: Sequence[NDArray[np.float32]],
) -> str:
    """The identity of a data set with 3D boxes: also of all labels and cameras."""
    digest = hashlib.sha256(identify(names, images).encode())
    for one, camera in zip(labels, cameras, strict=True):
        digest.update(f"\0{len(one)}\0{' '.join(one.kinds)}\0".encode())
        for values in (
            one.truncation, one.occlusion, one.alpha, one.boxes, one.dimensions, one.locations,
            one.yaw, camera,
        ):  # fmt: skip
            digest.update(np.ascontiguousarray(values, "<f4").tobytes())
    return digest.hexdigest()[:12]
