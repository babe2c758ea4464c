"""python -m jaxaccum.export --workdir=DIR --out=FILE [--format=stablehlo|onnx]
    [--platforms=cpu,cuda,tpu] [--batch=N] [--end_to_end] [--nms [--conf=0.25] [--iou=0.7]
    [--max_det=300]]

Writes a run's best weights and its network as one program: StableHLO, which `load_exported`, or any
runtime of StableHLO, runs without this package's models; or ONNX (`pip install onnx`), with --nms
with non-maximum suppression inside. The suffix of FILE says which: .stablehlo, .mlir, .hlo or none,
or .onnx; with --format it may be another.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from jaxaccum import programs
from jaxaccum.programs import FORMATS, PLATFORMS, load_exported
from jaxaccum.training.inference import END_TO_END_HELP, WEIGHTS_HELP, load, require_run

__all__ = ["export", "load_exported"]


def export(
    workdir: Path,
    file: Path,
    platforms: Sequence[str] = PLATFORMS,
    batch: int = 0,
    format: str = "",
    weights: str = "",
    end_to_end: bool | None = None,
    nms: bool = False,
    **choice: float,
) -> dict[str, Any]:
    """Writes FILE, the program, and FILE.json, what it takes and gives; see `programs.write`.

    Args:
      workdir: of the run.
      weights: as of `inference.load`.
      end_to_end, nms, choice: as of `programs.write`.
    Raises:
      CheckpointError: the workdir holds no weights, or the file cannot be written.
      ConfigError: the program cannot be had in this form.
    """
    require_run(workdir)
    programs.format_of(file, format)
    programs.make_folder(file)
    return programs.write(
        load(workdir, weights), file, platforms, batch, format, end_to_end, nms, **choice
    )


if __name__ == "__main__":
    from jaxaccum import command_line

    _WORKDIR = flags.DEFINE_string("workdir", None, "the run whose weights to use", required=True)
    _OUT = flags.DEFINE_string("out", None, "the file to write", required=True)
    _WEIGHTS = flags.DEFINE_string("weights", "", WEIGHTS_HELP)
    _FORMAT = flags.DEFINE_enum(
        "format", "", ["", *FORMATS], "of the program; by the suffix of --out if not given"
    )
    _PLATFORMS = flags.DEFINE_list("platforms", list(PLATFORMS), "where a StableHLO program runs")
    _ONCE = flags.DEFINE_bool("end_to_end", None, END_TO_END_HELP)
    _NMS = flags.DEFINE_bool("nms", False, "of ONNX: non-maximum suppression inside")
    _CONF = flags.DEFINE_float("conf", None, "with --nms: scores are above it; 0.25", 0, 1)
    _IOU = flags.DEFINE_float("iou", None, "with --nms: most that two boxes overlap; 0.7", 0, 1)
    _MAX_DET = flags.DEFINE_integer("max_det", None, "with --nms: boxes of an image; 300", 1)
    _BATCH = flags.DEFINE_integer("batch", 0, "samples per call; 0 for any number", 0, 65536)

    def main() -> int:
        choice = {"conf": _CONF.value, "iou": _IOU.value, "max_det": _MAX_DET.value}
        facts = export(
            Path(_WORKDIR.value),
            Path(_OUT.value),
            _PLATFORMS.value,
            _BATCH.value,
            _FORMAT.value,
            _WEIGHTS.value,
            _ONCE.value,
            _NMS.value,
            **{name: value for name, value in choice.items() if value is not None},
        )
        print(json.dumps(facts))
        return 0

    command_line.run_verb(
        main,
        __doc__,
        (
            ("export --workdir=runs/mine --out=mine.stablehlo", "one file for any platform"),
            (
                "export --workdir=runs/mine --out=mine.onnx --batch=1 --nms",
                "for other runtimes, of a detector with non-maximum suppression inside",
            ),
        ),
    )
