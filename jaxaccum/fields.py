"""Fields that configs of every task have, with their ranges, and what checks a config."""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Callable, Container, Mapping
from difflib import get_close_matches
from typing import Any, Literal, get_args

import jax
import ml_collections
from ml_collections import config_dict

from jaxaccum.accumulate.engine import GPUS
from jaxaccum.data.texts import shown
from jaxaccum.errors import UserError

# Fields that decide only how a run is computed, watched or stored, and places of what is known by
# its contents; all others, but for those that a task names, are the recipe.
NOT_LEARNED = (
    "init_from", "microbatch", "devices", "engine", "fsdp", "remat", "epochs", "log",
    "eval", "checkpoint", "max_skipped", "hours", "data.path", "data.on_error", "data.cache",
    "data.cache_gib", "data.workers", "data.prefetch",
)  # fmt: skip

# Fields of the recipe that came later. Where they hold this a run is what it was before, and its
# recipe does not name them: it has the fingerprint that it had, and may be continued.
LATER: Mapping[str, Any] = {
    "freeze": (0, ""), "data.fraction": (1.0,), "data.single_cls": (False,),
    "loss.one_to_many": (0.8,), "loss.one_to_many_final": (0.1,), "loss.class_weights": ("",),
    "augment.sizes": ("",),
}  # fmt: skip

DTYPES = {"float32": "float32", "tf32": "float32", "bfloat16": "bfloat16", "float64": "float64"}

# How activations are held, in the order in which they are tried: each needs less memory.
Remat = Literal["none", "blocks", "host"]
REMATS = get_args(Remat)

# Updates of a run at most: float32, in which schedules are computed, counts to 16.7 million.
MOST_UPDATES = 10_000_000
MOST_SAMPLES = 1_000_000  # of an effective batch, a microbatch or a group

Ranges = Mapping[str, tuple[float, float]]
GAIN = (0, 1e9)  # of a term of the loss

