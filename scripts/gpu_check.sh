#!/usr/bin/env bash
# One hour that may come: what to know of this software on a machine with one NVIDIA GPU, in nine
# minutes, without a network. Started again, it goes on where it was.
#
#   scripts/gpu_check.sh --out=FOLDER [--wheels=DIR] [--minutes=9] [--quick] [--only=law,...]
#
# Uses python3 (or $PYTHON) as it is: jax with CUDA, flax, optax, orbax-checkpoint, absl-py, numpy,
# scipy, opencv, psutil, tqdm, PyYAML, safetensors; and torch with CUDA to compare with. Grain and
# TensorFlow Datasets are not needed. Where ml_collections, hotcoco and tensorboardX are not
# there either, bring them as wheels and name their folder:
#
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 -d DIR \
#       --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
#       ml_collections==1.1.0 hotcoco==1.3.0 tensorboardX==2.6.5
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
arguments=()
out="" wheels=""
for argument in "$@"; do
  case $argument in
  --wheels=*) wheels=${argument#--wheels=} ;;
  --out=*)
    out=${argument#--out=}
    arguments+=("$argument")
    ;;
  *) arguments+=("$argument") ;;
  esac
done
if [[ -z $out ]]; then
  echo "error: say where to write what is found: --out=FOLDER" >&2
  exit 2
fi
mkdir -p "$out"
if [[ -n $wheels && ! -d $out/site ]]; then
  shopt -s nullglob
  files=("$wheels"/*.whl)
  if ((${#files[@]} == 0)); then
    echo "error: --wheels=$wheels has no .whl in it; the head of this script says how to get them" >&2
    exit 2
  fi
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps \
    --no-compile --target "$out/site" "${files[@]}"
fi
if [[ -d $out/site ]]; then
  PYTHONPATH="$(cd "$out/site" && pwd)${PYTHONPATH:+:$PYTHONPATH}"
  export PYTHONPATH
fi
export PYTHONUNBUFFERED=1
exec "$python" scripts/gpu_check.py "${arguments[@]}"
