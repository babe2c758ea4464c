"""Counts what a GPU would do for an update: the program compiled for one that need not be here.

    python scripts/gpu_program.py --model=yolov8-s --microbatch=16 --steps=2 --size=640

Needs jax-cuda12-plugin and jax-cuda12-pjrt of JAX's version (no driver, no CUDA). No time is
measured; kernels and bytes are those of the optimized text. Most of them are in the loop over the
microbatches, whose body is counted once, that is for one microbatch.
"""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import collections
import math
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags
from benchmarks import runs

from jaxaccum.accumulate import make_engine
from jaxaccum.plan import targets

flags.DEFINE_string("model", "yolov8-s", "a detector")
flags.DEFINE_enum("gpu", "h100", ["h100", "a100", "a100-40", "rtx4090", "t4"], "the GPU described")
flags.DEFINE_integer("microbatch", 16, "samples of a microbatch, and of a group")
flags.DEFINE_integer("steps", 2, "microbatches of an update")
flags.DEFINE_integer("size", 640, "pixels of a side")
flags.DEFINE_string("dtype", "bfloat16", "of the arithmetic")
flags.DEFINE_string("text", "", "a file for the optimized text")

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
NO_KERNEL = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional",
    "call", "after-all", "opt-barrier",
}  # fmt: skip


class Operation(NamedTuple):
    """One line of an optimized HLO computation."""

    shape: str
    kind: str
    line: str

    @property
    def written(self) -> collections.Counter[str]:
        """Bytes of its results by dtype."""
        found: collections.Counter[str] = collections.Counter()
        for dtype, sides in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", self.shape):
            if dtype in BYTES:
                found[dtype] += BYTES[dtype] * math.prod(int(n) for n in sides.split(",") if n)
        return found


def computations(text: str) -> dict[str, list[Operation]]:
    """The operations of each computation of a module; that of the entry is named "ENTRY"."""
    found: dict[str, list[Operation]] = {}
    current: list[Operation] | None = None
    for line in text.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = found.setdefault("ENTRY" if start[1] else start[2], [])
        elif line.startswith("}"):
            current = None
        elif current is not None and (
            one := re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(", line)
        ):
            current.append(Operation(one[1], one[2], line))
    return found


def counts(operations: list[Operation]) -> dict[str, float]:
    """Kernels, and GB written, in all and in float32."""
    kernels = [one for one in operations if one.kind not in NO_KERNEL]
    written = sum((one.written for one in kernels), collections.Counter())
    return {
        "kernels": len(kernels),
        "GB written": sum(written.values()) / 1e9,
        "of these float32": written["f32"] / 1e9,
    }


def main(_) -> None:
    flag = flags.FLAGS
    this = runs.prepare(
        "detection", flag.model, nbs=flag.microbatch * flag.steps, microbatch=flag.microbatch,
        bn_group=flag.microbatch, dtype=flag.dtype, data__image_size=flag.size,
    )  # fmt: skip
    devices = targets.TARGETS[flag.gpu].devices(1)
    engine = make_engine(this.forward, this.rule, this.window, devices=devices)
    (program,) = engine.lowered(runs.state_of(this), this.task.example(this.recipe.nbs))
    start = time.perf_counter()
    compiled = program.compile()
    print(f"{flag.model}, {flag.size} px, {this.window.geometry}, {flag.dtype}, {flag.gpu}")
    print(f"compiled in {time.perf_counter() - start:.0f} s")
    text = compiled.as_text()
    if flag.text:
        with open(flag.text, "w") as file:
            file.write(text)
    parts = computations(text)
    for name, operations in parts.items():
        for one in operations:
            if one.kind != "while":
                continue
            body = re.search(r"body=%?([\w.\-]+)", one.line)
            assert body is not None
            turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', one.line)
            said = (
                f"{turns[1]} turns"
                if turns
                else "the host waits each turn to know whether to go on"
            )
            where = "of the update" if name == "ENTRY" else "inside"
            print(f"loop {where}, {said}: {shown(counts(parts[body[1]]))}")
    print(f"the rest: {shown(counts(parts['ENTRY']))}")
    print(f"temporary memory {compiled.memory_analysis().temp_size_in_bytes / 2**20:.0f} MiB")


def shown(found: dict[str, float]) -> str:
    return ", ".join(
        f"{value:,.3g} {name}" if isinstance(value, float) else f"{value:,} {name}"
        for name, value in found.items()
    )


if __name__ == "__main__":
    app.run(main)
