"""hub: what a push uploads, by huggingface_hub's own patterns, with both trainers and every hub_strategy."""

import types
from concurrent.futures import Future
from pathlib import Path

import pytest
from huggingface_hub.hf_api import DEFAULT_IGNORE_PATTERNS
from huggingface_hub.utils import filter_repo_objects
from monitored_runs import PROMPTS
from small_runs import cpu_settings, prompt_completion_rows, small_config
from tiny_models import build_model
from transformers import trainer as transformers_trainer
from trl import SFTConfig, SFTTrainer

from aesl_trl import AESLSFTTrainer, DiversityCallback, files
from aesl_trl.errors import InputError


MODEL = {"config.json", "generation_config.json", "model.safetensors", "training_args.bin"}
MODEL |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
RESUMING = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"}
SETTINGS = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "push_to_hub": True, "hub_always_push": True}
MEASURING = {"steps": 1, "samples": 2, "max_new_tokens": 4, "selection": "last"}


class Hub:
    """Stands for HfApi. Each upload is the set of paths that it would add to the repository."""

    def __init__(self, fails_for=None):
        self.uploads, self.fails_for = [], fails_for

    def create_repo(self, name, **kwargs):
        return types.SimpleNamespace(repo_id=f"user/{name}")

    def upload_folder(
        self, *, folder_path, path_in_repo="", ignore_patterns=(), run_as_future=False, repo_id, **kwargs
    ):
        paths = (path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file())
        kept = filter_repo_objects(paths, ignore_patterns=[*ignore_patterns, *DEFAULT_IGNORE_PATTERNS])
        self.uploads.append({f"{path_in_repo}/{name}".lstrip("/") for name in kept})
        job = Future()
        job.set_exception(OSError("no net")) if path_in_repo == self.fails_for else job.set_result(None)
        return job if run_as_future else None


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(transformers_trainer, "hf_api", lambda: hub)
    return hub


def trainer_of(kind, tokenizer, folder, include=(), **changes):
    """Return a trainer of one step, with a measurement, a candidate and a save."""
    settings, extra = {**SETTINGS, **changes}, {}
    if kind is AESLSFTTrainer:
        measuring = {f"diversity_{name}": MEASURING[name] for name in ("steps", "samples", "max_new_tokens")}
        args = small_config(folder, **settings, **measuring, selection="last", hub_include=list(include))
        extra = {"diversity_prompts": PROMPTS}
    else:
        args = SFTConfig(**cpu_settings(folder, **settings))
    model, rows = build_model(tokenizer), prompt_completion_rows()
    trainer = kind(model=model, args=args, train_dataset=rows, processing_class=tokenizer, **extra)
    if kind is SFTTrainer:
        trainer.add_callback(DiversityCallback(trainer, PROMPTS, hub_include=include, **MEASURING))
    return trainer


def push(*args, **kwargs):
    """Train, and push at the end."""
    trainer = trainer_of(*args, **kwargs)
    trainer.train()
    trainer.push_to_hub()


def expected(strategy):
    """Return the paths of each push: that of the save with its checkpoint beside it, and that at the end."""
    beside = {"checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-1"}.get(strategy)
    checkpoint = [{f"{beside}/{name}" for name in MODEL | RESUMING}] if beside else []
    return [MODEL | {"README.md"}] * (strategy != "end") + checkpoint + [MODEL | {"README.md"}]


@pytest.mark.parametrize("kind", [SFTTrainer, AESLSFTTrainer])
def test_nothing_of_the_run_is_pushed(kind, hub, tokenizer, tmp_path):
    push(kind, tokenizer, tmp_path, hub_strategy="all_checkpoints")
    ours = {path.name for path in (tmp_path / files.OWN).iterdir()}
    assert {"candidates", "samples", "selected", "diversity.jsonl", "selection.json", "run.json"} <= ours
    assert hub.uploads == expected("all_checkpoints")


SLOW = [pytest.param(strategy, marks=pytest.mark.slow) for strategy in ("every_save", "checkpoint")]


@pytest.mark.parametrize("strategy", ["end", "all_checkpoints", *SLOW])
@pytest.mark.parametrize("kind", [SFTTrainer, AESLSFTTrainer])
def test_what_is_asked_for_is_pushed_beside_the_model(kind, strategy, hub, tokenizer, tmp_path):
    push(kind, tokenizer, tmp_path, ["selected", "samples"], hub_strategy=strategy)
    ours = [paths for paths in hub.uploads if any(path.startswith("_aesl/") for path in paths)]
    assert [paths for paths in hub.uploads if paths not in ours] == expected(strategy)
    samples = {f"_aesl/samples/step-{step}.jsonl" for step in (0, 1)}
    weights = {f"_aesl/selected/{name}" for name in MODEL - {"training_args.bin"} | {files.IDENTITY}}
    assert ours == [samples] * (strategy != "end") + [samples | weights]  # it is selected when the training ends
    assert not [path for path in (tmp_path / files.OWN).iterdir() if path.name.startswith(".push")]


def test_a_snapshot_is_uploaded_while_training_goes_on(hub, tokenizer, tmp_path, monkeypatch):
    """An upload in the background may read its files only after the next measurement has changed them."""
    late, upload = [], hub.upload_folder
    monkeypatch.setattr(hub, "upload_folder", lambda **call: late.append(call) or Future())
    include = ["candidates", "diversity"]
    trainer = trainer_of(AESLSFTTrainer, tokenizer, tmp_path, include, hub_strategy="every_save")
    monkeypatch.setattr(trainer, "_finish_current_push", lambda: None)
    trainer.train()
    own = tmp_path / files.OWN
    files.append_jsonl(own / files.DIVERSITY, {"step": 2})
    (own / files.CANDIDATES / "step-1").rename(own / files.CANDIDATES / "step-9")
    (ours,) = (call for call in late if call.get("path_in_repo") == files.OWN)
    upload(**ours)
    assert [row["step"] for row in files.read_jsonl(Path(ours["folder_path"]) / files.DIVERSITY)] == [0, 1]
    weights = {f"_aesl/candidates/step-1/{name}" for name in MODEL - {"training_args.bin"}}
    assert hub.uploads == [weights | {"_aesl/diversity.jsonl"}]
    assert ours["delete_patterns"] == ["candidates/*"]  # what an earlier push left


def test_a_failed_upload_is_said(hub, tokenizer, tmp_path):
    hub.fails_for = files.OWN
    with pytest.warns(UserWarning, match="hub_include was not uploaded: no net"):
        push(SFTTrainer, tokenizer, tmp_path, ["diversity"], hub_strategy="end")


@pytest.mark.parametrize(
    ("include", "pushes", "message"),
    [
        (["sample"], True, "hub_include is 'sample', but must be one of .*; did you mean 'samples'?"),
        ("samples", True, "hub_include is 'samples', but must be a list of parts"),
        (["samples"], False, "push_to_hub is false: set push_to_hub to true"),
    ],
)
def test_parts_that_cannot_be_pushed_are_refused(include, pushes, message, hub, tokenizer, tmp_path):
    with pytest.raises(InputError, match=message):
        small_config(tmp_path, push_to_hub=pushes, hub_include=include)
    args = SFTConfig(**cpu_settings(tmp_path, push_to_hub=pushes))
    rows = prompt_completion_rows()
    trainer = SFTTrainer(build_model(tokenizer), args, train_dataset=rows, processing_class=tokenizer)
    with pytest.raises(InputError, match=message):
        DiversityCallback(trainer, PROMPTS, steps=1, hub_include=include)
