"""decontaminate: an overlap that was planted is found, unrelated text is not, and formulas stay apart."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from small_problems import write_rows

from aesl_trl.data.decontaminate import BenchmarkIndex, Overlap, load_benchmark_problems, words
from aesl_trl.errors import InputError


WORD = st.text("abcdefgh", min_size=2, max_size=5)
OTHER = st.text("pqrstuvw", min_size=2, max_size=5)


def texts(word=WORD, low=13, high=40):
    return st.lists(word, min_size=low, max_size=high).map(" ".join)


@given(texts(), texts(OTHER, 0), texts(OTHER, 0), st.integers(0, 27), st.booleans())
def test_a_planted_n_gram_is_found_wherever_it_stands(problem, before, after, start, shout):
    found = problem.split()
    start = min(start, len(found) - 13)
    shared = " ".join(found[start : start + 13])
    planted = shared.upper().replace(" ", ", ") if shout else shared
    overlap = BenchmarkIndex({"bench": ["unrelated", problem]}).find(f"{before} {planted}. {after}")
    assert overlap is not None and (overlap.benchmark, overlap.index) == ("bench", 1)
    assert overlap.words in " ".join(found)


@given(texts(), texts(OTHER, 1), st.integers(0, 27))
def test_one_word_less_is_no_overlap(problem, around, start):
    found = problem.split()
    start = min(start, len(found) - 13)
    planted = " ".join(found[start : start + 12])
    assume(len(found) > 12)
    assert BenchmarkIndex({"bench": [problem]}).find(f"{around} {planted} {around}") is None


@given(st.lists(texts(), min_size=1, max_size=4), texts(OTHER, 1))
def test_unrelated_text_is_not_found(problems, text):
    assert BenchmarkIndex({"bench": problems}).find(text) is None


@pytest.mark.parametrize(
    ("problem", "text", "is_found"),
    [
        # nine words: one n-gram of nine
        ("one two three four five six seven eight nine", "so one two three four five six seven eight nine ten", True),
        ("one two three four five six seven eight nine", "one two three four five six seven eight ten", False),
        # below eight words only the whole text counts, and operators with it
        ("Compute $2 + 2$.", "compute $2+2$", True),
        ("Compute $2 + 2$.", "Compute $2 - 2$.", False),
        ("Compute $2 + 2$.", "Compute $2 + 2$ and then halve it.", False),
    ],
)
def test_short_problems(problem, text, is_found):
    assert (BenchmarkIndex({"bench": [problem]}).find(text) is not None) is is_found


def test_share_leaves_boilerplate_alone():
    """Half of the problem must be shared; the phrase that every problem of a contest ends with is not."""
    phrase = "can be written as m over n where m and n are coprime positive integers"
    problem = f"The area of a red kite with sides three and five and a right angle at the top {phrase}"
    other = f"The chance that two of nine dice agree {phrase}"
    assert BenchmarkIndex({"bench": [problem]}).find(other) is not None
    half = BenchmarkIndex({"bench": [problem]}, n=8, share=0.5)
    assert half.find(other) is None
    assert half.find("Today: " + problem) == Overlap("bench", 0, " ".join(problem.lower().split()[:8]))


def test_a_problem_is_looked_at_once_however_many_n_grams_it_shares(monkeypatch):
    looked_at, covered = [], BenchmarkIndex._covered

    def counted(self, place, *more):
        looked_at.append(place)
        return covered(self, place, *more)

    monkeypatch.setattr(BenchmarkIndex, "_covered", counted)
    phrase = "let us find the sum of all possible values of the unknown number below where"
    problems = [f"{phrase} {' '.join(f'{letter}{n}' for n in range(40))}" for letter in "abcde"]
    index = BenchmarkIndex({"bench": problems}, n=8, share=0.5)
    assert index.find(f"{phrase} nothing else is alike") is None
    assert looked_at == [("bench", number) for number in range(5)]  # not once for each of the eight n-grams
    assert index.find(f"Today: {problems[3]}") == Overlap("bench", 3, "let us find the sum of all possible")


def test_words_are_letters_and_digits():
    assert words("Let $\\dfrac{a}{b_1}$, A-B!") == ["let", "frac", "a", "b", "1", "a", "b"]


def test_problems_of_local_files(tmp_path):
    one = write_rows(tmp_path / "one.jsonl", [{"question": "q", "answer": "a"}])
    two = write_rows(
        tmp_path / "two.jsonl", [{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]}]
    )
    assert load_benchmark_problems(one) == ["q"] and load_benchmark_problems(two) == ["p"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problm": "p", "answer": "a"}, "columns are problm, answer; did you mean 'problem'"),
        ({"problem": " "}, "row 0 .* holds no problem"),
        ({"prompt": [{"role": "system", "content": "s"}]}, "row 0 .* holds no problem"),
    ],
)
def test_files_without_problems_are_refused(row, message, tmp_path):
    path = write_rows(tmp_path / "bench.jsonl", [row])
    with pytest.raises(InputError, match=message):
        load_benchmark_problems(path)
