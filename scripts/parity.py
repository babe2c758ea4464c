"""Runs reference fixtures against our models and losses.

python scripts/parity.py PATH... [--x64] takes fixtures and folders of them, prints a line per
fixture and ends with "N passed, M failed"; exit status 1 if any failed or none ran. The format:
NAME.json (facts) with NAME.npz (numbers) for a model whose weights follow from its state-dict keys,
or loss_NAME.npz for a loss on given head outputs. Facts with `points` are of a completion network.

One rule judges every value: it is within 1e-4 of the fixture, or within four times the distance
between our float32 and our float64 run, which is what rounding does to this network. The float64
run is made where the first half does not do (or with --x64), and the line says what it decided.
Where one float32 run does not do either, two more tell, every weight in them off by half of its
last bit: the same network to float32. Of a network that decides by comparisons up to eight do: a
decision that rounding turns moves its gradients by jumps, in one run of several.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import re
import sys
import time
import types
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxaccum import models
from jaxaccum.accumulate import Groups, batchnorm
from jaxaccum.losses import boxes3d as losses3d
from jaxaccum.losses import detection
from jaxaccum.losses.chamfer import chamfer_l1, chamfer_l2
from jaxaccum.machine import known_answers
from jaxaccum.models import blocks, boxes3d, completion, init, points, yolo
from jaxaccum.tasks.detection import DetectionTask
from jaxaccum.weights import transfer as weights

Numbers = dict[str, np.ndarray]

TOLERANCE = 1e-4
ROUNDINGS = 4
MORE_RUNS = 2
MOST_RUNS = 8  # while nothing is beyond the rule but what moves by jumps (below)
# Rounding excuses a value only if it is that of float32: as far as the fixture is from our float64
# run, or as another float64 run with every weight off by float32's resolution, give or take some
# factor. Half precision is thousands of times as far, and would excuse itself.
COARSE = 100
# A completion network decides some 10^5 times: which neighbours are nearest, which is the largest,
# on which side of its kink an activation is. Decisions that rounding can turn (float32 leaves
# 1e-6 after the encoder) change these values by jumps, in one run and not in another: no measure
# of how coarse our rounding is. In float64, other weights by 1e-6 to 3e-6 of each change the
# gradients of the fixtures of pointr-shapenet55 and adapointr-projected by up to 7e-4 (norms, root
# mean square), 5e-3 (one norm), 4e-3 (probes) and 4e-2 (one probe), and so far are the fixtures
# from our float64. Of pointr-pcn with seed 2 such weights change the median norm by 1.1e-4, sixty
# times as much as weights by 6e-8 do, and float32 by 2.1e-4.
JUMPS = re.compile("eval_(coarse|fine)(_sorted)?|grad_(norm_median|(norm|probe)_(rms|max))")
RISK = 2e-6  # share of the squared coordinates: below, float32 may take either neighbour


class UnknownFamily(Exception):
    """A fixture of a family that is not built yet; the message says which."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One value of a fixture, and which half of the rule decided.

    Attributes:
      error: of our float32 run, relative to the fixture as the value's measure has it.
      rounding: from our float32 to our float64 run, in the same measure; None without the latter.
      exact: of our float64 run, as `error`.
      grain: what weights off by float32's resolution do to our float64 run; None if not asked.
      jumps: decisions that rounding can turn move it, so it says nothing of coarseness.
    """

    error: float
    rounding: float | None = None
    exact: float | None = None
    grain: float | None = None
    jumps: bool = False

    @property
    def close(self) -> bool:
        """Within 1e-4 of the fixture."""
        return self.error <= TOLERANCE

    @property
    def coarse(self) -> bool:
        """Our rounding is far more than the fixture's, so not that of float32."""
        if self.rounding is None or self.exact is None or self.jumps:
            return False
        return self.rounding > COARSE * max(self.exact, self.grain or 0.0)

    @property
    def passed(self) -> bool:
        if self.close or self.rounding is None:
            return self.close
        finite = np.isfinite(self.error) and np.isfinite(self.rounding)
        return bool(finite and self.error <= ROUNDINGS * self.rounding and not self.coarse)

    def __str__(self) -> str:
        if self.close or self.rounding is None:
            return f"{self.error:.1e}"
        text = f"{self.error:.1e} against {ROUNDINGS} x {self.rounding:.1e}"
        far = f"float64 {self.exact:.1e} from the fixture"
        return f"{text} ({far}{', so not rounding of float32' if self.coarse else ''})"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The verdicts on a fixture by the name of the value, and notes for people."""

    verdicts: Mapping[str, Verdict]
    notes: tuple[str, ...] = ()

    @property
    def beyond(self) -> list[str]:
        """What neither half of the rule allows."""
        return [name for name, verdict in self.verdicts.items() if not verdict.passed]

    @property
    def passed(self) -> bool:
        return bool(self.verdicts) and not self.beyond

    def __str__(self) -> str:
        parts: dict[str, list[str]] = {}
        for name, verdict in self.verdicts.items():
            half = "within rounding" if verdict.passed else "BEYOND"
            parts.setdefault("within 1e-4" if verdict.close else half, []).append(
                f"{name} {verdict}"
            )
        order = ("BEYOND", "within rounding", "within 1e-4")
        return "; ".join(
            [f"{half}: {', '.join(parts[half])}" for half in order if half in parts]
            + list(self.notes)
        )


class Fixture:
    """Facts and numbers of the reference, and how to compute and compare ours.

    Attributes:
      facts: of the json; {} of a loss. data: the numbers by name.
    """

    def __init__(self, facts: Mapping[str, Any], data: Mapping[str, Any]):
        self.facts, self.data = facts, data
        self.notes: list[str] = []
        self.jitter = 0.0  # relative, of every weight
        self.draw = 0  # which one

    # Numbers that a network is given.
    GIVEN = re.compile(
        "seed|target_seed|partial|denoise_noise|boxes|scores|strides|image_hw"
        "|(target_)?(batch_idx|cls|bboxes)|target_(location_3d|dimensions_3d|rotation_y)"
        "|(boxes|scores)_(o2m|o2o)|epoch_epochs"
    )

    def state(self) -> Numbers:
        """The weights by the rule, and off by `jitter` of each."""
        rng = np.random.default_rng(self.draw)
        return {
            key: self.weight(key, shape).astype(np.float32)
            * (1 + self.jitter * rng.standard_normal(shape))
            for key, shape in self.facts["state"].items()
        }

    def weight(self, key: str, shape: list[int]) -> np.ndarray:
        """The weight of that key."""
        return rule_weight(key, shape)

    def numbers(self, dtype: Any) -> Numbers:
        """Ours by the fixture's names, and `decisions`, which rounding can turn."""
        raise NotImplementedError

    def distances(self, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
        """By the name of the value; relative to the fixture's sizes, whatever is compared."""
        raise NotImplementedError

    def jumps(self, a: Numbers, b: Numbers) -> set[str]:
        """Values that decisions move which are not the same in a and b."""
        if np.array_equal(a["decisions"], b["decisions"]):
            return set()
        return {name for name in self.distances(a, b) if not name.startswith(("eval", "train"))}

    def compare(self, x64: bool = False) -> Comparison:
        """By the rule; `x64`: with a float64 run even if none is needed."""
        with quick_compiler():
            single = self.numbers(jnp.float32)
            errors = self.distances(single, self.data)
            left = sorted(k for k in set(self.data) - set(single) if not self.GIVEN.fullmatch(k))
            rest = [f"not judged: {', '.join(left)}"] if left else []
            if not x64 and all(error <= TOLERANCE for error in errors.values()):
                verdicts = {name: Verdict(error) for name, error in errors.items()}
                return Comparison(verdicts, tuple(rest))
            with jax.enable_x64(True):
                double = self.numbers(jnp.float64)
            roundings = self.distances(single, double)
            exact = self.distances(double, self.data)
            jumps = self.jumps(single, double)
            if jumps and not self.notes:
                self.notes.append("float32 and float64 decide differently")
            verdicts = {
                name: Verdict(error, roundings[name], exact[name], jumps=name in jumps)
                for name, error in errors.items()
            }
            if any(not verdict.close and verdict.coarse for verdict in verdicts.values()):
                # Or the fixture is nearer to float64 than float32 can be.
                with jax.enable_x64(True):
                    grains = self.distances(double, self.jittered(jnp.float64, 0))
                verdicts = {
                    name: dataclasses.replace(verdict, grain=grains[name])
                    for name, verdict in verdicts.items()
                }
            if self.facts and not all(verdict.passed for verdict in verdicts.values()):
                # One run shows one rounding of many. Where a network decides by comparisons, so few
                # jumps make the distance that another run has several times as many.
                draw = 0
                while draw < MORE_RUNS or (
                    draw < MOST_RUNS and _only_jumps(v for v in verdicts.values() if not v.passed)
                ):
                    draw += 1
                    again = self.distances(self.jittered(jnp.float32, draw), double)
                    roundings = {k: max(v, again[k]) for k, v in roundings.items()}
                    verdicts = {
                        name: dataclasses.replace(verdict, rounding=roundings[name])
                        for name, verdict in verdicts.items()
                    }
                self.notes.append(f"rounding is the largest of {1 + draw} float32 runs")
        return Comparison(verdicts, (*self.notes, *rest))

    def jittered(self, dtype: Any, draw: int) -> Numbers:
        """Ours, every weight off by what float32 cannot tell."""
        self.jitter, self.draw = float(np.finfo(np.float32).eps) / 2, draw
        try:
            return self.numbers(dtype)
        finally:
            self.jitter, self.draw = 0.0, 0


def _only_jumps(verdicts: Iterable[Verdict]) -> bool:
    """Whether there are any, and all are of values that move by jumps."""
    beyond = list(verdicts)
    return bool(beyond) and all(verdict.jumps for verdict in beyond)


def distance(ours, theirs, scale=None, how: Callable = np.max) -> float:
    """`how` of |ours - theirs|, relative to `scale` or else to the largest of theirs."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"shape {ours.shape}, the fixture has {theirs.shape}")
    if not theirs.size:
        return 0.0
    base = np.maximum(np.abs(theirs).max() if scale is None else scale, 1e-12)
    error = float(how(np.abs(ours - theirs) / base))
    return error if np.isfinite(error) else float("inf")


def rms(values) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(values))))


@contextlib.contextmanager
def quick_compiler() -> Iterator[None]:
    """Compiles with little effort, which halves the time of a check: most of it is compiling.

    Matrix products are whole: a GPU would round to tf32. Programs of earlier checks are dropped
    before they reach the number of memory maps that Linux allows a process, 65530.
    """
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > 30_000:
        jax.clear_caches()
    jax.config.update(name, True)
    try:
        with jax.default_matmul_precision("highest"):
            yield
    finally:
        jax.config.update(name, before)


_UNITS = (blocks.Conv, nn.Conv)
_within: list[bool] = []


@functools.partial(jax.jit, static_argnums=(0, 1))
def _unit(module, size, variables, x, weight):
    groups = None if size is None else Groups(size, weight)
    _within.append(True)
    try:
        inputs = (x,) if isinstance(module, nn.Conv) else (x, groups)
        return module.apply(variables, *inputs, mutable=["moments"])
    finally:
        _within.pop()


def _by_units(call, args, kwargs, context):
    module = context.module
    if type(module) not in _UNITS or context.method_name != "__call__" or _within:
        return call(*args, **kwargs)
    groups = args[1] if len(args) > 1 else None
    variables = {k: module.variables[k] for k in ("params", "batch_stats") if k in module.variables}
    y, written = _unit(
        module.clone(parent=None, name=None), groups and groups.size, variables, args[0],
        groups and groups.weight,
    )  # fmt: skip
    for collection, values in written.items():
        for name, value in values.items():
            module.scope.put_variable(collection, name, value)
    return y


def by_units() -> Any:
    """Inside, a detector's convolutions are programs of their own, each compiled once.

    A network as one program takes minutes to compile; its layers repeat, and so do other networks'.
    """
    return nn.intercept_methods(_by_units)


def require_tensors(
    facts: Mapping[str, Any], needed: Mapping[str, tuple[int, ...]], fixed: Sequence[str] = ()
) -> None:
    """A fixture's weights and statistics are those of the model, no more and no fewer.

    Args:
      facts: of the fixture.
      needed: shape of every parameter and statistic of the model by key. fixed: keys of what the
        reference holds beside them.
    Raises:
      ValueError: with the keys of which that is not so.
    """
    state = {key: tuple(shape) for key, shape in facts["state"].items()}
    stats = {key for key in needed if "running_" in key}
    counts = {re.sub("running_var$", "num_batches_tracked", key) for key in stats}
    listed = set(facts.get("stat_names", stats))
    every = {*needed, *fixed}
    wrong = {
        "weights that only the model has": every - set(state),
        "weights that only the fixture has": set(state) - every - counts,
        "weights of another shape": {k for k, s in needed.items() if state.get(k, s) != s},
        "statistics that only the model has": stats - listed,
        "statistics that only the fixture has": listed - stats,
    }
    if any(wrong.values()):
        raise ValueError("; ".join(
            f"{what}: {', '.join(sorted(keys)[:4])}" + (f" and {more} more" if more > 0 else "")
            for what, keys in wrong.items() if keys for more in [len(keys) - 4]
        ))  # fmt: skip


def rule_weight(key: str, shape: list[int]) -> np.ndarray:
    """The weight that both sides make from a state-dict key."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape)
    if key.endswith("dfl.conv.weight"):
        return np.arange(16.0).reshape(shape)
    if key.endswith("running_mean"):
        return 0.1 * rng.standard_normal(shape)
    if key.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape)
    if key.endswith("gamma"):
        return rng.uniform(0.1, 0.5, shape)
    if len(shape) >= 2:
        return rng.standard_normal(shape) * np.sqrt(0.8 / np.prod(shape[1:]))
    if key.endswith("weight"):
        return rng.uniform(0.5, 1.5, shape)
    return 0.1 * rng.standard_normal(shape)


