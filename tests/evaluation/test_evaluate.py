"""Models measured on the same prompts: pass@k with intervals and diversity, from the same samples."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import preloaded
import pytest
import torch
import yaml
from benchmark_rows import ROWS, write_copy
from tiny_models import build_model, build_tokenizer

from aesl_trl.data.benchmarks import BENCHMARKS
from aesl_trl.diversity.passk import pass_at_k
from aesl_trl.errors import InputError
from aesl_trl.evaluation import evaluate
from aesl_trl.report import report
from aesl_trl.rewards.grading import SHARED_GRADERS, Grade
from aesl_trl.sampling.draws import SamplingSettings
from aesl_trl.sampling.groups import sample_groups
from aesl_trl.sampling.offline import OfflineTransformers, load


REWARD = """
def starts_high(completions, threshold, **kwargs):
    return [float(text[0]["content"][:1] >= limit) for text, limit in zip(completions, threshold, strict=True)]
"""


@pytest.fixture
def config(tmp_path):
    """Writes eval.yaml with its prompts and reward beside it; keyword arguments override, None drops a key."""
    rows = [{"prompt": [{"role": "user", "content": f"say {text}"}], "threshold": text} for text in "0Aaz!"]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.py").write_text(REWARD)

    def write(**overrides) -> list[str]:
        values = {
            "dataset_name": "problems.jsonl",
            "reward_funcs": ["own.py:starts_high"],
            "num_prompts": 4,
            "num_samples": 4,
            "max_new_tokens": 6,
            "use_cpu": True,
            "output": str(tmp_path / "out"),
            **overrides,
        }
        path = tmp_path / "eval.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return ["--config", str(path)]

    return write


def read(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "evaluation.json").read_text())


def save_constant_model(folder) -> str:
    """A model that always answers `~`, whatever it is asked: pass@k and diversity are known."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    with torch.no_grad():
        weight = model.model.embed_tokens.weight
        weight[:, 0] = 1.0  # every token carries this direction to the tied head
        weight[tokenizer("~")["input_ids"][0], 0] = 40.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_start_and_final_are_measured_on_the_same_prompts(config, tmp_path, tiny_model_dir):
    final = save_constant_model(tmp_path / "final")
    evaluate.main([*config(count_by="threshold"), "--start", tiny_model_dir, "--final", final])
    result = read(tmp_path)
    assert list(result["models"]) == ["start", "final"]
    settings = {
        "num_prompts": 4,
        "num_samples": 4,
        "temperature": 1.0,
        "max_new_tokens": 6,
        "seed": 0,
        "num_processes": 1,
    }
    assert settings.items() <= result.items()
    start, final = result["models"].values()
    assert (
        start.keys() == final.keys() >= {"entropy", "self_bleu", "distinct_1", "length", "truncated", "groups_mixed"}
    )
    # "~" is above every threshold: each answer is right, none differs, and resampled problems all agree.
    assert (final["pass@1"], final["pass@4"], final["pass@1_interval"]) == (1.0, 1.0, [1.0, 1.0])
    assert (final["solved"], final["solved_of"], result["count_by"]) == (4, 4, "threshold")
    assert (final["unique"], final["groups_all_right"], final["length"]) == (0.25, 1.0, 6.0)
    assert final["entropy"] < 1e-3 < 5 < start["entropy"] < math.log(259)
    low, high = start["pass@1_interval"]
    assert low <= start["pass@1"] <= high and low < high
    assert start["pass@1"] <= start["pass@2"] <= start["pass@4"] <= 1


def test_models_given_first_keep_their_names_and_the_draw_is_the_seeds(config, tmp_path, tiny_model_dir):
    evaluate.main([tiny_model_dir, *config()])
    one = read(tmp_path)
    other = config(output=str(tmp_path / "other"))  # where none of the samples are
    evaluate.main([tiny_model_dir, *other])
    assert json.loads((tmp_path / "other" / "evaluation.json").read_text()) == one
    assert list(one["models"]) == [tiny_model_dir] and one["backends"] == {tiny_model_dir: "transformers"}
    evaluate.main([tiny_model_dir, *config(seed=1)])
    assert read(tmp_path)["models"] != one["models"]


def test_weights_are_rounded_to_the_dtype_that_is_named(config, tmp_path, tiny_model_dir, monkeypatch):
    drawn = []
    monkeypatch.setattr(OfflineTransformers, "close", lambda engine: drawn.append(engine.model.dtype))
    for dtype in ("auto", "bfloat16"):
        evaluate.main([tiny_model_dir, *config(dtype=dtype)])
        assert read(tmp_path)["dtype"] == dtype
    assert drawn == [torch.float32, torch.bfloat16]
    assert len(list((tmp_path / "out" / "evaluation_samples").iterdir())) == 2  # neither takes the other's samples


