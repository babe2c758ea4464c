"""Configs: every file loads, fields are checked, mistakes are answered with what would work."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from unittest import mock

import pytest
from absl import flags
from ml_collections import config_flags

from jaxaccum import config as configs

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_is_valid(path):
    configs.validate(load(path).get_config())


@pytest.mark.parametrize("scale", "nsmlx")
def test_family_argument(scale):
    module = load(next(p for p in CONFIGS if p.stem == f"yolo_{scale}"))
    assert module.get_config().model == f"yolov8-{scale}"
    for family in ("v8-p2", "11", "12", "11-p2", "12-p2", "v12-turbo"):
        config = module.get_config(family)
        assert config.model == f"yolo{family}-{scale}"
        configs.validate(config)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("engine", "loop", "scan, multisteps"), ("lr.scaling", "square", "none, linear, sqrt"),
        ("nbs", 0, "nbs is at least 1"), ("bn_group", "some", "'all' or 'frozen'"),
        ("bn_group", 2.5, "positive integer"), ("microbatch", 0, "positive integer"),
        ("model", "yolov8-w", "did you mean"), ("devices", -1, "at least 0"),
        ("optimizer.name", "adam", "sgd, adamw, musgd, auto"),
        ("optimizer.momentum", 3.0, "in 0 to 1"), ("data.image_size", 100, "use 96 or 128"),
        ("dtype", "float64", "JAX_ENABLE_X64"), ("eval.conf", 2.0, "in 0 to 1"),
    ],
)  # fmt: skip
def test_what_types_cannot_check(field, value, message):
    config = configs.detection()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(configs.ConfigError, match=message) as error:
        configs.validate(config)
    assert field.split(".")[0] in str(error.value)


def parse(*arguments):
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
    argv = ["program", f"--config={CONFIGS[-1].parent / 'yolo_s.py'}", *arguments]
    with mock.patch.object(sys, "argv", argv):  # where ml_collections looks for overrides
        values(argv)
    return holder.value


def test_overrides_of_fields_that_take_numbers_or_words():
    assert parse("--config.bn_group=4").bn_group == 4
    assert parse("--config.bn_group=all").bn_group == "all"
    assert parse("--config.bn_group=frozen").bn_group == "frozen"
    assert parse("--config.microbatch=2").microbatch == 2


def test_a_mistyped_field_suggests_the_right_one():
    with pytest.raises(Exception, match=r'(?s)Did you mean.*"microbatch"'):
        parse("--config.microbach=2")


def test_a_mistyped_value_is_refused():
    with pytest.raises(flags.Error, match="nbs"):
        parse("--config.nbs=many")


def test_a_benchmark_that_does_not_exist():
    """What a config file says of its argument is shown without a traceback."""
    import subprocess
    import sys
    from pathlib import Path

    done = subprocess.run(
        [sys.executable, "-m", "jaxaccum.train", "--config=configs/adapointr.py:shapenet"],
        capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: no benchmark 'shapenet'; there are pcn, ")
    assert "Traceback" not in done.stderr
