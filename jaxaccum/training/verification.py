"""A run's own law, checked before it starts: its first update on two geometries, in float64."""

from __future__ import annotations

import jax
import ml_collections
import numpy as np

from jaxaccum import config as configs
from jaxaccum.accumulate import Geometry
from jaxaccum.accumulate.equivalence import Verdict, verify
from jaxaccum.accumulate.recipe import Engine
from jaxaccum.errors import TrainingError
from jaxaccum.machine.waiting import waiting
from jaxaccum.training import run
from jaxaccum.training.distributed import Peers


def require_law(config: ml_collections.ConfigDict, peers: Peers) -> Verdict:
    """Computes the first effective batch of a run twice, and refuses a run that breaks the law.

    One geometry is the run's own with half its microbatch, as float64 takes twice the memory, but
    two batch-norm groups at least; where a group spans devices, it is the run's own. The other has
    a microbatch of one group, one device and the other engine. The weights are new ones, whatever
    `init_from` says. Costs two compilations and four updates, about.

    Args:
      config: of the run.
      peers: its processes.
    Raises:
      ConfigError: with compat, several processes or a TPU there is nothing to compare, or no way.
      TrainingError: the geometries are two runs; shows how far they are apart.
    """
    if configs.is_compat(config):
        raise configs.ConfigError("--verify: with compat the geometry changes what is learned")
    if not peers.alone:
        raise configs.ConfigError(
            "--verify is for one process: start the same config there with --config.steps=1, or "
            "use scripts/equivalence.py, which starts several"
        )
    if jax.default_backend() == "tpu":
        raise configs.ConfigError(
            "--verify compares in float64, which a TPU only imitates: start it with "
            "JAX_PLATFORMS=cpu and --config.steps=1"
        )
    source = run.open_source(config, "train")
    config, _ = run.settled(config, source)
    with jax.enable_x64(True):
        own = config.copy_and_resolve_references()
        with own.unlocked(), own.ignore_type():  # "auto" is a text
            own.update(dtype="float64", microbatch=_half(config))
            own.log.noise_scale = False  # needs several steps, and is not compared
        this = run.prepare(own, names=source.names, samples=len(source), identity={})
        geometry, smallest = this.window.geometry, this.recipe.group or 1
        other: Engine = "multisteps" if geometry.engine == "scan" else "scan"
        (batch,) = run.make_stream(this, source).windows(0, [this.size_of(0)])
        params, stats = this.task.initialise(config.seed, np.float64)
        with waiting("computing the first update on two geometries"):
            found = verify(
                this.forward, this.rule, this.recipe, params, stats, batch,
                [geometry, Geometry(smallest, 1, other)],
            )  # fmt: skip
    if not found.ok:
        raise TrainingError(f"--verify: the geometry changes what is learned here.\n{found}")
    return found


def _half(config: ml_collections.ConfigDict) -> int:
    """Half the microbatch in whole groups, but two groups, where the effective batch has two; a
    microbatch smaller than a group is left as it is."""
    group = min({"all": config.nbs, "frozen": 1}.get(config.bn_group, config.bn_group), config.nbs)
    if config.microbatch != "auto" and config.microbatch < group:
        return config.microbatch
    groups = 2 if config.microbatch == "auto" else max(config.microbatch // 2 // group, 2)
    return min(groups, -(-config.nbs // group)) * group