def padded_targets(batch_idx, cls, bboxes, samples: int, height: int, width: int):
    """Flat reference targets (image, class, xywh in 0..1) as padded pixel boxes."""
    counts = [int(np.sum(batch_idx == i)) for i in range(samples)]
    room = max(*counts, 1)
    boxes = np.zeros((samples, room, 4), np.float32)
    classes = np.zeros((samples, room), np.int32)
    valid = np.zeros((samples, room), bool)
    size = np.asarray([width, height, width, height], np.float32)
    for i in range(samples):
        rows = np.asarray(bboxes, np.float32)[batch_idx == i] * size
        n = len(rows)
        boxes[i, :n] = np.concatenate(
            [rows[:, :2] - rows[:, 2:] / 2, rows[:, :2] + rows[:, 2:] / 2], axis=1
        )
        classes[i, :n], valid[i, :n] = cls[batch_idx == i], True
    return detection.Targets(boxes, classes, valid, np.ones(samples, np.float32))


def padded_boxes3d(data, batch_idx) -> losses3d.Targets3D:
    """Flat 3D targets as padded ones, in the order of `padded_targets`."""
    room = max(*(int(np.sum(batch_idx == i)) for i in range(2)), 1)
    values = {}
    for name, shape in (("location_3d", (3,)), ("dimensions_3d", (3,)), ("rotation_y", ())):
        values[name] = np.zeros((2, room, *shape), np.float32)
        for i in range(2):
            rows = data[f"target_{name}"].reshape(-1, *shape)[batch_idx == i]
            values[name][i, : len(rows)] = rows
    return losses3d.Targets3D(*values.values(), np.ones(2), np.zeros((2, 3, 4)))


