"""Seeded damage to the checkpoints of a run: what is restored is what was saved, or it is said.

JAXACCUM_FUZZ=N tries N cases of every class of damage.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxaccum.training.checkpoint import CheckpointError, Checkpoints, newest_complete

CASES = int(os.environ.get("JAXACCUM_FUZZ", "2"))
STEPS = (3, 6, 9)


def tree(step: int) -> dict:
    rng = np.random.default_rng(step)
    return {
        "params": {"kernel": rng.standard_normal((24, 16), np.float32)},
        "counts": np.arange(step, dtype=np.int32),
        "step": np.int32(step),
    }


def same_shapes(step: int) -> dict:
    return tree(step) | {"counts": np.full(4, step, np.int32)}


def meta(step: int) -> dict:
    return {"at": step, "metrics": {"step": step, "map": step / 16}, "names": ["a", "b"]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, same_shapes(step), meta(step))
        checkpoints.save_best(6, same_shapes(6), meta(6))
    return folder


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def pick(rng: np.random.Generator, folder: Path) -> Path:
    found = files(folder)
    return found[rng.integers(len(found))]


def folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_dir())


def removed(rng, folder):
    pick(rng, folder).unlink()


def truncated(rng, folder):
    path = pick(rng, folder)
    content = path.read_bytes()
    path.write_bytes(content[: rng.integers(len(content) + 1)])


def lengthened(rng, folder):
    path = pick(rng, folder)
    path.write_bytes(path.read_bytes() + rng.bytes(int(rng.integers(1, 64))))


def flipped(rng, folder):
    path = pick(rng, folder)
    content = bytearray(path.read_bytes())
    for _ in range(int(rng.integers(1, 4))):
        if content:
            content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def zeroed(rng, folder):
    path = pick(rng, folder)
    path.write_bytes(bytes(path.stat().st_size))


def overwritten(rng, folder):
    pick(rng, folder).write_bytes(rng.bytes(int(rng.integers(0, 200))))


def swapped(rng, folder):
    a, b = pick(rng, folder), pick(rng, folder)
    x, y = a.read_bytes(), b.read_bytes()
    a.write_bytes(y)
    b.write_bytes(x)


def steps_swapped(rng, folder):
    a, b = rng.choice(STEPS, 2, replace=False)
    last = folder / "last"
    (last / str(a)).rename(last / "aside")
    (last / str(b)).rename(last / str(a))
    if rng.random() < 0.5:
        (last / "aside").rename(last / str(b))


def step_renamed(rng, folder):
    name = ["12", "012", "step_12", "12.orbax-checkpoint-tmp", "²", "-1", "1e1", "٣"]
    (folder / "last" / "9").rename(folder / "last" / name[rng.integers(len(name))])


def step_copied(rng, folder):
    number = str(rng.integers(10, 2000))
    shutil.copytree(folder / "last" / str(rng.choice(STEPS)), folder / "last" / number)


def part_swapped(rng, folder):
    """The arrays or the meta of another update, with or without its list of files."""
    a, b = (folder / "last" / str(s) for s in rng.choice(STEPS, 2, replace=False))
    for part in rng.choice(["tree", "meta", "files.json"], int(rng.integers(1, 3)), replace=False):
        if (a / part).is_dir():
            shutil.rmtree(a / part)
            shutil.copytree(b / part, a / part)
        else:
            shutil.copy(b / part, a / part)


def part_removed(rng, folder):
    found = folders(folder)
    shutil.rmtree(found[rng.integers(len(found))])


def made_a_folder(rng, folder):
    path = pick(rng, folder)
    path.unlink()
    path.mkdir()


def folder_made_a_file(rng, folder):
    found = folders(folder)
    path = found[rng.integers(len(found))]
    shutil.rmtree(path)
    path.write_bytes(rng.bytes(9))


def linked_nowhere(rng, folder):
    path = pick(rng, folder)
    path.unlink()
    path.symlink_to(folder / "nothing")


def foreign(rng, folder):
    place = [folder, *folders(folder)]
    name = [
        ".DS_Store",
        "Thumbs.db",
        "12",
        "copy of 9",
        "9 (1)",
        "x.tmp",
        "_METADATA.1",
        "files.json~",
    ]
    path = place[rng.integers(len(place))] / name[rng.integers(len(name))]
    if rng.random() < 0.5:
        path.mkdir()
    else:
        path.write_bytes(rng.bytes(20))


def listed_otherwise(rng, folder):
    path = folder / "last" / str(rng.choice(STEPS)) / "files.json"
    listed = json.loads(path.read_text())
    names = [name for name in listed if name != "update"]
    other = [
        lambda: [listed], lambda: {}, lambda: None, lambda: listed | {names[0]: 7},
        lambda: listed | {names[0]: ["1", "2"]}, lambda: listed | {"update": 6.5},
        lambda: listed | {"tree/nothing": [0, 0]}, lambda: listed | {"../../../lock": [0, 0]},
        lambda: {k: v for k, v in listed.items() if k != names[-1]},
    ]  # fmt: skip
    path.write_text(json.dumps(other[rng.integers(len(other))]()))


DAMAGE: list[Callable[[np.random.Generator, Path], None]] = [
    removed, truncated, lengthened, flipped, zeroed, overwritten, swapped, steps_swapped,
    step_renamed, step_copied, part_swapped, part_removed, made_a_folder, folder_made_a_file,
    linked_nowhere, foreign, listed_otherwise,
]  # fmt: skip


def place() -> dict:
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(np.shape(a), np.asarray(a).dtype, sharding=one),
        same_shapes(0),
    )


def equal(a, b) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, jax.tree.map(np.asarray, a), b))


def require_named(folder: Path, error: Exception) -> None:
    assert str(folder) in str(error), error


def examine(folder: Path) -> Counter:
    """Reads all that can be read, and goes on; any error but ours is the test's."""
    found: Counter = Counter()
    newest_complete(folder)
    try:
        with Checkpoints(folder, keep=3) as checkpoints:
            try:
                state, told = checkpoints.restore(place())
                step = told["at"]
                assert step in STEPS and told == meta(step), told
                assert equal(state, same_shapes(step)), f"not the state of update {step}"
                found[f"state of {step}"] += 1
            except CheckpointError as error:
                require_named(folder, error)
                found["refused"] += 1
            try:
                told = checkpoints.meta(best=True)
                assert told == meta(6), told
                state, _ = checkpoints.restore_best(place())
                assert equal(state, same_shapes(6)), "not the best weights"
                found["best"] += 1
            except CheckpointError as error:
                require_named(folder, error)
                found["no best"] += 1
            assert checkpoints.rewind(9) in ({}, meta(6)["metrics"])
            checkpoints.save(15, same_shapes(15), meta(15))
    except CheckpointError as error:
        require_named(folder, error)
        found["unusable"] += 1
        return found
    with Checkpoints(folder, keep=3) as checkpoints:
        newest = checkpoints.latest
        if newest == 15:
            assert equal(checkpoints.restore(place())[0], same_shapes(15))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_damaged_checkpoints(whole, tmp_path, damage, capsys):
    outcomes: Counter = Counter()
    for case in range(CASES):
        folder = tmp_path / str(case)
        shutil.copytree(whole, folder)
        rng = np.random.default_rng([case, DAMAGE.index(damage)])
        damage(rng, folder)
        try:
            outcomes += examine(folder)
        except Exception as error:
            error.add_note(f"{damage.__name__}, case {case}")
            raise
        shutil.rmtree(folder)
    with capsys.disabled():
        if "JAXACCUM_FUZZ" in os.environ:
            print(f"\n{damage.__name__}: {dict(outcomes)}")
