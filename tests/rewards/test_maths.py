"""`math_reward`: the notation of people, the box that counts, bare golds. Clean LaTeX is in test_grading_set.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aesl_trl.rewards.maths import (
    after_hashes,
    brace_arguments,
    last_boxes,
    math_reward,
    normalise,
    readable_gold,
    right_answers,
)


@pytest.mark.parametrize(
    "written, braced",
    [
        (r"\frac43", r"\frac{4}{3}"),
        (r"\frac 59", r"\frac{5}{9}"),
        (r"\frac9{19}", r"\frac{9}{19}"),
        (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}\text{ degrees}"),
        (r"11\sqrt2", r"11\sqrt{2}"),
        (r"\sqrt[3]7", r"\sqrt[3]{7}"),
        (r"\dfrac\pi2", r"\dfrac{\pi}{2}"),
        (r"\frac{\sqrt2}3", r"\frac{\sqrt{2}}{3}"),
        (r"\frac12\frac34", r"\frac{1}{2}\frac{3}{4}"),
        (r"\frac", r"\frac"),
        (r"\frac{1", r"\frac{1"),
        (r"\fraction 12", r"\fraction 12"),
        (r"\frac 1", r"\frac 1"),
    ],
)
def test_arguments_of_one_token_get_braces(written, braced):
    assert brace_arguments(written) == braced
    assert brace_arguments(braced) == braced


@given(st.text(alphabet="\\frac{}sqt[]12 $x", max_size=40))
def test_any_text_is_taken_and_braces_are_put_once(text):
    once = brace_arguments(text)
    assert brace_arguments(once) == once
    for function in (normalise, last_boxes, readable_gold):
        function(text)


@pytest.mark.parametrize(
    "answer, clean",
    [
        ("104.", "104"),
        (r"\textbf{(073)}", "073"),
        (r"\mathbf{127} ", "127"),
        ("4.5e33", r"4.5 \times 10^{33}"),
        ("-1.2E-07", r"-1.2 \times 10^{-7}"),
        ("2e", "2e"),
        ("x e3", "x e3"),
        ("(3,4)", "(3,4)"),
        (r"\textbf{open", r"\textbf{open"),
    ],
)
def test_answers_are_cleaned(answer, clean):
    assert normalise(answer) == clean


@pytest.mark.parametrize(
    "text, boxes",
    [
        (r"\boxed{3}. Wait ... \boxed{4}", ["4"]),
        (r"\boxed{1} and \boxed{2}", ["1", "2"]),
        (r"$\boxed{1}$, $\boxed{2}$ or $\boxed{3}$", ["1", "2", "3"]),
        (r"\boxed{1}\text{ and }\boxed{2}", ["1", "2"]),
        (r"\boxed{9} so \boxed{1}, \boxed{2}", ["1", "2"]),
        (r"\boxed{1} band \boxed{2}", ["2"]),
        (r"\boxed{\text{a \boxed{b}}}", [r"\text{a \boxed{b}}"]),
        (r"\boxed{\{1,2\}}", [r"\{1,2\}"]),
        (r"\boxed{1} and \boxed{2", ["1"]),
        ("none", []),
    ],
)
def test_which_boxes_are_the_answer(text, boxes):
    assert last_boxes(text) == boxes


@pytest.mark.parametrize(
    "solution, answer",
    [
        ("2 + 16 = 18\n#### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### (1,2)", "(1,2)"),
        ("#### (0,100)", "(0,100)"),
        ("#### [1,200]", "[1,200]"),
        ("#### Answer\n$5$", None),
        ("#### 1\n#### -3.5 ", "-3.5"),
        ("#### ", None),
        ("18", None),
        (18, None),
        (None, None),
    ],
)
def test_the_answer_behind_the_hashes(solution, answer):
    assert after_hashes(solution) == answer


@pytest.mark.parametrize(
    "gold, answer",
    [
        (r"$2\sqrt{3}$", r"\boxed{2\sqrt{3}}"),
        ("$2$ and $3$", "$2$ and $3$"),
        (r"\frac43", r"\boxed{\frac43}"),
        ("So $x$ is it.\n\\boxed{4}", r"\boxed{4}"),
        (r"\boxed{1}, \boxed{2}", r"\boxed{1} and \boxed{2}"),
        ("It costs $5, then $6.\n#### 11", r"\boxed{11}"),
    ],
)
def test_the_answer_that_gives_a_gold(gold, answer):
    assert right_answers(gold)[0] == f"The final answer is {answer}"


@pytest.mark.parametrize(
    "gold, answer",
    [
        (r"Let $x$ be the price. Then $2x=10$, so $x=5$.", "x=5"),
        (r"$5$ apples and $6$ pears, total \(11\)", "11"),
        (r"It costs $5, then $6." + "\n" + r"#### $\frac34$ cup", r"\frac34"),
        (r"\boxed{1}, \boxed{2}", r"1} and \boxed{2"),
    ],
)
def test_the_last_formula_is_the_answer_of_prose(gold, answer):
    assert right_answers(gold)[1] == rf"The final answer is \boxed{{{answer}}}"


def grade(answer: str, gold: str) -> float | None:
    return math_reward([[{"role": "assistant", "content": answer}]], [gold], other=["column"])[0]


@pytest.mark.parametrize(
    "gold",
    [
        r"\frac43",
        r"11\sqrt2",
        r"\text{Evelyn}",
        r"\$32,\!348",
        "3, 5, 7",
        r"x \in [-2,7]",
        "4.5e33",
        r"90^\circ",
        "058",
    ],
)
@pytest.mark.parametrize("form", [r"\boxed{{{}}}", "{}", "So $x$ is it.\n\\boxed{{{}}}"])
def test_a_gold_earns_itself_boxed_and_bare(gold, form):
    pytest.importorskip("math_verify")
    assert grade(rf"So \boxed{{{gold}}}.", form.format(gold)) == 1.0


@pytest.mark.parametrize(
    "answer, gold, reward",
    [
        (r"\boxed{3}. Wait ... \boxed{4}", "4", 1.0),
        (r"\boxed{3}. Wait ... \boxed{4}", "3", 0.0),
        (r"\boxed{1} and \boxed{2}", r"\{1,2\}", 1.0),
        (r"\boxed{1} and \boxed{2}", "2", 0.0),
        (r"\boxed{2}", r"\boxed{1} and \boxed{2}", 0.0),
        (r"\boxed{18}", "2 + 16 = <<2+16=18>>18\n#### 18", 1.0),
        (r"\boxed{1041}", "She pays $9 x 4 = $<<9*4=36>>36 and $5 more.\n#### 1,041", 1.0),
        (r"\boxed{36}", "She pays $9 x 4 = $<<9*4=36>>36 and $5 more.\n#### 1,041", 0.0),
        (r"\boxed{4.5 \times 10^{33}}", "4.5e33", 1.0),
        (r"\boxed{4.5 \times 10^{32}}", "4.5e33", 0.0),
        ("The answer is 72.", "72", 1.0),
        ("72", "72", 0.0),
        (r"\boxed{\textbf{(B)}\ 12}", "B", 1.0),
        (r"\boxed{(C)\ 12}", r"\text{(B)}", 0.0),
        (r"\boxed{A}", "A", 1.0),
        (r"\boxed{\{1,2\}}", "(1,2)", 0.0),
        (r"\boxed{(1,2)}", r"\left(1,2\right)", 1.0),
        (r"\boxed{2516_9}", "2516_8", 0.0),
        (r"\boxed{2516_8}", "2516_{8}", 1.0),
        (r"\boxed{x > 1}", r"(1,\infty)", 1.0),
        (r"\boxed{x < 1}", r"(1,\infty)", 0.0),
        (r"\boxed{(0,100)}", "#### (0,100)", 1.0),
        (r"\boxed{100}", "#### (0,100)", 0.0),
        (r"\boxed{5}", "### Step\n#### Conclusion\nThe answer is $5$", 1.0),
        (r"\boxed{\frac34}", "#### Answer\n$\\frac{3}{4}$", 1.0),
        (r"\boxed{\frac34}", "It costs $5 or $6.\n#### $\\frac{3}{4}$ cup", 1.0),
        (r"\boxed{}", "4", 0.0),
        ("", "4", 0.0),
        (r"\boxed{4}", "", None),
    ],
)
def test_rewards(answer, gold, reward):
    pytest.importorskip("math_verify")
    assert grade(answer, gold) == reward


@pytest.mark.parametrize(
    "gold",
    [
        r"Let $x$ be the price. Then $2x=10$, so $x=5$.",
        r"The area is $\frac12 bh$, so it is $6$.",
        r"We have $a=3$ and $b=4$, hence $c=5$.",
        r"$5$ apples and $6$ pears, total $11$",
        r"$2$ and $3$",
    ],
)
def test_a_solution_in_prose_can_be_earned(gold):
    pytest.importorskip("math_verify")
    assert 1.0 in [grade(answer, gold) for answer in right_answers(gold)]
