"""Recipe and geometry: what is learned, and how it is computed.

A recipe fixes the training run. A geometry fixes only its seconds and its bytes. A window is
the two put together: which sample of an update is computed in which microbatch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

Group = int | Literal["all", "frozen"]
Engine = Literal["scan", "multisteps"]


class GeometryError(ValueError):
    """The geometry cannot compute the recipe; the message says which one could."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What decides the update.

    Attributes:
      nbs: the effective batch, in samples per update.
      bn_group: consecutive samples of the effective batch that share batch statistics; "all" for
        the whole effective batch, "frozen" for the running statistics.
      settings: everything else that is learned from (loss, optimizer, schedule, data, seed ...),
        as plain JSON values. Only its fingerprint is used here.
    """

    nbs: int
    bn_group: Group
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.nbs, int) or self.nbs < 1:
            raise ValueError(f"nbs is the effective batch, a positive integer; got {self.nbs!r}")
        group = self.bn_group
        if group not in ("all", "frozen") and (not isinstance(group, int) or group < 1):
            raise ValueError(f"bn_group is a number of samples, 'all' or 'frozen'; got {group!r}")

    @property
    def group(self) -> int | None:
        """Samples that share batch statistics; None when the running statistics are used."""
        if self.bn_group == "frozen":
            return None
        return self.nbs if self.bn_group == "all" else min(int(self.bn_group), self.nbs)

    def as_dict(self) -> dict[str, Any]:
        """Every field of the recipe as plain JSON values, nested as in the config."""
        plain = {"nbs": self.nbs, "bn_group": self.bn_group, **self.settings}
        return json.loads(json.dumps(plain, sort_keys=True))

    @property
    def fingerprint(self) -> str:
        """Eight hex digits; two runs with one fingerprint have one curve."""
        text = json.dumps(self.as_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def differences(self, other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Fields (dotted) whose values differ from `other`, an `as_dict()`: (other's, ours)."""
        theirs, ours = _flatten(other), _flatten(self.as_dict())
        return {
            key: (theirs.get(key), ours.get(key))
            for key in sorted(theirs.keys() | ours.keys())
            if theirs.get(key) != ours.get(key)
        }

    def __str__(self) -> str:
        return f"recipe {self.fingerprint}: effective batch {self.nbs}, bn_group {self.bn_group}"


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What decides only time and memory.

    Attributes:
      microbatch: samples in one forward and backward pass on one device.
      devices: number of devices that share an update.
      engine: "scan" (one jitted call per update) or "multisteps" (one per microbatch).
      fsdp: devices that divide the parameters, the optimizer's state and the moving average among
        themselves, instead of each holding all; it divides `devices`.
      offload: whether what a group of several microbatches keeps for later (accumulate.in_time)
        lies in the host's memory; other groups keep nothing.
    """

    microbatch: int
    devices: int = 1
    engine: Engine = "scan"
    fsdp: int = 1
    offload: bool = False

    def __post_init__(self):
        if self.engine not in ("scan", "multisteps"):
            raise GeometryError(f"engine is 'scan' or 'multisteps'; got {self.engine!r}")
        for name in ("microbatch", "devices", "fsdp"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise GeometryError(f"{name} is a positive integer; got {value!r}")
        if self.devices % self.fsdp:
            fits = [n for n in range(2, self.devices + 1) if self.devices % n == 0]
            raise GeometryError(
                f"fsdp {self.fsdp} does not divide {self.devices} "
                f"{'device' if self.devices == 1 else 'devices'}: "
                + (f"set it to {' or '.join(map(str, fits))}, or 1" if fits else "set it to 1")
            )
        if self.fsdp > 1 and self.engine != "scan":
            raise GeometryError(
                "fsdp is for the scan engine: optax.MultiSteps holds an accumulator on every "
                "device. Set engine to 'scan', or fsdp to 1"
            )


@dataclasses.dataclass(frozen=True)
class Window:
    """The microbatches of one update: a recipe laid out on a geometry.

    Sample i of the effective batch is computed in microbatch i // (microbatch * devices), on
    device (i // microbatch) % devices. The last microbatches are filled up with samples of
    weight zero. A batch-norm group lies in one microbatch, on `span` neighbouring devices, or in
    `together` microbatches that follow one another on all devices (accumulate.in_time).

    Raises:
      GeometryError: a batch-norm group would begin or end within a microbatch.
    """

    recipe: Recipe
    geometry: Geometry

    def __post_init__(self):
        group, microbatch = self.recipe.group, self.geometry.microbatch
        fsdp, devices = self.geometry.fsdp, self.geometry.devices
        if group is None or microbatch % group == 0:
            return
        parts, rest = divmod(group, microbatch)  # of a group: microbatches of one device
        fits = not rest and (devices % parts == 0 or parts % devices == 0)
        if fits or self._is_one_group:
            if fsdp > 1 and fsdp % self.span:
                raise GeometryError(
                    f"a group of {group} samples lies on {self.span} devices, and fsdp {fsdp} is "
                    f"not a multiple of that: set fsdp to {self.span * max(fsdp // self.span, 1)}"
                )
            return
        near = [m for m in range(1, group) if group % m == 0]
        near = [m for m in near if devices % (group // m) == 0 or (group // m) % devices == 0]
        near = sorted(near, key=lambda m: abs(m - microbatch))[:2]
        sizes = [*map(str, sorted(near)), f"a multiple of {group}"]
        smaller = [g for g in range(min(group, microbatch), 0, -1) if microbatch % g == 0][:1]
        raise GeometryError(
            f"microbatch {microbatch} on {devices} {'device' if devices == 1 else 'devices'} would "
            f"cut a group of {group} samples (bn_group {self.recipe.bn_group}) within a "
            f"microbatch: take {' or '.join(sizes)}, or change the recipe to bn_group {smaller[0]} "
            "or 'frozen' (that is another training run)."
        )

    @property
    def _is_one_group(self) -> bool:
        """Whether all samples of the window share statistics, wherever they are computed."""
        width = self.geometry.microbatch * self.geometry.devices
        return self.recipe.group == self.recipe.nbs > width

    @property
    def together(self) -> int:
        """Microbatches that follow one another on a device and share a batch-norm group."""
        width = self.geometry.microbatch * self.geometry.devices
        return max(-(-(self.recipe.group or 1) // width), 1)

    @property
    def span(self) -> int:
        """Devices that a batch-norm group lies on."""
        parts = (self.recipe.group or 1) // self.geometry.microbatch
        return min(max(parts, 1), self.geometry.devices)

    @property
    def steps(self) -> int:
        """Accumulation steps: microbatches per device per update, of whole groups."""
        width = self.geometry.microbatch * self.geometry.devices
        return -(-self.recipe.nbs // (width * self.together)) * self.together

    @property
    def padding(self) -> int:
        """Samples of weight zero that fill up the last microbatches."""
        return self.steps * self.geometry.microbatch * self.geometry.devices - self.recipe.nbs

    def share(self, devices: range) -> np.ndarray:
        """Samples of the effective batch that some of the devices compute, in order: (n,) int."""
        return np.unique(self._places(devices) % self.recipe.nbs)

    def _places(self, devices: range) -> np.ndarray:
        """What some devices compute: (steps, microbatch * devices) places in the effective batch,
        of which those from `nbs` on are padding."""
        microbatch = self.geometry.microbatch
        width = microbatch * self.geometry.devices
        columns = np.arange(devices.start * microbatch, devices.stop * microbatch)
        return np.arange(self.steps)[:, None] * width + columns

    def split_share(self, batch: Mapping[str, Any], devices: range) -> Any:
        """The columns of `split` that some of the devices compute.

        Args:
          batch: like that of `split`, with the samples of `share(devices)` only.
        Raises:
          GeometryError: it holds another number of samples.
        """
        share, places = self.share(devices), self._places(devices)
        if len(batch["weight"]) != len(share):
            raise GeometryError(
                f"{len(batch['weight'])} samples, but devices {devices.start} to "
                f"{devices.stop - 1} compute {len(share)} of {self.recipe.nbs}"
            )
        rows = np.searchsorted(share, places % self.recipe.nbs)
        laid = jax.tree.map(lambda array: np.asarray(array)[rows], dict(batch))
        real = places < self.recipe.nbs
        return laid | {"weight": np.where(real, laid["weight"], 0).astype(laid["weight"].dtype)}

    def split(self, batch: Mapping[str, Any]) -> Any:
        """Lays an effective batch out as microbatches.

        Args:
          batch: pytree of host arrays with a leading axis of at most `nbs` samples; `weight` is 1
            for a real sample.
        Returns:
          the same pytree with leading axes (steps, microbatch * devices), filled up with samples
          of weight 0. They repeat real ones: a blank image, normalised by the statistics of
          others in its group, can overflow in a deep network.
        """
        width = self.geometry.microbatch * self.geometry.devices
        room, samples = self.steps * width, len(batch["weight"])
        if samples > room:
            raise GeometryError(f"{samples} samples do not fit into {self.steps} x {width}")
        place = np.arange(room)

        def lay(array):
            array = np.asarray(array)
            array = array if samples == room else array[place % samples]
            return array.reshape(self.steps, width, *array.shape[1:])

        laid = jax.tree.map(lay, dict(batch))
        real = (place < samples).reshape(self.steps, width)
        return laid | {"weight": np.where(real, laid["weight"], 0).astype(laid["weight"].dtype)}

    def __str__(self) -> str:
        geometry = self.geometry
        padded = f" ({self.padding} padded)" if self.padding else ""
        return (
            f"{self.recipe} | geometry: microbatch {geometry.microbatch} x {self.steps} steps x "
            f"{geometry.devices} {'device' if geometry.devices == 1 else 'devices'}{padded}, "
            f"{geometry.engine}"
            f"{f', fsdp {geometry.fsdp}' if geometry.fsdp > 1 else ''}"
            f"{f', groups on {self.span} devices' if self.span > 1 else ''}"
            f"{f', groups of {self.together} microbatches' if self.together > 1 else ''}"
            f"{' kept on the host' if geometry.offload and self.together > 1 else ''}"
        )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
