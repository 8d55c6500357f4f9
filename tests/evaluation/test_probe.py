"""probe: which checkpoints are probed, what readiness.json holds of them, and what is refused."""

import copy
import json
import re
import shutil
import signal
import sys
from pathlib import Path

import preloaded
import pytest
from datasets import Dataset
from small_probe import probe_tokenizer, run
from tiny_models import build_model

from aesl_trl import files
from aesl_trl.diversity.coverage import GAINED, LOST
from aesl_trl.diversity.readiness import READY
from aesl_trl.diversity.selection import select_run
from aesl_trl.errors import InputError
from aesl_trl.evaluation import probe
from aesl_trl.evaluation.probed import ProbedFile, settings_of
from aesl_trl.rewards.grading import SHARED_GRADERS, Grade


def test_a_probe_repeats_itself(project):
    first, second = (run(project) for _ in range(2))
    for result in (first, second):
        del result["checkpoints"][0]["seconds"]
    assert first == second
    assert run(project, seed=1)["checkpoints"][0]["figures"] != first["checkpoints"][0]["figures"]


def test_the_page_shows_the_rows_of_the_table():
    own = {"name": "handoff", "figures": {}, "intervals": {}, "text": "ready", "reasons": []}
    printed = probe.table({"checkpoints": [own], "num_samples": 8})
    page = (Path(__file__).parents[2] / "docs" / "commands" / "probe.md").read_text(encoding="utf-8")
    shown = re.search(r"^ +handoff\n(?: {4}\S.+\n)+", page, re.MULTILINE)[0]

    def names(block):
        return [re.split(" {2,}", line.strip())[0] for line in block.splitlines()]

    assert "mixed groups" in names(shown)
    assert names(shown) == names(printed.split("\n\n")[0])


