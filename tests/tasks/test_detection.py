"""The law on a whole detector and its own pipeline: images, augmentation, assignment, loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from jaxaccum import data
from jaxaccum.accumulate import ContractError, Geometry, equivalence, grouped
from jaxaccum.accumulate.checks import check
from jaxaccum.tasks.detection import DetectionTask
from jaxaccum.training import run

NBS, UPDATES = 10, 2  # uneven tails; some of the scenes have no objects


def trace(geometry, bn_group, x64=True, objects=None):
    source = data.Scenes("train", size=64, length=40)
    config = tiny_config(
        nbs=NBS, bn_group=bn_group, microbatch=geometry.microbatch, devices=geometry.devices,
        engine=geometry.engine, dtype="float64" if x64 else "float32",
    )  # fmt: skip
    this = run.prepare(config, names=source.names, samples=len(source), identity={})

    def batches():
        for batch in run.make_stream(this, source).windows(0, [NBS] * UPDATES, backend="threads"):
            if objects is not None:  # only that many in the whole effective batch
                kept = np.cumsum(batch["valid"]).reshape(batch["valid"].shape) <= objects
                batch["valid"] &= kept
            yield batch

    return equivalence.trace(
        this.forward, this.rule, this.recipe, geometry,
        *this.task.initialise(0, np.float64 if x64 else np.float32), batches, UPDATES,
    )  # fmt: skip


CASES = [
    ("frozen", Geometry(1, 4)), ("frozen", Geometry(4, 1, "multisteps")),
    (4, Geometry(4, 2)), (4, Geometry(4, 4, "multisteps")),
    pytest.param(4, Geometry(4), marks=pytest.mark.long),
    pytest.param(4, Geometry(8, 1, "multisteps"), marks=pytest.mark.long),
]  # fmt: skip


@pytest.fixture(scope="module")
def whole():
    with jax.enable_x64(True):
        return {group: trace(Geometry(12), group) for group in ("frozen", 4)}


@pytest.mark.slow
@pytest.mark.parametrize(("bn_group", "geometry"), CASES, ids=str)
def test_one_run_float64(x64, whole, bn_group, geometry):
    found = equivalence.differences(trace(geometry, bn_group), whole[bn_group])
    assert equivalence.within(found, equivalence.Tolerance.of(True)), found


@pytest.mark.slow
@pytest.mark.parametrize("objects", [0, 1])
def test_one_run_with_a_target_score_sum_below_one(x64, objects):
    """An effective batch of ten images with one object, or none: the floor acts, and acts once."""
    whole = trace(Geometry(12), 4, objects=objects)
    assert all(log["sums/target_scores"] < 1 for log in whole.logs)
    for geometry in (Geometry(4, 2), Geometry(4, 1, "multisteps")):
        found = equivalence.differences(trace(geometry, 4, objects=objects), whole)
        assert equivalence.within(found, equivalence.Tolerance.of(True)), found


@pytest.mark.slow
def test_one_run_float32():
    found = equivalence.differences(trace(Geometry(4, 2), 4, False), trace(Geometry(12), 4, False))
    assert equivalence.within(found, equivalence.Tolerance.of(False)), found


def test_denominators_carry_no_gradient():
    source = data.Scenes("train", length=4)
    this = run.prepare(tiny_config(), names=source.names, samples=4, identity={})
    params, stats = this.task.initialise(0)
    example = this.task.example(2)
    check(this.grouped, this.rule.objective, params, stats, example)

    def leaking(params, stats, batch):
        out = this.grouped(params, stats, batch)
        leak = jnp.sum(params["model.5"]["cv2.0.2"]["bias"])
        return out._replace(
            denominators={"target_scores": out.denominators["target_scores"] + leak}
        )

    with pytest.raises(ContractError, match=r"\['target_scores'\] carry a gradient"):
        check(leaking, this.rule.objective, params, stats, example)


@pytest.mark.slow
def test_the_gradient_of_a_pool_inside_of_a_model(x64):
    """Groups of batch norm in front of a max pool: the sums of two halves are those of the whole.

    XLA computes a pool's input anew where it is fused, rounded differently; a gradient that asked
    which element equals the maximum lost some.
    """
    from jaxaccum import models
    from jaxaccum.accumulate.terms import add

    source = data.Scenes("train", size=64, length=40)
    model = models.create("yolov8-n", num_classes=len(source.names), dtype=jnp.float64)
    task = DetectionTask(model, 64)
    params, stats = task.initialise(0, np.float64)
    stream = run.make_stream(
        run.prepare(tiny_config(), names=tuple("abcdef"), samples=40, identity={}), source
    )
    batch = next(stream.windows(0, [4], backend="threads"))
    sums = jax.jit(lambda b: task.objective(4).sums(grouped(task.forward, 2), params, stats, b))
    whole = sums(batch)
    halves = [sums(jax.tree.map(lambda a, i=i: a[i : i + 2], batch)) for i in (0, 2)]
    both = add(*halves)
    assert equivalence.distance(both.gradients, whole.gradients) < 1e-12
    assert equivalence.distance(both.moments, whole.moments) < 1e-12


def test_the_table_of_an_evaluation():
    found = {"objects": 12, "precision": 0.5, "recall": 0.25, "map50": 0.125, "map50_95": 0.0625}
    for name, value in (("a", 0.75), ("a long name", float("nan"))):
        found |= {f"{k}/{name}": value for k in ("precision", "recall", "ap50", "ap")}
    found |= {"objects/a": 12, "objects/a long name": 0}
    task = DetectionTask(None, 64, names=("a", "a long name"))
    assert task.tables(found) == [
        "class          objects  precision     recall       AP50    AP50-95",
        "all                 12      0.500      0.250      0.125      0.062",
        "a                   12      0.750      0.750      0.750      0.750",
        "a long name          0          -          -          -          -",
    ]
