"""The reference's state-dict keys and layouts, to our parameter paths and back; foreign weights
into a model, also one with other classes.

A parameter's path joined by dots is its key, but for the last word: kernel and scale are both
called weight there. Kernels (..., in, out) are (out, in, ...) there.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum.errors import UserError
from jaxaccum.models import completion, yolo
from jaxaccum.models.families import has_one_to_one
from jaxaccum.weights import branches
from jaxaccum.weights.branches import State, last_row
from jaxaccum.weights.transfer_report import TEXT_LAYER as _TEXT_LAYER
from jaxaccum.weights.transfer_report import Transfer

PyTree = Any
Model = yolo.Yolo | completion.Completion
# Of the values outside the class branch; below it a file is taken for another network's.
_LEAST_SHARE = 0.4
_MOST_NAMES = 100_000
_PLAIN_LAYER = "base_model.mlp_query"  # for queries without captions
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def key_of(path: tuple[str, ...]) -> str:
    """The state-dict key of a parameter or statistic."""
    return ".".join((*path[:-1], _LEAVES.get(path[-1], path[-1])))


def to_reference(tree: PyTree) -> dict[str, np.ndarray]:
    """Parameters, statistics or gradients under the reference's keys, in its layouts."""
    flat = flax.traverse_util.flatten_dict(tree)
    return {
        key_of(path): np.moveaxis(a, (-1, -2), (0, 1)) if path[-1] == "kernel" else np.asarray(a)
        for path, a in flat.items()
    }


def reference_shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf under the reference's keys, in its layouts."""
    found = {}
    for path, leaf in flax.traverse_util.flatten_dict(tree).items():
        h = leaf.shape
        found[key_of(path)] = (*h[:-3:-1], *h[:-2]) if path[-1] == "kernel" else h
    return found


def from_reference(state: Mapping[str, np.ndarray], params: PyTree, stats: PyTree):
    """Fills parameters and statistics from a state dict.

    Args:
      state: key -> array; may hold more than is needed.
      params, stats: trees whose structure, shapes and dtypes are to be filled.
    Returns:
      (params, stats).
    Raises:
      KeyError: a key is missing. ValueError: a shape does not fit.
    """

    def fill(tree):
        flat = flax.traverse_util.flatten_dict(tree)
        new = {}
        for path, old in flat.items():
            key = key_of(path)
            if key not in state:
                raise KeyError(f"the state dict has no {key!r}")
            value = np.asarray(state[key])
            if path[-1] == "kernel" and value.ndim >= 2:
                value = np.moveaxis(value, (0, 1), (-1, -2))
            if value.shape != old.shape:
                raise ValueError(f"{key!r} has shape {value.shape}, the model needs {old.shape}")
            new[path] = value.astype(old.dtype)
        return flax.traverse_util.unflatten_dict(new)

    return fill(params), fill(stats)


class WeightsError(UserError, ValueError):
    """Weights that cannot be read or do not fit; the message says why and what would."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """A state dict under the reference's keys, and what is known of it.

    Attributes:
      state: key -> array, floating values in float32.
      names: class names, None if unknown.
      model: what its source calls the model; "" if it does not say.
      origin: where it is from, for people.
      image_size: side in pixels of the images it was trained on, None if unknown.
      folded: batch norms were part of the convolutions; see `branches.unfolded`.
    """

    state: State
    names: tuple[str, ...] | None = None
    model: str = ""
    origin: str = ""
    image_size: int | None = None
    folded: bool = False

    @property
    def classes(self) -> int:
        """Number of classes.

        Raises:
          WeightsError: there is no class branch.
        """
        if self.class_layer is None:
            raise WeightsError(
                f"{self.origin}: not the weights of a detector we know (no class branch 'cv3' in "
                f"its last row; it begins with {', '.join(map(repr, list(self.state)[:3]))})"
            )
        return self.class_layer.shape[0]

    @property
    def outputs3d(self) -> int:
        """Outputs of the 3D branch; 0 without one."""
        bias = self.state.get(f"model.{last_row(self.state)}.cv4.0.2.bias")
        return 0 if bias is None else len(bias)

    @property
    def class_layer(self) -> np.ndarray | None:
        """The last kernel of the class branch at the finest level, if there is one."""
        row = last_row(self.state)
        for branch in ("cv3", "one2one_cv3"):
            kernel = self.state.get(f"model.{row}.{branch}.0.2.weight")
            if kernel is not None:
                return kernel if kernel.ndim == 4 else None
        return None

    @property
    def known_names(self) -> tuple[str, ...] | None:
        """`names` if they say anything: one per class, and not just numbers."""
        names = self.names
        if not names or all(name.isdecimal() for name in names):
            return None
        if self.class_layer is None or len(names) != len(self.class_layer):
            return None
        return names


def names_from(value: Any) -> tuple[str, ...] | None:
    """Class names from a list, a dict of index -> name, or the JSON of either; else None.

    Raises:
      WeightsError: they are too many or too long to be names of classes.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, dict):
        words = [str(key) for key in value if isinstance(key, str) or _is_short(key)]
        if len(words) < len(value) or not all(re.fullmatch("[0-9]{1,6}", word) for word in words):
            return None
        value = [value[key] for key in sorted(value, key=int)]
    if not isinstance(value, list | tuple):
        return None
    if not all(isinstance(v, str) or _is_short(v) for v in value):
        return None
    # One long name can be in the list many times and take no room in the file.
    if len(value) > _MOST_NAMES or any(isinstance(v, str) and len(v) > 10_000 for v in value):
        raise WeightsError(
            f"{len(value):,} names of classes, or one of over 10,000 characters; expected at most "
            f"{_MOST_NAMES:,} short ones"
        )
    return tuple(map(str, value))


