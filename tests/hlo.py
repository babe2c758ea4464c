"""What is in the text of a compiled program."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """Attributes: kind; looped, whether inside of a while loop; groups of devices, as written."""

    kind: str
    looped: bool
    groups: str


def computations(text: str) -> dict[str, str]:
    """Name -> body of every computation of an HLO module."""
    return {
        m.group(1): m.group(2)
        for m in re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S)
    }


def collectives(text: str) -> list[Collective]:
    """Everything that two devices or more do together, sorted."""
    bodies = computations(text)
    inside: set[str] = set()
    stack = re.findall(r"body=%?([\w.\-]+)", text)
    while stack:
        name = stack.pop()
        if name not in inside:
            inside.add(name)
            stack += [n for n in re.findall(r"%([\w.\-]+)", bodies[name]) if n in bodies]
    found = []
    for name, body in bodies.items():
        for line in body.splitlines():
            kind = re.search(rf" ({'|'.join(KINDS)})(?:-start)?\(", line)
            if kind:
                written = _groups(line)
                if not re.fullmatch(r"\{(\{\d+\},?)+\}", written):  # else each by itself
                    found.append(Collective(kind.group(1), name in inside, written))
    return sorted(found)


def _groups(line: str) -> str:
    """The groups of devices of a collective as {{0,1},{2,3}}; "" if it has none.

    XLA also writes them as axes of a mesh: mesh['a'=2,'b'=2] {'b'} is {{0,1},{2,3}}.
    """
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}(, device_ids)?", line)
    if mesh:
        assert not mesh.group(3), f"a mesh in another order: {line}"
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
        axes = list(sizes)
        over = [axes.index(name) for name in re.findall(r"'([^']+)'", mesh.group(2))]
        rest = [i for i in range(len(axes)) if i not in over]
        devices = np.arange(math.prod(sizes.values())).reshape(*sizes.values())
        rows = devices.transpose(*rest, *over).reshape(
            -1, math.prod(devices.shape[i] for i in over)
        )
        return "{" + ",".join("{" + ",".join(map(str, row)) + "}" for row in rows) + "}"
    groups = re.search(r"replica_groups=(\{\{.*?\}\}|\S+?)(?:, |$)", line)
    return groups.group(1) if groups else ""


def reductions(text: str) -> tuple[int, int]:
    """(all-reduces inside of while loops, all-reduces elsewhere)."""
    assert "body=" in text, "no loop in the program"
    looped = [c.looped for c in collectives(text) if c.kind == "all-reduce"]
    return sum(looped), len(looped) - sum(looped)
