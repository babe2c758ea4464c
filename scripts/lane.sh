#!/usr/bin/env bash
# Runs a thin selection of the tests on other versions than scripts/test.sh takes, in an environment
# of its own: the core law, the data, and a few updates of the quickstart.
#
#   scripts/lane.sh 3.11     on Python 3.11 and its JAX, in .venv-3.11
#   scripts/lane.sh pre      with the newest JAX, pre-releases too, newer than that of constraints/,
#                            on the Python of .venv or the newest found, in .venv-pre
#
# Exit status 0 if all passed, and where there is no such Python or JAX, which the last line says.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
lane=${1:-}

selection=(
  # the core law
  tests/accumulate/test_{recipe,batchnorm,update,hlo,nnx}.py
  tests/training/test_optim.py tests/losses/test_losses.py
  # the data
  tests/data/test_data_{loader,augment,sources}.py
  tests/data/test_scenes.py
  # what else leans on JAX and Orbax
  tests/machine/test_{known_answers,jax_stand_ins,onednn}.py tests/training/test_checkpoint.py
)

# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh
case $lane in
  3.11)
    unset JAXACCUM_PYTHON # that is the one of .venv
    if [[ ! -e .venv-3.11 ]]; then
      JAXACCUM_PYTHON=$(find_python 11 | cut -d ' ' -f 2-)
      if [[ ! $JAXACCUM_PYTHON ]]; then
        echo "lane 3.11: SKIPPED, Python 3.11 is not here"
        exit
      fi
    fi
    ;;
  pre)
    install requirements-test.txt
    pinned=$("$python" -c 'import jax; print(jax.__version__)')
    newest=$("$python" -m pip install --quiet --disable-pip-version-check --dry-run --no-deps \
      --ignore-installed --pre --report - jax |
      "$python" -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])')
    if [[ $newest == "$pinned" ]]; then
      echo "lane pre: SKIPPED, no JAX newer than $pinned is to be had"
      exit
    fi
    JAXACCUM_PYTHON=$PWD/$python
    ;;
  *) fail "usage: scripts/lane.sh 3.11|pre" ;;
esac

venv=.venv-$lane
python=$venv/bin/python
install requirements-test.txt
if [[ $lane == pre ]]; then # without the pins: what else it asks for comes along
  "$python" -m pip install --quiet --disable-pip-version-check --pre --upgrade jax jaxlib ||
    fail "lane pre: JAX $newest does not install"
fi

status=0
export XLA_FLAGS=${XLA_FLAGS-} # as users compile: tests/conftest.py sets this only if it is not set
"$python" -m pytest -n auto --dist loadfile --durations=10 "${selection[@]}" || status=1
workdir=$(mktemp -d)
trap 'rm -rf "$workdir"' EXIT
"$python" -m jaxaccum.train --config=configs/quickstart.py --config.steps=4 --config.microbatch=8 \
  --config.data.image_size=64 --config.log.every=1 --workdir="$workdir" || status=1
"$python" - "$lane" "$status" <<'PYTHON'
import platform
import sys

import jax

said = "FAILED" if int(sys.argv[2]) else "passed"
print(f"lane {sys.argv[1]}: {said}, Python {platform.python_version()}, JAX {jax.__version__}")
PYTHON
exit "$status"
