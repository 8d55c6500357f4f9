"""Which problems are the same, and which are in a benchmark: comparisons of text, nothing else.

Two problems are the same when their normalised texts are equal. A problem is in a benchmark when it shares an n-gram
of words with one of its problems, as in appendix C of GPT-3 (Brown et al., arXiv 2005.14165), or, with `share` above
0, when the shared n-grams cover more than that share of the benchmark problem (8-grams and one half as in Tulu 3,
Lambert et al., arXiv 2411.15124). Left out: paraphrases, translations and changed numbers, which no n-gram finds.
"""

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError, nearest
from .rows import load_rows


SHORTEST = 8  # words; GPT-3's lower bound on n, below which chance collisions prevail
PROBLEM_COLUMNS = ("problem", "question", "Problem", "Question", "prompt")
# Layout only: with or without them a formula is the same.
_DELIMITERS = re.compile(r"\\[()\[\],;:! ]|(?<!\\)\$|~")
_LAYOUT = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|quad|qquad)(?![a-zA-Z])")
_FRACTION = re.compile(r"\\[dt]frac(?![a-zA-Z])")
_WORD = re.compile(r"[^\W_]+")


class Overlap(NamedTuple):
    benchmark: str
    index: int  # of the problem in its benchmark, from 0
    words: str  # what is shared: an n-gram, or the whole of a short problem


def normalise(text: str) -> str:
    """`text` without case, white space, layout commands of LaTeX and the punctuation at its end.

    Operators stay: `x + 1 = 2` and `x - 1 = 2` are two problems.
    """
    return re.sub(r"\s+", "", _plain(text)).rstrip(".?!:;,")


def words(text: str) -> list[str]:
    """Runs of letters and digits in lower case, as GPT-3 compares them: no punctuation, so no operators either."""
    return _WORD.findall(_plain(text))


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    return _FRACTION.sub(r"\\frac", _LAYOUT.sub(" ", _DELIMITERS.sub(" ", text)))


class BenchmarkIndex:
    """The n-grams of all benchmark problems.

    A problem of fewer than `n` words but at least [`SHORTEST`] counts as one n-gram of its own length; of a shorter
    one the normalised text must be equal.

    Args:
        benchmarks: the problems of each benchmark.
        n: words of an n-gram.
        share: in [0, 1): the share of a benchmark problem's words that must lie in shared n-grams, exclusive; at 0 one
            n-gram is enough.
    """

    def __init__(self, benchmarks: dict[str, list[str]], *, n: int = 13, share: float = 0.0):
        self.share = share
        self._whole: dict[str, tuple[str, int]] = {}
        self._words: dict[tuple[str, int], list[str]] = {}
        self._grams: dict[int, dict[str, list[tuple[str, int]]]] = {}  # by their length
        for benchmark, texts in benchmarks.items():
            for place in ((benchmark, index) for index in range(len(texts))):
                self._add(texts[place[1]], place, n)

    def _add(self, text: str, place: tuple[str, int], n: int) -> None:
        self._whole.setdefault(normalise(text), place)
        found = self._words[place] = words(text)
        length = min(n, len(found))
        if length >= min(n, SHORTEST):
            for gram in dict.fromkeys(ngrams(found, length)):
                self._grams.setdefault(length, {}).setdefault(gram, []).append(place)

    def find(self, text: str) -> Overlap | None:
        """The first benchmark problem that `text` contains, in the sense above; None where there is none."""
        whole = self._whole.get(normalise(text))
        if whole is not None:
            return Overlap(*whole, " ".join(self._words[whole]))
        found = words(text)
        for length, places_of in self._grams.items():
            shared = [gram for gram in ngrams(found, length) if gram in places_of]
            for gram in shared:
                for place in places_of[gram]:
                    if not self.share or self._covered(place, set(shared), length) > self.share:
                        return Overlap(*place, gram)
        return None

    def _covered(self, place: tuple[str, int], shared: set[str], length: int) -> float:
        """Share of the benchmark problem's words that lie in one of the shared n-grams."""
        of_problem, covered = self._words[place], set()
        for start, gram in enumerate(ngrams(of_problem, length)):
            if gram in shared:
                covered.update(range(start, start + length))
        return len(covered) / len(of_problem)


def ngrams(found: list[str], n: int) -> Iterator[str]:
    return (" ".join(found[start : start + n]) for start in range(len(found) - n + 1))


def load_benchmarks(names: list[str], *, field: str = "decontaminate") -> dict[str, list[str]]:
    """The problem texts of each of `names`: local files, or benchmarks of `aesl eval` from the hub.

    Raises:
        InputError: neither a file nor a benchmark, one that cannot be read, or one without problems.
    """
    return {name: _file_problems(name, field) if Path(name).exists() else _hub_problems(name, field) for name in names}


def _file_problems(name: str, field: str) -> list[str]:
    rows = load_rows(name, field=field)
    column = next((column for column in PROBLEM_COLUMNS if column in rows.column_names), None)
    if column is None:
        known, columns = ", ".join(PROBLEM_COLUMNS), ", ".join(rows.column_names)
        near = next(filter(None, (nearest(own, PROBLEM_COLUMNS) for own in rows.column_names)), "")
        raise InputError(f"{field}: {name} has no column of problems ({known}), its columns are {columns}{near}")
    return _texts(rows, column, f"{field}: {name}")


def _hub_problems(name: str, field: str) -> list[str]:
    from .benchmarks import BENCHMARKS

    if name not in BENCHMARKS:
        near = nearest(name, BENCHMARKS)
        raise InputError(f"{field}: {name} is neither a file nor one of {', '.join(BENCHMARKS)}{near}")
    benchmark = BENCHMARKS[name]
    rows = load_rows(benchmark.hub, split=benchmark.split, config=benchmark.config, field=f"{field}: {name}")
    if benchmark.problem not in rows.column_names:
        found = ", ".join(rows.column_names)
        raise InputError(f"{field}: {name} has no column {benchmark.problem!r}, its columns are {found}")
    return _texts(rows, benchmark.problem, f"{field}: {name}")


def _texts(rows: Any, column: str, where: str) -> list[str]:
    texts = [_problem_text(value) for value in rows[column]]
    empty = next((number for number, text in enumerate(texts) if not text.strip()), None)
    if empty is not None:
        raise InputError(f"{where}, row {empty} (from 0): {column} holds no problem")
    return texts


def _problem_text(value: Any) -> str:
    """A text, or the last message of the user."""
    if isinstance(value, list):
        turns = [turn for turn in value if isinstance(turn, dict) and turn.get("role") == "user"]
        value = turns[-1].get("content") if turns else None
    return value if isinstance(value, str) else ""