def test_fewer_prompts_in_the_data_are_all_taken(project, capsys):
    lines = (project.folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (project.folder / "rows.jsonl").write_text("".join(lines[:9]))
    assert run(project, batch_size=8)["num_prompts"] == 9
    assert "only 9 prompts" in capsys.readouterr().out


def test_coverage_against_a_reference(project, capsys):
    other = project.folder / "other"
    shutil.copytree(project.model, other)
    build_model(probe_tokenizer(project), seed=7).save_pretrained(other)
    result = run(project, project.model, str(other), reference="other")
    assert result["reference"] == "../other"
    own, itself = result["checkpoints"]
    for name in (LOST, GAINED):
        assert itself["figures"][name] == 0.0 and itself["intervals"][name] == [0.0, 0.0]
        assert own["intervals"][name][0] < own["figures"][name] < own["intervals"][name][1]
    change = own["figures"]["pass@4"] - itself["figures"]["pass@4"]  # k is half of the 8 samples
    assert own["figures"][GAINED] - own["figures"][LOST] == pytest.approx(change, abs=1e-12)
    out = capsys.readouterr().out
    assert "aesl probe: other, the reference" in out and "coverage lost" in out


def test_several_tasks_have_figures_and_a_verdict_each(project, capsys):
    rows = [json.loads(line) for line in (project.folder / "rows.jsonl").read_text().splitlines()]
    rewards = "def every_other(completions, task, **kwargs):\n"
    rewards += "    return [float(name == 'even' and i % 2) for i, name in enumerate(task)]\n"
    (project.folder / "rewards.py").write_text(rewards)
    lines = [json.dumps({**row, "task": ("even", "never")[i % 2]}) + "\n" for i, row in enumerate(rows)]
    (project.folder / "rows.jsonl").write_text("".join(lines))
    found = run(project, reward_funcs=["rewards.py:every_other"])["checkpoints"][0]
    even, never = found["tasks"]
    assert [even["name"], never["name"]] == ["even", "never"]
    assert (even["figures"]["pass@1"], even["figures"]["groups_mixed"]) == (0.5, 1.0)
    assert (never["figures"]["pass@1"], never["figures"]["groups_mixed"]) == (0.0, 0.0)
    assert even["text"] == never["text"] == "never stops: fix eos"  # an untrained model
    assert found["figures"]["pass@1"] == 0.25  # over both
    assert even["num_prompts"] == 32
    out = capsys.readouterr().out
    assert "model, by task" in out and "never stops: fix eos; few prompts" in out


def test_a_column_task_of_another_kind_is_not_about_tasks():
    assert probe.places_by_task([{"task": name} for name in "ab" * 8]) == {
        "a": list(range(0, 16, 2)),
        "b": list(range(1, 16, 2)),
    }
    for tasks in (["a"] * 16, [f"row {i}" for i in range(16)], [["a"], ["b"]] * 8, [None, "a"] * 8, "ab" * 7):
        assert probe.places_by_task([{"task": task} for task in tasks]) == {}
    assert probe.places_by_task([{}] * 16) == {}


DEADLY = """
import os, signal
def length(completions, **kwargs):
    with open(os.environ["CALLS"], "a") as file:
        file.write("x")
    if os.path.getsize(os.environ["CALLS"]) == int(os.environ["DIE_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(completion) % 2) for completion in completions]
"""


def test_a_killed_probe_goes_on_where_it_was(project, monkeypatch):
    (project.folder / "rewards.py").write_text(DEADLY)
    sft = sft_run(project)
    candidates = [str(sft / files.CANDIDATES / f"step-{step}") for step in (10, 20)]
    undisturbed, calls = project.folder / "undisturbed", project.folder / "calls"
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("DIE_AT", "0")
    probe.main([*candidates, *project(output="undisturbed/readiness.json")])
    assert calls.read_text() == "xx"  # a batch holds all samples of a checkpoint
    calls.unlink()
    argv = [*candidates, *project()]
    died = preloaded.run(["-m", "aesl_trl.evaluation.probe", *argv], timeout=120, CALLS=calls, DIE_AT=2)
    part = project.folder / "out" / files.PROBED
    assert died.returncode == -signal.SIGKILL and len(part.read_text().splitlines()) == 1, died.stderr
    assert not (project.folder / "out" / files.READINESS).exists()
    calls.unlink()
    probe.main(argv)
    assert calls.read_text() == "x" and not part.exists()
    found = [json.loads((folder / files.READINESS).read_text()) for folder in (project.folder / "out", undisturbed)]
    for result in found:
        for checkpoint in result["checkpoints"]:
            del checkpoint["seconds"]
    assert found[0] == found[1]


def test_what_a_probe_kept_is_of_its_own_settings_alone(project):
    """Other rewards, prompts, seeds and weights are other samples; where they go and how they are shown is not."""
    arguments = probe.parse(probe.ARGUMENT_TYPES, project(), prog="aesl probe")

    def settings(args=arguments, prompt: str = "1", train=None) -> dict:
        return settings_of(args, probe.load_rewards(args[0]), [{"prompt": prompt}], train)

    def key(changed: dict | None = None, rl_steps: int = 0) -> str:
        return ProbedFile(project.folder / "readiness.json", changed or first).key(project.model, rl_steps)

    first = settings()
    now = key()
    assert now == key() == key(settings()) and now != key(rl_steps=1)
    assert now != key(settings(prompt="2"))
    train = Dataset.from_list([{"prompt": "3"}])
    assert key(settings(train=train)) == key(settings(train=train)) != now
    stream = train.to_iterable_dataset()  # may hold other rows the next time
    assert key(settings(train=stream)) != key(settings(train=stream))
    for name, value, same in (("seed", 7, False), ("temperature", 0.5, False), ("output_dir", "x", True)):
        changed = copy.copy(arguments[1])
        setattr(changed, name, value)
        assert (key(settings((arguments[0], changed, arguments[2]))) == now) is same, name
    with open(project.folder / "rewards.py", "a") as file:
        file.write("# edited")
    assert key(settings()) != now
    build_model(probe_tokenizer(project), seed=7).save_pretrained(project.model)
    assert key() != now


def test_what_a_probe_kept_is_of_its_own_rewards_alone(project, monkeypatch):
    """A reward counts by the file that it is written in, whatever its name, and a reward model as a model."""
    monkeypatch.chdir(project.folder)
    monkeypatch.syspath_prepend(project.folder)
    (project.folder / "helping.py").write_text(
        "def length(completions, **kwargs):\n    return [0.0] * len(completions)\n"
    )
    (project.folder / "handing_on.py").write_text("from helping import length\n")
    for name in ("helping", "handing_on"):
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]  # forgotten again after the test

    def rewards(**given) -> dict:
        args = probe.parse(probe.ARGUMENT_TYPES, project(**given), prog="aesl probe")
        return settings_of(args, probe.load_rewards(args[0]), [{"prompt": "1"}], None)

    imported, in_a_file = {"reward_funcs": ["helping.length"]}, {"reward_funcs": ["handing_on.py:length"]}
    before = rewards(**imported), rewards(**in_a_file)
    assert before == (rewards(**imported), rewards(**in_a_file))
    with open(project.folder / "helping.py", "a") as file:
        file.write("# edited")
    now = rewards(**imported), rewards(**in_a_file)
    assert before[0] != now[0] and before[1] != now[1]
    with open(project.folder / "handing_on.py", "a") as file:
        file.write("# edited")
    assert rewards(**imported) == now[0] and rewards(**in_a_file) != now[1]

    shutil.copytree(project.model, project.folder / "judge")
    judged = rewards(reward_model_name_or_path="judge")
    assert judged == rewards(reward_model_name_or_path="judge") != rewards()
    assert judged != rewards(reward_model_name_or_path="model")
    build_model(probe_tokenizer(project), seed=7).save_pretrained(project.folder / "judge")
    assert judged != rewards(reward_model_name_or_path="judge")
    assert {"math-verify", "reasoning-gym"} <= judged["versions"].keys()


