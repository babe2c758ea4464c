"""The report of a comparison of models: what `python -m jaxaccum.compare` writes as report.md."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxaccum.comparing import plots


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation; no deviation of a single value."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), spread


def _shown(mean: float, spread: float | None, digits: int = 4, sign: str = "") -> str:
    text = f"{mean:{sign}.{digits}f}"
    return text if spread is None else f"{text} ± {spread:.{digits}f}"


def difference(a: Sequence[float], b: Sequence[float]) -> str:
    """mean(a) - mean(b), with the root of the summed squares of both spreads."""
    (mean_a, spread_a), (mean_b, spread_b) = mean_and_spread(a), mean_and_spread(b)
    spread = None if spread_a is None or spread_b is None else math.hypot(spread_a, spread_b)
    return _shown(mean_a - mean_b, spread, sign="+")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def planned(plan: Mapping[str, Any], geometry: Mapping[str, Any]) -> str:
    """Planned memory of a run; "~" where its microbatch lies between two that were planned."""
    rows = plots.rows_like_choice(plan)
    sizes = [r["microbatch"] for r in rows]
    # The plan is of updates of one microbatch; by scan the others lie on the device, too.
    more = geometry["steps"] - 1 if geometry["engine"] == "scan" else 0
    memory = [r["peak_bytes"] + more * r["batch_bytes"] for r in rows]
    about = "" if geometry["microbatch"] in sizes else "~ "
    return about + mib(float(np.interp(geometry["microbatch"], sizes, memory)))


def report(results: Mapping[str, Any]) -> str:
    """report.md."""
    names, shared, seeds = list(results["models"]), results["shared"], results["seeds"]
    own, fair = results["phases"]
    versions, hardware, data = results["versions"], results["hardware"], results["data"]
    one_run = [n for n in names if own[n][0]["nbs"] == shared]
    best = [{n: [r["best"]["map50_95"] for r in phase[n]] for n in names} for phase in (own, fair)]
    parts = [
        f"# {len(names)} models, at their own batch and at {shared}",
        f"```\npython -m jaxaccum.compare {shlex.join(results['command'])}\n```",
        f"{hardware['device_kind']} ({hardware['platform']}), {hardware['cores']} CPU cores; "
        + ", ".join(f"{k} {v}" for k, v in versions.items())
        + f". {data['samples']} training images, {data['classes']} classes, "
        f"{data['image_size']} px. {counted(len(seeds), 'seed')}: {', '.join(map(str, seeds))}.",
        "## Models",
        table(
            ["model", "parameters", f"GFLOPs at {data['image_size']} px", "strides", "bn_group"],
            [[n, f"{m['parameters']:,}", f"{m['gflops']:.2f}", "/".join(map(str, m["strides"])),
              m["bn_group"]] for n, m in results["models"].items()],
        ),
        "## Plan",
        _plan_part(results),
        "## Recipes and geometries",
        f"Learning rate: {_rules_part(results['rules'])}. The recipe decides what is learned; the "
        "geometry, microbatch x accumulation steps x devices, decides only time and memory. The "
        f"fingerprint is that of seed {seeds[0]}.",
        table(
            ["model", "phase", "recipe", "effective batch", "learning rate", "updates", "epochs",
             "geometry", "padded"],
            [[n, phase, r["fingerprint"], r["nbs"], f"{r['lr']:.3g}", r["updates"],
              f"{r['epochs']:.3g}", _geometry(r["geometry"]), r["geometry"]["padding"]]
             for n in names for phase, r in _phases_of(n, own, fair)],
        ),
    ]  # fmt: skip
    if one_run:
        parts.append(
            f"The own batch of {', '.join(one_run)} is the shared one. Geometry does not change a "
            "run, so that one run, trained once, stands in both phases."
        )
    for number, title, phase in (
        (1, "each at its own best batch", own), (2, f"all at an effective batch of {shared}", fair)
    ):  # fmt: skip
        parts += [f"## Phase {number}: {title}", _phase_table(phase, results["plans"])]
    parts += [
        "mAP is on the val split, by the averaged weights where the recipe averages: the best "
        "evaluation of each run (picked on this same split) and the last one. Planned memory is "
        "what the compiled update needs on one device, by XLA's count; resident memory is the "
        "largest that the whole training process had (ru_maxrss: Python, the compiler, images in "
        "memory; not that of a GPU). Images per second are the median of what training printed, "
        "without evaluations and the first compilation.",
        "![validation curves](curves.png)",
        "![planned memory](memory.png)",
        "![images per second](speed.png)",
        "## Geometry changes nothing that is learned",
        _check_part(results["check"]),
        "## What it says",
        _seeds_part(len(seeds)),
        "**Batch**, Phase 1 minus Phase 2, best mAP50-95: one model, the same images for the same "
        "number of epochs, another effective batch. It is the effect of the batch together with "
        "what follows from it, the learning rate by the rule and the number of updates.",
        table(
            ["model", "batch, Phase 1", "batch, Phase 2", "difference"],
            [[n, own[n][0]["nbs"], shared,
              "the same run" if n in one_run else difference(best[0][n], best[1][n])]
             for n in names],
        ),
        "**Architecture**, Phase 2, best mAP50-95, row minus column. Of one seed, these recipes "
        f"differ in {', '.join(f'`{field}`' for field in results['differing'])} and in nothing "
        "else.",
        table(
            ["", *names],
            [[a, *("" if a == b else difference(best[1][a], best[1][b]) for b in names)]
             for a in names],
        ),
        "Neither says more than these data, this image size and this number of epochs do.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def counted(number: int, noun: str) -> str:
    """Such as "2 devices"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _phases_of(name: str, own: Mapping, fair: Mapping) -> list[tuple[str, dict[str, Any]]]:
    """(phase, first run) of a model; one row if it is the same run."""
    a, b = own[name][0], fair[name][0]
    return [("1 and 2", a)] if a["run"] == b["run"] else [("1", a), ("2", b)]


