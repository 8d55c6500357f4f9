"""check: every recipe's files agree and fit, as their READMEs say, and each mistake is one line that names it."""

import re
import shutil

import preloaded
import pytest
from stand_ins import MODELS, RECIPES

from aesl_trl.errors import InputError
from aesl_trl.estimates.facts import first_comment, hardware_of, kind_of
from aesl_trl.recipes.check import check_config
from aesl_trl.recipes.recipes import find_configs


CONFIGS = find_configs([RECIPES])


def relative(path):
    return path.relative_to(RECIPES).as_posix()


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_every_config_holds_together_and_fits(path):
    case = check_config(path)
    assert case.problems == []
    is_sized = kind_of(path) in ("sft", "grpo", "probe") and hardware_of(path).gpus
    assert any(line.startswith("  peak") for line in case.lines) == bool(is_sized) or kind_of(path) == "eval"


# ---- What a check refuses


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


def test_a_model_that_is_here_is_asked_itself(tmp_path):
    """skills-tiny's base is here: the check reads its own context, and finds rows that are longer."""
    shutil.copytree(RECIPES / "skills-tiny", tmp_path / "tiny", ignore=shutil.ignore_patterns("results"))
    path = tmp_path / "tiny" / "sft" / "config_aesl.yaml"
    assert check_config(path).problems == []
    path.write_text(path.read_text() + "max_length: 99999\n")
    assert "max_length: 99999 tokens, but the context" in check_config(path).problems[0]


def test_the_split_for_a_server_leaves_it_its_gpus(recipe):
    path = recipe("grpo/config_vllm_server.yaml", "4 of them for vLLM", "2 of them for vLLM", of="Qwen2.5-7B-Instruct")
    assert "starts 4 processes on 8 GPUs less 2 for vLLM" in " ".join(check_config(path).problems)


def test_other_files_are_refused_by_name(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    assert "is no config of a recipe" in check_config(tmp_path / "config.yaml").problems[0]
    with pytest.raises(InputError, match="does not exist"):
        find_configs([tmp_path / "missing"])


# ---- Another number of GPUs


def test_on_other_gpus_the_global_batch_stays(recipe):
    """8 x 80 GB with FSDP2 becomes 4: twice the accumulation, and what is sharded takes twice the room."""
    path = recipe("sft/config_aesl.yaml", "cosine", "cosine", of="Qwen2.5-7B-Instruct")
    eight, four = check_config(path), check_config(path, 4)
    assert four.problems == [] and "  on 4 GPUs: fsdp2.yaml with --num_processes 4" in four.lines
    size = {
        len(case.lines): next(float(line.split()[1]) for line in case.lines if "weights: " in line)
        for case in (eight, four)
    }
    assert size[len(four.lines)] == pytest.approx(2 * size[len(eight.lines)], abs=0.02)
    one = check_config(path, 1)
    assert "over by" in " ".join(one.problems) and "  on 1 GPU: fsdp2.yaml with --num_processes 1" in one.lines


def test_an_adapter_takes_ddp_on_several_gpus_and_less_time(recipe):
    path = recipe(SFT, "cosine", "cosine")
    alone, shared = check_config(path), check_config(path, 2)
    assert shared.problems == [] and "  on 2 GPUs: ddp.yaml with --num_processes 2" in shared.lines
    assert any("buckets of DDP" in line for line in shared.lines)
    minutes = [re.search(r"time (\d+) (?:min )?to", " ".join(case.lines))[1] for case in (alone, shared)]
    assert int(minutes[0]) > 1.5 * int(minutes[1])


def test_rls_generations_keep_their_size(recipe):
    path = recipe("grpo/config.yaml", "beta: 0.0", "beta: 0.0", of="Qwen2.5-7B-Instruct")
    assert check_config(path, 4).problems == []
    assert check_config(path, 16).problems == []


@pytest.mark.parametrize(
    ("name", "gpus", "parts"),
    [
        (SFT, 3, ["--gpus 3", "global batch 16", "3 processes x 4 rows"]),
        ("grpo/config_vllm_server.yaml", 4, ["--gpus 4", "4 GPUs are for vLLM"]),
    ],
)
def test_gpus_that_cannot_share_the_work_are_one_line(recipe, name, gpus, parts):
    of = "Qwen2.5-7B-Instruct" if "server" in name else "Qwen2.5-1.5B-Instruct"
    (problem,) = check_config(recipe(name, "learning_rate", "learning_rate", of=of), gpus).problems
    assert all(part in problem for part in parts) and "\n" not in problem


def test_the_command_on_four_gpus_and_on_too_few(recipe):
    """In a process of its own: brief lines where it fits, and exit code 2 with one line where it does not."""
    path = recipe("sft/config_aesl.yaml", "cosine", "cosine", of="Qwen2.5-7B-Instruct")
    command = ["-m", "aesl_trl.cli", "recipes", "check", "--brief", path, "--gpus"]
    four, one = (preloaded.run([*command, gpus], timeout=120) for gpus in (4, 1))
    assert not four.stderr, four.stderr[-800:]
    first, launch, peak, time, last = four.stdout.splitlines()
    assert four.returncode == 0 and first.startswith("ok ") and last == "1 files checked, 0 with problems"
    assert launch == "  on 4 GPUs: fsdp2.yaml with --num_processes 4" and "fits" in peak
    assert re.fullmatch(r"  time [^:]+: [^,]+ training, [^,]+ measuring \(estimated\)", time)
    assert one.returncode == 2 and "FAIL: needs" in one.stdout


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


@pytest.mark.parametrize("name", MODELS)
def test_the_readmes_hours_are_what_the_check_says(name):
    rows = re.findall(
        r"^\| `(chain\w*\.yaml)` \| ([^|]*\d) GB \|(.*)\|$", (RECIPES / name / "README.md").read_text(), re.M
    )
    timed = {file: (hardware, [cell.strip() for cell in cells.split("|")[:5]]) for file, hardware, cells in rows}
    assert timed.keys() == {path.name for path in CONFIGS if path.parent.name == name and kind_of(path) == "chain"}
    for file, (hardware, cells) in timed.items():
        case = check_config(RECIPES / name / file)
        assert first_comment(case.path).startswith(f"{hardware} GB")
        said = [re.match(r"    (sft|probe|grpo|eval) +([^:(]*\d (?:min|h))", line) for line in case.lines]
        stages = {match[1]: match[2] for match in said if match}
        (whole,) = [line for line in case.lines if line.startswith("  time in all: ")]
        assert whole.endswith("(estimated: no GPU has measured it; docs/several_gpus.md has the arithmetic)")
        expected = [
            *(stages.get(stage, "") for stage in ("sft", "probe", "grpo", "eval")),
            whole[15:].partition(" (")[0],
        ]
        assert cells == expected, f"{name}/README.md: {file} | {' | '.join(expected)} |"


def is_sized(path, name):
    return path.relative_to(RECIPES).parts[0] == name and kind_of(path) in ("sft", "grpo", "probe")
