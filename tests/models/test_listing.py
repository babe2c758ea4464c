"""The table of models is what the models are."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxaccum import models
from jaxaccum.models.__main__ import measured
from jaxaccum.models.listing import KNOWN

ROOT = Path(__file__).resolve().parents[2]
SMALL = [name for name in KNOWN if name.endswith("-n") or "-" not in name[-3:]]


def test_all_models_are_in_it_and_nothing_else():
    shipped = [name for name in models.names() if name.startswith(("yolo", "adapointr", "pointr"))]
    assert [n for n in shipped if "tiny" not in n] == [n for n in KNOWN if "tiny" not in n]


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if name in SMALL else [
        pytest.mark.slow, pytest.mark.long
    ]) for name in KNOWN
])  # fmt: skip
def test_every_row(name):
    count, flops, facts = measured(name)
    assert (count, f"{flops:.2f}", facts) == (
        KNOWN[name][0],
        f"{KNOWN[name][1]:.2f}",
        KNOWN[name][2],
    )


def test_it_is_shown_at_once():
    """It took a hundred seconds: nothing is traced now."""
    done = subprocess.run(
        [sys.executable, "-m", "jaxaccum.models"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    rows = done.stdout.splitlines()
    assert len(rows) == len(KNOWN) + 1
    assert rows[1].split()[0] == next(iter(KNOWN))
