"""The training loop: updates, logs, checkpoints, evaluations, and an end that can be continued."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax
import ml_collections

from jaxaccum import config as configs
from jaxaccum import plan, tasks
from jaxaccum.accumulate import Recipe, State, make_engine
from jaxaccum.data.check import signature
from jaxaccum.data.texts import shown_path
from jaxaccum.errors import TrainingError
from jaxaccum.machine import host_memory, onednn
from jaxaccum.machine.waiting import waiting
from jaxaccum.models.init import count
from jaxaccum.training import freezing, run, trackers
from jaxaccum.training.album import Album
from jaxaccum.training.cadence import Cadence
from jaxaccum.training.checkpoint import CheckpointError, Checkpoints, Elsewhere, newest_complete
from jaxaccum.training.distributed import DistributedError, Peers
from jaxaccum.training.journal import Journal, Watch
from jaxaccum.training.keeping import Keeper
from jaxaccum.training.logs import MetricsFile
from jaxaccum.training.preemption import Preempted, Preemption
from jaxaccum.training.progress import Progress
from jaxaccum.training.restart import (
    best_of,
    finished,
    kept_dtype,
    restored,
    rewound,
    say_changes,
    say_swapped,
)
from jaxaccum.training.validation import Validation
from jaxaccum.training.workdir import WorkdirError, locked
from jaxaccum.weights.initial import identities, load_initial


def train(
    config: ml_collections.ConfigDict,
    workdir: Path,
    accept_other_recipe: bool = False,
    peers: Peers | None = None,
    *,
    watch: Watch | None = None,
    signals: bool = True,
) -> dict[str, float]:
    """Trains, evaluates, logs and saves; returns the best evaluation's metrics.

    Args:
      config: as made by a file in configs/.
      workdir: holds metrics.jsonl, last/, best/ and events/; continued if it has a checkpoint.
      accept_other_recipe: continue a run that was started under another recipe.
      peers: the processes of the run, each of which calls this. Only the first reads and writes in
        workdir.
      watch: called with every record of metrics.jsonl.
      signals: handle them, see jaxaccum/training/preemption.py; else Ctrl-C is a KeyboardInterrupt
        like anywhere, and what was learned is saved all the same.
    Raises:
      Preempted: a signal asked the process to end, see jaxaccum/training/preemption.py.
      WorkdirError: another training runs in workdir, or it cannot be written.
      TrainingError: too many windows were not finite, or at its end the run has diverged.
    """
    peers = peers or Peers()

    def kept() -> int | None:
        return newest_complete(workdir)

    with (
        locked(workdir) if peers.first else contextlib.nullcontext(),
        Preemption(config.checkpoint.grace, kept, peers, signals, config.hours) as preemption,
    ):
        return _train(config, workdir, accept_other_recipe, preemption, peers, watch)


def _train(
    config: ml_collections.ConfigDict,
    workdir: Path,
    accept_other_recipe: bool,
    preemption: Preemption,
    peers: Peers,
    watch: Watch | None,
) -> dict[str, float]:
    config, this, train_set, val_set = _opened(_with_dtype(config, workdir, peers), peers)
    log_file = MetricsFile(workdir / "metrics.jsonl", this.recipe.fingerprint)
    cadence = Cadence(this, len(train_set), log_file)
    over = finished(this, workdir, accept_other_recipe, cadence) if peers.first else None
    if (over := peers.from_first("finished", over)) is not None:
        return over

    stream = run.make_stream(this, train_set)
    engine = make_engine(this.forward, this.rule, this.window)
    with waiting("making the model"):
        params, stats = _initial(config, this, train_set)
    evaluator = this.task.evaluator(config, val_set)
    describe(this, train_set, count(params), workdir)

    # The first process alone saves and restores: what is divided it gets whole from the others.
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(workdir, config.checkpoint.keep) if peers.first else Elsewhere()
        )
        state = this.rule.init(params, stats)
        signatures = {"train": signature(train_set), "val": signature(val_set)}
        recipe = None if accept_other_recipe else this.recipe
        state, meta = _resumed(state, checkpoints, engine, recipe, workdir, peers, signatures)
        state = _placed(state, engine, preemption, peers)
        start = int(state.step)
        owed, best = rewound(start, log_file, checkpoints, cadence, peers)

        about = _about(config, this, train_set)
        told = stack.enter_context(trackers.started(this, about, workdir, start, peers.first))
        journal = Journal(
            this, train_set, stream, log_file, cadence, peers, start, meta, told, watch
        )
        progress = Progress(this, engine, stream, journal, state)
        del state, params, stats  # their memory goes to the first update
        keeper = Keeper(checkpoints, journal, peers, about, signatures, start, best)
        album = Album(this, workdir, config.log.report and peers.first, told)
        validation = Validation(
            this, evaluator, train_set, val_set, cadence, journal, keeper, album, preemption, peers
        )
        windows = progress.windows()
        stopped_at, preempted = start, None
        preemption.hold()
        try:
            if owed:
                with journal.pause():
                    validation.evaluate(progress)
            if progress.done < this.steps and not keeper.over:
                journal.line("compiling the update (kept on disk for the next start)")
            while progress.done < this.steps and not keeper.over:
                with preemption.allowed():
                    batch = next(windows)
                if not peers.begin(progress.consumed):
                    raise preemption.preempted()
                album.begin(train_set, batch)
                progress.compute(batch)
                progress.read(but=1)
                if cadence.due("eval", progress.done) or cadence.due("checkpoint", progress.done):
                    progress.read()
                    if progress.done == stopped_at:  # the window was skipped: nothing new here
                        continue
                    stopped_at = progress.done
                    with journal.pause():
                        if cadence.due("checkpoint", progress.done):  # no evaluation may cost one
                            keeper.save(progress)
                        if cadence.due("eval", progress.done):
                            validation.evaluate(progress)
                if progress.done == this.steps:  # a window skipped at the end is made up for
                    progress.read()
        except Preempted as signalled:
            preempted = signalled
            progress.catch_up(peers.furthest(progress.consumed))
            progress.read()
            if cadence.ever("checkpoint") and progress.done > keeper.saved:
                keeper.save(progress)
                checkpoints.wait()
        except (CheckpointError, TrainingError, WorkdirError):
            raise  # what failed is the saving, or the state is not worth it
        except (Exception, KeyboardInterrupt):
            if peers.alone and cadence.ever("checkpoint"):  # another may be anywhere
                keeper.rescue(progress)
            raise
        windows.close()
        journal.close()
        checkpoints.wait()
        album.end(about, keeper.best)
        if preempted:
            raise preempted
        _say_the_end(this, workdir, keeper.best, peers, train=train_set, val=val_set)
        if what := journal.divergence:
            raise TrainingError(f"{what} Everything up to update {progress.done} is kept.")
    return keeper.best


def _say_the_end(
    this: run.Run, workdir: Path, best: dict[str, Any], peers: Peers, **sources: tasks.Source
) -> None:
    """Prints what is best, and which files of the splits were changed meanwhile."""
    if best:
        print(f"best: {best_of(this, best, workdir)}")
    if peers.first:
        if this.config.log.report:
            print(f"report: {workdir / 'report.html'}")
        for split, source in sources.items():
            say_swapped(split, source)


def _with_dtype(
    config: ml_collections.ConfigDict, workdir: Path, peers: Peers
) -> ml_collections.ConfigDict:
    """The config with what "auto" means: what the run in the workdir has, wherever that began, and
    else what the devices at hand do best."""
    kept, here = None, configs.dtype_of(config)
    if peers.first and config.dtype == "auto":
        kept = kept_dtype(workdir)
    settled = peers.from_first("dtype", kept or here)  # all ask, also those that were told
    if config.dtype != "auto":
        return config
    if kept is not None and kept != here:
        print(f"dtype auto: {kept}, as the run in {shown_path(workdir)} began (here: {here})")
    elif settled != "float32":
        print(f"dtype auto: {settled} ({jax.local_devices()[0].device_kind})")
    return run.with_dtype(config, settled)


def _opened(
    config: ml_collections.ConfigDict, peers: Peers
) -> tuple[ml_collections.ConfigDict, run.Run, Any, Any]:
    """The config with a number for "auto", the run that it makes, and its data sets.

    Raises:
      ConfigError: it cannot be run, or asks for a logger that is not installed.
      DistributedError: another process makes another run of it.
    """
    if peers.first:
        trackers.require(config)
    with waiting("opening the data sets"):
        train_set = run.open_source(config, "train")
        val_set = run.open_source(config, "val", train_set.names)
        config, settled = run.settled(config, train_set)
        told = (*train_set.report.lines(), *val_set.report.lines(), *settled)  # may count first
    print(*told, sep="\n")
    if config.microbatch == "auto":
        config, lines = plan.settle(
            config, names=train_set.names, samples=len(train_set), target=plan.here()
        )
        print(*lines, sep="\n")
    this = run.prepare(
        config,
        names=train_set.names,
        samples=len(train_set),
        identity={
            "identity": train_set.identity,
            "samples": len(train_set),
            **identities(config),
        },
    )
    ours = f"{this.recipe.fingerprint}, {this.window}"
    if (theirs := peers.from_first("run", ours)) != ours:
        raise DistributedError(
            f"process {peers.index} computes another run than process 0: {ours} instead of "
            f"{theirs}. Start all with the same command, on the same data."
        )
    return config, this, train_set, val_set


def _initial(
    config: ml_collections.ConfigDict, this: run.Run, train_set: tasks.Source
) -> tuple[Any, Any]:
    """Parameters and statistics before the first update; says where they are from."""
    params, stats = this.task.initialise(config.seed)
    if config.init_from:
        params, stats, transfer = load_initial(
            config.init_from,
            this.task.model,
            params,
            stats,
            train_set.names,
            this.task.loss_modules,
        )
        for line in transfer.lines():
            print(line)
    stats, lines = this.task.load_frozen(config, stats)
    for line in lines:
        print(line)
    if names := freezing.modules(config.freeze):
        print(freezing.described(params, names))
    return params, stats


def _resumed(
    state: State,
    checkpoints: Any,
    engine: Any,
    recipe: Recipe | None,
    workdir: Path,
    peers: Peers,
    signatures: dict[str, str | None],
) -> tuple[State, dict[str, Any]]:
    """The state to go on from and its meta, see `restored`; that of a new run as it is, and {}."""
    if checkpoints.latest is None:
        return state, {}
    state, meta = restored(checkpoints, state, engine, recipe, workdir, peers.alone)
    say_changes(meta.get("signatures", {}), signatures)
    print(f"continuing from update {int(state.step)} in {workdir}")
    return state, meta


def _placed(state: State, engine: Any, preemption: Preemption, peers: Peers) -> State:
    """The first process's state, on the devices of all."""
    if not peers.alone:
        peers.meet("before the broadcast")  # here a signal still ends the run at once
        preemption.hold()
        peers.connect(engine.mesh)
        state = peers.broadcast(state)
    return engine.place_state(state)


