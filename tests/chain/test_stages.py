"""Stages: their commands and environment."""

import os
import sys

import pytest
from small_chains import make

from aesl_trl import files
from aesl_trl.chain.stages import (
    ANYWHERE,
    BUILDERS,
    Stage,
    build_candidates,
    build_eval,
    build_grpo,
    build_handoff,
    build_mix,
    build_probe,
    build_report,
    build_sft,
    check_stages,
    stage_env,
)
from aesl_trl.errors import InputError


# ---- Commands


def flags_of(stage: Stage) -> dict[str, str]:
    return {
        flag: value for flag, value in zip(stage.command, stage.command[1:], strict=False) if flag.startswith("--")
    }


def test_stage_commands(project, tmp_path):
    chain = make(project(handoff={"mode": "merge"}, report={"title": "-t"}), seed=4)
    sft, grpo = flags_of(build_sft(chain)), flags_of(build_grpo(chain))
    assert build_sft(chain).command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert sft["--config_file"] == grpo["--config_file"] == str(tmp_path / "cpu.yaml")
    assert (sft["--config"], sft["--output_dir"]) == (str(tmp_path / "sft.yaml"), str(chain.run / "sft"))
    assert sft["--seed"] == grpo["--seed"] == "4"
    assert grpo["--model_name_or_path"] == str(chain.run / "handoff")
    assert build_handoff(chain).command[1:] == ["-m", "aesl_trl.cli", "handoff", str(chain.run), "--mode", "merge"]
    evaluation = flags_of(build_eval(chain))
    assert (evaluation["--start"], evaluation["--final"]) == (str(chain.run / "handoff"), str(chain.run / "grpo"))
    assert build_report(chain).command[-1] == "--title=-t"


def test_rl_may_have_a_seed_of_its_own(project):
    """Only RL's inputs change: the cold start, the selection and the handoff are those of the chain's seed."""
    chains = [make(project(grpo={"config": "grpo.yaml", **own}), seed=4) for own in ({}, {"seed": 0})]
    given = [{name: BUILDERS[name](chain).given for name in ("sft", "handoff", "grpo")} for chain in chains]
    assert given[0]["grpo"] == {"seed": 4} and given[1] == {**given[0], "grpo": {"seed": 0}}


def test_probe_by_default_takes_grpos_config(project, tmp_path):
    chain = make(project(), seed=4)
    stage = build_probe(chain)
    assert stage.command[1:5] == ["-m", "aesl_trl.cli", "probe", str(chain.run / "handoff")]
    flags = flags_of(stage)
    assert (flags["--config"], flags["--seed"]) == (str(tmp_path / "grpo.yaml"), "4")
    assert flags["--output_dir"] == str(chain.run / "readiness.json") == str(stage.output)
    assert (stage.config, stage.accelerate_config) == (str(tmp_path / "grpo.yaml"), None) and stage.folder is None


def test_probe_with_settings_of_its_own(project, tmp_path):
    (tmp_path / "probe.yaml").write_text("num_samples: 16\n")
    chain = make(project(probe={"config": "probe.yaml", "accelerate_config": "cpu.yaml"}))
    for stage, start in ((build_probe(chain), chain.run / "handoff"), (build_candidates(chain), chain.sft_dir)):
        assert stage.command[1:3] == ["-m", "accelerate.commands.launch"]
        at = stage.command.index("aesl_trl.cli")
        assert stage.command[at - 1 : at + 3] == ["-m", "aesl_trl.cli", "probe", str(start)]
        assert flags_of(stage)["--config"] == str(tmp_path / "probe.yaml")
        assert (stage.config, stage.accelerate_config) == (str(tmp_path / "probe.yaml"), str(tmp_path / "cpu.yaml"))
    assert build_candidates(chain).output == chain.sft_dir / files.OWN / "readiness.json"


def test_who_selects_by_readiness(project, tmp_path):
    assert make(project(selection={"rule": "readiness"})).names[1] == "candidates"
    (tmp_path / "sft.yaml").write_text("diversity_steps: 5\nselection: readiness\n")
    assert make(project()).names[:3] == ["sft", "candidates", "select"]
    assert "candidates" not in make(project(selection={"rule": "last"})).names  # the chain's rule wins