def loss_of(predictions, anchors, targets, enlarge_small=True, targets3d=None):
    """Sum of the terms with gains over the clamped denominators, and everything else.

    With 3D targets, by the published rule of YOLOv12-3D; its last three items are parts of others.
    """
    numerators, denominators, assignment = detection.detection_loss(
        predictions, anchors, targets, enlarge_small
    )
    total = denominators[detection.TARGET_SCORES]
    items = jnp.stack([t.gain * numerators[t.name] for t in detection.terms()])
    items = items / jnp.maximum(total, 1)
    if targets3d is not None:

        def axes(metres):
            more, denominators = losses3d.boxes3d_loss(
                predictions.boxes3d, assignment, targets3d, boxes3d.ORIGINAL, 0, metres, True
            )
            gained, _ = losses3d.terms(200.0, 0.05, 1.0, published=True)
            return jnp.stack([
                t.gain * more[t.name] / jnp.maximum(denominators.get(t.denominator, total), 1)
                for t in gained
            ])  # fmt: skip

        parts = jax.lax.stop_gradient(axes(0.0)[:3])
        items = jnp.concatenate([items, axes(0.02), parts])
    return jnp.sum(items), (items, total, assignment)


class LossFixture(Fixture):
    """A loss on given head outputs."""

    def numbers(self, dtype) -> Numbers:
        data = self.data
        height, width = (int(v) for v in data["image_hw"])
        anchors = yolo.anchors(height, width, tuple(int(s) for s in data["strides"]))
        predictions = yolo.Predictions(
            *(jnp.asarray(np.swapaxes(data[k], 1, 2), dtype) for k in ("boxes", "scores"))
        )
        targets = padded_targets(
            data["batch_idx"], data["cls"], data["bboxes"], len(data["boxes"]), height, width
        )
        (_, (items, total, assignment)), gradient = jax.jit(
            jax.value_and_grad(lambda p: loss_of(p, anchors, targets), has_aux=True)
        )(predictions)
        return {
            "loss_box_cls_dfl": np.asarray(items),
            "target_scores_sum": np.asarray(total),
            "foreground": np.asarray(assignment.foreground),
            "grad_boxes": np.swapaxes(gradient.boxes, 1, 2),
            "grad_scores": np.swapaxes(gradient.scores, 1, 2),
            "decisions": decisions_of(assignment),
        }

    def distances(self, ours, theirs) -> dict[str, float]:
        fixed = self.data
        sizes = {
            "loss_box_cls_dfl": np.abs(fixed["loss_box_cls_dfl"]),
            "target_scores_sum": max(fixed["target_scores_sum"], 1),
            "foreground": 1.0,
            "grad_boxes": np.abs(fixed["grad_boxes"]).max(),
            "grad_scores": np.abs(fixed["grad_scores"]).max(),
        }
        names = {"loss_box_cls_dfl": "loss", "target_scores_sum": "target_scores"}
        # Of the foreground the number of anchors.
        return {
            names.get(k, k): distance(
                ours[k], theirs[k], size, np.sum if k == "foreground" else np.max
            )
            for k, size in sizes.items()
        }


def channels_first(a: Any, step: int) -> np.ndarray:
    """(N, C, every step-th anchor), of (N, A, C)."""
    return np.swapaxes(a, 1, 2)[..., ::step]


def decisions_of(assignment: detection.Assignment) -> np.ndarray:
    """(N, A) the object that each anchor is to predict, -1 for none."""
    return np.where(assignment.foreground, assignment.object, -1)


@functools.partial(jax.jit, static_argnums=(1, 3))
def _detector_loss(out, strides, targets, enlarge_small, targets3d):
    return loss_of(out, yolo.anchors(128, 128, strides), targets, enlarge_small, targets3d)