def _about(
    config: ml_collections.ConfigDict, this: run.Run, train_set: tasks.Source
) -> dict[str, Any]:
    """What the weights are of, for those who use them."""
    return {
        "fingerprint": this.recipe.fingerprint,
        "recipe": this.recipe.as_dict(),
        "config": config.to_dict(),
        "names": list(train_set.names),
        "facts": this.task.facts(train_set),
    }


def describe(this: run.Run, source: tasks.Source, parameters: int, workdir: Path) -> None:
    """Prints what was derived from the config."""
    config, samples = this.config, len(source)
    print(f"{config.model}: {parameters:,} parameters, {config.dtype}, {jax.default_backend()}")
    print(this.window)
    print(
        f"{this.steps} updates over {samples} samples "
        f"({this.sizes.total / max(samples, 1):.1f} epochs), "
        f"{config.optimizer.name}, peak learning rate {this.schedule.peak():.3g}, weight decay "
        f"{run.optim.weight_decay(config):.3g}"
    )
    if configs.is_compat(config):
        smallest, largest = this.sizes.extremes
        print(
            f"compat: the usual accumulation; effective batches of {smallest} to {largest} "
            "samples, every microbatch normalised by itself"
        )
    of_cpu: list[str] = []
    if jax.default_backend() == "cpu":
        of_cpu = [*filter(None, [onednn.note()]), *host_memory.advice()]
    for line in [*this.task.notes(config, source, this.sizes.total), *of_cpu]:
        print(line)
    print(f"workdir {workdir}", flush=True)
