#!/usr/bin/env bash
# Every check of this repository, from a clean checkout: needs Python 3.10 or newer, pip and gcc.
#
#     bash scripts/test.sh [PYTEST_ARGUMENT...]      e.g. bash scripts/test.sh -m 'not slow' -x
#
# Makes .venv (or uses $VENV), then runs ruff, mypy, import-linter and pytest; all of them run,
# also after one has failed. Prints each with its seconds and exits 1 if any failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null
source scripts/environment.sh

# Tests start several processes on few cores: one thread each is the fastest they get.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY="${TRANSFORMERS_VERBOSITY:-error}"

results=()
failures=0

# check NAME COMMAND...: runs it, notes how it ended and how long it took.
check() {
  local name="$1" start_s="$SECONDS" verdict=ok
  shift
  printf '\n== %s\n' "$name"
  if ! "$@"; then
    verdict=FAILED
    failures=$((failures + 1))
  fi
  results+=("$(printf '%-22s %-7s %5d s' "$name" "$verdict" "$((SECONDS - start_s))")")
}

echo "== environment"
make_environment test --editable '.[executor,ray,slurm,notebook,dev]'

check "ruff check" ruff check .
check "ruff format --check" ruff format --check .
check "mypy" mypy
check "lint-imports" lint-imports --no-logo
check "pytest" python -m pytest "$@"

printf '\n== summary\n'
printf '%s\n' "${results[@]}"
[[ "$failures" -eq 0 ]]
