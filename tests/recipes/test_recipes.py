"""Every recipe: what its files say of each other, what a check refuses, and a run of all stages on a stand-in."""

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
from aesl_trl.errors import InputError
from aesl_trl.recipes import memory, recipes
from aesl_trl.recipes.check import check_config, find_configs
from aesl_trl.recipes.facts import first_comment, hardware_of, kind_of, read_facts, shape_of


CONFIGS = find_configs([RECIPES])
CHAINS = [(path.parent.name, path.name) for path in CONFIGS if kind_of(path) == "chain" and path.parent.name in MODELS]
FIRST = ("Qwen2.5-1.5B-Instruct", "chain.yaml")


def relative(path):
    return path.relative_to(RECIPES).as_posix()


# ---- As they are


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_every_config_holds_together_and_fits(path):
    case = check_config(path)
    assert case.problems == []
    is_sized = kind_of(path) in ("sft", "grpo", "probe") and hardware_of(path).gpus
    assert any(line.startswith("  peak") for line in case.lines) == bool(is_sized) or kind_of(path) == "eval"


@pytest.mark.parametrize(
    ("name", "parameters"),
    # As the model cards and papers round them: 1.54 B, 7.61 B, 7.61 B, 8.03 B.
    list(zip(MODELS, (1_543_714_304, 7_615_616_512, 7_615_616_512, 8_030_261_248), strict=True)),
)
def test_the_models_numbers_are_those_of_the_public_models(name, parameters):
    facts = read_facts(RECIPES / name / "model_config.json")
    assert shape_of(facts).parameters == parameters
    assert facts.turn_end_id in facts.eos_ids or name == "Qwen2.5-Math-7B"  # a base: its recipe sets eos_token


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


def test_arms_of_a_comparison_differ_in_the_cold_start_alone():
    for name in MODELS[1:]:
        rl = {chain: yaml.safe_load((RECIPES / name / chain).read_text())["grpo"] for chain in ARMS}
        assert len({json.dumps(section) for section in rl.values()}) == 1
        nll, aesl = (
            yaml.safe_load((RECIPES / name / f"sft/config_{loss}.yaml").read_text()) for loss in ("nll", "aesl")
        )
        different = {key for key in nll.keys() | aesl.keys() if nll.get(key) != aesl.get(key)}
        assert different == {"cold_start_loss", "t_scaling", "output_dir", "best_eval_metric"}


ARMS = ("chain.yaml", "chain_base.yaml", "chain_nll_best_eval.yaml", "chain_nll_turning_point.yaml")


# ---- What a check refuses


@pytest.fixture
def recipe(tmp_path):
    """Copies of a recipe and the accelerate configs; `edit` replaces text in one file and returns its path."""

    def edit(name, old, new, of="Qwen2.5-1.5B-Instruct"):
        if not (tmp_path / of).exists():
            shutil.copytree(RECIPES / of, tmp_path / of)
            shutil.copytree(RECIPES / "accelerate_configs", tmp_path / "accelerate_configs")
        path = tmp_path / of / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        return path

    return edit


SFT, GRPO = "sft/config_aesl_lora.yaml", "grpo/config_lora.yaml"


