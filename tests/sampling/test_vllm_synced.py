"""Samples by vLLM, with a stand-in for vLLM itself (vllm_stand_in.py): what TRL is asked for, what comes back, and
what the training keeps. That vLLM does as it is told is for scripts/check_vllm.sh, on a GPU.
"""

import math
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from small_draws import PROMPTS, STOPS, ending_model, stopping_model
from small_draws import draw as draw_on
from small_runs import prompt_completion_rows, small_config, trained_weights
from tiny_models import build_tokenizer
from vllm_stand_in import StandIn

from aesl_trl import AESLSFTTrainer, files
from aesl_trl.losses.scoring import add_fused_head
from aesl_trl.sampling import backends, vllm_synced
from aesl_trl.sampling.backends import VLLMSettings
from aesl_trl.sampling.draws import SamplingFailed
from aesl_trl.sampling.vllm_synced import SyncedVLLM, preserved_base


SERVER = VLLMSettings(server_base_url="http://localhost:8000")
KINDS = ("vllm_colocate", "vllm_server")


@pytest.fixture
def stand_in(monkeypatch):
    return StandIn(monkeypatch)


@pytest.fixture
def sampled(stand_in, monkeypatch):
    """A prompt's tokens -> the tokens of each of its samples, as the stand-in draws them."""
    original, found = stand_in._sample, {}

    def sample(prompt, *args):
        ids, log_probs = original(prompt, *args)
        found.setdefault(tuple(prompt), []).append(ids)
        return ids, log_probs

    monkeypatch.setattr(stand_in, "_sample", sample)
    return found


def engine_of(kind):
    return SyncedVLLM(kind, SERVER if kind == "vllm_server" else VLLMSettings(), rescore_batch_size=5)


def draw(model, tokenizer, engine, max_new_tokens=8, **changes):
    accelerator = Accelerator(cpu=True)
    return draw_on(model, tokenizer, engine, accelerator=accelerator, max_new_tokens=max_new_tokens, **changes)


def with_logits(model, tokenizer, groups, sampled):
    """(group, place, tokens, the model's logits `[T, V]`) of every sample."""
    for group in groups:
        prompt = tokenizer(group.prompt)["input_ids"]
        for place, ids in enumerate(sampled[tuple(prompt)]):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            yield group, place, ids, logits


# ---- What TRL is asked for


def test_constructor_of_a_colocated_engine(stand_in, tokenizer):
    model = stopping_model(tokenizer)
    draw(model, tokenizer, SyncedVLLM("vllm_colocate", VLLMSettings(gpu_memory_utilization=0.4)), max_new_tokens=7)
    arguments = stand_in.made.call_args.kwargs
    longest = max(len(tokenizer(row["prompt"])["input_ids"]) for row in PROMPTS)
    assert arguments.pop("model") is model and arguments.pop("processing_class") is tokenizer
    assert isinstance(arguments.pop("accelerator"), Accelerator)
    assert arguments == {
        "mode": "colocate",
        "gpu_memory_utilization": 0.4,
        "enable_sleep_mode": True,
        "max_model_length": longest + 7,
        "max_num_seqs": vllm_synced.MAX_NUM_SEQS,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_completion_length": 7,
        "logprobs": 0,
        "generation_kwargs": {"stop_token_ids": [tokenizer.eos_token_id, *STOPS]},
    }


def test_a_base_models_samples_end_with_the_templates_turn(stand_in):
    base = build_tokenizer()
    base.eos_token = "<|endoftext|>"
    stops = base.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    groups = draw(ending_model(base, stops[1]), base, engine_of("vllm_colocate"))
    assert stand_in.generation.generation_kwargs["stop_token_ids"] == stops
    assert all(group.num_tokens == [1] * 4 and not any(group.truncated) for group in groups)


def test_constructor_of_a_server(stand_in, tokenizer):
    settings = VLLMSettings(server_host="gpu-2", server_port=8001, group_port=51217, server_timeout=9.0)
    draw(stopping_model(tokenizer), tokenizer, SyncedVLLM("vllm_server", settings))
    arguments = stand_in.made.call_args.kwargs
    found = {name: arguments[name] for name in ("mode", "server_base_url", "group_port", "server_timeout")}
    assert found == {
        "mode": "server",
        "server_base_url": "http://gpu-2:8001",
        "group_port": 51217,
        "server_timeout": 9.0,
    }
    assert "gpu_memory_utilization" not in arguments and "max_model_length" not in arguments