# ---- Runs and their candidates


def sft_run(project, steps=(10, 20)) -> Path:
    """An SFT folder with candidates of different weights and a diversity series."""
    folder = project.folder / "sft"
    rows = [{"step": step, "entropy": 1.0 / (step + 1), "groups_mixed": 0.5} for step in (0, *steps)]
    files.write_jsonl(folder / files.DIVERSITY, rows)
    tokenizer = probe_tokenizer(project)
    for step in steps:
        candidate = folder / files.CANDIDATES / f"step-{step}"
        shutil.copytree(project.model, candidate)
        build_model(tokenizer, seed=step).save_pretrained(candidate)
    return folder


def test_nothing_is_written_into_an_sft_folder_that_a_chain_leads_to(project):
    sft, chain = sft_run(project), project.folder / "chains" / "run"
    files.write_json(chain / files.CHAIN, {"sft_dir": "../../sft"})
    checkpoints = probe.find_checkpoints(str(chain))
    with pytest.raises(
        InputError, match=f"output_dir: the candidates of {chain} lie in {sft}: probe that, or name where"
    ):
        probe.find_target(None, checkpoints, [str(chain)])
    assert probe.find_target("here", checkpoints, [str(chain)]) == Path("here") / files.READINESS
    assert probe.find_target(None, probe.find_checkpoints(str(sft)), [str(sft)]) == sft / files.READINESS
    files.write_json(project.folder / files.CHAIN, {"sft_dir": "sft"})
    inside = str(project.folder)
    assert probe.find_target(None, probe.find_checkpoints(inside), [inside]) == sft / files.READINESS


def test_where_to_write_is_output_dir_on_the_command_line_and_the_configs_is_rls(project, monkeypatch):
    seen = []
    monkeypatch.setattr(probe, "parse", lambda types, flags, prog: seen.append(flags) or pytest.fail("parsed"))
    for flag in ("--output_dir", "--output-dir", "--output"):
        with pytest.raises(pytest.fail.Exception, match="parsed"):
            probe.main(["model", flag, "here", f"{flag}=there", "--output_dirs"])
    assert seen == [["--output", "here", "--output=there", "--output_dirs"]] * 3


