"""What is in the text of a compiled program."""

from __future__ import annotations

import re
from typing import NamedTuple

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
                groups = re.search(r"replica_groups=(\{\{.*?\}\}|\S+?)(?:, |$)", line)
                written = groups.group(1) if groups else ""
                if not re.fullmatch(r"\{(\{\d+\},?)+\}", written):  # else each by itself
                    found.append(Collective(kind.group(1), name in inside, written))
    return sorted(found)


def reductions(text: str) -> tuple[int, int]:
    """(all-reduces inside of while loops, all-reduces elsewhere)."""
    assert "body=" in text, "no loop in the program"
    looped = [c.looped for c in collectives(text) if c.kind == "all-reduce"]
    return sum(looped), len(looped) - sum(looped)
