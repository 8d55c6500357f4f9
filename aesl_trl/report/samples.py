"""The report's chapter of samples side by side: completions of the same prompts before, during and after SFT.

Left out: which samples are saved (training/callback.py), and how their diversity is measured (diversity/figures.py).
"""

from collections import Counter
from typing import Any

from .parts import Section, clip
from .runs import Arm, Run, mean, read_samples, turning_point


PROMPTS_SHOWN = 4
SAMPLE_CHARACTERS = 600
PROMPT_CHARACTERS = 1200
SUCCESS = 1.0  # a sample is right when its first reward function gives this


def samples(arms: list[Arm], k: int) -> Section:
    title, run = "The model's own samples", next((run for run in arms[0].runs if run.samples), None)
    if run is None:
        see = "Completions of the same prompts before, during and after SFT would stand here."
        return Section("samples", title, see, gap=f"{arms[0].label} has no samples.")
    titles = _sample_steps(run)
    rows = {step: {row.get("prompt_index", 0): row for row in read_samples(run.samples[step])} for step in titles}
    counts = {step: [len(set(row["completions"])) for row in by_index.values()] for step, by_index in rows.items()}
    different = [f"{mean(numbers):.1f} at step {step}" for step, numbers in counts.items()]
    shown = sorted(set.intersection(*map(set, rows.values())))[:PROMPTS_SHOWN]
    step = run.selection.get("step")
    return Section(
        "samples",
        title,
        f"Different completions per prompt: {', '.join(different)}; identical ones are shown once, with their number. "
        f"The first {len(shown)} prompts, not picked.",
        gap=f"The selected step {step} has no samples." if isinstance(step, int) and step not in run.samples else "",
        prompts=[_prompt(index, {step: rows[step][index] for step in rows}, titles) for index in shown],
        reading="✓ or ✗: the first reward function's verdict.",
    )


def _sample_steps(run: Run) -> dict[int, str]:
    """Measured steps to lay side by side -> their titles: the first, the turning point, the selected one, the last."""
    steps = sorted(run.samples)
    roles = [
        (steps[0], "before SFT" if steps[0] == 0 else "first measured"),
        (turning_point(run).step, "turning point"),
        (run.selection.get("step"), "selected"),
        (steps[-1], "last measured"),
    ]
    named = {step: [role for at, role in roles if at == step] for step in steps}
    return {step: f"step {step}: {', '.join(names)}" for step, names in named.items() if names}


def _prompt(index: int, row_of: dict[int, dict], titles: dict[int, str]) -> dict:
    text = _prompt_text(next(iter(row_of.values())).get("prompt", ""))
    columns = [_column(titles[step], row) for step, row in row_of.items()]
    return {"index": index, "text": clip(text, PROMPT_CHARACTERS)[0], "columns": columns}


def _prompt_text(prompt: Any) -> str:
    """A prompt as text: itself, or the messages of a conversation, a role before each."""
    if isinstance(prompt, list):
        messages = [message if isinstance(message, dict) else {"content": message} for message in prompt]
        return "\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in messages)
    return str(prompt)


def _column(title: str, row: dict) -> dict:
    texts, rewards = row["completions"], row.get("rewards")
    counts = Counter(texts)
    cut = {text for text, was_cut in zip(texts, row.get("truncated") or [], strict=False) if was_cut}
    firsts = [_first_reward(reward) for reward in rewards] if rewards else [None] * len(texts)
    right = sum(reward is not None and reward >= SUCCESS for reward in firsts)
    summary = f"{len(counts)} different of {len(texts)}" + (f", {right} right" if rewards else "")
    completions = [_completion(text, n, firsts[texts.index(text)], text in cut) for text, n in counts.most_common()]
    return {"title": title, "summary": summary, "completions": completions}


def _first_reward(reward: Any) -> float | None:
    first = reward[0] if isinstance(reward, list) and reward else reward
    return first if isinstance(first, int | float) else None


def _completion(text: str, count: int, reward: float | None, cut: bool) -> dict:
    shown, hidden = clip(text, SAMPLE_CHARACTERS)
    notes = [f"… {hidden} more characters"] * bool(hidden) + ["cut at the length limit"] * cut
    kind, mark = ("", "") if reward is None else ("ok", "✓") if reward >= SUCCESS else ("no", "✗")
    if reward is not None and 0 < reward < SUCCESS:
        mark = f"{reward:.1g}"
    return {"text": shown or "(empty)", "count": count, "kind": kind, "mark": mark, "more": "; ".join(notes)}