def test_all_samples_of_a_prompt_in_one_call(stand_in, tokenizer):
    draw(stopping_model(tokenizer), tokenizer, engine_of("vllm_colocate"))
    asked = stand_in.generation.generate.call_args.kwargs
    ids = [tokenizer(row["prompt"])["input_ids"] for row in PROMPTS]
    assert asked == {"prompts": [prompt for prompt in ids for _ in range(4)], "images": None, "num_generations": 4}
    assert "seed" not in stand_in.generation.generation_kwargs  # one seed would draw the same sample for each copy


def test_a_seed_for_each_prompt_of_a_server(stand_in, tokenizer):
    draw(stopping_model(tokenizer), tokenizer, engine_of("vllm_server"))
    calls = [call.kwargs for call in stand_in.client.generate.call_args_list]
    assert [call["n"] for call in calls] == [4, 4, 4]
    seeds = sorted(call["generation_kwargs"]["seed"] for call in calls)
    assert np.diff(seeds).tolist() == [4, 4]  # sample i of a request takes the seed + i
    assert all(call["generation_kwargs"]["stop_token_ids"] == [tokenizer.eos_token_id, *STOPS] for call in calls)


# ---- What comes back


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_of_the_weights_at_each_draw(kind, stand_in, tokenizer):
    """1e-5: float32 forward passes of the same weights."""
    model, engine = stopping_model(tokenizer), engine_of(kind)
    drawn = []
    for _ in range(2):
        groups = draw(model, tokenizer, engine)
        drawn.append(groups)
        assert [group.prompt for group in groups] == [row["prompt"] for row in PROMPTS]
        _assert_log_probs(model, stand_in, groups)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
    assert drawn[0] != drawn[1]
    assert stand_in.events.count("start") == 1 and stand_in.events.count("sync") == 2


def _assert_log_probs(model, stand_in, groups):
    """The stand-in's log-probabilities against the trained model's: they agree where the weights are the same."""
    served = dict(stand_in.served.named_parameters())
    assert all(torch.equal(served[name], parameter) for name, parameter in model.named_parameters())
    for group in groups:
        assert len(group.completions) == 4 and len(set(group.completions)) > 1
        for tokens, truncated, entropy, nll, end in zip(
            group.num_tokens, group.truncated, group.entropy, group.neg_log_prob, group.eos_prob, strict=True
        ):
            assert entropy is None and 0 < nll < 3 * math.log(260)
            assert truncated == (end is None) and (not truncated or tokens == 8)


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_and_ends_are_those_of_the_tokens(kind, sampled, tokenizer):
    model = stopping_model(tokenizer).eval()
    groups = draw(model, tokenizer, engine_of(kind))
    for group, place, ids, logits in with_logits(model, tokenizer, groups, sampled):
        taken = logits.log_softmax(-1)[torch.arange(len(ids)), ids]
        stopped = ids[-1] in (*STOPS, tokenizer.eos_token_id)
        assert group.neg_log_prob[place] == pytest.approx(-taken.mean().item(), abs=1e-5)
        assert group.truncated[place] is not stopped and group.num_tokens[place] == len(ids)
        assert group.eos_prob[place] == (pytest.approx(taken[-1].exp().item(), abs=1e-6) if stopped else None)
        assert group.completions[place] == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_at_another_temperature_the_model_scores_its_samples(kind, sampled, tokenizer):
    """Then vLLM's log-probabilities are of the wrong temperature."""
    model = stopping_model(tokenizer).eval()
    add_fused_head(model)
    groups = draw(model, tokenizer, engine_of(kind), temperature=0.5)
    for group, place, ids, logits in with_logits(model, tokenizer, groups, sampled):
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
        taken = logits.log_softmax(-1)[torch.arange(len(ids)), ids]
        assert group.entropy[place] == pytest.approx(entropy, abs=1e-5)
        assert group.neg_log_prob[place] == pytest.approx(-taken.mean().item(), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_depend_on_the_seed_alone(kind, stand_in, tokenizer):
    model = stopping_model(tokenizer)
    first = draw(model, tokenizer, engine_of(kind), seed=1)
    torch.rand(7)
    assert draw(model, tokenizer, engine_of(kind), seed=1) == first
    assert draw(model, tokenizer, engine_of(kind), seed=2) != first


# ---- What the training keeps


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("fail", [None, "start", "sync", "load", "generate"])
@pytest.mark.parametrize("kind", KINDS)
def test_states_are_restored(kind, fail, stand_in, tokenizer):
    model = stopping_model(tokenizer)
    model.train()
    model.model.layers[0].eval()
    tokenizer.padding_side = "right"
    modes, before = [module.training for module in model.modules()], states()
    if fail:
        stand_in.fail[fail] = RuntimeError("no")
        with pytest.raises(SamplingFailed):
            draw(model, tokenizer, engine_of(kind))
    else:
        draw(model, tokenizer, engine_of(kind))
    assert states() == before
    assert [module.training for module in model.modules()] == modes and tokenizer.padding_side == "right"


def adapted(tokenizer):
    """An adapter of bf16 weights that does something: PEFT initializes its second half with zeros."""
    model = stopping_model(tokenizer).to(torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_reach_vllm_and_leave_the_base_as_it_was(kind, stand_in, tokenizer):
    model = adapted(tokenizer)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    draw(model, tokenizer, engine_of(kind))
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    merged = model.merge_and_unload()
    served = dict(stand_in.served.named_parameters())
    # TRL merges twice before the first weights go to a server, the second time into a base that the first has rounded
    rtol = 2**-6 if kind == "vllm_server" else 0
    assert all(torch.allclose(served[name], value, rtol=rtol, atol=1e-4) for name, value in merged.named_parameters())
    assert any(
        not torch.allclose(served[name], value, atol=1e-2)
        for name, value in stopping_model(tokenizer).to(torch.bfloat16).named_parameters()
    )


def test_merging_alone_would_change_the_base(tokenizer):
    """What preserved_base is for."""
    model = adapted(tokenizer)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.merge_adapter()
    model.unmerge_adapter()
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)]
    assert changed and all("base_layer" in name for name in changed)


