"""Run folders as the stages write them, with curves like those of skills-tiny, and the page as a browser takes it."""

import math
import random
import shutil
from html.parser import HTMLParser
from pathlib import Path

from aesl_trl.files import write_json, write_jsonl
from aesl_trl.report.report import write_report


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


def sample_row(index: int, step: int, different: int, rng, texts=SKILLS) -> dict:
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
            "weight_effective": 0.5 + weight / 2,
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
        write_jsonl(folder / f"samples/step-{step}.jsonl", [sample_row(i, step, different, rng) for i in range(6)])
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


def written_page(runs, compare=(), **kwargs) -> Page:
    return Page(write_report(runs, compare, **kwargs).read_text(encoding="utf-8"))
