"""State dicts that were changed for inference: batch norms folded, one set of branches left out."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from jaxaccum.accumulate import GroupBatchNorm

State = dict[str, np.ndarray]
_MANY, _ONE = "one-to-many", "one-to-one"  # of a head that has its branches twice


def last_row(keys: Iterable[str]) -> int:
    """The number of the last row of a detector that keys are of; -1 if there is none."""
    rows = (re.match(r"model\.(\d{1,4})\.", key) for key in keys)
    return max((int(row[1]) for row in rows if row), default=-1)


def absent(state: State) -> str:
    """Of a head that has its branches twice: "one-to-one" or "one-to-many" if one set is not there;
    else ""."""
    head = f"model.{last_row(state)}."
    many, one = (
        any(key.startswith(f"{head}{branch}.") for key in state)
        for branch in ("cv3", "one2one_cv3")
    )
    return {(True, False): _ONE, (False, True): _MANY}.get((many, one), "")


def completed(state: State) -> State:
    """The state dict with both sets, the absent one as a copy of the other."""
    head = f"model.{last_row(state)}."
    of, to = f"{head}one2one_", head
    if absent(state) == _ONE:
        of, to = to, of
    made = {
        to + key.removeprefix(of): value
        for key, value in state.items()
        if key.startswith((f"{of}cv2.", f"{of}cv3."))
    }
    return state | made if absent(state) else state


def unfolded(state: State) -> State:
    """The state dict of a detector with the batch norms that were folded into its convolutions:
    each adds what its convolution did, and changes nothing else. Itself if there are none."""
    whole: State = {}
    for key, value in state.items():
        module = key.removesuffix(".conv.bias")
        if module == key or not key.startswith("model.") or f"{module}.bn.weight" in state:
            whole[key] = value
            continue
        ones = np.ones_like(value)
        whole[f"{module}.bn.weight"], whole[f"{module}.bn.bias"] = ones, value
        whole[f"{module}.bn.running_mean"] = 0 * ones
        whole[f"{module}.bn.running_var"] = (1 - GroupBatchNorm.eps) * ones
    return whole if len(whole) > len(state) else state
