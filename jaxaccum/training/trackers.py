"""Experiment trackers beside TensorBoard: what a run logs, sent to services that the user asks for.

They get the numbers of metrics.jsonl as TensorBoard does, the pictures of the workdir, and config,
recipe and geometry. Training never waits for them: each has a thread of its own. What they cannot
take at the start ends the run; what they cannot take later is said once, and left out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import ml_collections

from jaxaccum.data.texts import shown_path
from jaxaccum.draw import Image
from jaxaccum.machine.waiting import waiting
from jaxaccum.training import run, services
from jaxaccum.training.logs import numbers
from jaxaccum.training.preemption import Preempted
from jaxaccum.training.workdir import WorkdirError, why_not_written

IDS = "trackers.json"  # in the workdir: which run of each service is this run's
SERVICES: Mapping[str, Callable[..., Service]] = {
    "wandb": services.Wandb,
    "mlflow": services.Mlflow,
}
# Seconds to wait at the end for what was not sent yet, by how the run ended. A signal to stop
# leaves few.
PATIENCE = {"finished": 120.0, "stopped": 5.0, "failed": 15.0}
_ROOM = 1000  # records and pictures that may wait for a service


class Service(Protocol):
    """A run at a service. It is made in the main thread and used in another.

    Attributes:
      kept: what finds the run again, plain JSON values.
      said: a line for the console.
    """

    @property
    def kept(self) -> Mapping[str, Any]: ...

    @property
    def said(self) -> str: ...

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def image(self, tag: str, image: Image, step: int) -> None: ...

    def close(self, outcome: str) -> None: ...


class _Sender:
    """Gives a service what it is to take, in order, from a thread; counts what is lost."""

    def __init__(self, name: str, service: Service) -> None:
        self.name, self.lost = name, 0
        self.news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._service = service
        self._waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(_ROOM)
        self._thread = threading.Thread(target=self._work, name=f"log.{name}", daemon=True)
        self._thread.start()

    def put(self, call: Callable[[Service], None]) -> None:
        try:
            self._waiting.put_nowait(lambda: call(self._service))
        except queue.Full:
            self._lose(f"{_ROOM} records wait for it already")

    def close(self, outcome: str) -> None:
        """Ends the run there, after what is still to be sent; waits as long as PATIENCE says."""
        end = time.monotonic() + PATIENCE[outcome]
        try:
            for last in (lambda: self._service.close(outcome), None):
                self._waiting.put(last, timeout=max(end - time.monotonic(), 0))
        except queue.Full:
            pass
        self._thread.join(max(end - time.monotonic(), 0))
        if self._thread.is_alive():
            self.news.put(
                f"note: log.{self.name}: not all was sent within {PATIENCE[outcome]:g} s; "
                "metrics.jsonl has it"
            )
        if self.lost:
            self.news.put(f"note: log.{self.name}: {self.lost} records or pictures were not taken")

    def _work(self) -> None:
        while (call := self._waiting.get()) is not None:
            try:
                call()
            except Exception as error:  # of a library and its network: anything
                self._lose(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def _lose(self, why: str) -> None:
        self.lost += 1
        if self.lost == 1:
            self.news.put(
                f"note: log.{self.name} did not take what was logged ({why}). Training goes on, "
                "and metrics.jsonl has all; this is said once"
            )


class Trackers:
    """The services of a run, as one; as a context, it ends the run there with how it ended here."""

    def __init__(self, services: Mapping[str, Service], start: int = 0) -> None:
        """Takes over services that were started.

        Args:
          start: updates done before this process.
        """
        self._senders = [_Sender(name, service) for name, service in services.items()]
        self._step = start

    def scalars(self, record: Mapping[str, Any], step: int) -> None:
        """The numbers of a record, see `logs.numbers`."""
        self._step, values = step, numbers(record)
        self._send(lambda service: service.scalars(values, step))

    def image(self, tag: str, image: Image, step: int | None = None) -> None:
        """One (height, width, 3) uint8 RGB image; by default of the update logged last."""
        at = self._step if step is None else step
        self._send(lambda service: service.image(tag, image, at))

    def news(self) -> list[str]:
        """Lines to print, once each."""
        return [one.news.get() for one in self._senders for _ in range(one.news.qsize())]

    def _send(self, call: Callable[[Service], None]) -> None:
        for sender in self._senders:
            sender.put(call)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del error, trace
        stopped = kind is not None and issubclass(kind, Preempted | KeyboardInterrupt)
        outcome = "finished" if kind is None else "stopped" if stopped else "failed"
        for sender in self._senders:
            with waiting(f"sending what is left to {sender.name}"):
                sender.close(outcome)
        for line in self.news():
            print(line)


def wanted(config: ml_collections.ConfigDict) -> list[str]:
    """The services that a config asks for."""
    return [name for name in SERVICES if config.log[name]]


def require(config: ml_collections.ConfigDict) -> None:
    """Refuses a config whose services cannot be used here, before anything takes time.

    Raises:
      ConfigError: a package is not installed; says which, and how to get it.
    """
    for name in wanted(config):
        services.imported(name)


def started(
    this: run.Run, about: Mapping[str, Any], workdir: Path, start: int, first: bool = True
) -> Trackers:
    """Starts the services that the config asks for, or goes on in the runs that they have of this
    workdir.

    Args:
      about: fingerprint, recipe, config and names of the run.
      start: updates done before this process.
      first: whether this is the process that logs; the others get none.
    Raises:
      ConfigError: a package is missing, or a service does not take the run; says why.
      WorkdirError: the file in the workdir that names the runs cannot be used.
    """
    if not first or not (names := wanted(this.config)):
        return Trackers({}, start)
    geometry = dataclasses.asdict(this.window.geometry) | {"steps": this.window.steps}
    facts = {
        "fingerprint": about["fingerprint"], "window": str(this.window), "geometry": geometry,
        "recipe": about["recipe"], "config": about["config"], "names": about["names"],
    }  # fmt: skip
    services: dict[str, Service] = {}
    file = workdir / IDS
    ids = _read(file)
    try:
        for name in names:
            with waiting(f"starting {name}"):
                services[name] = SERVICES[name](workdir, ids.get(name, {}), facts)
            if ids.get(name) != services[name].kept:
                ids[name] = services[name].kept
                _write(file, ids)
            print(services[name].said)
    except BaseException:
        for service in services.values():
            service.close("failed")
        raise
    return Trackers(services, start)


def _read(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_bytes())
        if not isinstance(found, dict) or not all(isinstance(v, dict) for v in found.values()):
            raise ValueError("no mapping of mappings")
    except (OSError, ValueError, RecursionError) as error:
        raise WorkdirError(
            f"{shown_path(file)} should say which runs of the trackers are this run's, and cannot "
            f"be read ({error}): remove it, and new runs begin there"
        ) from error
    return found


def _write(file: Path, ids: Mapping[str, Any]) -> None:
    fresh = file.with_name(f"{file.name}.new")
    try:
        fresh.write_text(json.dumps(ids, indent=1) + "\n", encoding="utf-8")
        os.replace(fresh, file)
    except OSError as error:
        why, advice = why_not_written(error, file.parent)
        raise WorkdirError(f"{shown_path(file)}: {why}. {advice}") from error