@pytest.mark.parametrize(
    ("num", "verdict", "file", "following"),
    [
        (1, "ready", None, "; next: aesl handoff {0}"),
        (1, "ready", files.HANDOFF, "; next: aesl grpo --config FILE --model_name_or_path {0}"),
        (1, "not yet able", None, ""),
        (2, "ready", None, "; next: aesl select run --rule readiness"),
    ],
)
def test_the_last_line_says_what_comes_next(num, verdict, file, following, tmp_path, monkeypatch):
    if file:
        (tmp_path / file).write_text("{}")
    run = Path("run") if num > 1 else None
    checkpoints = [probe.Checkpoint(str(tmp_path), f"step-{step}", run, step) for step in range(num)]
    result = {"checkpoints": [{"verdict": verdict}] * num}
    assert probe.following(result, checkpoints) == following.format(tmp_path)
    monkeypatch.setenv("AESL_STAGE_FOLDER", "a chain's")
    assert probe.following(result, checkpoints) == ""


def test_a_run_stands_for_its_candidates(project, monkeypatch):
    folder = sft_run(project)
    probe.main([str(folder), *project(output=...)])
    found = json.loads((folder / files.READINESS).read_text())
    assert [(one["step"], one["path"]) for one in found["checkpoints"]] == [
        (10, "candidates/step-10"),
        (20, "candidates/step-20"),
    ]
    selection = select_run(folder, rule="readiness")  # no untrained model is ready
    assert (selection["applied"], selection["step"]) == ("mixed_groups", 10)  # as many at each step: the earliest
    assert "no candidate is ready (2 never stops)" in selection["reason"]
    for one in found["checkpoints"]:
        one["verdict"] = READY
    files.write_json(folder / files.READINESS, found)
    selection = select_run(folder, rule="readiness")
    best = max(found["checkpoints"], key=lambda one: (one["figures"]["signal"], one["figures"]["variance"]))
    assert (selection["applied"], selection["step"]) == ("readiness", best["step"])


def test_where_a_checkpoint_comes_from(project, monkeypatch):
    folder = sft_run(project)
    for name in ("checkpoint-20", "selected", "handoff"):
        shutil.copytree(project.model, folder / name)
    files.write_json(folder / files.SELECTION, {"step": 10, "path": "selected"})
    expected = {"candidates/step-20": 20, "checkpoint-20": 20, "selected": 10, "handoff": 10}
    for name, step in expected.items():
        (found,) = probe.find_checkpoints(str(folder / name))
        assert (found.run.resolve(), found.step) == (folder, step), name
        history = probe.history_of(found)
        assert (history.step, [row["step"] for row in history.rows], history.candidates) == (
            step,
            [0, 10, 20],
            [10, 20],
        )
    (found,) = probe.find_checkpoints(project.model)
    assert (found.run, found.step, found.mix, probe.history_of(found)) == (None, None, None, None)
    files.write_json(folder / files.SELECTION, {"step": 10, "candidate": "mix-0.7", "path": "selected"})
    shutil.copytree(project.model, folder / files.CANDIDATES / "mix-0.7")
    for name in ("selected", "handoff", "candidates/mix-0.7"):
        (found,) = probe.find_checkpoints(str(folder / name))
        assert (found.step, found.mix) == (None, "mix-0.7"), name


def test_two_of_the_same_name_get_their_folder_before_it(project):
    folder = sft_run(project)
    shutil.copytree(folder, project.folder / "other")
    paths = [str(project.folder / name / "candidates/step-10") for name in ("sft", "other")]
    found = probe.with_unique_names([one for path in (*paths, project.model) for one in probe.find_checkpoints(path)])
    assert [one.name for one in found] == ["sft/step-10", "other/step-10", "model"]


# ---- What is refused, before a model loads


def torn(project) -> str:
    path = Path(project.model) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    return project.model


def lost_base(project) -> str:
    adapter = project.folder / "adapter"
    adapter.mkdir()
    shutil.copy(Path(project.model) / "model.safetensors", adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(project.folder / "gone")})
    )
    return str(adapter)


