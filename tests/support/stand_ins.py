"""A recipe on a stand-in: its model's architecture shrunk, its data's schema with a few rows, its own configs.

`copy_recipe` copies a recipe's folder and overrides, in each config, the keys of OVERRIDDEN that it has: where the
model is, what needs a GPU or the hub, and sizes. Everything else, file names and relative paths too, is the recipe's.
"""

import json
import random
import shutil
from pathlib import Path

import torch
import yaml
from small_problems import gsm8k_row, openr1_row

from aesl_trl.estimates.facts import MODEL_CONFIG, kind_of, read_facts
from aesl_trl.recipes.recipes import find_configs


RECIPES = Path(__file__).parents[2] / "recipes"
MODELS = ["Qwen2.5-1.5B-Instruct", "Qwen2.5-7B-Instruct", "Qwen2.5-Math-7B", "Llama-3.1-8B-Instruct"]
SHRUNK = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

ON_CPU = {"use_cpu": True, "bf16": False, "dtype": "float32"}
TRAINED = {**ON_CPU, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 4}
# What a stand-in changes in a config, if the config has the key or ALWAYS says that it needs it.
OVERRIDDEN = {
    "data": {
        "dataset_name": "rows.jsonl",
        "num_demonstrations": 24,
        "subsets": [8],
        "num_held_out": 8,
        "decontaminate": [],  # the benchmarks are on the hub
        "pass_rate_samples": 2,
        "max_new_tokens": 12,
        "use_cpu": True,
    },
    "sft": {
        **TRAINED,
        "diversity_steps": 1,
        "diversity_num_prompts": 2,
        "diversity_max_new_tokens": 12,
        "diversity_batch_size": 8,
        "warmup_steps": 1,
        "save_steps": 2,
    },
    "grpo": {**TRAINED, "use_vllm": False, "max_completion_length": 12, "warmup_steps": 1, "save_steps": 2},
    "probe": {**ON_CPU, "max_completion_length": 12},
    "eval": {
        "use_cpu": True,
        "data_dir": "benchmarks",
        "backend": "transformers",
        "num_prompts": 2,
        "num_samples": 2,
        "max_new_tokens": 12,
        "batch_size": 4,
    },
    "chain": {},
    "compare": {},
}
ALWAYS = {"use_cpu", "bf16", "data_dir", "num_prompts", "max_steps", "per_device_train_batch_size", "dtype"}
ALSO = "model_name_or_path"  # of every config that names a model: the stand-in's folder
DROPPED = {
    "data": {"dataset_config", "difficulty_size"},
    "sft": set(),
    "grpo": {"generation_kwargs"},
    "probe": {"generation_kwargs"},
}
ANSWERS = 5  # the stand-in's problems have the answers 0 to 4
MAX_TAUGHT = 120  # characters of a prompt that it is taught with: its end is what it answers to
CHAT_TEMPLATES = {"qwen2": "qwen2_5.jinja", "llama": "llama3_1.jinja"}


