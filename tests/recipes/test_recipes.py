"""The recipes: what belongs to one, the commands `list` and `check`, and a run of all stages on a stand-in."""

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from stand_ins import ALSO, DROPPED, MODELS, OVERRIDDEN, RECIPES, copy_recipe, overridden

from aesl_trl import files
from aesl_trl.chain import chain as chains
from aesl_trl.chain.config import read_config
from aesl_trl.chain.stages import BUILDERS, Chain
from aesl_trl.compare import compare
from aesl_trl.data import prepare
from aesl_trl.data.config import DataArguments
from aesl_trl.errors import InputError
from aesl_trl.estimates.facts import MODEL_CONFIG, kind_of, promised_files
from aesl_trl.evaluation.evaluate import EvalArguments
from aesl_trl.recipes import recipes
from aesl_trl.recipes.recipes import find_configs


CONFIGS = find_configs([RECIPES])
PLANNED = [path for path in CONFIGS if kind_of(path) in ("chain", "compare")]
CHAINS = [(path.parent.name, path.name) for path in CONFIGS if kind_of(path) == "chain" and path.parent.name in MODELS]
FIRST = ("Qwen2.5-1.5B-Instruct", "chain.yaml")


def relative(path):
    return path.relative_to(RECIPES).as_posix()


# ---- As they are


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_has_what_is_promised_of_it(name):
    folder = RECIPES / name
    there = {path.name for path in folder.iterdir()}
    assert there >= {
        "README.md",
        "model_config.json",
        "data.yaml",
        "eval.yaml",
        "chain.yaml",
        "probe.yaml",
        "sft",
        "grpo",
    }
    losses = {yaml.safe_load(path.read_text())["cold_start_loss"] for path in (folder / "sft").iterdir()}
    assert losses == {"aesl", "nll"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_dry_run_here_refuses_what_needs_a_gpu(with_data):
    with pytest.raises(InputError, match="bf16/gpu"):
        chains.main(["--config", str(with_data / FIRST[0] / FIRST[1]), "--dry_run", "here"])


def test_a_dry_run_says_where_an_sft_run_of_its_own_folder_lies(tmp_path, capsys):
    path = RECIPES / "skills-tiny" / "chain_nll_last.yaml"
    chains.main(["--config", str(path), "--output_dir", str(tmp_path / "mine"), "--dry_run"])
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert str(tmp_path / "mine") in first
    assert second.startswith(
        f"SFT runs in {RECIPES.parent / 'runs/skills-tiny/nll/seed-0'}, as sft.output_dir of chain_nll"
    )


@pytest.mark.parametrize("name", MODELS)
def test_math_reward_grades_at_every_stage(name):
    for path in CONFIGS:
        if path.is_relative_to(RECIPES / name) and "reward_funcs" in (values := yaml.safe_load(path.read_text())):
            assert values["reward_funcs"] == ["math_reward"], path
    assert EvalArguments().reward_funcs == DataArguments().reward_funcs == ["math_reward"]


# What plans fast enough for every run of the tests: other comparisons have up to a hundred cells, or the same shape
FAST = [
    path
    for path in CONFIGS
    if kind_of(path) == "chain" or (path.name == "compare.yaml" and path.parent.name in MODELS[:2])
]


def dry_run(path):
    (chains if kind_of(path) == "chain" else compare).main(["--config", str(path), "--dry_run"])


@pytest.fixture(scope="module")
def all_recipes(tmp_path_factory):
    """A copy of all recipes without their data, in a folder of its own."""
    return Path(shutil.copytree(RECIPES, tmp_path_factory.mktemp("all") / "recipes"))


@pytest.mark.parametrize("name", MODELS)
def test_missing_data_name_the_command_that_makes_them(name, all_recipes, monkeypatch):
    monkeypatch.chdir(all_recipes.parent)
    for file in ("chain.yaml", "compare.yaml"):
        with pytest.raises(
            InputError, match=f"does not exist, .*; first make it: aesl data --config recipes/{name}/data"
        ):
            dry_run(all_recipes / name / file)


@pytest.fixture(scope="module")
def with_data(tmp_path_factory):
    """A copy of all recipes beside what `aesl data` and their scripts would write: empty files, empty folders."""
    recipes = Path(shutil.copytree(RECIPES, tmp_path_factory.mktemp("made") / "recipes"))
    for folder in (path.parent for path in recipes.glob(f"*/{MODEL_CONFIG}")):
        for path in map(Path, promised_files(folder)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch() if path.suffix else path.mkdir()
    return recipes


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=() if path in FAST else pytest.mark.slow, id=relative(path)) for path in PLANNED]
)
def test_a_dry_run_needs_no_gpu(path, with_data, capsys):
    dry_run(with_data / relative(path))
    said = capsys.readouterr().out
    assert "to run: at most" in said if kind_of(path) == "compare" else "grpo: " in said
    # Hours: a CPU's are not estimated, and a comparison's may be measured
    if path.parent.name in MODELS:
        assert "estimated: no GPU has measured it" in said
    elif kind_of(path) == "chain":
        assert "time not estimated: a CPU's time" in said
    # A first line that promises hours
    assert "see --dry_run for the hours" not in path.read_text() or "process-hours" in said