class DetectorFixture(Fixture):
    """A whole detector: evaluation, training forward, loss, gradients, statistics."""

    def network(self, dtype) -> tuple[yolo.Yolo, Any, Any, Numbers]:
        """Model, parameters and statistics, and how many parameters there are."""
        facts = self.facts
        model = models.create(facts["variant"], num_classes=facts["nc"], dtype=dtype)
        example = jax.ShapeDtypeStruct((1, 64, 64, 3), dtype)
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, dtype),
            jax.eval_shape(lambda x: model.init(jax.random.key(0), x), example),
        )
        trees = shapes["params"], shapes["batch_stats"]
        family, _ = yolo.parse(facts["variant"])
        bins = family.bins if family.bins > 1 else 0  # fixed weights of the reference
        fixed = [f"model.{len(family.rows) - 1}.dfl.conv.weight"] if bins else []
        require_tensors(
            facts, weights.reference_shapes(trees[0]) | weights.reference_shapes(trees[1]), fixed
        )
        params, stats = weights.from_reference(self.state(), *trees)
        return model, params, stats, {"parameters": np.asarray(init.count(params) + bins)}

    def images(self, dtype, offset, *shape) -> jax.Array:
        """Images (N, H, W, 3) that follow from the seed."""
        values = np.random.default_rng(int(self.data["seed"]) + offset).random(shape, np.float32)
        return jnp.asarray(np.transpose(values, (0, 2, 3, 1)), dtype)

    def numbers(self, dtype) -> Numbers:
        facts, data = self.facts, self.data
        model, params, stats, found = self.network(dtype)
        images = self.images(dtype, 1, 1, 3, 64, 96)
        with by_units():
            out = model.apply({"params": params, "batch_stats": stats}, images)
        boxes, scores = yolo.decode(out, yolo.anchors(64, 96, model.strides))
        channels = [(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2], scores]
        if out.boxes3d is not None:
            boxes_3d = boxes3d.decode(out.boxes3d, boxes3d.ORIGINAL)
            channels += [boxes_3d.locations, boxes_3d.sizes, boxes_3d.yaw[..., None]]
        found["eval_decoded"] = channels_first(np.concatenate(channels, axis=-1), 3)
        found["eval_boxes"] = channels_first(out.boxes, 3)
        found["eval_scores"] = channels_first(out.scores, 3)

        images = self.images(dtype, 2, 2, 3, 128, 128)
        # Fixtures of the older trainer name their targets so, and know no enlarged small objects.
        older = "target_cls" in data
        flat = (data[f"target_{k}" if older else k] for k in ("batch_idx", "cls", "bboxes"))
        batch_idx, cls, bboxes = flat
        targets = padded_targets(batch_idx, cls.ravel(), bboxes, 2, 128, 128)
        # Fixtures of the 2D network beside it hold these targets, too.
        targets3d = padded_boxes3d(data, batch_idx) if out.boxes3d is not None else None
        groups = Groups(2, jnp.ones(2, dtype))

        def train_loss(params):
            with by_units():
                out, moments = model.apply(
                    {"params": params, "batch_stats": stats}, images, groups, mutable=["moments"]
                )
            loss, aux = _detector_loss(out, model.strides, targets, not older, targets3d)
            return 2 * loss, (out, moments["moments"], aux)

        (total, (out, moments, (items, _, assignment))), gradient = jax.value_and_grad(
            train_loss, has_aux=True
        )(params)
        moved = weights.to_reference(batchnorm.move_statistics(stats, moments, 0.03))
        names = facts.get("stat_names", ())
        return found | gradient_numbers(gradient, facts) | {
            "train_boxes": channels_first(out.boxes, 7),
            "train_scores": channels_first(out.scores, 7),
            "loss_total_times_batch": np.asarray(total),
            "loss_items": np.asarray(items),
            "loss_vector": 2 * np.asarray(items),
            "stat_norm": np.asarray([np.linalg.norm(moved[k]) for k in names]),
            "decisions": decisions_of(assignment),
        }  # fmt: skip

    def distances(self, ours, theirs) -> dict[str, float]:
        fixed = self.data
        total = np.asarray(theirs.get("parameters", self.facts["parameters"]))
        found = {"parameters": distance(ours["parameters"], total, 1e-12)}

        def add(name, key, part=(), **options):
            if key in fixed:
                scale = np.abs(fixed[key][part]).max()
                found[name] = distance(
                    ours[key][part], theirs[key][part], **{"scale": scale, **options}
                )

        if np.shape(ours["eval_decoded"]) != np.shape(theirs["eval_decoded"]):
            raise ValueError(f"eval_decoded: {np.shape(ours['eval_decoded'])} here, "
                             f"{np.shape(theirs['eval_decoded'])} in the fixture")  # fmt: skip
        add("eval_boxes", "eval_boxes")
        add("eval_scores", "eval_scores")
        classes = 4 + self.facts["nc"]
        add("eval_decoded_boxes", "eval_decoded", np.s_[:, :4])
        add("eval_decoded_scores", "eval_decoded", np.s_[:, 4:classes])
        more = np.shape(fixed["eval_decoded"])[1] - classes
        for i, name in enumerate(("x", "y", "z", "height", "width", "length", "heading")[:more]):
            add(f"eval_decoded_{name}", "eval_decoded", np.s_[:, classes + i])
        for key in ("train_boxes", "train_scores"):
            add(f"{key}_max", key)
            add(f"{key}_rms", key, how=rms)
        add("loss_total", "loss_total_times_batch")
        add("loss", "loss_items", scale=np.abs(fixed["loss_items"]))
        if "loss_vector" in fixed:
            add("loss_vector", "loss_vector", scale=np.abs(fixed["loss_vector"]))
        found |= gradient_distances(fixed, ours, theirs)
        if "stat_norm" in fixed:
            add("stat_norm", "stat_norm", scale=fixed["stat_norm"])
        return found


BRANCHES = ("o2m", "o2o")  # one-to-many and one-to-one, in names of arrays


def branch_weights(epoch: int, epochs: int) -> tuple[float, float]:
    """Weights of one-to-many and of one-to-one in an epoch, as a run has them by default."""
    task = DetectionTask(models.create("yolo26-n", num_classes=1), 32)
    schedule: Any = types.SimpleNamespace(epoch=lambda count: count, epochs=epochs)
    weights_ = task.weights(schedule)
    many, one = (weights_[name](epoch) for name in (detection.ONE_TO_MANY, detection.ONE_TO_ONE))
    return many, one


