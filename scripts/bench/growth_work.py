"""The work whose growth growth.py measures: each function prepares a size in a folder and returns what is timed.

All inputs are made up here, from a fixed seed. What a library costs when it is first used is paid before, by a run of
a small size in the same process.
"""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import yaml

from aesl_trl import files


Work = Callable[[], object]

BASE = Path(__file__).parents[2] / "recipes" / "skills-tiny" / "base"  # its tokenizer knows every byte
TILE = 256  # tokens: the head's tile on a CPU, so that a small size fills one
PROMPTS, FIGURES = 64, ("entropy", "self_bleu", "pass@1", "groups_mixed")  # of a made-up measurement
SAMPLES = 8
LETTERS = "abcdefghijklmnopqrstuvwxyz"


# ---- The head


def head(tokens: int, vocabulary: int, hidden: int) -> Work:
    """Return one forward and backward pass of the AESL head on random operands, all weights trained."""
    import torch

    from aesl_trl.losses.head import fused_head
    from aesl_trl.losses.rules import aesl_rule

    torch.manual_seed(0)
    states = torch.randn(tokens, hidden).requires_grad_()
    weight = torch.randn(vocabulary, hidden).div_(hidden**0.5).requires_grad_()
    labels, sequences = torch.randint(vocabulary, (tokens,)), torch.arange(tokens) // TILE
    return lambda: fused_head(states, weight, None, labels, sequences, aesl_rule()).loss_sum.backward()


# ---- A measurement


def measurement(num_prompts: int, num_samples: int, length: int, folder: Path) -> Work:
    """Return one measurement of an untrained model whose every sample has `length` tokens: sampling and figures."""
    from accelerate import Accelerator
    from transformers import AutoTokenizer

    from aesl_trl.sampling.backends import VLLMSettings
    from aesl_trl.training.measurement import Measurement, MeasurementSettings

    tokenizer, accelerator = AutoTokenizer.from_pretrained(BASE), Accelerator(cpu=True)
    model = endless_model(tokenizer, length + 64)
    trainer = SimpleNamespace(
        model=model,
        model_wrapped=model,
        processing_class=tokenizer,
        accelerator=accelerator,
        args=SimpleNamespace(
            seed=0, gradient_checkpointing_kwargs=None, per_device_train_batch_size=1, disable_tqdm=True
        ),
        state=SimpleNamespace(global_step=0),
    )
    settings = MeasurementSettings(
        steps=1,
        num_samples=num_samples,
        temperature=1.0,
        max_new_tokens=length,
        backend="generate",
        metric="entropy",
        patience=3,
        batch_size=32,
        token_budget=0,
        vllm=VLLMSettings(),
    )
    draw = random.Random(0)
    rows = [{"prompt": "".join(draw.choices(LETTERS, k=16))} for _ in range(num_prompts)]
    found = Measurement(trainer, rows, settings, [])

    def work() -> None:
        row, groups = found.measure_step(0, folder)
        assert all(tokens == length for group in groups for tokens in group.num_tokens), "a sample ended by itself"

    return work


