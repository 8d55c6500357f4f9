"""Answers to reasoning-gym's tasks: where they stand, how they are written, and what the gym gives them."""

import importlib.util
import json

import pytest
from gym_tasks import use_stand_in

from aesl_trl.errors import InputError
from aesl_trl.rewards import functions, grading, gym
from aesl_trl.rewards.functions import load_reward_funcs, score_groups
from aesl_trl.rewards.grading import Answer, Grade, Graders
from aesl_trl.rewards.gym import answer_of, gym_reward, gym_score, normalise


has_gym = importlib.util.find_spec("reasoning_gym") is not None


def metadata(task="sums", terms=(3, 4), answer="7", answer_after="####") -> str:
    entry = {"question": "?", "answer": answer, "metadata": {"terms": terms}}
    return json.dumps({"task": task, "settings": {}, "answer_after": answer_after, "entry": entry})


@pytest.fixture
def stand_in(monkeypatch):
    use_stand_in(monkeypatch)
    yield
    gym.scorer.cache_clear()


@pytest.mark.parametrize(
    ("completion", "mark", "gold", "answer"),
    [
        ("3 + 4\n#### 7\nthe end", "####", "7", "7"),
        ("#### 5\nno\n#### 7", "####", "7", "7"),
        ("the grid\n####\n1 2\n3 4\n", "####", "1 2\n3 4", "1 2\n3 4"),
        ("the path\n#### a b\nc", "####", None, "a b\nc"),  # no single answer: all of it
        ("it is 7", "####", "7", None),
        (r"\boxed{5} no, \boxed{7}", "boxed", "7", "7"),
        (r"\boxed{\frac{1}{2}}", "boxed", "1/2", r"\frac{1}{2}"),
        (r"\boxed{7", "boxed", "7", None),
        ("<answer>5</answer> <answer> 7\n</answer>", "<answer>", "7", "7"),
        ("<answer>7", "<answer>", "7", None),
    ],
)
def test_the_last_answer_is_read_where_the_row_says(completion, mark, gold, answer):
    assert answer_of(completion, mark, {"answer": gold}) == answer


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("7.", "7"),
        ("**7**", "7"),
        ("$1,234$", "1234"),
        ("-12,345.50", "-12345.50"),
        ("3.5", "3.5"),
        ("1, 2, 3", "1, 2, 3"),
        ("1,23", "1,23"),
        ("`yes`", "yes"),
        ("a b.", "a b"),
        ("", ""),
    ],
)
def test_what_only_formats_an_answer_is_taken_away(written, text):
    assert normalise(written) == text


def test_solved_is_a_score_of_one_and_the_gym_s_own_score_may_be_partial(stand_in):
    texts = ["#### 7", "#### **7**.", "#### 15", "7", "#### seven"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    rows = [metadata()] * len(texts)
    assert gym_reward(completions, rows) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert gym_score(completions, rows) == [1.0, 1.0, 0.5, 0.0, 0.0]


def test_a_spelling_that_the_scorer_cannot_read_costs_nothing(stand_in):
    """One of the two spellings raises, and the other one is right; where both raise, the answer was not graded."""
    row = metadata("open_sums", answer=None)
    assert gym_reward([[{"role": "assistant", "content": "#### **7**."}]], [row]) == [1.0]
    with pytest.raises(SyntaxError):
        gym_reward([[{"role": "assistant", "content": "#### 7 7"}]], [row])


def test_a_sentence_keeps_its_dot_where_the_gold_has_one(stand_in):
    """The answer as written counts too: normalising must not take away what is right."""
    row = metadata("chain_sum", answer="The cat sat.")
    assert gym_reward([[{"role": "assistant", "content": "#### The cat sat."}]], [row]) == [1.0]


def test_rewards_by_name_score_samples_in_children(stand_in, monkeypatch):
    """Text and messages; an answer that some scorers would run as code can neither write nor start a program."""
    from aesl_trl.diversity.figures import Group

    graders = Graders(1, loads="gym")
    monkeypatch.setattr(functions.GradedGym.__init__, "__defaults__", (10.0, graders))
    rewards = load_reward_funcs(["gym_reward", "gym_score"])
    rows = [{"prompt": "3 + 4 =", "metadata": metadata(), "solution": "7", "task": "sums"}]
    groups = [Group("3 + 4 =", ["#### 7", "#### 8", ""], [3, 3, 1], [False] * 3, [None] * 3)]
    assert score_groups(groups, rows, rewards)[0].rewards == [[1.0, 1.0], [0.0, 0.5], [0.0, 0.0]]
    harm = ["__import__('os').system('true')", "open('x', 'w')", "7 if 3 + 4 == 7 else 0"]
    grades = graders.grade(
        [Answer("gym_reward", f"#### {text}", metadata("open_sums", answer=None)) for text in harm], 10.0
    )
    assert grades == [Grade(0.0, "PermissionError"), Grade(0.0, "PermissionError"), Grade(1.0)]
    grading._kill(graders._children)


def test_without_the_gym_its_rewards_are_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="gym_reward needs reasoning-gym: pip install reasoning-gym"):
        load_reward_funcs(["gym_reward"])


@pytest.mark.skipif(not has_gym, reason="reasoning-gym is not installed")
@pytest.mark.slow
def test_golds_of_the_gym_are_worth_one_in_children():
    from aesl_trl.data.gym import gym_rows

    tasks = "chain_sum(size=20) + n_queens(size=3) + sentence_reordering(size=5) + sudoku(size=2) + simple_integration"
    rows = gym_rows(f"reasoning_gym:{tasks}(size=5)", "test")
    answers = [[{"role": "assistant", "content": f"so\n#### {gold}"}] for gold in rows["solution"]]
    (reward,) = load_reward_funcs(["gym_reward"])
    assert reward(completions=answers, metadata=rows["metadata"]) == [1.0] * len(rows)
    assert reward.take_failures() == {}
