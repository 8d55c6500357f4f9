"""What goes wrong most often in configs, data, models, rewards and run folders: one line, the exit code, nothing lost.

Each case is a command as `aesl` runs it, in a folder that holds the output of an earlier run. Its line must say what
is wrong, where, and what to do, and the earlier output must be what it was. Where the case can be known before, no
weights may be read.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from adapters import make_adapter
from bad_input import (
    CONFIG,
    WEIGHTS,
    Project,
    evaluate,
    grpo,
    lines,
    only_line,
    prompts,
    sft,
    train,
    user,
)
from tiny_models import CHAT_TEMPLATE
from transformers import PreTrainedModel

from aesl_trl import cli
from aesl_trl.chain import chain
from aesl_trl.files import TRAINING_LOCK
from aesl_trl.training.checkpoints import INCOMPLETE


MEASURED = {
    "diversity_dataset_name": "held_out.jsonl",
    "diversity_steps": 1,
    "diversity_samples": 2,
    "diversity_max_new_tokens": 4,
}


def chat(text):
    return [*user(text), {"role": "assistant", "content": "yes"}]


PROBE = {"dataset_name": "train.jsonl", "reward_funcs": ["accuracy_reward"], "use_cpu": True}
SYSTEM = {"role": "system", "content": "Be brief."}


def no_system(project):
    """Make a model whose template refuses a system message, as Gemma's does."""
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    return project.tokenizer(chat_template=refusal + CHAT_TEMPLATE)


# ---- Commands: functions that make a command's arguments in a project. `write` replaces files first, ... drops a key


def handoff(model, *flags):
    return lambda project: ["handoff", model(project), "--output", str(project.out / "handoff"), *flags]


def on_run(command, *flags, run="out", write=None, edit=None):
    """Build a command on a run folder; `edit` changes the text of one file of `out`."""

    def arguments(project):
        for name, content in (write or {}).items():
            project.write(name, content)
        for name, change in (edit or {}).items():
            project.write(f"out/{name}", change((project.out / name).read_text()))
        return [command, str(project.folder / run), *(flag.format(folder=project.folder) for flag in flags)]

    return arguments


def run_chain(*flags, sft_changes=None, grpo_changes=None, write=None, **changes):
    def arguments(project):
        sft(**{**MEASURED, **(sft_changes or {})})(project)
        grpo(**(grpo_changes or {}))(project)
        for name, content in (write or {}).items():
            project.write(name, content)
        values = {"output_dir": "out", "sft": {"config": "sft.yaml"}, "grpo": {"config": "grpo.yaml"}, **changes}
        return ["chain", "--config", project.config("chain.yaml", values), *flags]

    return arguments


# ---- The table: what is wrong -> (the command, what its line must say ...)

