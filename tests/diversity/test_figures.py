"""Diversity figures against values worked by hand, their intervals against simulated truths (BLEU: test_bleu)."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from aesl_trl.diversity.figures import (
    Group,
    by_prompt,
    distinct_n,
    entropy_estimator,
    final_answer,
    intervals,
    measure,
    prompt_sums,
    right_counts,
    unique_share,
)
from aesl_trl.diversity.intervals import bootstrap_interval
from aesl_trl.errors import InputError


# few words, so that samples overlap, repeat and are sometimes empty
TEXTS = st.lists(
    st.lists(st.sampled_from(["a", "b", "c", "d,", "2+2"]), max_size=7).map(" ".join), min_size=2, max_size=6
)


def group(completions, **fields):
    number = len(completions)
    defaults = {"num_tokens": [4] * number, "truncated": [False] * number, "entropy": [0.5] * number}
    return Group("prompt", completions, **(defaults | fields))


def test_distinct_n_by_hand():
    assert distinct_n(["a b a", "a b"], 1) == 2 / 5
    assert distinct_n(["a b a", "a b"], 2) == 2 / 3  # ab, ba, ab; "a a" across the samples is not counted
    assert distinct_n(["a b a", "a b"], 3) == 1
    assert distinct_n(["1,2 is (1,2)"], 1) == 4 / 5  # 13a: 1,2 | is | ( | 1,2 | )


def test_distinct_n_without_ngrams_is_nan():
    assert math.isnan(distinct_n([], 1))
    assert math.isnan(distinct_n(["", " "], 1))
    assert math.isnan(distinct_n(["a b"], 3))
    with pytest.raises(InputError):
        distinct_n(["a"], 0)


@settings(deadline=None)
@given(TEXTS, st.integers(1, 4))
def test_distinct_n_bounds(completions, n):
    value = distinct_n(completions, n)
    assert math.isnan(value) or 0 < value <= 1
    assert distinct_n(completions[::-1], n) == pytest.approx(value, nan_ok=True)


def test_unique_share():
    assert unique_share(["a", "a", "b", "c"]) == 0.75
    assert unique_share(["", ""]) == 0.5
    assert math.isnan(unique_share([]))


def test_measure_means_over_prompts_tokens_and_samples():
    groups = [
        group(["a b", "a b"], num_tokens=[1, 3], truncated=[True, False], entropy=[1.0, 0.2]),
        group(["a b", "c d"], num_tokens=[2, 6], truncated=[False, False], entropy=[0.5, 0.0]),
    ]
    figures = measure(groups)
    assert figures["entropy"] == pytest.approx((1 * 1.0 + 3 * 0.2 + 2 * 0.5 + 6 * 0.0) / 12)
    assert figures["self_bleu"] == pytest.approx((1 + 0) / 2)
    assert figures["distinct_1"] == pytest.approx((2 / 4 + 4 / 4) / 2)
    assert figures["distinct_2"] == pytest.approx((1 / 2 + 2 / 2) / 2)
    assert math.isnan(figures["distinct_3"])
    assert figures["unique"] == 0.75
    assert figures["length"] == 3
    assert figures["truncated"] == 0.25
    assert not {"reward", "pass@1", "groups_mixed"} & set(figures)


def test_measure_keys_are_those_of_the_file():
    rewards = [[1.0], [0.0], [1.0], [0.0], [0.0], [0.0], [0.0], [0.0]]
    assert list(measure([group(list("abcdefgh"), rewards=rewards)])) == [
        *(
            "entropy",
            "entropy_sampled",
            "self_bleu",
            "distinct_1",
            "distinct_2",
            "distinct_3",
            "distinct_4",
            "unique",
            "length",
            "truncated",
            "eos_prob",
        ),
        *("reward", "pass@1", "pass@2", "pass@4", "pass@8", "groups_all_right", "groups_all_wrong", "groups_mixed"),
        "distinct_answers",
    ]


def test_measure_rewards_by_hand():
    groups = [
        group(list("abcd"), rewards=[[1.0, 0.5], [0.0, 0.5], [0.9, 0.0], [0.0, 0.0]]),  # 1 of 4 right
        group(list("abcd"), rewards=[[1.0, 0.0]] * 4),
        group(list("abcd"), rewards=[[0.0, 1.0]] * 4),  # only the first function decides
        group(list("abcd"), rewards=[[1.0, 0.0], [2.0, 0.0], [0.0, 0.0], [0.0, 0.0]]),  # 2 of 4 right
    ]
    figures = measure(groups)
    assert figures["reward"] == pytest.approx((2.9 + 4 + 4 + 3) / 16)
    assert figures["pass@1"] == pytest.approx((1 / 4 + 1 + 0 + 1 / 2) / 4)
    assert figures["pass@2"] == pytest.approx((1 / 2 + 1 + 0 + 5 / 6) / 4)
    assert figures["pass@4"] == pytest.approx(3 / 4)
    assert "pass@8" not in figures
    assert (figures["groups_all_right"], figures["groups_all_wrong"], figures["groups_mixed"]) == (0.25, 0.25, 0.5)
    assert measure(groups, success_threshold=0.9)["pass@1"] == pytest.approx((2 / 4 + 1 + 0 + 1 / 2) / 4)


def test_measure_leaves_out_samples_without_a_first_reward():
    groups = [
        group(list("abcd"), rewards=[[1.0, None], [None, 0.5], [0.0, 1.0], [None, None]]),  # 1 of 2 right
        group(list("abcd"), rewards=[[None, 1.0]] * 4),
        group(list("abcd"), rewards=[[1.0, 0.0]] * 4),
    ]
    figures = measure(groups)
    assert figures["reward"] == pytest.approx((1 + 0.5 + 1 + 4 + 4) / 11)
    assert figures["pass@1"] == pytest.approx((1 / 2 + 1) / 2)
    assert figures["pass@2"] == 1
    assert figures["pass@4"] == 1  # of the one prompt with four graded samples
    assert (figures["groups_all_right"], figures["groups_mixed"]) == (0.5, 0.5)


def test_measure_of_a_single_empty_sample():
    figures = measure([group([""], num_tokens=[0], entropy=[math.nan], rewards=[[0.0]])])
    assert all(math.isnan(figures[key]) for key in ("entropy", "self_bleu", "distinct_1"))
    assert (figures["unique"], figures["length"], figures["pass@1"], figures["groups_all_wrong"]) == (1, 0, 0, 1)
    assert "pass@2" not in figures


def test_measure_mixes_single_and_several_samples():
    assert measure([group(["a"]), group(["a b", "a b"])])["self_bleu"] == pytest.approx(1)


@pytest.mark.parametrize("function", [measure, intervals, by_prompt])
def test_no_groups_are_refused(function):
    with pytest.raises(InputError, match="empty"):
        function([])


def test_entropy_skips_unknown_tokens_and_refuses_ragged_lists():
    groups = [group(["a", "b", "c"], num_tokens=[2, 5, 0], entropy=[0.3, None, 9.0])]
    assert measure(groups)["entropy"] == pytest.approx(0.3)
    with pytest.raises(ValueError):
        measure([group(["a", "b"], num_tokens=[1, 2], entropy=[0.3])])


def test_a_group_survives_its_row():
    whole = group(["a", "b"], rewards=[[1.0], [None]], neg_log_prob=[0.1, 0.2], eos_prob=[0.5, None])
    assert Group.from_row({"prompt_index": 3, **whole.to_row()}, "here") == whole
    older = Group.from_row({"prompt": "p", "completions": ["a"], "truncated": [True]}, "here")
    assert older == Group("p", ["a"], None, [True], None)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (["a"], "file, line 2 has no list of texts 'completions'"),
        ({"prompt": "p", "completions": "abc"}, "file, line 2 has no list of texts 'completions'"),
        ({"completions": ["a"]}, "file, line 2 has no 'prompt'"),
        (
            {"prompt": "p", "completions": ["a"], "rewards": [[1.0], [0.0]]},
            "file, line 2: 'rewards' is not one entry for each of the 1 completions",
        ),
        (
            {"prompt": "p", "completions": ["a"], "truncated": True},
            "file, line 2: 'truncated' is not one entry for each of the 1 completions",
        ),
    ],
)
def test_a_row_that_is_no_group_is_refused(row, said):
    with pytest.raises(InputError) as error:
        Group.from_row(row, "file, line 2")
    assert str(error.value) == said


def test_a_row_must_have_the_fields_asked_for():
    with pytest.raises(InputError, match="here has no 'num_tokens'"):
        Group.from_row({"prompt": "p", "completions": ["a"]}, "here", needs=("prompt", "num_tokens"))


def test_right_counts_leave_out_samples_without_a_first_reward():
    groups = [group(list("abcd"), rewards=[[1.0], [None], [0.5], [math.nan]]), group(["a"])]
    assert right_counts(groups) == [(2, 1), (0, 0)]
    assert right_counts(groups, 0.5) == [(2, 2), (0, 0)]


@settings(max_examples=30, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_measure_does_not_depend_on_the_order_of_prompts(texts, generator):
    groups = [group(completions) for completions in texts]
    figures = measure(groups)
    generator.shuffle(groups)
    assert measure(groups) == pytest.approx(figures, nan_ok=True, abs=1e-14)


def test_sampled_entropy_weighs_tokens_and_takes_over_where_the_exact_one_is_missing():
    exact = group(["a", "b"], num_tokens=[1, 3], entropy=[1.0, 0.2], neg_log_prob=[2.0, 0.4])
    without = group(["a", "b"], num_tokens=[2, 2], entropy=[None, 0.5], neg_log_prob=[1.0, 0.0])
    assert entropy_estimator([exact]) == "exact"
    figures = measure([exact])
    assert figures["entropy"] == pytest.approx((1.0 + 3 * 0.2) / 4)
    assert figures["entropy_sampled"] == pytest.approx((2.0 + 3 * 0.4) / 4)
    assert entropy_estimator([exact, without]) == "sampled"
    figures = measure([exact, without])
    assert figures["entropy"] == figures["entropy_sampled"] == pytest.approx((2.0 + 3 * 0.4 + 2 * 1.0) / 8)
    assert by_prompt([exact, without])["entropy"] == pytest.approx([0.8, 0.5])


def test_a_sample_without_any_entropy_does_not_change_the_estimator():
    # its logits were not finite: NaN in memory, null in a file
    for unknown in (math.nan, None):
        groups = [group(["a", "b"], entropy=[0.5, unknown], neg_log_prob=[0.6, unknown])]
        assert entropy_estimator(groups) == "exact"
        assert measure(groups)["entropy"] == 0.5
    assert entropy_estimator([group(["a"])]) == "exact"
    assert math.isnan(measure([group(["a"])])["entropy_sampled"])


def test_sampled_entropy_estimates_the_exact_one():
    """A chain of two states: both estimates are unbiased for the same number, the free one has the larger spread."""
    generator, rows = np.random.default_rng(0), np.array([[0.9, 0.1], [0.4, 0.6]])
    row_entropy = -(rows * np.log(rows)).sum(1)
    groups = []
    for _ in range(400):
        state, exact, sampled = 0, [], []
        for _ in range(20):
            following = int(generator.random() < rows[state, 1])
            exact.append(row_entropy[state])
            sampled.append(-math.log(rows[state, following]))
            state = following
        groups.append(
            group(["x"], num_tokens=[20], entropy=[float(np.mean(exact))], neg_log_prob=[float(np.mean(sampled))])
        )
    visits, truth = np.array([1.0, 0.0]), 0.0
    for _ in range(20):
        truth += visits @ row_entropy / 20
        visits = visits @ rows
    ends = intervals(groups)
    assert ends["entropy"][0] < truth < ends["entropy"][1]
    assert ends["entropy_sampled"][0] < truth < ends["entropy_sampled"][1]
    widths = {name: ends[name][1] - ends[name][0] for name in ("entropy", "entropy_sampled")}
    assert widths["entropy_sampled"] > 1.5 * widths["entropy"]


def test_eos_prob_is_a_mean_over_known_samples():
    groups = [group(["a", "b"], eos_prob=[0.9, None]), group(["a", "b"], eos_prob=[0.5, 0.1]), group(["a", "b"])]
    assert measure(groups)["eos_prob"] == pytest.approx(0.5)
    assert math.isnan(measure(groups[2:])["eos_prob"])


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so \boxed{3} or rather \boxed{ 4 }.", "4"),
        (r"\boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),  # an escaped brace opens nothing
        (r"\boxed{1\\}", r"1\\"),  # an escaped backslash escapes nothing
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{3} and \boxed{4", "3"),  # cut off
        (r"} { \boxed{3}", "3"),
        ("\\boxed{1\n2}\nbye", "1\n2"),
        (r"\boxed{}", ""),
        (r"\\boxed{6}", "6"),  # escaped once too often
        ("think\nThe answer is 5. \n \n", "The answer is 5."),
        ("\\boxed{4\n 9 ", "9"),
        (r"f{x}\notboxed{3}", r"f{x}\notboxed{3}"),
        (" \n\t", ""),
        ("", ""),
    ],
)
def test_final_answer(completion, answer):
    assert final_answer(completion) == answer


@settings(deadline=None)
@given(st.text(alphabet="\\{}bx \n1") | st.lists(st.sampled_from(["\\boxed{", "}", "{", "\\", "1"])).map("".join))
def test_final_answer_is_the_last_box_that_balances(text):
    while "\\{" in text or "\\}" in text:  # escapes are in the cases by hand
        text = text.replace("\\{", "").replace("\\}", "")
    expected = None
    for start in reversed(range(len(text))):
        if text.startswith("\\boxed{", start):
            depths = itertools.accumulate((c == "{") - (c == "}") for c in text[start + 6 :])
            end = next((start + 6 + place for place, depth in enumerate(depths) if depth == 0), None)
            if end is not None:
                expected = text[start + 7 : end].strip()
                break
    if expected is None:
        expected = ([""] + [line.strip() for line in text.split("\n") if line.strip()])[-1]
    assert final_answer(text) == expected


def test_final_answer_of_a_model_that_repeats_itself_is_quick():
    assert final_answer("\\boxed{" * 50_000) == "\\boxed{" * 50_000  # hours, if each box were searched to the end


def test_distinct_answers_counts_per_graded_prompt():
    boxed = [r"a \boxed{1}", r"b \boxed{1}", r"\boxed{2}", ""]
    groups = [group(boxed, rewards=[[1.0], [1.0], [0.0], [0.0]]), group(["x", "y"], rewards=[[0.0], [0.0]])]
    assert measure(groups)["distinct_answers"] == (2 + 2) / 2
    assert measure([*groups, group(["p", "q", "r"])])["distinct_answers"] == 2  # not graded
    assert measure([group(["", ""], rewards=[[0.0], [0.0]])])["distinct_answers"] == 0


def test_bleu_to_base_is_sacrebleus():
    groups = [group(["the cat sat on the mat", "a dog, a cat"]), group(["b c d", "b"]), group(["z", "y"])]
    base = [["the cat sat on a mat", "a dog and a cat", "a dog"], ["b c d"], []]
    metric = sacrebleu.BLEU(effective_order=True)
    means = [
        np.mean([metric.sentence_score(text, references).score / 100 for text in samples.completions])
        for samples, references in zip(groups, base, strict=True)
        if references
    ]
    assert measure(groups, base_completions=base)["bleu_to_base"] == pytest.approx(np.mean(means), abs=1e-12)
    assert "bleu_to_base" not in measure(groups)
    same = [samples.completions for samples in groups]
    assert measure(groups, base_completions=same)["bleu_to_base"] == pytest.approx(1, abs=1e-12)
    with pytest.raises(InputError, match="base_completions has 2 prompts, but there are 3 groups"):
        measure(groups, base_completions=base[:2])


def test_by_prompt_keeps_the_prompts_in_place():
    groups = [
        group(["a b", "a b"], entropy=[0.4, 0.2], rewards=[[1.0], [0.0]]),
        group(["a"], entropy=[math.nan], rewards=None),
        group(["a b", "c d"], rewards=[[None], [1.0]]),
    ]
    values = by_prompt(groups)
    assert list(values) == ["entropy", "self_bleu", "pass@1", "pass@2"]
    assert values["entropy"] == [pytest.approx(0.3), None, 0.5]
    assert values["self_bleu"] == [pytest.approx(1), None, 0]
    assert values["pass@1"] == [0.5, None, 1.0]
    assert values["pass@2"] == [1.0, None, None]
    assert by_prompt(groups, success_threshold=0.0)["pass@1"] == [1.0, None, 1.0]
    assert list(by_prompt(groups[1:2])) == ["entropy", "self_bleu"]


def simulated_groups(generator, prompts=40, samples=4):
    """Prompts of unlike difficulty, longer samples with more entropy so that weighing matters; the truth too."""
    groups = []
    for _ in range(prompts):
        difficulty, level = generator.beta(2, 2), generator.gamma(4, 0.1)
        lengths = generator.integers(1, 30, size=samples)
        entropy = level * lengths / 15 + generator.normal(0, 0.05, samples)
        rewards = [[float(generator.random() < difficulty)] for _ in range(samples)]
        fields = {"num_tokens": lengths.tolist(), "entropy": entropy.tolist(), "rewards": rewards}
        groups.append(group(["a"] * samples, **fields))
    lengths = np.arange(1, 30)
    return groups, {
        "pass@1": 0.5,
        "pass@2": 1 - 0.3,  # E (1 - p)^2 of Beta(2, 2)
        "length": 15.0,
        "entropy": 0.4 * (lengths**2).mean() / 15 / lengths.mean(),
    }


def test_intervals_cover_the_truth():
    generator = np.random.default_rng(0)
    covered = dict.fromkeys(("pass@1", "pass@2", "length", "entropy"), 0)
    for seed in range(300):
        groups, truth = simulated_groups(generator)
        ends = intervals(groups, resamples=300, seed=seed)
        for name in covered:
            low, high = ends[name]
            covered[name] += low <= truth[name] <= high
    assert all(0.91 <= count / 300 <= 0.98 for count in covered.values()), covered


def test_intervals_are_of_the_figures_and_seeded():
    groups, _ = simulated_groups(np.random.default_rng(1), prompts=12)
    figures, ends = measure(groups), intervals(groups, seed=3)
    assert list(ends) == list(figures)
    for name, (low, high) in ends.items():
        assert math.isnan(low) == math.isnan(high) == math.isnan(figures[name])
        assert math.isnan(low) or low <= figures[name] <= high, name
    assert str(intervals(groups, seed=3)) == str(ends)  # nan is not equal to itself
    assert intervals(groups, seed=4)["entropy"] != ends["entropy"]
    narrow = intervals(groups, seed=3, level=0.5)["entropy"]
    assert ends["entropy"][0] < narrow[0] < narrow[1] < ends["entropy"][1]
    assert ends["pass@1"] == pytest.approx(bootstrap_interval(by_prompt(groups)["pass@1"], seed=3), abs=1e-12)


def test_intervals_resample_prompts_and_the_ratio_itself():
    # of two prompts: one drawn twice, the other twice, or both; entropy weighs tokens, so both give (1 + 9 * 0) / 10
    groups = [group(["a"], num_tokens=[1], entropy=[1.0]), group(["a"], num_tokens=[9], entropy=[0.0])]
    assert measure(groups)["entropy"] == pytest.approx(0.1)
    assert intervals(groups, level=0.4)["entropy"] == pytest.approx([0.1, 0.1])
    assert intervals(groups, level=0.6)["entropy"] == [0.0, 1.0]
    # twenty samples of one prompt are no twenty prompts
    assert intervals([group(["a b", "b"] * 10, entropy=[0.1, 0.9] * 10)])["entropy"] == pytest.approx([0.5, 0.5])


def test_prompt_sums_serve_all_figures():
    groups, _ = simulated_groups(np.random.default_rng(2), prompts=5)
    base = [["a"]] * 5
    sums = prompt_sums(groups, success_threshold=0.5, base_completions=base)
    assert {len(pairs) for pairs in sums.values()} == {5}
    arguments = {"success_threshold": 0.5, "base_completions": base}
    assert measure(sums) == pytest.approx(measure(groups, **arguments), nan_ok=True, abs=0)
    assert str(intervals(sums)) == str(intervals(groups, **arguments))
    assert by_prompt(sums) == by_prompt(groups, success_threshold=0.5)


@pytest.mark.parametrize(
    "module",
    ["diversity.figures", "diversity.bleu", "diversity.passk", "diversity.turning_point", "diversity.selection"],
)
def test_metrics_import_no_framework(module):
    code = f"import sys, aesl_trl.{module}; print(sorted({{'torch', 'trl', 'transformers'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr
