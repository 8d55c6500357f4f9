"""The grader that every accuracy comes from, against 100 verdicts that were written down before it was run.

A verdict in fixtures/grading_set.json is mathematical judgement: is this the gold answer? Where accuracy_reward (TRL,
on math-verify) says otherwise, it stands here with the reason; docs/evaluation.md has the list for readers.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from aesl_trl.rewards.grading import EXTRACT, SHARED_GRADERS, Answer


pytest.importorskip("math_verify")

ROWS = json.loads((Path(__file__).parents[1] / "fixtures" / "grading_set.json").read_text())
TOO_STRICT = {
    1: r"\frac12 without braces: accuracy_reward does not mend LaTeX in answers, only in gold answers",
    30: r"\varnothing is a symbol to math-verify, \emptyset the empty set",
    37: "an inequality is not compared with an interval",
    38: "an inequality is not compared with an interval",
    40: "an inequality is not compared with an interval",
    50: "units are dropped, not converted: 60 against 1",
    58: "option and value in one box are read as a product",
    73: "degrees are dropped, so 180 is not pi",
    83: "e and i are read as symbols",
    90: "accuracy_reward wants the answer in LaTeX, in a box or between dollar signs",
    91: "boxes a few words apart are read as one set, {3, 4}",
}
TOO_LENIENT = {
    28: "(1,2) is read as an interval, and an interval is taken for the set of its ends",
    45: "units are dropped, not compared: 5 cm and 5 m",
    86: "the base of a numeral is dropped",
}


def completion(row: dict) -> str:
    return row["answer"] + row.get("repeat", "") * row.get("times", 0) + row.get("end", "")


LONG = {95, 96, 98}  # seconds each, up to the deadline


def grade(rows: list[dict], grader: str = "accuracy_reward", gold: str = r"\boxed{{{}}}") -> dict:
    """As an evaluation grades: 10 s an answer, the gold in a box or as `gold` writes it. Grades by id."""
    answers = [Answer(grader, completion(row), gold.format(row["gold"])) for row in rows]
    return {row["id"]: grade for row, grade in zip(rows, SHARED_GRADERS.grade(answers, 10.0), strict=True)}


@pytest.fixture(scope="module")
def grades():
    return grade([row for row in ROWS if row["id"] not in LONG])


def test_the_set_is_what_it_says():
    assert [row["id"] for row in ROWS] == list(range(1, 101))
    assert Counter(row["verdict"] for row in ROWS) == {True: 71, False: 29}
    assert len({row["kind"] for row in ROWS}) == 14


def test_verdicts(grades):
    """Every disagreement is known, and none has gone away unnoticed."""
    found, rows = {index: grade.reward for index, grade in grades.items()}, [r for r in ROWS if r["id"] in grades]
    assert set(found.values()) == {0.0, 1.0}
    assert {row["id"] for row in rows if row["verdict"] and found[row["id"]] == 0.0} == set(TOO_STRICT)
    assert {row["id"] for row in rows if not row["verdict"] and found[row["id"]] == 1.0} == set(TOO_LENIENT)
    assert {index: grade.failure for index, grade in grades.items() if grade.failure} == {100: "too long"}


# Of math_reward, beside 50, 73 and 83 of TOO_STRICT
STILL_LENIENT = {45}


@pytest.mark.parametrize("gold", [r"\boxed{{{}}}", "{}"])
def test_math_reward_agrees_with_more(gold):
    """With golds in a box and bare; 96 of the 100 verdicts, the three that take seconds among them (0.0 is right)."""
    rows = [row for row in ROWS if row["id"] not in LONG]
    found = {index: grade.reward for index, grade in grade(rows, "math_reward", gold).items()}
    assert {row["id"] for row in rows if row["verdict"] and found[row["id"]] == 0.0} == {50, 73, 83}
    assert {row["id"] for row in rows if not row["verdict"] and found[row["id"]] == 1.0} == STILL_LENIENT


@pytest.mark.slow
def test_a_tower_an_integral_and_a_long_sum_end(tmp_path, monkeypatch):
    """math-verify gives up on them, or the child is killed at its deadline: 0.0 either way."""
    monkeypatch.chdir(tmp_path)
    grades = grade([row for row in ROWS if row["id"] in LONG])
    assert [grade.reward for grade in grades.values()] == [0.0, 0.0, 0.0]
    assert {grade.failure for grade in grades.values()} <= {None, "timeout"}


def test_an_answer_is_extracted_as_the_grader_reads_it():
    """TRL keeps what it parsed to itself, but logs it as text: the same, item for item."""
    from trl.rewards import accuracy_reward

    rows = [row for row in ROWS if row["kind"] != "hostile"]
    asked = [Answer(EXTRACT["accuracy_reward"], completion(row), None) for row in rows]
    extracted = [grade.reward for grade in SHARED_GRADERS.grade(asked, 10.0)]
    logged = {}
    completions = [[{"role": "assistant", "content": completion(row)}] for row in rows]
    accuracy_reward(completions, ["$1$"] * len(rows), log_extra=logged.__setitem__)
    for text, parsed in zip(extracted, logged["answer_parsed"], strict=True):
        assert (text is None) == (parsed == "[unparseable]")
        assert text is None or parsed.endswith((f"{text!r}]", f"'{text}']")), (text, parsed)
    assert extracted[0] == r"\frac12" and Counter(extracted)[None] == 3
