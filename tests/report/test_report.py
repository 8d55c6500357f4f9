"""The report on fake run folders, written as the stages write them: what is there is shown, what is not is named."""

import json
import math
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from aesl_trl.errors import InputError
from aesl_trl.files import append_jsonl, write_json, write_jsonl
from aesl_trl.report import report
from aesl_trl.report.parts import spread
from aesl_trl.report.plots import coloured, running_mean
from aesl_trl.report.report import main, write_report
from aesl_trl.report.runs import Run, read_arms
from aesl_trl.report.sections import sections_of


# --- fake runs: the shape of the embedded task's curves ---

STEPS = [0, 10, 20, 40, 60, 80, 100, 150, 200, 300, 400, 600, 800]
SKILLS = ["reverse", "up", "down", "left", "right", "plus", "nine", "swap"]
HOSTILE = [
    "<script>alert('x')</script>",
    '<img src=x onerror="alert(1)"> & \'quotes\' "double" </code></li>',
    "naïve 東京 🙂 \u202eright to left\u202c \ud83d \x00\x1b[31m",
    "very long " * 400,
    "",
    "$x_1^{2$ \\frac{{ %s {{ 7 * 7 }} {% raw %}",
]


def _at(step: float, points: dict[int, float]) -> float:
    """Linear between the points."""
    known = sorted(points)
    low = max((p for p in known if p <= step), default=known[0])
    high = min((p for p in known if p >= step), default=known[-1])
    share = 0 if high == low else (step - low) / (high - low)
    return points[low] + share * (points[high] - points[low])


CURVES = {
    "nll": {
        "entropy": {0: 0.21, 10: 0.25, 20: 0.32, 40: 0.25, 60: 0.20, 100: 0.12, 200: 0.10, 800: 0.07},
        "pass@1": {0: 0.15, 20: 0.11, 60: 0.26, 200: 0.27, 800: 0.26},
        "pass@8": {0: 0.57, 10: 0.63, 40: 0.49, 100: 0.38, 800: 0.32},
        "mixed": {0: 0.57, 10: 0.62, 60: 0.44, 100: 0.23, 800: 0.09},
        "nll": {0: 2.0, 40: 0.8, 100: 0.35, 800: 0.05},
    },
    "aesl": {
        "entropy": {0: 0.21, 10: 0.25, 20: 0.32, 40: 0.25, 60: 0.23, 800: 0.21},
        "pass@1": {0: 0.15, 20: 0.10, 60: 0.23, 800: 0.22},
        "pass@8": {0: 0.57, 10: 0.63, 40: 0.49, 100: 0.42, 800: 0.41},
        "mixed": {0: 0.57, 10: 0.62, 60: 0.48, 800: 0.42},
        "nll": {0: 2.0, 40: 0.8, 100: 0.5, 800: 0.36},
    },
}
FINAL = {"base": 0.43, "nll_turning_point": 0.78, "nll_last": 0.80, "aesl": 0.87}


def _figures(loss: str, step: int, noise) -> dict:
    curve = {key: _at(step, points) + noise() for key, points in CURVES[loss].items()}
    mixed, right = max(0.0, curve["mixed"]), curve["pass@1"] / 3
    return {
        "entropy": curve["entropy"],
        "self_bleu": 0.95 - 1.2 * curve["entropy"] + noise(),
        **{f"distinct_{n}": 0.1 * n + curve["entropy"] for n in (1, 2, 3, 4)},
        "unique": 0.2 + curve["entropy"],
        "length": 14.0,
        "truncated": 0.0,
        "reward": curve["pass@1"],
        "pass@1": curve["pass@1"],
        "pass@2": 0.7 * curve["pass@1"] + 0.3 * curve["pass@8"],
        "pass@4": 0.4 * curve["pass@1"] + 0.6 * curve["pass@8"],
        "pass@8": curve["pass@8"],
        "groups_all_right": right,
        "groups_mixed": mixed,
        "groups_all_wrong": 1 - mixed - right,
    }


