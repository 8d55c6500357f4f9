r"""Score answers to reasoning-gym's tasks with the gym's own scorers, in the grading children.

Four of its scorers call `eval` on the answer, and others hand it to sympy, so a completion is scored where it can do
no harm (grading.py). What a scorer needs travels with the row as JSON text, in the column `metadata`: `task`,
`settings`, `answer_after`, and `entry` with the gym's own `question`, `answer` and `metadata`.

Source: reasoning-gym 0.1.25, github.com/open-thought/reasoning-gym (Apache-2.0).
"""

import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any

from .maths import last_boxes


# Where a completion has its answer -> how the prompt asks for it, and how a demonstration gives it
ANSWER_AFTER = {
    "####": ("Give the final answer on the last line, after ####.", "#### {answer}"),
    "boxed": (r"Put the final answer within \boxed{}.", r"The final answer is \boxed{{{answer}}}."),
    "<answer>": ("Put the final answer between <answer> and </answer>.", "<answer>{answer}</answer>"),
}
SELF_TEST = (
    "1 + 1 = 2\n#### 2",
    '{"task": "chain_sum", "settings": {}, "answer_after": "####", '
    '"entry": {"question": "1 + 1 =", "answer": "2", "metadata": {}}}',
)


def gym_reward(completions: list[list[dict]], solution: list[str], **kwargs) -> list[float]:
    """Return 1.0 for each completion whose answer the gym gives a score of 1, else 0.0.

    Args:
        completions: one list of messages each, of which the first holds the answer.
        solution: for each completion the row's `metadata`.
        kwargs: other columns, which are not read.
    """
    return [float(score >= 1.0) for score in gym_score(completions, solution)]


def gym_score(completions: list[list[dict]], solution: list[str], **kwargs) -> list[float]:
    """Return the gym's own score of each completion's answer, which may be partial; 0.0 where there is no answer.

    Some scorers give a little to any number, which GRPO would learn: log this reward with weight 0. The arguments are
    those of [`gym_reward`].
    """
    rows = list(map(json.loads, solution))
    pairs = zip(completions, rows, strict=True)
    answers = [answer_of(completion[0]["content"], row["answer_after"], row["entry"]) for completion, row in pairs]
    return [_score(answer, row) for answer, row in zip(answers, rows, strict=True)]


def answer_of(completion: str, answer_after: str, entry: dict[str, Any]) -> str | None:
    """Return the text of a completion's last answer, or None where it gives none.

    Behind `####` the answer ends with its line, unless the entry's own answer has several lines or is unknown.
    """
    if answer_after == "boxed":
        return next(iter(last_boxes(completion)[-1:]), None)
    if answer_after == "<answer>":
        _, opened, rest = completion.rpartition("<answer>")
        answer, closed, _ = rest.partition("</answer>")
        return answer.strip() if opened and closed else None
    _, mark, answer = completion.rpartition("####")
    answer = answer.strip()
    has_lines = entry["answer"] is None or "\n" in entry["answer"].strip()
    return (answer if has_lines else answer.partition("\n")[0].strip()) if mark else None


def normalise(answer: str) -> str:
    """Return an answer without what formats it: Markdown's marks, dollars, the last dot, commas of thousands."""
    text = re.sub(r"^[\s*`$]+|[\s*`$.]+$", "", answer)
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) if re.fullmatch(r"[-+]?[\d,]+(\.\d+)?", text) else text


def _score(answer: str | None, row: dict) -> float:
    if not answer:
        return 0.0
    score = scorer(row["task"], json.dumps(row["settings"], sort_keys=True))
    scores, errors = [], []
    for text in dict.fromkeys((answer, normalise(answer))):
        try:
            scores.append(float(score(text, row["entry"])))
        except Exception as error:  # some scorers raise where they cannot read an answer
            errors.append(error)
    if not scores:
        raise errors[0]
    return max(scores)


@cache
def scorer(task: str, settings: str) -> Callable[[str, dict], float]:
    """Return the function by which `task` scores an answer to an entry; `settings` is JSON text."""
    from reasoning_gym import create_dataset

    return create_dataset(task, **json.loads(settings), seed=0, size=1).score_answer
