"""Weights of detectors from files of other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ml_collections

from jaxaccum.tasks.base import Adopted
from jaxaccum.weights.transfer import Weights, WeightsError


def class_names(found: Weights, names: Sequence[str], source: Path) -> tuple[str, ...]:
    """The names of the classes: given, or those in the file, or numbers.

    Raises:
      WeightsError: other names are given than there are classes.
    """
    classes = found.classes
    if names and len(names) != classes:
        raise WeightsError(f"{len(names)} --names for the {classes} classes of {source}")
    in_file = found.names if found.names and len(found.names) == classes else None
    return tuple(names) or tuple(in_file or map(str, range(classes)))


def adopted(
    config: ml_collections.ConfigDict, names: tuple[str, ...], size: str, absent_branch: str = ""
) -> Adopted:
    """A detector with its config and classes.

    Args:
      size: of its images, in words.
      absent_branch: of a detector that has its branches twice, see `weights.branches.absent`.
    """
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    hints = [f"images of {size}"]
    if all(name.isdecimal() for name in names):
        hints.insert(0, "the file does not name its classes: give --names=a,b,c to do so")
    facts = {"absent_branch": absent_branch} if absent_branch else {}
    return Adopted(config, names, facts, f"{len(names)} classes: {shown}", tuple(hints))
