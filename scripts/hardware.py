"""What the scripts that check a machine share: which devices they compute on, what XLA must be told
before it starts, and several processes that end together."""

from __future__ import annotations

import importlib.metadata
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PLATFORMS = ("cpu", "gpu", "tpu")
PLATFORM_HELP = "what to compute on; what JAX takes by itself if not given"
# Without it a GPU adds in the order in which its threads arrive, and times candidates for every
# convolution anew, so that one program gives other bits each time.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
# Else XLA leaves out roundings to bfloat16 between operations that it fuses, and what it fuses
# differs from one geometry's program to the next.
ROUNDED = "--xla_allow_excess_precision=false"


class Laid(NamedTuple):
    """A geometry as given, for either engine; `devices` are those of all processes."""

    microbatch: int
    steps: int
    devices: int
    fsdp: int = 1
    processes: int = 1

    def __str__(self) -> str:
        text = f"{self.microbatch}x{self.steps}x{self.devices}"
        text += f"x{self.fsdp}" if self.fsdp > 1 else ""
        return text + (f"p{self.processes}" if self.processes > 1 else "")


def parse_geometries(texts: list[str]) -> list[Laid]:
    """Of each "8x1x1", "4x1x4x2" or "4x2x2p2"."""
    geometries = []
    for text in texts:
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?:x(\d+))?(?:p(\d+))?", text)
        parts = [int(part or 1) for part in match.groups()] if match else [0]
        if min(parts) < 1:
            raise SystemExit(
                f"--geometries: {text!r} is not MICROBATCHxSTEPSxDEVICES, as in 2x4x1, nor "
                "MICROBATCHxSTEPSxDEVICESxFSDP, nor one of these with pPROCESSES, as in 4x2x2p2"
            )
        laid = Laid(*parts)
        if laid.devices % laid.processes:
            raise SystemExit(
                f"--geometries: {text}: {laid.devices} devices in all cannot be those of "
                f"{laid.processes} processes, each of which has the same number of its own: as in "
                f"{laid._replace(devices=laid.devices * laid.processes)}"
            )
        geometries.append(laid)
    return geometries


