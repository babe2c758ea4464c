"""Weights & Biases and MLflow, as trackers of a run (jaxaccum/training/trackers.py).

Their packages are imported when a run asks for them, and not before. Where a run goes, and as whom,
is said to them by their own environment variables (WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI,
MLFLOW_EXPERIMENT_NAME, ...).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxaccum.data.texts import shown_path
from jaxaccum.draw import Image
from jaxaccum.fields import ConfigError

PROJECT = "jaxaccum"  # where none is named: of Weights & Biases; MLflow's experiment
# Package -> how it is installed, and what it has if it is itself and no folder of its name.
_PACKAGES = {"wandb": ("wandb", "init"), "mlflow": ("mlflow or mlflow-skinny", "MlflowClient")}
_MOST_PARAMS, _MOST_METRICS = 100, 1000  # that MLflow takes at a time
_LONGEST = 500  # characters of a parameter that every MLflow takes


def imported(name: str) -> Any:
    """The package of a service.

    Raises:
      ConfigError: it is not installed; says how to get it.
    """
    # They draw with it, each in its thread: two that import it at once find half of it.
    importlib.import_module("PIL.Image")
    install, has = _PACKAGES[name]
    try:
        module = importlib.import_module(name)
        if hasattr(module, has):
            return module
        why = f"what is found in {', '.join(module.__path__)} is a folder, and no package"
    except Exception as error:  # a broken installation raises anything
        why = f"{type(error).__name__}: {error}"
    raise ConfigError(
        f"log.{name}=True needs the package {name}, which cannot be imported ({why}): pip install "
        f"{install}, or leave log.{name} False"
    )


@contextlib.contextmanager
def _of_the_user(name: str, advice: str) -> Iterator[None]:
    """What a service raises at the start becomes a ConfigError with its words, and advice."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:500]
        raise ConfigError(
            f"log.{name}: it does not take the run ({type(error).__name__}: {said}). {advice}"
        ) from error


