"""README: short enough to read, each block of it run as it is printed, each figure of it as recorded."""

import json
import re
from pathlib import Path

import datasets
import decide_skills_chain
import yaml
from printed import blocks, run_printed, shrink, swapped

from aesl_trl import files
from aesl_trl.cli import main
from aesl_trl.commands import COMMANDS
from aesl_trl.compare.table import starts_of, summary


ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
ROWS = [
    {"prompt": f"What is {n} + 1?", "completion": f" \\boxed{{{n + 1}}}", "solution": str(n + 1)} for n in range(8)
]


def test_it_is_read_in_some_minutes():
    assert len(TEXT.splitlines()) <= 150 and len(TEXT.split()) <= 1500


def test_from_the_quick_start_to_grpo(tmp_path, tiny_model_dir, monkeypatch, capsys):
    """Run its blocks in their order: the trainer, the three commands, and GRPO from the folder that they made."""
    quick_start, _, rl = blocks(README)
    for name in ("train", "test"):
        files.write_text(tmp_path / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    grpo = {
        "dataset_name": "test.jsonl",
        "reward_funcs": ["math_reward"],
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "num_prompts": 64,
        "num_samples": 8,
        "use_cpu": True,
        "bf16": False,
    }
    (tmp_path / "grpo.yaml").write_text(yaml.safe_dump(grpo))
    monkeypatch.chdir(tmp_path)
    load_dataset = datasets.load_dataset
    with monkeypatch.context() as small:
        shrink(small, ROWS)
        small.setattr(datasets, "load_dataset", load_dataset)  # the block's own files
        found = run_printed(swapped(quick_start, {"Qwen/Qwen2.5-1.5B-Instruct": tiny_model_dir}), README)
    assert found["trainer"].state.global_step == 4
    out = capsys.readouterr().out
    assert all(
        re.search(line, out) for line in (r"step 0: entropy \S+ \[.*\], pass@1 .*, mixed groups", "selected step")
    )
    (_, commands) = blocks(README, "bash")
    for line in commands.splitlines():
        main(line.split("#")[0].split()[1:])
    out = capsys.readouterr().out
    assert "-> cold-start/_aesl/selected; next: aesl handoff cold-start" in out
    assert re.search(
        r"^handoff: step \d+, copied, checked .* -> \S*cold-start/_aesl/handoff; next: GRPOTrainer", out, re.M
    )
    shrink(monkeypatch, ROWS)
    given = {
        "reward": lambda completions, **_: [float(len(text)) for text in completions],
        "problems": datasets.Dataset.from_list(ROWS).select_columns("prompt"),
    }
    assert run_printed(rl, README, given)["trainer"].state.global_step == 1


def test_every_command_has_its_row():
    table = TEXT.split("## Commands")[1].split("## ")[0]
    assert set(re.findall(r"`aesl (\w+)`", table)) == set(COMMANDS)


START_ROWS = {
    "plain nll, last step": ("nll", "last"),
    "plain nll, turning point": ("nll", "turning_point"),
    "plain nll averaged with its base": ("nll", "mix"),
    "AESL at `t_scaling: auto`, last step": ("aesl_auto", "last"),
    "AESL, last step": ("aesl", "last"),
    "AESL, turning point": ("aesl", "turning_point"),
    "no cold start": ("base", None),
}
RECORDS = ("skills-chain-tiny/results/main", "skills-tiny/results/bases", "countdown-tiny/results/main")


def figure(record, row):
    """Return mean and interval of a row over its starts, as the table prints them; a dash where it was not run."""
    starts = [each for each in starts_of(record["cells"]) if (each["method"], each["selection"]) == row]
    if not starts:
        return "-"
    return "{mean:.2f} [{low:.2f}, {high:.2f}]".format(
        **summary([each["after"]["pass@1"] for each in starts], is_share=True)
    )


def test_the_table_is_that_of_the_records():
    """Work out each mean and interval of the table anew from the recorded cells."""
    records = [
        json.loads((ROOT / "recipes" / place / "compare.json").read_text(encoding="utf-8")) for place in RECORDS
    ]
    assert [record["missing"] for record in records] == [[], [], []]
    lines = [
        f"| {name} | {' | '.join(figure(record, row) for record in records)} |" for name, row in START_ROWS.items()
    ]
    for text in (TEXT.split("## Does it help?")[1], (ROOT / "docs/results.md").read_text(encoding="utf-8")):
        table = text.partition("| --- |")[2].partition("\n\n")[0]
        assert [line for line in table.splitlines() if "[" in line] == lines


def test_what_is_recommended_is_what_was_decided():
    """DECISION.md's rule, on the recorded cells, names the start that README recommends and that the demo runs."""
    cells = json.loads((ROOT / "recipes" / RECORDS[0] / "compare.json").read_text(encoding="utf-8"))["cells"]
    assert decide_skills_chain.missing(cells, 2) == []
    units = decide_skills_chain.units_of(cells)
    assert decide_skills_chain.recommended(units) == ("nll/last", [])
    assert "**Which settings?** Plain nll at a low learning rate, and its last step" in TEXT
    assert "$recipe/chain_nll_last.yaml" in (ROOT / "scripts/demo.sh").read_text(encoding="utf-8")
    for page in ("docs/results.md", "recipes/skills-chain-tiny/README.md"):
        assert decide_skills_chain.contrasts(units) in (ROOT / page).read_text(encoding="utf-8")
