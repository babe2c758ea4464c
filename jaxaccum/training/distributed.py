"""Training by several processes: how they find each other, and what they say to each other.

Gradients meet inside of the update, on the devices. All else goes through JAX's coordination
service, on the hosts: what process 0 found out, that a signal came, that a process failed.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxaccum.errors import UserError
from jaxaccum.machine.waiting import silent
from jaxaccum.training.preemption import Preempted, end_at_once

PyTree = Any

FLAG_HELP = (
    'how the processes of a run find each other: "" for one process, "auto" on Slurm, Open MPI and '
    'TPUs, or "HOST:PORT,NUM,ID": an address of process 0, their number, and which one this is'
)
_SLICE = 1000  # milliseconds of waiting in which Python handles no signal


class DistributedError(UserError, ValueError):
    """The processes of a run cannot work together; the message says why and what to do."""


class Peers:
    """All processes of a run, as one of them sees them. Alone, it has nobody to wait for.

    Attributes:
      index: of this process. number: of processes.
      on_signal: called with the number of a signal that another process got, from a thread.
    """

    def __init__(self, client: Any = None, index: int = 0, number: int = 1) -> None:
        """Starts to listen.

        Args:
          client: of JAX's coordination service; None if the process is alone.
        """
        self.index, self.number = index, number
        self.on_signal: Callable[[int], None] = lambda number: None
        self._client = client
        self._begun = 0
        self._stopping = False
        self._lock = threading.Lock()
        self._closed = threading.Event()
        if client is not None:
            self._listener = threading.Thread(target=self._listen, name="peers", daemon=True)
            self._listener.start()

    @property
    def first(self) -> bool:
        """Whether this process writes, prints and evaluates."""
        return self.index == 0

    @property
    def alone(self) -> bool:
        return self.number == 1

    def from_first(self, name: str, value: Any) -> Any:
        """Process 0's value, for all; a process that is not the first waits for it.

        Args:
          name: of the occasion; used once in a run.
          value: plain JSON values, and NaN; only process 0's counts.
        """
        if self.alone:
            return value
        if self.first:
            self._client.key_value_set(f"jaxaccum/first/{name}", json.dumps(value))
            return value
        return json.loads(self._wait(f"jaxaccum/first/{name}"))

    def meet(self, name: str) -> None:
        """Waits until all processes have come here.

        Args:
          name: of the occasion; used once in a run.
        """
        if self.alone:
            return
        self._client.key_value_set(f"jaxaccum/met/{name}/{self.index}", "")
        if self.first:
            for i in range(self.number):
                self._wait(f"jaxaccum/met/{name}/{i}")
        self.from_first(f"met {name}", True)

    def connect(self, mesh: jax.sharding.Mesh) -> None:
        """Connects all devices of a mesh; after `meet`.

        Else the first update would, and compiling it takes longer in one process than in another:
        Gloo waits 30 seconds for a connection, and for ever after that.
        """
        if self.alone:
            return
        axes = jax.sharding.PartitionSpec(mesh.axis_names)
        one_each = jax.make_array_from_process_local_data(
            jax.sharding.NamedSharding(mesh, axes), np.ones(len(jax.local_devices()), np.float32)
        )
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        jax.block_until_ready(jax.jit(jnp.sum, out_shardings=everywhere)(one_each))

    def broadcast(self, tree: PyTree) -> PyTree:
        """Process 0's arrays, on the hosts of all; the others give some of the same shapes."""
        return multihost_utils.broadcast_one_to_all(jax.tree.map(np.asarray, tree))

    # All processes must compute the same updates, wherever a signal finds them. A process tells
    # how many windows it has begun as soon as it hears of a signal, from a thread, and begins no
    # more before all have told; then all go on to the furthest.

    def begin(self, window: int) -> bool:
        """Whether this process may begin a window; no more once `stop` was called."""
        with self._lock:
            if not self._stopping:
                self._begun = window + 1
            return not self._stopping

    def stop(self, signal: int | None = None) -> None:
        """Begins no more windows, and tells so; from any thread.

        Args:
          signal: to be told to the others, if they do not know of it.
        """
        if self.alone:
            return
        with self._lock:
            if not self._stopping:
                self._stopping = True
                self._client.key_value_set(f"jaxaccum/begun/{self.index}", str(self._begun))
        # Also if the main thread was quicker to stop for the same signal: it does not tell.
        if signal is not None:
            self._tell({"signal": int(signal)})

    def furthest(self, consumed: int) -> int:
        """Windows that the one furthest of the processes has begun, once all have stopped.

        Args:
          consumed: windows begun by this one, which is the answer if it is alone.
        """
        if self.alone:
            return consumed
        self.stop()
        return max(int(self._wait(f"jaxaccum/begun/{i}")) for i in range(self.number))

    def leave(self) -> None:
        """Waits until all are done, and parts."""
        if self._client is None:
            return
        self.stop()  # others may ask how far this one came
        self._close()
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # one that did not wait has gone
            jax.distributed.shutdown()

    def fail(self, why: str) -> None:
        """Tells the others that this process ends, so that they do not wait for it."""
        if self._client is None:
            return
        self._close()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._tell({"failed": why})
        if self.first:  # it has the service that the others hear it by
            time.sleep(2)
        # Before JAX's own end, which would wait for the others.
        atexit.register(end_at_once, 1)

    def _close(self) -> None:
        self._closed.set()
        self._listener.join()

    def _tell(self, news: dict[str, Any]) -> None:
        text = json.dumps(news | {"process": self.index})
        for number in itertools.count():
            try:
                self._client.key_value_set(f"jaxaccum/news/{number}", text)
                return
            except jax.errors.JaxRuntimeError as error:
                if "ALREADY_EXISTS" not in str(error):
                    raise

    def _listen(self) -> None:
        for number in itertools.count():
            try:
                text = self._wait(f"jaxaccum/news/{number}", self._closed)
            except jax.errors.JaxRuntimeError:  # the service is gone; JAX ends this process
                return
            if text is None:
                return
            news = json.loads(text)
            if news["process"] == self.index:
                continue
            if "failed" in news:
                what = f"process {news['process']} failed: {news['failed']}"
                print(f"error: {what}", file=sys.stderr, flush=True)
                end_at_once(1)
            self.on_signal(news["signal"])

    def _wait(self, key: str, closed: threading.Event | None = None) -> Any:
        """The text of a key once it is there; None if `closed` comes first."""
        while closed is None or not closed.is_set():
            try:
                return self._client.blocking_key_value_get(key, _SLICE)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
        return None


