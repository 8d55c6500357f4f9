"""provenance: versions, commit and machine, also where one of them cannot be known."""

import subprocess
from importlib import metadata
from pathlib import Path

import aesl_trl
from aesl_trl import provenance


def test_a_package_that_is_not_installed_has_no_version():
    expected = {"aesl_trl": aesl_trl.__version__, "torch": metadata.version("torch"), "no-such-package": None}
    assert provenance.package_versions(expected) == expected


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True, text=True).stdout


def test_the_commit_of_a_checkout(tmp_path, monkeypatch):
    code = tmp_path / "package" / "provenance.py"
    code.parent.mkdir()
    code.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(code))
    git(tmp_path, "init")
    assert provenance.commit() is None  # the package lies in a checkout of something else
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD").strip()
    assert provenance.commit() == head
    code.write_text("changed = True\n")
    assert provenance.commit() == head + "+"
    (tmp_path / "notes").write_text("what git does not track is no change of the code")
    git(tmp_path, "checkout", "--", ".")
    assert provenance.commit() == head


def test_without_git_there_is_no_commit(monkeypatch):
    def no_git(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(provenance.subprocess, "run", no_git)
    assert provenance.commit() is None


def test_hardware_names_the_gpus(monkeypatch):
    monkeypatch.setattr(provenance.shutil, "which", lambda name: f"/usr/bin/{name}")
    done = subprocess.CompletedProcess([], 0, stdout="NVIDIA H200\nNVIDIA H200\n")
    monkeypatch.setattr(provenance.subprocess, "run", lambda *args, **kwargs: done)
    processor, cores, *gpus = provenance.hardware().rsplit(", ", 3)
    assert processor and cores.endswith(" cores") and gpus == ["NVIDIA H200"] * 2
    monkeypatch.setattr(provenance.shutil, "which", lambda name: None)
    assert provenance.hardware() == f"{processor}, {cores}"