def _sample_row(index: int, step: int, different: int, rng, texts=SKILLS) -> dict:
    digits = [rng.randrange(10) for _ in range(6)]
    pool = [f"{name} {' '.join(map(str, rng.sample(digits, 6)))}" for name in rng.sample(texts, different)]
    completions = [rng.choice(pool) for _ in range(8)]
    return {
        "prompt_index": index,
        "prompt": [{"role": "user", "content": f"§{index} {' '.join(map(str, digits))}"}],
        "completions": completions,
        "num_tokens": [14] * 8,
        "truncated": [False] * 8,
        "entropy": [0.2] * 8,
        "rewards": [[1.0 if text == pool[0] and index % 2 else 0.0] for text in completions],
    }


def _position_rows(loss: str) -> list[dict]:
    edges = [1, 2, 4, 8, 16, 32]
    rows = []
    for step in range(10, 801, 10):
        low = [min(0.95, max(0.02, 0.9 - step / 900 - 0.1 * i)) for i in range(5)]
        weights = low if loss == "aesl" else [None] * 5
        row = {
            "step": step,
            "position": edges,
            "weight": [*weights, None],
            "temperature": [*[3 * w + 0.1 for w in low], None],
        }
        rows.append(
            {**row, "count": [32, 32, 64, 128, 200, 0]} | ({"temperature": [None] * 6} if loss == "nll" else {})
        )
    return rows


def fake_sft(folder: Path, loss: str, rule: str, seed: int, rng) -> dict:
    """Write an SFT output folder; returns the figures at the selected step."""

    def noise() -> float:
        return rng.gauss(0, 0.004)

    rows = [{"step": step, "num_prompts": 96, "num_samples": 8, **_figures(loss, step, noise)} for step in STEPS]
    rows[7]["self_bleu"] = math.nan
    write_jsonl(folder / "diversity.jsonl", rows)
    history = []
    for step in range(5, 801, 5):
        nll = _at(step, CURVES[loss]["nll"]) * (1 + rng.gauss(0, 0.08))
        weight = max(0.05, 0.9 - 0.8 * (1 - math.exp(-step / 150))) if loss == "aesl" else 1.0
        added = {
            "weight_mean": weight,
            "weight_low_share": 1 - weight,
            "temperature_mean": 3 * nll,
            "weight_eos": weight / 3,
        }
        history.append({"step": step, "loss": nll * weight, "nll": nll, **(added if loss == "aesl" else {})})
        if step % 100 == 0:
            history.append({"step": step, "eval_nll": nll * 1.3, "eval_runtime": 1.0})
    history[20]["nll"] = math.nan
    write_json(folder / "trainer_state.json", {"log_history": [*history, {"step": 800, "train_loss": 0.4}]})
    write_jsonl(folder / "positions.jsonl", _position_rows(loss))
    settings = {
        "stage": "sft",
        "cold_start_loss": loss,
        "t_scaling": 3.0,
        "prefix_mode": "inclusive",
        "selection": rule,
    }
    settings |= {"model": "base", "seed": seed, "max_steps": 800, "learning_rate": 3e-4}
    write_json(folder / "run.json", settings | {"versions": {"trl": "1.16.0", "torch": "2.13.0"}})
    for step in (0, 20, 100, 800):
        different = {0: 4, 20: 6, 100: 3 if loss == "nll" else 4, 800: 2 if loss == "nll" else 4}[step]
        write_jsonl(folder / f"samples/step-{step}.jsonl", [_sample_row(i, step, different, rng) for i in range(6)])
    step = 20 if rule == "turning_point" else 800
    reason = "entropy rose to 0.32 at step 20 and fell for 3 measurements" if step == 20 else "the last candidate"
    evidence = {
        "turning_point": {"entropy": {"step": 20, "peak": 0.32, "values": [0.21, 0.25, 0.32]}},
        "measured": None,
    }
    chosen = {"rule": rule, "applied": rule, "step": step, "reason": reason, "evidence": evidence, "metric": "entropy"}
    write_json(folder / "selection.json", {**chosen, "candidates": [10, 20, 40, 800], "path": "selected"})
    return rows[STEPS.index(step)]