def endless_model(tokenizer, positions: int):
    """Return a model of two layers that never draws the end token.

    The residual stream's first number is the same at each position, and the end token's row of the head, read with it,
    gives a logit far below all others.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = -100.0
    return model


def figures(num_prompts: int, num_samples: int, length: int) -> Work:
    """Return the figures of given samples, of `length` words each: what a measurement does after it has sampled."""
    from aesl_trl.diversity.figures import Group, by_prompt, intervals, measure, prompt_sums

    draw = random.Random(0)
    words = ["".join(draw.choices(LETTERS, k=5)) for _ in range(2000)]
    groups = []
    for _ in range(num_prompts):
        texts = [" ".join(draw.choices(words, k=length)) for _ in range(num_samples)]
        rewards = [[float(draw.random() < 0.5)] for _ in texts]
        groups.append(Group("?", texts, [length] * num_samples, [False] * num_samples, [1.0] * num_samples, rewards))

    def work() -> None:
        sums = prompt_sums(groups)
        measure(sums), intervals(sums), by_prompt(sums)

    return work


# ---- aesl data


def data(num_rows: int, folder: Path) -> Work:
    """Return `aesl data` on rows of OpenR1's schema: a benchmark taken out, solutions and demonstrations verified.

    Each answer is that of two rows, however many rows there are: `aesl data` verifies an answer once.
    """
    from aesl_trl.data.prepare import main

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for number in range(num_rows):
            file.write(json.dumps(openr1_row(number, number % (num_rows // 2))) + "\n")
    # Every hundredth problem is in the benchmark, however many rows there are
    files.write_jsonl(folder / "benchmark.jsonl", [{"problem": problem(100 * number)} for number in range(500)])
    values = {
        "dataset_name": "rows.jsonl",
        "model_name_or_path": str(BASE),
        "output_dir": str(folder / "out"),
        "num_demonstrations": max(8, num_rows // 16),
        "num_held_out": 64,
        "decontaminate": [str(folder / "benchmark.jsonl")],
    }
    (folder / "data.yaml").write_text(yaml.safe_dump(values))
    return lambda: main(["--config", str(folder / "data.yaml")])


def problem(number: int) -> str:
    """Return one of many problems, of about 60 words, of which no two share thirteen words in a row."""
    draw = random.Random(number)
    words = " ".join("".join(draw.choices(LETTERS, k=draw.randint(2, 8))) for _ in range(45))
    return f"Let $x$ be ${number}$ less $\\frac{{{number + 2}}}{{2}}$. {words}. What is $x + {number % 7}$?"


def openr1_row(number: int, answer: int) -> dict:
    """Return a row as Elliott/Openr1-Math-46k-8192 has it; the demonstration has about 150 words."""
    draw = random.Random(-number)
    thought = " ".join("".join(draw.choices(LETTERS, k=5)) for _ in range(150))
    return {
        "data_source": "made up",
        "prompt": [{"role": "system", "content": "Think, then answer."}, {"role": "user", "content": problem(number)}],
        "target": [{"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n$\\boxed{{{answer}}}$"}],
        "ability": "math",
        "reward_model": {"ground_truth": str(answer), "style": "rule"},
        "extra_info": {"index": number, "split": "default"},
    }


def decontamination(num_problems: int) -> Work:
    """Return the search, by share, for benchmark problems that all begin alike: every text meets every problem."""
    from aesl_trl.data.decontaminate import BenchmarkIndex

    opening = "Let us find the sum of all possible values of the unknown number below, where"
    index = BenchmarkIndex(
        {"made up": [f"{opening} {problem(number)}" for number in range(num_problems)]}, n=8, share=0.5
    )
    texts = [f"{opening} {problem(10**6 + number)}" for number in range(8)]
    return lambda: [index.find(text) for text in texts]


# ---- aesl report


def report_of_runs(num_runs: int, folder: Path) -> Work:
    """Return `aesl report` on runs of their own names, each with 50 logged lines and 20 measurements."""
    from aesl_trl.report.report import main

    runs = [chain_run(folder / f"run-{number}", number, lines=50, measurements=20) for number in range(num_runs)]
    return lambda: main([*map(str, runs), "--output", str(folder / "report")])


def report_of_seeds(num_runs: int, folder: Path) -> Work:
    """Return `aesl report` on runs that differ only in their seed."""
    from aesl_trl.report.report import main

    runs = [
        chain_run(folder / "arm" / f"seed-{number}", number, lines=50, measurements=20) for number in range(num_runs)
    ]
    return lambda: main([*map(str, runs), "--output", str(folder / "report")])


def report_of_lines(num_lines: int, folder: Path) -> Work:
    """Return `aesl report` on one run with so many lines in each of its two logs."""
    from aesl_trl.report.report import main

    run = chain_run(folder / "run", 0, lines=num_lines, measurements=20)
    return lambda: main([str(run)])


def chain_run(folder: Path, seed: int, *, lines: int, measurements: int) -> Path:
    """Write a chain's run folder as its stages would leave it, without weights; return the folder."""
    draw, sft = random.Random(seed), folder / "sft" / files.OWN
    files.write_json(folder / files.CHAIN, {"seed": seed, "sft_dir": "sft", "stages": {"sft": done(), "grpo": done()}})
    files.write_json(sft / files.RUN, {"stage": "sft", "cold_start_loss": "aesl", "t_scaling": 3.0, "seed": seed})
    log = [
        {"step": step, "loss": draw.random(), "nll": draw.random(), "weight_mean": draw.random()}
        for step in range(1, lines + 1)
    ]
    files.write_json(sft / files.TRAINER_STATE, {"log_history": log})
    files.write_jsonl(sft / files.DIVERSITY, series(measurements, draw))
    rewards = [{"step": step, "reward": draw.random(), "entropy": draw.random()} for step in range(1, lines + 1)]
    files.write_json(folder / files.GRPO_DIR / files.OWN / files.TRAINER_STATE, {"log_history": rewards})
    selection = {"rule": "turning_point", "applied": "turning_point", "step": 10, "reason": "made up", "evidence": {}}
    files.write_json(folder / files.SELECTION, selection)
    models = {name: {"pass@1": draw.random(), "entropy": draw.random()} for name in ("start", "final")}
    files.write_json(folder / files.EVALUATION, {"models": models, "num_prompts": 64, "num_samples": SAMPLES})
    return folder


