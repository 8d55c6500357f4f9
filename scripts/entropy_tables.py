"""The measured tables of docs/entropy.md, from recipes/skills-tiny: a minute on one CPU core.

    python scripts/entropy_tables.py [--prompts 96] [--samples 8] [--draws 20]

The first table reads the committed runs: TRL's `entropy` (training batches) and `eval_entropy` (held-out
demonstrations) beside the entropy of the model's own samples. The others sample the committed base model anew.
"""

import argparse
import statistics
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aesl_trl.data.rows import load_rows
from aesl_trl.diversity import self_bleu
from aesl_trl.files import DIVERSITY, TRAINER_STATE, read_json, read_jsonl


RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "skills-tiny"
STEPS = (10, 20, 30, 40, 60, 80, 120, 200, 400)
MAX_NEW_TOKENS = 12


def print_training() -> None:
    runs = sorted((RECIPE / "results" / "first" / "nll_last").glob("seed-*/sft"))
    print(f"Plain nll on the demonstrations, mean of {len(runs)} seeds, nats per token:\n")
    print("| step | TRL `entropy` | TRL `eval_entropy` | own samples | pass@8 |\n| ---: | ---: | ---: | ---: | ---: |")
    logs = [read_json(run / TRAINER_STATE)["log_history"] for run in runs]
    teacher, held_out = (
        [{row["step"]: row[key] for row in log if key in row} for log in logs] for key in ("entropy", "eval_entropy")
    )
    rows = [{row["step"]: row for row in read_jsonl(run / DIVERSITY)} for run in runs]
    own, passed = ([{step: row[key] for step, row in run.items()} for run in rows] for key in ("entropy", "pass@8"))
    columns = (teacher, held_out, own, passed)
    for step in STEPS:
        values = (statistics.fmean(run[step] for run in column) for column in columns)
        print(f"| {step} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    for name, column in zip(("TRL entropy", "TRL eval_entropy", "own samples"), columns, strict=False):
        print(f"peak of {name}: steps {[max(run, key=run.get) for run in column]}")


def load():
    folder = RECIPE / "base"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def draw(model, tokenizer, prompts: list[str], samples: int, temperature: float, seed: int) -> dict:
    """Per token sampled: entropy at temperature 1 and at `temperature`, -log p at temperature 1; and the texts."""
    torch.manual_seed(seed)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    output = model.generate(
        **inputs,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        num_return_sequences=samples,
        max_new_tokens=MAX_NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids = output.sequences[:, inputs["input_ids"].size(1) :]
    logits = torch.stack(output.logits, 1).double()
    ended = (ids == tokenizer.eos_token_id).cumsum(1)
    kept = (ended == 0) | ((ended == 1) & (ids == tokenizer.eos_token_id))  # up to and with the first end token
    log_probs = logits.log_softmax(-1)
    return {
        "exact": entropy_of(logits)[kept],
        "tempered": entropy_of(logits / temperature)[kept],
        "sampled": -log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)[kept],
        "texts": tokenizer.batch_decode(ids, skip_special_tokens=True),
    }


def entropy_of(logits: torch.Tensor) -> torch.Tensor:
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def print_temperatures(model, tokenizer, prompts: list[str], samples: int, draws: int) -> None:
    print(f"\nBase model, {len(prompts)} prompts x {samples} samples, mean of {draws} draws (standard deviation):\n")
    print("| sampled at | exact, at 1 | mean of -log p, at 1 | exact, at the sampling temperature |")
    print("| ---: | ---: | ---: | ---: |")
    for temperature in (0.5, 0.7, 1.0, 1.3):
        drawn = [draw(model, tokenizer, prompts, samples, temperature, seed) for seed in range(draws)]
        values = ([one[key].mean().item() for one in drawn] for key in ("exact", "sampled", "tempered"))
        cells = (f"{statistics.fmean(column):.4f} ({statistics.stdev(column):.4f})" for column in map(list, values))
        print(f"| {temperature} | " + " | ".join(cells) + " |")


def print_self_bleu(model, tokenizer, prompts: list[str]) -> None:
    numbers, words = (2, 4, 8, 16, 32, 64), (2, 4, 6, 7)
    texts = draw(model, tokenizer, prompts, max(numbers), 1.0, seed=0)["texts"]
    groups = [texts[start : start + max(numbers)] for start in range(0, len(texts), max(numbers))]
    print(f"\nSelf-BLEU of the same {len(prompts)} x {max(numbers)} samples, by how many and how much is looked at:\n")
    print(f"| first words | {' | '.join(f'{number} samples' for number in numbers)} |")
    print(f"| ---: |{' ---: |' * len(numbers)}")
    for length in words:
        cut = [[" ".join(text.split()[:length]) for text in group] for group in groups]
        values = (statistics.fmean(self_bleu(group[:number]) for group in cut) for number in numbers)
        print(f"| {length} | " + " | ".join(f"{value:.3f}" for value in values) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=96, help="held-out prompts")
    parser.add_argument("--samples", type=int, default=8, help="samples of each, for the entropies")
    parser.add_argument("--draws", type=int, default=20, help="seeds of each temperature")
    args = parser.parse_args()
    print_training()
    model, tokenizer = load()
    rows = load_rows(f"{RECIPE / 'task.py'}:held_out", split="test", config=None, seed=0)
    prompts = [
        tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        for row in list(rows)[: args.prompts]
    ]
    print_temperatures(model, tokenizer, prompts, args.samples, args.draws)
    print_self_bleu(model, tokenizer, prompts)


if __name__ == "__main__":
    main()
