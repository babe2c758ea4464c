#!/usr/bin/env bash
# Checks the format, the style and the types, then runs the tests; needs only Python 3.11 or later.
#
#   scripts/test.sh [arguments of pytest]
#   scripts/test.sh -m "slow or not slow"     all tests
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
"$python" -m pytest "$@" || status=$?
exit "$status"
