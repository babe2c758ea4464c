"""YOLO26's golden values: the loss of both branches and its gradient, by the reference in float64.

Weights, image and objects follow from formulas, as those of test_golden.py and test_yolo26.py.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from accumulate import test_golden as golden
from models.test_yolo26 import weights_of

from jaxaccum.accumulate import Groups
from jaxaccum.losses import detection
from jaxaccum.models import yolo


@dataclasses.dataclass(frozen=True)
class Branch:
    """Box, class and L1 loss with gains over its own target scores; those; anchors with an object.

    By running statistics, and by those of the batch.
    """

    frozen: tuple[tuple[float, float, float], float, int]
    batch: tuple[tuple[float, float, float], float, int]


@dataclasses.dataclass(frozen=True)
class Golden:
    """What the reference computes.

    Attributes:
      many, one: of the branches.
      norms: of the gradient of 2 (0.8 many + 0.2 one) by batch statistics: of the network below the
        head, of the one-to-many branches, of the one-to-one branches. total: that value.
    """

    many: Branch
    one: Branch
    norms: tuple[float, float, float]
    total: float


GOLDEN = {
    "yolo26-n": Golden(
        Branch(
            ((2.794130450, 3767.322151414, 0.073540428), 4.931032844, 44),
            ((2.157167396, 3693.913531319, 0.052993868), 5.231842631, 42),
        ),
        Branch(
            ((2.322935303, 6731.351308400, 0.059766283), 2.752982100, 5),
            ((1.941840107, 6719.577190882, 0.048428378), 2.965866634, 5),
        ),
        norms=(4387.903644652, 803.938578886, 359.147703844),
        total=8602.424891881,
    ),
    "yolo26-s": Golden(
        Branch(
            ((2.831331691, 3758.783601816, 0.074535056), 4.962693019, 44),
            ((3.439670749, 2490.770061605, 0.103045547), 7.864576089, 43),
        ),
        Branch(
            ((2.343904013, 6768.915443959, 0.060323957), 2.743027349, 5),
            ((2.749350015, 8057.751558022, 0.077951375), 2.457283369, 5),
        ),
        norms=(3012.205946306, 626.448049871, 506.920701156),
        total=7215.131988405,
    ),
    "yolo26-m": Golden(
        Branch(
            ((2.819087526, 3861.327150728, 0.073414425), 4.837094172, 44),
            ((3.306545296, 3006.890528508, 0.096981879), 6.477792545, 43),
        ),
        Branch(
            ((2.304968605, 6690.858534112, 0.058793098), 2.769262764, 5),
            ((2.754657545, 7768.421982867, 0.068360025), 2.540977857, 5),
        ),
        norms=(4907.827674924, 1024.564708409, 659.627971738),
        total=7924.968489267,
    ),
    "yolo26-l": Golden(
        Branch(
            ((2.819573061, 3859.537303103, 0.073668300), 4.838490549, 44),
            ((3.007212907, 4305.768780056, 0.082471893), 4.528573903, 44),
        ),
        Branch(
            ((2.299246268, 6683.079061871, 0.058572916), 2.772838171, 5),
            ((2.287242344, 7121.353473469, 0.059951304), 2.771117441, 5),
        ),
        norms=(26746.716085065, 1437.769898784, 596.111835172),
        total=9743.653810617,
    ),
    "yolo26-x": Golden(
        Branch(
            ((2.747059064, 3849.836387838, 0.072299275), 4.842960027, 44),
            ((3.492089169, 3230.120662369, 0.093829199), 6.045121795, 42),
        ),
        Branch(
            ((2.295875667, 6681.048036719, 0.058237486), 2.778450252, 5),
            ((3.240524052, 8799.615650587, 0.087549630), 2.224367294, 5),
        ),
        norms=(23273.952095179, 1278.010788881, 864.480632356),
        total=8695.108018885,
    ),
    "yolo26-p2-n": Golden(
        Branch(
            ((2.947654182, 13890.025865493, 0.073066240), 5.408514747, 45),
            ((4.072601209, 10805.442982540, 0.126392669), 7.437057081, 45),
        ),
        Branch(
            ((2.410369739, 26032.745420209, 0.057514247), 2.894311869, 5),
            ((1.962907568, 25833.198859897, 0.050460504), 3.084622501, 5),
        ),
        norms=(5187.429938407, 2123.848451454, 1291.389749148),
        total=27629.512053457,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long) if n[-1] in "mlx" else n for n in GOLDEN]
)
def test_losses_and_gradients(x64, name):
    expected = GOLDEN[name]
    model, params, stats = weights_of(name, jnp.float64)
    anchors = yolo.anchors(golden.SIZE, golden.SIZE, model.strides)
    objects, images = golden.targets(), golden.image()
    terms = detection.terms_of_two()

    def branches(predictions):
        numerators, sums, assigned = detection.loss_of_two(predictions, anchors, objects)
        items = [t.gain * numerators[t.name] / jnp.maximum(sums[t.denominator], 1) for t in terms]
        counts = [jnp.sum(one.foreground) for one in assigned]
        return [
            (jnp.stack(items[i : i + 3]), total, count)
            for i, total, count in zip((0, 3), sums.values(), counts, strict=True)
        ]

    @jax.jit
    def frozen(params, stats):
        return branches(model.apply({"params": params, "batch_stats": stats}, images))

    def loss(params, stats):
        variables, groups = {"params": params, "batch_stats": stats}, Groups(2, objects.weight)
        predictions, _ = model.apply(variables, images, groups, mutable=["moments"])
        (many, *_), (one, *_) = found = branches(predictions)
        total = 2 * (0.8 * jnp.sum(many) + 0.2 * jnp.sum(one))
        return total, (total, found)

    found = {"frozen": frozen(params, stats)}
    slope, (total, found["batch"]) = jax.jit(jax.grad(loss, has_aux=True))(params, stats)

    def close(ours, theirs, what):
        # The sheet prints nine decimals.
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=5.1e-10, err_msg=what)

    for how, both in found.items():
        for branch, (items, scores, count) in zip(("many", "one"), both, strict=True):
            wanted = getattr(getattr(expected, branch), how)
            close(items, wanted[0], f"{branch} {how}")
            close(scores, wanted[1], f"{branch} {how} target scores")
            assert count == wanted[2]
    close(total, expected.total, "total")
    head = max(slope, key=lambda row: int(row.split(".")[1]))
    parts: list[list] = [[], [], []]
    for path, leaf in jax.tree_util.tree_leaves_with_path(slope):
        own = detection.owner_of("/".join(key.key for key in path)) == detection.ONE_TO_ONE
        parts[2 if own else path[0].key == head].append(np.sum(np.square(leaf)))
    close([np.sqrt(sum(part)) for part in parts], expected.norms, "norms")