class Wandb:
    """A run of Weights & Biases; its files lie in the folder wandb of the workdir.

    Its rows have the update as "update", by which all is drawn: its own steps only count rows.
    Updates that a kill made a run repeat are there twice, at the same place.

    Attributes:
      kept: {"id"}.
    """

    def __init__(self, workdir: Path, kept: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Begins a run, or goes on in the one of `kept`.

        Args:
          facts: become its config.
        Raises:
          ConfigError: it cannot; says why.
        """
        self._wandb = wandb = imported("wandb")
        environment = os.environ
        self.kept = {
            "id": kept.get("id") or environment.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12]
        }
        with _of_the_user(
            "wandb", "`wandb login` logs in; WANDB_MODE=offline needs no network, and `wandb sync` "
            "sends later what it wrote",
        ):  # fmt: skip
            # A run of its own, beside one that a notebook may have; the console is ours.
            self._run = wandb.init(
                id=self.kept["id"],
                resume="allow",
                project=environment.get("WANDB_PROJECT", PROJECT),
                name=environment.get("WANDB_NAME", workdir.resolve().name),
                dir=environment.get("WANDB_DIR", str(workdir)),
                config=dict(facts),
                allow_val_change=True,
                reinit="create_new",
                settings=wandb.Settings(console="off"),
            )
            self._run.define_metric("update", hidden=True)
            self._run.define_metric("*", step_metric="update")
        where = "offline: `wandb sync` sends it" if self._run.offline else self._run.url
        self.said = f"Weights & Biases: run {self.kept['id']}, {where or 'disabled'}"

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """One row."""
        self._run.log({**values, "update": step})

    def image(self, tag: str, image: Image, step: int) -> None:
        """One (height, width, 3) uint8 RGB image."""
        self._run.log({tag: self._wandb.Image(image, file_type="png"), "update": step})

    def close(self, outcome: str) -> None:
        """Ends the run: "finished", "stopped" or "failed"; waits until all is written or sent."""
        if outcome == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if outcome == "finished" else 1)


class Mlflow:
    """A run of MLflow: metrics, pictures, the config as parameters, all facts as run.json.

    Where MLFLOW_TRACKING_URI names no place, it is the database mlflow.db in the workdir, which
    `mlflow ui --backend-store-uri sqlite:///WORKDIR/mlflow.db` shows, and the folder mlartifacts.
    Parameters cannot change at MLflow: they are those of the first start, run.json is of the last.

    Attributes:
      kept: {"run_id"}.
    """

    def __init__(self, workdir: Path, kept: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Begins a run, or goes on in the one of `kept`.

        Args:
          facts: of which the config becomes parameters, and fingerprint and geometry tags.
        Raises:
          ConfigError: it cannot; says why.
        """
        mlflow = imported("mlflow")
        self._entities = importlib.import_module("mlflow.entities")
        folder = workdir.resolve()
        elsewhere = os.environ.get("MLFLOW_TRACKING_URI")
        advice = (
            "It is where MLFLOW_TRACKING_URI says" if elsewhere
            else f"It was to be {shown_path(folder / 'mlflow.db')}, for which mlflow-skinny needs "
            "sqlalchemy and alembic, too; MLFLOW_TRACKING_URI names another place"
        )  # fmt: skip
        with _of_the_user("mlflow", f"{advice}."):
            self._client = mlflow.MlflowClient(elsewhere or f"sqlite:///{folder / 'mlflow.db'}")
        if run_id := kept.get("run_id"):
            again = "To begin another run there, remove mlflow from trackers.json in the workdir"
            with _of_the_user("mlflow", f"{advice}. {again}."):
                self._client.get_run(run_id)
                self._client.update_run(run_id, status="RUNNING")
        with _of_the_user("mlflow", f"{advice}."):
            artifacts = None if elsewhere else (folder / "mlartifacts").as_uri()
            self._run = run_id or self._begun(folder.name, artifacts)
            self._tell(facts, new=not run_id)
        self.kept = {"run_id": self._run}
        where = "" if elsewhere else f" in {shown_path(folder / 'mlflow.db')}"
        self.said = f"MLflow: run {self._run}{where}"

    def _begun(self, name: str, artifacts: str | None) -> str:
        """The id of a new run."""
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(experiment)
        number = (
            self._client.create_experiment(experiment, artifact_location=artifacts)
            if found is None else found.experiment_id
        )  # fmt: skip
        return self._client.create_run(number, run_name=name).info.run_id

    def _tell(self, facts: Mapping[str, Any], new: bool) -> None:
        """Says what the run is."""
        tags = {"fingerprint": facts["fingerprint"], "window": facts["window"]}
        tags |= {f"geometry.{key}": value for key, value in facts["geometry"].items()}
        self._client.log_batch(
            self._run, tags=[self._entities.RunTag(key, str(value)) for key, value in tags.items()]
        )
        self._client.log_dict(self._run, dict(facts), "run.json")
        params = [
            self._entities.Param(_named(key), _short(str(value)))
            for key, value in _flat(facts["config"])
        ]
        for i in range(0, len(params) if new else 0, _MOST_PARAMS):
            self._client.log_batch(self._run, params=params[i : i + _MOST_PARAMS])

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """A point of each."""
        now = time.time_ns() // 1_000_000
        metrics = [
            self._entities.Metric(_named(tag), float(value), now, step)
            for tag, value in values.items()
        ]
        for i in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._run, metrics=metrics[i : i + _MOST_METRICS])

    def image(self, tag: str, image: Image, step: int) -> None:
        """One (height, width, 3) uint8 RGB image."""
        self._client.log_image(self._run, image, key=_named(tag), step=step)

    def close(self, outcome: str) -> None:
        """Ends the run: "finished", "stopped" or "failed"."""
        status = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[outcome]
        self._client.set_terminated(self._run, status)


def _named(tag: str) -> str:
    """A name that MLflow takes; what it does not take becomes _CODE_, so that names stay apart."""
    return re.sub(r"[^\w/. :-]", lambda found: f"_{ord(found[0]):x}_", tag)


def _short(text: str) -> str:
    more = "... (run.json)"
    return text if len(text) <= _LONGEST else text[: _LONGEST - len(more)] + more


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a.b", value) of every value."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
