#!/usr/bin/env bash
# Trains a small detector on generated scenes, evaluates it and draws what it finds; needs only
# Python 3.11 to 3.14, best 3.12 or later (scripts/setup_env.sh). Started again, it continues where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh
install

# Memory in huge pages (docs/profiles.md); other systems take no notice.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

workdir=runs/quickstart
"$python" -m jaxaccum.train --config=configs/quickstart.py --workdir="$workdir"
metrics=$("$python" -m jaxaccum.evaluate --workdir="$workdir" | tail -n 1)

"$python" - "$workdir/scenes" <<'PYTHON'
import sys
from pathlib import Path

from jaxaccum.data import Scenes
from jaxaccum.draw import save_image

folder, scenes = Path(sys.argv[1]), Scenes("val")
folder.mkdir(parents=True, exist_ok=True)
for index in range(8):
    save_image(folder / f"{scenes.name(index)}.png", scenes.image(index))
PYTHON
"$python" -m jaxaccum.predict --workdir="$workdir" --source="$workdir/scenes" --out="$workdir/drawn"

"$python" - "$metrics" "$workdir/drawn" <<'PYTHON'
import json
import sys

metrics = json.loads(sys.argv[1])
print(f"mAP50 {metrics['map50']:.3f}, mAP50-95 {metrics['map50_95']:.3f} on the generated val split")
print(f"pictures: {sys.argv[2]}")
PYTHON
