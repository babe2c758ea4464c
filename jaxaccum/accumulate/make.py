"""From recipe and geometry to the engine that computes the one on the other."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from jaxaccum.accumulate.engine import AXES, BaseEngine
from jaxaccum.accumulate.multisteps import MultiStepsEngine
from jaxaccum.accumulate.recipe import GeometryError, Window
from jaxaccum.accumulate.scan import ScanEngine
from jaxaccum.accumulate.terms import Forward
from jaxaccum.accumulate.update import UpdateRule


def make_engine(forward: Forward, rule: UpdateRule, window: Window, devices=None) -> BaseEngine:
    """The engine that the geometry asks for.

    Args:
      forward: the task, (params, stats, microbatch, groups) -> Output.
      rule: the recipe's update.
      window: recipe and geometry.
      devices: the devices to use; the first `geometry.devices` of `jax.devices()` if None, those
        of each process together.
    Raises:
      GeometryError: not enough devices, or an engine that cannot compute the recipe.
      ContractError: forward cannot be called so. What it returns is checked before the first
        update (accumulate.checks).
    """
    wanted = window.geometry.devices
    if devices is None:
        devices = sorted(jax.devices(), key=lambda device: device.process_index)[:wanted]
    if len(devices) != wanted:
        raise GeometryError(
            f"the geometry asks for {wanted} devices, but JAX sees {len(jax.devices())} "
            f"({jax.default_backend()}): set devices to at most that"
        )
    parts, span = max(window.geometry.fsdp, window.span), window.span
    grid = np.asarray(list(devices)).reshape(-1, parts // span, span)
    mesh = Mesh(grid, AXES)
    kind = {"scan": ScanEngine, "multisteps": MultiStepsEngine}[window.geometry.engine]
    return kind(forward, rule, window, mesh)
