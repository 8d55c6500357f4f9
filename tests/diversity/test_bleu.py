"""Self-BLEU and BLEU to references against sacrebleu itself, called once a completion."""

import math

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp

from aesl_trl.diversity import bleu
from aesl_trl.diversity.bleu import mean_score, self_bleu, self_bleu_of_tokens, sentence_bleus, tokenized
from aesl_trl.errors import InputError


TOKENIZERS = ["13a", "intl", "char", "zh", "none"]
SMOOTHING = [
    *(("exp", None), ("none", None)),
    *(("floor", None), ("floor", 0.0), ("floor", 0.3), ("floor", 1.0)),
    *(("add-k", None), ("add-k", 0.0), ("add-k", 0.5), ("add-k", 2)),
]
# few words, so that completions overlap, repeat and are sometimes empty
FEW_WORDS = st.lists(st.sampled_from(["a", "b", "c", "d,", "2+2", "3.5"]), max_size=9).map(" ".join)
# lone surrogates, controls, every kind of whitespace, what the tokenizers split at, wide characters
HARD = st.text(
    alphabet=st.sampled_from(
        "a1.,-&<>\"'\ud800\udfff\x00\x0b\x1c\x85\xa0\u2028\u3000\ufeff\u200b\r\n\t  中文。，😀é\u0301٣"
    ),
    max_size=14,
) | st.sampled_from(["&quot;a&amp;", "<skipped>", "a-\nb", "x &lt; y", " a", "a ", "\n", "-\n"])
ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=()), max_size=12)


def reference_self_bleu(completions, tokenize="13a", **settings_):
    """The definition: sacrebleu on every completion against all others."""
    metric = sacrebleu.BLEU(tokenize=tokenize, **{"effective_order": True, **settings_})
    scores = [
        metric.sentence_score(text, completions[:place] + completions[place + 1 :]).score
        for place, text in enumerate(completions)
    ]
    return sum(scores) / len(scores) / 100


@st.composite
def completions(draw, texts):
    """Two to seven, some of them copies of others."""
    drawn = draw(st.lists(texts, min_size=1, max_size=5))
    return draw(st.permutations(drawn + draw(st.lists(st.sampled_from(drawn), min_size=1, max_size=2))))


SETTINGS = st.fixed_dictionaries(
    {
        "tokenize": st.sampled_from(TOKENIZERS),
        "smoothing": st.sampled_from(SMOOTHING),
        "effective_order": st.booleans(),
        "max_ngram_order": st.integers(1, 6),
    }
)


def as_arguments(drawn):
    method, value = drawn["smoothing"]
    return {key: drawn[key] for key in drawn if key != "smoothing"} | {"smooth_method": method, "smooth_value": value}


@settings(deadline=None, max_examples=300)
@given(st.one_of(completions(FEW_WORDS), completions(HARD), completions(ANY_TEXT)), SETTINGS)
def test_self_bleu_is_sacrebleus(texts, drawn):
    arguments = as_arguments(drawn)
    assert self_bleu(texts, **arguments) == pytest.approx(reference_self_bleu(texts, **arguments), abs=1e-12)


@pytest.mark.parametrize("smooth", SMOOTHING)
@pytest.mark.parametrize("effective_order", [True, False])
@pytest.mark.parametrize("tokenize", TOKENIZERS)
def test_self_bleu_with_every_setting(smooth, effective_order, tokenize):
    texts = ["the cat sat on the mat", "the cat sat on the mat", "a dog", "", "the the the mat sat", "on a 中文 mat."]
    for order in range(1, 7):
        arguments = as_arguments({"smoothing": smooth, "effective_order": effective_order})
        arguments |= {"max_ngram_order": order, "tokenize": tokenize}
        assert self_bleu(texts, **arguments) == pytest.approx(reference_self_bleu(texts, **arguments), abs=1e-12)


def test_self_bleu_defaults_are_those_of_sentence_bleu():
    texts = ["the cat, sat on the mat", "the cat sat on a mat", "a dog sat"]
    scores = [
        sacrebleu.sentence_bleu(text, texts[:place] + texts[place + 1 :]).score for place, text in enumerate(texts)
    ]
    assert self_bleu(texts) == pytest.approx(sum(scores) / 300, abs=1e-14)


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=9))
def test_brevity_penalty_takes_the_nearest_length(lengths):
    # one word only, so that scores differ by the penalty: equal distances, equal lengths and empty texts among them
    texts = [" ".join(["a"] * length) for length in lengths]
    assert self_bleu(texts) == pytest.approx(reference_self_bleu(texts), abs=1e-12)
    metric, references = sacrebleu.BLEU(effective_order=True), texts[1:]
    expected = metric.sentence_score(texts[0], references).score
    assert sentence_bleus(tokenized(texts[:1]), tokenized(references)) == [pytest.approx(expected, abs=1e-10)]


