"""python -m jaxaccum.models [TEXT] [--classes=80] [--size=640]

Lists the models whose name contains TEXT, with parameters and the floating-point operations of
one image (a multiplication and an addition are two; activations and norms included).
"""

from __future__ import annotations

import argparse
import math

import jax
import jax.numpy as jnp

from jaxaccum import models


def gigaflops(model, size: int) -> float:
    """Operations of one forward pass over one image, from XLA's count; nothing is compiled."""
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)
    cost = jax.jit(model.apply).lower(variables, image).cost_analysis()
    if cost is None:
        raise RuntimeError("XLA counts no operations on this platform; set JAX_PLATFORMS=cpu")
    return cost["flops"] / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="Lists the models.")
    parser.add_argument("text", nargs="?", default="", help="only names that contain this")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--size", type=int, default=640, help="side of the image in pixels")
    args = parser.parse_args()
    found = [name for name in models.names() if args.text in name]
    if not found:
        parser.error(f"no model name contains {args.text!r}; all: {', '.join(models.names())}")
    print(f"{'model':<18} {'parameters':>12} {'GFLOPs':>8}  strides")
    for name in found:
        model = models.create(name, num_classes=args.classes)
        image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        shapes = jax.eval_shape(lambda x, m=model: m.init(jax.random.key(0), x), image)["params"]
        parameters = sum(math.prod(a.shape) for a in jax.tree.leaves(shapes))
        strides = "/".join(map(str, model.strides))
        flops = gigaflops(model, args.size)
        print(f"{name:<18} {parameters:>12,} {flops:>8.2f}  {strides}", flush=True)


if __name__ == "__main__":
    main()