def series(measurements: int, draw: random.Random) -> list[dict]:
    """Return rows of diversity.jsonl: figures that rise and fall, with noise, each with its values by prompt."""
    rows = []
    for number in range(measurements):
        height = 1 - abs(2 * number / measurements - 0.5)
        by_prompt = {name: [round(height + draw.gauss(0, 0.1), 4) for _ in range(PROMPTS)] for name in FIGURES[:2]}
        by_prompt["pass@1"] = [draw.randrange(SAMPLES + 1) / SAMPLES for _ in range(PROMPTS)]
        row = {"step": 10 * number, "num_prompts": PROMPTS, "num_samples": SAMPLES, "temperature": 1.0}
        row |= {name: math.fsum(values) / PROMPTS for name, values in by_prompt.items()}
        rows.append(row | {"groups_mixed": draw.random(), "by_prompt": by_prompt})
    return rows


def done() -> dict:
    return {"status": "done", "seconds": 60.0}


# ---- aesl compare


METHOD_CELLS = 10  # of a method's two rows: three seeds of each, and two points of tuning's grid on one seed of each


def comparison(methods: int, folder: Path) -> Path:
    """Write a comparison whose every cell has ended, as `aesl compare` would leave it; return its compare.yaml.

    The number of rows rises with the methods; each row has been tuned. A comparison that is there already is taken as
    it is.
    """
    from aesl_trl.compare.cells import table_cells
    from aesl_trl.compare.config import read_config
    from aesl_trl.compare.tuning import choose, planned

    path = folder / "compare.yaml"
    if path.exists():
        return path
    (folder / "base").mkdir(parents=True)
    files.write_jsonl(folder / "rows.jsonl", [{"prompt": "2+3=", "completion": "5", "solution": "5"}] * 100)
    configs = {
        "sft": {"model_name_or_path": "base", "dataset_name": "rows.jsonl", "diversity_steps": 10},
        "grpo": {"model_name_or_path": "base", "dataset_name": "rows.jsonl", "reward_funcs": ["math_reward"]},
        "eval": {"dataset_name": "rows.jsonl", "reward_funcs": ["math_reward"], "samples": SAMPLES},
    }
    for name, values in configs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    values = {
        "output_dir": "runs",
        "seeds": [0, 1, 2],
        "reference": ["method-0/last"],
        "chain": {name: {"config": f"{name}.yaml"} for name in configs},
        "methods": {
            f"method-{number}": {"sft": {"warmup_steps": number}, "selections": ["turning_point", "last"]}
            for number in range(methods)
        },
        "tune": {"seeds": [1000], "grid": {"learning_rate": [1.0e-5, 3.0e-5]}},
    }
    path.write_text(yaml.safe_dump(values))
    config = read_config(path)
    for cell in planned(config):
        end(cell)
    for cell in table_cells(config, choose(config)[0]):
        end(cell)
    return path


