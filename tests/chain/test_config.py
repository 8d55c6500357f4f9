"""chain.yaml: what is read, where its paths lead, and what is refused."""

import os

import pytest

from aesl_trl.chain.config import read_config
from aesl_trl.errors import InputError


def test_paths_are_relative_to_the_file(project, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    config = read_config(project())
    assert config.output_dir == str(tmp_path / "runs/one")
    assert config.sft.config == str(tmp_path / "sft.yaml")
    assert config.sft.accelerate_config == str(tmp_path / "cpu.yaml")
    assert (config.seed, config.handoff.mode, config.selection.rule) == (0, "auto", None)


def test_flags_win_and_are_relative_to_the_current_folder(project, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = read_config(project(seed=3), output_dir="out/{seed}", seed=5)
    assert (config.output_dir, config.seed) == (str(tmp_path / "here/out/5"), 5)
    assert read_config(project(output_dir=...), output_dir="out").output_dir == str(tmp_path / "here/out")


def test_seed_in_folders(project, tmp_path):
    (tmp_path / "recorded/seed-7").mkdir(parents=True)
    path = project(
        output_dir="runs/seed-{seed}",
        sft={"config": "sft.yaml", "output_dir": "shared/{seed}"},
        report={"compare": ["recorded/seed-{seed}"]},
    )
    config = read_config(path, seed=7)
    assert config.output_dir == str(tmp_path / "runs/seed-7")
    assert config.sft.output_dir == str(tmp_path / "shared/7")
    assert config.report.compare == [str(tmp_path / "recorded/seed-7")]


def test_the_probe_is_on_unless_turned_off(project, tmp_path):
    config = read_config(project())
    assert (config.probe.config, config.probe.accelerate_config, config.ignore_readiness) == (None, None, False)
    assert read_config(project(probe=None)).probe is None
    (tmp_path / "probe.yaml").write_text("num_samples: 8\n")
    config = read_config(project(probe={"config": "probe.yaml"}, ignore_readiness=True))
    assert (config.probe.config, config.ignore_readiness) == (str(tmp_path / "probe.yaml"), True)


def test_a_pattern_compares_the_runs_that_are_there(project, tmp_path):
    """An installed package carries no recorded runs: a pattern may match none, and a plain name has to be there."""
    for name in ("seed-1", "seed-0", "seed-[x]"):
        (tmp_path / "recorded" / name).mkdir(parents=True)
    given = ["recorded/seed-[01]", "none/seed-*", "recorded/seed-[x]", "recorded/seed-{seed}"]
    found = read_config(project(report={"compare": given}), seed=1).report.compare
    assert [os.path.relpath(run, tmp_path / "recorded") for run in found] == ["seed-0", "seed-1", "seed-[x]", "seed-1"]


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"gpro": {}}, ["chain.yaml: unknown key 'gpro'", "'grpo'"]),
        ({"grpo": {"confg": "x"}}, ["chain.yaml: grpo: unknown key 'confg'", "'config'"]),
        ({"grpo": ...}, ["grpo is missing"]),
        ({"grpo": {}}, ["grpo: config is missing"]),
        ({"output_dir": ...}, ["output_dir is missing"]),
        ({"output_dir": 3}, ["output_dir must be str"]),
        ({"seed": True}, ["seed must be int"]),
        ({"seed": "1"}, ["seed must be int"]),
        ({"seed": 2**32}, ["chain.yaml: seed is 4294967296, but must be at least 0 and at most 4294967295"]),
        ({"output_dir": "a" * 300}, ["output_dir: 'aaa", "is longer than 255 bytes"]),
        ({"sft": None}, ["sft must be a mapping", "null"]),
        ({"sft": {"config": "stf.yaml"}}, ["sft.config: stf.yaml does not exist"]),
        (
            {"sft": {"config": "chain.yaml"}},
            ["chain.yaml: sft.config: chain.yaml is a chain (it has ", "); name a cold start's config"],
        ),
        ({"grpo": {"config": "grpo.yaml", "accelerate_config": "none.yaml"}}, ["accelerate_config: none.yaml"]),
        ({"handoff": {"mode": "merg"}}, ["mode must be one of auto, merge, continue", "'merge'"]),
        ({"selection": {"rule": "lst"}}, ["rule must be", "'last'"]),
        ({"probe": {"config": "prob.yaml"}}, ["probe.config: prob.yaml does not exist"]),
        ({"probe": {"num_samples": 8}}, ["probe: unknown key 'num_samples'"]),
        ({"probe": False}, ["probe must be a mapping", "false"]),
        ({"ignore_readiness": "yes"}, ["ignore_readiness must be true or false"]),
        ({"selection": {"patience": 2.5}}, ["patience must be int or null"]),
        ({"report": {"compare": ["nowhere"]}}, ["report.compare", "nowhere", "is no run folder"]),
    ],
)
def test_refused_configs(project, changes, parts):
    with pytest.raises(InputError) as error:
        read_config(project(**changes))
    for part in parts:
        assert part in str(error.value)
