"""Hardware to plan for: what is at hand, and descriptions of what is not.

XLA compiles for a described GPU or TPU on any machine, if its plugin is installed; no driver and
no device is needed. The plan is then the compiler's own.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
from typing import Any

import jax
import psutil
from jax.experimental import topologies

from jaxaccum.errors import UserError
from jaxaccum.fields import best_dtype

GIB = 2**30


class PlanError(UserError, ValueError):
    """A plan that cannot be made, or that nothing fits; the message says what could be done."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's compiler asks of a GPU it does not see (its GpuTargetConfigProto)."""

    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    fpus_per_core: int
    threads_per_core: int
    shared_per_core: int
    shared_per_block: int
    l2: int
    name: str


@dataclasses.dataclass(frozen=True)
class Target:
    """A device to plan for.

    Attributes:
      name: how it is asked for.
      platform: "cpu", "gpu" or "tpu".
      memory: bytes of one device that programs may use.
      rates: floating-point operations per second, by dtype of the config.
      bandwidth: bytes per second of its memory.
      link: bytes per second between it and the host's memory, in each direction.
      description: of a GPU that is not here, for the compiler.
      topology: of a TPU that is not here: its smallest slice, chips of it.
      kind: what JAX calls the device, where it is at hand.
    """

    name: str
    platform: str
    memory: int
    rates: dict[str, float]
    bandwidth: float
    description: Gpu | None = None
    topology: tuple[str, int] | None = None
    kind: str = ""
    link: float = 16e9

    @property
    def at_hand(self) -> bool:
        """Whether it is the device that JAX runs on here."""
        return self.description is None and self.topology is None

    @property
    def dtype(self) -> str:
        """What a config's dtype "auto" is there."""
        if self.topology is not None:
            return "bfloat16"
        if self.description is None:
            return best_dtype(jax.local_devices()[0])
        number = ".".join(map(str, self.description.capability))
        return best_dtype(types.SimpleNamespace(platform="gpu", compute_capability=number))

    def devices(self, number: int) -> list[Any]:
        """That many devices to compile for.

        Raises:
          PlanError: there are not as many, or the compiler for them is not installed.
        """
        if self.at_hand:
            found = jax.devices()
            if len(found) < number:
                raise PlanError(f"{number} devices asked for, JAX sees {len(found)} here")
            return found[:number]
        if self.description is not None:
            return _gpus(self, number)
        return _tpus(self, number)


def _gpu(memory, bandwidth, f32, bf16, tf32, *, link, **description):
    return {
        "platform": "gpu", "memory": int(memory * GIB), "bandwidth": bandwidth, "link": link,
        "rates": {"float32": f32, "float64": f32 / 2, "tf32": tf32, "bfloat16": bf16},
        "description": Gpu(**description),
    }  # fmt: skip


def _tpu(memory, bandwidth, bf16, topology, chips):
    # A float32 product is six passes of bfloat16 ones.
    return {
        "platform": "tpu", "memory": int(memory * GIB), "bandwidth": bandwidth,
        "rates": {"float32": bf16 / 6, "float64": bf16 / 60, "tf32": bf16, "bfloat16": bf16},
        "topology": (topology, chips),
    }  # fmt: skip


PCIE3, PCIE4, PCIE5 = 15.8e9, 31.5e9, 63e9  # 16 lanes

# Vendors' data sheets: memory in GiB, bytes/s, dense FLOP/s; and the figures of the CUDA
# programming guide's table of compute capabilities.
TARGETS = {
    name: Target(name, **fields)
    for name, fields in {
        "h100": _gpu(
            80, 3.35e12, 67e12, 989e12, 495e12, link=PCIE5, capability=(9, 0),
            cores=132, clock_ghz=1.98, fpus_per_core=128, threads_per_core=2048,
            shared_per_core=233472, shared_per_block=232448, l2=52428800,
            name="NVIDIA H100 80GB HBM3",
        ),
        "a100": _gpu(
            80, 2.04e12, 19.5e12, 312e12, 156e12, link=PCIE4, capability=(8, 0),
            cores=108, clock_ghz=1.41, fpus_per_core=64, threads_per_core=2048,
            shared_per_core=167936, shared_per_block=166912, l2=41943040,
            name="NVIDIA A100-SXM4-80GB",
        ),
        "a100-40": _gpu(
            40, 1.56e12, 19.5e12, 312e12, 156e12, link=PCIE4, capability=(8, 0),
            cores=108, clock_ghz=1.41, fpus_per_core=64, threads_per_core=2048,
            shared_per_core=167936, shared_per_block=166912, l2=41943040,
            name="NVIDIA A100-SXM4-40GB",
        ),
        "rtx4090": _gpu(
            24, 1.01e12, 82.6e12, 165e12, 82.6e12, link=PCIE4, capability=(8, 9),
            cores=128, clock_ghz=2.52, fpus_per_core=128, threads_per_core=1536,
            shared_per_core=102400, shared_per_block=101376, l2=75497472,
            name="NVIDIA GeForce RTX 4090",
        ),
        "t4": _gpu(
            16, 0.32e12, 8.1e12, 8.1e12, 8.1e12, link=PCIE3, capability=(7, 5),
            cores=40, clock_ghz=1.59, fpus_per_core=64, threads_per_core=1024,
            shared_per_core=65536, shared_per_block=65536, l2=4194304, name="Tesla T4",
        ),
        "v4": _tpu(32, 1.2e12, 275e12, "v4:2x2x1", 4),
        "v5e": _tpu(16, 0.82e12, 197e12, "v5e:2x2", 4),
        "v5p": _tpu(95, 2.77e12, 459e12, "v5p:2x2x1", 4),
        "v6e": _tpu(32, 1.64e12, 918e12, "v6e:2x2", 4),
    }.items()
}  # fmt: skip


