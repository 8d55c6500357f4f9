"""Start Python programs as processes of their own that have torch, transformers, datasets, PEFT and TRL already.

A server loads the libraries once for each pytest worker, and each program is forked from it: importing them anew takes
7 s of a core. A program is a module's or a script's `__main__`, with its own arguments, environment and output.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

import pytest


SUPPORT = Path(__file__).parent
LIBRARIES = ("trl", "peft", "transformers.models.qwen2.modeling_qwen2", "aesl_trl.training.session", "preloaded")


def run(arguments, *, timeout, cwd=None, **env) -> subprocess.CompletedProcess:
    """Run `python ARGUMENTS` to its end, with `env` added to this environment, and return what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = start(arguments, out=out, err=err, cwd=cwd, **env)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(arguments, timeout, out.read_bytes(), err.read_bytes())
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read_text(), err.read_text())


def start(arguments, *, out=os.devnull, err=os.devnull, cwd=None, **env) -> multiprocessing.Process:
    """Start `python ARGUMENTS`: `-m MODULE` or a script, then its own arguments; `out` and `err` name files."""
    arguments = [str(argument) for argument in arguments]
    environment = {**os.environ, **{name: str(value) for name, value in env.items()}}
    process = _server().Process(target=_main, args=(arguments, environment, cwd, str(out), str(err)))
    process.start()
    return process


@cache
def _server():
    """Start this worker's server, and return the context whose processes come from it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), str(SUPPORT.parents[1])]))
        forkserver.ensure_running()
    return context


def _main(arguments, environment, cwd, out, err):
    gc.freeze()  # as in conftest.py: trainers ask for collections
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd or os.getcwd())
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
