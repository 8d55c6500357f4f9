"""Files of a run or a model that somebody else wrote: no code in them is run, and none leads out of its folder."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from adapters import make_adapter
from bad_input import Project, evaluate, only_line, sft

from aesl_trl import cli, files
from aesl_trl.training.checkpoints import MANIFEST


class Bomb:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture
def project(tmp_path, tiny_model_dir):
    return Project(tmp_path, tiny_model_dir, make_adapter(tiny_model_dir, tmp_path / "adapter"))


@pytest.fixture
def bomb(tmp_path):
    """Return a function that writes a bomb to a path. At the end, none may have gone off, and each must be a bomb."""
    goes_off, written = tmp_path / "gone-off", []

    def write(path):
        torch.save({"state": Bomb(goes_off)}, path)
        written.append(path)

    yield write
    assert not goes_off.exists()
    for path in written:
        if path.exists():
            torch.load(path, weights_only=False)
            assert goes_off.is_dir()
            goes_off.rmdir()


def run(*argv):
    """Run a command, and return its exit code, or None where it returned."""
    try:
        cli.main([str(word) for word in argv])
    except SystemExit as exit:
        return exit.code


def test_training_args_are_never_read(project, bomb):
    for folder in (project.out, project.out / "candidates" / "step-2", project.out / "checkpoint-2"):
        bomb(folder / "training_args.bin")
    assert run("select", project.out, "--rule", "last") is None
    assert run("handoff", project.out) is None
    assert run("report", project.out) is None
    handed_over = files.read_json(project.out / files.HANDOFF)
    assert handed_over and not list((project.out / "handoff").glob("*.bin"))


def test_a_model_whose_weights_are_a_pickle(project, bomb, capsys):
    folder = Path(project.model({"model.safetensors": None}))
    bomb(folder / "pytorch_model.bin")
    with pytest.raises((SystemExit, Exception)) as error:
        cli.main(evaluate(lambda _: str(folder))(project))
    assert not isinstance(error.value, SystemExit) or error.value.code != 0


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_checkpoint_with_a_pickle_is_not_gone_on_from(project, bomb, capfd, name, has_manifest):
    assert run(*sft(output_dir="trained", save_strategy="steps", save_steps=1, max_steps=2)(project)) is None
    for folder in (project.folder / "trained").glob("checkpoint-*"):
        bomb(folder / name)
        if not has_manifest:
            (folder / MANIFEST).unlink()
    capfd.readouterr()
    again = sft(output_dir="trained", max_steps=3, resume_from_checkpoint="./trained/checkpoint-2")(project)
    with pytest.raises((SystemExit, Exception)) as error:
        cli.main(again)
    if has_manifest:
        assert error.value.code == 2
        assert f"{name} " in only_line(capfd.readouterr().err, "sft")


@pytest.mark.parametrize("path", ["../elsewhere", "selected/../../elsewhere", "{absolute}"])
def test_a_selection_cannot_point_out_of_its_run(project, capsys, path):
    elsewhere = project.folder / "elsewhere"
    shutil.copytree(project.base, elsewhere)
    selection = {"rule": "last", "step": 2, "path": path.format(absolute=elsewhere)}
    (project.out / files.SELECTION).write_text(json.dumps(selection))
    assert run("handoff", project.out) == 2
    line = only_line(capsys.readouterr().err, "handoff")
    assert "selection.json" in line and "outside of its folder" in line and f"aesl select {project.out}" in line
    assert not (project.out / "handoff").exists()


@pytest.mark.parametrize("link", ["candidates/step-2", "candidates/step-2/model.safetensors", "selected"])
def test_no_symlink_leads_a_command_out_of_a_run(project, capsys, link):
    place, secret = project.out / link, project.folder / "secret"
    secret.mkdir()
    (secret / "diary.txt").write_text("mine")
    target = secret / "diary.txt" if place.is_file() else secret
    place.unlink() if place.is_file() else shutil.rmtree(place)
    place.symlink_to(target)
    candidate = project.out / "candidates/step-2"
    commands = {
        "select": ["select", project.out, "--rule", "last"],
        "handoff": ["handoff", project.out if link == "selected" else candidate],
        "interpolate": ["interpolate", project.out, candidate, "--output", project.folder / "averaged"],
        "eval": evaluate(lambda _: str(candidate))(project),
        "probe": ["probe", project.out, "--config", project.config("probe.yaml", {"use_cpu": True})],
    }
    if link == "selected":
        commands = {name: commands[name] for name in ("select", "handoff", "interpolate")}
    for name, argv in commands.items():
        assert run(*argv) == 2, name
        assert "symlink" in only_line(capsys.readouterr().err, name), name
    assert sorted(path.name for path in project.folder.rglob("diary*")) == ["diary.txt"]
    assert os.stat(secret / "diary.txt").st_nlink == 1


def test_an_index_cannot_name_weights_outside_of_its_folder(project, capsys):
    shutil.copytree(project.base, project.folder / "elsewhere")
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        folder = Path(project.model())
        (folder / index).write_text(json.dumps({"weight_map": {"a": "../elsewhere/model.safetensors"}}))
        for argv in (["handoff", folder], evaluate(lambda _, folder=folder: str(folder))(project)):
            assert run(*argv) == 2
            line = only_line(capsys.readouterr().err, argv[0])
            assert f"{index} names ../elsewhere/model.safetensors, which is outside of its folder" in line
        shutil.rmtree(folder)


def test_code_of_a_model_is_not_run_unasked(project, tmp_path, capsys):
    """Refuse a model's own code (`auto_map`), which makes a folder, in one line of each command that loads a model."""
    folder = Path(project.model())
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own", "architectures": ["Own"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    for arguments in (sft(model=lambda _: str(folder))(project), evaluate(lambda _: str(folder))(project)):
        assert run(*arguments) == 2
        assert "trust_remote_code" in only_line(capsys.readouterr().err, arguments[0])
    assert not (tmp_path / "ran").exists()


def test_yaml_makes_no_objects(project, tmp_path, capsys):
    text = f"dataset_name: !!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']\n"
    assert run(*sft(dataset_name=..., text=text)(project)) == 2
    assert "sft.yaml" in only_line(capsys.readouterr().err, "sft")
    assert not (tmp_path / "ran").exists()
