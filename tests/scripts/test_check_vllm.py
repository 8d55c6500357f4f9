"""scripts/check_vllm.py with the stand-in for vLLM: it passes what is right and names what is wrong."""

import re
import subprocess
import sys
from pathlib import Path

import check_vllm
import pytest
import torch
from accelerate import Accelerator
from tiny_models import build_model
from vllm_stand_in import StandIn

from aesl_trl.losses.scoring import add_fused_head
from aesl_trl.sampling.backends import VLLMSettings
from aesl_trl.sampling.vllm_synced import SyncedVLLM


ROOT = Path(__file__).parents[2]
EVERY_CHECK = [
    "log-probabilities of the samples",
    "tokens at temperature 0.01",
    "the same seed draws the same",
    "another seed draws others",
    "samples of a prompt differ",
    "drawing leaves the weights as they were",
    "changed weights arrive",
]


def wrong(monkeypatch, tokenizer, kind, spoil=None) -> tuple[list[str], list[str]]:
    """Names of all checks, and of those that do not hold."""
    monkeypatch.setattr(check_vllm, "MAX_NEW_TOKENS", 6)
    stand_in = StandIn(monkeypatch)
    model = build_model(tokenizer, initializer_range=0.4).eval()
    add_fused_head(model)
    model = check_vllm.adapted(model.bfloat16()).eval() if kind == "adapter" else model
    engine = SyncedVLLM("vllm_colocate", VLLMSettings(), rescore_batch_size=4)
    if spoil:
        spoil(stand_in, model)
    results = list(check_vllm.checks(model, tokenizer, engine, check_vllm.Cold(engine), Accelerator(cpu=True)))
    return [what for what, _, _ in results], [what for what, holds, _ in results if not holds]


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_what_is_right_passes(kind, tokenizer, monkeypatch):
    assert wrong(monkeypatch, tokenizer, kind) == (EVERY_CHECK, [])


def stale_weights(stand_in, model):
    sync = stand_in._sync
    stand_in.generation.sync_weights.side_effect = lambda: stand_in.served is None and sync()


def one_seed_for_all(stand_in, model):
    sample = stand_in._sample
    stand_in._sample = lambda prompt, _: sample(prompt, torch.Generator().manual_seed(0))


def other_log_probs(stand_in, model):
    sample = stand_in._sample

    def halved(*args):
        ids, values = sample(*args)
        return ids, [value / 2 for value in values]

    stand_in._sample = halved


def never_cold(stand_in, model):
    sample = stand_in._sample

    def warm(*args):
        stand_in.generation.temperature = 1.0
        return sample(*args)

    stand_in._sample = warm


def nudged_weights(stand_in, model):
    sync = stand_in._sync

    def nudge():
        sync()
        model.model.norm.weight.data.add_(1e-6)

    stand_in.generation.sync_weights.side_effect = nudge


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (stale_weights, {"changed weights arrive"}),
        (one_seed_for_all, {"another seed draws others", "samples of a prompt differ"}),
        (other_log_probs, {"log-probabilities of the samples", "changed weights arrive"}),
        (never_cold, {"tokens at temperature 0.01"}),
        (nudged_weights, {"drawing leaves the weights as they were"}),
    ],
)
def test_what_is_wrong_is_named(spoil, expected, tokenizer, monkeypatch):
    assert set(wrong(monkeypatch, tokenizer, "full", spoil)[1]) == expected


def test_report_says_which_and_leaves_with_one(capsys):
    results = [("weights", True, "off by 0.001"), ("seeds", False, "")]
    assert check_vllm.report("full", iter(results)) == 1
    out = capsys.readouterr().out.splitlines()
    assert out == ["check_vllm: full: ok: weights (off by 0.001)", "check_vllm: full: WRONG: seeds"]
    assert check_vllm.report("full", iter(results[:1])) == 0


@pytest.mark.parametrize(
    ("gpu", "vllm", "message"),
    [(False, True, "there is no CUDA GPU"), (True, False, r"vLLM is not installed: pip install '\.\[vllm\]'")],
)
def test_without_a_gpu_or_vllm_nothing_is_checked(gpu, vllm, message, monkeypatch, capsys):
    monkeypatch.setattr(check_vllm.torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(check_vllm, "is_vllm_available", lambda: vllm)
    monkeypatch.setattr(sys, "argv", ["check_vllm.py"])
    assert check_vllm.main() == 2
    assert re.fullmatch(f"check_vllm: SKIP: {message}; nothing was checked\n", capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_the_script_skips_with_code_two():
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "check_vllm.sh")], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "check_vllm: SKIP: there is no CUDA GPU; nothing was checked\n")


def test_the_tiny_model_is_one_that_vllm_takes(tmp_path):
    """Heads of 64, a bf16 checkpoint and its tokenizer in one folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_vllm.build(str(tmp_path))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    config = model.config
    assert model.dtype == torch.bfloat16 and config.hidden_size // config.num_attention_heads == 64
    assert all(tokenizer(prompt)["input_ids"] for prompt in check_vllm.PROMPTS)
    logits = model(**tokenizer(check_vllm.PROMPTS[0], return_tensors="pt")).logits[0, -1].float()
    assert 0.5 < torch.distributions.Categorical(logits=logits).entropy() < 4  # neither certain nor all alike
