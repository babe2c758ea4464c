"""How far plans are from what devices of a kind really use, measured once and kept."""

from __future__ import annotations

import json
from pathlib import Path

from jaxaccum.machine import user_cache
from jaxaccum.plan.targets import Target

# Without a calibration: convolution libraries and allocators take what no plan shows.
UNCALIBRATED = 0.1


def file() -> Path:
    """Where calibrations are kept."""
    return user_cache.folder() / "calibration.json"


def of(target: Target) -> tuple[float, float]:
    """(used over planned memory, share of the memory to leave free) of a target."""
    found = known().get(target.kind) if target.at_hand else None
    try:
        assert found is not None
        return float(found["factor"]), float(found["margin"])
    except (AssertionError, KeyError, TypeError, ValueError):  # not there, or damaged
        return 1.0, UNCALIBRATED


def known() -> dict[str, dict]:
    """Device kind -> calibration."""
    return user_cache.load_dict(file())


def keep(kind: str, pairs: list[tuple[int, int]]) -> dict:
    """Stores what (planned, used) pairs of bytes say of a kind of device.

    The factor is the median of their ratios, not below 1; the margin covers the worst of them and
    two percent more.
    """
    ratios = sorted(used / planned for planned, used in pairs)
    factor = max(ratios[len(ratios) // 2], 1.0)
    entry = {
        "factor": factor,
        "margin": round(max(ratios[-1] / factor - 1, 0.0) + 0.02, 4),
        "pairs": [list(p) for p in pairs],
    }
    user_cache.write(file(), json.dumps(known() | {kind: entry}, indent=1).encode())
    return entry