def test_a_run_in_one_piece_draws_as_sampling_alone_does(config, tmp_path, tiny_model_dir):
    """What skills-tiny's recorded numbers rest on: one piece has the run's own seed, its batches one generator."""
    settings = {"num_samples": 4, "max_new_tokens": 6, "batch_size": 3, "seed": 2}
    evaluate.main([tiny_model_dir, *config(**settings, save_every=16, temperature=1.0)])
    (line,) = samples_of(tmp_path / "out", "prompts").open()
    rows = [json.loads(row) for row in (tmp_path / "problems.jsonl").open()][:4]
    model, tokenizer = load(tiny_model_dir, "cpu")
    groups = sample_groups(model, tokenizer, rows, SamplingSettings(temperature=1.0, **settings))
    assert [row["completions"] for row in json.loads(line)["groups"]] == [group.completions for group in groups]


def test_an_adapter_is_measured_on_its_base(config, tmp_path, tiny_model_dir):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    base.model.norm.weight.data.mul_(20)  # far from uniform, so that the adapter shows
    base.save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    build_tokenizer().save_pretrained(tmp_path / "merged")
    names = [str(tmp_path / name) for name in ("adapter", "merged", "base")]
    evaluate.main([*names, *config()])
    adapter, merged, base = (read(tmp_path)["models"][name] for name in names)
    assert adapter["entropy"] == pytest.approx(merged["entropy"], rel=1e-3)
    assert abs(adapter["entropy"] - base["entropy"]) > 0.1


@pytest.mark.slow
def test_two_processes_measure_every_prompt_once(config, tmp_path):
    """The constant model's figures are the same on one process, so a prompt lost or doubled would show."""
    model = save_constant_model(tmp_path / "model")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "aesl_trl.evaluation.evaluate", *config(num_prompts=3), "--final", model]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (read(tmp_path)["num_processes"], read(tmp_path)["num_prompts"]) == (2, 3)
    assert read(tmp_path)["models"]["final"]["pass@4"] == 1.0