def loss_of_two(predictions, anchors, targets, shares):
    """Samples times the sum of both branches' items by their shares, and everything else."""
    numerators, denominators, assigned = detection.loss_of_two(predictions, anchors, targets)
    values = [
        t.gain * numerators[t.name] / jnp.maximum(denominators[t.denominator], 1)
        for t in detection.terms_of_two()
    ]
    many, one = jnp.stack(values[:3]), jnp.stack(values[3:])
    vector = len(targets.weight) * (shares[0] * many + shares[1] * one)
    found = {"loss_items_o2m": many, "loss_items_o2o": one, "loss_vector": vector}
    for branch, own, total in zip(BRANCHES, assigned, denominators.values(), strict=True):
        found[f"target_sum_{branch}"] = total
        found[f"target_weight_{branch}"] = own.score
        found[f"target_gt_{branch}"] = jnp.where(own.score > 0, own.object, -1)
    return jnp.sum(vector), found


@functools.partial(jax.jit, static_argnums=(1, 2))
def _loss_of_two(out, strides, size, targets, shares):
    return loss_of_two(out, yolo.anchors(*size, strides), targets, shares)


def end_to_end(out, anchors, most: int, agnostic: bool = False) -> np.ndarray:
    """(N, most, 6): corners, score, class of what the one-to-one branch finds."""
    boxes, scores, classes = yolo.surest(out, anchors, most, agnostic)
    return np.concatenate([boxes, scores[..., None], classes[..., None]], axis=-1)


def loss_of_two_distances(fixed, ours, theirs) -> dict[str, float]:
    """Of what `loss_of_two` finds."""
    found = {}
    for name in ("loss_items_o2m", "loss_items_o2o", "loss_vector", "branch_weights"):
        found[name] = distance(ours[name], theirs[name], np.abs(fixed[name]))
    for branch in BRANCHES:
        total, weight, object_ = (f"target_{k}_{branch}" for k in ("sum", "weight", "gt"))
        found[total] = distance(ours[total], theirs[total], max(fixed[total], 1))
        found[weight] = distance(ours[weight], theirs[weight], 1.0)
        other = np.asarray(ours[object_]) != np.asarray(theirs[object_])
        found[object_] = float(np.sum(other))  # anchors
    return found


def two_of(data, dtype) -> yolo.Predictions:
    """Given outputs of both branches."""
    many, one = (
        yolo.Predictions(
            *(jnp.asarray(np.swapaxes(data[f"{k}_{branch}"], 1, 2), dtype)
              for k in ("boxes", "scores"))
        )
        for branch in BRANCHES
    )  # fmt: skip
    return many._replace(one_to_one=one)


class TwoBranchLossFixture(Fixture):
    """The loss of both branches on given outputs, and what the second finds in its own."""

    def numbers(self, dtype) -> Numbers:
        data = self.data
        size = tuple(int(v) for v in data["image_hw"])
        strides = tuple(int(s) for s in data["strides"])
        out = two_of(data, dtype)
        targets = padded_targets(
            data["batch_idx"], data["cls"], data["bboxes"], len(data["boxes_o2m"]), *size
        )
        shares = branch_weights(*(int(v) for v in data["epoch_epochs"]))
        (_, found), gradient = jax.value_and_grad(_loss_of_two, has_aux=True)(
            out, strides, size, targets, shares
        )
        found = {k: np.asarray(v) for k, v in found.items()}
        for branch, own in zip(BRANCHES, (gradient, gradient.one_to_one), strict=True):
            found[f"grad_boxes_{branch}"] = np.swapaxes(own.boxes, 1, 2)
            found[f"grad_scores_{branch}"] = np.swapaxes(own.scores, 1, 2)
        return found | {
            "branch_weights": np.asarray(shares),
            "e2e_max50": end_to_end(out, yolo.anchors(*size, strides), 50),
            "decisions": np.stack([found[f"target_gt_{branch}"] for branch in BRANCHES]),
        }

    def distances(self, ours, theirs) -> dict[str, float]:
        found = loss_of_two_distances(self.data, ours, theirs)
        parts = {"boxes": np.s_[..., :4], "scores": np.s_[..., 4], "classes": np.s_[..., 5]}
        for name, part in parts.items():
            found[f"e2e_{name}"] = distance(ours["e2e_max50"][part], theirs["e2e_max50"][part])
        for key in (f"grad_{k}_{branch}" for k in ("boxes", "scores") for branch in BRANCHES):
            found[key] = distance(ours[key], theirs[key], np.abs(self.data[key]).max())
        return found


class TwoBranchFixture(DetectorFixture):
    """A whole detector whose head has both branches."""

    FOUND: ClassVar[dict[str, tuple[int, bool]]] = {
        "eval_e2e": (300, False),
        "eval_e2e_max20": (20, False),
        "eval_e2e_max20_agnostic": (20, True),
    }

    def weight(self, key, shape):
        shifted = re.search(r"cv2\.\d+\.2\.bias$", key)  # sides of boxes: else they have no size
        return (2 if shifted else 0) + rule_weight(key, shape)

    def numbers(self, dtype) -> Numbers:
        facts, data = self.facts, self.data
        model, params, stats, found = self.network(dtype)
        images = self.images(dtype, 1, 1, 3, 64, 96)
        with by_units():
            out = model.apply({"params": params, "batch_stats": stats}, images)
        anchors = yolo.anchors(64, 96, model.strides)
        boxes, scores = yolo.decode(out, anchors)
        middle, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
        found["eval_decoded_o2m"] = channels_first(np.concatenate([middle, size, scores], -1), 3)
        for key, (most, agnostic) in self.FOUND.items():
            found[key] = end_to_end(out, anchors, most, agnostic)
        images, groups = self.images(dtype, 2, 2, 3, 128, 128), Groups(2, jnp.ones(2, dtype))
        targets = padded_targets(data["batch_idx"], data["cls"], data["bboxes"], 2, 128, 128)
        shares = branch_weights(0, 100)

        def train_loss(params):
            with by_units():
                out, moments = model.apply(
                    {"params": params, "batch_stats": stats}, images, groups, mutable=["moments"]
                )
            loss, values = _loss_of_two(out, model.strides, (128, 128), targets, shares)
            return loss, (out, moments["moments"], values)

        (_, (trained, moments, values)), gradient = jax.value_and_grad(train_loss, has_aux=True)(
            params
        )
        for stage, made, step in (("eval", out, 3), ("train", trained, 7)):
            for branch, own in zip(BRANCHES, (made, made.one_to_one), strict=True):
                found[f"{stage}_boxes_{branch}"] = channels_first(own.boxes, step)
                found[f"{stage}_scores_{branch}"] = channels_first(own.scores, step)
        moved = weights.to_reference(batchnorm.move_statistics(stats, moments, 0.03))
        values = {k: np.asarray(v) for k, v in values.items()}
        return found | gradient_numbers(gradient, facts) | values | {
            "branch_weights": np.asarray(shares),
            "stat_norm": np.asarray([np.linalg.norm(moved[k]) for k in facts["stat_names"]]),
            "decisions": np.stack([values[f"target_gt_{branch}"] for branch in BRANCHES]),
        }  # fmt: skip

    def distances(self, ours, theirs) -> dict[str, float]:
        fixed = self.data
        total = np.asarray(theirs.get("parameters", self.facts["parameters"]))
        found = {"parameters": distance(ours["parameters"], total, 1e-12)}
        for name, part in (("boxes", np.s_[:, :4]), ("scores", np.s_[:, 4:])):
            a, b = (values["eval_decoded_o2m"][part] for values in (ours, theirs))
            scale = np.abs(fixed["eval_decoded_o2m"][part]).max()
            found[f"eval_decoded_{name}"] = distance(a, b, scale)
        for key in (f"{k}_{branch}" for k in ("boxes", "scores") for branch in BRANCHES):
            size = np.abs(fixed[f"eval_{key}"]).max()
            found[f"eval_{key}"] = distance(ours[f"eval_{key}"], theirs[f"eval_{key}"], size)
            name = f"train_{key}"
            for word, how in (("max", np.max), ("rms", rms)):
                scale = np.abs(fixed[name]).max()
                found[f"{name}_{word}"] = distance(ours[name], theirs[name], scale, how)
        for key in self.FOUND:
            found[f"{key}_scores"] = distance(ours[key][..., 4], theirs[key][..., 4])
            found[f"{key}_rows"] = rows_apart(ours[key], theirs[key])
        found |= loss_of_two_distances(fixed, ours, theirs)
        found["stat_norm"] = distance(ours["stat_norm"], theirs["stat_norm"], fixed["stat_norm"])
        return found | gradient_distances(fixed, ours, theirs)


