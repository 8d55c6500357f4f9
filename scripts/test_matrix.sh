#!/usr/bin/env bash
# The default tests on the oldest and the newest packages that setup.cfg allows, and on the newest that vLLM 0.31 allows.
# Each set has an environment of its own under .matrix/, which a second run reuses; remove the folder to resolve afresh.
# usage: scripts/test_matrix.sh [oldest|vllm|newest ...] [-- arguments for pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# TRL 1.15 with every lower bound of setup.cfg; transformers on both sides of 5.18, where Trainer.end() came.
lower_bounds() { sed -n '/^install_requires/,/^\[/s/^ *\([a-z0-9_]*\)>=\([0-9.]*\).*/\1==\2/p' setup.cfg; }
requirements() {
    case "$1" in
        oldest) lower_bounds | sed 's/^trl==1.15$/trl==1.15.0/' ;;
        vllm) printf '%s\n' 'trl<2' 'transformers>=5.10.4,<5.18' ;;
        newest) printf '%s\n' 'trl<2' transformers accelerate peft datasets ;;
        *) printf 'test_matrix: %s is none of oldest, vllm, newest\n' "$1" >&2; return 2 ;;
    esac
}

sets=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do sets+=("$1"); shift; done
[ "${1-}" = -- ] && shift
[ ${#sets[@]} -gt 0 ] || sets=(oldest vllm newest)
for name in "${sets[@]}"; do requirements "$name" >/dev/null; done

bash scripts/setup.sh # finds Python and the torch build of this machine; the sets take both from it
torch=$(.venv/bin/python -c 'import torch; print(torch.__version__)')
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
failed=()
for name in "${sets[@]}"; do
    folder=.matrix/$name
    if [ ! -e "$folder/ready" ]; then
        printf 'test_matrix: installing %s\n' "$name"
        .venv/bin/python -m venv --clear "$folder"
        requirements "$name" | grep -v '^torch==' >"$folder/requirements.txt"
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "torch==$torch" "setuptools>=77"
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-build-isolation \
            -r "$folder/requirements.txt" --editable ".[dev,math]"
        touch "$folder/ready"
    fi
    "$folder/bin/python" -m pip list --disable-pip-version-check 2>/dev/null |
        awk -v name="$name" '$1 ~ /^(trl|transformers|accelerate|peft|datasets|torch)$/ { line = line " " $1 " " $2 }
            END { print "test_matrix: " name ":" line }'
    PATH="$PWD/$folder/bin:$PATH" "$folder/bin/python" -m pytest -q -p no:cacheprovider "$@" || failed+=("$name")
done
[ ${#failed[@]} -eq 0 ] || { printf 'test_matrix: failed on %s\n' "${failed[*]}" >&2; exit 1; }
