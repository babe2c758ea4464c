"""The plan of each model of a comparison, and the microbatch for an effective batch."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxaccum import config as configs
from jaxaccum.comparing.files import last_lines, write_json
from jaxaccum.comparing.report import counted
from jaxaccum.comparing.subjects import Model, as_flags
from jaxaccum.errors import TrainingError
from jaxaccum.machine import user_cache


def ask_plan(arguments: Sequence[str], log: Path) -> dict[str, Any]:
    """Runs `python -m jaxaccum.plan` and returns what it prints; its messages go to `log`.

    Raises:
      TrainingError: it failed; with the last lines of its messages.
    """
    with log.open("wb") as messages:
        done = subprocess.run(
            [sys.executable, "-m", "jaxaccum.plan", *arguments],
            stdout=subprocess.PIPE, stderr=messages, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    # A plan into which nothing fits has a status of its own, but says so in its JSON.
    if done.returncode and not done.stdout.startswith(b"{"):
        raise TrainingError(f"the plan failed ({done.returncode}):\n{last_lines(log)}")
    return json.loads(done.stdout)


def plan(model: Model, memory: str | None, most: int, folder: Path) -> dict[str, Any]:
    """The plan of a model, kept in `folder`; its "largest" is the microbatch of Phase 1.

    Raises:
      ConfigError: `most` is less than one batch-norm group. TrainingError: nothing fits.
    """
    config = model.config
    arguments = [
        f"--config={model.file}", "--json", "--largest",
        f"--remat={config.remat}", f"--engines={config.engine}",
        *([f"--devices={config.devices}"] if config.devices else []),
        *([f"--memory={memory}"] if memory else []), *as_flags(model.overrides),
    ]  # fmt: skip
    file = folder / f"{model.name}.json"
    kept = user_cache.load_dict(file)
    if kept.get("arguments") != arguments:
        print(f"planning {model.name}", flush=True)
        found = ask_plan(arguments, folder / f"{model.name}.log")
        kept = {"arguments": arguments, "plan": found}
        write_json(file, kept)
    found = kept["plan"]
    if found["choice"] is None:
        raise TrainingError(f"{model.name}: {found['why']}")
    devices = found["choice"]["devices"]
    limit = min(most, len(model.source)) // (devices * model.group) * model.group
    if not limit:
        raise configs.ConfigError(
            f"{model.name}: --most={most} (and {len(model.source)} samples) is less than one "
            f"bn_group of {model.group} on {counted(devices, 'device')}"
        )
    return found | {"largest": min(found["choice"]["microbatch"], limit)}


def layout(nbs: int, group: int, largest: int, devices: int = 1) -> int:
    """The microbatch for an effective batch: the fewest steps that `largest` allows, then the
    least padding.

    Args:
      nbs: the effective batch. group: the microbatch is a multiple of it.
      largest: microbatch that fits on each of `devices`.
    """
    steps = math.ceil(nbs / (largest * devices))
    return math.ceil(nbs / (steps * devices) / group) * group
