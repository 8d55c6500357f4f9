"""The report's chapter of samples side by side: completions of the same prompts before, during and after SFT."""

from collections import Counter
from typing import Any

from ..diversity.figures import Group
from .parts import Section, clip, mean
from .runs import Arm, Run, read_samples, turning_point


PROMPTS_SHOWN = 4
SAMPLE_CHARACTERS = 600
PROMPT_CHARACTERS = 1200
SUCCESS = 1.0  # a sample is right when its first reward function gives at least this


def samples(arm: Arm) -> Section:
    title, run = "The model's own samples", next((run for run in arm.runs if run.samples), None)
    if run is None:
        see = "Completions of the same prompts before, during and after SFT would stand here."
        return Section("samples", title, see, gap=f"{arm.label} has no samples.")
    titles = _sample_steps(run)
    groups = {step: read_samples(run.samples[step]) for step in titles}
    counts = {step: [len(set(group.completions)) for group in found.values()] for step, found in groups.items()}
    different = ", ".join(f"{mean(numbers):.1f} at step {step}" for step, numbers in counts.items())
    shown = sorted(set.intersection(*map(set, groups.values())))[:PROMPTS_SHOWN]
    step = run.selected_step
    return Section(
        "samples",
        title,
        f"Different completions per prompt: {different}; identical ones are shown once, with their number. The first "
        f"{len(shown)} prompts, not picked.",
        gap=f"The selected step {step} has no samples." if step is not None and step not in run.samples else "",
        prompts=[
            {
                "index": index,
                "text": clip(_prompt_text(next(iter(groups.values()))[index].prompt), PROMPT_CHARACTERS)[0],
                "columns": [_column(titles[step], found[index]) for step, found in groups.items()],
            }
            for index in shown
        ],
        reading="✓ or ✗: the first reward function's verdict.",
    )


def _sample_steps(run: Run) -> dict[int, str]:
    """Return the steps to lay side by side with their titles: first, turning point, selected and last."""
    first, last = min(run.samples), max(run.samples)
    roles = [
        (first, "before SFT" if first == 0 else "first measured"),
        (turning_point(run).step, "turning point"),
        (run.selected_step, "selected"),
        (last, "last measured"),
    ]
    named = {step: [role for at, role in roles if at == step] for step in run.samples}
    return {step: f"step {step}: {', '.join(names)}" for step, names in named.items() if names}


def _prompt_text(prompt: Any) -> str:
    """Return a prompt as text: itself, or the messages of a conversation with the role before each."""
    if isinstance(prompt, list):
        messages = [message if isinstance(message, dict) else {"content": message} for message in prompt]
        return "\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in messages)
    return str(prompt or "")


def first_rewards(group: Group) -> list[float | None]:
    """Return the first reward function's value of each sample, None where it has none; empty without rewards."""
    firsts = [reward[0] if isinstance(reward, list) and reward else reward for reward in group.rewards or []]
    return [first if isinstance(first, int | float) else None for first in firsts]


def _column(title: str, group: Group) -> dict:
    texts, counts, rewards = group.completions, Counter(group.completions), first_rewards(group)
    first = dict(zip(reversed(texts), reversed(rewards), strict=False))  # of equal texts, the first one's reward
    cut = {text for text, was_cut in zip(texts, group.truncated or [], strict=False) if was_cut}
    summary = f"{len(counts)} different of {len(texts)}"
    if rewards:
        summary += f", {sum(reward is not None and reward >= SUCCESS for reward in rewards)} right"
    completions = [_completion(text, n, first.get(text), text in cut) for text, n in counts.most_common()]
    return {"title": title, "summary": summary, "completions": completions}


def _completion(text: str, count: int, reward: float | None, cut: bool) -> dict:
    shown, hidden = clip(text, SAMPLE_CHARACTERS)
    notes = {f"… {hidden} more characters": hidden, "cut at the length limit": cut}
    kind, mark = ("", "") if reward is None else ("ok", "✓") if reward >= SUCCESS else ("no", "✗")
    if reward is not None and 0 < reward < SUCCESS:
        mark = f"{reward:.1g}"
    more = "; ".join(note for note, holds in notes.items() if holds)
    return {"text": shown or "(empty)", "count": count, "kind": kind, "mark": mark, "more": more}
