"""The pages: each figure that docs and READMEs print is what the arithmetic gives."""

import json
import math
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import record
import scaling
from stand_ins import RECIPES

from aesl_trl.estimates.facts import CARDS, cards_of, find_facts, shape_of
from aesl_trl.estimates.hours import (
    FAST,
    SLOW,
    Draw,
    End,
    Shares,
    decoding_s,
    step_s,
    traffic,
    training_flops,
    vllm_batch,
    vllm_s,
)
from aesl_trl.estimates.memory import Training, budget, training_items
from aesl_trl.estimates.stage_hours import _forward_s, measurement_s
from aesl_trl.training.measurement import Size, fit


DOCS = RECIPES.parent / "docs"
PAGE, COST = (" ".join((DOCS / name).read_text().split()) for name in ("several_gpus.md", "monitoring_cost.md"))


def shape(name):
    return shape_of(find_facts(RECIPES / name / "chain.yaml"))


def row(*cells):
    return f"| {' | '.join(map(str, cells))} |"


@pytest.fixture(scope="module")
def full():
    return Training(shape("Qwen2.5-7B-Instruct"), processes=8, length=9216, micro_batches=8)


def test_the_cards():
    for card in CARDS:
        assert (
            row(card.name, card.gb, f"{card.tflops:g}", f"{card.memory_gb_s:,}", card.link_gb_s, card.source) in PAGE
        )


def test_what_is_expected_of_a_card():
    names = {
        "train": "share of the peak, training",
        "sample": "share of the peak, decoding",
        "link": "share of the link",
    }
    names |= {"memory": "share of the memory's bandwidth"}
    for field, name in names.items():
        assert f"| {name} | {getattr(FAST, field):.2f} | {getattr(SLOW, field):.2f} |" in PAGE
    assert f"| a layer of a step of `generate` | {1000 * FAST.layer_s:.2f} ms | {1000 * SLOW.layer_s:.2f} ms |" in PAGE
    assert f"| vLLM's own in a step | {1000 * FAST.vllm_step_s:.0f} ms | {1000 * SLOW.vllm_step_s:.0f} ms |" in PAGE
    assert f"| to wake vLLM and bring the weights | {FAST.sync_s:.0f} s | {SLOW.sync_s:.0f} s |" in PAGE
    assert f"| a sample to figures | {1000 * FAST.figures_s:.0f} ms | {1000 * SLOW.figures_s:.0f} ms |" in PAGE
    assert f"| a base in 4 or 8 bits | {FAST.quantized} times | {SLOW.quantized} times |" in PAGE
    assert (FAST.filled, SLOW.filled) == (0.5, 1.0) and (FAST.overlaps, SLOW.overlaps) == (True, False)
    assert len(fields(Shares)) == 11  # the table has them all


def test_what_each_config_costs(full):
    runs = {
        "`ddp.yaml`, LoRA": replace(full, lora_rank=32),
        "`ddp.yaml`, full, float32": replace(full, weight_bytes=4),
        "`zero2.yaml`, full": replace(full, sharding="zero2"),
        "`zero3.yaml`, full": replace(full, sharding="zero3"),
        "`fsdp2.yaml`, full": replace(full, sharding="fsdp"),
        "`fsdp2.yaml`, LoRA": replace(full, sharding="fsdp", lora_rank=32),
    }
    for name, run in runs.items():
        sent = traffic(run)
        peak = budget(training_items(run), 80).peak_gb
        assert row(name, f"{peak:.1f}", f"{sent.micro_gb:.2f}", f"{sent.step_gb:.2f}") in PAGE, name


