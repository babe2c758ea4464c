"""What became of the tensors of a model that was given foreign weights, for people."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

TEXT_LAYER = "base_model.mlp_query_text"  # for queries with captions
# What checkpoints with captions hold beside the network.
_BESIDE = re.compile(
    r"(base_model\.text_(?:encoder|query_generator)|ulip_loss_(?:module\.)?ulip_encoder)\..+"
)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What became of the tensors of a model that was given foreign weights.

    Attributes:
      origin: of the weights.
      loaded: keys copied whole.
      remapped: keys of which the rows of `carried` classes were copied by name.
      left: key -> why it stays at its initial value.
      unused: keys of the weights that the model does not have.
      carried, new: names of the model's classes, where rows were copied by name.
      share: of the model's values that were loaded, 0..1.
      hint: what fits the weights better, if anything.
      widened: keys of the layer for queries with captions that start as those of the layer without,
        the columns of the caption at zero.
      absent_branch: of the two that the head has, the set that the weights do not: "one-to-one" or
        "one-to-many"; it starts as a copy of the other.
      folded: see `Weights`.
    """

    origin: str
    loaded: tuple[str, ...]
    remapped: tuple[str, ...]
    left: dict[str, str]
    unused: tuple[str, ...]
    carried: tuple[str, ...]
    new: tuple[str, ...]
    share: float
    hint: str = ""
    widened: tuple[str, ...] = ()
    absent_branch: str = ""
    folded: bool = False

    @property
    def complete(self) -> bool:
        """Whether every tensor was copied whole; a set of branches that the weights do not have,
        from the other."""
        return not self.left and not self.remapped and not self.widened

    def lines(self) -> list[str]:
        """The report, for people."""
        total = len(self.loaded) + len(self.remapped) + len(self.left) + len(self.widened)
        lines = [
            f"weights from {self.origin}: {len(self.loaded)} of {total} tensors loaded, "
            f"{self.share:.1%} of the values"
        ]
        if self.remapped:
            lines.append(
                f"  copied by class name in {_stems(self.remapped)}: {listed(self.carried)}"
                + (f"; at their initial values: {listed(self.new)}" if self.new else "")
            )
        if self.widened:
            lines.append(
                f"  as without captions until it learns to read them: {_stems(self.widened)}"
            )
        reasons: dict[str, list[str]] = {}
        for key, reason in self.left.items():
            reasons.setdefault(reason, []).append(key)
        for reason, keys in reasons.items():
            lines.append(f"  left at initial values, {reason}: {_stems(keys)}")
        if self.unused:
            lines.append(f"  not used of the file: {_stems(self.unused)}")
        if any(key.startswith(f"{TEXT_LAYER}.") for key in self.loaded) and any(
            key.startswith("base_model.text_encoder.") for key in self.unused
        ):
            lines.append(
                "  the file brings its own caption encoder, parts of which its authors' code drew "
                f"anew after loading CLIP: {TEXT_LAYER} knows its vectors, not those of CLIP"
            )
        if self.absent_branch:
            lines.append(
                f"  the file has no {self.absent_branch} branch: it starts as a copy of the other, "
                "and is to be trained before it is used"
            )
        if self.folded:
            lines.append(
                "  batch norms were folded into the convolutions of the file: the network computes "
                "what it did, but trained by batch statistics it starts elsewhere; bn_group=frozen "
                "goes on from there"
            )
        if self.hint:
            lines.append(f"  {self.hint}")
        return lines


def listed(words: Sequence[str], most: int = 12) -> str:
    """The first so many words, and how many more there are."""
    more = len(words) - most
    return ", ".join(words[:most]) + (f" and {more} more" if more > 0 else "")


def _stems(keys: Iterable[str]) -> str:
    """The modules that keys belong to; whole networks beside a completion network by one name."""
    stems = (re.sub(r"(\.(conv|bn))?\.\w+$", "", key) for key in keys)
    return listed(list(dict.fromkeys(_BESIDE.sub(r"\1", stem) for stem in stems)), 16)
