"""The package as users meet it: its metadata, its command, the wheel, the scripts."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import aesl_trl
from aesl_trl.errors import InputError
from aesl_trl.recipes import recipes


ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]


def run(*command: str | Path, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=250, **kwargs)


def requirement(name: str) -> Requirement:
    (found,) = [r for r in map(Requirement, metadata.requires("aesl_trl")) if r.name == name and r.marker is None]
    return found


def test_metadata():
    about = metadata.metadata("aesl_trl")
    assert about["Version"] == aesl_trl.__version__
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.11"
    assert set(about.get_all("Provides-Extra")) == {"dev", "docs", "gym", "math", "qlora", "vllm"}


def test_installed_versions_satisfy_the_metadata():
    for entry in map(Requirement, metadata.requires("aesl_trl")):
        if entry.marker is None:
            assert entry.specifier.contains(metadata.version(entry.name), prereleases=True), entry


@pytest.mark.parametrize("name", ["trl", "transformers"])
@pytest.mark.parametrize(
    "version", ["0.1", "1.14.2", "1.15.0", "1.16.0", "1.99", "2.0.0", "5.9", "5.10.4", "5.30", "99"]
)
def test_import_refuses_the_versions_that_the_metadata_excludes(name, version, monkeypatch):
    supported, real = requirement(name).specifier.contains(version), metadata.version
    monkeypatch.setattr(metadata, "version", lambda wanted: version if wanted == name else real(wanted))
    if supported:
        aesl_trl._check_versions()
    else:
        with pytest.raises(ImportError, match=f"{name}.* but {name} {re.escape(version)} is installed: pip install"):
            aesl_trl._check_versions()


@pytest.mark.parametrize(
    "command", [["-c", "import aesl_trl"], ["-m", "aesl_trl.sft"], ["-m", "aesl_trl.cli", "grpo"]]
)
def test_an_unsupported_version_ends_each_command_at_once(tmp_path, command):
    (tmp_path / "trl-1.14.2.dist-info").mkdir()
    (tmp_path / "trl-1.14.2.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 1.14.2\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: aesl_trl {aesl_trl.__version__} needs trl{requirement('trl').specifier}, but trl 1.14.2 is "
        f"installed: pip install 'trl{requirement('trl').specifier}'"
    )


def test_command_is_installed():
    result = run(Path(sys.executable).with_name("aesl"), "--help")
    assert result.returncode == 0, result.stderr
    assert "aesl COMMAND" in result.stdout


def test_each_setting_has_one_owner():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert {name.split(".")[0] for name in setup.sections()} == {"metadata", "options"}
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)
    assert set(project) == {"build-system", "tool"}
    assert set(project["tool"]) == {"importlinter", "pytest", "ruff"}


def test_no_package_registry_is_named():
    """Leave the registry (a mirror, a closed network) to the user: pip's configuration names it, never our files."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    host = re.compile(rb"(?:pypi|pythonhosted|npmjs|conda|anaconda|crates)\.(?:org|com|io)\b")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert len(paths) > 10
    assert [str(path) for path in paths if path.is_file() and host.search(path.read_bytes())] == []


# The wheel


def files_below(folder: Path) -> set[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in paths}


LEFT_OUT = {"results", "bases"}  # of a recipe: what was recorded, and the bases of comparisons