@settings(deadline=None, max_examples=150)
@given(st.lists(FEW_WORDS | HARD, max_size=5), st.lists(FEW_WORDS | HARD, min_size=1, max_size=5), SETTINGS)
def test_sentence_bleus_against_references_are_sacrebleus(texts, references, drawn):
    arguments = as_arguments(drawn)
    metric = sacrebleu.BLEU(**arguments)
    expected = [metric.sentence_score(text, references).score for text in texts]
    tokenize = arguments.pop("tokenize")
    scores = sentence_bleus(tokenized(texts, tokenize), tokenized(references, tokenize), **arguments)
    assert scores == pytest.approx(expected, abs=1e-10)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(-2, 200_000) | st.integers(0, 4), max_size=12), min_size=2, max_size=6), SETTINGS)
def test_ids_are_words_of_the_tokenizer_none(ids, drawn):
    arguments = as_arguments(drawn) | {"tokenize": "none"}
    texts = [" ".join(map(str, row)) for row in ids]
    expected = reference_self_bleu(texts, **arguments)
    del arguments["tokenize"]
    assert self_bleu_of_tokens(ids, **arguments) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(completions(FEW_WORDS), st.randoms(use_true_random=False))
def test_self_bleu_bounds_and_permutation(texts, generator):
    value = self_bleu(texts)
    assert 0 <= value <= 1
    shuffled = texts[:]
    generator.shuffle(shuffled)
    assert self_bleu(shuffled) == value


@settings(deadline=None)
@given(completions(FEW_WORDS), FEW_WORDS)
def test_one_reference_more_never_lowers_a_score_at_equal_lengths(texts, more):
    words = [(text.split() + ["z"] * 12)[:12] for text in [*texts, more]]
    few, many = sentence_bleus(words[:1], words[1:-1]), sentence_bleus(words[:1], words[1:])
    assert many[0] >= few[0] - 1e-9


@settings(deadline=None)
@given(st.text(alphabet="ab ", min_size=1).filter(str.strip), st.integers(2, 5))
def test_self_bleu_of_copies_is_one(text, number):
    assert self_bleu([text] * number) == pytest.approx(1, abs=1e-12)
    assert self_bleu([text] * number) <= 1


def test_self_bleu_by_hand():
    # each shares 3 of 4 words, 2 of 3 pairs, 1 of 2 triples, 0 of 1 quadruples (smoothed to 1/2), equal lengths
    assert self_bleu(["a b c d", "a b c e"]) == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25, abs=1e-12)
    assert self_bleu(["a b", "c d"]) == 0
    assert self_bleu(["", ""]) == 0  # nothing in common, says sacrebleu
    # clipped by the largest count in one other text: 2 of 3, not 2 + 1; of lengths 3 and 1 the 1 is as near to 2 as
    # the 3, and shorter; the last text is half as long as the nearest
    assert self_bleu(["a a a", "a a", "a"], max_ngram_order=1) == pytest.approx(
        (2 / 3 + 1 + math.exp(-1)) / 3, abs=1e-12
    )


def test_self_bleu_below_two_is_nan():
    assert math.isnan(self_bleu([]))
    assert math.isnan(self_bleu(["a"]))
    assert math.isnan(self_bleu_of_tokens([[1, 2]]))
    assert math.isnan(mean_score([]))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"tokenize": "14a"}, "did you mean '13a'"),
        ({"smooth_method": "flor"}, "did you mean 'floor'"),
        ({"smooth_value": -1.0, "smooth_method": "add-k"}, "at least 0"),
        ({"smooth_value": 1.5, "smooth_method": "floor"}, "between 0 and 1"),
        ({"smooth_value": math.nan, "smooth_method": "floor"}, "between 0 and 1"),
        ({"max_ngram_order": 0}, "at least 1"),
    ],
)
def test_self_bleu_refuses_settings(bad, said):
    with pytest.raises(InputError, match=said):
        self_bleu(["a", "b"], **bad)


def test_self_bleu_refuses_what_is_no_text():
    with pytest.raises(InputError, match=r"completions\[1\] is of type NoneType"):
        self_bleu(["a", None])


def test_a_tokenizer_that_is_not_installed_is_one_line(monkeypatch):
    def missing(**kwargs):
        raise RuntimeError("\nJapanese tokenization requires\n\tpip install")

    missing.TOKENIZERS = sacrebleu.BLEU.TOKENIZERS
    monkeypatch.setattr(bleu, "BLEU", missing)
    with pytest.raises(InputError, match="not installed: Japanese tokenization requires pip install") as error:
        tokenized(["a"], "ja-mecab")
    assert "\n" not in str(error.value)


def test_texts_are_not_kept_in_memory():
    self_bleu(["a b", "c"])
    assert Tokenizer13a.__call__.cache_info().currsize == TokenizerRegexp.__call__.cache_info().currsize == 0


def test_long_texts_are_sacrebleus_too():
    # enough words and counts that an n-gram number or a count of copies would run over a narrow type
    texts = [" ".join(str((seed * index * index) % 701) for index in range(3000)) for seed in (1, 2, 3)]
    assert self_bleu(texts) == pytest.approx(reference_self_bleu(texts), abs=1e-12)
    assert self_bleu([texts[0], texts[0] + " 1"]) == pytest.approx(
        reference_self_bleu([texts[0], texts[0] + " 1"]), abs=1e-12
    )
