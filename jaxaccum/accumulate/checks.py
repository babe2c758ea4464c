"""Whether a forward keeps the contract that the law rests on, told from shapes before it compiles.

An engine calls `check` once, before its first program. What cannot be seen in shapes (noise drawn
by place, padding that is not masked, groups of another size) shows in `accumulate.verify`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from jaxaccum.accumulate import in_time, owners
from jaxaccum.accumulate.batchnorm import Groups
from jaxaccum.accumulate.terms import Forward, Grouped, Objective, Output

PyTree = Any
MOMENTS = {"count", "first", "second"}
STATISTICS = {"mean", "var"}


class ContractError(ValueError):
    """A forward, a batch or statistics with which the law would not hold; says what to change."""


def grouped(forward: Forward, group: int | None, microbatches: int = 1) -> Grouped:
    """A forward as a function of (params, stats, microbatch), given the recipe's groups.

    Args:
      group: `Recipe.group`.
      microbatches: of a group on one device, see `Groups`.
    Raises:
      ContractError: forward does not take four arguments.
    """
    try:
        inspect.signature(forward).bind(None, None, None, None)
    except TypeError as error:
        raise ContractError(
            f"forward is called as forward(params, stats, microbatch, groups), and cannot be "
            f"({error}). groups says how samples share batch statistics (accumulate.Groups, to be "
            "given to accumulate.GroupBatchNorm; None with bn_group 'frozen'): take it also where "
            "no layer needs it"
        ) from None
    except ValueError:  # some callables have no signature
        pass

    def with_groups(params: PyTree, stats: PyTree, microbatch: PyTree) -> Output:
        groups = None
        if group is not None:
            groups = Groups(group, microbatch["weight"], microbatches)
        return forward(params, stats, microbatch, groups)

    return with_groups


def check_batch(batch: PyTree) -> None:
    """Refuses a batch that cannot be divided into microbatches.

    Args:
      batch: arrays or shapes with a leading axis of samples.
    Raises:
      ContractError: it is no dict with `weight`, or its leaves differ in their samples.
    """
    if not isinstance(batch, Mapping):
        raise ContractError(
            f"a batch is a dict of arrays with a leading axis of samples, one of them 'weight'; "
            f"got {type(batch).__name__}"
        )
    if "weight" not in batch:
        raise ContractError(
            f"the batch has {_listed(batch)} but no 'weight'. Add it: (samples,) float, 1 for "
            "every sample. Those that fill up the last microbatch get 0; forward has to multiply "
            "what it sums by it"
        )
    weight = batch["weight"]
    shape, dtype = jnp.shape(weight), getattr(weight, "dtype", None)
    if len(shape) != 1 or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ContractError(
            f"batch['weight'] is {_described(weight)}; expected a float for each sample, (samples,)"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(batch)):
        if jnp.shape(leaf)[:1] != shape:
            raise ContractError(
                f"batch{jax.tree_util.keystr(path)} is {_described(leaf)}, but batch['weight'] has "
                f"{shape[0]} samples: every array of a batch has samples as its first axis. What "
                "is the same for all of them belongs into params, or into forward itself"
            )


def check(
    forward: Grouped,
    objective: Objective,
    params: PyTree,
    stats: PyTree,
    batch: PyTree,
) -> None:
    """Refuses what would make the update depend on the geometry, or fail far from its cause.

    Traces a directional derivative of `forward`, and with owners its backward pass, and looks for
    paths in them; compiles and computes nothing.

    Args:
      forward: as `Forward`, its groups given.
      objective: whose sums it makes.
      params, stats, batch: arrays or shapes; the batch is of whole groups.
    Raises:
      ContractError: says which part of the contract is not kept, and what to do.
    """
    check_batch(batch)

    def derivative(params, stats, batch, tangent):
        return jax.jvp(lambda p: forward(p, stats, batch), (params,), (tangent,))

    jaxpr, shapes = jax.make_jaxpr(derivative, return_shape=True)(params, stats, batch, params)
    out = shapes[0]
    samples = jnp.shape(batch["weight"])[0]
    _check_output(out, objective, samples)
    _check_moments(out.moments, stats)

    inputs = jax.tree_util.tree_leaves_with_path((params, stats, batch, params))
    outputs = jax.tree_util.tree_leaves_with_path(shapes)
    firsts = {0: "params", 1: "stats", 2: "batch", 3: "tangent"}
    kinds = [firsts[path[0].idx] for path, _ in inputs]

    def reaching(wanted: list[bool]) -> list[bool]:
        """Of each input whether one of the wanted outputs depends on it."""
        return partial_eval.dce_jaxpr(jaxpr.jaxpr, wanted)[1]

    guilty = []
    for name in sorted(out.denominators):
        used = reaching([_names(path) == ["1", "denominators", name] for path, _ in outputs])
        if any(u and kind == "tangent" for u, kind in zip(used, kinds, strict=True)):
            guilty.append(name)
    if guilty:
        raise ContractError(
            f"the denominators {guilty} carry a gradient; a denominator is a constant of the "
            "update: put jax.lax.stop_gradient around what it is computed from"
        )
    used = reaching([path[0].idx == 0 for path, _ in outputs])
    unused = [
        _names(path)[1:]
        for (path, _), kind, is_used in zip(inputs, kinds, used, strict=True)
        if kind == "stats" and not is_used
    ]
    moving = {
        tuple(_names(path)[:-1]) for path, _ in jax.tree_util.tree_leaves_with_path(out.moments)
    }
    layers = sorted({tuple(names[:-1]) for names in unused if names[-1] in STATISTICS} - moving)
    if layers:
        raise ContractError(
            "nothing that forward returns depends on the running statistics of "
            f"{_some('/'.join(layer) or 'stats' for layer in layers)}, and it returns no moments "
            "to move them by. So that layer normalises by the microbatch it is given, as "
            "flax.linen.BatchNorm and flax.nnx.BatchNorm do in training, and the loss would depend "
            "on the microbatch. Use accumulate.GroupBatchNorm with the groups that forward is "
            "given and return its moments, or normalise by the running statistics"
        )
    if objective.owner is not None:
        _check_owners(forward, objective, params, stats, batch)


def check_in_time(
    forward: Forward, group: int, microbatch: int, params: PyTree, stats: PyTree, batch: PyTree
) -> None:
    """Refuses a forward that does not add up over groups of several microbatches.

    Args:
      group, microbatch: in samples.
      params, stats, batch: arrays or shapes, the batch a microbatch.
    Raises:
      ContractError: it moves running statistics, and nothing in it is summed over a group.
    """
    parts = grouped(forward, group, -(-group // microbatch))  # as on one device
    jaxpr, out = jax.make_jaxpr(parts, return_shape=True)(params, stats, batch)
    if jax.tree.leaves(out.moments) and not in_time.has_sums(jaxpr.jaxpr):
        raise ContractError(
            "the batch-norm groups of this geometry lie in several microbatches "
            "(groups.microbatches), and forward adds nothing up over them. Give the groups as they "
            "are to accumulate.GroupBatchNorm or accumulate.batchnorm.normalise, and make no "
            "Groups of your own; or use a microbatch of whole groups"
        )


def _check_owners(forward: Grouped, objective: Objective, params, stats, batch) -> None:
    """Refuses owners of which a parameter learns from the terms of another denominator."""
    assert objective.owner is not None
    names = list(objective.floors)
    paths = [owners.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    owned = [objective.owner(path) for path in paths]
    for path, name in zip(paths, owned, strict=True):
        if name not in names:
            raise ContractError(
                f"owner gives {name!r} for the parameter {path}; expected one of the objective's "
                f"denominators, {_listed(names)}"
            )

    def pulled(params, stats, batch, cotangents):
        totals, pull_back, _ = objective.pullback(forward, params, stats, batch)
        return pull_back({k: cotangents[k].astype(v.dtype) for k, v in totals.items()})

    cotangents = dict.fromkeys(names, jax.ShapeDtypeStruct((), jnp.float32))
    jaxpr = jax.make_jaxpr(pulled)(params, stats, batch, cotangents)
    own = {name: 1 << i for i, name in enumerate(names)}
    others = len(jaxpr.jaxpr.invars) - len(names)
    marks = owners.reached(jaxpr.jaxpr, [0] * others + [own[name] for name in sorted(names)])
    for path, name, mark in zip(paths, owned, marks, strict=True):
        foreign = [other for other in names if mark & own[other] & ~own[name]]
        if foreign:
            raise ContractError(
                f"the parameter {path} belongs to the denominator {name!r}, but the backward pass "
                f"of the terms over {foreign[0]!r} leads to it, too: with owners a parameter "
                "learns from the terms of one denominator. Put jax.lax.stop_gradient around what "
                "those terms are to leave alone, give it another owner, or leave owner out: then "
                "every denominator has an accumulator and a backward pass of its own"
            )


def _check_output(out: Any, objective: Objective, samples: int) -> None:
    if not isinstance(out, Output):
        raise ContractError(
            f"forward returned {_kind(out)}; expected accumulate.Output(numerators, denominators, "
            "moments)"
        )
    terms = {term.name for term in objective.terms}
    _check_names("numerators", "terms", out.numerators, terms)
    _check_names("denominators", "denominators", out.denominators, set(objective.floors))
    for kind in ("numerators", "denominators"):
        for name, value in getattr(out, kind).items():
            if jnp.shape(value) != ():
                raise ContractError(
                    f"{kind}[{name!r}] is {_described(value)}; expected one number: the sum over "
                    "the samples of the microbatch, each times its weight"
                )
    for name, value in out.numerators.items():
        if value.dtype not in (jnp.float32, jnp.float64):
            raise ContractError(
                f"numerators[{name!r}] is {value.dtype}; sums are made in float32 or float64: "
                "convert what is summed first, as in jnp.sum(values.astype(jnp.float32))"
            )
    if not objective.coupled:
        return
    features = jax.tree_util.tree_leaves_with_path(out.features)
    if not features:
        raise ContractError(
            f"the objective has coupled terms ({_some(t.name for t in objective.coupled)}) and "
            "forward returned no features for them: give Output(..., features=...), leaves "
            "(samples, ...)"
        )
    for path, leaf in features:
        if jnp.shape(leaf)[:1] != (samples,):
            raise ContractError(
                f"features{jax.tree_util.keystr(path)} is {_described(leaf)} for a microbatch of "
                f"{samples}: every feature has samples as its first axis"
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ContractError(
                f"features{jax.tree_util.keystr(path)} is {leaf.dtype}; features are "
                "differentiated: make them floating point, as in ids.astype(jnp.float32)"
            )


def _check_names(kind: str, of: str, found: Any, wanted: set[str]) -> None:
    if not isinstance(found, Mapping):
        raise ContractError(f"{kind} is {_kind(found)}; expected a dict, name -> scalar")
    names = set(found)
    if names == wanted:
        return
    missing, more = sorted(wanted - names), sorted(names - wanted)
    said = [f"{kind} of forward are {_listed(names)}, the objective's {of} are {_listed(wanted)}"]
    for name in more:
        close = difflib.get_close_matches(name, missing, 1)
        said.append(
            f"{name!r} is meant to be {close[0]!r}?" if close
            else f"{name!r} would be computed and never used: name it in the objective, or leave "
            "it out of forward"
        )  # fmt: skip
    if missing and not more:
        said.append(f"return {_listed(missing)} as well, 0 where there is nothing to sum")
    raise ContractError(". ".join(said))


def _check_moments(moments: PyTree, stats: PyTree) -> None:
    """Moments of layers that have running statistics, in the form of `batchnorm.moments`."""
    if not isinstance(moments, Mapping):
        raise ContractError(
            f"moments is {_kind(moments)}; expected the dict of collection 'moments' that "
            "accumulate.GroupBatchNorm writes, or {}"
        )

    def walk(moments: Mapping[str, Any], stats: Any, path: str) -> None:
        names = set(moments)
        if names == MOMENTS:
            if not (isinstance(stats, Mapping) and set(stats) == STATISTICS):
                raise ContractError(
                    f"moments{path} has no running statistics to move: stats{path} is "
                    f"{_listed(stats) if isinstance(stats, Mapping) else type(stats).__name__}, "
                    "expected mean and var. Return moments nested as the statistics are"
                )
            for name in ("first", "second"):
                if jnp.shape(moments[name]) != jnp.shape(stats["mean"]):
                    raise ContractError(
                        f"moments{path}[{name!r}] is {_described(moments[name])}, but the running "
                        f"mean is {_described(stats['mean'])}"
                    )
            return
        for name, value in moments.items():
            if not isinstance(value, Mapping):
                raise ContractError(
                    f"moments{path} has {_listed(names)}; expected count, first and second of each "
                    "layer (accumulate.batchnorm.moments), which add up. A mean and a variance do "
                    "not: the collection 'batch_stats' of flax.linen.BatchNorm is no moments"
                )
            if not (isinstance(stats, Mapping) and name in stats):
                raise ContractError(
                    f"moments{path} has {name!r}, but stats{path} has "
                    f"{_listed(stats) if isinstance(stats, Mapping) else 'nothing'}: moments are "
                    "nested as the running statistics are"
                )
            walk(value, stats[name], f"{path}[{name!r}]")

    walk(moments, stats, "")


def _names(path: Any) -> list[str]:
    """The steps of a path into a tree, as text."""
    return [
        str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path
    ]


def _kind(value: Any) -> str:
    return _described(value) if isinstance(value, jax.ShapeDtypeStruct) else type(value).__name__


def _described(leaf: Any) -> str:
    return f"{getattr(leaf, 'dtype', type(leaf).__name__)} {jnp.shape(leaf)}"


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, names))) or "none"


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
