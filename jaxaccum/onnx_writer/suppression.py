"""Non-maximum suppression as an operation that ONNX has and JAX has not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive

from jaxaccum.onnx_writer.elementwise import rule
from jaxaccum.onnx_writer.graph import Graph, Value

_kept = Primitive("non_max_suppression")


@_kept.def_abstract_eval
def _shape(boxes: Any, scores: Any, *, conf: float, iou: float, max_det: int) -> Any:
    return scores


def best_of(
    boxes: jax.Array, scores: jax.Array, *others: jax.Array, conf: float, iou: float, max_det: int
) -> tuple[jax.Array, ...]:
    """The best boxes of each image, as `metrics.detection.nms` chooses them for prediction.

    Every anchor counts for its best class; a box is suppressed by a better one of its class whose
    IoU with it is above `iou`. Only for programs that are written as ONNX.

    Args:
      boxes: (N, A, 4) x1 y1 x2 y2. scores: (N, A, classes). others: (N, A, ...), of the boxes.
      conf: scores are above it. max_det: K, or the anchors if these are fewer.
    Returns:
      boxes (N, K, 4), scores (N, K), the highest first, classes (N, K) int32, and the others
      (N, K, ...); where there are fewer than K, scores are 0.
    """
    classes = jnp.argmax(scores, -1).astype(jnp.int32)
    # As there, a box that is not finite or has no area is none: a score of 0 is above no `conf`.
    usable = jnp.isfinite(jnp.sum(boxes, -1))
    for low, high in ((0, 2), (1, 3)):
        usable &= boxes[..., high] > boxes[..., low]
    best = jnp.arange(scores.shape[-1]) == classes[..., None]
    best = jnp.where(best & usable[..., None], scores, 0)
    kept = _kept.bind(
        boxes, jnp.swapaxes(best, 1, 2), conf=float(conf), iou=float(iou), max_det=int(max_det)
    )
    found, anchors = jax.lax.top_k(jnp.max(kept, 1), min(max_det, scores.shape[1]))

    def taken(array: jax.Array) -> jax.Array:
        places = anchors.reshape(*anchors.shape, *[1] * (array.ndim - 2))
        return jnp.take_along_axis(array, places, axis=1, mode="promise_in_bounds")

    return taken(boxes), found, taken(classes), *map(taken, others)


@rule("non_max_suppression")
def _suppressed(graph: Graph, equation: Any, boxes: Value, scores: Value) -> list[Value]:
    """Scores of what was kept, and 0 in place of all others."""
    params, out = equation.params, equation.outvars[0].aval
    all_scores = graph.tensor(scores)
    kept = graph.add(
        "NonMaxSuppression",
        [
            graph.tensor(boxes), all_scores,
            graph.array([params["max_det"]], np.int64),
            graph.array([params["iou"]], np.float32), graph.array([params["conf"]], np.float32),
        ],
    )  # fmt: skip
    zero = graph.array(0, out.dtype)
    nothing = graph.add("Expand", [zero, graph.sizes(out.shape)])
    found = graph.add("GatherND", [all_scores, kept])
    return [graph.value(graph.add("ScatterND", [nothing, kept, found]), out)]