@pytest.mark.parametrize(
    ("overrides", "flags", "message"),
    [
        ({}, [], "which model"),
        ({}, ["--final", "/no/such/model"], "final: /no/such/model"),
        ({"dataset_name": None}, ["org/model"], "dataset_name is missing"),
        ({"reward_funcs": []}, ["org/model"], "reward_funcs is missing"),
        ({"reward_funcs": None}, ["org/model"], "reward 'math_reward' needs 'solution'"),
        ({"reward_funcs": ["accuracy_reward"]}, ["org/model"], "needs 'solution'"),
        ({"count_by": "treshold"}, ["org/model"], "count_by: dataset_name has no column 'treshold'; .* 'threshold'"),
        ({"num_samples": 0}, ["org/model"], "num_samples is 0, but must be at least 1"),
        ({"temperature": 0.0}, ["org/model"], "temperature is 0.0, but must be above 0"),
        ({"dtype": "bf16"}, ["org/model"], "dtype must be one of .* did you mean 'bfloat16'"),
        ({"num_promts": 4}, ["org/model"], "did you mean 'num_prompts'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_loads(config, monkeypatch, overrides, flags, message):
    monkeypatch.setattr(evaluate, "open_engine", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises(InputError, match=message) as caught:
        evaluate.main([*flags, *config(**overrides)])
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_refused(config, tmp_path):
    with pytest.raises(InputError, match="model: .* holds no config.json"):
        evaluate.main([str(tmp_path), *config()])


# ---- Benchmarks


@pytest.fixture(scope="module")
def two_answers(tmp_path_factory) -> str:
    """A tiny model that was taught to answer 4 or 5 in a box, whatever the problem."""
    folder, tokenizer = tmp_path_factory.mktemp("two-answers"), build_tokenizer()
    model = build_model(tokenizer)
    prompts = [row[BENCHMARKS[name].problem] for name in ROWS for row in ROWS[name]]
    chats = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt in prompts
        for answer in (r"\boxed{4}", r"\boxed{5}")
    ]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False).rstrip() for chat in chats]
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    labels = torch.full_like(batch["input_ids"], -100)
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        labels[row, length - 10 : length] = batch["input_ids"][row, length - 10 : length]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def benchmark_config(tmp_path):
    """Writes an eval.yaml for benchmarks whose copies hold the problems `problems` with the answer 4."""

    def write(names=("AIME24",), problems=6, **overrides) -> list[str]:
        for name in names:
            benchmark, (row, *_) = BENCHMARKS[name], ROWS[name]
            gold = {"GSM8K": "so #### 4", "OlympiadBench": ["$4$"]}.get(name, "4")
            rows = [{**row, benchmark.problem: f"What is {i}?", benchmark.answer: gold} for i in range(problems)]
            write_copy(tmp_path / "copies", name, rows)
        values = {
            "benchmarks": list(names),
            "data_dir": "copies",
            "prompt_template": "{problem}",
            "samples": 8,
            "max_new_tokens": 12,
            "batch_size": 16,
            "use_cpu": True,
            "output": str(tmp_path / "out"),
            **overrides,
        }
        (tmp_path / "eval.yaml").write_text(yaml.safe_dump(values))
        return ["--config", str(tmp_path / "eval.yaml")]

    return write


def samples_of(folder: Path, name: str) -> Path:
    (path,) = folder.glob(f"evaluation_samples/*/{name}-*.jsonl")
    return path


def test_a_benchmark_is_sampled_graded_and_voted_on(benchmark_config, tmp_path, two_answers, capsys):
    pytest.importorskip("math_verify")
    evaluate.main([two_answers, *benchmark_config()])
    result = read(tmp_path)
    facts = result["benchmarks"]["AIME24"]
    figures = facts["models"][two_answers]
    assert (facts["num_prompts"], facts["source"]["hub"]) == (6, "HuggingFaceH4/aime_2024")
    graded = [json.loads(line) for line in next(tmp_path.glob("out/*/*/AIME24.graded.jsonl")).open()]
    assert [row["solution"] for row in graded] == [r"\boxed{4}"] * 6
    right = [sum(reward == 1.0 for (reward,) in row["rewards"]) for row in graded]
    # Each sample that answers 4 is right, and no other
    assert right == [sum(answer == "4" for answer in row["answers"]) for row in graded] and 0 < sum(right) < 48
    wrong = [sum(answer == "5" for answer in row["answers"]) for row in graded]
    assert figures["avg@8"] == figures["pass@1"] == pytest.approx(sum(right) / 48)
    assert figures["pass@4"] == pytest.approx(sum(pass_at_k(8, number, 4) for number in right) / 6)
    assert figures["maj@1"] == pytest.approx(figures["pass@1"])
    strays = [8 - sum(pair) for pair in zip(right, wrong, strict=True)]
    if not any(strays):  # an answer that is neither has votes of its own
        shares = [float(r > w) + 0.5 * (r == w) for r, w in zip(right, wrong, strict=True)]
        assert figures["maj@8"] == pytest.approx(sum(shares) / 6)
        assert figures["maj@8_tied"] == pytest.approx(sum(r == w for r, w in zip(right, wrong, strict=True)) / 6)
    for key in ("avg@8", "pass@8", "maj@8"):
        low, high = figures[f"{key}_interval"]
        assert low <= figures[key] <= high
    assert (figures["problems_not_graded"], figures["answers_not_graded"]) == (0, {})
    assert result["models"][two_answers]["avg@8"] == figures["avg@8"]
    assert "avg@8_interval" not in result["models"][two_answers]
    assert "AIME24: pass@1" in capsys.readouterr().out
    report.main([str(tmp_path / "out")])
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(text in page for text in ("Benchmarks", "AIME24", "maj@k", f"{figures['maj@8']:.2f}"))


@pytest.mark.slow
def test_all_benchmarks_by_the_real_command(benchmark_config, tmp_path, two_answers):
    pytest.importorskip("math_verify")
    command = [sys.executable, "-m", "aesl_trl.cli", "eval", two_answers]
    command += benchmark_config(names=tuple(BENCHMARKS), problems=3)
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    evaluation = read(tmp_path)
    assert list(evaluation["benchmarks"]) == list(BENCHMARKS) and evaluation["num_prompts"] == 21
    figures = [facts["models"][two_answers] for facts in evaluation["benchmarks"].values()]
    assert all(row["problems_not_graded"] == 0 for row in figures)
    assert evaluation["models"][two_answers]["avg@8"] == pytest.approx(sum(row["avg@8"] for row in figures) / 7)
    assert 0 < evaluation["models"][two_answers]["avg@8"] < 1


def test_a_gold_answer_that_cannot_be_read_counts_for_nothing(benchmark_config, tmp_path, two_answers):
    pytest.importorskip("math_verify")
    config = benchmark_config(problems=2)
    rows = [{"problem": "a", "answer": "4"}, {"problem": "b", "answer": r"\text{}"}]
    write_copy(tmp_path / "copies", "AIME24", rows)
    evaluate.main([two_answers, *config])
    figures = read(tmp_path)["benchmarks"]["AIME24"]["models"][two_answers]
    assert figures["problems_not_graded"] == 1
    graded = [json.loads(line) for line in next(tmp_path.glob("out/*/*/AIME24.graded.jsonl")).open()]
    assert graded[1]["rewards"] == [[None]] * 8
    assert figures["avg@8"] == sum(reward for (reward,) in graded[0]["rewards"]) / 8


# ---- Killed and run again


def test_a_killed_evaluation_goes_on_where_it_was(benchmark_config, tmp_path, two_answers):
    """SIGKILL in the middle of a real run, then the same command: what was drawn stays, and the result is the same."""
    pytest.importorskip("math_verify")
    settings = {"problems": 12, "max_new_tokens": 24, "batch_size": 4, "seed": 3}
    config = benchmark_config(**settings)
    process = preloaded.start(["-m", "aesl_trl.evaluation.evaluate", two_answers, *config])
    try:
        deadline = time.monotonic() + 200
        while sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("out/*/*/AIME24-*.jsonl")) < 3:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.kill()
        process.join()
    before = samples_of(tmp_path / "out", "AIME24").read_bytes()
    assert 3 <= before.count(b"\n") < 24  # 12 problems, 8 samples in parts of 4
    assert not (tmp_path / "out" / "evaluation.json").exists()
    evaluate.main([two_answers, *config])
    after = samples_of(tmp_path / "out", "AIME24").read_bytes()
    assert after.startswith(before[: before.rfind(b"\n") + 1]) and after.count(b"\n") == 24
    evaluate.main([two_answers, *benchmark_config(**settings, output=str(tmp_path / "undisturbed"))])
    undisturbed = tmp_path / "undisturbed"
    assert samples_of(undisturbed, "AIME24").read_bytes() == after
    assert json.loads((undisturbed / "evaluation.json").read_text()) == read(tmp_path)


