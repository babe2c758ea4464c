"""All measures, in the order of the document."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks import accumulation, device, pieces, pipeline, startup, training
from benchmarks.harness import Measure

MEASURES = (
    Measure("train", "The quickstart", device.train, device.TRAININGS),
    Measure("law", "The law", device.law, tuple(device.LAWS), device.LAWS),
    Measure("update", "An update of k microbatches", accumulation.update),
    Measure("memory", "Memory of more microbatches", accumulation.memory),
    Measure("state", "What is held between updates", accumulation.state),
    Measure("groups", "Statistics of the whole effective batch", accumulation.groups),
    Measure("plans", "Planned memory, and what is used", device.plans, device.PLANS),
    Measure(
        "yolo",
        "Training detectors, against PyTorch",
        training.yolo,
        training.YOLO,
        gpu_only=training.TF32,
    ),
    Measure("kyolo", "Training detectors, against kyolo", training.kyolo, training.KYOLO),
    Measure(
        "program",
        "What an update is made of",
        device.program,
        tuple(device.PROGRAMS),
        device.PROGRAMS,
    ),
    Measure("depthwise", "Depthwise convolutions, two forms", device.depthwise),
    Measure("adapointr", "Training AdaPoinTr, against PyTorch", training.adapointr),
    Measure("geometries", "AdaPoinTr, 48 clouds in smaller parts", accumulation.geometries),
    Measure("points", "Operations on clouds, against others", pieces.points_, pieces.OPERATIONS),
    Measure("assigner", "The assigner, by objects", pieces.assigner),
    Measure("startup", "The first update", startup.startup),
    Measure("pipeline", "Samples, against an OpenCV loader", pipeline.pipeline, pipeline.PARTS),
)


def flags_of_xla(key: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The variable that tells XLA what a part is measured with, if anything."""
    name, _, part = key.partition(".")
    flags_ = next(m for m in MEASURES if m.name == name).xla_flags.get(part, "")
    return {"XLA_FLAGS": f"{environment.get('XLA_FLAGS', '')} {flags_}".strip()} if flags_ else {}