def two_candidates(project) -> dict:
    return {"reference": str(sft_run(project))}


RL = {"rl_steps": 2, "eval_dataset_name": "held_out.jsonl"}
REFUSED = {
    "no checkpoint": ([], {}, "which checkpoint?", "aesl probe CHECKPOINT"),
    "misspelt folder": (["modl"], {}, "modl is not a folder", "did you mean 'model'"),
    "torn weights": (torn, {}, "model.safetensors is cut off"),
    "lost base": (lost_base, {}, "gone, which is not there"),
    "unknown key": (None, {"num_promts": 64}, "unknown key 'num_promts'", "did you mean 'num_prompts'"),
    "float": (None, {"rl_steps": 2.5}, "rl_steps must be int, got the float 2.5"),
    "few prompts": (None, {"num_prompts": 8}, "num_prompts is 8, but must be at least 64"),
    "few samples": (None, {"num_samples": 4}, "num_samples is 4, but must be at least 8"),
    "batch": (None, {"batch_size": 20}, "multiple of num_samples (8), such as 16"),
    "no batch": (None, {"batch_size": 0}, "multiple of num_samples (8), such as 8"),
    "negative RL": (None, {"rl_steps": -1}, "rl_steps is -1, but must be at least 0"),
    "no prompts": (None, {"dataset_name": ...}, "dataset_name is missing"),
    "lost prompts": (None, {"dataset_name": "row.jsonl"}, "row.jsonl does not exist", "'rows.jsonl'"),
    "no rewards": (None, {"reward_funcs": ...}, "reward_funcs is missing"),
    "reward's column": (None, {"reward_funcs": ["rewards.py:stream"]}, "needs 'none'"),
    "nothing held out": (None, {"rl_steps": 2}, "rl_steps needs eval_dataset_name"),
    "RL at rate 0": (None, {**RL, "learning_rate": 0.0}, "rl_steps needs a learning_rate above 0"),
    "trained on": (None, {**RL, "eval_dataset_name": "rows.jsonl"}, "64 of 64 prompts of eval_dataset_name are in"),
    "adapter twice": (None, {**RL, "use_peft": True, "lora_r": 0}, "lora_r is 0, but must be at least 1"),
    "output": (None, {"output": "rows.jsonl/out"}, "rows.jsonl", "is a file"),
    "lost reference": (None, {"reference": "./modl"}, "reference: ./modl does not exist", "did you mean 'model'"),
    "a run as reference": (None, two_candidates, "holds 2 candidates, but must be one model, such as", "step-20"),
    "temperature": (None, {"temperature": 0.0}, "temperature is 0.0, but must be above 0"),
}


@pytest.mark.parametrize("checkpoints, changes, parts", [(a, b, c) for a, b, *c in REFUSED.values()], ids=REFUSED)
def test_refusals(project, monkeypatch, checkpoints, changes, parts):
    monkeypatch.setattr(probe, "probe", lambda *_: pytest.fail("a model was loaded"))
    if checkpoints is None:
        names = [project.model]
    else:
        names = [checkpoints(project)] if callable(checkpoints) else [str(project.folder / one) for one in checkpoints]
    with pytest.raises(InputError) as error:
        probe.main([*names, *project(**(changes(project) if callable(changes) else changes))])
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert not (project.folder / "out").exists()


def test_golds_that_no_answer_can_earn_are_refused(project, monkeypatch):
    monkeypatch.setattr(probe, "probe", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(SHARED_GRADERS, "grade", lambda answers, deadline_s: [Grade(0.0)] * len(answers))
    rows = [{"prompt": f"say {number}", "solution": str(number)} for number in range(64)]
    (project.folder / "golds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for setting in ("dataset_name", "eval_dataset_name"):
        with pytest.raises(InputError, match=f"{setting}: 64 of 64 golds .* cannot be earned with math_reward"):
            probe.main([project.model, *project(**{setting: "golds.jsonl", "reward_funcs": ["math_reward"]})])
