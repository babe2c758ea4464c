"""A detector that compiles in seconds, for scripts that show something else than how well it sees.

Importing this registers the model "small-t": two scales, no blocks.
"""

from jaxaccum.models import yolo

yolo.FAMILIES["small"] = yolo.Family(
    depth={"t": 1.0},
    width={"t": 0.25},
    max_channels={"t": 1024},
    rows=(
        (-1, 1, "Conv", (32, 3, 2)),
        (-1, 1, "Conv", (32, 3, 2)),
        (-1, 1, "Conv", (64, 3, 2)),  # 2, stride 8
        (-1, 1, "Conv", (64, 3, 2)),  # 3, stride 16
        ((2, 3), 1, "Detect", ()),
    ),
)
