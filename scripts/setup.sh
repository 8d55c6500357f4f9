#!/usr/bin/env bash
# Make .venv ready: Python, torch for this machine, the package in editable mode with the tools for tests.
# A second run only compares a stamp; nothing is fetched while setup.cfg and pyproject.toml stay as they are.
# usage: scripts/setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

find_python() {
    local name
    for name in python3.11 python3 python3.12 python3.13 python3.14; do
        if "$name" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    return 1
}

# The folder counts: an editable installation points to it, and a copied .venv would point to the old one.
# So does a GPU: it wants another build of torch.
stamp() {
    local machine=without
    has_gpu && machine=with
    "$venv_python" -c 'import hashlib, sys
parts = [*map(str.encode, (sys.prefix, sys.version, sys.argv[1])), *(open(name, "rb").read() for name in sys.argv[2:])]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())' "$machine GPU" setup.cfg pyproject.toml
}

pip_install() {
    local quiet=()
    [ -t 1 ] || quiet=(--quiet)
    "$venv_python" -m pip install --disable-pip-version-check --no-input ${quiet[@]+"${quiet[@]}"} "$@"
}

has_gpu() { nvidia-smi >/dev/null 2>&1; }

# Plain torch brings 6 GB of CUDA on Linux: first the CPU build, where an index or a folder that pip knows has it.
install_torch() {
    local any there cpu="torch==2.13.0+cpu"
    any=$(sed -n 's/^ *\(torch>=[^ ]*\)$/\1/p' setup.cfg)
    there=$("$venv_python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null) || there=""
    if [ -n "$there" ] && ! { has_gpu && [[ "$there" == *+cpu ]]; }; then
        say "torch is there"
    elif has_gpu; then
        say "installing $any with CUDA for the GPU (6 GB, some minutes)"
        # A CPU build from before the GPU would be enough for pip
        [ -z "$there" ] || pip_install --force-reinstall --no-deps "$any"
        pip_install "$any"
    else
        say "no NVIDIA GPU: installing $cpu"
        pip_install --retries 1 "$cpu" 2>/dev/null && return
        say "not there; trying PyTorch's own index of CPU builds"
        pip_install --retries 1 --index-url https://download.pytorch.org/whl/cpu "$cpu" 2>/dev/null && return
        say "not there either; installing plain $any (on Linux 6 GB with CUDA, some minutes)"
        pip_install "$any"
    fi
}

venv_python=.venv/bin/python
stamp_file=.venv/aesl_trl.stamp

if ! "$venv_python" -c '' 2>/dev/null; then
    python=$(find_python) || fail "no Python 3.11 or newer with its venv module was found"
    say "creating .venv with $python ($("$python" -V))"
    "$python" -m venv --clear .venv || fail "$python cannot create .venv (Debian and Ubuntu: install python3-venv)"
fi
if [ "$(cat "$stamp_file" 2>/dev/null)" = "$(stamp)" ]; then
    say ".venv is ready"
    exit 0
fi

started=$SECONDS
rm -f "$stamp_file"
install_torch
say "installing the package with its dependencies and the tools for tests"
# Without build isolation a new setup.cfg needs no network when what it asks for is already there.
pip_install "setuptools>=77"
pip_install --no-build-isolation --editable ".[dev,math]"
stamp >"$stamp_file"
say ".venv is ready ($((SECONDS - started)) s)"