def require_devices(geometries: Sequence[Laid], backend: str, there: int, described: str) -> None:
    """Refuses what a GPU or TPU machine cannot compute; on a CPU there are as many as wanted.

    Args:
      backend, there: JAX's platform and its number of devices.
      described: the same for the user.
    Raises:
      SystemExit: a geometry needs more devices, or processes that are not started here.
    """
    if backend == "cpu":
        return
    for laid in geometries:
        if laid.devices > there:
            steps = -(-laid.steps * laid.devices // there)
            fits = laid._replace(devices=there, steps=steps, fsdp=1, processes=1)
            each = f" ({laid.processes} processes need one each)" if laid.processes > 1 else ""
            raise SystemExit(
                f"error: --geometries: {laid} wants {laid.devices} devices{each}, and here are: "
                f"{described}. {fits} would fit, or any with --platform=cpu, where devices are made"
            )
        if laid.processes > 1 and backend != "gpu":
            raise SystemExit(
                f"error: --geometries: {laid}: several processes are started here on CPUs and "
                f"GPUs only, not on {backend}: {laid._replace(processes=1)} would run"
            )


def _gpu_plugins() -> set[str]:
    """Of JAX: "cuda", "rocm"."""
    names = [entry.name for entry in importlib.metadata.entry_points(group="jax_plugins")]
    return {kind for kind in ("cuda", "rocm") if any(kind in name for name in names)}


def may_be_gpu(platform: str | None) -> bool:
    """Whether JAX may compute on a GPU, before it starts. `platform` is one of PLATFORMS."""
    asked = platform or os.environ.get("JAX_PLATFORMS", "")
    if asked:
        return bool({"gpu", "cuda", "rocm"} & set(asked.split(",")))
    return bool(_gpu_plugins())


def tell_xla(wanted: Sequence[str]) -> str:
    """Adds flags to XLA_FLAGS, which are read when a backend starts; one the user gives stands.

    An unknown flag ends the process: these are in jaxlib 0.10 to 0.12, for a CPU also.

    Returns:
      what was done, for the user; "" if nothing.
    """
    theirs = os.environ.get("XLA_FLAGS", "").strip()
    if theirs and not theirs.startswith("-"):  # XLA takes it for the name of a file of flags
        return f"XLA_FLAGS names a file; it should have {' '.join(wanted)}" if wanted else ""
    names = set(re.findall(r"(?:^|\s)--?(\w+)", theirs))
    added = [flag for flag in wanted if flag[2:].partition("=")[0] not in names]
    kept = [flag[2:].partition("=")[0] for flag in wanted if flag not in added]
    if added:
        os.environ["XLA_FLAGS"] = " ".join(filter(None, [theirs, *added]))
    said = [f"added {' '.join(added)}"] if added else []
    said += [f"{name} as you set it" for name in kept]
    return f"XLA_FLAGS: {', '.join(said)}" if said else ""


def start(platform: str | None, cpu_devices: int, x64: bool = False) -> None:
    """Starts JAX on a platform. Comes before anything that touches a device.

    Args:
      platform: one of PLATFORMS; None for what JAX takes by itself.
      cpu_devices: host devices to make, if it is the CPU.
    Raises:
      SystemExit: JAX cannot compute on it.
    """
    choose(platform, cpu_devices, x64)
    import jax

    asked = platform or "what JAX takes by itself"
    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # the latter if there is no GPU for CUDA
        why = (str(error).splitlines() or ["it finds none"])[0]
        raise SystemExit(f"error: --platform={asked}: JAX cannot use it here: {why}") from None
    if platform and found != platform:
        raise SystemExit(
            f"error: --platform={platform}: JAX finds none here, only {found}. Is the jaxlib for "
            f"it installed? --platform={found} would run"
        )


def choose(platform: str | None, cpu_devices: int, x64: bool = False) -> None:
    """Sets JAX up for a platform, and starts nothing; see `start`."""
    import jax

    if platform == "gpu":  # JAX's own "gpu" wants CUDA and ROCm both
        kind = "rocm" if _gpu_plugins() == {"rocm"} else "cuda"
        jax.config.update("jax_platforms", f"{kind},cpu")
    elif platform:
        jax.config.update("jax_platforms", "cpu" if platform == "cpu" else f"{platform},cpu")
    jax.config.update("jax_num_cpu_devices", cpu_devices)
    jax.config.update("jax_enable_x64", x64)


def described() -> str:
    """The devices of a started JAX, such as "gpu (NVIDIA H200), 1 device"."""
    import jax

    number, kind, backend = len(jax.devices()), jax.devices()[0].device_kind, jax.default_backend()
    return (
        f"{backend}{'' if kind == backend else f' ({kind})'}, {number} "
        f"{'device' if number == 1 else 'devices'}"
    )


def free_address() -> str:
    """HOST:PORT of this machine for processes to find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def together(
    commands: Sequence[Sequence[str]],
    environments: Sequence[dict[str, str]],
    seconds: float,
    grace: float = 10.0,
) -> None:
    """Runs processes that need each other, and waits for all.

    Args:
      commands: of each. environments: what each has beside this process's own.
      seconds: that they may take.
      grace: seconds for the others, when one failed, to end by themselves.
    Raises:
      SystemExit: one failed or they took too long; says the end of its output. None is left.
    """
    began, failed, ended = time.monotonic(), None, 0.0

    def terminated(number: int, _) -> None:  # else they would be left behind
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, terminated)
    with tempfile.TemporaryDirectory(prefix="jaxaccum-") as folder:
        outputs = [Path(folder) / f"{i}.txt" for i in range(len(commands))]
        processes: list[subprocess.Popen] = []
        try:
            for command, more, path in zip(commands, environments, outputs, strict=True):
                with path.open("w") as output:
                    processes.append(
                        subprocess.Popen(
                            list(command), env=os.environ | more, stdout=output,
                            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                        )
                    )  # fmt: skip
            while any(process.poll() is None for process in processes):
                bad = [i for i, process in enumerate(processes) if process.poll()]
                if bad and failed is None:
                    failed, ended = bad[0], time.monotonic()
                if failed is not None and time.monotonic() - ended > grace:
                    break
                if time.monotonic() - began > seconds:
                    break
                time.sleep(0.05)
            if failed is None:
                failed = next((i for i, process in enumerate(processes) if process.poll()), None)
            late = failed is None and any(process.poll() is None for process in processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
            signal.signal(signal.SIGTERM, before)
        if failed is None and not late:
            return
        of = f"of {len(commands)}"
        if late:
            what, shown = f"the {len(commands)} processes were not done after {seconds:.0f} s", 0
        else:
            what, shown = f"process {failed} {of} {_end(processes[failed].returncode)}", failed
        tail = "\n".join(outputs[shown].read_text(errors="replace").splitlines()[-25:])
        raise SystemExit(
            f"error: {what}. The end of what process {shown} said:\n{tail or '(nothing)'}"
        )


def _end(status: int) -> str:
    return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"


def look(platform: str | None) -> tuple[str, int]:
    """(platform, number of devices) as another process sees them: this one then holds none."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import hardware, jax; "
        f"hardware.start({platform!r}, 1); print(jax.default_backend(), len(jax.devices()))"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "error")
    backend, number = done.stdout.split()[-2:]
    return backend, int(number)