def rows_apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """How far each row of theirs is from the nearest of ours of its class and image, at most.

    By the corners, relative to the largest of theirs. Scores lie close, so rows may change places,
    and the last may be others: those that are no surer than that are not asked for.
    """
    far, size = 0.0, np.abs(theirs[..., :4]).max()
    for own, other in zip(np.asarray(ours), np.asarray(theirs), strict=True):
        sure = other[other[:, 4] > (1 + TOLERANCE) * other[-1, 4]]
        if not len(sure):
            raise ValueError("all rows have one score: there is nothing to compare")
        apart = np.abs(sure[:, None, :4] - own[None, :, :4]).max(-1) / size
        apart = np.where(sure[:, None, 5] == own[None, :, 5], apart, np.inf)
        far = max(far, float(apart.min(1).max()))
    return far


def gradient_numbers(gradient, facts) -> Numbers:
    """Norms and probes of all gradients that the reference has; ours of the others are zero."""
    gradient = weights.to_reference(jax.tree.map(np.float64, gradient))
    names = facts["grad_names"]
    extra = {k for k, g in gradient.items() if k not in names and np.any(g)}
    if missing := extra | (set(names) - set(gradient)):
        raise ValueError(f"gradients on one side only: {sorted(missing)[:4]}")

    def probe(key):
        rng = np.random.default_rng(zlib.crc32(f"{key}#probe".encode()))
        return np.sum(gradient[key] * rng.standard_normal(gradient[key].shape))

    return {
        "grad_norm": np.asarray([np.linalg.norm(gradient[k]) for k in names]),
        "grad_probe": np.asarray([probe(k) for k in names]),
    }


def gradient_distances(fixed, ours, theirs, median: bool = False) -> dict[str, float]:
    """Of norms and probes, each relative to the norm of its parameter's gradient."""
    # A probe is a dot product with unit normals: its natural size is the gradient's norm. Some
    # gradients are zero by symmetry (a bias in front of a batch norm, or of keys) and float32 noise
    # in the fixture, 1e-7 of the largest: those are compared with 1e-4 of the largest.
    largest = fixed["grad_norm"].max()
    size = np.where(fixed["grad_norm"] < 5e-7 * largest, 1e-4 * largest, fixed["grad_norm"])
    measures: dict[str, Callable] = {"rms": rms, "max": np.max}
    found = {}
    if median:
        found["grad_norm_median"] = distance(
            ours["grad_norm"], theirs["grad_norm"], size, np.median
        )
    for key in ("grad_norm", "grad_probe"):
        for name, how in measures.items():
            found[f"{key}_{name}"] = distance(ours[key], theirs[key], size, how)
    return found


class Turned:
    """Neighbours in a network, some turned: the k-th given up for the next.

    While entered, `points.nearest` does so in the order of calls.

    Attributes:
      turned: by call, (B, Q) which queries.
      limit: only those of less risk.
      risks: of the calls made, (B, Q) by how much the next is farther, as a share of the squared
        coordinates; float32 decides right from some 1e-6 on.
    """

    def __init__(self, turned: Sequence[jax.Array] | None = None, limit: float = float("inf")):
        self.turned, self.limit = turned, limit
        self.risks: list[jax.Array] = []

    def __enter__(self):
        self._nearest = points.nearest
        points.nearest = self.nearest
        return self

    def __exit__(self, *_):
        points.nearest = self._nearest

    def nearest(self, query, cloud, k):
        """`points.nearest`, but for the turned."""
        found = self._nearest(query, cloud, k + 1)
        near = points.gather(cloud, found[..., k - 1 :])
        squares = jnp.sum(jnp.square(query[:, :, None] - near), axis=-1)
        size = jnp.sum(jnp.square(query), axis=-1) + jnp.sum(jnp.square(near[..., 0, :]), axis=-1)
        self.risks.append((squares[..., 1] - squares[..., 0]) / size)
        if self.turned is None:
            return found[..., :k]
        turned = self.turned[len(self.risks) - 1]
        # In training there are more queries, the jittered ones, at the end.
        turned = jnp.pad(turned, ((0, 0), (0, query.shape[1] - turned.shape[1])))
        turned &= self.risks[-1] < self.limit
        last = jnp.where(turned, found[..., k], found[..., k - 1])
        return jnp.concatenate([found[..., : k - 1], last[..., None]], axis=-1)


