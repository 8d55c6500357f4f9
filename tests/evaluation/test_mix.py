"""mix: averages of base and candidate as they are on disk, their rows beside the run's series, and what follows."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from held_locks import held_elsewhere
from safetensors.torch import load_file
from tiny_models import build_model

from aesl_trl import files
from aesl_trl import sft as door
from aesl_trl.diversity.selection import select_run
from aesl_trl.errors import InputError
from aesl_trl.evaluation import mix
from aesl_trl.models.handoff import hand_off
from aesl_trl.models.source import find_source
from aesl_trl.training.run_record import forget_after


ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(24)]
CONFIG = {
    "dataset_name": "train.jsonl",
    "eval_dataset_name": "held_out.jsonl",
    "reward_funcs": ["reward.py:has_digit"],
    "output_dir": "run",
    "max_steps": 16,
    "learning_rate": 0.03,
    "per_device_train_batch_size": 4,
    "diversity_steps": 8,
    "diversity_samples": 4,
    "diversity_max_new_tokens": 8,
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "cold_start_loss": "nll",
    "selection": "mix",
}
KINDS = {"full": {}, "lora": {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}}


def trained(kind, folder, tiny_model_dir):
    """Train for 16 steps, as `aesl sft` does, in a folder that holds the base too."""
    shutil.copytree(tiny_model_dir, folder / "base")
    for name, rows in (("train", ROWS), ("held_out", [{**row, "prompt": "9" + row["prompt"]} for row in ROWS[:4]])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(
        "def has_digit(completions, **kwargs):\n"
        "    return [float(any(c.isdigit() for c in text)) for text in completions]\n"
    )
    config = {"model_name_or_path": "base", **CONFIG, **KINDS[kind]}
    (folder / "sft.yaml").write_text(yaml.safe_dump(config))
    door.main(["--config", str(folder / "sft.yaml")])
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory, tiny_model_dir):
    return {kind: trained(kind, tmp_path_factory.mktemp(kind), tiny_model_dir) for kind in KINDS}


@pytest.fixture
def project(originals, tmp_path):
    """A copy of a trained run: `project(kind)`."""

    def copy(kind="full"):
        return shutil.copytree(originals[kind], tmp_path / kind)

    return copy


def run(folder, *flags, weights=("0.25", "0.5")):
    mix.main([str(folder / "run"), "--config", str(folder / "sft.yaml"), "--weights", *weights, *flags])
    return folder / "run" / files.OWN


def without_times(rows):
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_from_the_averages_to_the_handoff(kind, project, capsys):
    folder = project(kind)
    own = run(folder)
    shown = capsys.readouterr().out
    assert "mix-0.25" in shown and f"next: aesl select {folder / 'run'} --rule mix" in shown
    found = files.read_json(own / files.MIXES)
    assert (found["step"], found["asked"]) == (16, ["mix-0.25", "mix-0.5"])
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    late = load_file(own / "candidates" / "step-16" / name)
    base = load_file(folder / "base" / "model.safetensors")
    for weight in (0.25, 0.5):
        for tensor, value in load_file(own / "candidates" / f"mix-{weight}" / name).items():
            truth = late[tensor].double()
            if "lora_B" in tensor:
                truth = weight * truth
            elif "lora_A" not in tensor:
                truth = (1 - weight) * base[tensor].double() + weight * truth
            torch.testing.assert_close(value.double(), truth, atol=1e-7, rtol=0)
    # The rows are of the run's own series: the same prompts, settings and figures
    last = files.read_jsonl(own / files.DIVERSITY)[-1]
    for row in found["candidates"]:
        assert row.keys() - {"candidate", "weight"} == last.keys() - {"time_share"}
        assert all(
            row[key] == last[key] for key in ("prompts", "num_samples", "temperature", "max_new_tokens", "seed")
        )
    chosen = select_run(folder / "run")  # the rule is that of the run's config
    best = max(found["candidates"], key=lambda row: (row["groups_mixed"], -row["weight"]))["candidate"]
    assert (chosen["applied"], chosen["step"], chosen["candidate"]) == ("mix", 16, best)
    assert (own / "selected" / name).read_bytes() == (own / "candidates" / best / name).read_bytes()
    handed = hand_off(folder / "run", output=folder / "handed")
    assert (handed["step"], handed["candidate"]) == (16, best)
    own_samples = handed["checks"]["own_samples"]  # the mix finds its own samples as likely as its entropy says
    assert own_samples["nll"] == pytest.approx(own_samples["entropy"], abs=0.5)
    later = select_run(folder / "run", rule="last")
    assert later["replaces"] == f"{best}, chosen by mix" and later["candidate"] == "step-16"


def test_a_copy_of_the_candidate_is_measured_as_in_the_training(project, monkeypatch):
    """So the figures of an average differ from the series by its weights alone."""
    monkeypatch.setattr(mix, "average_with_base", lambda tuned, base, output, weight: shutil.copytree(tuned, output))
    own = run(project(), weights=("0.5",))
    (row,) = without_times(files.read_json(own / files.MIXES)["candidates"])
    last = files.read_jsonl(own / files.DIVERSITY)[-1]
    assert row == {"candidate": "mix-0.5", "weight": 0.5} | {key: last[key] for key in row.keys() & last.keys()}
    assert files.read_jsonl(own / "samples" / "mix-0.5.jsonl") == files.read_jsonl(own / "samples" / "step-16.jsonl")


def test_a_call_goes_on_and_other_inputs_start_anew(project, monkeypatch):
    folder, made = project(), []
    average = mix.average_with_base

    def note(tuned, base, output, weight):
        made.append(weight)
        if len(made) == 2:
            raise KeyboardInterrupt
        return average(tuned, base, output, weight=weight)

    monkeypatch.setattr(mix, "average_with_base", note)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    with pytest.raises(InputError, match="lacks mix-0.5, aesl mix was cut off: run it again to go on"):
        select_run(folder / "run", rule="mix")
    own = run(folder)
    assert made == [0.25, 0.5, 0.5]
    rows = without_times(files.read_json(own / files.MIXES)["candidates"])
    run(folder)  # complete, with the same inputs
    assert len(made) == 3 and without_times(files.read_json(own / files.MIXES)["candidates"]) == rows
    run(folder, weights=("0.5", "0.25", "0.75"))
    assert made[3:] == [0.25, 0.5, 0.75]
    assert without_times(files.read_json(own / files.MIXES)["candidates"])[:2] == rows
    run(folder, "--step", "8", weights=("0.5",))  # what was not asked for this time is gone
    assert {path.name for path in (own / "candidates").glob("mix-*")} == {"mix-0.5"}
    assert {path.name for path in (own / "samples").glob("mix-*")} == {"mix-0.5.jsonl"}
    assert files.read_json(own / files.MIXES)["step"] == 8
    forget_after(folder / "run", 8)  # a training that goes on at step 8 trains another candidate
    assert not list((own / "candidates").glob("mix-*")) and not list((own / "samples").glob("mix-*"))
    assert not (own / files.MIXES).exists()


def test_what_a_kill_left_is_cleared_away(project):
    folder = project()
    candidates, samples = (folder / "run" / files.OWN / name for name in (files.CANDIDATES, files.SAMPLES))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in ("mix-0.5", "mix-0.9", f".mix-0.5.{ended.pid}.tmp"):  # cut off in the clean-up, and in the writing
        (candidates / name).mkdir()
        (candidates / name / "model.safetensors").write_bytes(b"torn")
    (samples / "mix-0.9.jsonl").write_text("")
    run(folder, weights=("0.5",))
    assert [path.name for path in sorted(candidates.glob("*mix-*"))] == ["mix-0.5"]
    assert [path.name for path in samples.glob("mix-*")] == ["mix-0.5.jsonl"]


def test_no_average_is_made_beside_a_training(project):
    folder = project()
    place = (folder / "run").resolve() / files.OWN / files.TRAINING_LOCK
    with held_elsewhere(place), pytest.raises(InputError, match="another training is at work in"):
        run(folder)


def test_samples_of_a_later_call_are_not_those_of_the_selected_average(project):
    folder = project()
    own = run(folder, weights=("0.5",))
    select_run(folder / "run")
    assert find_source(folder / "run").samples == [
        {**row, "comparable": True} for row in files.read_jsonl(own / "samples" / "mix-0.5.jsonl")
    ]
    newest = [{**row, "comparable": False} for row in files.read_jsonl(own / "samples" / "step-16.jsonl")]
    found = files.read_json(own / files.MIXES)
    found["candidates"][0]["entropy"] += 1.0
    files.write_json(own / files.MIXES, found)
    assert find_source(folder / "run").samples == newest
    run(folder, weights=("0.25",))  # the files of the selected one are gone
    assert find_source(folder / "run").samples == newest


@pytest.fixture(scope="module")
def other_base(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("other")
    build_model(tokenizer, seed=7).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weights", "1.5"], "weight is 1.5, but must be a number above 0 and below 1"),
        (["--weights", "0.5", "0.5"], "weights must be different shares, at least one, got"),
        (["--step", "17"], "holds no step 17, the nearest is 16"),
        (["--model_name_or_path", "OTHER"], "is not the model that .* was trained from"),
        (["--model_name_or_path", "nobody/has-this"], "nobody/has-this is not on this disk"),
    ],
)
def test_what_is_refused(flags, message, originals, other_base):
    folder = originals["full"]
    flags = [str(other_base) if flag == "OTHER" else flag for flag in flags]
    with pytest.raises(InputError, match=message) as error:
        mix.main([str(folder / "run"), "--config", str(folder / "sft.yaml"), *flags])
    assert "\n" not in str(error.value) and not (folder / "run" / files.OWN / files.MIXES).exists()


def test_which_run_and_measured_how(project):
    folder = project()
    with pytest.raises(InputError, match="which run"):
        mix.main(["--config", str(folder / "sft.yaml")])
    config = yaml.safe_load((folder / "sft.yaml").read_text())
    kept = {key: value for key, value in config.items() if key not in ("diversity_steps", "selection")}
    (folder / "sft.yaml").write_text(yaml.safe_dump(kept))
    with pytest.raises(InputError, match="diversity_steps is 0"):
        run(folder)


def test_nothing_is_written_into_an_sft_folder_that_a_chain_leads_to(project):
    folder = project()
    files.write_json(folder / "chain" / files.CHAIN, {"sft_dir": "../run"})
    with pytest.raises(InputError, match="RUN: the candidates of .*chain lie in .*run: average those"):
        mix.main([str(folder / "chain"), "--config", str(folder / "sft.yaml")])
