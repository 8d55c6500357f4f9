"""Fingerprints: they see names, values and contents, and neither paths nor spellings."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from small_chains import make

from aesl_trl import files
from aesl_trl.chain import fingerprints
from aesl_trl.chain.fingerprints import Inputs, settings_of, walk
from aesl_trl.chain.stages import BUILDERS, build_grpo, build_sft
from aesl_trl.identity import file_hash


def inputs(path, **given) -> dict[str, Inputs]:
    """The inputs of every stage of a chain that has not run."""
    chain = make(path, **given)
    chain.read_record()
    return {stage.name: found for stage, found in walk(chain)}


def sft_print(path, **given) -> str:
    return inputs(path, **given)["sft"].fingerprint


@pytest.mark.parametrize(
    "name, text",
    [
        ("sft.yaml", "dataset_name: rows.jsonl\ndiversity_steps: 6\n"),
        ("sft.yaml", "dataset_name: rows.jsonl\ndiversity_steps: 5\nlearning_rate: 1.0\n"),
        ("sft.yaml", "dataset_name: rows.jsonl\ndiversity_steps: 5\nenv: {HF_TEST: '1'}\n"),
        ("cpu.yaml", "use_cpu: true\nnum_processes: 2\n"),
        ("rows.jsonl", '{"text": "b"}\n'),  # of the same size
    ],
)
def test_a_changed_setting_or_content_is_seen(project, tmp_path, name, text):
    before = sft_print(project())
    assert sft_print(project()) == before
    (tmp_path / name).write_text(text)
    assert sft_print(project()) != before


def test_a_file_is_read_once_until_it_changes(project, tmp_path, monkeypatch):
    """A comparison asks every cell for its inputs, and all of them name the same data."""
    read = []

    def counted(path):
        read.append(Path(path).name)
        return file_hash(path)

    monkeypatch.setattr(fingerprints, "file_hash", counted)
    before = [sft_print(project()) for _ in range(3)]
    assert len(set(before)) == 1 and read.count("rows.jsonl") == 1
    (tmp_path / "rows.jsonl").write_text('{"text": "c"}\n')  # of the same size
    assert sft_print(project()) != before[0] and read.count("rows.jsonl") == 2


@pytest.mark.parametrize(
    "text",
    [
        "diversity_steps: 5\ndataset_name: rows.jsonl\n",
        "# why\ndataset_name:   'rows.jsonl'\n\ndiversity_steps: 5  # often\n",
        "{dataset_name: ./rows.jsonl, diversity_steps: 5}\n",
        "dataset_name: data/../rows.jsonl\ndiversity_steps: 5\noutput_dir: elsewhere\n",
    ],
)
def test_order_white_space_comments_and_paths_are_not_seen(project, tmp_path, text):
    before = sft_print(project())
    (tmp_path / "sft.yaml").write_text(text)
    assert sft_print(project()) == before


SPELLINGS = {
    "sft": [
        "diversity_steps: 5\nlearning_rate: 1\nlora_target_modules: [all-linear]\n",
        "diversity_steps: 5\nlearning_rate: 1.0\nlora_target_modules: all-linear\n",
        "diversity_steps: 5\nlearning_rate: 1e0\nlora_target_modules: all-linear\n",  # to YAML 1.1 a string
        "diversity_steps: 5\nlearning_rate: 1.0\nlora_target_modules: all-linear\nmax_grad_norm: 1\nbf16: null\n",
    ],
    "eval": ["samples: 4\ntemperature: 0.5\n", "temperature: 0.5\nsamples: 4\nsuccess_threshold: 1\n"],
}


@pytest.mark.parametrize("stage", SPELLINGS)
def test_another_spelling_of_the_recorded_settings_has_their_fingerprint(project, tmp_path, stage):
    """Numbers as their fields read them, one value for a list of it, and defaults that are written out."""
    for text in SPELLINGS[stage]:
        (tmp_path / f"{stage}.yaml").write_text(text)
        chain = make(project())
        chain.read_record()
        if text == SPELLINGS[stage][0]:
            recorded = inputs(project())
            for name, found in recorded.items():
                chain.note(name, inputs=found.fingerprint, settings=found.settings)
        assert {name: found.fingerprint for name, found in inputs(project()).items()} == {
            name: found.fingerprint for name, found in recorded.items()
        }
    (tmp_path / f"{stage}.yaml").write_text(f"{text}seed: 5\nlogging_dir: x\n".replace("1", "2"))
    assert inputs(project())[stage].fingerprint != recorded[stage].fingerprint


def test_settings_recorded_by_their_old_names_are_the_same(project, tmp_path):
    (tmp_path / "sft.yaml").write_text("dataset_name: rows.jsonl\ndiversity_steps: 5\ndiversity_num_samples: 4\n")
    now = inputs(project())["sft"]
    old = replace(now, settings={**now.settings, "diversity_samples": now.settings["diversity_num_samples"]})
    old.settings.pop("diversity_num_samples")
    record = {"inputs": old.fingerprint, "settings": old.settings}
    assert old.fingerprint != now.fingerprint and now.as_recorded(record) == old
    other = {**old.settings, "diversity_samples": 3}
    assert now.as_recorded({"inputs": replace(old, settings=other).fingerprint, "settings": other}) == now


def test_a_key_that_no_field_has_any_more_does_not_stop_the_comparison(project, tmp_path):
    """A record of another version of TRL."""
    before = inputs(project())["sft"]
    gone = replace(before, settings={**before.settings, "gone": 1, "learning_rate": "fast"})
    assert before.as_recorded({"inputs": gone.fingerprint, "settings": gone.settings}) == before


def test_the_command_is_not_seen(project):
    stage = build_sft(make(project()))
    other = replace(stage, command=["python", "-m", "elsewhere", "--t-scaling", "2"], output=Path("x"))
    assert settings_of(other) == settings_of(stage)


def test_seed_and_the_stage_before_are_seen(project):
    settings = settings_of(build_grpo(make(project())))
    assert len({Inputs("grpo", settings, previous).fingerprint for previous in (None, "a", "b")}) == 3
    assert sft_print(project(), seed=1) != sft_print(project())


def test_what_follows_a_changed_stage_is_changed_too(project):
    before, after = inputs(project()), inputs(project(selection={"rule": "last"}))
    changed = [name for name in before if before[name].fingerprint != after[name].fingerprint]
    assert changed == ["select", "handoff", "probe", "grpo", "eval", "report"]
    without = inputs(project(probe=None))  # the probe only measures
    assert without["grpo"] == before["grpo"]


def test_a_move_is_not_seen(project, tmp_path):
    before = inputs(project())
    moved = tmp_path.with_name(tmp_path.name + "_moved") / "deeper"
    shutil.copytree(tmp_path, moved)
    assert inputs(moved / "chain.yaml") == before
    assert inputs(project(output_dir="other/depth/of/run")) == before


def test_chains_that_share_an_sft_agree_on_it(project):
    shared = {"config": "sft.yaml", "accelerate_config": "cpu.yaml", "output_dir": "shared"}
    assert sft_print(project(sft=shared)) == sft_print(project("b.yaml", sft=shared, output_dir="other/deep/two"))


def test_rewards_data_folders_and_models(project, tmp_path):
    """A function by its file's contents, data by all files, a model by its own files, of its weights the size."""
    (tmp_path / "reward.py").write_text("def exact(): ...\n")
    (tmp_path / "data/part").mkdir(parents=True)
    (tmp_path / "data/part/rows.jsonl").write_text('{"text": "a"}\n')
    config = {"model_name_or_path": "base", "reward_funcs": ["reward.py:exact", "known"], "dataset_name": "data"}
    (tmp_path / "grpo.yaml").write_text(json.dumps({**config, "adapter_name_or_path": "org/adapter"}))
    (tmp_path / "base/model.safetensors").write_text("weights")
    (tmp_path / "base/config.json").write_text("{}")
    before = inputs(project())["grpo"]
    assert before.settings["reward_funcs"][0].endswith(":exact") and before.settings["reward_funcs"][1] == "known"
    assert before.settings["adapter_name_or_path"] == "org/adapter"
    assert "reward.py" not in json.dumps(before.settings) and str(tmp_path) not in json.dumps(before.settings)
    for name, text, is_seen in (
        ("reward.py", "def exact(): 123\n", True),
        ("data/part/rows.jsonl", '{"text": "b"}\n', True),
        ("base/config.json", "[]", True),
        ("base/model.safetensors", "WEIGHTS", False),  # of the same size: to read all weights takes minutes
        ("base/model.safetensors", "more weights", True),
        ("base/.cache", "x", False),
        ("base/runs/one.json", "{}", False),
    ):
        path = tmp_path / name
        kept = path.read_text() if path.exists() else None
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        assert (inputs(project())["grpo"].fingerprint != before.fingerprint) is is_seen, name
        path.unlink() if kept is None else path.write_text(kept)