def carried_recipes() -> set[str]:
    """Return the files of the recipes that the wheel has: all but those left out."""
    return {name for name in files_below(ROOT / "recipes") if not LEFT_OUT & {*Path(name).parts}}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy: a build/ left in the checkout would add files that are no longer there."""
    source = tmp_path_factory.mktemp("source")
    for name in ("aesl_trl", "recipes"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    result = run(sys.executable, "-m", "pip", "wheel", *offline, "-w", "dist", ".", cwd=source)
    assert result.returncode == 0, result.stderr
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_carries_the_package_and_the_recipes_without_results(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"aesl_trl/{name}" for name in files_below(ROOT / "aesl_trl")}
    expected |= {f"aesl_trl/recipe_files/{name}" for name in carried_recipes()}
    carried = {name for name in names if ".dist-info/" not in name}
    assert carried == expected
    assert wheel.stat().st_size < 20e6
    assert "aesl_trl/py.typed" in carried  # type checkers then read our annotations
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_wheel_works_from_any_folder(wheel, tmp_path):
    target = tmp_path / "site"
    installed = run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel)
    assert installed.returncode == 0, installed.stderr
    code = "from aesl_trl.recipes.recipes import recipes_dir; print(recipes_dir())"
    environment = {**os.environ, "PYTHONPATH": str(target)}
    found = run(sys.executable, "-c", code, cwd=tmp_path, env=environment)
    assert found.returncode == 0, found.stderr
    folder = Path(found.stdout.strip())
    assert folder.is_relative_to(target.resolve())
    assert files_below(folder) == carried_recipes()
    assert (folder / "skills-tiny" / "chain.yaml").is_file()
    assert (folder / "skills-tiny" / "base" / "config.json").is_file()
    checked = run(target / "bin" / "aesl", "recipes", "check", folder / "skills-tiny", cwd=tmp_path, env=environment)
    assert checked.returncode == 0, checked.stdout
    helped = run(target / "bin" / "aesl", "--help", cwd=tmp_path, env=environment)
    assert helped.returncode == 0, helped.stderr


def test_each_recipe_has_at_most_one_small_base():
    """A quick stand-in for the wheel's size: weights are nearly all of it."""
    weights = [path for path in (ROOT / "recipes").rglob("*.safetensors") if not LEFT_OUT & {*path.parts}]
    assert {path.parent.name for path in weights} == {"base"} and len({path.parent for path in weights}) == len(
        weights
    )
    assert sum(path.stat().st_size for path in weights) < 19e6


# The recipes


def test_recipes_dir_of_a_checkout():
    assert recipes.recipes_dir() == ROOT / "recipes"