ARMS = ("chain.yaml", "chain_base.yaml", "chain_nll_best_eval.yaml", "chain_nll_turning_point.yaml")


def test_arms_of_a_comparison_differ_in_the_cold_start_alone():
    for name in MODELS[1:]:
        rl = {chain: yaml.safe_load((RECIPES / name / chain).read_text())["grpo"] for chain in ARMS}
        assert len({json.dumps(section) for section in rl.values()}) == 1
        nll, aesl = (
            yaml.safe_load((RECIPES / name / f"sft/config_{loss}.yaml").read_text()) for loss in ("nll", "aesl")
        )
        different = {key for key in nll.keys() | aesl.keys() if nll.get(key) != aesl.get(key)}
        assert different == {"cold_start_loss", "t_scaling", "output_dir", "best_eval_metric"}


@pytest.mark.parametrize("name", MODELS)
def test_every_file_that_a_readme_names_is_there(name):
    folder = RECIPES / name
    text = (folder / "README.md").read_text()
    named = set(re.findall(r"(?<!/)recipes/[\w.-]+/[\w./-]+\.yaml", text)) | set(
        re.findall(r"`((?:sft|grpo)/\w+\.yaml|\w+\.yaml)`", text)
    )
    for file in named:
        places = [RECIPES.parent / file, folder / file, RECIPES / "accelerate_configs" / file]
        assert any(place.is_file() for place in places), file
    assert (folder / "../../docs/recipes.md").resolve().is_file()


# ---- The command


def run(*argv):
    with pytest.raises(SystemExit) as end:
        recipes.main(["check", *map(str, argv)])
    return end.value.code


def test_check_ends_with_the_sum_and_exit_code(recipe, capsys):
    path = recipe("sft/config_aesl_lora.yaml", "diversity_batch_size: 128", "diversity_batch_size: 512")
    assert run(path.with_name("config_nll_lora.yaml"), "--brief") == 0
    out = capsys.readouterr().out
    assert "to spare" in out and "weights:" not in out and out.endswith("1 files checked, 0 with problems\n")
    assert run(path) == 2
    out = capsys.readouterr().out
    assert "OVER by" in out and "monitoring: KV cache: 512 x (512 + 512) tokens x 28672 bytes" in out


def test_a_copy_that_was_cut_off_does_not_block_the_next(tmp_path, monkeypatch, capsys):
    (tmp_path / "shipped" / "tiny").mkdir(parents=True)
    (tmp_path / "shipped" / "tiny" / "chain.yaml").write_text("# One CPU core\n")
    monkeypatch.setattr(recipes, "recipes_dir", lambda: tmp_path / "shipped")
    target, copytree = tmp_path / "mine", shutil.copytree

    def full_disk(*args, **options):
        copytree(*args, **options)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(recipes.shutil, "copytree", full_disk)
        recipes.main(["copy", str(target)])
    assert [path.name for path in tmp_path.iterdir()] == ["shipped"]
    recipes.main(["copy", str(target)])
    said = f"copied 1 recipes -> {target}; next: aesl recipes check {target / 'tiny'}\n"
    assert capsys.readouterr().out == said and (target / "tiny" / "chain.yaml").read_text() == "# One CPU core\n"
    recipes.main(["copy", str(tmp_path / "shipped" / "inside")])
    assert [path.name for path in (tmp_path / "shipped" / "inside").iterdir()] == ["tiny"]
    (tmp_path / "volume").mkdir()
    with pytest.raises(InputError, match="volume exists; name a new folder"):
        recipes.main(["copy", str(tmp_path / "volume")])


@pytest.mark.parametrize(("argv", "part"), [([], "required"), (["copy"], "DIR"), (["chek"], "check")])
def test_refusals_of_the_command(argv, part):
    with pytest.raises(InputError, match=part):
        recipes.main(argv)


