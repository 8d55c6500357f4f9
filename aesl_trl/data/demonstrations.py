"""Which solutions a reward can grade, and which demonstrations can serve: right, whole and short enough.

A demonstration is judged as SFT will see it, written by the model's chat template.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..diversity.figures import Group
from ..errors import InputError
from ..models.chat import ChatWriter
from ..progress import bar
from ..rewards.functions import score_groups
from ..rewards.golds import rewards_of_golds, say_lost
from .config import DataArguments
from .output import progress
from .problems import BATCH, Drops, Problem
from .rendered import template_problem


def keep_gradable(problems: list[Problem], reward: Callable, threshold: float, drops: Drops) -> list[Problem]:
    """Return the problems whose solution, given as the answer, is right: RL could earn nothing on the others.

    Raises:
        InputError: a reward of maths can give nothing for more than half of the solutions.
    """
    solutions = [problem.solution for problem in problems]
    rewards = rewards_of_golds(solutions, partial(grade, reward=reward, title="solutions"), right=threshold)
    kept = []
    for problem in problems:
        if rewards[problem.solution] >= threshold:  # false for nan, which stands where the reward does not apply
            kept.append(problem)
        else:
            drops.add(problem.row, problem.id, "not_gradable", problem.solution)
    lost = [problem.solution for problem in problems if not rewards[problem.solution] >= threshold]
    say_lost(reward, lost, len(problems), where="dataset_name")
    return kept


def grade(solutions: list[str], answers: list[str], reward: Callable, title: str = "") -> list[float]:
    """Return the reward of each answer, nan where it does not apply; a bar with the `title` counts the answers."""
    prompt = [{"role": "user", "content": ""}]
    groups = [Group(prompt, [answer], [0], [False], [math.nan]) for answer in answers]
    rows, rewards = [{"prompt": prompt, "solution": solution} for solution in solutions], []
    with bar(len(groups), title, unit="answer", shown=bool(title)) as shown:
        for start in range(0, len(groups), BATCH):
            end = start + BATCH
            graded = score_groups(groups[start:end], rows[start:end], [reward])
            rewards += [group.rewards[0][0] for group in graded]
            shown.update(len(graded))
    return rewards


def count_tokens(tokenizer: Any, texts: list[str]) -> list[int]:
    """Count the tokens of texts that the chat template has written, special tokens included."""
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []


@dataclass
class Judge:
    """Finds the demonstrations of a batch of problems, and says which of them cannot serve."""

    args: DataArguments
    tokenizer: Any
    demonstration: Callable[[int], str | None]
    reward: Callable

    def __call__(self, problems: list[Problem]) -> list[tuple[str | None, str, str]]:
        """Return each problem's demonstration with the reason and detail why it cannot serve, both empty if it can."""
        texts = [self.demonstration(problem.row) for problem in problems]
        pairs = {i: (problem, text) for i, (problem, text) in enumerate(zip(problems, texts, strict=True)) if text}
        verdicts = {i: ("no_demonstration", "") for i in range(len(texts)) if i not in pairs}
        written = [self._written(problem, text) for problem, text in pairs.values()]
        max_length, threshold = self.args.max_length, self.args.success_threshold
        if max_length is not None:
            lengths = zip(pairs, count_tokens(self.tokenizer, written), strict=True)
            verdicts |= {i: ("too_long", f"{tokens} tokens") for i, tokens in lengths if tokens > max_length}
        if self.args.verify:
            left = {i: pair for i, pair in pairs.items() if i not in verdicts}
            solutions = [problem.solution for problem, _ in left.values()]
            rewards = zip(left, grade(solutions, [text for _, text in left.values()], self.reward), strict=True)
            verdicts |= {i: ("wrong", f"reward {reward}") for i, reward in rewards if not reward >= threshold}
        return [(text, *verdicts.get(i, ("", ""))) for i, text in enumerate(texts)]

    def _written(self, problem: Problem, text: str) -> str:
        """Write prompt and demonstration by the chat template; refuse a template that does not keep them whole."""
        prompt, completion = self.args.prompt_of(problem), [{"role": "assistant", "content": text}]
        name = f"model_name_or_path: the chat template of {self.args.model_name_or_path}"
        if spoilt := template_problem({"prompt": prompt, "completion": completion}, ChatWriter(self.tokenizer)):
            raise InputError(f"dataset_name, row {problem.row} (from 0): {spoilt}; take another model_name_or_path")
        before = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        whole = self.tokenizer.apply_chat_template(prompt + completion, tokenize=False)
        if not whole.startswith(before):
            raise InputError(
                f"{name} writes another prompt before an answer than RL will see, first in row {problem.row}: its "
                "generation prompt must begin what it writes for the assistant"
            )
        return whole


def choose_demonstrations(
    problems: list[Problem], num: int, judge: Callable[[list[Problem]], list], drops: Drops
) -> list[tuple[Problem, str]]:
    """Return the first `num` problems whose demonstration can serve, with it. RL keeps the problems passed over."""
    chosen: list[tuple[Problem, str]] = []
    place = 0
    with bar(num, "demonstrations", unit="row") as shown:
        while len(chosen) < num and place < len(problems):
            batch = problems[place : place + min(BATCH, max(64, num - len(chosen)))]
            place += len(batch)
            for problem, (text, reason, detail) in zip(batch, judge(batch), strict=True):
                if len(chosen) == num:
                    break
                if reason:
                    drops.add(problem.row, problem.id, reason, detail, of="sft")
                else:
                    chosen.append((problem, text))
            shown.update(len(chosen) - shown.n)
            if shown.disable:
                progress(f"{len(chosen)} of {num} demonstrations")
    return chosen
