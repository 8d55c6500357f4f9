"""Diversity figures: self-BLEU against sacrebleu itself, the rest against values worked by hand."""

import math
import random
import subprocess
import sys
import time

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.helpers import extract_all_word_ngrams

from aesl_trl.diversity import Group, distinct_n, measure, self_bleu, token_entropy, unique_share
from aesl_trl.errors import InputError


# few words, so that samples overlap, repeat and are sometimes empty
TEXTS = st.lists(
    st.lists(st.sampled_from(["a", "b", "c", "d,", "2+2"]), max_size=7).map(" ".join), min_size=2, max_size=6
)


def reference_self_bleu(completions, tokenize="13a", **settings_):
    """The definition: sacrebleu on every sample against all others."""
    metric = sacrebleu.BLEU(tokenize=tokenize, **{"effective_order": True, **settings_})
    scores = [
        metric.sentence_score(text, completions[:place] + completions[place + 1 :]).score
        for place, text in enumerate(completions)
    ]
    return sum(scores) / len(scores) / 100


def group(completions, **fields):
    number = len(completions)
    defaults = {"num_tokens": [4] * number, "truncated": [False] * number, "entropy": [0.5] * number}
    return Group("prompt", completions, **(defaults | fields))


@settings(deadline=None)
@given(TEXTS)
def test_self_bleu_is_sacrebleus(completions):
    assert self_bleu(completions) == pytest.approx(reference_self_bleu(completions), abs=1e-14)


@pytest.mark.parametrize("smooth", [("exp", None), ("floor", None), ("floor", 0.3), ("add-k", 2), ("none", None)])
@pytest.mark.parametrize("effective_order", [True, False])
@pytest.mark.parametrize("tokenize", ["13a", "char"])
def test_self_bleu_settings_are_sacrebleus(smooth, effective_order, tokenize):
    completions = ["the cat sat on the mat", "the cat sat on the mat", "a dog", "", "the the the mat sat", "on a mat."]
    options = {"smooth_method": smooth[0], "smooth_value": smooth[1], "effective_order": effective_order}
    for order in (1, 2, 4, 5):
        given_ = options | {"max_ngram_order": order, "tokenize": tokenize}
        assert self_bleu(completions, **given_) == pytest.approx(reference_self_bleu(completions, **given_), abs=1e-14)


@settings(deadline=None)
@given(TEXTS, st.randoms(use_true_random=False))
def test_self_bleu_bounds_and_permutation(completions, generator):
    value = self_bleu(completions)
    assert 0 <= value <= 1
    shuffled = completions[:]
    generator.shuffle(shuffled)
    assert self_bleu(shuffled) == value


@settings(deadline=None)
@given(st.text(alphabet="ab ", min_size=1).filter(str.strip), st.integers(2, 5))
def test_self_bleu_of_copies_is_one(text, number):
    assert self_bleu([text] * number) == pytest.approx(1, abs=1e-12)


def test_self_bleu_by_hand():
    # each shares 3 of 4 words, 2 of 3 pairs, 1 of 2 triples, 0 of 1 quadruples (smoothed to 1/2), equal lengths
    assert self_bleu(["a b c d", "a b c e"]) == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25, abs=1e-12)
    assert self_bleu(["a b", "c d"]) == 0
    assert self_bleu(["", ""]) == 0  # nothing in common, says sacrebleu


def test_self_bleu_below_two_is_nan():
    assert math.isnan(self_bleu([]))
    assert math.isnan(self_bleu(["a"]))


@pytest.mark.parametrize(
    ("bad", "said"), [({"tokenize": "14a"}, "did you mean '13a'"), ({"smooth_method": "flor"}, "did you mean 'floor'")]
)
def test_self_bleu_refuses_unknown_settings(bad, said):
    with pytest.raises(InputError, match=said):
        self_bleu(["a", "b"], **bad)


def test_self_bleu_counts_each_text_once(monkeypatch):
    counted = []

    def count(text, *orders):
        counted.append(text)
        return extract_all_word_ngrams(text, *orders)

    monkeypatch.setattr("aesl_trl.diversity.extract_all_word_ngrams", count)
    self_bleu(["a b", "c", "a b", "a b", "d e f"])
    assert sorted(counted) == ["a b", "c", "d e f"]


def test_self_bleu_is_quick():
    generator = random.Random(0)
    words = [f"w{number}" for number in range(300)]
    prompts = [[" ".join(generator.choices(words, k=60)) for _ in range(8)] for _ in range(96)]
    start = time.perf_counter()
    for completions in prompts:
        self_bleu(completions)
    assert time.perf_counter() - start < 5  # about 0.5 s on an idle core


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
            "self_bleu",
            "distinct_1",
            "distinct_2",
            "distinct_3",
            "distinct_4",
            "unique",
            "length",
            "truncated",
        ),
        *("reward", "pass@1", "pass@2", "pass@4", "pass@8", "groups_all_right", "groups_all_wrong", "groups_mixed"),
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


def test_measure_refuses_no_groups():
    with pytest.raises(InputError):
        measure([])


def test_token_entropy_skips_unknown_tokens_and_refuses_ragged_lists():
    groups = [group(["a", "b", "c"], num_tokens=[2, 5, 0], entropy=[0.3, None, 9.0])]
    assert token_entropy(groups) == pytest.approx(0.3)
    with pytest.raises(ValueError):
        token_entropy([group(["a", "b"], num_tokens=[1, 2], entropy=[0.3])])


@settings(max_examples=30, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_measure_does_not_depend_on_the_order_of_prompts(texts, generator):
    groups = [group(completions) for completions in texts]
    figures = measure(groups)
    generator.shuffle(groups)
    assert measure(groups) == pytest.approx(figures, nan_ok=True, abs=1e-14)


@pytest.mark.parametrize("module", ["diversity", "passk", "turning_point", "selection"])
def test_metrics_import_no_framework(module):
    code = f"import sys, aesl_trl.{module}; print(sorted({{'torch', 'trl', 'transformers'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr
