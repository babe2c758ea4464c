"""Seeded overrides of the configs that ship: a config that can be prepared, or an error of ours
that names the field. JAXACCUM_FUZZ=N for N cases of each config."""

from __future__ import annotations

import os
import random
import string
from collections import Counter
from pathlib import Path

import pytest

from jaxaccum import config as configs
from jaxaccum import config_files
from jaxaccum.accumulate import GeometryError
from jaxaccum.training import run

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.py"))
CASES = int(os.environ.get("JAXACCUM_FUZZ", 60))
NUMBERS = (
    "0", "-0", "1", "-1", "2", "7", "0.5", "-0.5", "1e-30", "1e9", "1e30", "1e308", "1e400", "nan",
    "-nan", "inf", "-inf", "2147483647", "2147483648", "4294967296", "9223372036854775808",
    "1000000000", "100000000000", "9" * 40, "9" * 5000, "0x10", "1_0", "1,5", "1.2.3", "\u0661",
    "\uff11", "1e", "- 1", "+1", " 8 ", "8;", "None", "True", "false", "[1, 2]", "{'a': 1}", "()",
)  # fmt: skip
WORDS = (
    "", "all", "frozen", "auto", "scan", "sgd", "\udcff", "a=b", "--x", "\n", "'", '"', "%s", "{}",
    "(" * 300, "[" * 300, "-" * 300, "__import__('os').getpid()", "\u56fe", "/", "..", "x" * 5000,
)  # fmt: skip
OTHER_NAMES = (
    "", ".", "..", "lr.", ".lr", "lr..base", "keys", "items", "lr.keys", "__class__", "lr.__dict__",
    "_fields", "data.path.x", "lr[0]", "lr['base']", "LR.base", "epoch", "task.x", "nbs.real", "lr",
    "no", "noremat", "data", "unlock", "get", "x" * 300, "\u56fe", "-", "=",
)  # fmt: skip


def overrides(rng: random.Random, names: list[str]) -> dict[str, str]:
    found = {}
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        name = rng.choice(names if rng.random() < 0.85 else OTHER_NAMES)
        if rng.random() < 0.1:  # a letter lost, or one too many
            at = rng.randrange(len(name) + 1)
            name = name[:at] + rng.choice(("", rng.choice(string.ascii_letters))) + name[at + 1 :]
        values = NUMBERS if rng.random() < 0.7 else WORDS
        found[name.replace("=", "")] = rng.choice(values)
    return found


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_overrides(file):
    rng = random.Random(f"{file.stem} {CASES}")
    names = [name for name, _ in config_files.fields(config_files.load(str(file)))]
    outcomes = Counter()
    for _ in range(CASES):
        given = overrides(rng, names)
        try:
            config = config_files.parse(str(file), given)
            configs.validate(config)
            if config.microbatch != "auto" and config.task != "completion":
                sizes = run._sizes(config, 1, 1000)
                assert 1 <= sizes.updates <= configs.MOST_UPDATES
        except (configs.ConfigError, GeometryError) as error:
            outcomes["refused"] += 1
            said = str(error)
            assert said and len(said) < 3000 + 2 * max(map(len, given.values())), given
            shown = [name.split(".")[0] for name in given if name]
            assert any(name in said for name in shown) or "" in given or "field" in said, given
        else:
            outcomes["valid"] += 1
            known = dict(config_files.fields(config))
            assert all(name in known for name in given), given
    print(f"\noverrides of {file.name}: {CASES} cases, {dict(outcomes)}")
    assert outcomes["refused"] > 0