def test_what_is_drawn_needs_no_model(benchmark_config, tmp_path, two_answers, monkeypatch, capsys):
    pytest.importorskip("math_verify")
    config = benchmark_config(problems=2)
    evaluate.main([two_answers, *config])
    one = read(tmp_path)
    monkeypatch.setattr(evaluate, "open_engine", lambda *args: pytest.fail("a model was loaded"))
    evaluate.main([two_answers, *config])
    assert read(tmp_path) == one and "1 of 1 pieces are drawn already" in capsys.readouterr().out
    # An adapter, a model trained further, another seed, length or problem has samples of its own
    for change in ({"seed": 1}, {"max_new_tokens": 11}, {"problems": 3}, {"samples": 4}):
        with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
            evaluate.main([two_answers, *benchmark_config(**{"problems": 2, **change})])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"benchmarks": ["AIME26"]}, "unknown benchmark 'AIME26'; did you mean"),
        ({"benchmarks": ["AIME24", "AIME24"]}, "named twice"),
        ({"dataset_name": "copies/AIME24.jsonl"}, "benchmarks and dataset_name are both given"),
        ({"reward_funcs": ["think_format_reward"]}, "graded by one of math_reward, accuracy_reward, got think_format"),
        ({"reward_funcs": []}, "graded by one of math_reward, accuracy_reward, got none"),
        ({"data_dir": "./nowhere"}, "data_dir: ./nowhere does not exist"),
        ({"benchmarks": ["AMC23"]}, "has no copy of AMC23"),
        ({"prompt_template": "Solve it."}, "prompt_template must hold {problem}"),
        ({"prompt_format": "text", "system_prompt": "x"}, "system_prompt has no place in prompt_format: text"),
        ({"prompt_format": "prose"}, "prompt_format must be one of chat, text"),
        ({"benchmarks": None}, "data_dir is for benchmarks, and none is named"),
        ({"save_every": 0}, "save_every is 0, but must be at least 1"),
        ({"backend": "vlm"}, "backend must be one of auto, vllm, transformers.*did you mean 'vllm'"),
        ({"backend": "vllm"}, "backend: vllm cannot be used: "),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5, but must be above 0 and at most 1"),
    ],
)
def test_a_benchmark_that_cannot_be_measured_is_refused(
    benchmark_config, two_answers, monkeypatch, overrides, message
):
    monkeypatch.setattr(evaluate, "open_engine", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises(InputError, match=message) as caught:
        config = benchmark_config(**{key: value for key, value in overrides.items() if value is not None})
        if None in overrides.values():
            path = Path(config[1])
            values = yaml.safe_load(path.read_text())
            path.write_text(yaml.safe_dump({k: v for k, v in values.items() if k not in overrides}))
        evaluate.main([two_answers, *config])
    assert "\n" not in str(caught.value)


def test_golds_that_no_answer_can_earn_are_refused(benchmark_config, two_answers, monkeypatch):
    monkeypatch.setattr(evaluate, "open_engine", lambda *args: pytest.fail("a model was loaded"))
    monkeypatch.setattr(SHARED_GRADERS, "grade", lambda answers, deadline_s: [Grade(0.0)] * len(answers))
    with pytest.raises(InputError, match=r"AIME24: 6 of 6 golds .* with accuracy_reward.*math_reward reads more"):
        evaluate.main([two_answers, *benchmark_config(reward_funcs=["accuracy_reward"])])
