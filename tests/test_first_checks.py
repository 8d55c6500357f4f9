"""first_checks: what is wrong with a command line is said in one line, without torch."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from aesl_trl import first_checks
from aesl_trl.chain.config import ChainConfig
from aesl_trl.chain.stages import READ_BY, argument_types
from aesl_trl.commands import COMMANDS
from aesl_trl.compare.config import CompareConfig
from aesl_trl.data.config import DataArguments
from aesl_trl.errors import InputError
from aesl_trl.estimates.facts import kind_of
from aesl_trl.recipes.recipes import find_configs


ROOT = Path(__file__).parents[1]
RECIPES = [path for path in find_configs([ROOT / "recipes"]) if kind_of(path)]
SFT = {"model_name_or_path": "base", "dataset_name": "rows.jsonl", "cold_start_loss": "nll"}


def comparison(sft: str, grpo: str) -> dict:
    """Return a comparison of one method whose template names these configs."""
    chain = {"sft": {"config": sft}, "grpo": {"config": grpo}, "eval": {"config": "empty.yaml"}}
    return {"output_dir": "table", "seeds": [0], "chain": chain, "methods": {"nll": {"sft": {}}}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Write a config of each kind, and data, to the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    configs = {
        "sft.yaml": SFT,
        "grpo.yaml": {"dataset_name": "rows.jsonl", "num_generations": 8, "max_completion_length": 64},
        "chain.yaml": {"output_dir": "run", "sft": {"config": "sft.yaml"}, "grpo": {"config": "grpo.yaml"}},
        "empty.yaml": {"learning_rate": 1e-5, "model_name_or_path": None},
        "hub.yaml": {"model_name_or_path": "org/not-here", "dataset_name": "rows.jsonl"},
        "gone.yaml": {**SFT, "dataset_name": "./rws.jsonl"},
        "v2.yaml": {**SFT, "model_name_or_path": "org/m", "model_revision": "v2"},
        "stray.yaml": {"model_name_or_path": "base", "dataset_name": "rows.jsonl", "num_processes": 8},
        "packed.yaml": {"dataset_name": "rows.jsonl", "packing": True, "num_generations": 8},
        "no-chain.yaml": {"output_dir": "run", "sft": {"config": "grpo.yaml"}, "grpo": {"config": "grpo.yaml"}},
        "lost-chain.yaml": {"output_dir": "run", "sft": {"config": "sft.yaml"}, "grpo": {"config": "gpro.yaml"}},
        "compare.yaml": comparison("sft.yaml", "sft.yaml"),
        "lost-compare.yaml": comparison("stf.yaml", "grpo.yaml"),
    }
    for name, values in configs.items():
        (tmp_path / name).write_text(yaml.safe_dump(values))
    cache = tmp_path / "cache" / "models--org--m"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache.parent))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache.parent))  # for a process of its own
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "v2").write_text("0a1b")
    (cache / "snapshots" / "0a1b").mkdir(parents=True)
    (cache / "snapshots" / "0a1b" / "config.json").write_text("{}")
    (tmp_path / "torn.yaml").write_text("a: [")
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "rows.json").write_text("{}")
    (tmp_path / "base").mkdir()
    (tmp_path / "run").mkdir()
    return tmp_path


CASES = {
    "sft": "missing: model_name_or_path, dataset_name; usage: aesl sft [CONFIG.yaml]",
    "sft empty.yaml": "missing in empty.yaml and on the command line: model_name_or_path, dataset_name; usage",
    "sft empty.yaml --model-name-or-path base": "on the command line: dataset_name; usage",
    "grpo grpo.yaml": "model_name_or_path (or adapter_name_or_path), reward_funcs (or reward_model_name_or_path)",
    "data --output_dir=x": "missing: dataset_name, model_name_or_path; usage",
    "chain": "missing: CONFIG.yaml; usage: aesl chain CONFIG.yaml",
    "handoff": "missing: RUN; usage: aesl handoff RUN",
    "mix": "missing: RUN, dataset_name, diversity_steps; usage: aesl mix RUN CONFIG.yaml",
    "interpolate run": "missing: B, output",
    "probe": "missing: CHECKPOINT..., dataset_name, reward_funcs",
    "eval": "missing: MODEL..., dataset_name (or benchmarks)",
    "eval --start base --dataset_name x --final ./gone": "final: ./gone does not exist",
    "sft stf.yaml": "config file stf.yaml does not exist; did you mean 'sft.yaml'?",
    "sft --config": "--config needs a file",
    "sft torn.yaml": "torn.yaml, line 1",
    "sft run --config sft.yaml": "unknown argument run: aesl sft takes no folder; a config's name ends in .yaml",
    "sft gone.yaml": "dataset_name: ./rws.jsonl does not exist",
    "sft sft.yaml --output_dir rows.jsonl": "rows.jsonl is a file; name another folder",
    "sft sft.yaml --dataset_name ./x.jsonl": "dataset_name: ./x.jsonl does not exist",
    "sft chain.yaml": "chain.yaml: this is a chain (it has grpo, sft): aesl chain --config chain.yaml",
    "chain sft.yaml --dry-run": "sft.yaml: this is a cold start's config (it has cold_start_loss): aesl sft --config",
    "mix run grpo.yaml": "this is an RL config (it has max_completion_length, num_generations): aesl grpo --config",
    "sft sft.yaml --output_dir rows.json": "rows.json is a file; name another folder",
    "sft v2.yaml --model_revision v3": "the hub's cache does not hold its revision v3",
    "sft v2.yaml --model_revision main": "the hub's cache does not hold its revision main",
    "grpo grpo.yaml --adapter_name_or_path org/m --model_revision v2": "folder org/m here, and the hub's cache does",
    "handoff --mode merge run": "[--FLAG VALUE ...]; positionals come before the flags",
    "handoff --mode=merge": "missing: RUN; usage: aesl handoff RUN [CONFIG.yaml] [--FLAG VALUE ...]",
    "handoff ruun": "RUN: ruun is not a folder; did you mean 'run'?",
    "handoff run base": "unknown argument base: aesl handoff takes RUN",
    "handoff rows.jsonl": "RUN: rows.jsonl is a file, not a folder",
    "eval nowhere --dataset_name x": "model: there is no folder nowhere here, and the hub's cache does not hold it",
    "grpo hub.yaml --reward_funcs a": "model_name_or_path: there is no folder org/not-here here",
    "probe run/x/y grpo.yaml": "model: run/x/y is not a folder",
}


@pytest.mark.parametrize("line", CASES)
def test_refused(line, folder):
    command, *argv = line.split()
    with pytest.raises(InputError) as error:
        first_checks.check(command, argv)
    assert CASES[line] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        "sft sft.yaml",
        "sft gone.yaml --dataset_name rows.jsonl",
        "grpo grpo.yaml --model_name_or_path base --reward_funcs accuracy_reward",
        "probe run grpo.yaml --reward_funcs accuracy_reward",
        "probe run base --config grpo.yaml --reward_funcs accuracy_reward",
        "mix run sft.yaml --diversity_steps 1",
        "chain chain.yaml --dry-run",
        "handoff --run run",
        "eval --start base --final base --dataset_name rows.jsonl",
        "probe run hub.yaml --reward_funcs accuracy_reward",  # the probe loads another model than RL does
        "sft sft.yaml chain.yaml --help",
        "select",
        "sft v2.yaml",
        "sft v2.yaml --model_revision 0a1b",
        "grpo grpo.yaml --model_name_or_path org/m --model_revision=v2 --reward_funcs accuracy_reward",
        "sft stray.yaml",  # the command's own line says more of num_processes
        "grpo packed.yaml --model_name_or_path base --reward_funcs accuracy_reward",
        "sft sft.yaml --beta 0.1 --use_vllm",
        "sft --run_name=my_config sft.yaml",
        "eval --config=empty.yaml base --dataset_name x --output_dir rows.json",
    ],
)
def test_what_may_be_right_is_left_to_the_command(line, folder):
    command, *argv = line.split()
    first_checks.check(command, argv)


# What the commands themselves refuse, which need no torch for it.
BY_THE_COMMAND = {
    "select nowhere": "nowhere is not a folder",
    "report nowhere": "nowhere is not a folder",
    "recipes check nowhere": "nowhere does not exist",
    "chain no-chain.yaml": "no-chain.yaml: sft.config: grpo.yaml is an RL config (it has max_completion_length, "
    "num_generations); name a cold start's config",
    "chain lost-chain.yaml": "grpo.config: gpro.yaml does not exist",
    "compare compare.yaml": "compare.yaml: chain.grpo.config: sft.yaml is a cold start's config (it has "
    "cold_start_loss); name an RL config",
    "compare lost-compare.yaml": "chain.sft.config: stf.yaml does not exist",
}


def test_torch_is_not_imported_to_refuse(folder):
    """Run every refusal by the real command in one process, which knows no torch at its end."""
    code = (
        "import sys\nfrom aesl_trl import cli\n"
        "for line in sys.argv[1:]:\n"
        "    try: cli.main(line.split())\n"
        "    except SystemExit as leaving: assert leaving.code == 2, line\n"
        "    else: raise AssertionError(line)\n"
        "print(*{'torch', 'trl', 'transformers', 'datasets', 'accelerate'} & {*sys.modules})"
    )
    cases = CASES | BY_THE_COMMAND
    done = subprocess.run([sys.executable, "-c", code, *cases], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "\n"
    said = done.stderr.splitlines()
    assert [line for line, text in zip(cases, said, strict=True) if cases[line] not in text] == []


def fields_of(kind: str) -> set[str]:
    """Return the keys of a config of this kind."""
    own = {"chain": (ChainConfig,), "compare": (CompareConfig,), "data": (DataArguments,)}
    return {field.name for each in own.get(kind) or argument_types(kind) for field in dataclasses.fields(each)}


def test_the_marks_are_keys_of_their_command_and_of_no_other():
    readers = ["chain", "compare", "data", *(name for name in READ_BY if name in COMMANDS)]
    assert {"sft", "grpo", "probe", "eval", "mix"} <= {*readers}
    for kind, keys in first_checks.MARKS.items():
        if kind != "accelerate":
            assert keys <= fields_of(kind), (kind, keys - fields_of(kind))
        for other in readers:
            if kind not in (other, *first_checks.READS.get(other, ())):
                assert not keys & fields_of(other), (kind, other, keys & fields_of(other))


def test_a_decisive_mark_is_a_mark():
    assert first_checks.DECISIVE <= frozenset().union(*first_checks.MARKS.values())


def test_each_recipes_config_is_known_by_its_keys():
    others = {"chain": "sft", "compare": "chain", "grpo": "sft", "probe": "sft", "data": "grpo"}
    assert len(RECIPES) > 100
    for path in RECIPES:
        values, kind = yaml.safe_load(path.read_text(encoding="utf-8")), kind_of(path)
        if kind != "accelerate":
            first_checks.check_kind(kind, path, values)
        marks = {key for keys in first_checks.MARKS.values() for key in keys & values.keys()}
        if kind in ("probe", "eval") and len(marks) == 1 and not marks & first_checks.DECISIVE:
            continue  # one plain mark may be a mistake in any config
        # a probe's config may hold nothing but keys of RL's
        noun = "(an RL|a probe's) config" if kind == "probe" else first_checks.NOUNS[kind]
        with pytest.raises(InputError, match=f"{path.name}: this is {noun} "):
            first_checks.check_kind(others.get(kind, "data"), path, values)