def test_the_list_shows_the_first_comment(tmp_path):
    for name, text in (
        ("model-a/chain.yaml", "# 1 GPU, 10 minutes\n"),
        ("b/chain_x.yaml", "seed: 0\n"),
        ("c/eval.yaml", ""),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    assert recipes.list_recipes(tmp_path) == "b\nmodel-a  1 GPU, 10 minutes"


def test_copied_recipes_are_whole_and_never_overwrite(tmp_path, capsys):
    target = tmp_path / "recipes"
    recipes.main(["copy", str(target)])
    assert files_below(target) == files_below(ROOT / "recipes")
    assert capsys.readouterr().out.startswith("copied ")
    with pytest.raises(InputError, match="exists"):
        recipes.main(["copy", str(target)])


# The scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_is_executable(script):
    assert os.access(script, os.X_OK)
    result = run("bash", "-n", script)
    assert result.returncode == 0, result.stderr
    assert "set -euo pipefail" in script.read_text()


FAKE_PYTHON = """#!/usr/bin/env bash
# Answers as a venv without torch, and writes down what pip is asked for
case "$*" in
    *hashlib*) { echo "$*"; cat setup.cfg; } | cksum ;;
    *m.version*) cat torch_there 2>/dev/null ;;
    *"pip install"*) printf '%s\\n' "${@: -1}" >>asked; case "$*" in *+cpu*) exit 1 ;; esac ;;
esac
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """Make a checkout with the real scripts, whose Python only writes down what it is asked for."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    write_executable(tmp_path / ".venv" / "bin" / "python", FAKE_PYTHON)
    return tmp_path


def write_executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def setup(checkout: Path, gpu: bool) -> list[str]:
    """Run setup.sh, and return what pip was asked to install, in order."""
    write_executable(checkout / "bin" / "nvidia-smi", f"#!/bin/sh\nexit {0 if gpu else 9}\n")
    (checkout / "asked").unlink(missing_ok=True)
    environment = {**os.environ, "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}"}
    result = run("bash", checkout / "scripts" / "setup.sh", env=environment)
    assert result.returncode == 0, result.stderr
    asked = checkout / "asked"
    return asked.read_text().splitlines() if asked.exists() else []


def test_setup_tries_cpu_builds_of_torch_first(checkout):
    torch = str(requirement("torch"))
    assert setup(checkout, gpu=False) == ["torch==2.13.0+cpu"] * 2 + [torch, "setuptools>=77", ".[dev,math]"]


def test_setup_takes_plain_torch_on_a_gpu(checkout):
    assert setup(checkout, gpu=True) == [str(requirement("torch")), "setuptools>=77", ".[dev,math]"]


def test_setup_replaces_the_cpu_build_of_torch_once_there_is_a_gpu(checkout):
    torch = str(requirement("torch"))
    setup(checkout, gpu=False)
    (checkout / "torch_there").write_text("2.13.0+cpu\n")
    assert setup(checkout, gpu=False) == []
    assert setup(checkout, gpu=True) == [torch, torch, "setuptools>=77", ".[dev,math]"]
    (checkout / "torch_there").write_text("2.13.0\n")
    assert setup(checkout, gpu=True) == []
    assert setup(checkout, gpu=False) == ["setuptools>=77", ".[dev,math]"]  # the build with CUDA serves


def test_setup_installs_again_only_after_a_change(checkout):
    setup(checkout, gpu=True)
    assert setup(checkout, gpu=True) == []
    with open(checkout / "setup.cfg", "a") as file:
        file.write("# changed\n")
    assert setup(checkout, gpu=True) != []


def test_failed_setup_leaves_no_stamp(checkout):
    write_executable(checkout / ".venv" / "bin" / "python", FAKE_PYTHON.replace("*+cpu*)", "*editable*)"))
    result = run("bash", checkout / "scripts" / "setup.sh")
    assert result.returncode != 0
    assert not list((checkout / ".venv").glob("*.stamp"))


@pytest.fixture
def demo(checkout) -> Path:
    """Make a checkout with two chains whose `aesl` only prints what it is asked for."""
    recipe = checkout / "recipes" / "skills-chain-tiny"
    recipe.mkdir(parents=True)
    (recipe / "grpo.yaml").write_text("max_steps: 1\n")
    for arm in ("", "_nll_last"):
        lines = [f"output_dir: ../../runs/tiny/run{arm}/seed-{{seed}}", "grpo: {config: grpo.yaml}"]
        (recipe / f"chain{arm}.yaml").write_text("\n".join(lines) + "\n")
    write_executable(checkout / "scripts" / "setup.sh", "exit 0\n")
    environment = f'export PATH="{checkout}/bin:$PATH"\n'
    write_executable(checkout / ".venv" / "bin" / "activate", environment)
    write_executable(checkout / "bin" / "aesl", '#!/bin/sh\necho "ran $* offline=$HF_HUB_OFFLINE"\n')
    write_executable(checkout / "bin" / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    return checkout


@pytest.mark.parametrize(("flags", "arms"), [([], ["_nll_last"]), (["--all"], ["", "_nll_last"])])
def test_demo_runs_the_chains_and_lists_the_reports_of_several(demo, flags, arms):
    result = run("bash", demo / "scripts" / "demo.sh", *flags)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("ran")] == [
        f"ran chain --config recipes/skills-chain-tiny/chain{arm}.yaml offline=1" for arm in arms
    ]
    reports = [f"demo: report runs/tiny/run{arm}/seed-0/report.html" for arm in arms]
    if len(arms) > 1:
        assert lines[-len(arms) :] == reports
    else:  # the chain's own last line names its report
        assert not [line for line in lines if line.startswith("demo: report")]


def test_demo_refuses_an_unknown_flag(demo):
    result = run("bash", demo / "scripts" / "demo.sh", "--al")
    assert result.returncode == 2
    assert result.stderr.startswith("usage:")
