"""Golds that no answer can earn are told before a run, and too many of them are refused."""

import warnings

import pytest
from datasets import Dataset

from aesl_trl.errors import InputError
from aesl_trl.rewards.functions import GradedReward
from aesl_trl.rewards.golds import MOST, check_golds, lost_golds
from aesl_trl.rewards.grading import SHARED_GRADERS, Grade


class Readers:
    """Graders that read every gold but those that begin with `?`, and keep what they are asked."""

    def __init__(self):
        self.asked = []

    def grade(self, answers, deadline_s):
        self.asked += answers
        return [Grade(float(not answer.solution.startswith("?"))) for answer in answers]


def reward(name="math_reward"):
    return GradedReward(name, graders=Readers())


def rows(*golds):
    return [{"prompt": "p", "solution": gold} for gold in golds]


def told(*golds, funcs=None, dataset=None) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_golds(funcs or [reward()], dataset or rows(*golds), where="dataset_name")
    return "\n".join(str(warning.message) for warning in caught)


def test_the_share_is_said_with_three_examples(capsys):
    golds = ["1", "2", "?a", "3", "4", "?b", "?c", "?d", "5", "6"]
    assert told(*golds) == (
        "dataset_name: 4 of 10 golds (40.0%) cannot be earned with math_reward, whatever the answer, such as "
        "?a; ?b; ?c"
    )
    assert told(*golds, funcs=[reward("accuracy_reward")]).endswith("; math_reward reads more notations")
    assert told("1", "2") == ""
    assert capsys.readouterr().out == "dataset_name: 0 of 2 golds (0.0%) cannot be earned with math_reward\n"


def test_more_than_a_half_is_an_error():
    assert "2 of 4" in told("1", "2", "?", "?")
    with pytest.raises(InputError, match=r"^eval: 3 of 5 golds \(60.0%\) cannot .* such as \?a; .*another reward$"):
        check_golds([reward()], rows("1", "2", "?a", "?a", "?b"), where="eval")


def test_a_row_without_a_gold_counts_where_nothing_else_rewards_it():
    other = GradedReward("think_format_reward", graders=Readers())
    assert "1 of 3 golds" in told("1", "2", None) and "such as (empty)" in told("1", "2", None)
    assert told(*["1", None, None], funcs=[reward(), other]) == ""
    assert "1 of 3 golds" in told("1", "2", "", funcs=[reward(), other])


def test_what_is_no_text_is_refused_with_its_row():
    with pytest.raises(InputError, match=r"^dataset_name, row 1 \(from 0\): solution must hold text, got 7$"):
        check_golds([reward()], rows("1", 7), where="dataset_name")


@pytest.mark.parametrize("stream", [False, True])
def test_at_most_512_golds_are_graded_from_all_over_a_dataset(stream):
    dataset = Dataset.from_list(rows(*map(str, range(1300))))
    graded = reward()
    check_golds([graded], dataset.to_iterable_dataset() if stream else dataset, where="dataset_name")
    asked = [int(answer.solution) for answer in graded.graders.asked]
    assert asked == (list(range(MOST)) if stream else list(range(0, 1300, 3)))
    assert graded.graders.asked[1].completion == rf"The final answer is \boxed{{{asked[1]}}}"


def test_other_rewards_and_other_processes_grade_nothing(monkeypatch):
    def math_reward(completions, **kwargs):
        raise AssertionError

    check_golds([math_reward, "org/reward-model"], [{"prompt": "no gold"}], where="dataset_name")
    graded = reward()
    monkeypatch.setenv("RANK", "1")
    check_golds([graded], rows("1"), where="dataset_name")
    assert graded.graders.asked == []


GSM8K = "She pays $9 x 4 = $<<9*4=36>>36 for them and $5 for a bag.\n#### 1,041"
FORMS = [r"\frac43", r"11\sqrt2", "4.5e33", r"\text{Evelyn}", "$1$ and $2$", GSM8K, r"So \boxed{1} and \boxed{2}."]


def test_every_form_of_a_gold_earns_itself():
    pytest.importorskip("math_verify")
    graded = GradedReward("math_reward", graders=SHARED_GRADERS)
    assert lost_golds(graded, FORMS) == []
    strict = GradedReward("accuracy_reward", graders=SHARED_GRADERS)
    assert {r"\frac43", r"\text{Evelyn}"} <= set(lost_golds(strict, FORMS))