def end(cell) -> None:
    """Write what a finished cell leaves: configs, the chain's record, a selection and an evaluation."""
    from aesl_trl.chain.fingerprints import walk
    from aesl_trl.compare.cells import CELL, chain_of

    draw = random.Random(cell.label)
    cell.write_configs()
    chain = chain_of(cell.home)
    for stage, inputs in walk(chain):
        facts = {"status": "done", "seconds": 60.0, "returncode": 0, "inputs": inputs.fingerprint}
        chain.note(stage.name, **facts, settings=inputs.settings)
    selection = {"rule": cell.selection, "applied": cell.selection, "step": 10 * draw.randrange(1, 9), "reason": ""}
    files.write_json(cell.home / files.SELECTION, selection)
    names = ("pass@1", "pass@8", "entropy", "self_bleu", "groups_mixed", "groups_all_right")
    models = {model: {name: draw.random() for name in names} for model in ("start", "final")}
    files.write_json(cell.home / files.EVALUATION, {"models": models, "num_prompts": 64})
    files.write_json(cell.home / CELL, {"command": ["made up"], "commit": ["0"], "hardware": ["none"]})


def compare_plan(path: Path) -> Work:
    """Return `aesl compare --dry_run`."""
    from aesl_trl.compare.compare import main

    return lambda: main(["--config", str(path), "--dry_run"])


def compare_resume(path: Path) -> Work:
    """Return a second start of a comparison whose every cell has ended: it finds that nothing is left to run."""
    from aesl_trl.compare.compare import Comparison, run
    from aesl_trl.compare.config import read_config

    return lambda: run(Comparison(read_config(path), path.absolute()))


def compare_table(path: Path) -> Work:
    """Return `aesl compare --table_only`."""
    from aesl_trl.compare.compare import main

    return lambda: main(["--config", str(path), "--table_only"])


def statistics(num_rows: int) -> Work:
    """Return the statistics of a table with so many rows, of three seeds each, against one reference."""
    from aesl_trl.compare.table import table

    draw, rows, cells = random.Random(0), [], []
    for number in range(num_rows):
        row = {"row": f"row-{number}", "name": f"row-{number}", "setting": "", "method": "m", "selection": "last"}
        rows.append(row)
        for seed in range(3):
            before, after = ({name: draw.random() for name in ("pass@1", "entropy")} for _ in range(2))
            facts = {"seed": seed, "step": number, "folder": f"row-{number}/seed-{seed}", "same_as": None, "point": ""}
            cells.append({**row, **facts, "before": before, "after": after})
    return lambda: table(cells, rows, reference=["row-0"], metric="pass@1")


# ---- A selection's replay


def selection(measurements: int, folder: Path) -> Work:
    """Return `aesl select` on an SFT folder with so many measurements and five candidates."""
    from aesl_trl.diversity.selection import select_run

    draw, own = random.Random(0), folder / files.OWN
    files.write_json(own / files.RUN, {"stage": "sft", "cold_start_loss": "aesl"})
    files.write_jsonl(own / files.DIVERSITY, series(measurements, draw))
    log = [{"step": 10 * number, "eval_nll": draw.random()} for number in range(measurements)]
    files.write_json(own / files.TRAINER_STATE, {"log_history": log})
    for number in range(1, 6):
        step = 10 * (number * (measurements - 1) // 5)
        files.write_json(own / files.CANDIDATES / f"step-{step}" / "config.json", {})
    return lambda: select_run(folder)


def asking(measurements: int) -> Work:
    """Return the search for a turning point after every measurement of a series, as a training that may stop does."""
    from aesl_trl.diversity.series import turning_point_of

    rows = series(measurements, random.Random(0))
    return lambda: [turning_point_of(rows[:count], "entropy") for count in range(1, measurements + 1)]
