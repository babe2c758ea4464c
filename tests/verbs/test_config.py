"""Configs: every file loads, fields are checked, mistakes are answered with what would work."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from jaxaccum import config as configs
from jaxaccum import config_files, fields, tasks
from jaxaccum.training import optim

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.py"))


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_is_valid(path):
    configs.validate(load(path).get_config())


@pytest.mark.parametrize(
    ("spec", "model", "nbs", "rate"),
    [
        ("guides/p2_heads", "yolov8-m", 16, 0.01),
        ("guides/p2_heads:11-p2-m", "yolo11-p2-m", 16, 0.01),
        ("guides/kitti_memory", "yolov12-3d-s", 64, 0.01),
        ("guides/kitti_memory:8", "yolov12-3d-s", 8, 0.00125),
        ("guides/text_completion", "adapointr-projected", 48, 1e-4),
        ("guides/text_completion:96", "adapointr-projected", 96, 1.41421e-4),
    ],
)  # fmt: skip
def test_the_guides_recipes(spec, model, nbs, rate):
    config = config_files.load(spec)
    assert (config.model, config.nbs) == (model, nbs)
    assert optim.scaled_lr(config.lr, config.nbs) == pytest.approx(rate, rel=1e-5)
    if "p2" in spec:  # with the 6 of its largest network: the guide's 0.00375
        assert optim.scaled_lr(config.lr, 6) == pytest.approx(0.00375)
    with pytest.raises(configs.ConfigError, match=r"there is no|no effective batch"):
        configs.validate(config_files.load(f"{spec.partition(':')[0]}:7"))


@pytest.mark.parametrize(
    ("spec", "model", "nbs", "epochs", "rate", "decay"),
    [
        ("coco", "yolov8-n", 128, 500, 0.01, 1e-3), ("coco:11", "yolo11-n", 128, 600, 0.01, 1e-3),
        ("coco:12", "yolo12-n", 256, 600, 0.01, 2e-3),
        ("coco:26", "yolo26-n", 128, 245, 0.01, 1e-3),
        ("kitti", "yolov12-3d-n", 64, 100, 0.01, 5e-4),
        ("kitti:s-original", "yolov12-3d-s", 64, 100, 0.01, 5e-4),
        ("pcn", "adapointr-pcn", 16, 600, 1e-4, 5e-4),
        ("pcn:pointr", "pointr-pcn", 48, 300, 5e-4, 5e-4),
        ("shapenet", "adapointr-shapenet", 48, 600, 1e-4, 5e-4),
        ("shapenet:adapointr-34", "adapointr-shapenet", 48, 600, 1e-4, 5e-4),
        ("shapenet:pointr-55", "pointr-shapenet", 96, 200, 5e-4, 5e-4),
        ("shapenet:pointr-34", "pointr-shapenet", 128, 200, 5e-4, 5e-4),
    ],
)  # fmt: skip
def test_published_recipes(spec, model, nbs, epochs, rate, decay):
    config = config_files.load(f"repro/{spec}")
    configs.validate(config)
    assert (config.model, config.nbs, config.epochs) == (model, nbs, epochs)
    assert optim.scaled_lr(config.lr, config.nbs) == rate
    scaled = config.optimizer.weight_decay_scaling == "linear"
    share = config.nbs / config.lr.base_batch if scaled else 1
    assert config.optimizer.weight_decay * share == pytest.approx(decay)
    assert config.get("compat", False) == spec.endswith("original")
    with pytest.raises(configs.ConfigError, match="no recipe"):
        config_files.load(f"repro/{spec.partition(':')[0]}:n-7")


@pytest.mark.parametrize("scale", "nsmlx")
def test_family_argument(scale):
    module = load(next(p for p in CONFIGS if p.stem == f"yolo_{scale}"))
    assert module.get_config().model == f"yolov8-{scale}"
    for family in ("v8-p2", "11", "12", "26", "11-p2", "12-p2", "26-p2", "v12-turbo"):
        config = module.get_config(family)
        assert config.model == f"yolo{family}-{scale}"
        configs.validate(config)
        assert config_files.load(f"yolo:{family}-{scale}") == config


@pytest.mark.parametrize("recipe", ["", "-original"])
def test_scale_of_3d(recipe):
    named = config_files.load(f"yolo3d_n:{recipe[1:]}")
    assert config_files.load(f"yolo3d:n{recipe}") == named
    larger = config_files.load(f"yolo3d:x{recipe}")
    configs.validate(larger)
    larger.model = named.model
    assert larger == named
    with pytest.raises(configs.ConfigError, match="no recipe 'published'"):
        config_files.load("yolo3d:n-published")


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


def parse(**overrides):
    return config_files.parse(str(CONFIGS[-1].parent / "yolo_s.py"), overrides)


def test_overrides_of_fields_that_take_numbers_or_words():
    assert parse(bn_group=4).bn_group == 4
    assert parse(bn_group="all").bn_group == "all"
    assert parse(bn_group="frozen").bn_group == "frozen"
    assert parse(microbatch=2).microbatch == 2


def test_a_mistyped_field_suggests_the_right_one():
    with pytest.raises(configs.ConfigError, match='Did you mean "microbatch"'):
        parse(microbach=2)


def test_a_mistyped_value_is_refused():
    with pytest.raises(configs.ConfigError, match="nbs"):
        parse(nbs="many")


@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_number_has_a_range(task):
    """Those that had none took nan, and billions."""
    for field, value in config_files.fields(configs.defaults(task)):
        if type(value) in (int, float) and field not in ("bn_group", "microbatch", "freeze"):
            assert field in configs.ranges(task), field


@pytest.mark.parametrize(
    ("task", "field"), [(task, field) for task in tasks.TASKS for field in configs.ranges(task)]
)
def test_numbers_that_are_none_or_out_of_reason(task, field):
    for value in (float("nan"), float("inf"), -float("inf"), 1e31, -2, 10**300):
        config = configs.defaults(task)
        with config.ignore_type():
            config.update_from_flattened_dict({field: value})
        with pytest.raises(configs.ConfigError, match=field.replace(".", r"\.")) as error:
            configs.validate(config)
        assert len(str(error.value)) < 200


# What is of the field's type, or is made so by the config itself.
FITTING = [("lr.base", True), ("model", "8"), ("data.path", "8")]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field, value)
        for field in ("nbs", "lr.base", "model", "remat", "lr", "data.path")
        for value in (None, "8", [8], {"a": 1}, True, b"8")
        if (field, value) not in FITTING
    ],
    ids=repr,
)
def test_values_of_another_type(field, value):
    config = configs.detection()
    with config.ignore_type():
        config.update_from_flattened_dict({field: value})
    with pytest.raises(configs.ConfigError, match=field):
        configs.validate(config)


@pytest.mark.parametrize(
    ("stored", "now"),
    [
        ({"remat": True, "offload": False}, "blocks"), ({"remat": False, "offload": True}, "host"),
        ({"remat": False}, "none"), ({"remat": "host"}, "host"),
    ],
)  # fmt: skip
def test_a_config_that_was_stored_earlier(stored, now):
    kept = dict(stored)
    assert fields.of_earlier(stored | {"nbs": 8}) == {"remat": now, "nbs": 8} and stored == kept


def test_a_field_that_is_missing():
    config = configs.detection()
    del config.lr["base"]
    with pytest.raises(configs.ConfigError, match=r"lr\.base is missing"):
        configs.validate(config)


def test_a_path_with_a_nul():
    config = configs.detection()
    config.data.path = "a\0b"
    with pytest.raises(configs.ConfigError, match=r"data\.path holds a NUL"):
        configs.validate(config)


def test_a_benchmark_that_does_not_exist():
    """What a config file says of its argument is shown without a traceback."""
    import subprocess
    import sys
    from pathlib import Path

    done = subprocess.run(
        [sys.executable, "-m", "jaxaccum.train", "--config=configs/adapointr.py:shapenet"],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: no benchmark 'shapenet'; there are pcn, ")
    assert "Traceback" not in done.stderr
