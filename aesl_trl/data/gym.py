"""Make rows of reasoning-gym's tasks by name: `reasoning_gym:chain_sum(max_terms=3, size=500) + leg_counting`.

The gym draws as many items of a task as one wants, from a seed. A split is the share of questions that the question's
own text decides: whatever the seeds, sizes and settings, no question is in two splits.

Source: reasoning-gym, github.com/open-thought/reasoning-gym (Apache-2.0), in the extra `gym`.
"""

import ast
import dataclasses
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ..errors import InputError, in_one_line, nearest, tell
from ..processes import child_env
from ..rewards.gym import ANSWER_AFTER, gym_reward


if TYPE_CHECKING:
    from datasets import Dataset

PREFIX = "reasoning_gym:"
# Percent of a task's questions in each split. `base` is for who trains a base model on such tasks first.
SPLITS = {"train": 60, "base": 20, "validation": 10, "test": 10}
SIZE = 1000  # rows of a task, in each split
CHUNK = 2000  # items drawn at once: some tasks prepare all of them
SPACING = 1_000_000  # an item is Random(seed + index): the items of two of our seeds lie that far apart
MAX_SEED = 4000  # numpy, which some tasks draw with, takes no seed above 2**32
MOST_LEFT_OUT = 20  # items of a task that may be left out whatever the number of rows
PATIENCE = 3 * CHUNK  # items without a new question, after which a task has no more


@dataclasses.dataclass(frozen=True)
class Task:
    """One term of a name."""

    name: str
    settings: dict[str, Any]  # the gym's own
    size: int = SIZE
    seed: int = 0
    answer_after: str = "####"


def gym_rows(name: str, split: str = "train", *, field: str = "dataset_name") -> "Dataset":
    """Return the rows of the tasks in `name`, mixed evenly over the dataset.

    Args:
        name: behind `reasoning_gym:`, tasks joined by `+`. In brackets behind a task stand the gym's settings of it,
            and ours: `size` (rows in a split), `seed` (0 to 4000) and `answer_after` (`####`, `boxed` or `<answer>`).
        split: one of [`SPLITS`], or a part of it such as `train[:100]`.
        field: the setting that named the dataset, for messages.

    Returns:
        A dataset of `prompt` (messages), `solution` (the gold, None where the task has no single one), `task` and
        `metadata` (JSON text for [`~aesl_trl.rewards.gym.gym_reward`]). Where each task has worked solutions there is
        `completion` (messages).

    Raises:
        InputError: the gym is not installed, a task, setting or split does not exist, or a task has fewer questions.
    """
    from datasets import Dataset, ReadInstruction

    if importlib.util.find_spec("reasoning_gym") is None:
        raise InputError(f"{field}: {name} needs the package reasoning-gym: pip install reasoning-gym")
    split_name = split.partition("[")[0]
    if split_name not in SPLITS:
        raise InputError(
            f"{field}: {name} has no split {split_name!r}{nearest(split_name, SPLITS)}; it has {', '.join(SPLITS)}"
        )
    found = _in_child(name, split_name, field)
    if not all("completion" in rows[0] for rows in found):
        for row in (row for rows in found for row in rows):
            row.pop("completion", None)
    placed = [((i + 0.5) / len(rows), number, row) for number, rows in enumerate(found) for i, row in enumerate(rows)]
    dataset = Dataset.from_list([row for *_, row in sorted(placed, key=lambda each: each[:2])])
    try:
        (part,) = ReadInstruction.from_spec(split).to_absolute({split_name: len(dataset)})
    except (ValueError, AssertionError) as error:
        raise InputError(f"{field}: split {split!r}: {in_one_line(error)}; write it as {split_name}[:100]") from None
    return dataset.select(range(part.from_ or 0, len(dataset) if part.to is None else part.to))


def read_name(name: str, field: str = "dataset_name") -> list[Task]:
    """Return the tasks that `name` joins by `+`."""
    text = name.removeprefix(PREFIX).strip()
    try:
        terms = list(_terms(ast.parse(text, mode="eval").body))
        tasks = [(term.func.id, {each.arg: ast.literal_eval(each.value) for each in term.keywords}) for term in terms]
        json.dumps(tasks)  # a set, for one, cannot travel with the rows
    except (SyntaxError, ValueError, TypeError, AttributeError, RecursionError, MemoryError):
        example = f"{PREFIX}chain_sum(max_terms=3, size=500) + leg_counting"
        raise InputError(f"{field}: {name} cannot be read; write tasks and settings as in {example}") from None
    return [_task(term, given, field) for term, given in tasks]


def _terms(node: ast.AST) -> Iterator[ast.Call]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from _terms(node.left)
        node = node.right
    call = ast.Call(node, [], []) if isinstance(node, ast.Name) else node
    if not isinstance(call, ast.Call) or call.args or None in [each.arg for each in call.keywords]:
        raise ValueError
    yield call


def _task(name: str, given: dict[str, Any], field: str) -> Task:
    from reasoning_gym.factory import DATASETS

    where = f"{field}: {PREFIX}{name}"
    known = sorted(set(DATASETS) - {"composite"})  # which mixes tasks, as `+` does here
    if name not in known:
        near = nearest(name, known) or f"; it has {', '.join(known)}"
        raise InputError(f"{where} is no task of reasoning-gym{near}")
    ours = {each.name: given[each.name] for each in dataclasses.fields(Task)[2:] if each.name in given}
    theirs = {each.name for each in dataclasses.fields(DATASETS[name][1])}
    for setting in given:
        if setting not in theirs | set(ours):
            valid = sorted(theirs | {"size", "seed", "answer_after"})
            raise InputError(f"{where} has no setting {setting!r}{nearest(setting, valid)}; it has {', '.join(valid)}")
    task = Task(name, {key: value for key, value in given.items() if key not in ours}, **ours)
    for setting, low, high in (("size", 1, 10**6), ("seed", 0, MAX_SEED)):
        value = getattr(task, setting)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise InputError(f"{where}: {setting} must be a whole number from {low} to {high}, got {value!r}")
    if task.answer_after not in ANSWER_AFTER:
        raise InputError(
            f"{where}: answer_after must be one of {', '.join(ANSWER_AFTER)}, got {task.answer_after!r}"
            f"{nearest(str(task.answer_after), ANSWER_AFTER)}"
        )
    return task


