"""Untrained networks as runs, for the tests of the verbs."""

from __future__ import annotations

import pytest
import tiny


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return tiny.untrained(tmp_path_factory.mktemp("run") / "2d", tiny.tiny_config(), ("a", "b"))


@pytest.fixture(scope="module")
def detector3d(tmp_path_factory):
    names = ("car", "person")
    return tiny.untrained(tmp_path_factory.mktemp("run") / "3d", tiny.tiny_config3d(), names)
