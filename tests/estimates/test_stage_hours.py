"""Settings to time: how many steps, measurements, samples and problems a stage has, and what it says when unknown."""

import json
import math
from types import SimpleNamespace

import pytest
from stand_ins import RECIPES

from aesl_trl.arguments import parse
from aesl_trl.chain.stages import ANYWHERE, argument_types
from aesl_trl.errors import InputError
from aesl_trl.estimates import stage_hours
from aesl_trl.estimates.facts import CARDS, PROBLEMS, Hardware, Launch, Promise, find_facts, promised_files, shape_of
from aesl_trl.estimates.hours import FAST, SLOW, Draw, End, Span, forward_flops, generate_s, step_s, vllm_s
from aesl_trl.estimates.stage_hours import MEASURING, SAMPLING, TRAINING, Site, stage_time, told
from aesl_trl.estimates.stage_memory import training_of


RECIPE = RECIPES / "Qwen2.5-1.5B-Instruct"
FASTEST, SLOWEST = (next(card for card in CARDS if card.name == name) for name in ("RTX 4090", "RTX 3090"))


@pytest.fixture(scope="module")
def site():
    facts = find_facts(RECIPE / "chain.yaml")
    return Site(shape_of(facts), facts.context, Hardware(1, 24.0), promised=promised_files(RECIPE))


def parsed(name, kind, site, *flags):
    flags = flags if kind == "eval" else (*ANYWHERE, *flags)
    argv = ["--config", str(RECIPE / name), *flags]
    return parse(argument_types(kind), argv, prog="test", to_come=site.promised.keys())


def test_a_cold_starts_steps_and_measurements(site):
    script, args, model_args = parsed("sft/config_aesl_lora.yaml", "sft", site)
    found = stage_time("sft", site, (script, args, model_args))
    run = training_of(site.shape, Launch(), args, model_args, length=1024)
    # 4 epochs of 63 steps of 16 of 1,000 rows, as the recipe says: 252; the base, 10 times, and the last step
    assert found[TRAINING].fast == pytest.approx(252 * step_s(run, End(FASTEST, FAST)))
    assert found[TRAINING].slow == pytest.approx(252 * step_s(run, End(SLOWEST, SLOW)))
    # Without a limit 64 x 8 samples of 512 tokens; by generate they are 4 batches of 128, with figures of each
    slow = generate_s(site.shape, End(SLOWEST, SLOW), Draw(512, 128, 512, 512, 8, True)) + 512 * SLOW.figures_s
    assert found[MEASURING].slow == pytest.approx(12 * slow)


def test_the_token_budget_makes_a_measurement_smaller(site):
    whole = parsed("sft/config_aesl_lora.yaml", "sft", site, "--diversity_backend", "generate")
    script, args, model_args = parsed("sft/config_aesl_lora.yaml", "sft", site, "--diversity_backend", "generate")
    args.diversity_token_budget = None
    limited = stage_time("sft", site, (script, args, model_args))[MEASURING]
    # The default budget: 16 prompts x 8 samples x 256 tokens, one batch of half the length instead of four
    draw = Draw(128, 128, 512, 256, 8, True)
    assert limited.fast == pytest.approx(
        12 * (generate_s(site.shape, End(FASTEST, FAST), draw) + 128 * FAST.figures_s)
    )
    assert limited.fast < stage_time("sft", site, whole)[MEASURING].fast / 4


def test_rl_by_generate_and_by_vllm(site):
    settings = parsed("grpo/config_lora.yaml", "grpo", site)
    _, args, model_args = settings
    found = stage_time("grpo", site, settings)
    run = training_of(site.shape, Launch(), args, model_args, length=1024, masked=True, trl_head=True)
    fast = End(FASTEST, FAST)
    # 300 steps; one generation of all 128 completions each, one update, so that no other scores are needed
    assert found[TRAINING].fast == pytest.approx(300 * step_s(run, fast))
    assert found[SAMPLING].fast == pytest.approx(
        300 * generate_s(site.shape, fast, Draw(128, 128, 512, 512, 8, adapter=True))
    )
    by_vllm = stage_time("grpo", site, parsed("grpo/config_lora_vllm.yaml", "grpo", site))
    # vLLM's samples are scored first
    assert by_vllm[TRAINING].fast == pytest.approx(300 * step_s(run, fast, forwards=1))
    batch = stage_hours.vllm_batch(site.shape, 24 * 0.35, 1024)
    assert batch == 112  # (8.4 - 2 - 3.09 GB) over 1,024 tokens of 28,672 bytes
    drawn = vllm_s(site.shape, fast, Draw(128, batch, 512, 512, 8))
    assert by_vllm[SAMPLING].fast == pytest.approx(300 * (drawn + FAST.sync_s))