def split_of(question: str) -> str:
    """Return the split that a question belongs to, whatever its task's settings and seed."""
    percent = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8]) % 100
    ends = accumulate(SPLITS.values())
    return next(name for name, end in zip(SPLITS, ends, strict=True) if percent < end)


def _in_child(name: str, split: str, field: str) -> list[list[dict]]:
    """Return each task's rows, made in a process with a fixed hash seed: some tasks draw from sets of strings.

    It alone imports the gym, which takes seconds.
    """
    request = json.dumps({"name": name, "split": split, "field": field})
    command = [sys.executable, "-m", "aesl_trl.data.gym"]
    child = subprocess.run(
        command, input=request, stdout=subprocess.PIPE, text=True, env=child_env(PYTHONHASHSEED="0")
    )
    if child.returncode != 0:
        raise InputError(f"{field}: the process that draws {PREFIX} tasks failed, its own error is above")
    answer = json.loads(child.stdout)
    if "error" in answer:
        raise InputError(answer["error"])
    for task, left_out in answer["left_out"]:
        if left_out and os.environ.get("RANK", "0") == "0":
            tell(f"{field}: {PREFIX}{task}: {left_out} items were left out, as no answer could earn their reward")
    return answer["rows"]


def main() -> None:
    """Read a name from stdin, and write its tasks' rows to stdout, or the one line that says what is wrong."""
    request = json.load(sys.stdin)
    with redirect_stdout(sys.stderr):  # some tasks print
        try:
            tasks = read_name(request["name"], request["field"])
            drawn = [_rows(task, request["split"], request["field"]) for task in tasks]
            left_out = [(task.name, number) for task, (_, number) in zip(tasks, drawn, strict=True)]
            answer = {"rows": [rows for rows, _ in drawn], "left_out": left_out}
        except InputError as error:
            answer = {"error": str(error)}
    json.dump(answer, sys.stdout)


def _rows(task: Task, split: str, field: str) -> tuple[list[dict], int]:
    """Return `size` rows with different questions of `split`, and how many items were left out on the way.

    An item is left out where JSON cannot hold it, or its own answer, written as asked for, does not earn the reward.
    """
    where, seen, rows, left_out, last_new = f"{field}: {PREFIX}{task.name}", set(), [], 0, 0
    for number, entry in enumerate(_drawn(task, field)):
        if entry["question"] not in seen:
            seen.add(entry["question"])
            last_new = number
            if split_of(entry["question"]) == split:
                row = _row(task, entry)
                left_out += row is None
                rows += [] if row is None else [row]
        if len(rows) == task.size:
            return rows, left_out
        if left_out > max(MOST_LEFT_OUT, len(rows)):
            raise InputError(
                f"{where}: {left_out} of its first {left_out + len(rows)} items cannot be rows, as their own answers "
                "do not earn the reward once they were written as JSON; choose another task or answer_after"
            )
        if number - last_new > PATIENCE:
            break
    raise InputError(
        f"{where} with these settings has {len(rows)} different questions in {split} ({len(seen)} in all), and size "
        f"asks for {task.size}: set size={max(1, len(rows))}, or settings that allow more"
    )


def _drawn(task: Task, field: str) -> Iterator[dict]:
    from reasoning_gym import create_dataset

    start = task.seed * SPACING
    while True:
        try:
            chunk = create_dataset(task.name, **task.settings, seed=start, size=CHUNK)
            for number in range(CHUNK):
                yield chunk[number]
        except Exception as error:  # the gym refuses settings by assert, ValueError and others
            reason = in_one_line(error) or type(error).__name__
            raise InputError(f"{field}: {PREFIX}{task.name} refuses its settings: {reason}") from None
        start += CHUNK


def _row(task: Task, entry: dict) -> dict | None:
    """Return an entry as a row, or None where its own answer does not earn the reward."""
    entry = {key: entry[key] for key in ("question", "answer", "metadata")}
    how, form = ANSWER_AFTER[task.answer_after]
    carried = {"task": task.name, "settings": task.settings, "answer_after": task.answer_after, "entry": entry}
    try:
        text = json.dumps(carried)
    except (TypeError, ValueError):
        return None
    gold = entry["answer"]
    answer = None if gold is None else form.format(answer=gold)
    if answer is not None:
        try:
            earned = gym_reward([[{"role": "assistant", "content": answer}]], [text])
        except Exception:  # of the gym's scorer
            return None
        if earned != [1.0]:
            return None
    prompt = [{"role": "user", "content": f"{entry['question']}\n{how}"}]
    row = {"prompt": prompt, "solution": gold, "task": task.name, "metadata": text}
    worked = entry["metadata"].get("answer_cot")
    if isinstance(worked, str) and answer is not None:
        steps = worked.rpartition("####")[0].strip() if "####" in worked else worked.strip()
        row["completion"] = [{"role": "assistant", "content": f"{steps}\n{answer}"}]
    return row


if __name__ == "__main__":
    main()
