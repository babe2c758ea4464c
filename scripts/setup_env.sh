# shellcheck shell=bash
# Makes .venv and installs what jaxaccum needs, once; sourced from the repository's root.
#
#   install FILE...   requirements.txt where an NVIDIA GPU is present, requirements-cpu.txt
#                     otherwise, and the given requirement files, in the versions of constraints/.
#                     Does nothing where the files have not changed since the last time. Leaves
#                     the interpreter in $python.
#
# A new .venv is of the newest stable Python from 3.12 to 3.14 that is on the PATH or where pyenv, uv
# and conda keep theirs. Python 3.11, where JAX is the older 0.10.2, is taken where no newer is found.
# JAXACCUM_PYTHON=/path/to/python takes that one. A .venv that is there is kept.

venv=.venv
python=$venv/bin/python

fail() {
  echo "error: $*" >&2
  exit 1
}

describe() { # "3.13.1 stable" of the interpreter $1, or what keeps it from being taken unasked
  "$1" -c '
import sys, sysconfig
kind = "stable"
try:
    import ctypes, ensurepip, ssl, venv, zlib
except ImportError as error:
    kind = f"without-{error.name}"
if sys.implementation.name != "cpython":
    kind = sys.implementation.name
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    kind = "free-threaded"
if sysconfig.get_config_var("Py_DEBUG"):
    kind = "debug-build"
if sys.version_info.releaselevel != "final":
    kind = "pre-release"
print("{}.{}.{}".format(*sys.version_info), kind)' </dev/null 2>/dev/null
}

candidates() { # paths of interpreters that may be of Python 3.$1, ...
  local conda folder minor
  for minor in "$@"; do
    type -aP "python3.$minor" || true # pyenv's shims are among these; they run only if selected
  done
  type -aP python3 python || true
  conda=${CONDA_EXE:-$HOME/miniconda3/bin/conda}
  for folder in \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/{,*/envs/}*/bin \
    "${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/uv/python}"/*/bin \
    "${CONDA_PREFIX:-$HOME/miniconda3}/bin" "${conda%/bin/conda}"/{,envs/*/}bin \
    "${MAMBA_ROOT_PREFIX:-$HOME/micromamba}"/{,envs/*/}bin "$HOME"/.conda/envs/*/bin \
    "$HOME"/{mini,ana}conda{,3}/{,envs/*/}bin "$HOME"/{mini,mamba}forge{,3}/{,envs/*/}bin; do
    for minor in "$@"; do
      if [[ -x $folder/python3.$minor ]]; then
        echo "$folder/python3.$minor"
      fi
    done
  done
}

survey() { # "VERSION KIND PATH" of each interpreter of Python 3.$1, ..., the newest first
  local minor path said
  candidates "$@" | while read -r path; do
    said=$(describe "$path") || continue
    for minor in "$@"; do
      if [[ $said == "3.$minor."* ]]; then
        echo "$said $path"
      fi
    done
  done | sort -s -r -V -k 1,1
}

find_python() { # "VERSION PATH" of the newest stable Python 3.$1, ...; nothing where there is none
  survey "$@" | sed -n 's/ stable / /p' | sed -n 1p
}

make_venv() {
  local note="the newest found" path version
  if [[ ${JAXACCUM_PYTHON:-} ]]; then
    path=$JAXACCUM_PYTHON
    version=$(version_of "$path" "JAXACCUM_PYTHON=$path")
    note="as JAXACCUM_PYTHON says"
  else
    # 3.14 comes first though the tests run on 3.13: every package has its wheels
    # (scripts/renew_constraints.sh looks).
    read -r version path < <(find_python 14 13 12 11) ||
      fail "needs Python 3.11 to 3.14, best 3.12 or later: none that can be used is on the PATH or" \
        "with pyenv, uv or conda. Install one (on Debian and Ubuntu also the package python3-venv)" \
        "or give JAXACCUM_PYTHON=/path/to/python. Found and left: $(survey 14 13 12 11)"
  fi
  if [[ $version == 3.11.* ]]; then
    note+="; JAX for it is the older $(sed -n 's/^jax==//p' constraints/py311.txt)"
  fi
  echo "making $venv with Python $version ($path), $note"
  if ! "$path" -m venv "$venv"; then
    rm -rf "$venv"
    fail "$path cannot make a virtual environment; on Debian and Ubuntu install the package" \
      "python3-venv, then start this again"
  fi
}

version_of() { # the version of the interpreter $1, which a message calls $2
  local said
  said=$(describe "$1") || fail "$2 does not run as a Python; give or make one of Python 3.11 or later"
  case $said in
    2.* | 3.?.* | 3.10.*) fail "$2 is of Python ${said%% *}; Python 3.11 or later is needed" ;;
  esac
  echo "${said%% *}"
}

install() {
  local asked constraints file files=(requirements-cpu.txt "$@") stamp version
  if [[ "$(nvidia-smi -L 2>/dev/null)" == *GPU* ]]; then
    files[0]=requirements.txt
  fi
  [[ -e $venv ]] || make_venv
  version=$(version_of "$python" "$venv (remove it, then start this again)")
  if [[ ${JAXACCUM_PYTHON:-} ]]; then
    asked=$(version_of "$JAXACCUM_PYTHON" "JAXACCUM_PYTHON=$JAXACCUM_PYTHON")
    [[ $asked == "$version" ]] || fail "JAXACCUM_PYTHON=$JAXACCUM_PYTHON is of Python $asked and" \
      "$venv of Python $version: remove $venv, then start this again"
  fi
  constraints=constraints/py312.txt # for all later ones
  if [[ $version == 3.11.* ]]; then
    constraints=constraints/py311.txt
  fi
  mkdir -p "$venv/installed"
  for file in "${files[@]}"; do
    stamp=$venv/installed/$file
    if ! cat "$constraints" "$file" | cmp -s - "$stamp"; then
      echo "installing $file (once; this can take some minutes)"
      "$python" -m pip install --quiet --disable-pip-version-check -r "$file" -c "$constraints"
      cat "$constraints" "$file" >"$stamp"
    fi
  done
}
