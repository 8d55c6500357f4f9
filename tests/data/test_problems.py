"""problems: which texts are the same problem, and solutions as math."""

import pytest
from small_problems import dropped_in, openr1_rows

from aesl_trl.data import problems
from aesl_trl.data.problems import normalise
from aesl_trl.files import read_jsonl


@pytest.mark.parametrize(
    ("left", "right", "is_same"),
    [
        ("Find $x$ if $x+1=2$.", "find  \\(x\\) if \\( x + 1 = 2 \\)", True),
        ("$\\dfrac{1}{2}$", "$\\frac{1}{2}$", True),
        ("$\\left(1, 2\\right)$", "$(1,2)$", True),
        ("$x+1=2$", "$x-1=2$", False),
        ("$\\leftarrow$", "$\\rightarrow$", False),
        ("12 a", "1 2a", True),  # white space is no part of a problem
    ],
)
def test_normalised_texts(left, right, is_same):
    assert (normalise(left) == normalise(right)) is is_same


def test_solutions_are_read_as_math():
    """Without delimiters math-verify reads the 2 of 2 sqrt 3, and an interval not at all."""
    assert problems.delimited("2\\sqrt{3}") == "$2\\sqrt{3}$"
    assert problems.delimited("$2$") == "$2$" and problems.delimited("\\boxed{2}") == "\\boxed{2}"
    assert problems.delimited("\\$18.90") == "$\\$18.90$"


def test_ground_truths_of_many_forms_are_gradable(run):
    rows = openr1_rows()
    answers = [
        "\\frac{1}{2}",
        "2\\sqrt{3}",
        "(1, 2]",
        "x=4",
        "A",
        "50\\%",
        "-3",
        "1.5",
        "\\$18.90",
        "x^2+1",
        "\\text{no}",
    ]
    for row, answer in zip(rows, answers, strict=False):
        row["reward_model"]["ground_truth"] = answer
    out = run(rows, verify=True)
    assert {reason for _, _, reason in dropped_in(out)} <= {"wrong"}  # the demonstrations answer another question
    kept = {row["solution"] for name in ("sft.jsonl", "rl.jsonl", "held_out.jsonl") for row in read_jsonl(out / name)}
    assert {f"${answer}$" for answer in answers} <= kept