def test_two_updates_of_a_generation_halve_the_sampling_and_score_first(site):
    script, args, model_args = parsed("grpo/config_lora.yaml", "grpo", site)
    once = stage_time("grpo", site, (script, args, model_args))
    args.num_iterations = 2
    twice = stage_time("grpo", site, (script, args, model_args))
    assert twice[SAMPLING].fast == pytest.approx(once[SAMPLING].fast / 2)
    # The scores of a generation serve both of its updates: half a pass for each of the 300 steps
    run = training_of(site.shape, Launch(), args, model_args, length=1024, masked=True, trl_head=True)
    fast = End(FASTEST, FAST)
    assert twice[TRAINING].fast == pytest.approx(300 * step_s(run, fast, forwards=0.5))
    args.beta = 0.1  # a reference scores too
    with_reference = stage_time("grpo", site, (script, args, model_args))
    assert with_reference[TRAINING].fast == pytest.approx(300 * step_s(run, fast, forwards=1))


def test_processes_share_the_prompts(site):
    settings = parsed("probe.yaml", "probe", site)
    alone = stage_time("probe", site, settings)[SAMPLING]
    shared = Site(site.shape, site.context, site.hardware, Launch(processes=4), site.promised)
    # 64 x 8 samples, 64 at once: 8 batches, and 2 of them on each of four
    figures = 512 * FAST.figures_s
    assert stage_time("probe", shared, settings)[SAMPLING].fast - figures == pytest.approx((alone.fast - figures) / 4)


def test_an_evaluations_problems(site):
    settings = parsed("eval_gsm8k.yaml", "eval", site)
    one, two = (stage_time("eval", site, settings, models=models)[SAMPLING] for models in (1, 2))
    assert two == one * 2
    # 512 of 1,319 problems x 4 answers; at the slow end 32 batches of 64 by transformers
    slow = End(SLOWEST, SLOW)
    assert one.slow == pytest.approx(generate_s(site.shape, slow, Draw(2048, 64, 512, 512)) + 2048 * SLOW.figures_s)
    (args,) = settings
    args.benchmarks, args.num_prompts = ["AIME24", "MATH-500"], None
    assert stage_hours._problems(site, args) == PROBLEMS["AIME24"] + PROBLEMS["MATH-500"] == 530


def test_rows_are_promised_or_counted(site, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": str(number)}) + "\n" for number in range(7)))
    assert site.rows(str(file)) == 7
    promised = Site(site.shape, 1, site.hardware, promised={str(file): Promise(file, None, None, 5)})
    assert promised.rows(str(file)) == 5
    assert site.rows("a/hub-dataset") is None and site.rows(None) is None


def test_what_is_not_known_is_said(site):
    script, args, model_args = parsed("sft/config_aesl_lora.yaml", "sft", site)
    script.dataset_name = "a/hub-dataset"
    with pytest.raises(InputError, match="how many rows .* max_steps"):
        stage_time("sft", site, (script, args, model_args))
    args.max_steps = 10
    assert stage_time("sft", site, (script, args, model_args))[TRAINING].fast > 0
    unknown = SimpleNamespace(benchmarks=None, dataset_name="a/hub-dataset", num_prompts=None)
    with pytest.raises(InputError, match="how many problems .* num_prompts"):
        stage_hours._problems(site, unknown)


def test_a_forward_pass_takes_what_its_tokens_take(site):
    fast = End(FASTEST, FAST)
    expected = 512 * forward_flops(site.shape, 512) / (165.2e12 * 0.4)
    assert stage_hours._forward_s(site.shape, 1024, fast) == pytest.approx(expected)
    assert math.isclose(fast.training, 66.08e12)


def test_parts_and_their_sum_as_text():
    assert told({SAMPLING: Span(60, 120)}) == "1 to 2 min sampling"
    text = told({SAMPLING: Span(60, 120), TRAINING: Span(120, 240)})
    assert text == "3 to 6 min: 1 to 2 min sampling, 2 to 4 min training"