def _is_short(value: Any) -> bool:
    """Whether it is a whole number of at most 18 digits."""
    return isinstance(value, int) and abs(value) < 10**18


@functools.lru_cache(maxsize=16)
def shapes(name: str, classes: int = 0) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and statistic of a model, under the reference's keys."""
    model: Any
    if name in completion.names():
        model = completion.create(name)
        example = jax.ShapeDtypeStruct((1, model.num_input, 3), jnp.float32)
    else:
        model = yolo.Yolo(name, classes)
        example = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), example)
    return reference_shapes(variables["params"]) | reference_shapes(
        variables.get("batch_stats", {})
    )


def _candidates(state: State) -> list[str]:
    """Models that a few of the shapes fit; tracing every model would take minutes."""
    found = []
    last, stem = last_row(state), state.get("model.0.conv.weight")
    every = [*yolo.names(), *yolo.names(in_space=True)]
    for name in every if stem is not None and stem.shape else []:
        family, scale = yolo.parse(name)
        _, _, _, (features, *_) = family.rows[0]
        width = math.ceil(min(features, family.max_channels[scale]) * family.width[scale] / 8) * 8
        if len(family.rows) - 1 == last and stem is not None and width == stem.shape[0]:
            found.append(name)
    coarse = state.get("base_model.coarse_pred.2.weight")
    for name, table in completion.MODELS.items() if coarse is not None else ():
        if coarse is not None and coarse.shape == (3 * table.queries, table.global_width):
            found.append(name)
    return found


def fitting_models(weights: Weights) -> list[tuple[str, float]]:
    """Models that the weights may be of, with the share of their tensors that fit, best first."""
    found = []
    for name in _candidates(weights.state):
        detector = name not in completion.names()
        if detector and weights.class_layer is None:
            continue
        needed = shapes(name, weights.classes if detector else 0)
        state = weights.state
        if has_one_to_one(name):
            state = branches.completed(state)
        fits = sum(k in state and state[k].shape == s for k, s in needed.items())
        found.append((name, fits / len(needed)))
    return sorted(found, key=lambda pair: -pair[1])


def guess_model(weights: Weights) -> str:
    """The model whose tensors are all there, by their shapes.

    Raises:
      WeightsError: there is none, or more than one.
    """
    found = fitting_models(weights)
    whole = [name for name, share in found if share == 1]
    if len(whole) > 1:  # a 3D detector holds a 2D one: the one that leaves less of the file
        sizes = {n: len(shapes(n, weights.classes)) for n in whole if n not in completion.names()}
        whole = [n for n in whole if sizes.get(n, 0) == max(sizes.values(), default=0)]
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise WeightsError(
            f"{weights.origin}: {' and '.join(whole)} have these tensors alike and differ in what "
            "needs none: name the model that it is"
        )
    raise WeightsError(
        f"{weights.origin}: the weights of no model we know"
        + (f", the source calls it {weights.model!r}" if weights.model else "")
        + "".join(f"; {share:.0%} of the tensors of {name} fit" for name, share in found[:1])
    )


