"""What GRPOTrainer's own evaluation shows of a tiny model, and that nothing changes by it."""

import json
import os
import subprocess
import sys

import probing_script
import pytest
import torch
from small_probe import ROWS, digest, probe_tokenizer, run
from two_processes import results_of_two

from aesl_trl import files


def test_figures_are_trls_own_and_nothing_changes(project, spied, capsys):
    files_before = digest(project.model)
    result = run(project, num_prompts=64)
    (found,), (before, after) = result["checkpoints"], spied["weights"][0]
    assert all(torch.equal(before[name], after[name]) for name in before) and before.keys() == after.keys()
    assert digest(project.model) == files_before
    log, figures = spied["log"][0], found["figures"]
    assert figures["signal"] == pytest.approx(1 - log["eval_frac_reward_zero_std"], abs=1e-12)
    assert figures["reward"] == pytest.approx(log["eval_reward"], abs=1e-6)
    assert figures["truncated"] == pytest.approx(log["eval_completions/clipped_ratio"], abs=1e-6)
    assert figures["length"] == pytest.approx(log["eval_completions/mean_length"], abs=1e-5)
    assert figures["entropy"] == pytest.approx(log["eval_entropy"], rel=1e-5)
    assert 0 < figures["signal"] and figures["truncated"] > 0.5  # an untrained model seldom ends
    assert found["text"] == "never stops: fix eos" and found["rl"] is None
    assert (result["num_prompts"], result["num_samples"], result["temperature"]) == (64, 8, 1.0)
    assert found["path"] == "../model"
    printed = capsys.readouterr().out
    assert "never stops: fix eos" in printed and "out/readiness.json" in printed.splitlines()[-1]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_against_plain_logits(project, spied, temperature):
    """Entropy, -log p and P(eos) of the model itself, also where it samples at another temperature."""
    run(project, num_prompts=64, temperature=temperature)
    model = spied["models"][0].double()
    eos, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    tokenizer = probe_tokenizer(project)
    groups = {index: iter(range(8)) for index in range(64)}
    ended = 0
    for sample in spied["samples"]:
        group, place = spied["groups"][sample["row"]], next(groups[sample["row"]])
        prompt = tokenizer(ROWS[sample["row"]]["prompt"])["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + sample["ids"]])).logits[0, len(prompt) - 1 : -1]
        log_probs = logits.log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1).mean().item()
        chosen = log_probs.gather(1, torch.tensor(sample["ids"])[:, None])
        ends = log_probs[:, eos].exp()
        cut = sample["ids"][-1] not in (eos, pad)
        ended += not cut
        assert group.truncated[place] == cut and group.num_tokens[place] == len(sample["ids"])
        assert group.entropy[place] == pytest.approx(entropy, abs=1e-5)
        assert group.neg_log_prob[place] == pytest.approx(-chosen.mean().item(), abs=1e-5)
        assert group.eos_prob[place] == pytest.approx((ends.max() if cut else ends[-1]).item(), abs=1e-6)
    assert 0 < ended < len(spied["samples"]) == 512


def test_samples_belong_to_their_prompts(project, spied):
    """The trainer shuffles prompts and draws them in batches: the rewards say whose each sample is."""
    run(project, reward_funcs=["rewards.py:label", "rewards.py:length"], num_prompts=70, batch_size=128)
    groups = spied["groups"]
    assert [group.prompt for group in groups] == [row["prompt"] for row in ROWS]
    for group, row in zip(groups, ROWS, strict=True):
        assert [sample[0] for sample in group.rewards] == [row["label"]] * 8
        assert [sample[1] for sample in group.rewards] == [len(text) % 2 for text in group.completions]


@pytest.mark.slow
def test_two_processes_share_the_prompts(project):
    """560 samples in batches of 2 x 64: the last is filled up with prompts from the beginning, which count once."""
    flags = project(reward_funcs=["rewards.py:label"], num_prompts=70, batch_size=64)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "aesl_trl.evaluation.probe", project.model, *flags]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((project.folder / "out" / files.READINESS).read_text())
    figures = result["checkpoints"][0]["figures"]
    assert result["num_processes"] == 2 and done.stdout.count("never stops: fix eos") == 1
    assert figures["pass@1"] == sum(row["label"] >= 1 for row in ROWS) / 70
    assert figures["reward"] == sum(row["label"] for row in ROWS) / 70 and figures["signal"] == 0


@pytest.mark.slow
def test_the_first_of_two_processes_decides_what_is_sampled_already(project):
    """If each rank decided for itself, the second one would sample alone, and wait for the first for ever."""
    flags = project(num_prompts=64, batch_size=256)
    said, nothing = results_of_two(probing_script, project.folder, *flags, ACCELERATE_USE_CPU="true")
    assert any("sampled already" in line for line in said) and nothing == []


def test_an_adapter_is_probed_on_its_base(project, spied):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(project.model)
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = project.model
    adapter, merged = project.folder / "adapter", project.folder / "merged"
    model.save_pretrained(adapter)
    tokenizer = probe_tokenizer(project)
    tokenizer.save_pretrained(adapter)
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(project.model), adapter).merge_and_unload()
    whole.save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    before = digest(adapter)
    # use_peft stands in many a GRPO config: a new adapter is for RL, not for the measurement
    result = run(project, str(adapter), str(merged), project.model, use_peft=True)
    first, second, third = result["checkpoints"]
    assert [one["name"] for one in result["checkpoints"]] == ["adapter", "merged", "model"]
    assert first["figures"] == pytest.approx(second["figures"], rel=1e-4)
    assert first["figures"] != pytest.approx(third["figures"], rel=1e-4)
    assert digest(adapter) == before
    assert all(torch.equal(old[name], new[name]) for old, new in spied["weights"] for name in old)


def test_a_short_rl_run_of_equal_budget(project, spied):
    result = run(
        project,
        eval_dataset_name="held_out.jsonl",
        rl_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        lr_scheduler_type="constant",
    )
    rl = result["checkpoints"][0]["rl"]
    assert rl["steps"] == 2 and result["rl_steps"] == 2
    low, high = rl["reward_interval"]
    assert low <= rl["reward"] <= high
    difference, low, high = rl["pass@1_change"]
    assert low <= difference <= high
    assert difference == pytest.approx(rl["pass@1"] - result["checkpoints"][0]["figures"]["pass@1"], abs=1e-12)
    (before, untrained), (trained, after) = spied["weights"]
    assert all(torch.equal(before[name], untrained[name]) for name in before)
    assert any(not torch.equal(before[name], trained[name]) for name in before)
    assert all(torch.equal(trained[name], after[name]) for name in before)
    assert [group.prompt for group in spied["groups"]][0] == "now 0 + 1 ="
