"""What is kept in the user's cache: whole, or not at all, and never taken for something else."""

from __future__ import annotations

import json
import os

import pytest

from jaxaccum import data
from jaxaccum.data.synthetic.streets import StreetsSource
from jaxaccum.machine import user_cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "jaxaccum"


def scenes(kind: str):
    return data.Scenes("val", length=9) if kind == "scenes" else StreetsSource("val", count=3)


@pytest.mark.parametrize("kind", ["scenes", "streets"])
def test_an_embedded_set_is_counted_once(folder, kind, monkeypatch):
    first = scenes(kind).report
    source = scenes(kind)
    (file,) = folder.rglob("*.json")
    assert file == folder / kind / f"{source.identity}.json"
    monkeypatch.setattr(type(source), "objects", None)  # counting again would call it
    assert source.report == first and first.images == len(source) and first.objects > 0


@pytest.mark.parametrize("kind", ["scenes", "streets"])
@pytest.mark.parametrize("damage", ["", "[1]", "{}", '{"images": true}', "null", "\xff"])
def test_a_damaged_count_is_counted_again(folder, kind, damage):
    right = scenes(kind).report
    (file,) = folder.rglob("*.json")
    whole = file.read_bytes()
    file.write_text(damage, encoding="latin-1")
    assert scenes(kind).report == right
    assert file.read_bytes() == whole
    changed = json.loads(whole) | {"objects": -1}
    file.write_text(json.dumps(changed))
    assert scenes(kind).report == right


def test_a_cache_that_cannot_be_written_costs_time_only(folder):
    folder.parent.joinpath("jaxaccum").write_text("a file where the folder would be")
    assert data.Scenes("val", length=4).report.images == 4
    with pytest.raises(OSError, match=r"File exists|Not a directory"):
        user_cache.write(folder / "a" / "b.json", b"")


def test_nothing_is_left_of_a_write_that_failed(folder):
    (folder / "a").mkdir(parents=True)  # a folder where the file would be
    with pytest.raises(OSError, match="Is a directory"):
        user_cache.write(folder / "a", b"content")
    assert [path.name for path in folder.iterdir()] == ["a"]
    user_cache.save(folder / "a", {})
    assert user_cache.load(folder / "a") is None


def test_others_may_read_what_new_files_let_them_read(folder):
    old = os.umask(0o022)
    try:
        user_cache.write(folder / "a.json", b"{}")
    finally:
        os.umask(old)
    assert (folder / "a.json").stat().st_mode & 0o777 == 0o644