def transfer(
    weights: Weights,
    model: Model,
    params: PyTree,
    stats: PyTree,
    names: Sequence[str] = (),
    widen: bool = True,
) -> tuple[PyTree, PyTree, Transfer]:
    """Gives a model the weights that fit; the rest keeps its initial values.

    A tensor is copied if its key and shape are the same. The rows of the last layer of a detector's
    class branch are copied by class name where both sides have names and these differ. The inner
    width of the class branch can depend on the number of classes; where it differs, that branch
    stays at its initial values. A completion network knows no classes.

    A head that has its branches twice, given weights with one set of them, starts with a copy of it
    as the other.

    A network with captions that is given weights of one without starts as that: its layer for
    queries with captions is the other with zero columns for the caption.

    Args:
      weights: what there is.
      model: the model that is to be filled.
      params, stats: its initial values.
      names: a detector's classes.
      widen: do so; else that layer stays at its initial values.
    Returns:
      (params, stats, report).
    Raises:
      WeightsError: hardly anything fits, or a value is not finite.
    """
    weights, absent = _with_both_branches(weights, model)
    classes, rows = _class_branch(model)
    row_of, layer = _rows_by_name(weights, names), weights.class_layer
    state = weights.state
    left: dict[str, str] = {}
    loaded, remapped, values = [], [], {}
    initial = to_reference(params) | to_reference(stats)
    wide = _widened(state, initial, model) if widen else {}
    sizes = {True: 0, False: 0}  # values outside the class branch, by whether they were loaded
    for key, old in initial.items():
        new = state.get(key)
        if new is not None:
            _require_finite(weights.origin, key, new)
        fits = new is not None and new.shape == old.shape
        if key in wide:
            values[key] = wide[key]
        elif new is None:
            left[key] = "not in the file"
        elif rows.fullmatch(key) and _same_inputs(weights, initial, key) and (row_of or not fits):
            if row_of is None:
                left[key] = (
                    f"the classes are not the same ({len(new)} there, {len(old)} here) and the "
                    "file does not name its own"
                )
            elif not any(i is not None for i in row_of):
                left[key] = "no class of the file has the name of one here"
            else:
                values[key] = np.stack([old[j] if i is None else new[i]
                                        for j, i in enumerate(row_of)])  # fmt: skip
                remapped.append(key)
        elif fits:
            values[key] = new
            loaded.append(key)
        elif classes.match(key):
            left[key] = (
                "the width of the class branch follows the number of classes "
                f"({len(names)} here{'' if layer is None else f', {len(layer)} there'})"
            )
        else:
            left[key] = "of another shape in the file"
        if not classes.match(key):
            sizes[key in values] += old.size
    share = sizes[True] / max(sum(sizes.values()), 1)
    hint = _hint(weights, model) if any(not classes.match(key) for key in left) else ""
    if share < _LEAST_SHARE:
        raise WeightsError(
            f"{weights.origin}: only {share:.1%} of the values of {model.model} "
            f"{'outside its class branch ' if isinstance(model, yolo.Yolo) else ''}"
            f"are there in the same shape; {hint or 'no model we know fits it'}"
        )
    carried = [name for name, i in zip(names, row_of or [], strict=False) if i is not None]
    unused = set(state) - set(values) - set(left)
    report = Transfer(
        weights.origin, tuple(loaded), tuple(remapped), left,
        tuple(k for k in state if k in unused and not k.endswith(_FIXED)),
        tuple(carried) if remapped else (),
        tuple(n for n in names if n not in carried) if remapped else (),
        sum(values[k].size for k in loaded) / max(_size(params) + _size(stats), 1),
        hint,
        tuple(wide),
        absent,
        weights.folded,
    )  # fmt: skip

    def fill(tree):
        return from_reference(to_reference(tree) | values, tree, {})[0]

    return fill(params), fill(stats), report


def _hint(weights: Weights, model: Model) -> str:
    """Which other model the weights fit whole, if any."""
    better = [name for name, fit in fitting_models(weights) if fit == 1]
    return f"the file fits {better[0]} whole" if better and better[0] != model.model else ""


def _with_both_branches(weights: Weights, model: Model) -> tuple[Weights, str]:
    """The weights with a set of branches that they do not have as a copy of the other, for a head
    that has both; and which it was."""
    if not isinstance(model, yolo.Yolo) or not has_one_to_one(model.model):
        return weights, ""
    absent = branches.absent(weights.state)
    return dataclasses.replace(weights, state=branches.completed(weights.state)), absent