def initialise(text: str) -> Peers:
    """Joins the processes of a run. Comes before anything that touches a device.

    Args:
      text: the flag `--distributed`, see `FLAG_HELP`.
    Raises:
      DistributedError: the text is mistyped, `auto` finds nothing, or the others cannot be found.
    """
    if not text:
        return Peers()
    arguments = {} if text == "auto" else _explicit(text)
    # It would take SIGTERM for itself; jaxaccum/training/preemption.py handles all signals.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**arguments)
    except (ValueError, RuntimeError) as error:
        raise DistributedError(
            f"--distributed={text}: {(str(error).splitlines() or ['nothing'])[0]}. "
            + (
                "auto works on Slurm, Open MPI and TPUs; elsewhere give HOST:PORT,NUM,ID."
                if text == "auto"
                else "Start all processes within five minutes, with one HOST:PORT, which they can "
                "all reach, and an ID of its own each."
            )
        ) from error
    # JAX has no public name for the client of its coordination service.
    client = jax._src.distributed.global_state.client
    peers = Peers(client, jax.process_index(), jax.process_count())
    if len(jax.devices()) != peers.number * len(jax.local_devices()):
        here = len(jax.local_devices())
        raise DistributedError(
            f"process {peers.index} has {here} devices of {len(jax.devices())} in {peers.number} "
            "processes: all must have the same number"
        )
    return peers


def _explicit(text: str) -> dict[str, Any]:
    address, *rest = text.split(",")
    host, _, port = address.rpartition(":")
    numbers = [int(part) if part.isdecimal() else -1 for part in rest]
    if len(numbers) != 2 or min(numbers) < 0 or not host or not port.isdecimal():
        raise DistributedError(
            f"--distributed={text}: expected auto, or HOST:PORT,NUM,ID such as 10.0.0.1:8476,4,0 "
            "for the first of 4 processes"
        )
    number, index = numbers
    if index >= number:
        raise DistributedError(
            f"--distributed={text}: of {number} processes, ID is one of 0 to {number - 1}"
        )
    return {
        "coordinator_address": address,
        "num_processes": number,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


@contextlib.contextmanager
def joined(text: str) -> Iterator[Peers]:
    """`initialise`, and the end: together if all went well, or telling the others that it did not.

    Only process 0 has a stdout.
    """
    peers = initialise(text)
    with contextlib.ExitStack() as stack:
        if not peers.first:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(silent())
        try:
            yield peers
        except Preempted:
            peers.leave()
            raise
        except BaseException as error:
            peers.fail(f"{type(error).__name__}: {error}")
            raise
        peers.leave()