def test_an_error_while_weights_are_brought_over_leaves_no_adapter_merged(stand_in, tokenizer):
    model = adapted(tokenizer)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    stand_in.fail["load"] = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(SamplingFailed, match="lower vllm_gpu_memory_utilization"):
        draw(model, tokenizer, engine_of("vllm_colocate"))
    assert not any(getattr(module, "merged", False) for module in model.modules())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_replaced_parameters_come_back(tokenizer):
    """Merging into quantized weights puts other parameters in their place."""
    model = adapted(tokenizer)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    weight = layer.base_layer.weight
    copy = weight.detach().clone()
    with preserved_base(model):
        layer.base_layer.weight = torch.nn.Parameter(torch.zeros_like(copy))
    assert layer.base_layer.weight is weight and torch.equal(weight, copy)


# ---- Failures


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_that_does_not_start_is_not_started_again(kind, stand_in, tokenizer, monkeypatch):
    waits = []
    monkeypatch.setattr(Accelerator, "wait_for_everyone", lambda self: waits.append(1))
    stand_in.fail["start"] = ConnectionError("The vLLM server can't be reached\nat http://localhost:8000")
    model, engine = stopping_model(tokenizer), engine_of(kind)
    for _ in range(2):
        with pytest.raises(
            SamplingFailed, match=f"{kind} could not be started: ConnectionError: The vLLM server can't"
        ):
            draw(model, tokenizer, engine)
    assert stand_in.events == ["start"]
    assert len(waits) == 1  # the constructor's own barrier, where other ranks would be waiting


@pytest.mark.parametrize("fail", ["check_server", "sync", "generate"])
def test_a_server_that_comes_back_is_used_again(fail, stand_in, tokenizer):
    model, engine = stopping_model(tokenizer), engine_of("vllm_server")
    expected = draw(model, tokenizer, engine)
    stand_in.fail[fail] = ConnectionError("refused")
    stand_in.events.clear()
    with pytest.raises(SamplingFailed, match="ConnectionError: refused"):
        draw(model, tokenizer, engine)
    assert stand_in.events[-1] == fail  # nothing after it, and no weights sent to a server that is gone
    stand_in.fail.clear()
    assert draw(model, tokenizer, engine) == expected