def test_without_sft_the_model_is_an_input(project, tmp_path):
    before = inputs(project(sft=...))
    (tmp_path / "base/config.json").write_text("{}")
    after = inputs(project(sft=...))
    assert all(before[name].settings["start"] != after[name].settings["start"] for name in ("probe", "eval"))


def test_a_compared_run_is_known_by_its_name_and_its_evaluation(project, tmp_path):
    for place in ("old", "new"):
        (tmp_path / place / "arm/seed-1").mkdir(parents=True)
    old, new = ({"compare": [f"{place}/arm/seed-1"]} for place in ("old", "new"))
    before = inputs(project(report=old))["report"]
    assert before == inputs(project(report=new))["report"] != inputs(project())["report"]
    files.write_json(tmp_path / "old/arm/seed-1" / files.EVALUATION, {"models": {}})
    assert inputs(project(report=old))["report"] != before


def test_no_secret_is_recorded(project, tmp_path):
    (tmp_path / "sft.yaml").write_text("diversity_steps: 5\nhub_token: s3cret\nenv: {HF_TOKEN: s3cret}\n")
    before = inputs(project())["sft"]
    assert "s3cret" not in json.dumps(before.settings)
    (tmp_path / "sft.yaml").write_text("diversity_steps: 5\nhub_token: s3cret\nenv: {HF_TOKEN: other}\n")
    assert inputs(project())["sft"].fingerprint != before.fingerprint


def test_a_record_of_json_is_the_settings_that_were_recorded(project, tmp_path):
    """Values that JSON writes otherwise than YAML reads them: a date, infinity, numbers as keys."""
    (tmp_path / "eval.yaml").write_text("samples: .inf\nseed: 2024-01-02\nenv: {1: 2}\ngeneration: {1: [2, 3.0]}\n")
    for name, builder in BUILDERS.items():
        if name != "candidates":
            settings = settings_of(builder(make(project())))
            files.write_json(tmp_path / "record.json", settings)
            assert files.read_json(tmp_path / "record.json") == settings
