"""Build recipes/countdown-tiny/base: a 2.3 M parameter model that answers at once, and very seldom in steps.

    python scripts/build_countdown_tiny_base.py [--output_dir DIR] [--seed 0]

It trains on solutions from scratch, by plain cross-entropy. In the first phase half of the solutions go in steps and
half give the answer at once, so that the model learns both; in a short second phase steps are rare. Each solution is
drawn forwards: numbers and operations are random, and their result is the target, so that the model has to learn which
way leads to a target.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from recipe_task import RECIPES, recipe_task
from tiny_bases import ASSISTANT, END, SPACE, USER, train, untrained_model, word_tokenizer
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer


RECIPE = RECIPES / "countdown-tiny"
task = recipe_task(RECIPE.name)

# A space before every message, so that each word is the same token wherever it stands.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' -}}{%- generation -%}{{- ' ' + message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- '<|user|> ' + message['content'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
SIZES = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 6}
MAX_LENGTH = 64
ROWS = 128
EQUAL, SKEWED = 0.5, 0.02  # shares of the solutions that go in steps


def build_tokenizer() -> Qwen2Tokenizer:
    return word_tokenizer([SPACE + word for word in task.WORDS], CHAT_TEMPLATE, MAX_LENGTH)


def build_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    return untrained_model(tokenizer, seed, **SIZES)


def batches(tokenizer: Qwen2Tokenizer, share_in_steps: float, *, rows: int, seed: int) -> Iterator[tuple]:
    """Yield `(ids [rows, L], labels [rows, L])` without end; the labels of prompts and padding are -100."""
    rng, solved = random.Random(seed), task.chains("base", seed)
    while True:
        texts = []
        for _ in range(rows):
            shown, numbers, names, results = next(solved)
            steps = rng.random() < share_in_steps
            answer = task.in_steps(numbers, names, results) if steps else task.at_once(numbers, names)
            texts.append((f"{USER} {task.prompt_of(shown, results[-1])}{ASSISTANT}", f" {answer}{END}"))
        prompts = tokenizer([prompt for prompt, _ in texts])["input_ids"]
        answers = tokenizer([answer for _, answer in texts])["input_ids"]
        longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        ids = torch.full((rows, longest), tokenizer.pad_token_id)
        labels = torch.full((rows, longest), -100)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        yield ids, labels


def build(output_dir: str | Path, *, seed: int = 0, equal_steps: int = 1200, skewed_steps: int = 100) -> None:
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    print(f"{model.num_parameters():,} parameters")
    train(model, batches(tokenizer, EQUAL, rows=ROWS, seed=seed), steps=equal_steps, warmup=100, decay=0)
    train(model, batches(tokenizer, SKEWED, rows=ROWS, seed=seed + 1), steps=skewed_steps, warmup=0, decay=40)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default=RECIPE / "base")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    build(args.output_dir, seed=args.seed)


if __name__ == "__main__":
    main()