@pytest.mark.parametrize(
    ("name", "old", "new", "parts"),
    [
        (SFT, "learning_rate", "learning_rat", ["unknown key 'learning_rat'", "learning_rate"]),
        (SFT, "# 1 x 24 GB, ", "# ", ["names no hardware", "1 x 24 GB"]),
        (
            SFT,
            "global batch 16",
            "global batch 32",
            ["says global batch 32", "1 processes x 4 accumulated x 4 are 16"],
        ),
        (SFT, ", global batch 16", "", ["does not say the global batch, 16"]),
        (SFT, "single_gpu.yaml", "ddp.yaml", ["starts 8 processes on 1 GPUs"]),
        (SFT, "single_gpu.yaml", "single.yaml", ["single.yaml in the first line is not in"]),
        (
            SFT,
            "max_length: 1024",
            "max_length: 512",
            ["cuts off demonstrations of up to 1024 tokens (data_gsm8k.yaml)"],
        ),
        (SFT, "max_length: 1024", "max_length: 40000", ["40000 tokens, but the context", "is 32768"]),
        (SFT, "sft.jsonl", "sft_300.jsonl", ["sft_300.jsonl does not exist"]),
        (SFT, "diversity_batch_size: 128", "diversity_batch_size: 512", ["over by", "of each GPU's 24"]),
        (
            SFT,
            "diversity_token_budget: 0",
            "diversity_token_budget: 99999",
            ["64 prompts x 8 samples x 512", "of 99999"],
        ),
        (SFT, "use_peft: true", "use_peft: false", ["trains bf16 weights", "float32"]),
        (SFT, "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-3B", ["Qwen/Qwen2.5-3B is not here"]),
        (SFT, "max_length: 1024", "eos_token: <|endoftext|>\nmax_length: 1024", ["ends with <|endoftext|>", "151645"]),
        (GRPO, "per_device_train_batch_size: 8", "per_device_train_batch_size: 6", ["global batch 128", "are 96"]),
        (GRPO, "num_generations: 8", "num_generations: 16", ["16 prompts x 8, a generation is 8 x 16"]),
        (GRPO, "max_completion_length: 512", "max_completion_length: 32768", ["33280 tokens, but the context"]),
        (GRPO, "beta: 0.0", "beta: true", ["beta must be float"]),
        (
            "grpo/config_lora_vllm.yaml",
            "vllm_max_model_length: 1024",
            "vllm_max_model_length: 900",
            ["is 900", "1024"],
        ),
        (
            "grpo/config_lora_vllm.yaml",
            "vllm_gpu_memory_utilization: 0.35",
            "vllm_gpu_memory_utilization: 0.2",
            ["one sequence"],
        ),
        ("eval_gsm8k.yaml", "max_model_len: 1024", "max_model_len: 600", ["max_model_len 600"]),
        (
            "chain.yaml",
            "../accelerate_configs/single_gpu.yaml",
            "../accelerate_configs/ddp.yaml",
            ["says single_gpu.yaml"],
        ),
        ("chain.yaml", "config_lora.yaml", "config_lor.yaml", ["does not exist", "config_lora.yaml"]),
        ("probe.yaml", "batch_size: 64", "batch_size: 60", ["multiple of num_samples"]),
        ("data_gsm8k.yaml", "num_held_out: 512", "num_held_out: 0", ["num_held_out"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(recipe, name, old, new, parts):
    case = check_config(recipe(name, old, new))
    assert case.problems
    line = next((problem for problem in case.problems if parts[0] in problem), None)
    assert line is not None, case.problems
    assert all(part in line for part in parts) and "\n" not in line


def test_completions_that_make_no_whole_groups_are_refused(recipe):
    recipe(GRPO, "per_device_train_batch_size: 8", "per_device_train_batch_size: 3")
    path = recipe(GRPO, "gradient_accumulation_steps: 16", "gradient_accumulation_steps: 5")
    assert "15) must be divisible by num_generations (8)" in " ".join(check_config(path).problems)


def test_groups_are_those_of_all_processes(recipe):
    """One completion a process: whole groups on eight of them, which GRPOConfig by itself cannot know here."""
    of = "Qwen2.5-7B-Instruct"
    recipe("grpo/config.yaml", "per_device_train_batch_size: 2", "per_device_train_batch_size: 1", of=of)
    recipe("grpo/config.yaml", "gradient_accumulation_steps: 64", "gradient_accumulation_steps: 1", of=of)
    path = recipe("grpo/config.yaml", "1024 = 128 prompts x 8", "8 = 1 prompts x 8", of=of)
    assert check_config(path).problems == []


def test_a_base_model_needs_the_token_that_ends_a_turn(recipe):
    of = "Qwen2.5-Math-7B"
    sft = recipe("sft/config_aesl.yaml", "eos_token: <|im_end|>", "# eos", of=of)
    assert (
        "a sample ends with <|endoftext|>, a turn of the chat template with <|im_end|>"
        in check_config(sft).problems[0]
    )
    grpo = recipe("grpo/config.yaml", "generation_kwargs:", "# ", of=of)
    assert "generation_kwargs" in check_config(grpo).problems[0]


def test_zero3_must_save_whole_weights_and_nothing_is_offloaded(recipe, tmp_path):
    path = recipe("sft/config_aesl.yaml", "fsdp2.yaml", "zero3.yaml", of="Qwen2.5-7B-Instruct")
    assert check_config(path).problems == []
    engine = tmp_path / "accelerate_configs" / "zero3.yaml"
    engine.write_text(
        engine.read_text()
        .replace("zero3_save_16bit_model: true", "offload_optimizer_device: cpu")
        .replace("offload_optimizer_device: none\n", "# ", 1)
    )
    problems = " ".join(check_config(path).problems)
    assert "zero3_save_16bit_model" in problems and "2604.23747" in problems


def test_a_tokenizer_that_is_here_is_asked_itself(tmp_path):
    """skills-tiny's base is here: the check reads its own template, and finds a config that would never stop."""
    shutil.copytree(RECIPES / "skills-tiny", tmp_path / "tiny", ignore=shutil.ignore_patterns("results"))
    path = tmp_path / "tiny" / "sft" / "config_aesl.yaml"
    assert check_config(path).problems == []
    path.write_text(path.read_text() + "eos_token: <|user|>\n")
    assert "ends with <|user|>" in check_config(path).problems[0]


def test_the_split_for_a_server_leaves_it_its_gpus(recipe):
    path = recipe("grpo/config_vllm_server.yaml", "4 of them for vLLM", "2 of them for vLLM", of="Qwen2.5-7B-Instruct")
    assert "starts 4 processes on 8 GPUs less 2 for vLLM" in " ".join(check_config(path).problems)


def test_other_files_are_refused_by_name(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    assert "is no config of a recipe" in check_config(tmp_path / "config.yaml").problems[0]
    with pytest.raises(InputError, match="does not exist"):
        find_configs([tmp_path / "missing"])


# ---- The command


def run(*argv):
    with pytest.raises(SystemExit) as end:
        recipes.main(["check", *map(str, argv)])
    return end.value.code


def test_check_ends_with_the_sum_and_exit_code(recipe, capsys):
    path = recipe(SFT, "diversity_batch_size: 128", "diversity_batch_size: 512")
    assert run(path.with_name("config_nll_lora.yaml"), "--brief") == 0
    out = capsys.readouterr().out
    assert "to spare" in out and "weights:" not in out and out.endswith("1 files checked, 0 with problems\n")
    assert run(path) == 2
    out = capsys.readouterr().out
    assert "OVER by" in out and "monitoring: KV cache: 512 x (512 + 512) tokens x 28672 bytes" in out


@pytest.mark.parametrize(("argv", "part"), [([], "required"), (["copy"], "DIR"), (["chek"], "check")])
def test_refusals_of_the_command(argv, part):
    with pytest.raises(InputError, match=part):
        recipes.main(argv)


def test_list_names_every_config(capsys):
    recipes.main(["list"])
    out = capsys.readouterr().out
    assert all(relative(path) in out for path in CONFIGS)


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
        "samples",
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
    chain.record = chains._read_record(chain)
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
    assert files.read_json(chain.run / "sft" / files.RUN)["cold_start_loss"] == "aesl"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "chain_name"), [pair for pair in CHAINS if pair != FIRST], ids=str)
def test_every_other_chain_runs_through_all_stages(name, chain_name, tmp_path, monkeypatch):
    if "qlora" in chain_name:
        pytest.importorskip("bitsandbytes")
        # With AVX512-BF16 bitsandbytes 0.50 repacks weights at the first sample, and cannot train them any more.
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    check_run(run_stages(copy_recipe(name, tmp_path), chain_name))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_first_recipe_in_one_command(tmp_path):
    """`aesl chain` itself, with its processes, launcher and readiness gate."""
    folder = copy_recipe(FIRST[0], tmp_path)
    prepare.main(["--config", str(folder / "data_gsm8k.yaml")])
    chains.main(["--config", str(folder / FIRST[1])])
    chain = Chain(read_config(folder / FIRST[1]), folder / FIRST[1])
    check_run(chain)
    assert "h left" in (chain.run / chains.LOGS / "sft.log").read_text()


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


def test_sizes_are_in_gb_of_a_card():
    assert memory.GB == 1e9


# ---- What the READMEs say


@pytest.mark.parametrize("name", MODELS)
def test_the_readmes_memory_is_what_the_check_says(name):
    text = (RECIPES / name / "README.md").read_text()
    rows = re.findall(
        r"^\| `([\w/.]+\.yaml)` \| (\d+ x \d+ GB) \| ([\d.]*) \| ([\d.]*) \| ([\d.]*) \|$", text, re.MULTILINE
    )
    assert {row[0] for row in rows} >= {relative(path).partition("/")[2] for path in CONFIGS if is_sized(path, name)}
    for file, hardware, *peaks in rows:
        case = check_config(RECIPES / name / file)
        assert first_comment(case.path).startswith(hardware)
        (peak,) = [line for line in case.lines if line.startswith("  peak")]
        assert dict(re.findall(r"(train|generate|vllm) ([\d.]+)", peak)) == {
            key: value for key, value in zip(("train", "generate", "vllm"), peaks, strict=True) if value
        }
        items = {" ".join(line.split()) for line in case.lines if " GB  " in line}
        if f"`{file}`, by item" in text or f"(`{file}`" in text:
            assert items <= {" ".join(line.split()) for line in text.splitlines()}


def is_sized(path, name):
    return path.relative_to(RECIPES).parts[0] == name and kind_of(path) in ("sft", "grpo", "probe")


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
