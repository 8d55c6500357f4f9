#!/usr/bin/env bash
# Lint, format and tests. The default leaves out what is slow; --all runs it too, and the GPU tests where there is a GPU.
# usage: scripts/test.sh [--all] [arguments for pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

selection=()
if [ "${1-}" = --all ]; then
    shift
    selection=(-m "not gpu" --timeout 1800)
    if nvidia-smi >/dev/null 2>&1; then selection=(-m "" --timeout 1800); fi
fi

bash scripts/setup.sh
source .venv/bin/activate
# QLoRA's chains run in the slow tests only; importing bitsandbytes would slow down every process of the others.
if [ ${#selection[@]} -gt 0 ] && ! python -c "import bitsandbytes" 2>/dev/null; then
    python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[qlora]"
fi
# The models of the tests are too small to gain from threads, and two processes of one test would fight for the cores.
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

ruff check .
ruff format --check .
lint-imports --no-cache
# Two processes; a file stays in one of them, so that what its tests share is made once.
python -m pytest -n 2 --dist loadfile ${selection[@]+"${selection[@]}"} "$@"
