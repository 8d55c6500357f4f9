#!/usr/bin/env bash
# Everything that a GPU has to show, in ten minutes after the setup: kernels, head, steps, memory, monitoring, vLLM. See check_gpu.py.
# usage: scripts/check_gpu.sh [--parts head step ...] [--minutes 10] [--output_dir runs/gpu] [--small]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
source .venv/bin/activate
python scripts/check_gpu.py "$@"