@pytest.mark.parametrize("sleeps", [True, False])
def test_after_an_error_a_colocated_engine_gives_its_memory_back(sleeps, stand_in, tokenizer):
    engine = SyncedVLLM("vllm_colocate", VLLMSettings(enable_sleep_mode=sleeps))
    stand_in.fail["generate"] = RuntimeError("no")
    with pytest.raises(SamplingFailed):
        draw(stopping_model(tokenizer), tokenizer, engine)
    assert stand_in.generation.llm.sleep.call_args_list == ([((), {"level": 2})] if sleeps else [])


def test_a_sample_without_a_token_is_no_sample(stand_in, tokenizer, monkeypatch):
    monkeypatch.setattr(stand_in, "_sample", lambda *args: ([], []))
    with pytest.raises(SamplingFailed, match="a sample without a token"):
        draw(stopping_model(tokenizer), tokenizer, engine_of("vllm_colocate"))


# ---- In a training


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(backends, "is_vllm_available", lambda: True)
    monkeypatch.setattr(backends, "_has_gpu", lambda: True)


def train(folder, tokenizer, model_dir, **changes):
    settings = {"diversity_samples": 3, "diversity_max_new_tokens": 5, "max_steps": 4, "cold_start_loss": "nll"}
    trainer = AESLSFTTrainer(
        model=model_dir,
        args=small_config(folder, **{**settings, **changes}),
        train_dataset=prompt_completion_rows(),
        processing_class=tokenizer,
        diversity_prompts=PROMPTS if changes.get("diversity_steps") else None,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("backend", KINDS)
def test_training_is_bit_equal_with_and_without(backend, stand_in, installed, tokenizer, tiny_model_dir, tmp_path):
    plain = train(tmp_path / "plain", tokenizer, tiny_model_dir)
    settings = {"diversity_vllm_server_base_url": "http://localhost:8000"} if backend == "vllm_server" else {}
    measured = train(
        tmp_path / "measured", tokenizer, tiny_model_dir, diversity_steps=2, diversity_backend=backend, **settings
    )
    weights = trained_weights(plain)
    assert all(torch.equal(weights[name], weight) for name, weight in trained_weights(measured).items())
    logs = [[row for row in run.state.log_history if "loss" in row] for run in (plain, measured)]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    rows = files.read_jsonl(tmp_path / "measured" / files.OWN / files.DIVERSITY)
    assert [row["step"] for row in rows] == [0, 2, 4]
    for row in rows:
        assert row["backend"] == backend and row["entropy_estimator"] == "sampled" and row["batch_size"] is None
        assert row["entropy"] == row["entropy_sampled"] > 0 and row["token_budget"] == 131_072


def test_a_server_that_goes_is_a_gap_and_the_training_goes_on(
    stand_in, installed, tokenizer, tiny_model_dir, tmp_path, monkeypatch, capsys
):
    original = stand_in._sync

    def sync():
        original()
        if stand_in.events.count("sync") == 2:
            raise ConnectionError("Connection refused")

    stand_in.generation.sync_weights.side_effect = sync
    trainer = train(
        tmp_path,
        tokenizer,
        tiny_model_dir,
        diversity_steps=2,
        diversity_vllm_server_base_url="http://localhost:8000",
        selection="turning_point",
    )
    assert trainer.state.global_step == 4
    rows = files.read_jsonl(tmp_path / files.OWN / files.DIVERSITY)
    assert [row.get("gap") for row in rows] == [None, "ConnectionError: Connection refused", None]
    assert rows[1]["entropy"] is None and rows[1]["self_bleu"] is None and "by_prompt" not in rows[1]
    samples = tmp_path / files.OWN / files.SAMPLES
    assert sorted(path.name for path in samples.iterdir()) == ["step-0.jsonl", "step-4.jsonl"]
    assert files.read_json(tmp_path / files.OWN / files.SELECTION)["step"] == 4
    out = capsys.readouterr().out
    assert out.count("step 2 is a gap in diversity.jsonl: ConnectionError: Connection refused") == 1
    assert "diversity samples come from vllm_server (auto: the server http://localhost:8000 is named)" in out