def test_what_a_recipe_recorded_is_no_config(tmp_path):
    for name in ("chain.yaml", "results/main/chain.yaml", "sft/config.yaml"):
        (tmp_path / "recipe" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "recipe" / name).touch()
    assert find_configs([tmp_path]) == [tmp_path / "recipe" / name for name in ("chain.yaml", "sft/config.yaml")]
    inside = tmp_path / "recipe" / "results"
    assert find_configs([inside]) == [inside / "main" / "chain.yaml"]  # named, it is looked into


def test_list_shows_a_line_a_recipe_and_the_chains_of_one(capsys):
    recipes.main(["list"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(
        {path.parent.name for path in CONFIGS if path.name == "chain.yaml"}
    )
    assert all(re.search("[0-9] x [0-9]+ GB|CPU core", line) for line in lines) and "aesl recipes copy NAME" in last
    recipes.main(["list", FIRST[0]])
    first, *others, last = capsys.readouterr().out.splitlines()
    assert first.startswith("chain.yaml ") and f"{FIRST[0]}/chain.yaml --dry_run" in last
    planned = {path.name for path in PLANNED if path.parent.name == FIRST[0]}
    assert {line.split()[0] for line in others} == planned - {"chain.yaml"}
    with pytest.raises(InputError, match="there is no recipe skills-tinny; did you mean 'skills-tiny'?"):
        recipes.main(["list", "skills-tinny"])


def test_a_copy_of_one_recipe_has_what_its_configs_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipes.main(["copy", "skills-chain-tiny"])
    assert {path.name for path in Path("recipes").iterdir()} == {
        "skills-chain-tiny",
        "skills-tiny",
        "accelerate_configs",
    }
    assert (
        "copied skills-chain-tiny -> recipes; next: aesl recipes check recipes/skills-chain-tiny"
        in capsys.readouterr().out
    )
    chain = read_config("recipes/skills-chain-tiny/chain.yaml")
    assert chain.output_dir.startswith(f"{tmp_path}/runs/")
    recipes.main(["copy", *FIRST[:1], "mine"])
    assert {path.name for path in Path("mine").iterdir()} == {FIRST[0], "accelerate_configs"}
    with pytest.raises(InputError, match="there is no recipe skills"):
        recipes.main(["copy", "skills", "other"])
    for names in (["skills-tinny"], ["skills-tiny", "skills-tinny"]):
        with pytest.raises(
            InputError, match=r"no recipe skills-tinny; did you mean 'skills-tiny'\? .*: \./skills-tinny"
        ):
            recipes.main(["copy", *names])
    assert not Path("skills-tinny").exists()
    capsys.readouterr()
    recipes.main(["copy", "skills-tiny", "skills-tiny", "./skills-tinny"])
    assert capsys.readouterr().out.startswith("copied skills-tiny -> skills-tinny; next")


def test_a_copy_has_the_siblings_that_a_stages_config_names(tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / "shipped" / name / "grpo").mkdir(parents=True)
    (tmp_path / "shipped" / "one" / "grpo" / "config.yaml").write_text("dataset_name: ../../two/data/rl.jsonl\n")
    recipes.copy(tmp_path / "shipped", tmp_path / "mine", ["one"])
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"one", "two"}


# ---- On a stand-in


# All that a stand-in may change; learning rates, losses, adapters, lengths of data and rewards are not among them.
SIZES = {
    *("model_name_or_path", "dataset_name", "dataset_config", "data_dir", "decontaminate"),  # where things are
    *("use_cpu", "bf16", "dtype", "use_vllm", "backend", "generation_kwargs"),  # no GPU
    *(
        "num_demonstrations",
        "subsets",
        "pass_rate_samples",
        "difficulty_size",
        "num_held_out",
        "num_prompts",
        "num_samples",
        "batch_size",
    ),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "warmup_steps", "save_steps"),
    *("diversity_steps", "diversity_num_prompts", "diversity_max_new_tokens", "diversity_batch_size"),
    *("max_completion_length", "max_new_tokens"),
}


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.relative_to(RECIPES).parts[0] in MODELS], ids=relative
)
def test_a_stand_in_overrides_sizes_alone(path):
    values = yaml.safe_load(path.read_text())
    changed = overridden(path, values, "model")
    different = {key for key in values.keys() | changed.keys() if values.get(key) != changed.get(key)}
    kind = kind_of(path)
    assert different <= SIZES
    assert different <= {*OVERRIDDEN[kind], *DROPPED.get(kind, ()), ALSO}
    if kind in ("sft", "grpo"):
        kept = {"learning_rate", "lr_scheduler_type", "output_dir", "reward_funcs", "max_length", "use_peft", "lora_r"}
        assert {key: values[key] for key in kept & values.keys()} == {
            key: changed[key] for key in kept & values.keys()
        }


