# shellcheck shell=bash
# Makes .venv and installs what jaxaccum needs, once; sourced from the repository's root.
#
#   install FILE...   requirements.txt where an NVIDIA GPU is present, requirements-cpu.txt
#                     otherwise, and the given requirement files. Does nothing where the files
#                     have not changed since the last time. Leaves the interpreter in $python.

python=.venv/bin/python

fail() {
  echo "error: $*" >&2
  exit 1
}

recent() { # whether $1 runs and is Python 3.11 or later
  command -v "$1" >/dev/null 2>&1 &&
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

make_venv() {
  local candidate
  for candidate in python3.13 python3.12 python3.11 python3 python; do
    if recent "$candidate"; then
      echo "making .venv with $("$candidate" --version)"
      if ! "$candidate" -m venv .venv; then
        rm -rf .venv
        fail "$candidate cannot make a virtual environment; on Debian and Ubuntu install the" \
          "package python3-venv, then start this again"
      fi
      return
    fi
  done
  fail "needs Python 3.11 or later as python3.13, python3.12, python3.11, python3 or python" \
    "(found: $(python3 --version 2>/dev/null || echo none))"
}

install() {
  local file files=(requirements-cpu.txt "$@")
  if [[ "$(nvidia-smi -L 2>/dev/null)" == *GPU* ]]; then
    files[0]=requirements.txt
  fi
  [[ -x $python ]] || make_venv
  recent "$python" || fail ".venv is not of Python 3.11 or later: remove it, then start this again"
  mkdir -p .venv/installed
  for file in "${files[@]}"; do
    if ! cmp -s "$file" ".venv/installed/$file"; then
      echo "installing $file (once; this can take some minutes)"
      "$python" -m pip install --quiet --disable-pip-version-check -r "$file"
      cp "$file" ".venv/installed/$file"
    fi
  done
}
