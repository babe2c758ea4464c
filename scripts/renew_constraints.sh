#!/usr/bin/env bash
# Renews constraints/, the versions that CI passes with: fresh environments, of Python 3.11 and of
# the newest found, get the newest versions that the requirement files allow; these are written down.
#
#   scripts/renew_constraints.sh
#
# Says what changed; keep it (git commit) only if .ci/run passes with it. The pin of jax is also that of
# its plugins for CUDA, which each jax wants of its own version; the libraries of CUDA follow them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

renew() { # constraints/$1.txt for the Pythons 3.$2, ..., made on the first that is here
  local found minor file=constraints/$1.txt
  found=$(find_python "${@:2}" | cut -d ' ' -f 2-)
  [[ $found ]] || fail "$file needs a Python 3.$2; none is here"
  python=$work/$1/bin/python
  "$found" -m venv "$work/$1"
  pip=("$python" -m pip --disable-pip-version-check --quiet)
  "${pip[@]}" install --upgrade pip
  "${pip[@]}" install -r requirements-cpu.txt -r requirements-test.txt
  {
    echo "# Made by scripts/renew_constraints.sh on Python $(describe "$python" | cut -d ' ' -f 1)."
    "${pip[@]}" freeze --all --exclude pip # with setuptools, which freeze leaves out
  } >"$work/$1.txt"
  for minor in "${@:2}"; do # promise (of tensorflow-datasets) has no wheel
    "${pip[@]}" install --dry-run --target "$work/none" --no-deps --python-version "3.$minor" \
      --only-binary :all: --no-binary promise -r "$work/$1.txt" ||
      fail "$file: not for Python 3.$minor (above)"
  done
  diff -U 0 "$file" "$work/$1.txt" || true
  cp "$work/$1.txt" "$file"
}

renew py311 11
renew py312 14 13 12