CONFIGS = {
    "unknown key": (sft(t_scalling=3.0), "sft.yaml: unknown key 't_scalling'", "did you mean 't_scaling'"),
    "a key twice": (sft(text="max_steps: 3\n"), "sft.yaml, line 12", "duplicate key 'max_steps', first on line 9"),
    "tab": (sft(text="env:\n\tHF_HOME: x\n"), "sft.yaml, line 13", "'\\t'", "indent with spaces"),
    "null": (
        sft(learning_rate=None),
        "sft.yaml: learning_rate must be float, got null",
        "leave the line out",
        "2e-05",
    ),
    "float for int": (sft(max_steps=2.5), "sft.yaml: max_steps must be int, got the float 2.5"),
    "quoted number": (grpo(num_generations="4"), "grpo.yaml: num_generations must be int or null, got the str '4'"),
    "bare no": (sft(eval_strategy=False), "eval_strategy must be one of no, steps, epoch", "write 'no' in quotes"),
    "misspelt choice": (sft(cold_start_loss="asel"), "cold_start_loss must be one of aesl, nll", "mean 'aesl'"),
    "misspelt flag": (sft("--max_step", "3"), "unknown flag --max_step", "did you mean '--max_steps'"),
    "misspelt config": (lambda p: [w.replace("sft.", "stf.") for w in sft()(p)], "stf.yaml does not", "'sft.yaml'"),
    "negative rate": (sft(learning_rate=-1e-4), "learning_rate is -0.0001, but must be at least 0"),
    "no steps": (sft(max_steps=0), "max_steps is 0, but must be at least 1; -1 trains for num_train_epochs"),
    "no epochs": (sft(max_steps=..., num_train_epochs=0), "num_train_epochs is 0.0, but must be above 0"),
    "max_length -1": (sft(max_length=-1), "max_length is -1, but must be at least 1"),
    "save_steps 0": (sft(save_steps=0), "save_steps is 0.0, but must be above 0", "save_strategy: 'no' turns it off"),
    "empty batches": (grpo(per_device_train_batch_size=0), "per_device_train_batch_size is 0", "at least 1"),
    "one generation": (grpo(num_generations=1), "num_generations is 1, but must be at least 2"),
    "split groups": (grpo(num_generations=3), "generation_batch_size (4) must be divisible by num_generations (3)"),
    "nothing held out": (
        sft(diversity_steps=1),
        "no held-out prompts: set diversity_dataset_name or eval_dataset_name",
    ),
    "selects from nothing": (sft(selection="last"), "selection needs measurements: set diversity_steps to 1 or more"),
    "stream without an end": (sft(dataset_streaming=True, max_steps=...), "max_steps has to be specified"),
    "no such keyword": (sft(lr_scheduler_kwargs={"min_lr_rate": 0.1}), "transformers refuses this", "'min_lr_rate'"),
    "output is a file": (sft(output_dir="train.jsonl"), "output_dir", "train.jsonl is a file; name another folder"),
    "output below a file": (grpo(output_dir="rewards.py/out"), "output_dir", "cannot be made", "rewards.py is a file"),
    "output is the model": (sft(model=lambda p: str(p.out)), "out is model_name_or_path too", "name another folder"),
}
GOOD = {"prompt": "1 + 1 =", "completion": " 2"}
BROKEN = lines([GOOD, GOOD]) + '{"prompt": "3 + 3 =", \n' + lines([GOOD])
PAIRS = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
RAISES = {"make.py": "def rows(seed):\n    return {}['rows']\n"}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4096\n"
DATA = {
    "misspelt file": (sft(dataset_name="trian.jsonl"), "dataset_name: trian.jsonl", "did you mean 'train.jsonl'"),
    "misspelt split": (sft(dataset_train_split="trian"), "has no split 'trian'", "did you mean 'train'"),
    "no test split": (sft(eval_strategy="epoch"), "train.jsonl has no split 'test'", "a file of their own"),
    "empty file": (train(""), "dataset_name", "train.jsonl is empty"),
    "broken in the middle": (train(BROKEN), "dataset_name", "train.jsonl, line 3 is not valid JSON"),
    "torn array": (train(json.dumps([GOOD, GOOD], indent=1)[:-30]), "train.jsonl, line 7 is not valid JSON"),
    "not UTF-8": (train(lines([GOOD]).encode() + b'{"prompt": "caf\xe9"}\n'), "line 2 is not UTF-8", "at byte 15"),
    "git-lfs pointer": (train(LFS), "train.jsonl is a pointer of git-lfs", "run git lfs pull"),
    "misspelt column": (train([{"prompt": "a", "completions": "b"}]), "needs", "did you mean 'completion'"),
    "other columns": (train([{"question": "a", "answer": "b"}]), "prompt and completion", "are question, answer"),
    "completion null": (train([GOOD, {**GOOD, "completion": None}]), "row 1 (from 0): completion is missing"),
    "completion blank": (train([GOOD, {**GOOD, "completion": " "}]), "row 1 (from 0): completion is blank"),
    "prompt a number": (train([{**GOOD, "prompt": 3}]), "row 0 (from 0): prompt is an int; it must be text"),
    "one row of another schema": (train([*[GOOD] * 9, {"question": "a"}]), "row 9 (from 0): prompt is missing"),
    "text and messages": (
        train([GOOD, {**GOOD, "prompt": user("a")}]),
        "row 1",
        "completion text: both must be alike",
    ),
    "ends with the user": (train([{"messages": chat("a") + user("b")}]), "row 0", "ends with a message of the user"),
    "no assistant": (train([{"messages": user("b")}]), "row 0", "no assistant message", "its roles are user"),
    "no content": (train([{"messages": [{"role": "user", "content": None}]}]), "message 0 of messages (user) has no"),
    "from and value": (train([{"messages": PAIRS}]), "a message without a role", "in a column 'conversations'"),
    "a row of 10 MB": (train([GOOD, {**GOOD, "completion": "x" * 10**7}]), "row 1", "10000007 characters", "cut it"),
    "every row too long": (
        train([{"prompt": "x" * 99, "completion": "y"}], max_length=64),
        "max_length=64",
        "raise it",
    ),
    "function raises": (
        sft(write=RAISES, dataset_name="make.py:rows"),
        "make.py:rows raised KeyError at",
        "make.py:2",
    ),
    "trained and held out": (
        sft(**{**MEASURED, "diversity_dataset_name": "train.jsonl"}),
        "8 of 8 prompts of diversity_dataset_name are in dataset_name too, the first is row 0 (from 0), '0 + 1 ='",
    ),
    "no RL prompts": (prompts(""), "dataset_name", "prompts.jsonl is empty"),
    "RL prompt empty": (prompts([{"prompt": user("a")}, {"prompt": []}]), "row 1 (from 0): prompt is empty"),
    "RL text and messages": (prompts([{"prompt": user("a")}, {"prompt": "a"}]), "row 1", "prompt is text", "be alike"),
    "RL prompt of 10 MB": (prompts([{"prompt": "x" * 10**7}]), "row 0", "10000000 characters", "cut it or drop it"),
    "RL column misspelt": (prompts([{"promt": "a"}]), "columns are promt", "did you mean 'prompt'"),
}
MODELS = {
    "misspelt model": (evaluate(lambda p: p.model() + "s"), "models is not a folder", "did you mean 'model'"),
    "not on the hub": (
        evaluate(lambda p: "org/no-such-model"),
        "model: there is no folder org/no-such-model here, and the hub's cache does not hold it",
    ),
    "no config.json": (evaluate(lambda p: p.model({CONFIG: None})), "holds no config.json", "a model's folder"),
    "a folder of checkpoints": (
        evaluate(lambda p: str(p.out)),
        "holds no config.json",
        "out/selected does: name that",
    ),
    "unknown architecture": (evaluate(lambda p: p.model({CONFIG: "{}"})), "cannot be loaded", "model_type"),
    "no weights": (evaluate(lambda p: p.model({WEIGHTS: None})), "holds no weights", "*.safetensors as well"),
    "weights a pointer": (handoff(lambda p: p.model({WEIGHTS: LFS})), "is a pointer of git-lfs", "git lfs pull"),
    "weights cut off": (handoff(Project.torn_model), "model.safetensors is cut off", "download or copy it again"),
    "no tokenizer": (
        evaluate(lambda p: p.model({"tokenizer.json": None, "tokenizer_config.json": None})),
        "no tokenizer in",
        "copy tokenizer*.json as well",
    ),
    "no chat template": (evaluate(lambda p: p.tokenizer(chat_template=None)), "no chat template", "an instruct model"),
    "no eos": (evaluate(lambda p: p.tokenizer(eos_token=None)), "no eos_token", "aesl handoff", "sets it"),
    "more tokens than embeddings": (
        evaluate(lambda p: p.tokenizer(eos_token="<|end|>")),
        "<|end|> has id 259, the model 259 embeddings",
        "resize_token_embeddings",
    ),
    "base is gone": (evaluate(lambda p: p.adapter("/gone")), "base of", "/gone, which is not there", "adapter_config"),
    "base is not named": (handoff(lambda p: p.adapter(None)), "does not name its base: give it with --base"),
    "base has moved": (handoff(lambda p: p.adapter("/gone")), "/gone, which is not a folder", "give it with --base"),
    "another base": (evaluate(lambda p: p.adapter(p.wide_model())), "does not fit the base", "size mismatch for"),
    "SFT from an adapter": (sft(model=lambda p: p.trained_adapter), "is an adapter: name its base", "aesl handoff"),
    "SFT without config.json": (sft(model=lambda p: p.model({CONFIG: None})), "model_name_or_path", "config.json"),
    "SFT, cut-off weights": (sft(model=Project.torn_model), "model.safetensors is cut off", "copy it again"),
    "SFT, no template": (
        train([{"messages": chat("a")}], model=lambda p: p.tokenizer(chat_template=None)),
        "model_name_or_path",
        "no chat template",
        "set chat_template_path",
    ),
    "SFT, no eos": (sft(model=lambda p: p.tokenizer(eos_token=None)), "set eos_token to '<|im_end|>'"),
    "SFT, other eos": (sft(eos_token="<im_end>"), "has no token '<im_end>' (eos_token)", "did you mean '<|im_end|>'"),
    "SFT, more tokens": (sft(model=lambda p: p.tokenizer(eos_token="<|end|>")), "model_name_or_path", "has id 259"),
    "SFT, LoRA nowhere": (
        sft(use_peft=True, lora_target_modules=["qproj"]),
        "lora_target_modules: 'qproj'",
        "'q_proj'",
    ),
    "GRPO, LoRA nowhere": (grpo(use_peft=True, lora_target_modules=["qproj"]), "target_modules: 'qproj'", "'q_proj'?"),
    "SFT, no such attention": (sft(attn_implementation="flash"), '"flash"` is not supported', "only possible"),
    "row 15, no system": (
        train([{"messages": chat("a")}] * 15 + [{"messages": [SYSTEM, *chat("a")]}], model=no_system),
        "dataset_name, row 15 (from 0): the chat template refuses it: no system role",
    ),
    "a system in a held-out prompt": (
        sft(
            write={
                "train.jsonl": [{"messages": chat("a")}] * 8,
                "others.jsonl": [{"prompt": user(f"held {n}")} for n in range(9)] + [{"prompt": [SYSTEM, *user("x")]}],
            },
            model=no_system,
            **{**MEASURED, "diversity_dataset_name": "others.jsonl"},
        ),
        "row 9 (from 0): the chat template refuses it: no system role",
    ),
    "reasoning beside the words": (
        train([{"messages": [*user("a"), {"role": "assistant", "content": "b", "reasoning_content": "thus"}]}]),
        "dataset_name, row 0 (from 0): the chat template leaves out reasoning_content of message 1",
        '"thus"',
        "chat_template_path",
    ),
    "a prompt that is begun": (
        train([{"prompt": chat("a"), "completion": chat("b")[1:]}]),
        "row 0 (from 0): the prompt ends with the assistant's words",
        "begin the completion with them",
    ),
    "ShareGPT, the human last": (
        train([{"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}]),
        "row 0 (from 0): messages ends with a message of the user",
    ),
    "GRPO, row 15, no system": (
        prompts([{"prompt": user("a")}] * 15 + [{"prompt": [SYSTEM, *user("a")]}], model=no_system),
        "dataset_name, row 15 (from 0): the chat template refuses it: no system role",
    ),
    "GRPO, a prompt that is begun": (
        prompts([{"prompt": user("a")}, {"prompt": chat("a")}]),
        "row 1 (from 0): the prompt ends with the assistant's words",
        "as text that ends with them",
    ),
    "eval, row 15, no system": (
        evaluate(
            no_system, write={"prompts.jsonl": [{"prompt": user("a")}] * 15 + [{"prompt": [SYSTEM, *user("a")]}]}
        ),
        "dataset_name, row 15 (from 0): the chat template refuses it: no system role",
    ),
    "GRPO from an adapter": (grpo(model=lambda p: p.trained_adapter), "is an adapter", "as adapter_name_or_path"),
    "GRPO, no template": (grpo(model=lambda p: p.tokenizer(chat_template=None)), "no chat template", "as text"),
    "GRPO, no eos": (grpo(model=lambda p: p.tokenizer(eos_token=None)), "no eos_token", "aesl handoff", "sets it"),
    "GRPO, base is gone": (grpo(adapter=lambda p: p.adapter("/gone")), "base of", "/gone, which is not there"),
    "GRPO, another base": (grpo(adapter=lambda p: p.adapter(p.wide_model())), "does not fit the base", "mismatch for"),
}
SYNTAX = {"rewards.py": "def fine(completions, **kwargs)\n    return 0\n"}
REWARD_FUNCTIONS = {
    "no such function": (
        sft(**MEASURED, reward_funcs=["rewards.py:fin"]),
        "rewards.py has no function 'fin'",
        "'fine'",
    ),
    "no such file": (grpo(reward_funcs=["reward.py:fine"]), "reward_funcs: reward.py:fine does not", "'rewards.py'"),
    "no such reward": (grpo(reward_funcs=["acuracy_reward"]), "'acuracy_reward'", "did you mean 'accuracy_reward'"),
    "syntax error": (grpo(write=SYNTAX), "rewards.py cannot be imported: SyntaxError", "line 1"),
    "column missing": (
        prompts([{"prompt": user("a"), "solutions": "b"}], reward_funcs=["accuracy_reward"]),
        "dataset_name: reward 'accuracy_reward' needs 'solution'",
        "did you mean 'solutions'",
    ),
    "raises": (
        grpo(reward_funcs=["rewards.py:raises"]),
        "reward 'raises' raised ZeroDivisionError at",
        "rewards.py:8",
    ),
    "returns nothing": (
        grpo(reward_funcs=["rewards.py:returns_nothing"]),
        "'returns_nothing' returned None",
        "a list",
    ),
    "NaN": (grpo(reward_funcs=["rewards.py:nan_at_2"]), "reward 'nan_at_2' returned nan for completion 2", "or None"),
    "wrong length": (
        grpo(reward_funcs=["rewards.py:one_for_all"]),
        "1 rewards for 4 completions",
        "one per completion",
    ),
    "raises in SFT": (sft(**MEASURED, reward_funcs=["rewards.py:raises"]), "'raises' raised ZeroDivisionError at"),
}
STAGE_GRPO = {"run.json": lambda text: text.replace('"sft"', '"grpo"')}
NEWER = {"run.json": lambda text: text.replace("0.1.0", "9.1.0")}
OLDER = {"diversity.jsonl": lambda text: text.replace("entropy", "mean_entropy")}
TORN = {"diversity.jsonl": lambda text: text[:-20]}
RUNS = {
    "select, no run": (
        on_run("select", run="notes", write={"notes/a.txt": ""}),
        "holds no SFT run",
        "diversity.jsonl",
    ),
    "select, misspelt run": (on_run("select", run="ouy"), "ouy is not a folder", "did you mean 'out'"),
    "select, run of RL": (on_run("select", edit=STAGE_GRPO), "is a run of grpo: name the folder of the cold start"),
    "select, half a run": (
        on_run("select", run="half", write={"half/run.json": "{}"}),
        "no candidate",
        "diversity_steps",
    ),
    "select, torn line": (on_run("select", edit=TORN), "diversity.jsonl, line 2 is not valid", "take that line out"),
    "select, torn run.json": (
        on_run("select", edit={"run.json": lambda text: text[:50]}),
        "run.json is not valid JSON",
    ),
    "select, older version": (on_run("select", edit=OLDER), "has 'entropy': another version", "measure again, or"),
    "select, newer version": (on_run("select", edit=NEWER), "written by aesl_trl 9.1.0", "0.1.0: update aesl_trl"),
    "select, misspelt rule": (
        on_run("select", "--rule", "turningpoint"),
        "rule is 'turningpoint', but must be one of turning_point, last, best_eval, readiness, mix",
        "mean 'turning_point'",
    ),
    "select, no such flag": (on_run("select", "--rul", "last"), "unrecognized arguments: --rul", "aesl select --help"),
    "handoff, no run": (
        on_run("handoff", run="notes", write={"notes/a.txt": ""}),
        "holds neither",
        "a model or an ad",
    ),
    "handoff, torn selection": (
        on_run("handoff", edit={"selection.json": lambda text: text[:20]}),
        "selection.json is not valid JSON",
        "make it anew: aesl select",
    ),
    "handoff, selected is gone": (
        on_run("handoff", edit={"selection.json": lambda text: text.replace("selected", "best")}),
        "selection.json points to",
        "out/best, which is not a folder; run aesl select",
    ),
    "handoff, older samples": (
        on_run("handoff", edit={"samples/step-2.jsonl": lambda text: text.replace("completions", "texts")}),
        "samples/step-2.jsonl, row 1 has no 'completions'",
        "another version",
    ),
    "handoff, torn chain.json": (on_run("handoff", write={"out/chain.json": '{"sft'}), "chain.json is not valid JSON"),
    "handoff over the run": (
        on_run("handoff", "--output", "{folder}/out"),
        "out/selected, which is read from, and would be replaced",
        "a new folder",
    ),
    "handoff over other files": (
        on_run("handoff", "--output", "{folder}/notes", write={"notes/a.txt": ""}),
        "notes holds other files, and would be replaced; name a new folder",
    ),
    "report, no run": (on_run("report", run="notes", write={"notes/a.txt": ""}), "notes holds no run", "chain.json"),
    "report, torn line": (on_run("report", edit=TORN), "diversity.jsonl, line 2 is not valid JSON"),
    "eval, output a file": (evaluate(lambda p: p.base, output="train.jsonl"), "output", "train.jsonl is a file"),
    "resume from nothing": (sft(resume_from_checkpoint="./out/checkpoint-7"), "out/checkpoint-7", "'checkpoint-2'"),
    "resume from half": (
        sft(write={"out/checkpoint-4/trainer_state.json": "{"}, resume_from_checkpoint="./out/checkpoint-4"),
        "training cannot go on from",
        "checkpoint-4: trainer_state.json is missing",
        "the last whole one is",
        "out/checkpoint-2",
    ),
    "recipes on no GPU": (lambda p: ["recipes", "check", "--gpus", "0"], "--gpus is 0", "must be at least 1"),
    "recipes over a folder": (lambda p: ["recipes", "copy", str(p.out)], "DIR: ", "out exists; name a new folder"),
    "recipes to a dangling link": (
        lambda p: (p.folder / "link").symlink_to("nowhere") or ["recipes", "copy", str(p.folder / "link")],
        "DIR: ",
        "link is a symlink",
    ),
    "recipes to a system's folder": (
        lambda p: ["recipes", "copy", "/proc/recipes"],
        "/proc",
        "name another folder",
    ),
    "handoff over another handoff.json": (
        on_run("handoff", write={"out/handoff.json": '{"mine": 1}'}),
        "output_dir: ",
        "out/handoff.json was written by something else, and would be replaced",
    ),
    "select over somebody's folder": (
        on_run("select", "--out", "{folder}/p", "--rule", "last", write={"p/selected/thesis.txt": "mine"}),
        "--output_dir: ",
        "p/selected holds other files, and would be replaced; name a new folder",
    ),
    "report over somebody's page": (
        on_run("report", "--output", "{folder}/p", write={"p/report.html": "mine"}),
        "--output_dir: ",
        "p/report.html was written by something else, and would be replaced",
    ),
    "eval over somebody's figures": (
        evaluate(lambda p: p.base, output="rows.json", write={"rows.json": "[]"}),
        "output_dir: ",
        "rows.json was written by something else",
    ),
    "eval over somebody's rows": (
        evaluate(lambda p: p.base, output="rows.json", write={"rows.json": '{"models": 1}\n{"models": 2}\n'}),
        "output_dir: ",
        "rows.json was written by something else",
    ),
    "probe over somebody's rows": (
        lambda p: [
            *("probe", str(p.out), "--config", p.config("probe.yaml", PROBE)),
            *("--output", p.write("rows.json", '{"checkpoints": 1}\n{}\n')),
        ],
        "output_dir: ",
        "rows.json was written by something else",
    ),
    "no such command": (lambda p: ["sfft"], "unknown command 'sfft'", "did you mean 'sft'"),
}
CHAINS = {
    "chain, config is gone": (run_chain(grpo={"config": "grp.yaml"}), "grpo.config: grp.yaml does not", "'grpo.yaml'"),
    "chain, stages of its own": (run_chain(stages=["grpo", "sft"]), "chain.yaml: unknown key 'stages'"),
    "chain, handoff of nothing": (run_chain(sft=..., handoff={"mode": "merge"}), "handoff needs an sft section"),
    "chain, key of another stage": (
        run_chain(grpo={"config": "grpo.yaml", "mode": "merge"}),
        "grpo: unknown key 'mode'",
    ),
    "chain, split groups": (run_chain("--dry_run", grpo_changes={"num_generations": 3}), "grpo.yaml", "divisible by"),
    "chain, no candidates": (run_chain("--dry_run", sft_changes={"diversity_steps": 0}), "sft.yaml", "no candidates"),
    "chain, uploaded": (
        run_chain("--dry_run", sft={"config": "sft.yaml", "output_dir": "out"}, sft_changes={"push_to_hub": True}),
        "chain.yaml: output_dir",
        "lies in sft.output_dir, which push_to_hub uploads",
    ),
    "chain, torn chain.json": (run_chain(write={"out/chain.json": '{"stages'}), "chain.json is not valid JSON"),
    "chain, output a file": (run_chain(output_dir="train.jsonl"), "output_dir: ", "train.jsonl is a file"),
}
TABLE = {**CONFIGS, **DATA, **MODELS, **REWARD_FUNCTIONS, **RUNS, **CHAINS}
# Seen when the model is there: in what TRL made of the data, in the weights, or in the first samples
AFTER_LOADING = {
    *("every row too long", "another base", "GRPO, another base"),
    *("raises", "returns nothing", "NaN", "wrong length", "raises in SFT"),
}


@pytest.fixture(scope="session")
def trained_adapter(tmp_path_factory, tiny_model_dir):
    return make_adapter(tiny_model_dir, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def project(tmp_path, tiny_model_dir, trained_adapter, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "project").mkdir()
    return Project(tmp_path / "project", tiny_model_dir, trained_adapter)


def hashes(folder: Path) -> dict[str, str]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.mark.parametrize("name", TABLE)
def test_one_line_and_nothing_lost(project, capsys, monkeypatch, name):
    build, *parts = TABLE[name]
    arguments, before = build(project), hashes(project.out)
    assert parts and before
    if name not in AFTER_LOADING:
        monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    # In another process we would not see the line
    monkeypatch.setattr(chain, "check_in_child", lambda command, argv: None)
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    line = only_line(capsys.readouterr().err, arguments[0])
    assert exit.value.code == 2
    assert all(part in line for part in parts), line
    after = hashes(project.out)
    assert {path: after.get(path) for path in before} == before
    # A command may take a folder's lock, and once it has begun it disowns what another run would have gone on from
    locks = {TRAINING_LOCK, ".sft.lock", ".grpo.lock", ".lock"}
    assert {Path(path).name for path in after.keys() - before} <= {INCOMPLETE, *locks}


@pytest.mark.slow
def test_a_reward_that_hangs_ends_in_one_line(project):
    """Run in a process of its own, because nothing but the end of the process ends the reward."""
    arguments = grpo(reward_funcs=["rewards.py:hangs"])(project)
    code = (
        "from aesl_trl import cli; from aesl_trl.rewards import functions as rewards\n"
        f"rewards.guarded.__kwdefaults__['hang_s'] = 1.0\ncli.main({arguments!r})"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    before = hashes(project.out)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if line.startswith("aesl")]
    assert done.returncode == 2 and len(said) == 1
    assert re.search("reward 'hangs' has not returned for 1 s at .*rewards.py:20; .* time limit", said[0])
    assert before.items() <= hashes(project.out).items()
