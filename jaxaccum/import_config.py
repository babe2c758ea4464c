"""python -m jaxaccum.import_config --from=args.yaml [--out=configs/mine.py]

Turns the args.yaml of an Ultralytics run, or a YAML config of PoinTr or AdaPoinTr, into a config
file that trains the same recipe, and says what of it has no counterpart here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from jaxaccum import config as configs
from jaxaccum import config_files, models
from jaxaccum.config import ConfigError
from jaxaccum.data import texts
from jaxaccum.models.families import has_one_to_one

# Ultralytics' name -> our field, where the value means the same.
_SAME = {
    "epochs": "epochs", "imgsz": "data.image_size", "data": "data.path", "seed": "seed",
    "single_cls": "data.single_cls", "fraction": "data.fraction",
    "patience": "eval.patience", "lr0": "lr.base", "lrf": "lr.final",
    "momentum": "optimizer.momentum", "weight_decay": "optimizer.weight_decay",
    "warmup_epochs": "lr.warmup_epochs", "warmup_momentum": "lr.warmup_momentum",
    "warmup_bias_lr": "lr.warmup_bias", "box": "loss.box", "cls": "loss.cls", "dfl": "loss.dfl",
    "close_mosaic": "augment.close_mosaic", "iou": "eval.iou", "max_det": "eval.max_det",
    **{name: f"augment.{name}" for name in (
        "hsv_h", "hsv_s", "hsv_v", "degrees", "translate", "scale", "shear", "perspective",
        "flipud", "fliplr", "mosaic", "mixup",
    )},
}  # fmt: skip
_OPTIMIZERS = {"auto": "auto", "sgd": "sgd", "adamw": "adamw", "musgd": "musgd"}
# What decides nothing that is learned, or is said by other means here.
_MEANS_NOTHING = {
    "task", "mode", "exist_ok", "verbose", "deterministic", "save", "val", "plots", "profile",
    "show", "save_frames", "save_txt", "save_conf", "save_crop", "show_labels", "show_conf",
    "show_boxes", "line_width", "format", "keras", "optimize", "int8", "dynamic", "simplify",
    "opset", "workspace", "nms", "tracker", "save_dir", "cfg", "source", "vid_stride",
    "stream_buffer", "visualize", "augment", "agnostic_nms", "classes", "retina_masks", "embed",
    "save_json", "save_hybrid", "half", "dnn", "project", "name", "device", "workers", "cache",
    "split", "conf", "copy_paste_mode", "auto_augment", "erasing",
    "overlap_mask", "mask_ratio", "pose", "kobj", "amp", "compile",
}  # fmt: skip
_TELLS = {  # what is worth a word, though it changes no field
    "device": "devices=0 uses all that JAX sees",
    "amp": "dtype 'auto' stands for it: bfloat16 on devices that compute in it",
    "workers": "samples are made by threads; data.workers sets processes",
}


@dataclasses.dataclass
class Imported:
    """A config on its way.

    Attributes:
      made: the config's maker, "detection" or "completion". title: of the file.
      fields: our field -> (value, remark or "").
      without: what has no counterpart, in words.
    """

    made: str
    title: str
    fields: dict[str, tuple[Any, str]] = dataclasses.field(default_factory=dict)
    without: list[str] = dataclasses.field(default_factory=list)

    def config(self) -> Any:
        """The config.

        Raises:
          ConfigError: a value cannot be.
        """
        config = getattr(configs, self.made)()
        known = dict(config_files.fields(config))
        for name, (value, _) in self.fields.items():
            if isinstance(known[name], float) and isinstance(value, int):
                value = float(value)
            try:
                config.update_from_flattened_dict({name: value})
            except (TypeError, ValueError):
                kind = type(known[name]).__name__
                raise ConfigError(
                    f"{self.title}: {name} would be {value!r}, expected a value like "
                    f"{known[name]!r} ({kind})"
                ) from None
        configs.validate(config)
        return config

    def text(self) -> str:
        """A config file."""
        config = self.config()
        known = dict(config_files.fields(config))
        lines = [f'"""{self.title}."""', "", "from jaxaccum import config as defaults", "", ""]
        lines += ["def get_config():", f"    config = defaults.{self.made}()"]
        for name, (_, remark) in self.fields.items():
            note = f"  # {remark}" if remark else ""
            value = known[name]
            shown = json.dumps(value) if isinstance(value, str) else repr(value)
            lines.append(f"    config.{name} = {shown}{note}")
        for one in self.without:
            lines.append(f"    # no counterpart: {one}")
        return "\n".join([*lines, "    return config", ""])


def imported(file: Path) -> Imported:
    """What a file of another trainer means here.

    Raises:
      DataError: it cannot be read, or is not valid YAML.
      ConfigError: it is of neither, or a value cannot be.
    """
    shown = texts.shown_path(file)
    content = texts.read_yaml(file, typed=True)
    if isinstance(content, Mapping) and {"imgsz", "lr0"} & set(content):
        return _of_ultralytics(content, file)
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        return _of_pointr(content, file)
    raise ConfigError(
        f"{shown}: expected the args.yaml of an Ultralytics run (imgsz, lr0, ...) or a config of "
        "PoinTr (model, optimizer, dataset, ...)"
    )


def _number(given: Mapping[str, Any], name: str, default: float, file: Path) -> float:
    value = given.get(name, default)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{texts.shown_path(file)}: {name} is a number; got {value!r}")
    return value


def _of_ultralytics(given: Mapping[str, Any], file: Path) -> Imported:
    if (task := given.get("task", "detect")) not in ("detect", None):
        raise ConfigError(f"{texts.shown_path(file)}: its task is {task!r}, and here is 'detect'")
    found = Imported("detection", f"From {file.name}, a run of Ultralytics")
    _model(found, str(given.get("model") or ""), given.get("pretrained"), file)
    batch, nominal = (int(_number(given, k, d, file)) for k, d in (("batch", 16), ("nbs", 64)))
    if batch < 1:
        found.without.append(f"batch={batch}, found by trial there: taken as 16; see microbatch")
        batch = 16
    steps = max(round(nominal / batch), 1)
    told = f"batch {batch} x {steps}"
    if batch * steps != nominal:
        told += f", though nbs is {nominal}"
    devices = str(given.get("device") or "").strip(",").split(",")
    on_one = max(batch // len(devices), 1)
    found.fields |= {
        "nbs": (batch * steps, told),
        "bn_group": (on_one, "as there, a batch on one device; a smaller one needs less memory"),
        "microbatch": (on_one, ""),
        "lr.base_batch": (nominal, ""),
        "optimizer.weight_decay_scaling": ("linear", "as there"),
    }
    for name, field in _SAME.items():
        if given.get(name) is not None:
            found.fields[field] = (given[name], "")
    if given.get("cos_lr"):
        found.fields["lr.decay"] = ("cosine", "")
    optimizer = str(given.get("optimizer") or "auto")
    if optimizer.lower() in _OPTIMIZERS:
        found.fields["optimizer.name"] = (_OPTIMIZERS[optimizer.lower()], "")
    else:
        found.fields["optimizer.name"] = ("adamw", "")
        found.without.append(f"optimizer={optimizer}: adamw in its place")
    if (period := _number(given, "save_period", -1, file)) > 0:
        found.fields["checkpoint.every_epochs"] = (float(period), "")
    if freeze := given.get("freeze"):
        if isinstance(freeze, list):
            freeze = ",".join(f"model.{number}" for number in freeze)
        found.fields["freeze"] = (freeze, "batch norm there by the running statistics")
    if around := given.get("multi_scale"):
        share = 0.5 if around is True else _number(given, "multi_scale", 0.0, file)
        side = int(_number(given, "imgsz", 640, file))
        sides = {32 * max(round(side * (1 + share * t) / 32), 1) for t in (-1, -0.5, 0, 0.5, 1)}
        if len(sides) > 1:
            text = ",".join(map(str, sorted(sides)))
            found.fields["augment.sizes"] = (text, "there any multiple of 32 between the ends")
    if hours := given.get("time"):
        found.fields["hours"] = (hours, "ends there; that trainer makes its schedule shorter")
    two_branches = has_one_to_one(str(found.fields.get("model", ("",))[0]))
    if given.get("end2end") and two_branches:
        found.fields["eval.end_to_end"] = (True, "")
    if given.get("amp") is False:
        found.fields["dtype"] = ("float32", "amp is off there")
    if given.get("val") is False:
        found.fields["eval.every"] = (-1, "")
        found.fields.pop("eval.patience", None)
    for name, value in given.items():
        if name in _TELLS and value not in (None, "", False):
            found.without.append(f"{name}={value}: {_TELLS[name]}")
        taken = {*_SAME, *_MEANS_NOTHING, "model", "pretrained", "batch", "nbs", "cos_lr",
                 "optimizer", "save_period", "freeze", "time", "multi_scale"}  # fmt: skip
        if two_branches:
            taken.add("end2end")
        if name not in taken and value not in (None, False, 0, 0.0, "", "default"):
            found.without.append(f"{name}={value}")
    return found


def _model(found: Imported, model: str, pretrained: Any, file: Path) -> None:
    """The model, and the weights it starts from: yolo11n.pt, yolov8s-p2.yaml, runs/x/best.pt."""
    stem = Path(model).stem
    names = {name.replace("-", ""): name for name in models.names("detection")}
    plain = stem.replace("-", "").replace("_", "")
    # There the scale comes before p2: yolov8n-p2 is our yolov8-p2-n.
    for scale in "nsmlx":
        if plain.endswith(f"{scale}p2"):
            plain = f"{plain[:-3]}p2{scale}"
    if plain not in names:
        found.without.append(
            f"model={model}: its architecture is not in its name; give it with --config.model=..., "
            "see python -m jaxaccum.models"
        )
    else:
        found.fields["model"] = (names[plain], "")
    own = model if model.endswith(".pt") else ""
    weights = pretrained if isinstance(pretrained, str) else own
    if weights and pretrained is not False:
        found.fields["init_from"] = (weights, "as there; nothing is downloaded")


_BENCHMARKS = {
    "pcn": "pcn", "shapenet55": "shapenet55", "shapenet34": "shapenet34",
    "projectedshapenet55noise": "projected_shapenet55",
    "projectedshapenet34noise": "projected_shapenet34",
}  # fmt: skip


def _of_pointr(given: Mapping[str, Any], file: Path) -> Imported:
    name = str(given["model"].get("NAME", ""))
    if name not in ("AdaPoinTr", "PoinTr"):
        raise ConfigError(
            f"{texts.shown_path(file)}: its model is {name or 'not named'}; here are AdaPoinTr and "
            "PoinTr"
        )

    def inner(*keys: str) -> Any:
        value: Any = given
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    base = Path(str(inner("dataset", "train", "_base_") or "")).stem
    benchmark = _BENCHMARKS.get("".join(c for c in base.lower() if c.isalnum()))
    spec = f"{name.lower()}:{benchmark}" if benchmark else name.lower()
    start, plain = config_files.load(spec), configs.completion()
    found = Imported("completion", f"From {file.name}, a config of {name} ({spec} here)")
    was = dict(config_files.fields(plain))
    found.fields = {
        key: (value, "") for key, value in config_files.fields(start) if value != was.get(key)
    }
    if not benchmark:
        found.without.append(f"dataset {base or 'not named'}: give --config.data.path=...")
    steps = int(_number(given, "step_per_update", 1, file))
    batch = inner("total_bs") or inner("dataset", "train", "others", "bs")
    if isinstance(batch, int) and not isinstance(batch, bool) and batch > 0:
        found.fields["nbs"] = (batch * steps, f"total_bs {batch} x step_per_update {steps}")
        found.fields["lr.base_batch"] = (batch * steps, "")
    else:
        found.without.append("no total_bs in it: nbs is that of the published recipe")
    values = {
        "lr.base": inner("optimizer", "kwargs", "lr"),
        "optimizer.weight_decay": inner("optimizer", "kwargs", "weight_decay"),
        "epochs": inner("max_epoch"), "lr.decay_rate": inner("scheduler", "kwargs", "lr_decay"),
        "lr.decay_epochs": inner("scheduler", "kwargs", "decay_step"),
        "lr.final": inner("scheduler", "kwargs", "lowest_decay"),
        "optimizer.clip": inner("grad_norm_clip"),
    }  # fmt: skip
    for field, value in values.items():
        if field in was and isinstance(value, int | float) and not isinstance(value, bool):
            found.fields[field] = (value, "")
    kind = inner("optimizer", "type")
    if kind not in (None, "AdamW"):
        found.without.append(f"optimizer {kind}: AdamW in its place")
    if (accumulated := inner("gradient_accumulation_steps")) not in (None, 1):
        found.without.append(
            f"gradient_accumulation_steps={accumulated}: it divides the loss there and accumulates "
            "nothing; choose nbs and microbatch"
        )
    return found


if __name__ == "__main__":
    from jaxaccum import command_line

    _FROM = flags.DEFINE_string("from", None, "args.yaml, or a YAML of PoinTr", required=True)
    _OUT = flags.DEFINE_string("out", "", "the config file to write; printed if not given")

    def main() -> int:
        found = imported(Path(_FROM.value or ""))
        text = found.text()
        if not _OUT.value:
            print(text, end="")
            return 0
        out = Path(_OUT.value)
        if out.exists():
            raise ConfigError(f"{texts.shown_path(out)} is there already: give another --out")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
        for one in found.without:
            print(f"no counterpart: {one}")
        print(f"python -m jaxaccum.train --config={out} --workdir=runs/{out.stem}")
        return 0

    command_line.run_verb(
        main,
        __doc__,
        (
            ("import_config --from=args.yaml --out=mine.py", "of a run of Ultralytics"),
            ("import_config --from=cfgs/PCN_models/AdaPoinTr.yaml", "of PoinTr, to look at"),
        ),
    )