def fake_run(folder: Path, arm: str, seed: int = 0, *, weights: bool = False) -> Path:
    """Write a whole chain run of the arm (base, nll_last, nll_turning_point or aesl), shaped as the prototype's."""
    rng = random.Random(f"{arm}-{seed}")
    loss = arm.split("_")[0]
    start = _figures("nll", 0, lambda: rng.gauss(0, 0.008))
    if loss != "base":
        rule = "turning_point" if arm == "nll_turning_point" else "last"
        start = fake_sft(folder / "sft", loss, rule, seed, random.Random(f"{loss}-{seed}"))
        shutil.copy(folder / "sft/selection.json", folder / "selection.json")
    final = FINAL[arm] + rng.gauss(0, 0.04)
    history = []
    for step in range(1, 161):
        reward = start["pass@1"] + (final - start["pass@1"]) * (1 - math.exp(-step / 45)) + rng.gauss(0, 0.05)
        noise = abs(rng.gauss(0, 0.03))
        row = {"step": step, "reward": reward, "reward_std": 0.3 * math.exp(-step / 90) + noise, "loss": 0.0}
        row |= {"frac_reward_zero_std": 0.5 + noise, "entropy": start["entropy"] * math.exp(-step / 120) + noise / 4}
        history.append(row | {"completions/clipped_ratio": noise / 5})
    write_json(folder / "grpo/trainer_state.json", {"log_history": history})
    write_json(
        folder / "grpo/run.json",
        {"stage": "grpo", "num_generations": 8, "learning_rate": 5e-4, "versions": {"trl": "1.16.0"}},
    )
    end = {**start, "pass@1": final, "pass@8": min(1.0, final + 0.08), "pass@1_interval": [final - 0.06, final + 0.06]}
    begin = {**start, "pass@1_interval": [start["pass@1"] - 0.05, start["pass@1"] + 0.05]}
    how = {"num_prompts": 96, "num_samples": 8, "temperature": 1.0, "max_new_tokens": 24, "seed": 0}
    write_json(folder / "evaluation.json", {"models": {"start": begin, "final": end}, **how})
    checks = {"eos_agree": True, "template_kept": True, "reload_log_probs": True}
    handoff = {
        "mode": "full",
        "source": "selected",
        "base": None,
        "checks": checks,
        "log_probs_max_difference": 1.2e-7,
    }
    write_json(folder / "handoff.json", {**handoff, "samples": {"num": 8, "stopped": 8}, "eos_token_id": [2]})
    stages = {name: {"status": "done", "seconds": 61.2} for name in ("sft", "handoff", "grpo", "eval")}
    sft = {"sft_dir": "sft"} if loss != "base" else {"sft_dir": None}
    write_json(folder / "chain.json", {"seed": seed, **sft, "stages": stages})
    if weights:
        (folder / "grpo/model.safetensors").write_bytes(b"")
    return folder


# --- what the page has to hold ---


