"""Checkpoints that are damaged, missing, or of another model."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxaccum.training.checkpoint import CheckpointError, Checkpoints, newest_complete

SIZE = 64


def tree(step: int, size: int = SIZE) -> dict:
    rng = np.random.default_rng(step)
    return {
        "params": {"kernel": rng.standard_normal((size, size)), "bias": rng.standard_normal(size)},
        "step": np.int32(step),
    }


def template(size: int = SIZE):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(np.shape(a), np.asarray(a).dtype, sharding=place),
        tree(0, size),
    )


@pytest.fixture
def workdir(tmp_path, x64):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (3, 6, 9):
            checkpoints.save(step, tree(step), {"at": step})
    return tmp_path


def data_file(folder: Path) -> Path:
    """The largest file: that with the arrays."""
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove, "is missing"), (truncate, "bytes of"),
        (zero, "does not hold what was written"), (flip, "does not hold what was written"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("file", ["arrays", "meta/metadata", "tree/_METADATA"])
def test_the_one_before_is_used_and_the_broken_one_put_aside(workdir, capfd, damage, words, file):
    folder = workdir / "last" / "9"
    broken = data_file(folder) if file == "arrays" else folder / file
    damage(broken)
    with Checkpoints(workdir, keep=3) as checkpoints:
        state, meta = checkpoints.restore(template())
        assert meta == {"at": 6} and int(state["step"]) == 6
        assert jax.tree.all(jax.tree.map(np.array_equal, state, tree(6)))
        said = capfd.readouterr()
        assert said.out.count("\n") == 1 and not said.err, said.err
        assert "last/9" in said.out and str(broken.relative_to(folder)) in said.out
        assert words in said.out and "from update 6 instead" in said.out
        assert (workdir / "broken" / "last-9").is_dir()
        checkpoints.save(9, tree(9), {"at": 9})  # the step can be saved again
    with Checkpoints(workdir, keep=3) as checkpoints:
        state, _ = checkpoints.restore(template())
        assert jax.tree.all(jax.tree.map(np.array_equal, state, tree(9)))


def test_broken_twice_both_are_kept_aside(workdir):
    for _ in range(2):
        truncate(data_file(workdir / "last" / "9"))
        with Checkpoints(workdir, keep=3) as checkpoints:
            checkpoints.restore(template())
            checkpoints.save(9, tree(9), {"at": 9})
    assert {p.name for p in (workdir / "broken").iterdir()} == {"last-9", "last-9-2"}


def test_none_is_readable(workdir):
    for step in (3, 6, 9):
        truncate(data_file(workdir / "last" / str(step)))
    for _ in range(2):  # nothing is moved: the second start says the same
        with (
            Checkpoints(workdir, keep=3) as checkpoints,
            pytest.raises(CheckpointError, match=r"(?s)update 9: .*update 3: .*bytes of.*a copy"),
        ):
            checkpoints.restore(template())
    assert newest_complete(workdir) == 9 and not (workdir / "broken").exists()


def test_an_older_checkpoint_has_no_list_of_files(workdir, capfd):
    (workdir / "last" / "9" / "files.json").unlink()
    with Checkpoints(workdir) as checkpoints:
        assert int(checkpoints.restore(template())[0]["step"]) == 9
    truncate(workdir / "last" / "9" / "tree" / "_METADATA")
    with Checkpoints(workdir) as checkpoints:
        assert int(checkpoints.restore(template())[0]["step"]) == 6
    assert "tree: " in capfd.readouterr().out


def test_another_model_is_an_error_and_not_a_fallback(workdir):
    with Checkpoints(workdir, keep=3) as checkpoints:
        with pytest.raises(
            CheckpointError, match=r"kernel: checkpoint \(64, 64\), here \(32, 32\)"
        ):
            checkpoints.restore(template(32))
        more = template() | {"ema": template()["step"]}
        with pytest.raises(CheckpointError, match=r"ema: checkpoint nothing, here \(\)"):
            checkpoints.restore(more)

        def refuse(meta):
            raise CheckpointError(f"another recipe, of update {meta['at']}")

        with pytest.raises(CheckpointError, match="another recipe, of update 9"):
            checkpoints.restore(template(), refuse)
    assert newest_complete(workdir) == 9 and not (workdir / "broken").exists()


def test_best_weights(workdir, capfd):
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.rewind(9) == {}
        with pytest.raises(CheckpointError, match="no best weights"):
            checkpoints.restore_best(template())
        checkpoints.save_best(6, tree(6), {"metrics": {"step": 6, "map": 0.25}})
        checkpoints.wait()
        assert checkpoints.rewind(6) == {"step": 6, "map": 0.25}
        assert jax.tree.all(
            jax.tree.map(np.array_equal, checkpoints.restore_best(template())[0], tree(6))
        )
        truncate(data_file(workdir / "best" / "6"))
        with pytest.raises(CheckpointError, match=r"best weights .*bytes of .*from a copy"):
            checkpoints.restore_best(template())
        assert checkpoints.rewind(6) == {} and checkpoints.best is None
        assert "best/6" in capfd.readouterr().out
        checkpoints.save_best(6, tree(6), {"metrics": {"step": 6}})
        checkpoints.wait()
        assert checkpoints.rewind(5) == {} and checkpoints.best is None


def test_newest_complete(tmp_path):
    assert newest_complete(tmp_path) is None
    for name in ("3", "12", "15.orbax-checkpoint-tmp"):
        (tmp_path / "last" / name).mkdir(parents=True)
    assert newest_complete(tmp_path) == 12


# --- Every save is looked for as a reader would, before it counts. ---


@pytest.mark.parametrize(
    "hide",
    [
        lambda folder: folder.rename(folder.with_name("elsewhere")),
        lambda folder: truncate(data_file(folder / "tree")),
        lambda folder: remove(folder / "meta" / "metadata"),
    ],
    ids=["gone", "cut", "incomplete"],
)
def test_a_save_that_cannot_be_found_again_is_an_error(workdir, hide):
    lost = pytest.raises(CheckpointError, match=r"update 12 was saved in .* cannot be found again")
    with lost, Checkpoints(workdir, keep=3) as checkpoints:
        checkpoints.save(12, tree(12), {"at": 12})
        checkpoints._last.wait_until_finished()
        hide(workdir / "last" / "12")


def test_of_two_saves_that_fail_the_first_is_told(workdir, monkeypatch):
    """What the library raised when the second was closed came out in its place."""

    def fail(*_):
        raise ValueError("RESOURCE_EXHAUSTED: [OS error 27: EFBIG File too large]")

    told = pytest.raises(CheckpointError, match=r"cannot save a checkpoint in .* larger than")
    with told, Checkpoints(workdir, keep=3) as checkpoints:
        for manager in (checkpoints._last, checkpoints._best):
            manager.close()
            monkeypatch.setattr(manager, "wait_until_finished", fail)
            monkeypatch.setattr(manager, "close", fail)