def here() -> Target:
    """The device that JAX runs on, with the memory that programs can have of it."""
    device = jax.devices()[0]
    kind = device.device_kind
    if device.platform == "cpu":
        # Nominal rates: they only set work on numbers against traffic of memory.
        memory = psutil.virtual_memory().available // max(len(jax.devices()), 1)
        rate = 2e10 * (os.cpu_count() or 1)
        return Target("cpu", "cpu", memory, dict.fromkeys(_RATES, rate), 2e10, kind=kind)
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        raise PlanError(f"{kind} does not say how much memory it has: give --memory")
    alike = [t for t in TARGETS.values() if t.name.split("-")[0] in kind.lower().replace(" ", "")]
    like = alike[0] if alike else TARGETS["a100" if device.platform == "gpu" else "v5e"]
    return Target(
        device.platform, device.platform, int(stats["bytes_limit"]), like.rates, like.bandwidth,
        kind=kind, link=like.link,
    )  # fmt: skip


_RATES = ("float32", "float64", "tf32", "bfloat16")


def find(name: str) -> Target:
    """A target by name; "" for what is at hand.

    Raises:
      PlanError: there is none of that name.
    """
    if not name or (name == "cpu" and jax.default_backend() == "cpu"):
        return here()
    if name not in TARGETS:
        raise PlanError(
            f"no target {name!r}; there are {', '.join(TARGETS)}, and cpu where JAX runs on it"
        )
    return TARGETS[name]


def _gpus(target: Target, number: int) -> list[Any]:
    gpu = target.description
    assert gpu is not None
    major, minor = gpu.capability
    text = f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32
      shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared_per_core}
      shared_memory_per_block_optin: {gpu.shared_per_block}
      threads_per_core_limit: {gpu.threads_per_core} core_count: {gpu.cores}
      fpus_per_core: {gpu.fpus_per_core}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {int(target.bandwidth)} l2_cache_size: {gpu.l2}
      clock_rate_ghz: {gpu.clock_ghz} device_memory_size: {target.memory}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      cuda_compute_capability {{ major: {major} minor: {minor} }}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
    runtime_version {{ major: 12 minor: 8 patch: 0 }}
    device_description_str: "{gpu.name}"
    """
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=text, topology=f"1x1x{number}"
        )
    except Exception as error:
        raise PlanError(
            f"this machine cannot compile for {target.name}: {_first_line(error)}. Install "
            f"jax-cuda12-plugin and jax-cuda12-pjrt of version {jax.__version__} (no driver and no "
            "CUDA is needed), or plan on a machine that has the GPU."
        ) from error
    return list(topology.devices)


def _tpus(target: Target, number: int) -> list[Any]:
    assert target.topology is not None
    name, chips = target.topology
    if number > chips:
        # Slices are rectangles; data parallel plans are the same on each device of any.
        raise PlanError(
            f"plans for {target.name} are made on a slice of {chips} devices: give --devices of at "
            f"most {chips}; with more, the plan of a device is that of {chips} with as many samples"
        )
    # libtpu asks the machine's metadata service for its slice unless told.
    kind, grid = name.split(":")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    accelerator = {"v5e": "v5litepod"}.get(kind, kind)
    per = 2 if kind in ("v4", "v5p") else 1  # these count cores
    total = math.prod(int(n) for n in grid.split("x")) * per
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{accelerator}-{total}")
    try:
        topology = topologies.get_topology_desc(topology_name=name, platform="tpu")
    except Exception as error:
        raise PlanError(
            f"this machine cannot compile for {target.name}: {_first_line(error)}. Install libtpu "
            "(pip install 'jax[tpu]' names its version; no TPU is needed)."
        ) from error
    return list(topology.devices)[:number]


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