def run_stages(folder: Path, chain_name: str) -> Chain:
    """Data, then the chain's own commands, each main in this process."""
    for config in sorted(folder.glob("data*.yaml")):
        prepare.main(["--config", str(config)])
    chain = Chain(read_config(folder / chain_name), folder / chain_name)
    chain.read_record()
    chain.run.mkdir(parents=True)
    files.write_json(chain.run / files.CHAIN, chain.record)  # says where a shared SFT run is
    for name in chain.names:
        stage = BUILDERS[name](chain)
        if name == "select":
            assert chains._select(chain, chain.run / "select.log") == 0
        else:
            module = next(part for part in stage.command if part.startswith("aesl_trl."))
            importlib.import_module(module).main(stage.command[stage.command.index(module) + 1 :])
        assert stage.output.exists(), name
    return chain


def check_run(chain: Chain) -> None:
    """RL moved weights of what it was told to train, and everything was measured."""
    log = files.read_json(chain.run / "grpo" / "trainer_state.json")["log_history"]
    assert any(row.get("reward_std", 0) > 0 and row.get("grad_norm", 0) > 0 for row in log)
    models = files.read_json(chain.run / files.EVALUATION)["models"]
    assert set(models) == {"start", "final"}
    assert "pass@1" in files.read_json(chain.run / files.READINESS)["checkpoints"][0]["figures"]
    adapter = chain.run / "grpo" / "adapter_model.safetensors"
    lora = yaml.safe_load(Path(chain.config.grpo.config).read_text()).get("use_peft", False)
    assert adapter.exists() == lora
    if lora:
        weights = load_file(adapter)
        assert any(torch.count_nonzero(value) for key, value in weights.items() if "lora_B" in key)
    if chain.config.sft:
        assert files.read_json(chain.run / files.HANDOFF)["mode"] in ("merge", "full")


def test_the_first_recipe_runs_through_all_stages(tmp_path):
    name, chain_name = FIRST
    chain = run_stages(copy_recipe(name, tmp_path), chain_name)
    check_run(chain)
    assert files.read_settings(chain.run / "sft")["cold_start_loss"] == "aesl"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "chain_name"), [pair for pair in CHAINS if pair != FIRST], ids=str)
def test_every_other_chain_runs_through_all_stages(name, chain_name, tmp_path, monkeypatch):
    if "qlora" in chain_name:
        pytest.importorskip("bitsandbytes")
        # With AVX512-BF16 bitsandbytes 0.50 repacks weights at the first sample, and cannot train them any more.
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    check_run(run_stages(copy_recipe(name, tmp_path), chain_name))


@pytest.mark.slow
def test_the_first_recipe_from_an_average_with_the_base(tmp_path):
    name, chain_name = FIRST
    folder = copy_recipe(name, tmp_path)
    values = yaml.safe_load((folder / chain_name).read_text())
    values |= {"selection": {"rule": "mix"}, "mix": {"weights": [0.5, 0.7]}}
    (folder / chain_name).write_text(yaml.safe_dump(values))
    chain = run_stages(folder, chain_name)
    check_run(chain)
    assert chain.names[:3] == ["sft", "mix", "select"]
    chosen = files.read_json(chain.run / files.SELECTION)
    assert chosen["candidate"] == files.read_json(chain.run / files.HANDOFF)["candidate"] in ("mix-0.5", "mix-0.7")
    assert files.read_json(chain.run / files.HANDOFF)["checks"]["own_samples"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_first_recipe_in_one_command(tmp_path):
    """`aesl chain` itself, with its processes, launcher and readiness gate."""
    folder = copy_recipe(FIRST[0], tmp_path)
    prepare.main(["--config", str(folder / "data_gsm8k.yaml")])
    chains.main(["--config", str(folder / FIRST[1])])
    chain = Chain(read_config(folder / FIRST[1]), folder / FIRST[1])
    check_run(chain)
    assert " s a step, " in (chain.run / files.LOGS / "sft.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_part_of_the_papers_table(tmp_path):
    """`aesl compare` on a recipe: direct RL, and a rival's cold start, each in processes of its own."""
    folder = copy_recipe("Qwen2.5-7B-Instruct", tmp_path)
    prepare.main(["--config", str(folder / "data.yaml")])
    compare.main(["--config", str(folder / "compare.yaml"), "--methods", "base", "psft", "--seeds", "0"])
    result = files.read_json(tmp_path / "runs" / folder.name / "compare" / compare.JSON)
    assert {cell["row"] for cell in result["cells"]} == {"paper/base", "paper/psft/last"}
    assert all(0 <= cell["after"]["pass@1"] <= 1 for cell in result["cells"])
    assert "paper/aesl/last, seed 0" in result["missing"]
