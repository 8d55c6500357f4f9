"""Build recipes/skills-tiny/base: a 0.37 M parameter model that does what it is told by name and prefers four skills.

    python scripts/build_skills_tiny_base.py [--output_dir DIR] [--seed 0]

It takes three and a half minutes on one CPU core, and trains on completions from scratch, by plain cross-entropy.
Every other prompt names the skill in plain words, which teaches the model to read its instruction. The other prompts
begin with a symbol, and their answers use a random skill: in the first phase all skills equally often, in a short
second phase four of them rarely. Nothing here teaches the meaning of a symbol.
"""

import argparse
import random
from pathlib import Path

import torch
from recipe_task import RECIPES, recipe_task
from tiny_bases import ASSISTANT, END, SPACE, USER, train, untrained_model, word_tokenizer
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer


RECIPE = RECIPES / "skills-tiny"
task = recipe_task(RECIPE.name)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' -}}{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- '<|user|>' + message['content'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
# Words after a space come first, then "complement" before "left": a merge of one word never breaks up another.
WORDS = [*(SPACE + digit for digit in task.DIGITS), *sorted(task.SKILLS)]
SIZES = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
MAX_LENGTH = 64
ROWS = 192
EQUAL = dict.fromkeys(task.SKILLS, 1 / 8)
# At 0.005 a group of 8 samples of a rare symbol holds a right sample in 1 of 25 cases: RL alone finds some skills.
SKEWED = dict.fromkeys(task.COMMON, 0.245) | dict.fromkeys(task.RARE, 0.005)


def build_tokenizer() -> Qwen2Tokenizer:
    return word_tokenizer(WORDS, CHAT_TEMPLATE, MAX_LENGTH)


def build_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    return untrained_model(tokenizer, seed, **SIZES)


def batches(tokenizer: Qwen2Tokenizer, mixture: dict[str, float], *, rows: int, seed: int):
    """Yield `(ids [rows, 17], labels [rows, 17])` without end; the labels of prompts are -100.

    Rows alternate between a random symbol with a skill drawn by `mixture`, and a skill called by its name, where all
    skills occur equally often.
    """
    rng, lists = random.Random(seed), task.digit_lists("base", seed)
    skills, shares = list(mixture), list(mixture.values())
    prompt_length = task.LENGTH + 3  # user, symbol, digits, assistant
    while True:
        texts = []
        for row, skill in enumerate(rng.choices(skills, shares, k=rows)):
            if row % 2:
                instruction = skill = rng.choice(list(task.SKILLS))
            else:
                instruction = rng.choice(task.SYMBOLS)
            digits = next(lists)
            prompt, completion = task.prompt_of(instruction, digits), task.completion_of(skill, digits)
            texts.append(f"{USER}{prompt}{ASSISTANT}{completion}{END}")
        ids = torch.tensor(tokenizer(texts)["input_ids"])
        labels = ids.clone()
        labels[:, :prompt_length] = -100
        yield ids, labels


def build(output_dir: str | Path, *, seed: int = 0, equal_steps: int = 850, skewed_steps: int = 150) -> None:
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    print(f"{model.num_parameters():,} parameters")
    train(model, batches(tokenizer, EQUAL, rows=ROWS, seed=seed), steps=equal_steps, warmup=50, decay=0)
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
