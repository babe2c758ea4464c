"""Runs every reference fixture in a folder against our models and losses.

python scripts/parity.py FOLDER [--x64] prints a line per fixture with its largest relative
errors and ends with "N passed, M failed"; exit status 1 if any failed. The format: NAME.json
(facts) with NAME.npz (numbers) for a model whose weights follow from its state-dict keys, or
loss_NAME.npz for a loss on given head outputs. Facts with `points` are of a completion network.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxaccum import models
from jaxaccum.accumulate import Groups, batchnorm
from jaxaccum.losses import detection
from jaxaccum.losses import solids as solid_losses
from jaxaccum.losses.chamfer import chamfer_l1, chamfer_l2
from jaxaccum.models import completion, init, points, solids, weights, yolo

TOLERANCE = 1e-4
# A training pass goes through a hundred and more batch norms over as few as 32 values and amplifies
# rounding, on both sides: against a float64 run of ours the fixture of yolov8-p2-m itself is off by
# 8e-5 in a gradient's norm, 1.2e-4 in the probes' root mean square and 4.3e-4 in one probe. So
# outputs and norms are held to the tolerance in root mean square, and single values (of several
# hundred to a hundred thousand), and probes, to more; all are reported.
LOOSE = {
    "train_boxes_max": 5e-4,
    "train_scores_max": 5e-4,
    "grad_norm_max": 5e-4,
    "grad_probe_rms": 5e-4,
    "grad_probe_max": 5e-3,
}
# A completion network decides some 10^5 times: which neighbours are nearest, which is the largest,
# on which side of its kink an activation is. Decisions that rounding can turn (float32 leaves
# 1e-6 after the encoder) change outputs and gradients by jumps. In float64, other weights by 1e-6
# to 3e-6 of each change the gradients of the fixtures of pointr-shapenet55 and adapointr-projected
# by up to 7e-4 (norms, root mean square), 5e-3 (one norm), 4e-3 (probes) and 4e-2 (one probe), and
# so far are the fixtures from our float64. What a turned neighbour moves is judged in float64.
LOOSE_COMPLETION = {
    "eval_coarse_sorted": 5e-3,
    "eval_fine_sorted": 5e-3,
    "grad_norm_median": 5e-4,
    "grad_norm_rms": 1e-3,
    "grad_norm_max": 1e-2,
    "grad_probe_rms": 5e-3,
    "grad_probe_max": 5e-2,
}


class Comparison:
    """Collects the largest relative error of each named quantity.

    Attributes:
      errors: by name. loose: limits other than `TOLERANCE`.
      judged: names whose error does not count, since float64 decides (NAME_f64).
      notes: for people.
    """

    def __init__(self, loose=LOOSE):
        self.errors: dict[str, float] = {}
        self.loose = loose
        self.judged: set[str] = set()
        self.notes: list[str] = []

    def limit(self, name: str) -> float:
        return self.loose.get(name.removesuffix("_f64"), TOLERANCE)

    def add(self, name: str, ours, theirs, scale=None) -> None:
        """Relative to the largest magnitude of the reference array, or to `scale` elementwise."""
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        if ours.shape != theirs.shape:
            raise ValueError(f"{name}: shape {ours.shape}, the fixture has {theirs.shape}")
        if theirs.size == 0:
            error = 0.0
        else:
            base = np.maximum(np.abs(theirs).max() if scale is None else scale, 1e-12)
            error = float(np.max(np.abs(ours - theirs) / base))
        if not np.isfinite(error):
            error = float("inf")
        self.errors[name] = max(self.errors.get(name, 0.0), error)

    @property
    def beyond(self) -> list[str]:
        """What is beyond its limit."""
        return [name for name, e in self.errors.items()
                if e > self.limit(name) and name not in self.judged]  # fmt: skip

    @property
    def passed(self) -> bool:
        return not self.beyond

    def __str__(self) -> str:
        return " ".join(
            f"({name} {error:.1e})" if name in self.judged else f"{name} {error:.1e}"
            for name, error in self.errors.items()
        ) + "".join(f"; {note}" for note in self.notes)


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


def padded_solids(data, batch_idx) -> solid_losses.SolidTargets:
    """Flat 3D targets as padded ones, in the order of `padded_targets`."""
    room = max(int(np.sum(batch_idx == i)) for i in range(2))
    values = {}
    for name, shape in (("location_3d", (3,)), ("dimensions_3d", (3,)), ("rotation_y", ())):
        values[name] = np.zeros((2, room, *shape), np.float32)
        for i in range(2):
            rows = data[f"target_{name}"].reshape(-1, *shape)[batch_idx == i]
            values[name][i, : len(rows)] = rows
    return solid_losses.SolidTargets(*values.values(), np.ones(2), np.zeros((2, 3, 4)))


def loss_of(predictions, anchors, targets, enlarge_small=True, solid_targets=None):
    """Sum of the terms with gains over the clamped denominators, and everything else.

    With 3D targets, by the published rule of YOLOv12-3D; its last three items are parts of others.
    """
    numerators, denominators, assignment = detection.detection_loss(
        predictions, anchors, targets, enlarge_small
    )
    total = denominators[detection.TARGET_SCORES]
    items = jnp.stack([t.gain * numerators[t.name] for t in detection.terms()])
    items = items / jnp.maximum(total, 1)
    if solid_targets is not None:

        def axes(metres):
            more, denominators = solid_losses.solid_loss(
                predictions.solids, assignment, solid_targets, solids.ORIGINAL, 0, metres, True
            )
            gained, _ = solid_losses.terms(200.0, 0.05, 1.0, compat=True)
            return jnp.stack([
                t.gain * more[t.name] / jnp.maximum(denominators.get(t.denominator, total), 1)
                for t in gained
            ])  # fmt: skip

        parts = jax.lax.stop_gradient(axes(0.0)[:3])
        items = jnp.concatenate([items, axes(0.02), parts])
    return jnp.sum(items), (items, total, assignment)


def check_loss(path: Path, dtype) -> Comparison:
    """A fixture of the loss alone."""
    data = np.load(path)
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
    result = Comparison()
    result.add("loss", items, data["loss_box_cls_dfl"], np.abs(data["loss_box_cls_dfl"]))
    result.add("target_scores", total, data["target_scores_sum"], max(data["target_scores_sum"], 1))
    result.add("foreground", assignment.foreground, data["foreground"])
    result.add("grad_boxes", np.swapaxes(gradient.boxes, 1, 2), data["grad_boxes"])
    result.add("grad_scores", np.swapaxes(gradient.scores, 1, 2), data["grad_scores"])
    return result


def check_model(path: Path, dtype) -> Comparison:
    """A fixture of a whole detector: evaluation, training forward, loss, gradients, statistics."""
    facts, data = json.loads(path.with_suffix(".json").read_text()), np.load(path)
    seed = int(data["seed"])
    model = models.create(facts["variant"], num_classes=facts["nc"], dtype=dtype)
    params, stats = init.initialise(
        model, jax.ShapeDtypeStruct((1, 64, 64, 3), dtype), 0, dtype=np.dtype(dtype)
    )
    state = {k: rule_weight(k, s).astype(np.float32) for k, s in facts["state"].items()}
    params, stats = weights.from_reference(state, params, stats)
    fixed = [k for k in facts["state"] if k.endswith("dfl.conv.weight")]
    result = Comparison()
    result.add("parameters", init.count(params) + 16 * len(fixed), facts["parameters"], 1e-12)

    def draw(offset, *shape):
        values = np.random.default_rng(seed + offset).random(shape, np.float32)
        return jnp.asarray(np.transpose(values, (0, 2, 3, 1)), dtype)

    def channels_first(a, step):
        return np.swapaxes(a, 1, 2)[..., ::step]

    @jax.jit
    def evaluate(params, stats, image):
        out = model.apply({"params": params, "batch_stats": stats}, image)
        anchors = yolo.anchors(*image.shape[1:3], model.strides)
        return out, yolo.decode(out, anchors)

    out, (boxes, scores) = evaluate(params, stats, draw(1, 1, 3, 64, 96))
    centre_size = np.concatenate(
        [(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], axis=-1
    )
    channels = [centre_size, scores]
    if out.solids is not None:
        boxes_3d = solids.decode(out.solids, solids.ORIGINAL)
        channels += [boxes_3d.locations, boxes_3d.sizes, boxes_3d.headings[..., None]]
    decoded = channels_first(np.concatenate(channels, axis=-1), 3)
    if "eval_boxes" in data:
        result.add("eval_boxes", channels_first(out.boxes, 3), data["eval_boxes"])
        result.add("eval_scores", channels_first(out.scores, 3), data["eval_scores"])
    classes = 4 + facts["nc"]
    result.add("eval_decoded_boxes", decoded[:, :4], data["eval_decoded"][:, :4])
    result.add("eval_decoded_scores", decoded[:, 4:classes], data["eval_decoded"][:, 4:classes])
    for i, name in enumerate(("x", "y", "z", "height", "width", "length", "heading")):
        if out.solids is not None:
            ours, theirs = (d[:, classes + i] for d in (decoded, data["eval_decoded"]))
            result.add(f"eval_decoded_{name}", ours, theirs)

    images = draw(2, 2, 3, 128, 128)
    # Fixtures of the older trainer name their targets so, and know no enlarged small objects.
    older = "target_cls" in data
    flat = (data[f"target_{k}" if older else k] for k in ("batch_idx", "cls", "bboxes"))
    batch_idx, cls, bboxes = flat
    targets = padded_targets(batch_idx, cls.ravel(), bboxes, 2, 128, 128)
    # Fixtures of the 2D network beside it hold these targets, too.
    solid_targets = padded_solids(data, batch_idx) if out.solids is not None else None
    groups = Groups(2, jnp.ones(2, dtype))
    anchors = yolo.anchors(128, 128, model.strides)

    def train_loss(params):
        out, moments = model.apply(
            {"params": params, "batch_stats": stats}, images, groups, mutable=["moments"]
        )
        loss, aux = loss_of(out, anchors, targets, not older, solid_targets)
        return 2 * loss, (out, moments["moments"], aux)

    (total, (out, moments, (items, _, _))), gradient = jax.jit(
        jax.value_and_grad(train_loss, has_aux=True)
    )(params)
    if "train_boxes" in data:
        for name, ours in (("train_boxes", out.boxes), ("train_scores", out.scores)):
            ours, theirs = channels_first(ours, 7), data[name]
            result.add(f"{name}_max", ours, theirs)
            error, scale = np.sqrt(np.mean(np.square(ours - theirs))), np.abs(theirs).max()
            result.add(f"{name}_rms", error, 0.0, scale)
    if "loss_total_times_batch" in data:
        result.add("loss_total", total, data["loss_total_times_batch"])
    result.add("loss", items, data["loss_items"], np.abs(data["loss_items"]))

    add_gradient(result, gradient, facts, data)
    if "stat_norm" not in data:
        return result
    moved = weights.to_reference(batchnorm.move_statistics(stats, moments, 0.03))
    ours = np.asarray([np.linalg.norm(moved[k]) for k in facts["stat_names"]])
    result.add("stat_norm", ours, data["stat_norm"], data["stat_norm"])
    return result


def add_gradient(result: Comparison, gradient, facts, data, suffix: str = "") -> None:
    """Norms and probes of all gradients that the reference has; ours of the others are zero."""
    gradient = weights.to_reference(jax.tree.map(np.float64, gradient))
    names = facts["grad_names"]
    extra = {k for k, g in gradient.items() if k not in names and np.any(g)}
    if missing := extra | (set(names) - set(gradient)):
        raise ValueError(f"gradients on one side only: {sorted(missing)[:4]}")
    norms = np.asarray([np.linalg.norm(gradient[k]) for k in names])
    probes = np.asarray(
        [
            np.sum(gradient[k] * np.random.default_rng(zlib.crc32(f"{k}#probe".encode()))
                   .standard_normal(gradient[k].shape))
            for k in names
        ]
    )  # fmt: skip
    # A probe is a dot product with unit normals: its natural size is the gradient's norm. Some
    # gradients are zero by symmetry (a bias in front of a batch norm, or of keys) and float32 noise
    # in the fixture, 1e-7 of the largest: those are compared with 1e-4 of the largest.
    largest = data["grad_norm"].max()
    size = np.where(data["grad_norm"] < 5e-7 * largest, 1e-4 * largest, data["grad_norm"])
    for name, errors in (
        ("grad_norm", (norms - data["grad_norm"]) / size),
        ("grad_probe", (probes - data["grad_probe"]) / size),
    ):
        if name == "grad_norm" and result.loose is LOOSE_COMPLETION:
            result.add(f"{name}_median{suffix}", np.median(np.abs(errors)), 0.0, 1.0)
        result.add(f"{name}_rms{suffix}", np.sqrt(np.mean(np.square(errors))), 0.0, 1.0)
        result.add(f"{name}_max{suffix}", np.abs(errors).max(), 0.0, 1.0)


class Turned:
    """Neighbours in a network, some turned: the k-th given up for the next.

    While entered, `points.nearest` does so in the order of calls.

    Attributes:
      turned: by call, (B, Q) which queries.
      risks: of the calls made, (B, Q) by how much the next is farther, as a share of the squared
        coordinates; float32 decides right from some 1e-6 on.
    """

    def __init__(self, turned: Sequence[jax.Array] | None = None):
        self.turned = turned
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

    def __post_init__(self):
        facts, data = self.facts, self.data
        shapes = {k: np.broadcast_to(np.float32(0), s) for k, s in facts["state"].items()}
        found = [n for n, fit in weights.fitting_models(weights.Weights(shapes)) if fit == 1]
        # The configurations of Projected-ShapeNet differ from others in no tensor.
        words = f"{facts.get('variant', '')} {facts.get('config', '')}".lower()
        names = [n for n in found if ("projected" in n) == ("projected" in words)] or found
        if len(names) != 1:
            raise ValueError(f"models with these tensors: {names}")
        self.model = models.create(names[0], dtype=self.dtype)
        if self.model.num_points != facts["points"]:
            raise ValueError(f"{names[0]} has {self.model.num_points} points, the fixture "
                             f"{facts['points']}")  # fmt: skip
        state = {k: rule_weight(k, s).astype(np.float32) for k, s in facts["state"].items()}
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
            with Turned(turned):
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

    def turns(self, risk: float = 2e-6, most: int = 3) -> list[jax.Array]:
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


def check_completion(path: Path, dtype) -> Comparison:
    """A fixture of a completion network: evaluation, losses, gradients, statistics."""
    return compare_completion(
        json.loads(path.with_suffix(".json").read_text()), np.load(path), dtype
    )


def compare_completion(facts, data, dtype) -> Comparison:
    """The same of facts and numbers in memory."""
    ours = CompletionFixture(facts, data, dtype)
    result = Comparison(LOOSE_COMPLETION)
    result.add("parameters", init.count(ours.params), facts["parameters"], 1e-12)
    clouds, _ = ours.evaluate()
    for name, cloud in (("eval_coarse", clouds.coarse), ("eval_fine", clouds.fine[:, ::16])):
        theirs, errors = data[name], ours.errors(clouds)[name]
        result.add(name, errors, np.zeros_like(errors), 1.0)
        result.add(f"{name}_median", np.median(errors), 0.0, 1.0)
        sets = (np.sort(np.asarray(a), axis=1) for a in (cloud, theirs))
        result.add(f"{name}_sorted", *sets)
    l1, l2 = ours.distances(clouds)
    result.add("eval_cdl1", l1, data["eval_cdl1"], data["eval_cdl1"])
    result.add("eval_cdl2", l2, data["eval_cdl2"], data["eval_cdl2"])
    items, moments, gradient = ours.train()
    result.add("train_losses", items, data["train_losses"], data["train_losses"])
    moved = weights.to_reference(batchnorm.move_statistics(ours.stats, moments, 0.1))
    norms = np.asarray([np.linalg.norm(moved[k]) for k in facts["stat_names"]])
    result.add("stat_norm", norms, data["stat_norm"], data["stat_norm"])
    add_gradient(result, gradient, facts, data)

    jumps = {"eval_coarse", "eval_fine", *(k for k in result.errors if k.startswith("grad_"))}
    if jumps & set(result.beyond):
        with jax.enable_x64(True):
            judge = CompletionFixture(facts, data, jnp.float64)
            turned = judge.turns()
            for name, errors in judge.errors(judge.evaluate(turned)[0]).items():
                result.add(f"{name}_f64", errors, np.zeros_like(errors), 1.0)
            add_gradient(result, judge.train(turned)[2], facts, data, "_f64")
            result.notes.append(f"{sum(int(t.sum()) for t in turned)} neighbours turned")
        result.judged |= jumps
    return result


def check_of(path: Path):
    """The check for a fixture, by what it holds."""
    if path.stem.startswith("loss_"):
        return check_loss
    facts = json.loads(path.with_suffix(".json").read_text())
    return check_completion if "points" in facts else check_model


def run(folder: Path, x64: bool) -> tuple[int, int]:
    """Checks every fixture below `folder`; returns (passed, failed)."""
    passed = failed = 0
    dtype = jnp.float64 if x64 else jnp.float32
    for path in sorted(folder.rglob("*.npz")):
        try:
            result = check_of(path)(path, dtype)
            ok, text = result.passed, str(result)
        except Exception as error:  # a fixture that cannot run is a failed fixture
            ok, text = False, f"{type(error).__name__}: {error}"
        passed, failed = passed + ok, failed + (not ok)
        print(f"{'ok    ' if ok else 'FAILED'} {path.relative_to(folder)}: {text}", flush=True)
    return passed, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--x64", action="store_true", help="compute in float64")
    args = parser.parse_args()
    if not args.folder.is_dir():
        parser.error(f"no folder {args.folder}")
    jax.config.update("jax_enable_x64", args.x64)
    jax.config.update("jax_default_matmul_precision", "highest")  # a GPU would round to tf32
    passed, failed = run(args.folder, args.x64)
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0 or passed == 0)


if __name__ == "__main__":
    sys.exit(main())