def _geometry(geometry: Mapping[str, Any]) -> str:
    text = f"{geometry['microbatch']} x {geometry['steps']} x {geometry['devices']}, "
    return (
        text
        + geometry["engine"]
        + ("" if geometry["remat"] == "none" else f", remat={geometry['remat']}")
    )


def _plan_part(results: Mapping[str, Any]) -> str:
    plans = results["plans"]
    first = next(iter(plans.values()))
    found = {
        name: {r["microbatch"]: r for r in plots.rows_like_choice(plan)}
        for name, plan in plans.items()
    }

    def cell(name, size):
        if size not in found[name]:
            return ""
        row, text = found[name][size], mib(found[name][size]["peak_bytes"])
        if size == plans[name]["choice"]["microbatch"]:
            return f"**{text}**"
        return text if row["fits"] else f"{text}, too much"

    text = (
        "Memory of the compiled update, of one microbatch on one device, against "
        f"{mib(first['memory_bytes'])}, of which {mib(first['budget_bytes'])} are planned for. "
        "Bold is the largest that fits: the effective batch of Phase 1 (times the devices). "
    )
    capped = [n for n, p in plans.items() if p["largest"] < p["choice"]["microbatch"]]
    if capped:
        text += f"But for {', '.join(capped)}, which --most={results['most']} limits. "
    sizes = sorted({size for rows in found.values() for size in rows})
    rows = [[size, *(cell(name, size) for name in plans)] for size in sizes]
    return text + "\n\n" + table(["microbatch", *plans], rows)


def _phase_table(phase: Mapping[str, Any], plans: Mapping[str, Any]) -> str:
    rows = []
    for name, runs in phase.items():

        def over_seeds(which, key, runs=runs):
            return _shown(*mean_and_spread([r[which][key] for r in runs]))

        resident = max(r["resident_bytes"] or 0 for r in runs)
        rows.append(
            [name, runs[0]["nbs"], f"{runs[0]['lr']:.3g}", over_seeds("best", "map50_95"),
             over_seeds("best", "map50"), over_seeds("last", "map50_95"),
             _shown(*mean_and_spread([r["images_per_second"] for r in runs]), digits=1),
             planned(plans[name], runs[0]["geometry"]),
             mib(resident) if resident else "not measured"]
        )  # fmt: skip
    head = ["model", "batch", "learning rate", "best mAP50-95", "its mAP50", "last mAP50-95",
            "images/s", "planned memory", "resident memory"]  # fmt: skip
    return table(head, rows)


def _check_part(check: Mapping[str, Any]) -> str:
    if not check["apart"]:
        return "Not checked (--check_updates=0)."
    rows = [
        [number, *(f"{v:.7g}" for v in losses), f"{apart:.1e}"]
        for number, (*losses, apart) in enumerate(
            zip(*check["losses"], check["apart"], strict=True), start=1
        )
    ]
    return (
        f"The first updates of {check['model']} at an effective batch of {check['nbs']} (recipe "
        f"{check['fingerprint']}, {check['dtype']}), its loss on each geometry. Rounding is up to "
        "1e-5 at the first update in float32; training then magnifies it, as it does any "
        "difference in a last digit.\n\n"
        + table(["update", *check["geometries"], "largest relative difference"], rows)
        + f"\n\nLargest relative difference: {check['apart'][0]:.1e} at the first update, "
        f"{max(check['apart']):.1e} over {counted(len(rows), 'update')}."
    )


def _rules_part(rules: Mapping[str, str]) -> str:
    different = dict.fromkeys(rules.values())
    if len(different) == 1:
        return next(iter(different))
    return "; ".join(f"{name}: {text}" for name, text in rules.items())


def _seeds_part(seeds: int) -> str:
    if seeds == 1:
        return (
            "Every number is of one run. Two runs that differ in the seed alone differ too, by an "
            "amount that one seed does not show, so small differences mean nothing here; "
            "`--seeds=0,1,2` measures it."
        )
    return (
        f"± is the standard deviation over {seeds} seeds, of a difference the root of the summed "
        "squares of both. So few seeds do not tell a difference of less than about twice its ± "
        "from chance."
    )
