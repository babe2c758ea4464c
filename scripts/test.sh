#!/usr/bin/env bash
# Checks the format, the style and the types, then runs the tests on every processor that this
# process may use; needs only Python 3.11 to 3.14, best 3.12 or later (scripts/setup_env.sh).
#
#   scripts/test.sh [arguments of pytest]
#   scripts/test.sh -m "slow or not slow"     all tests; -m "not long" those of CI
#   scripts/test.sh -n 1, -p no:xdist         in one process of their own, in this one
#   XLA_FLAGS= scripts/test.sh                with all of XLA's optimizations: half as fast
#
# Exit status 0 only if everything passed. The last line is pytest's summary.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh
install requirements-test.txt

status=0
"$python" -m ruff format --check . || status=1
"$python" -m ruff check . || status=1
"$python" -m mypy jaxaccum || status=1
if ((status)); then
  echo "format, style or types: FAILED (above); the tests follow"
fi
# A file stays in one process, which forgets its programs when the file ends (tests/conftest.py).
case "$*" in
  *no:xdist*) ;;
  *) set -- -n auto --dist loadfile --no-loadscope-reorder "$@" ;;
esac
"$python" -m pytest "$@" || status=$?
exit "$status"