def build_stand_in(recipe: Path, folder: Path) -> Path:
    """Build a shrunk model of the recipe's architecture; its byte-level tokenizer has the model's own special tokens.

    It is taught for seconds to answer with a digit in a box and to stop: rewards differ, and training moves weights.
    """
    import trl
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    facts = read_facts(recipe / MODEL_CONFIG)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {
        "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "llama": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"],
    }[facts.config["model_type"]]
    pad = {"pad_token": "<|endoftext|>"} if "<|endoftext|>" in special else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=facts.eos_token, additional_special_tokens=special, **pad
    )
    template = Path(trl.__file__).parent / "chat_templates" / CHAT_TEMPLATES[facts.config["model_type"]]
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    shrunk = {**facts.config, **SHRUNK, **ids, "vocab_size": len(tokenizer), "dtype": "float32"}
    if "head_dim" in shrunk:
        shrunk["head_dim"] = 16
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shrunk)).float()
    _teach_to_answer(model, tokenizer, tokenizer.convert_tokens_to_ids(facts.turn_end_token))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _teach_to_answer(model, tokenizer, end: int, steps: int = 100) -> None:
    """Train it to answer anything with a digit in a box and to stop: one answer in five is right, groups are mixed."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator = random.Random(0)
    for _ in range(steps):
        rows = []
        for _ in range(16):
            text = "".join(generator.choices("abc 123", k=generator.randrange(1, 60)))
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            answer = f"\\boxed{{{generator.randrange(ANSWERS)}}}"
            prompt_ids = tokenizer(prompt[-MAX_TAUGHT:], add_special_tokens=False)["input_ids"]
            rows.append((prompt_ids, [*tokenizer(answer, add_special_tokens=False)["input_ids"], end]))
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.tensor([[end] * (longest - len(p) - len(a)) + p + a for p, a in rows])
        labels = torch.full_like(ids, -100)
        for row, (_, answer) in enumerate(rows):
            labels[row, -len(answer) :] = torch.tensor(answer)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def copy_recipe(name: str, root: Path) -> Path:
    """Copy a recipe to `root`/recipes/`name`, with a stand-in, rows and a benchmark; its runs go to `root`/runs."""
    target = root / "recipes" / name
    shutil.copytree(RECIPES / name, target)
    shutil.copytree(RECIPES / "accelerate_configs", root / "recipes" / "accelerate_configs")
    for path in (root / "recipes" / "accelerate_configs").iterdir():
        shutil.copy(RECIPES / "accelerate_configs" / "cpu.yaml", path)  # one process on the CPU, whatever is named
    model = build_stand_in(RECIPES / name, root / "model")
    for path in find_configs([target]):
        values = overridden(path, yaml.safe_load(path.read_text()), str(model))
        path.write_text(path.read_text().splitlines()[0] + "\n" + yaml.safe_dump(values))
    _write_rows(target)
    return target


def overridden(path: Path, values: dict, model: str) -> dict:
    """Return the values of a config with the overrides of its kind."""
    kind = kind_of(path)
    changes = {key: value for key, value in OVERRIDDEN[kind].items() if key in values or _needs(kind, key, values)}
    if ALSO in values:
        changes[ALSO] = model
    return {key: value for key, value in {**values, **changes}.items() if key not in DROPPED.get(kind, ())}


def _needs(kind: str, key: str, values: dict) -> bool:
    return key in ALWAYS and not (key == "data_dir" and "benchmarks" not in values) and key in OVERRIDDEN[kind]


def _problems(gsm8k: bool) -> list[dict]:
    """Return sixty rows in the schema of GSM8K or OpenR1-Math-46k, with answers that the stand-in can hit."""
    rows = []
    for number in range(60):
        answer = number % ANSWERS
        if gsm8k:
            rows.append({**gsm8k_row(number), "answer": f"It is {answer}.\n#### {answer}"})
            continue
        trace = f"<think>\nIt is {answer}.\n</think>\n\nThe answer is $\\boxed{{{answer}}}$."
        target = [{"content": trace, "role": "assistant"}]
        rows.append(openr1_row(number, target=target, reward_model={"ground_truth": str(answer), "style": "rule"}))
    return rows


def _write_rows(recipe: Path) -> None:
    """Write rows for the recipe's data configs, and benchmarks of further problems in their own columns."""
    for path in recipe.glob("data*.yaml"):
        name = "rows_gsm8k.jsonl" if "gsm8k" in path.name else "rows.jsonl"
        _write_lines(recipe / name, _problems("gsm8k" in path.name))
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "dataset_name": name}))
    columns = {"GSM8K": ("question", "answer"), "OlympiadBench": ("question", "final_answer")}
    for name in ("GSM8K", "MATH-500", "AMC23", "AIME24", "AIME25", "Minerva", "OlympiadBench"):
        problem, answer = columns.get(name, ("question" if name in ("AMC23", "Minerva") else "problem", "answer"))
        lines = []
        for number in range(4):
            gold = {"GSM8K": f"#### {number}", "OlympiadBench": [str(number)]}.get(name, str(number))
            lines.append({problem: f"What is {number} + 0?", answer: gold})
        _write_lines(recipe / "benchmarks" / f"{name}.jsonl", lines)


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
