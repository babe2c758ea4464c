"""python -m jaxaccum.models [TEXT] [--classes=80] [--size=640]

Lists the models whose name contains TEXT, with parameters and the floating-point operations of
one image or one cloud (a multiplication and an addition are two; activations and norms included).
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp

from jaxaccum import models, start
from jaxaccum.machine import onednn
from jaxaccum.models import completion, init
from jaxaccum.models.listing import KNOWN

CLASSES, SIZE = 80, 640


def gigaflops(model, example: jax.ShapeDtypeStruct) -> float:
    """Operations of one forward pass, from XLA's count; nothing is compiled."""
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), example)
    with onednn.without():  # whose operations XLA does not see
        cost = jax.jit(model.apply).lower(variables, example).cost_analysis()
    if cost is None:
        raise RuntimeError("XLA counts no operations on this platform; set JAX_PLATFORMS=cpu")
    return cost["flops"] / 1e9


def measured(name: str, classes: int = CLASSES, size: int = SIZE) -> tuple[int, float, str]:
    """Parameters of a model, GFLOPs of one sample, and its strides or points in -> out; takes
    seconds.

    Args:
      classes, size: of a detector, its classes and the side of its image in pixels.
    """
    if name in completion.names():
        model = models.create(name)
        shape: tuple[int, ...] = (1, model.num_input, 3)
        smallest, facts = shape, f"{model.num_input} -> {model.num_points}"
    else:
        model = models.create(name, num_classes=classes)
        shape, smallest = (1, size, size, 3), (1, 64, 64, 3)
        facts = "/".join(map(str, model.strides))
    example = jax.ShapeDtypeStruct(smallest, jnp.float32)
    params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), example)["params"]
    flops = gigaflops(model, jax.ShapeDtypeStruct(shape, jnp.float32))
    return init.count(params), flops, facts


def main() -> None:
    start.imported()
    parser = argparse.ArgumentParser(prog="jaxaccum models", description="Lists the models.")
    parser.add_argument("text", nargs="?", default="", help="only names that contain this")
    parser.add_argument("--classes", type=int, default=CLASSES, help="of a detector")
    parser.add_argument("--size", type=int, default=SIZE, help="side of the image in pixels")
    args = parser.parse_args()
    found = [name for name in models.names() if args.text in name]
    if not found:
        parser.error(f"no model name contains {args.text!r}; all: {', '.join(models.names())}")
    usual = (args.classes, args.size) == (CLASSES, SIZE)
    print(f"{'model':<20} {'parameters':>12} {'GFLOPs':>8}  strides, or points in -> out")
    for name in found:
        if usual and name in KNOWN:
            count, flops, facts = KNOWN[name]
        else:
            count, flops, facts = measured(name, args.classes, args.size)
        print(f"{name:<20} {count:>12,} {flops:>8.2f}  {facts}", flush=True)


if __name__ == "__main__":
    main()
