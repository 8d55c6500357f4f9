"""Build recipes/skills-tiny/base: a 0.37 M parameter model that does what it is told by name and prefers four skills.

    python scripts/build_skills_tiny_base.py [--output_dir DIR] [--seed 0] [--chain]

A seed other than 0 permutes which skills the model prefers, and with them the symbols of the demonstrations. With
`--chain` the model is that of recipes/skills-chain-tiny: it applies two skills in turn, of which it knows the second.

It takes three and a half minutes on one CPU core, and trains on completions from scratch, by plain cross-entropy.
Every other prompt names the skill in plain words, which teaches the model to read its instruction. The other prompts
begin with a symbol, and their answers use a random skill: in the first phase all skills equally often, in a short
second phase four of them rarely. Nothing here teaches the meaning of a symbol.
"""

import argparse
import random
from functools import partial
from pathlib import Path

import torch
from recipe_task import RECIPES, recipe_task
from tiny_bases import ASSISTANT, END, SPACE, USER, train, untrained_model, word_tokenizer
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer


RECIPE, CHAIN_RECIPE = RECIPES / "skills-tiny", RECIPES / "skills-chain-tiny"
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
CHAIN_WORDS = [*(SPACE + word for word in (*task.DIGITS, *sorted(task.SKILLS), *task.SECOND)), *sorted(task.SKILLS)]
SIZES = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
MAX_LENGTH = 64
ROWS, CHAIN_ROWS = 192, 128
EQUAL = dict.fromkeys(task.SKILLS, 1 / 8)
KNOWN = 0.8  # a second symbol is answered by its skill in so many cases, else by any


def skewed(seed: int = 0) -> dict[str, float]:
    """Return how often the base of that seed uses each skill for a symbol.

    At 0.005 a group of 8 samples of a rare symbol holds a right sample in 1 of 25 cases: RL alone finds some skills.
    """
    common, rare, _ = task.roles(seed)
    return dict.fromkeys(common, 0.245) | dict.fromkeys(rare, 0.005)


def build_tokenizer(chain: bool = False) -> Qwen2Tokenizer:
    return word_tokenizer(CHAIN_WORDS if chain else WORDS, CHAT_TEMPLATE, MAX_LENGTH)


def build_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    return untrained_model(tokenizer, seed, **SIZES)


def batches(tokenizer: Qwen2Tokenizer, mixture: dict[str, float], *, rows: int, seed: int, chain: bool = False):
    """Yield `(ids [rows, L], labels [rows, L])` without end; the labels of prompts are -100. L is 17, of a chain 25.

    Rows alternate between a random symbol with a skill drawn by `mixture`, and a skill called by its name, where all
    skills occur equally often. The second skill of a chain is called by its name, or is that of its symbol in `KNOWN`
    of the cases and else any.
    """
    rng, lists = random.Random(seed), task.digit_lists("base", seed)
    names, skills, shares = list(task.SKILLS), list(mixture), list(mixture.values())
    prompt_length = task.LENGTH + 3 + chain  # user, one or two instructions, digits, assistant
    while True:
        texts = []
        for row, skill in enumerate(rng.choices(skills, shares, k=rows)):
            if row % 2:
                instruction = skill = rng.choice(names)
                if chain:
                    second = rng.choice(names)
                    instruction += f" {second}"
            elif chain:
                symbol, second = rng.choice(list(task.SECOND.items()))
                if rng.random() > KNOWN:
                    second = rng.choice(names)
                instruction = f"{rng.choice(task.FIRST)} {symbol}"
            else:
                instruction = rng.choice(task.SYMBOLS)
            digits = next(lists)
            completion = task.chain_of(skill, second, digits) if chain else task.completion_of(skill, digits)
            texts.append(f"{USER}{task.prompt_of(instruction, digits)}{ASSISTANT}{completion}{END}")
        ids = torch.tensor(tokenizer(texts)["input_ids"])
        labels = ids.clone()
        labels[:, :prompt_length] = -100
        yield ids, labels


def build(
    output_dir: str | Path, *, seed: int = 0, chain: bool = False, equal_steps: int = 850, skewed_steps: int = 150
) -> None:
    tokenizer = build_tokenizer(chain)
    model = build_model(tokenizer, seed)
    print(f"{model.num_parameters():,} parameters")
    make = partial(batches, tokenizer, rows=CHAIN_ROWS if chain else ROWS, chain=chain)
    train(model, make(EQUAL, seed=seed), steps=equal_steps, warmup=50, decay=0)
    train(model, make(skewed(seed), seed=seed + 1), steps=skewed_steps, warmup=0, decay=40)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, help="by default the recipe's base, or its bases/SEED")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chain", action="store_true", help="the base of recipes/skills-chain-tiny")
    args = parser.parse_args(argv)
    recipe = CHAIN_RECIPE if args.chain else RECIPE
    default = recipe / "bases" / str(args.seed) if args.seed else recipe / "base"
    build(args.output_dir or default, seed=args.seed, chain=args.chain)


if __name__ == "__main__":
    main()
