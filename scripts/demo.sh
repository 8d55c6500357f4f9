#!/usr/bin/env bash
# The whole story on two CPU cores: cold start, diversity, selection, handoff, GRPO, evaluation, report. Nothing is downloaded
# but Python packages. The start that the recipe's comparison supports runs live, beside recorded runs of its rivals; --all runs
# every chain of the recipe.
# usage: scripts/demo.sh [--all]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

recipe=recipes/skills-chain-tiny
case "${1-}" in
    "") configs=("$recipe/chain_nll_last.yaml") ;;
    --all) configs=("$recipe"/chain*.yaml) ;;
    *) printf 'usage: scripts/demo.sh [--all]\n' >&2; exit 2 ;;
esac

bash scripts/setup.sh
source .venv/bin/activate
# A model of 0.37 M parameters has no work for a second thread; waiting for one costs more than it gains.
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# The folder that a chain writes to; its output_dir is relative to the config.
run_dir() {
    python -c 'import os, sys
from aesl_trl.chain.config import read_config
print(os.path.relpath(read_config(sys.argv[1]).output_dir))' "$1"
}

reports=()
for config in "${configs[@]}"; do
    printf 'demo: aesl chain --config %s\n' "$config"
    aesl chain --config "$config"
    reports+=("$(run_dir "$config")/report.html")
done
# One chain ends with its report's place; of several, here are all.
if [ ${#reports[@]} -gt 1 ]; then printf 'demo: report %s\n' "${reports[@]}"; fi