# The range of every number that configs of all tasks have.
RANGES: Ranges = {
    "nbs": (1, MOST_SAMPLES), "seed": (0, 2**31 - 1), "steps": (0, MOST_UPDATES),
    "epochs": (0, 1e7), "hours": (0, 1e5), "devices": (0, 1e6), "fsdp": (0, 1e6),
    "max_skipped": (1, 1e9),
    "optimizer.momentum": (0, 1), "optimizer.b2": (0, 1), "optimizer.weight_decay": (0, 1e9),
    "optimizer.clip": (0, 1e9),
    "lr.base": (0, 1e30), "lr.base_batch": (1, 1e9), "lr.final": (0, 1),
    "lr.warmup_epochs": (0, 1e9), "lr.warmup_bias": (0, 1e9), "lr.warmup_momentum": (0, 1),
    "ema.decay": (0, 1), "ema.ramp": (1e-9, 1e9),
    "data.cache_gib": (0, 1e6), "data.workers": (0, 1024), "data.prefetch": (0, 1000),
    "log.every": (-1, 1e9), "log.images": (0, 1000), "checkpoint.every": (-1, 1e9),
    "checkpoint.keep": (1, 1e6), "checkpoint.grace": (0, 1e6),
    "eval.every_epochs": (0, 1e7), "eval.patience": (0, 1e9), "checkpoint.every_epochs": (0, 1e7),
    "eval.every": (-1, 1e9), "eval.batch": (1, 65536), "eval.precise_bn": (0, 1e9),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Fields:
    """The config of a task.

    Attributes:
      defaults: makes a config with every field; the common ones by `recipe`, `geometry`, `run`.
      models: names that the field `model` may hold.
      ranges: of its own numbers. A number without a range is only required to be finite.
      words: what its own texts may be.
      not_learned: of its own fields, those that decide no update.
      free: of its own fields, those that hold numbers or words (`any_of`), or lists: only `check`
        knows what they may be.
      weight_files: fields that name files of weights -> what the recipe calls their contents. Where
        they lie is not learned.
      check: raises ConfigError for what these cannot say.
    """

    defaults: Callable[[], ml_collections.ConfigDict]
    models: Callable[[], list[str]]
    ranges: Ranges = dataclasses.field(default_factory=dict)
    words: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    not_learned: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    weight_files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    check: Callable[[ml_collections.ConfigDict], None] = lambda config: None


class ConfigError(UserError, ValueError):
    """A config that cannot be run; the message says which field and what would work."""


def of_earlier(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored config with what was named otherwise when it was stored under today's names."""
    stored = dict(stored)
    if isinstance(stored.get("remat"), bool):  # that was the field, beside `offload`
        blocks, host = stored["remat"], stored.pop("offload", False)
        stored["remat"] = "blocks" if blocks else "host" if host else "none"
    return stored


def any_of(value) -> config_dict.FieldReference:
    """A field that takes a number or a word, such as bn_group = 8 or "all"."""
    reference = config_dict.placeholder(object)
    reference.set(value)
    return reference


def recipe(c: ml_collections.ConfigDict) -> None:
    """Fields of the recipe that every task has."""
    c.nbs = 64  # effective batch: samples per update
    c.bn_group = any_of(8)  # samples that share batch statistics: a number, "all" or "frozen"
    c.epochs = 100.0  # passes over the data; or
    c.steps = 0  # updates, if not 0
    c.seed = 0
    c.init_from = ""  # weights to start from: a .pt, .pth, .safetensors or the workdir of a run
    # Modules that do not learn: "model.0,model.1", or 10 for a detector's first ten (its backbone).
    c.freeze = any_of(0)
    # Compute: "float32", "tf32" (float32 whose products may be rounded on the way, several times
    # as fast on GPUs), "bfloat16", or "auto": bfloat16 on GPUs and TPUs that compute in it, else
    # float32; a run keeps what it began with. Parameters and accumulators are always float32.
    c.dtype = "auto"
    c.optimizer = ml_collections.ConfigDict(
        {
            "name": "sgd",  # "sgd" (Nesterov), "adamw", "musgd" (SGD and Muon) or "auto"
            "momentum": 0.937,  # of SGD, or beta1 of AdamW
            "b2": 0.999,  # beta2 of AdamW
            "weight_decay": 5e-4,
            "weight_decay_scaling": "none",  # or "linear": times nbs / lr.base_batch
            "clip": 10.0,  # largest global norm of the gradient; 0 for none
        }
    )
    c.lr = ml_collections.ConfigDict(
        {
            "base": 0.01,
            "base_batch": 64,
            "scaling": "none",  # of base with nbs / base_batch: "none", "linear" or "sqrt"
            "final": 0.01,  # last, or smallest, learning rate over the peak
            "decay": "linear",  # or "cosine" or "exponential"
            "warmup_epochs": 3.0,
            "warmup_bias": 0.1,  # learning rate of biases at the start
            "warmup_momentum": 0.8,
        }
    )
    c.ema = ml_collections.ConfigDict({"decay": 0.9999, "ramp": 2000.0})  # decay 0: no average


def geometry(c: ml_collections.ConfigDict) -> None:
    """How it is computed. Changes nothing but seconds and bytes."""
    # Samples in one forward and backward pass on one device; "auto": planned for the device here.
    c.microbatch = any_of(8)
    c.devices = 0  # 0: all that JAX sees
    c.engine = "scan"  # or "multisteps"
    # Devices that divide parameters, optimizer and average among themselves; 0: all, 1: none.
    c.fsdp = 1
    # What of an update's activations is held: "none" are computed again; "blocks": what lies inside
    # of a block is, in the backward pass; "host": none are, but what a batch-norm group of several
    # microbatches keeps lies in the host's memory.
    c.remat = "none"


def run(c: ml_collections.ConfigDict) -> None:
    """What is watched and kept. `every` counts updates; 0: once per epoch, -1: never."""
    c.hours = 0.0  # stop after so many, saved, to be continued by the same command; 0: no limit
    c.max_skipped = 3  # windows in a row that may be skipped for a NaN or Inf
    c.log = ml_collections.ConfigDict(
        {
            "every": 10,
            "tensorboard": True,
            # The same to Weights & Biases or MLflow, whose packages are not installed by default.
            "wandb": False,
            "mlflow": False,
            "images": 4,
            "report": True,  # pictures/ and report.html in the workdir
            "noise_scale": False,  # estimate how large an effective batch would still help
        }
    )
    c.eval = ml_collections.ConfigDict(
        {
            "every": 0,
            "every_epochs": 0.0,  # the same in epochs, in place of `every`
            "patience": 0,  # evaluations in a row that may be no better before it ends; 0: any
            "batch": 16,
            "precise_bn": 0,  # training samples to recompute running statistics over; 0: off
        }
    )
    c.checkpoint = ml_collections.ConfigDict(
        {
            "every": 0,
            "every_epochs": 0.0,
            "keep": 2,
            "grace": 25.0,  # seconds that a signal to stop leaves to end an update and save it
        }
    )


def _validate_cadence(c: ml_collections.ConfigDict) -> None:
    for name in ("eval", "checkpoint"):
        if c[name].every and c[name].every_epochs:
            raise ConfigError(
                f"{name}.every is {c[name].every} updates and {name}.every_epochs "
                f"{c[name].every_epochs:g} epochs: leave one of them 0"
            )
    if c.eval.patience and c.eval.every < 0:
        raise ConfigError("eval.patience counts evaluations, and with eval.every=-1 there are none")


def validate(c: ml_collections.ConfigDict, own: Fields) -> None:
    """Checks what types cannot: words, ranges and names.

    Args:
      c: the config. own: of its task.
    Raises:
      ConfigError: names the field, what it holds and what it may hold.
    """
    ranges = {**RANGES, **own.ranges}
    _validate_types(c, own.defaults(), "", ranges, ("bn_group", "microbatch", "freeze", *own.free))
    _validate_cadence(c)
    words = {
        "dtype": (*DTYPES, "auto"),
        "engine": ("scan", "multisteps"),
        "remat": REMATS,
        "optimizer.name": ("sgd", "adamw", "musgd", "auto"),
        "optimizer.weight_decay_scaling": ("none", "linear"),
        "lr.scaling": ("none", "linear", "sqrt"),
        "lr.decay": ("linear", "cosine", *(["exponential"] if "decay_rate" in c.lr else [])),
        "data.on_error": ("raise", "skip"),
        "data.cache": ("ram", "none"),
        **own.words,
    }
    for field, allowed in words.items():
        if has(c, field) and get(c, field) not in allowed:
            raise ConfigError(f"{field} is one of {', '.join(allowed)}; got {get(c, field)!r}")
    for field, (low, high) in ranges.items():
        if has(c, field) and not low <= (value := get(c, field)) <= high:
            limits = f"in {low:g} to {high:g}"
            if high >= 1e4 and value < low:
                limits = f"at least {low:g}"
            elif high >= 1e4 and value > high:
                limits = f"at most {high:,.0f}"
            raise ConfigError(f"{field} is {limits}; got {shown(value)}")
    own.check(c)
    _validate_recipe(c)
    _validate_compat(c)
    known = own.models()
    if c.model not in known:
        close = get_close_matches(str(c.model), known, n=3, cutoff=0.3)
        raise ConfigError(
            f"model: there is no {c.model!r} for the task {c.task}: "
            + (f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(known)}")
        )


def multiples_of_stride(c: ml_collections.ConfigDict, *fields: str) -> None:
    """Raises ConfigError where a side of the input is no multiple of a detector's stride."""
    for field in fields:
        if get(c, field) % 32:
            below = get(c, field) // 32 * 32
            raise ConfigError(
                f"{field} is a multiple of 32, the coarsest stride; got {get(c, field)}: use "
                f"{below or 32} or {below + 32}"
            )


def _validate_recipe(c: ml_collections.ConfigDict) -> None:
    if c.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ConfigError("dtype float64 needs JAX_ENABLE_X64=1 in the environment")
    if c.eval.precise_bn and c.bn_group == "frozen":
        raise ConfigError("eval.precise_bn recomputes batch statistics; with bn_group frozen set 0")
    if c.microbatch != "auto" and not _is_batch(c.microbatch):
        raise ConfigError(
            f"microbatch is a positive integer, at most {MOST_SAMPLES:,}, or 'auto'; got "
            f"{shown(c.microbatch)}"
        )
    if c.bn_group not in ("all", "frozen") and not _is_batch(c.bn_group):
        raise ConfigError(
            f"bn_group is a positive integer, at most {MOST_SAMPLES:,}, 'all' or 'frozen'; got "
            f"{shown(c.bn_group)}"
        )
    if not isinstance(c.freeze, str) and not (type(c.freeze) is int and 0 <= c.freeze <= 1000):
        raise ConfigError(
            "freeze is a number of modules, 0 to 1000, or names with commas between them; got "
            f"{shown(c.freeze)}"
        )
    if not c.steps and not c.epochs:
        raise ConfigError("set epochs (passes over the data) or steps (updates)")


def _validate_compat(c: ml_collections.ConfigDict) -> None:
    if not is_compat(c):
        return
    if c.log.noise_scale:
        raise ConfigError("log.noise_scale is of the exact accumulation: not with compat")
    if c.microbatch == "auto":
        raise ConfigError(
            "with compat the microbatch is part of what is learned: give a number instead of auto"
        )
    if c.engine != "scan":
        raise ConfigError("compat runs on engine=scan only")


def _is_batch(value: Any) -> bool:
    return type(value) is int and 0 < value <= MOST_SAMPLES


def _validate_types(
    c: ml_collections.ConfigDict,
    defaults: ml_collections.ConfigDict,
    prefix: str,
    ranged: Container[str],
    free: Container[str],
) -> None:
    """Every field is there, of the type that its default has or `free`, and finite or `ranged`."""
    kinds: dict[type, tuple[Any, str]] = {
        bool: (bool, "true or false"), int: (numbers.Integral, "a whole number"),
        float: (numbers.Real, "a number"), str: (str, "a text"),
        ml_collections.ConfigDict: (ml_collections.ConfigDict, "a group of fields"),
    }  # fmt: skip
    for key, default in defaults.items():
        field = prefix + key
        if key not in c:
            raise ConfigError(f"{field} is missing: start from the defaults of jaxaccum.config")
        value = c[key]
        if field in free:
            continue
        if type(default) not in kinds:
            raise ConfigError(
                f"{field}: its default is {shown(default)}, which is no number, text or group of "
                "fields: name it in Fields.free, and check it there"
            )
        kind, words = kinds[type(default)]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{field} is {words}; got {shown(value)}")
        if isinstance(value, float) and not math.isfinite(value) and field not in ranged:
            raise ConfigError(f"{field} is a finite number; got {value}")
        if isinstance(value, str) and "\0" in value:
            raise ConfigError(f"{field} holds a NUL: {shown(value)}")
        if isinstance(default, ml_collections.ConfigDict):
            _validate_types(value, default, f"{field}.", ranged, free)


def dtype_of(c: ml_collections.ConfigDict) -> str:
    """`dtype`, and for "auto" what it is on the devices at hand."""
    return best_dtype(jax.local_devices()[0]) if c.dtype == "auto" else c.dtype


def best_dtype(device: Any) -> str:
    """bfloat16 on TPUs, and on GPUs whose matrix units have it (NVIDIA's since Ampere, 8.0)."""
    if device.platform == "tpu":
        return "bfloat16"
    if device.platform not in GPUS:
        return "float32"
    number = re.fullmatch(r"(\d+)\.\d+", str(getattr(device, "compute_capability", "")))
    return "bfloat16" if number is None or int(number[1]) >= 8 else "float32"


def is_compat(c: ml_collections.ConfigDict) -> bool:
    """Whether the usual accumulation is asked for, in a task that offers it."""
    return bool(c.get("compat", False))


def has(c: ml_collections.ConfigDict, field: str) -> bool:
    """Whether a config has a dotted field; tasks differ in theirs."""
    *parents, leaf = field.split(".")
    for part in parents:
        if part not in c:
            return False
        c = c[part]
    return leaf in c


def get(c: ml_collections.ConfigDict, field: str):
    """The value of a dotted field."""
    value = c
    for part in field.split("."):
        value = value[part]
    return value