def test_mix_takes_sfts_config_or_its_own(project, tmp_path):
    (tmp_path / "mix.yaml").write_text("diversity_steps: 5\n")
    stage = build_mix(make(project(selection={"rule": "mix"}), seed=4))
    assert stage.command[1:5] == ["-m", "aesl_trl.cli", "mix", str(tmp_path / "runs/one/sft")]
    assert stage.command[5:] == ["--config", str(tmp_path / "sft.yaml"), "--seed", "4"]
    assert stage.output == tmp_path / "runs/one/sft" / files.OWN / "mix.json"
    own = {"config": "mix.yaml", "accelerate_config": "cpu.yaml", "weights": [0.5, 0.7]}
    chain = make(project(selection={"rule": "mix"}, mix=own))
    stage = build_mix(chain)
    assert stage.command[-3:] == ["--weights", "0.5", "0.7"] and stage.given["weights"] == [0.5, 0.7]
    assert (stage.config, stage.accelerate_config) == (str(tmp_path / "mix.yaml"), str(tmp_path / "cpu.yaml"))
    assert chain.names[:3] == ["sft", "mix", "select"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix": {"weights": [0.5]}}, "mix is for selection by mix: add selection"),
        ({"mix": {"weights": [1.5]}, "selection": {"rule": "mix"}}, "weight is 1.5, but must be a number above 0"),
    ],
)
def test_averages_are_checked_before_the_first_stage(changes, message, project):
    with pytest.raises(InputError, match=message):
        check_stages(make(project(**changes)), ANYWHERE)


@pytest.mark.parametrize(
    ("sft", "mix", "message"),
    [
        ("use_peft: true\nuse_dora: true", None, "sft.yaml: use_dora is more than plain LoRA"),
        ("", "diversity_steps: 0", "mix.yaml: diversity_steps is 0"),
    ],
)
def test_what_mix_would_refuse_is_refused_before_the_training(sft, mix, message, project, tmp_path):
    path = project(selection={"rule": "mix"}, **({"mix": {"config": "mix.yaml"}} if mix else {}))
    (tmp_path / "mix.yaml").write_text(f"{mix}\n")
    (tmp_path / "sft.yaml").write_text(f"dataset_name: rows.jsonl\ndiversity_steps: 5\n{sft}\n")
    with pytest.raises(InputError, match=message):
        check_stages(make(path), ANYWHERE)


def test_continued_adapter(project):
    chain = make(project())
    files.write_json(chain.run / files.HANDOFF, {"mode": "continue", "base": "org/base"})
    flags = flags_of(build_grpo(chain))
    assert flags["--adapter_name_or_path"] == str(chain.run / "handoff")
    assert flags["--model_name_or_path"] == "org/base"


def test_without_sft_rl_starts_from_its_configs_model(project, tmp_path):
    chain = make(project(sft=...))
    assert chain.names == ["probe", "grpo", "eval", "report"]
    assert build_probe(chain).command[4] == str(tmp_path / "base")
    assert "--model_name_or_path" not in flags_of(build_grpo(chain))
    assert flags_of(build_eval(chain))["--start"] == str(tmp_path / "base")
    (tmp_path / "grpo.yaml").write_text("learning_rate: 1\n")
    with pytest.raises(InputError, match="model_name_or_path is missing"):
        build_eval(chain)


def test_environment_of_a_stage(project, tmp_path, monkeypatch):
    monkeypatch.setenv("AESL_OUTER", "x")
    (tmp_path / "sft.yaml").write_text("env: {HF_HUB_VERBOSITY: '1', PATH: /nowhere}\n")
    env = stage_env(build_sft(make(project())))
    assert (env["HF_HUB_VERBOSITY"], env["PYTHONUNBUFFERED"], env["AESL_OUTER"]) == ("1", "1", "x")
    assert env["PYTHONSAFEPATH"] == "1"  # no stage imports from the current folder
    assert env["PATH"] == os.environ["PATH"]