def _rows_by_name(weights: Weights, names: Sequence[str]) -> list[int | None] | None:
    """The row of the weights' last class layer for each class here, None for a class that they do
    not have; None where rows keep their places: names are the same or unknown."""
    theirs = weights.known_names
    ours = [_comparable(name) for name in names]
    if theirs is None or ours == [_comparable(name) for name in theirs]:
        return None
    index = {_comparable(name): i for i, name in reversed(list(enumerate(theirs)))}
    return [index.get(name) for name in ours]


def _require_finite(origin: str, key: str, new: np.ndarray) -> None:
    if new.dtype.kind != "f":
        raise WeightsError(f"{origin}: {key!r} holds {new.dtype}, expected numbers with fractions")
    if not np.isfinite(new).all():
        raise WeightsError(f"{origin}: {key!r} holds values that are not finite")


def _same_inputs(weights: Weights, initial: State, key: str) -> bool:
    """Whether the rows of a last class layer read features of the same width."""
    state, kernel = weights.state, f"{key.rpartition('.')[0]}.weight"
    return (
        kernel in state
        and state[kernel].shape[1:] == initial[kernel].shape[1:]
        and state[key].shape == (weights.classes, *initial[key].shape[1:])
    )


def _widened(state: State, initial: State, model: Model) -> State:
    """Tensors of the layer for queries with captions made from those of the layer without, for
    weights that have the latter alone and of the same widths."""
    if not isinstance(model, completion.Completion) or not model.text_width:
        return {}
    if any(key.startswith(f"{_TEXT_LAYER}.") for key in state):
        return {}
    before = model.table.global_width  # columns before those of the caption
    made = {}
    for key, old in initial.items():
        if not key.startswith(f"{_TEXT_LAYER}."):
            continue
        new = state.get(key.replace(_TEXT_LAYER, _PLAIN_LAYER))
        if new is not None and key == f"{_TEXT_LAYER}.0.weight" and new.ndim == 2:
            blank = np.zeros((len(new), model.text_width), new.dtype)
            new = np.concatenate([new[:, :before], blank, new[:, before:]], axis=1)
        if new is None or new.shape != old.shape:
            return {}
        made[key] = new
    return made


def text_width(weights: Weights) -> int:
    """Numbers of the caption's vector that the weights of an AdaPoinTr read; 0 without captions."""
    text, plain = (weights.state.get(f"{n}.0.weight") for n in (_TEXT_LAYER, _PLAIN_LAYER))
    if text is None or plain is None or text.ndim != 2 or plain.ndim != 2:
        return 0
    return max(text.shape[1] - plain.shape[1], 0)


def _class_branch(model: Model) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What the keys of a model's class branch look like, and those of its last layer."""
    if not isinstance(model, yolo.Yolo):
        return re.compile(r"(?!)"), re.compile(r"(?!)")
    branch = rf"model\.{len(yolo.parse(model.model)[0].rows) - 1}\.(?:one2one_)?cv3\."
    return re.compile(branch), re.compile(branch + r"\d+\.2\.(weight|bias)")


def _size(tree: PyTree) -> int:
    return sum(np.size(leaf) for leaf in jax.tree.leaves(tree))


def _comparable(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


_FIXED = (".num_batches_tracked", ".dfl.conv.weight")


def for_pytorch(model: Model, params: PyTree, stats: PyTree, updates: int = 0) -> State:
    """The whole state dict of the reference's module, for its strict loading.

    Beside parameters and statistics it holds what never changes here: the number of batches that
    each batch norm has seen (`updates`), and the bins of a detector's box distribution, if it has
    one.
    """
    state = to_reference(params) | to_reference(stats)
    whole: State = {}
    for key, value in state.items():
        whole[key] = np.ascontiguousarray(value)
        if key.endswith(".running_var"):
            tracked = key.removesuffix("running_var") + "num_batches_tracked"
            whole[tracked] = np.asarray(updates, np.int64)
    if not isinstance(model, yolo.Yolo):
        return whole
    family, _ = yolo.parse(model.model)
    if family.bins == 1:
        return whole
    head = len(family.rows) - 1
    bins = np.arange(yolo.REG_MAX, dtype=np.float32).reshape(1, yolo.REG_MAX, 1, 1)
    return whole | {f"model.{head}.dfl.conv.weight": bins}