def test_the_extrapolated_efficiencies(full):
    def efficiency(run, gpu_gb):
        if not budget(training_items(run), gpu_gb).fits:
            return ["–", "–"]
        ends = [End(card, shares) for card, shares in zip(cards_of(gpu_gb), (FAST, SLOW), strict=True)]
        alone = replace(run, processes=1, sharding="none")
        return [f"{step_s(alone, end) / step_s(run, end):.0%}" for end in ends]

    for processes in (2, 4, 8, 16):
        run = replace(full, sharding="fsdp", processes=processes, micro_batches=64 // processes)
        peak = budget(training_items(run), 80).peak_gb
        assert row(processes, f"{peak:.1f}", *efficiency(run, 80), *efficiency(run, 48)) in PAGE
        adapter = replace(run, sharding="none", lora_rank=32)
        assert min(int(text[:-1]) for gpu_gb in (80, 48) for text in efficiency(adapter, gpu_gb)) > 99
        # The training fits on 80 GB from four cards on, on 48 GB on sixteen
        fits = [budget(training_items(run), gpu_gb).fits for gpu_gb in (80, 48)]
        assert fits == [processes >= 4, processes >= 16]


def test_what_monitoring_costs():
    run = Training(shape("Qwen2.5-1.5B-Instruct"), lora_rank=32, rows=4, length=1000, micro_batches=8)
    flops = training_flops(run, 1000)
    ends = [End(card, replace(FAST, filled=1.0)) for card in cards_of(24)]
    between = [1.6e6 * flops / end.training for end in ends]

    def costs(backend, token_budget=None):
        sizes = {"num_prompts": 64, "num_samples": 8, "max_new_tokens": 512, "batch_size": 128}
        sizes["token_budget"] = token_budget
        given = {f"diversity_{name}": value for name, value in sizes.items()}
        args = SimpleNamespace(diversity_backend=backend, diversity_vllm_gpu_memory_utilization=0.3, **given)
        return [measurement_s(run, args, 200, 24, end) for end in ends]

    def shown(name, values, form):
        assert row(name, *(f"{value:{form}}" for value in values)) in COST, name

    assert f"| FLOPs a trained token | {flops / 1e9:.1f}e9 | {flops / 1e9:.1f}e9 |" in COST
    shown("trained tokens a second", [end.training / flops for end in ends], ",.0f")
    shown("seconds between measurements", between, ".0f")
    shown("most that 5% allows, in seconds", [seconds / 19 for seconds in between], ".1f")
    for backend, name in (("generate", "`generate`"), ("vllm_colocate", "vLLM")):
        seconds = costs(backend)
        shares = [each / (each + interval) for each, interval in zip(seconds, between, strict=True)]
        cells = " | ".join(f"{each:.1f}" for each in seconds)
        assert f"| a measurement by {name}, in seconds | {cells} | below | | its share |" in COST
        assert f"| its share | {shares[0]:.1%} | {shares[1]:.1%} |" in COST
    # The fewest steps at which vLLM's default budget takes 5%: 19 of its measurements fit between two of them
    steps = [math.ceil(50 * 19 * each / interval) for each, interval in zip(seconds, between, strict=True)]
    assert f"every {steps[0]} steps on the RTX 4090 and every {steps[1]} on the RTX 3090" in COST
    smaller = [each / (each + rest) for each, rest in zip(costs("vllm_colocate", 49152), between, strict=True)]
    assert f"`diversity_token_budget: 49152` | {smaller[0]:.1%} | {smaller[1]:.1%} | 16 prompts" in COST
    assert max(smaller) < 0.05 and fit(Size(64, 8, 512), 49152) == Size(16, 8, 384)
    batch = vllm_batch(run.shape, 24 * 0.3, 712)
    assert f"holds {batch} sequences of 712 tokens" in COST
    shown("sampling", [vllm_s(run.shape, end, Draw(256, batch, 200, 512, 8)) for end in ends], ".1f")
    scores = "a forward pass of the model over its samples, for exact figures"
    shown(scores, [256 * _forward_s(run.shape, 712, end) for end in ends], ".1f")
    own = [1000 * decoding_s(run.shape, end, 128, 200 + 128) for end in ends]
    assert f"{own[0]:.0f} ms on an RTX 4090, {own[1]:.0f} ms on an RTX 3090" in COST
    step = 1000 * (decoding_s(run.shape, ends[0], batch, 200 + 256) + FAST.vllm_step_s)
    assert f"a step of them takes {step:.0f} ms on an RTX 4090" in COST


def test_the_first_recipes_measurements():
    from aesl_trl.recipes.check import check_config

    name = RECIPES / "Qwen2.5-1.5B-Instruct"
    (line,) = [line for line in check_config(name / "sft/config_aesl_lora.yaml").lines if line.startswith("  time ")]
    training, measuring = line.partition(": ")[2].removesuffix(" (estimated)").split(", ")
    text = (name / "README.md").read_text()
    assert f"{measuring.removesuffix(' measuring')} beside {training.removesuffix(' training')} of training" in text


def test_the_table_of_two_processes_is_that_of_the_record():
    found = json.loads((DOCS / "several_gpus.json").read_text())
    (table,) = found["tables"]
    assert f"{record.markdown(table)}\n" in (DOCS / "several_gpus.md").read_text()
    assert table == scaling.make_table(table["raw"]["one"], table["raw"]["two"], scaling.arguments([]))
    assert found["command"] in PAGE and f"load average {found['load']:.0f}" in PAGE