def aligned(clouds: completion.Clouds, coarse: np.ndarray, table: completion.Table):
    """Coarse and fine points of ours, in the fixture's order of queries.

    Queries come in the order of a ranking: those that are ranked alike may change places.
    """
    ours, fine = (np.array(c, np.float64) for c in (clouds.coarse, clouds.fine))
    queries, spread = table.queries, table.queries * table.points_per_query
    for i in range(len(ours)):
        order = np.arange(queries)
        difference = np.abs(ours[i, :queries] - coarse[i, :queries]).max(axis=-1)
        away = np.flatnonzero(difference > TOLERANCE * np.abs(coarse).max())
        if 0 < len(away) <= queries // 50:
            between = np.abs(ours[i, away][None] - coarse[i, away][:, None]).max(axis=-1)
            order[away] = away[between.argmin(axis=1)]
        ours[i, :queries] = ours[i, order]
        fine[i, :spread] = fine[i, :spread].reshape(queries, -1, 3)[order].reshape(-1, 3)
    return ours, fine


@dataclasses.dataclass
class CompletionFixture:
    """A fixture of a completion network, and our network with its weights."""

    facts: dict[str, Any]
    data: Any
    dtype: Any
    state: Numbers | None = None

    def __post_init__(self):
        facts, data = self.facts, self.data
        shapes = {k: np.broadcast_to(np.float32(0), s) for k, s in facts["state"].items()}
        near = weights.fitting_models(weights.Weights(shapes))
        if not near:
            key = "base_model.coarse_pred.2.weight"
            raise ValueError(f"no model we know has the fixture's {key}: "
                             f"{facts['state'].get(key, 'missing')}")  # fmt: skip
        found = [n for n, fit in near if fit == 1]
        require_tensors(facts, weights.shapes((found or [near[0][0]])[0]))
        # The configurations of Projected-ShapeNet differ from others in no tensor.
        words = f"{facts.get('variant', '')} {facts.get('config', '')}".lower()
        names = [n for n in found if ("projected" in n) == ("projected" in words)] or found
        if len(names) != 1:
            raise ValueError(f"models with these tensors: {names}")
        self.model = models.create(names[0], dtype=self.dtype)
        if self.model.num_points != facts["points"]:
            raise ValueError(f"{names[0]} has {self.model.num_points} points, the fixture "
                             f"{facts['points']}")  # fmt: skip
        state = self.state or Fixture(facts, data).state()
        initial = completion.initialise(self.model, 0, np.dtype(self.dtype))
        self.params, self.stats = weights.from_reference(state, *initial)
        rng = np.random.default_rng(int(data["seed"]) + 1)
        partial = rng.uniform(-0.5, 0.5, (2, self.model.num_input, 3)).astype(np.float32)
        if not np.array_equal(partial, data["partial"]):
            raise ValueError("the input does not follow from the seed")
        self.partial = jnp.asarray(partial, self.dtype)
        target = rng.uniform(-0.5, 0.5, (2, facts["points"], 3)).astype(np.float32)
        self.target = jnp.asarray(target, self.dtype)
        self.noise = None
        if self.model.denoise_points:
            self.noise = jnp.asarray(data["denoise_noise"], self.dtype)

    @functools.cached_property
    def _evaluate(self):
        def evaluate(params, stats, turned):
            with Turned(turned) as decisions:
                variables = {"params": params, "batch_stats": stats}
                return self.model.apply(variables, self.partial), decisions.risks

        return jax.jit(evaluate)

    def evaluate(self, turned=None) -> tuple[completion.Clouds, list[jax.Array]]:
        """Clouds by running statistics, and how risky the choices of neighbours were."""
        return self._evaluate(self.params, self.stats, turned)

    def distances(self, clouds) -> tuple[jax.Array, jax.Array]:
        """Chamfer distances L1 and L2 of coarse and fine points."""
        both = (clouds.coarse, clouds.fine)
        l1, l2 = (jnp.stack([jnp.mean(f(c, self.target)) for c in both])
                  for f in (chamfer_l1, chamfer_l2))  # fmt: skip
        return l1, l2

    def train(self, turned=None):
        """Loss terms, moments and gradient of their sum, by batch statistics."""
        groups = Groups(2, jnp.ones(2, self.dtype))
        if turned is not None and self.noise is not None:
            # The jittered queries make one call more, before the last.
            turned = [*turned[:-1], jnp.zeros((2, 0), bool), turned[-1]]

        def loss(params, stats, turned):
            # Coarse points of PoinTr follow from batch statistics: there, others are near ties.
            with Turned(turned, RISK):
                clouds, changed = self.model.apply(
                    {"params": params, "batch_stats": stats}, self.partial, groups, self.noise,
                    mutable=["moments"],
                )  # fmt: skip
            coarse, fine = self.distances(clouds)[0]
            items = [coarse, fine]
            if self.noise is not None:
                near = points.nearest(clouds.centres, self.target, self.model.points_per_query)
                around = points.gather(self.target, near.reshape(2, -1))
                items = [jnp.mean(chamfer_l1(clouds.denoised, around)) / 2, coarse + fine]
            return sum(items), (jnp.stack(items), changed["moments"])

        (_, (items, moments)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
            self.params, self.stats, turned
        )
        return items, moments, gradient

    def errors(self, clouds) -> dict[str, np.ndarray]:
        """Of each coordinate, relative to the largest; points in the fixture's order."""
        coarse, fine = aligned(clouds, self.data["eval_coarse"], self.model.table)
        found = {"eval_coarse": coarse, "eval_fine": fine[:, ::16]}
        return {k: np.abs(a - self.data[k]) / np.abs(self.data[k]).max() for k, a in found.items()}

    def turns(self, risk: float = RISK, most: int = 3) -> list[jax.Array]:
        """Neighbours to turn so that the clouds are the fixture's; none if that cannot be had.

        Only those are tried that rounding can turn; one after the other, the best first.
        """
        shapes = jax.eval_shape(self._evaluate, self.params, self.stats, None)[1]
        turned = [np.zeros(r.shape, bool) for r in shapes]
        clouds, risks = self.evaluate(turned)
        risky = [(c, *q) for c, r in enumerate(risks) for q in np.argwhere(np.asarray(r) < risk)]

        def miss(clouds):
            errors = self.errors(clouds)["eval_fine"]
            return float(np.sqrt(np.mean(np.square(errors)))), float(errors.max())

        best = miss(clouds)
        for _ in range(most):
            tried = {}
            for call, sample, query in risky if best[1] > TOLERANCE else []:
                turned[call][sample, query] ^= True
                tried[call, sample, query] = miss(self.evaluate(turned)[0])
                turned[call][sample, query] ^= True
            if not tried or min(tried.values())[0] > 0.8 * best[0]:
                break
            call, sample, query = min(tried, key=lambda key: tried[key])
            turned[call][sample, query] ^= True
            best = tried[call, sample, query]
        return [jnp.asarray(t & (best[1] <= TOLERANCE)) for t in turned]


