"""The training loop: updates, logs, checkpoints, evaluations, and an end that can be continued."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections import deque
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxaccum import config as configs
from jaxaccum import host_memory, plan, run, tasks
from jaxaccum.accumulate import make_engine
from jaxaccum.accumulate.noise import NoiseScale
from jaxaccum.checkpoint import CheckpointError, Checkpoints, Elsewhere, newest_complete
from jaxaccum.data.check import signature
from jaxaccum.distributed import DistributedError, Peers
from jaxaccum.divergence import Divergence
from jaxaccum.draw import contact_sheet
from jaxaccum.errors import TrainingError
from jaxaccum.evaluation import recompute_statistics
from jaxaccum.initial import identities, load_initial
from jaxaccum.logs import Board, Console, MetricsFile, format_line
from jaxaccum.models.init import count
from jaxaccum.preemption import Preempted, Preemption
from jaxaccum.restart import (
    NO_OBJECTS,
    best_of,
    finished,
    require_same_recipe,
    say_changes,
    say_swapped,
    sound,
)
from jaxaccum.workdir import WorkdirError, locked


def train(
    config: ml_collections.ConfigDict,
    workdir: Path,
    accept_other_recipe: bool = False,
    peers: Peers | None = None,
) -> dict[str, float]:
    """Trains, evaluates, logs and saves; returns the best evaluation's metrics.

    Args:
      config: as made by a file in configs/.
      workdir: holds metrics.jsonl, last/, best/ and events/; continued if it has a checkpoint.
      accept_other_recipe: continue a run that was started under another recipe.
      peers: the processes of the run, each of which calls this. Only the first reads and writes in
        workdir.
    Raises:
      Preempted: a signal asked the process to end, see jaxaccum/preemption.py.
      WorkdirError: another training runs in workdir, or it cannot be written.
      TrainingError: too many windows were not finite, or at its end the run has diverged.
    """
    peers = peers or Peers()

    def kept() -> int | None:
        return newest_complete(workdir)

    with (
        locked(workdir) if peers.first else contextlib.nullcontext(),
        Preemption(config.checkpoint.grace, kept, peers) as preemption,
    ):
        return _train(config, workdir, accept_other_recipe, preemption, peers)


def _train(
    config: ml_collections.ConfigDict,
    workdir: Path,
    accept_other_recipe: bool,
    preemption: Preemption,
    peers: Peers,
) -> dict[str, float]:
    train_set = run.open_source(config, "train")
    val_set = run.open_source(config, "val", train_set.names)
    for line in (*train_set.report.lines(), *val_set.report.lines()):
        print(line)
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
    fingerprint = this.recipe.fingerprint
    log_file = MetricsFile(workdir / "metrics.jsonl", fingerprint)
    per_epoch = max(round(len(train_set) / this.recipe.nbs), 1)
    every = {name: config[name].every or per_epoch for name in ("log", "eval", "checkpoint")}

    def due(name: str, step: int) -> bool:
        return every[name] > 0 and (step % every[name] == 0 or step == this.steps)

    def owes(step: int) -> bool:
        """An evaluation is done when its line is there: a run may be stopped before it is."""
        return step > 0 and due("eval", step) and not log_file.evaluated(step)

    over = None
    if peers.first:
        over = finished(this, workdir, accept_other_recipe, owes)
    over = peers.from_first("finished", over)
    if over is not None:
        return over

    stream = run.make_stream(this, train_set)
    engine = make_engine(this.task.forward, this.rule, this.window)
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
    evaluator = this.task.evaluator(config, val_set)
    describe(this, train_set, count(params), workdir)

    # The first process alone saves and restores: what is divided it gets whole from the others.
    keep = config.checkpoint.keep
    with Checkpoints(workdir, keep) if peers.first else Elsewhere() as checkpoints:
        state = this.rule.init(params, stats)
        best: dict[str, float] = {}
        noise_scale, divergence = NoiseScale(), Divergence()
        signatures = {"train": signature(train_set), "val": signature(val_set)}
        if checkpoints.latest is not None:
            place = engine.shardings(state)
            if not peers.alone:
                one = SingleDeviceSharding(jax.local_devices()[0])
                place = jax.tree.map(lambda _: one, place)
            template = jax.tree.map(
                lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
                state, place,
            )  # fmt: skip

            def check(meta: dict[str, Any]) -> None:
                if not accept_other_recipe:
                    require_same_recipe(meta, this.recipe, workdir)

            state, meta = checkpoints.restore(template, check)
            noise_scale = NoiseScale(meta.get("noise"))
            divergence = Divergence(meta.get("divergence"))
            say_changes(meta.get("signatures", {}), signatures)
            print(f"continuing from update {int(state.step)} in {workdir}")
        if not peers.alone:
            peers.meet("before the broadcast")  # here a signal still ends the run at once
            preemption.hold()
            peers.connect(engine.mesh)
            state = peers.broadcast(state)
        state = engine.place_state(state)
        done, consumed = int(state.step), int(state.windows)
        owed = False
        if peers.first:
            log_file.rewind(done)
            owed = owes(done)
            # If a better one came after this checkpoint, nothing is left; it will come again.
            best = checkpoints.rewind(done - 1 if owed else done)
        owed, best = peers.from_first("owed", [owed, best])

        # Stdout of the other processes leads nowhere.
        stream_of_lines = None if peers.first else sys.stdout
        console = Console(this.steps, done, this.recipe.nbs, this.task.unit, stream=stream_of_lines)
        board = Board(workdir / "events", done) if config.log.tensorboard and peers.first else None
        metric, more_is_better = this.task.monitor
        measurable = getattr(val_set.report, "objects", 1) > 0
        if every["eval"] > 0 and not measurable:
            console.line(f"{NO_OBJECTS}; best/ will hold the weights of the last evaluation")
        plain = run.make_stream(this, train_set, plain=True) if config.eval.precise_bn else stream
        windows = stream.windows(
            this.samples_before(consumed), map(this.size_of, itertools.count(consumed)),
            workers=config.data.workers, prefetch=config.data.prefetch, share=engine.share,
        )  # fmt: skip

        def meta_now(**more) -> dict[str, Any]:
            return {
                "fingerprint": fingerprint,
                "recipe": this.recipe.as_dict(),
                "config": config.to_dict(),
                "names": list(train_set.names),
                "facts": this.task.facts(train_set),
                "best": best,
                "noise": noise_scale.state,
                "divergence": divergence.state,
                "signatures": signatures,
                **more,
            }

        def evaluate_now(step: int) -> None:
            nonlocal best
            occasion = f"best at {step}"
            weights = engine.whole(state.ema or {"params": state.params, "stats": state.stats})
            if peers.first:
                evaluate_here(step, weights)
                peers.from_first(occasion, best)
            else:
                with preemption.allowed():
                    best = peers.from_first(occasion, best)

        saved = done

        def save(step: int) -> None:
            nonlocal saved
            whole, saved = state, step
            if not peers.alone:  # leaf by leaf: all together may not fit on a device
                whole = jax.tree.map(lambda leaf: np.asarray(engine.whole(leaf)), state)
            checkpoints.save(step, whole, meta_now())

        def evaluate_here(step: int, weights: Any) -> None:
            nonlocal best
            with preemption.allowed():
                if config.eval.precise_bn:
                    weights = weights | {
                        "stats": recompute_statistics(
                            this, weights["params"], weights["stats"], plain,
                            config.eval.precise_bn,
                        )
                    }  # fmt: skip
                result, pictures = evaluator(weights["params"], weights["stats"], config.log.images)
            score, unknown = result[metric], np.isnan(result[metric])
            better = score - best[metric] if best and not np.isnan(best[metric]) else 0.0
            # Of equal scores the later is better: it has learned from more.
            better = better >= 0 if more_is_better else better <= 0
            if not measurable or (better and not unknown):
                best = {"step": step, **result}
                checkpoints.save_best(step, weights, meta_now(metrics=best))
                checkpoints.wait()
            log_file.write({"step": step, "kind": "eval", **result})
            console.line(format_line(step, this.steps, {"kind": "eval", **result}))
            if board:
                board.scalars({f"val/{k}": v for k, v in result.items()}, step)
                if pictures:
                    board.image("val/samples", contact_sheet(pictures, 2), step)
            if unknown and measurable:
                console.line(f"{metric} is not a number: a prediction is not finite")
            elif unknown:
                console.line(f"{NO_OBJECTS}; these weights count as the best so far")
            if str(divergence):
                console.line(str(divergence))

        reported = consumed

        def report(number: int, values: dict[str, jax.Array]) -> bool:
            """Reads the log of an update while the next one runs; whether it was one."""
            nonlocal reported
            ok = report_here(number, values)
            reported = number + 1
            return ok

        def report_here(number: int, values: dict[str, jax.Array]) -> bool:
            log: dict[str, Any] = {k: v.item() for k, v in jax.device_get(values).items()}
            console.update(int(log["ok"]), samples=this.size_of(number))
            for line in stream.news():
                console.line(line) if peers.first else print(line, file=sys.stderr)
            if not log["ok"]:
                indices = stream.indices(this.samples_before(number), this.size_of(number))
                _skipped(console, number, indices, log, train_set, config.max_skipped)
                return False
            if config.log.noise_scale:
                noise_scale.add(log["noise/trace"], log["noise/square"])
            divergence.add(log["loss"], log["grad_norm"])
            step = int(log["step"])
            if not due("log", step) or not peers.first:
                return True
            record = {
                "step": step,
                "kind": "train",
                "epoch": this.samples_before(number + 1) / len(train_set),
                **{k: v for k, v in log.items() if k.startswith(("loss", "metrics/"))},
                "lr": float(this.schedule.lr[step - 1]),
                "grad_norm": log["grad_norm"],
                **{k: v for k, v in log.items() if k.startswith("sums/")},
                **noise_scale.record(this.recipe.group),
                "samples": int(log["samples"]),
                "skipped": int(log["windows"]) - step,
            }
            log_file.write(record)
            more = {f"{this.task.unit}_per_second": console.per_second}
            more |= this.task.readable(record)
            shown = {
                k: v for k, v in record.items() if not k.startswith(("samples", "skipped", "sums/"))
            }
            console.line(format_line(step, this.steps, shown | more))
            if board:
                board.scalars(record | more, step)
            if stream.truncated:  # only detectors have objects
                console.line(
                    f"{stream.truncated} objects left out so far"
                    f"{'' if peers.alone else ' by this process'}: samples with more than "
                    f"data.max_objects={config.data.max_objects} (the smallest go first)"
                )
            return True

        width = this.window.geometry.microbatch * this.window.geometry.devices
        pending: deque = deque()

        def compute(batch: dict[str, np.ndarray]) -> None:
            nonlocal state, consumed, done
            steps = -(-this.size_of(consumed) // width)
            state, log = engine.update(state, batch, steps)
            pending.append((consumed, log))
            consumed, done = consumed + 1, done + 1

        def rescue() -> None:
            """Saves what an error would lose: if all of it was logged and is sound, and no other
            process takes part, which may be anywhere."""
            nonlocal done
            if not peers.alone or every["checkpoint"] <= 0:
                return
            try:
                while pending:
                    done -= not report(*pending.popleft())
                if done > saved and reported == consumed and sound(state, done):
                    save(done)
                    checkpoints.wait()
                    console.line(
                        f"an error ends the run; update {done} was saved, and the same command "
                        "continues from there"
                    )
            except Exception as another:  # the first is the one to tell
                kept = newest_complete(workdir)
                console.line(
                    f"an error ends the run, and what came after "
                    f"{'the start' if kept is None else f'update {kept}'} is lost ({another})"
                )

        stopped_at = done
        preempted = None
        preemption.hold()
        try:
            if owed:
                with console.pause():
                    evaluate_now(done)
            if done < this.steps:
                console.line("compiling the update (kept on disk for the next start)")
            while done < this.steps:
                with preemption.allowed():
                    batch = next(windows)
                if not peers.begin(consumed):
                    raise preemption.preempted()
                compute(batch)
                if len(pending) > 1:
                    done -= not report(*pending.popleft())
                if due("eval", done) or due("checkpoint", done):
                    while pending:
                        done -= not report(*pending.popleft())
                    if done == stopped_at:  # the window was skipped: nothing new here
                        continue
                    stopped_at = done
                    with console.pause():
                        if due("checkpoint", done):  # first: no evaluation may cost one
                            save(done)
                        if due("eval", done):
                            evaluate_now(done)
                while done == this.steps and pending:  # a window skipped at the end is made up for
                    done -= not report(*pending.popleft())
        except Preempted as signalled:
            preempted = signalled
            for number in range(consumed, peers.furthest(consumed)):  # others have begun it
                samples = this.samples_before(number), [this.size_of(number)]
                compute(next(stream.windows(*samples, prefetch=0, share=engine.share)))
            while pending:
                done -= not report(*pending.popleft())
            if every["checkpoint"] > 0 and done > saved:
                save(done)
                checkpoints.wait()
        except (CheckpointError, TrainingError, WorkdirError):
            raise  # what failed is the saving, or the state is not worth it
        except Exception:
            rescue()
            raise
        windows.close()
        console.close()
        if board:
            board.close()
        log_file.close()
        checkpoints.wait()
        if preempted:
            raise preempted
        if best:
            print(f"best: {best_of(this, best, workdir)}")
        if peers.first:
            say_swapped("train", train_set)
            say_swapped("val", val_set)
        if str(divergence):
            raise TrainingError(f"{divergence} Everything up to update {done} is kept.")
    return best


def describe(this: run.Run, source: tasks.Source, parameters: int, workdir: Path) -> None:
    """Prints what was derived from the config."""
    config, samples = this.config, len(source)
    print(f"{config.model}: {parameters:,} parameters, {config.dtype}, {jax.default_backend()}")
    print(this.window)
    print(
        f"{this.steps} updates over {samples} samples "
        f"({this.sizes.sum() / max(samples, 1):.1f} epochs), "
        f"{config.optimizer.name}, peak learning rate {this.schedule.lr.max():.3g}, weight decay "
        f"{run.optim.weight_decay(config):.3g}"
    )
    if configs.is_compat(config):
        print(
            f"compat: the usual accumulation; effective batches of {this.sizes.min()} to "
            f"{this.sizes.max()} samples, every microbatch normalised by itself"
        )
    advice = host_memory.advice() if jax.default_backend() == "cpu" else []
    for line in [*this.task.notes(config, source, int(this.sizes.sum())), *advice]:
        print(line)
    print(f"workdir {workdir}", flush=True)


def _skipped(console, number, indices, log, source: tasks.Source, limit: int) -> None:
    names = ", ".join(source.name(int(i)) for i in indices)
    console.line(
        f"window {number} skipped ({log['skipped_in_row']} in a row): loss {log['loss']}, "
        f"gradient norm {log['grad_norm']}"
    )
    if log["skipped_in_row"] >= limit:
        raise TrainingError(
            f"{limit} windows in a row had a loss or gradient that is not finite; the last was "
            f"window {number} with the samples {indices.tolist()} ({names}). Look at these, lower "
            "lr.base, or raise max_skipped."
        )