class Page(HTMLParser):
    """Tags, their attributes and the text of a page, as a browser takes them."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def _page(runs, compare=(), **kwargs) -> Page:
    return Page(write_report(runs, compare, **kwargs).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """A live AESL run with its report, laid over two seeds each of three recorded arms."""
    root = tmp_path_factory.mktemp("chain")
    live = fake_run(root / "runs/aesl", "aesl", weights=True)
    arms = ("base", "nll_last", "nll_turning_point")
    recorded = [fake_run(root / f"results/{arm}/seed-{seed}", arm, seed) for arm in arms for seed in (0, 1)]
    write_report([live], recorded)
    return live


@pytest.fixture
def undrawn(monkeypatch):
    """Leave the plots out where only the texts matter: other tests draw them."""
    monkeypatch.setattr(report, "svg", lambda panel, name: "")
    monkeypatch.setattr(report, "png", lambda panels: b"")


def test_every_plot_of_the_story_is_drawn_in_the_page_and_beside_it(chain):
    page = Page((chain / "report.html").read_text(encoding="utf-8"))
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("figure", "aria-label")]
    assert [label.split(":")[0] for label in labels] == [
        *("pass@1", "pass@8"),
        "Entropy of own samples (nats per token)",
        "Self-BLEU of own samples (lower",
        "Distinct 2-grams (share)",
        *("pass@1", "pass@8"),
        *("Prompts by outcome", "Prompts by outcome"),  # AESL, and the one nll run that two arms selected from
        *("Plain nll (nats per token)", "Loss as trained (weighted for AESL)", "Held-out nll (nats per token)"),
        *("Mean weight", "Share of weights under 0.1", "Mean temperature", "Weight at the end-of-sequence token"),
        *("Mean weight by position", "Mean temperature by position"),
        *("Reward", "Standard deviation of the reward in a group", "Share of groups with equal rewards (no signal)"),
        *("Entropy (nats per token)", "Share of completions cut at the length limit"),
    ]
    roots = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "viewbox")]
    assert len(roots) == len(labels)
    markdown = (chain / "report.md").read_text(encoding="utf-8")
    for name in ("headline", "diversity", "loss", "positions", "rl"):
        assert (chain / f"report_{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(report_{name}.png)" in markdown


def test_the_page_is_self_contained_and_runs_no_script(chain):
    html = (chain / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not re.findall(r"https?://|@import|url\((?!#)", html)
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(page.tags)
    references = [value for _, name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert references and all(value.startswith("#") for value in references)


def test_clip_paths_and_markers_of_one_panel_do_not_reach_into_another(chain):
    page = Page((chain / "report.html").read_text(encoding="utf-8"))
    clips = [value for tag, name, value in page.attributes if tag == "clippath" and name == "id"]
    assert clips and len(clips) == len(set(clips))
    ids = {value for _, name, value in page.attributes if name == "id"}
    used = {value[1:] for tag, name, value in page.attributes if tag == "use" and name == "xlink:href"}
    assert used and used <= ids


def test_colours_follow_the_theme(chain):
    html = (chain / "report.html").read_text(encoding="utf-8")
    body = html[html.index("<body>") :]
    assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", body)
    assert "prefers-color-scheme: dark" in html


def test_headline_table_holds_the_figures_of_the_files(chain):
    markdown = (chain / "report.md").read_text(encoding="utf-8")
    models = json.loads((chain / "evaluation.json").read_text())["models"]
    row = next(line for line in markdown.splitlines() if line.startswith("| aesl (this run)"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    start, final = models["start"], models["final"]
    low, high = final["pass@1_interval"]
    assert cells[1:3] == [r"AESL, 800 steps t\_scaling 3", "step 800 last"]
    assert cells[4:8] == [f"{start[key]:.2f}" for key in ("pass@8", "entropy", "self_bleu", "groups_mixed")]
    assert cells[8] == rf"{final['pass@1']:.2f} \[{low:.2f}, {high:.2f}\]"
    assert "| nll turning point (recorded) 2 seeds | nll, 800 steps | step 20 turning point |" in markdown


def test_recorded_runs_are_labelled_and_the_live_one_is_not(chain):
    words = Page((chain / "report.html").read_text(encoding="utf-8")).words
    assert "aesl this run" in words
    for name in ("base", "nll last", "nll turning point"):
        assert f"{name} recorded" in words
    assert "aesl recorded" not in words and "aesl (recorded)" not in words


def readiness(step, signal, text="ready"):
    """As aesl probe writes it; nan is null in a file."""
    figures = {"entropy": 0.25, "pass@1": 0.14, "signal": signal, "eos_prob": math.nan}
    reasons = [f"{signal} of the groups differ <in> reward"]
    return {
        "name": f"step-{step}",
        "step": step,
        "verdict": text.split(":")[0],
        "text": text,
        "reasons": reasons,
        "figures": figures,
        "intervals": {"signal": [signal - 0.1, signal + 0.1], "eos_prob": [math.nan, math.nan]},
    }


def test_readiness_of_the_start_and_of_the_candidates(tmp_path, undrawn):
    run, other = fake_run(tmp_path / "aesl", "aesl", weights=True), fake_run(tmp_path / "base", "base")
    assert "Readiness" not in _page([run], [other]).words
    write_json(run / "readiness.json", {"checkpoints": [readiness(800, 0.3)]})
    late = readiness(800, 0.04, "collapsed: go back to step 20")
    write_json(run / "sft/readiness.json", {"checkpoints": [readiness(20, 0.5), late]})
    words = _page([run], [other]).words
    assert "aesl, step-800: ready. 0.3 of the groups differ <in> reward." in words
    lines = (run / "report.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "step-" in line and "|" in line]
    rows = [row for row in rows if row[1].startswith("step-")]
    assert [row[1:3] for row in rows] == [
        ["step-800", "ready"],
        ["step-20", "ready"],
        ["step-800", "collapsed: go back to step 20"],
    ]
    assert rows[1][5] == r"0.50 \[0.40, 0.60\]" and rows[1][-1] == "–"


@pytest.mark.parametrize(
    "content, part",
    [
        ({"checkpoints": 3}, "'checkpoints' is 3, not a list: run aesl probe again"),
        ({"checkpoints": [3]}, "'checkpoints', row 1 is 3, not an object"),
        (
            {"checkpoints": [{"figures": {}}]},
            "row 1 has no 'intervals': another version wrote it, or it was edited: run aesl",
        ),
        (
            {"checkpoints": [{**readiness(1, 0.5), "figures": {"signal": "much"}}]},
            "'signal' is \"much\", not a number",
        ),
        ({"checkpoints": [{**readiness(1, 0.5), "intervals": {"signal": [1]}}]}, "'signal' is [1], not a pair"),
    ],
)
def test_a_broken_readiness_is_said(tmp_path, content, part):
    run = fake_run(tmp_path / "aesl", "aesl")
    write_json(run / "readiness.json", content)
    with pytest.raises(InputError) as error:
        Run(run)
    assert part in str(error.value) and "readiness.json" in str(error.value)


def test_a_finished_run_without_weights_is_recorded_even_when_named_first(tmp_path):
    run = fake_run(tmp_path / "results/aesl/seed-0", "aesl")
    assert Run(run).recorded
    (run / "selected").mkdir()
    (run / "selected/model.safetensors").write_bytes(b"")
    assert not Run(run).recorded


def test_seeds_are_one_arm_and_arms_keep_their_colour(tmp_path):
    paths = {arm: [fake_run(tmp_path / arm / f"seed-{i}", arm, i) for i in (0, 1)] for arm in FINAL}
    arms = coloured(read_arms([path for runs in paths.values() for path in runs]))
    assert [(arm.name, len(arm.runs)) for arm in arms] == [(arm, 2) for arm in FINAL]
    expected = {"base": "base", "nll_turning_point": "stop", "nll_last": "nll", "aesl": "aesl"}
    assert {arm.name: arm.colour for arm in arms} == expected
    assert coloured(read_arms(paths["nll_last"]))[0].colour == "nll"


def test_the_mean_over_seeds_stands_in_the_table(tmp_path, undrawn):
    runs = [fake_run(tmp_path / "aesl" / f"seed-{seed}", "aesl", seed) for seed in (0, 1, 2)]
    finals = [json.loads((run / "evaluation.json").read_text())["models"]["final"]["pass@1"] for run in runs]
    words = _page(runs).words
    assert f"{sum(finals) / 3:.2f} {min(finals):.2f} to {max(finals):.2f}" in words
    assert "aesl recorded 3 seeds" in words


def test_hostile_texts_are_shown_and_never_read_as_markup(tmp_path):
    run = fake_run(tmp_path / "<b>&\"'$x$|{{ 1 }}", "aesl", weights=True)
    rows = [{**_sample_row(i, 0, 3, random.Random(i)), "prompt": HOSTILE[i]} for i in range(3)]
    rows = [{**row, "completions": [*HOSTILE, *HOSTILE[:2]]} for row in rows]
    for step in (0, 20, 100, 800):
        path = run / f"sft/samples/step-{step}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))  # ASCII, so that lone surrogates survive
    selection = json.loads((run / "selection.json").read_text())
    write_json(run / "selection.json", {**selection, "reason": HOSTILE[0]})
    html = write_report([run], title="</title><script>1</script>").read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "img"} & set(page.tags)
    assert page.tags.count("b") == 3  # the numbers of three prompts, none from the run's name
    assert "<script>alert('x')</script>" in page.words and "{{ 7 * 7 }}" in page.words
    assert "\u202e" not in html and "\x1b" not in html and "\x00" not in html
    assert "3400 more characters" in page.words
    assert html.count("very long ") <= 60 * 3 * 3
    assert "<script>" not in (run / "report.md").read_text(encoding="utf-8")


def test_identical_completions_are_counted_and_marked(tmp_path, undrawn):
    run = fake_run(tmp_path / "aesl", "aesl")
    row = {"prompt_index": 0, "prompt": "sort", "completions": ["up 1", "down 2", "up 1", "up 1"]}
    row |= {"rewards": [[1.0], [0.0], [1.0], [1.0]], "truncated": [False, True, False, False]}
    for step in (0, 20, 100, 800):
        write_jsonl(run / f"sft/samples/step-{step}.jsonl", [row])
    words = _page([run]).words
    assert "2 different of 4, 3 right ×3 ✓ up 1 ×1 ✗ down 2 cut at the length limit" in words
    assert "step 0: before SFT" in words and "step 800: selected, last measured" in words


PARTS = {
    "sft/diversity.jsonl": "diversity measurements (diversity.jsonl)",
    "sft/trainer_state.json": "the SFT log (trainer_state.json)",
    "sft/positions.jsonl": "weights by position (positions.jsonl)",
    "sft/samples": "samples (samples/)",
    "sft/run.json": "the SFT settings (run.json)",
    "handoff.json": "the handoff (handoff.json)",
    "evaluation.json": "the evaluation (evaluation.json)",
    "grpo/trainer_state.json": "the RL log (grpo/trainer_state.json)",
}


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named_and_the_rest_shown(tmp_path, part, undrawn):
    run = fake_run(tmp_path / "aesl", "aesl", weights=True)
    (shutil.rmtree if (run / part).is_dir() else Path.unlink)(run / part)
    assert f"Missing in aesl: {PARTS[part]}." in _page([run]).words


def test_a_run_that_has_only_begun_gets_a_page(tmp_path):
    run = fake_run(tmp_path / "aesl", "aesl")
    for path in [path for path in run.rglob("*") if path.is_file()]:
        if path.name not in ("diversity.jsonl", "run.json"):
            path.unlink()
    write_json(run / "chain.json", {"sft_dir": "sft", "seed": 0})
    first = (run / "sft/diversity.jsonl").read_text().splitlines()[0]
    (run / "sft/diversity.jsonl").write_text(first + "\n")
    page = _page([run])
    assert "aesl has not been evaluated after RL" in page.words
    assert "No evaluation after RL yet: aesl." in page.words
    assert "figure" in page.tags


def test_a_base_arm_alone_says_that_it_has_no_cold_start(tmp_path, undrawn):
    words = _page([fake_run(tmp_path / "base", "base", weights=True)]).words
    assert "RL from the base model" in words
    assert "base has no diversity measurements (it starts RL from the base model)." in words


def test_an_sft_folder_is_a_run(tmp_path, undrawn):
    run = fake_run(tmp_path / "mine", "nll_turning_point")
    page = _page([run / "sft"], output=tmp_path / "out")
    assert "From cold start to RL: mine" in page.words
    assert "Start of RL as measured during SFT" in page.words
    assert (tmp_path / "out/report.md").exists() and not (run / "sft/report.html").exists()


def test_a_run_under_way_is_read_from_its_newest_checkpoint(tmp_path):
    run = fake_run(tmp_path / "aesl", "aesl")
    (run / "grpo/trainer_state.json").unlink()
    for step in (9, 20, 100):
        history = [{"step": step, "reward": 0.5}]
        write_json(run / f"grpo/checkpoint-{step}/trainer_state.json", {"log_history": history})
    assert [row["step"] for row in Run(run).grpo_log] == [100]


def test_a_step_measured_again_after_a_resume_counts_once(tmp_path):
    run = fake_run(tmp_path / "aesl", "aesl")
    append_jsonl(run / "sft/diversity.jsonl", {"step": 20, "entropy": 0.5})
    rows = Run(run).diversity
    assert [row["step"] for row in rows] == STEPS
    assert next(row["entropy"] for row in rows if row["step"] == 20) == 0.5


def test_a_record_without_its_sft_folder_is_not_taken_for_the_base_arm(tmp_path, undrawn):
    run = fake_run(tmp_path / "nll_last/seed-0", "nll_last")
    shutil.rmtree(run / "sft")
    words = _page([run]).words
    assert "RL from the base model" not in words
    assert "Missing in nll last: the SFT settings (run.json)" in words


def test_a_turning_point_is_marked_whatever_rule_selected(chain, tmp_path, undrawn):
    assert "Dotted line: this run's diversity turning point" in Page((chain / "report.html").read_text("utf-8")).words
    flat = fake_run(tmp_path / "aesl", "aesl")
    write_jsonl(flat / "sft/diversity.jsonl", [{"step": step, "entropy": 0.2} for step in STEPS])
    assert "No turning point in aesl:" in _page([flat]).words


def test_runs_evaluated_differently_are_pointed_out(tmp_path, undrawn):
    runs = [fake_run(tmp_path / name, name) for name in ("aesl", "base")]
    evaluation = json.loads((runs[1] / "evaluation.json").read_text())
    write_json(runs[1] / "evaluation.json", {**evaluation, "num_samples": 16})
    assert "The runs were not evaluated alike: num_samples is aesl 8, base 16." in _page(runs).words


WRONG = [
    *("", "{", "[]", "3", '"x"', "{}", "\udcff", '{"models": 3}', '{"models": {"start": {"pass@1": "0.3"}}}'),
    *('{"log_history": {}}', '{"log_history": [{"step": "1"}]}', '{"log_history": [{"step": 1, "reward": "x"}]}'),
    *('{"step": 1, "entropy": "high"}', '{"step": 1.5}', '{"step": 3}', '{"step": true}', '{"versions": [1]}'),
    *('{"step": 1, "position": [1], "weight": ["a"], "temperature": [1]}', '{"completions": "abc"}'),
]
FILES = [*PARTS, "selection.json", "chain.json", "grpo/run.json", "sft/samples/step-800.jsonl"]


@pytest.mark.parametrize("file", [file for file in FILES if file != "sft/samples"])
def test_a_broken_file_is_one_line_that_names_it(tmp_path, file):
    run = fake_run(tmp_path / "aesl", "aesl")
    refused = 0
    for content in WRONG:
        (run / file).write_bytes(content.encode("utf-8", "surrogateescape"))
        try:
            sections_of(read_arms([run]))
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and Path(file).name in str(error)
    assert refused >= 5


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path, capsys):
    fake_run(tmp_path / "aesl", "aesl")
    (tmp_path / "notes").mkdir()
    for argv, expected in (
        ([str(tmp_path / "notes")], "holds no run"),
        ([str(tmp_path / "aesI")], "did you mean 'aesl'?"),
        ([], "RUN"),
        ([str(tmp_path / "aesl"), "--outptu", "x"], "--outptu"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and error.startswith("aesl report: ") and error.count("\n") == 1
        assert expected in error


def test_main_prints_where_the_page_is(tmp_path, capsys, undrawn):
    run, other = fake_run(tmp_path / "aesl", "aesl"), fake_run(tmp_path / "base", "base")
    main([str(run), "--compare", str(other), "--output", str(tmp_path / "out"), "--title", "A & B"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "out/report.html")
    assert "<h1>A &amp; B</h1>" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_labels_keep_apart_and_inside():
    assert spread([0.5, 0.5, 0.5], [0.1] * 3, 0, 1) == pytest.approx([0.5, 0.6, 0.7])
    assert spread([1.0, 1.0], [0.1] * 2, 0, 1) == pytest.approx([0.9, 1.0])
    assert spread([0.2, 0.9], [0.1] * 2, 0, 1) == pytest.approx([0.2, 0.9])


def test_running_mean_skips_gaps_and_leaves_short_series_alone():
    short = [1.0, math.nan]
    assert running_mean(short) is short
    assert running_mean([2.0] * 30 + [math.nan] + [2.0] * 30) == [2.0] * 61


def test_report_loads_neither_torch_nor_trl():
    code = (
        "import aesl_trl.report.report, sys; print([m for m in ('torch', 'trl', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