class CompletionNumbers(Fixture):
    """A completion network: evaluation, losses, gradients, statistics."""

    def numbers(self, dtype) -> Numbers:
        """Ours; in float64 by the fixture's choices of neighbours, where rounding can turn them."""
        ours, turned = CompletionFixture(self.facts, self.data, dtype, self.state()), None
        if dtype == jnp.float64:
            turned = ours.turns()
            self.notes = [f"{sum(int(t.sum()) for t in turned)} neighbours turned in float64"]
        clouds, _ = ours.evaluate(turned)
        coarse, fine = aligned(clouds, self.data["eval_coarse"], ours.model.table)
        l1, l2 = ours.distances(clouds)
        items, moments, gradient = ours.train(turned)
        moved = weights.to_reference(batchnorm.move_statistics(ours.stats, moments, 0.1))
        return gradient_numbers(gradient, self.facts) | {
            "parameters": np.asarray(init.count(ours.params)),
            "eval_coarse": coarse,
            "eval_fine": fine[:, ::16],
            "sets": (np.asarray(clouds.coarse), np.asarray(clouds.fine)[:, ::16]),
            "eval_cdl1": np.asarray(l1),
            "eval_cdl2": np.asarray(l2),
            "train_losses": np.asarray(items),
            "stat_norm": np.asarray([np.linalg.norm(moved[k]) for k in self.facts["stat_names"]]),
        }

    def distances(self, ours, theirs) -> dict[str, float]:
        fixed = self.data
        total = np.asarray(theirs.get("parameters", self.facts["parameters"]))
        found = {"parameters": distance(ours["parameters"], total, 1e-12)}
        for i, name in enumerate(("eval_coarse", "eval_fine")):
            size = np.abs(fixed[name]).max()
            found[name] = distance(ours[name], theirs[name], size)
            found[f"{name}_median"] = distance(ours[name], theirs[name], size, np.median)
            # Beside the points in the fixture's order: each coordinate's values in their own.
            unordered = theirs["sets"][i] if "sets" in theirs else theirs[name]
            a, b = (np.sort(values, axis=1) for values in (ours["sets"][i], unordered))
            found[f"{name}_sorted"] = distance(a, b, size)
        for key in ("eval_cdl1", "eval_cdl2", "train_losses", "stat_norm"):
            found[key] = distance(ours[key], theirs[key], fixed[key])
        return found | gradient_distances(fixed, ours, theirs, median=True)

    def jumps(self, a, b) -> set[str]:
        return set(filter(JUMPS.fullmatch, self.distances(a, b)))


def load(path: Path) -> Fixture:
    """The fixture of that name, NAME.npz or NAME.json.

    Raises:
      UnknownFamily: it is of a network that is not built yet.
      FileNotFoundError: one of its files is missing.
    """
    numbers, facts_file = path.with_suffix(".npz"), path.with_suffix(".json")
    if not numbers.is_file():
        raise FileNotFoundError(
            f"{numbers.name} is missing: the numbers that belong to {path.name}"
        )
    data = dict(np.load(numbers))
    if path.stem.startswith("loss_"):
        branches = sorted(k.removeprefix("boxes_") for k in data if k.startswith("boxes_"))
        if branches == sorted(BRANCHES):
            return TwoBranchLossFixture({}, data)
        if "boxes" not in data and branches:
            raise UnknownFamily(f"no such family yet: a loss of branches {', '.join(branches)}")
        return LossFixture({}, data)
    if not facts_file.is_file():
        raise FileNotFoundError(f"{facts_file.name} is missing: the facts of {path.name}")
    facts = json.loads(facts_file.read_text())
    if "points" in facts:
        return CompletionNumbers(facts, data)
    variant = facts["variant"]
    if variant.rpartition("-")[0] not in yolo.FAMILIES:
        raise UnknownFamily(f"no such family yet: {variant}")
    family, _ = yolo.parse(variant)
    return (TwoBranchFixture if family.one_to_one else DetectorFixture)(facts, data)


def check(path: Path, x64: bool = False) -> Comparison:
    """Judges one fixture; errors as of `load`, or of a network that cannot have been the same."""
    return load(path).compare(x64)


def found_in(folder: Path) -> list[Path]:
    """Every fixture below a folder, by its numbers; also those that lack one of their files."""
    files = (p for p in folder.rglob("*") if p.suffix in (".npz", ".json"))
    return sorted({p.with_suffix(".npz") for p in files})


def run(paths: Sequence[Path], x64: bool = False) -> tuple[int, int, int]:
    """Checks fixtures and all those below folders; returns how many (passed, failed, skipped)."""
    counts = dict.fromkeys(("ok", "FAILED", "skipped"), 0)
    for given in paths:
        for path in found_in(given) if given.is_dir() else [given]:
            start = time.monotonic()
            try:
                if path.suffix not in (".npz", ".json"):
                    raise UnknownFamily("not a fixture: neither .npz nor .json")
                result = check(path, x64)
                word, text = "ok" if result.passed else "FAILED", str(result)
            except UnknownFamily as reason:
                word, text = "skipped", str(reason)
            except Exception as error:  # a fixture that cannot run is a failed fixture
                word, text = "FAILED", f"{type(error).__name__}: {error}"
            counts[word] += 1
            seconds = time.monotonic() - start
            name = Path(given.name) / path.relative_to(given) if given.is_dir() else path
            print(f"{word:<7} {name} ({seconds:.0f} s): {text}", flush=True)
    passed, failed, skipped = counts.values()
    return passed, failed, skipped


def main(arguments: Sequence[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", type=Path, nargs="+", help="fixtures, or folders of them")
    parser.add_argument("--x64", action="store_true", help="the float64 run for every fixture")
    args = parser.parse_args(arguments)
    if missing := [str(p) for p in args.paths if not p.exists()]:
        parser.error(f"no such folder or fixture: {', '.join(missing)}")
    try:
        known_answers.require()
    except known_answers.WrongNumbersError as error:
        raise SystemExit(f"error: {error}") from None
    passed, failed, skipped = run(args.paths, args.x64)
    if not passed + failed:
        print(f"no fixture of a network we know in {', '.join(map(str, args.paths))}")
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return int(failed > 0 or passed == 0)


if __name__ == "__main__":
    sys.exit(main())
