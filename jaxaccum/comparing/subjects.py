"""What is compared: the models that the configs name, and what they have in common."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from jaxaccum import config as configs
from jaxaccum import config_files, models, tasks
from jaxaccum.models import init
from jaxaccum.models.__main__ import gigaflops
from jaxaccum.training import optim, run
from jaxaccum.weights.initial import identities

# Fields that the comparison decides, and what decides them.
DECIDED = {
    "nbs": "set --nbs, for Phase 2, and --most, for Phase 1",
    "seed": "set --seeds",
    "microbatch": "the plan chooses it; set --memory and --most",
}


@dataclasses.dataclass(frozen=True)
class Model:
    """One of the models to compare.

    Attributes:
      name: in tables and file names.
      file: as --config of train takes it.
      overrides: fields of the config set for it, as text.
      config: with them.
      source: its training samples.
    """

    name: str
    file: str
    overrides: Mapping[str, str]
    config: ml_collections.ConfigDict
    source: tasks.Source

    @property
    def group(self) -> int:
        """What a microbatch must be a multiple of."""
        return 1 if self.config.bn_group == "frozen" else self.config.bn_group


def read_models(specs: Sequence[str], settings: Sequence[str]) -> list[Model]:
    """Loads the configs and opens their training data.

    Raises:
      ConfigError: one cannot be run, or they cannot be compared.
    """
    everywhere = {"lr.scaling": "linear"} | _pairs(settings, "--set")
    loaded = []
    for spec in specs:
        file, *changes = spec.split("@")
        # One device, unless more are asked for: the study's batch is what one holds.
        overrides = {"devices": "1"} | everywhere | _pairs(changes, spec)
        loaded.append((spec, file, overrides, load_config(file, overrides)))
    if not loaded:
        raise configs.ConfigError("--configs names no config")
    names = [config.model for *_, config in loaded]
    sources: dict[str, tasks.Source] = {}
    found: dict[str, Model] = {}
    for spec, file, overrides, config in loaded:
        _require_comparable(spec, config)
        name = config.model
        if names.count(name) > 1:
            name = re.sub(r"[^\w.]+", "-", f"{name}@{Path(spec).name}")
        if name in found:
            raise configs.ConfigError(f"--configs names {spec} twice")
        place = json.dumps(config.data.to_dict(), sort_keys=True)
        if place not in sources:
            sources[place] = run.open_source(config, "train")
            for line in sources[place].report.lines():
                print(line)
        found[name] = Model(name, file, overrides, config, sources[place])
    return list(found.values())


def _require_comparable(spec: str, config: ml_collections.ConfigDict) -> None:
    configs.validate(config)
    if config.model not in models.names("detection"):
        raise configs.ConfigError(
            f"{spec}: compare is for detection, by mAP50-95; the task is {config.task}"
        )
    if configs.is_compat(config):
        raise configs.ConfigError(f"{spec}: with compat the geometry changes what is learned")
    if config.bn_group == "all":
        raise configs.ConfigError(
            f"{spec}: bn_group=all makes every effective batch one microbatch; set a number that "
            "every model's memory holds, such as bn_group=4, or frozen"
        )
    if config.steps:
        raise configs.ConfigError(
            f"{spec}: steps={config.steps} counts updates, so that a larger batch would see more "
            "images: set steps=0 and epochs, here or by --set=steps=0,epochs=N"
        )
    if config.eval.every < 0 or config.log.every < 0:
        raise configs.ConfigError(f"{spec}: the report needs eval.every and log.every, not -1")


def _pairs(texts: Sequence[str], where: str) -> dict[str, str]:
    """{"key": "value"} of "key=value" texts."""
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise configs.ConfigError(f"{where}: {text!r} is not key=value, as in epochs=10")
        if key in DECIDED:
            raise configs.ConfigError(f"{where}: {key} is not set by hand: {DECIDED[key]}")
        pairs[key] = value
    return pairs


def load_config(file: str, overrides: Mapping[str, str]) -> ml_collections.ConfigDict:
    """The config that `train --config=FILE --config.key=value ...` would train.

    Raises:
      ConfigError: there is no such file or field, or it does not take the value.
    """
    try:
        return config_files.parse(file, overrides)
    except configs.ConfigError as error:
        raise configs.ConfigError(f"{file}: {error}") from None


def as_flags(overrides: Mapping[str, Any]) -> list[str]:
    return [f"--config.{key}={value}" for key, value in overrides.items()]


def prepare(config: ml_collections.ConfigDict, source: tasks.Source) -> run.Run:
    """What train derives from a config."""
    config, _ = run.settled(config, source)
    identity = {"identity": source.identity, "samples": len(source), **identities(config)}
    return run.prepare(config, names=source.names, samples=len(source), identity=identity)


def rule(model: Model) -> str:
    """How the learning rate follows the effective batch, in words."""
    lr = optim.resolve(model.config, len(model.source.names), 1).lr
    return {
        "none": f"{lr.base:g} at every effective batch",
        "linear": f"{lr.base:g} * (effective batch) / {lr.base_batch}",
        "sqrt": f"{lr.base:g} * sqrt((effective batch) / {lr.base_batch})",
    }[lr.scaling] + f" (lr.scaling={lr.scaling}, lr.base, lr.base_batch)"


def describe(model: Model) -> dict[str, Any]:
    """Parameters and operations, as `python -m jaxaccum.models` counts them, for these classes
    and this image size."""
    size = model.config.data.image_size
    network = models.create(model.config.model, num_classes=len(model.source.names))

    def images(side):
        return jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)

    shapes = jax.eval_shape(lambda x: network.init(jax.random.key(0), x), images(64))
    return {
        "parameters": init.count(shapes["params"]),
        "gflops": gigaflops(network, images(size)),
        "strides": list(network.strides),
        "bn_group": model.config.bn_group,
    }
