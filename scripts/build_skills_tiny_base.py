"""Build recipes/skills-tiny/base: a 0.37 M parameter model that does what it is told by name and prefers four skills.

    python scripts/build_skills_tiny_base.py [--output_dir DIR] [--seed 0]

Three and a half minutes on one CPU core. Two phases of plain cross-entropy on completions, from scratch. Every other
prompt names the skill in plain words, which teaches the model to read its instruction; the others begin with a symbol
and are answered with a random skill: all skills equally often at first, then briefly a mixture that makes four of them
rare. Nothing here teaches what a symbol means.
"""

import argparse
import importlib.util
import random
from pathlib import Path

import torch
from tokenizers import AddedToken, pre_tokenizers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer


RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "skills-tiny"
_spec = importlib.util.spec_from_file_location("skills_tiny_task", RECIPE / "task.py")
task = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(task)

SPECIAL = PAD, USER, ASSISTANT, END = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' -}}{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- '<|user|>' + message['content'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
LEARNING_RATE = 2e-3
EQUAL = dict.fromkeys(task.SKILLS, 1 / 8)
# At 0.005 a group of 8 samples of a rare symbol holds a right one in 1 of 25 cases: RL alone finds some, not all.
SKEWED = dict.fromkeys(task.COMMON, 0.245) | dict.fromkeys(task.RARE, 0.005)


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level Qwen2 tokenizer whose merges spell the task's words: one token a symbol, skill and digit.

    AutoTokenizer loads a Qwen2 folder with the Qwen2 splitting rule whatever its tokenizer.json says, so the words are
    chosen to suit it. Words after a space come first, then "complement" before "left": a merge of one word never
    breaks up another.
    """
    words = [f"\u0120{digit}" for digit in task.DIGITS] + sorted(task.SKILLS)  # U+0120 is the byte-level space
    merges = list(dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word))))
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        unk_token=PAD,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=64,
        padding_side="left",
    )
    tokenizer.add_tokens([AddedToken(token, special=True) for token in (USER, ASSISTANT)])
    return tokenizer


def build_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    return model


def batches(tokenizer: Qwen2Tokenizer, mixture: dict[str, float], *, rows: int, seed: int):
    """Endless `(ids [rows, 17], labels [rows, 17])`; prompts are -100.

    Rows alternate: a random symbol with a skill by `mixture`, and a skill (all equally often) called by its name.
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


def train(
    model, tokenizer, mixture: dict[str, float], *, steps: int, warmup: int, decay: int, seed: int, rows: int = 192
) -> float:
    """AdamW at 2e-3, `warmup` linear steps before and `decay` after; returns the last step's loss in nats per token.

    The rate stays high nearly to the end: a base annealed to a sharp minimum loses its skills to the first steps of
    SFT or RL.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    model.train()
    for step, (ids, labels) in zip(range(steps), batches(tokenizer, mixture, rows=rows, seed=seed), strict=False):
        rate = LEARNING_RATE * min((step + 1) / (warmup + 1), (steps - step) / (decay + 1), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}", flush=True)
    return loss.item()


def build(output_dir: str | Path, *, seed: int = 0, equal_steps: int = 850, skewed_steps: int = 150) -> None:
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    print(f"{model.num_parameters():,} parameters")
    train(model, tokenizer, EQUAL, steps=equal_steps, warmup=50, decay=0, seed=seed)
    train(model, tokenizer, SKEWED, steps=skewed_steps, warmup=0, decay=40, seed=seed + 1)
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
