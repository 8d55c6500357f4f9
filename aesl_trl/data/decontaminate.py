"""Find problems of benchmarks in a text, by their words alone.

A problem is in a benchmark when it shares an n-gram of words with one of the benchmark's problems, as in appendix C of
GPT-3 (Brown et al., arXiv 2005.14165). With `share` above 0, the shared n-grams must cover more than that share of the
benchmark's problem (8-grams and one half as in Tulu 3, Lambert et al., arXiv 2411.15124). No n-gram finds paraphrases,
translations and changed numbers.
"""

import re
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError, nearest
from .benchmarks import BENCHMARKS
from .problems import normalise, without_layout
from .rows import load_rows, nearest_column


SHORTEST = 8  # words; GPT-3's lower bound on n, below which chance collisions prevail
PROBLEM_COLUMNS = ("problem", "question", "Problem", "Question", "prompt")
_WORD = re.compile(r"[^\W_]+")


class Overlap(NamedTuple):
    benchmark: str
    index: int  # of the problem in its benchmark, from 0
    words: str  # the shared n-gram, or the whole of a short problem


def words(text: str) -> list[str]:
    """Return runs of letters and digits in lower case, as GPT-3 compares them: no punctuation, so no operators."""
    return _WORD.findall(without_layout(text))


class BenchmarkIndex:
    """The n-grams, of `n` words each, of all benchmark problems.

    A problem of fewer than `n` words but at least [`SHORTEST`] counts as one n-gram of its own length. A shorter
    problem is found only where the whole normalised text is equal. More than `share`, in [0, 1), of a benchmark
    problem's words must lie in shared n-grams; at 0 one shared n-gram is enough.
    """

    def __init__(self, benchmarks: dict[str, list[str]], *, n: int = 13, share: float = 0.0):
        self.share = share
        self._whole: dict[str, tuple[str, int]] = {}
        self._words: dict[tuple[str, int], list[str]] = {}
        self._grams: dict[int, dict[str, list[tuple[str, int]]]] = {}  # by their length
        for benchmark, texts in benchmarks.items():
            for index, text in enumerate(texts):
                place = benchmark, index
                self._whole.setdefault(normalise(text), place)
                found = self._words[place] = words(text)
                length = min(n, len(found))
                if length >= min(n, SHORTEST):
                    for gram in dict.fromkeys(ngrams(found, length)):
                        self._grams.setdefault(length, {}).setdefault(gram, []).append(place)

    def find(self, text: str) -> Overlap | None:
        """Return the first benchmark problem that `text` contains, or None."""
        whole = self._whole.get(normalise(text))
        if whole is not None:
            return Overlap(*whole, " ".join(self._words[whole]))
        found = words(text)
        for length, places_of in self._grams.items():
            shared = dict.fromkeys(gram for gram in ngrams(found, length) if gram in places_of)
            seen: set[tuple[str, int]] = set()  # a problem with many of the n-grams is looked at once
            for gram in shared:
                for place in places_of[gram]:
                    if not self.share or (place not in seen and self._covered(place, shared, length) > self.share):
                        return Overlap(*place, gram)
                    seen.add(place)
        return None

    def _covered(self, place: tuple[str, int], shared: Container[str], length: int) -> float:
        """Return the share of the benchmark problem's words that lie in one of the shared n-grams."""
        of_problem, covered = self._words[place], set()
        for start, gram in enumerate(ngrams(of_problem, length)):
            if gram in shared:
                covered.update(range(start, start + length))
        return len(covered) / len(of_problem)


def ngrams(found: list[str], n: int) -> Iterator[str]:
    return (" ".join(found[start : start + n]) for start in range(len(found) - n + 1))


def load_benchmark_problems(name: str) -> list[str]:
    """Load the problem texts of a local file, or of a benchmark of `aesl eval` from the hub; refuse any other name."""
    where = f"decontaminate: {name}"
    if Path(name).exists():
        rows, columns = load_rows(name, field="decontaminate"), PROBLEM_COLUMNS
    elif name in BENCHMARKS:
        bench = BENCHMARKS[name]
        rows, columns = load_rows(bench.hub, split=bench.split, config=bench.config, field=where), [bench.problem]
    else:
        known = ", ".join(BENCHMARKS)
        raise InputError(f"{where} is neither a file nor one of {known}{nearest(name, BENCHMARKS)}")
    column = next((column for column in columns if column in rows.column_names), None)
    if column is None:
        known, found = ", ".join(columns), ", ".join(rows.column_names)
        near = nearest_column(rows.column_names, columns)
        raise InputError(f"{where} has no column of problems ({known}), its columns are {found}{near}")
    texts = []
    for number, value in enumerate(rows[column]):
        # Of a list of messages the problem is the user's last one
        if isinstance(value, list):
            turns = [turn for turn in value if isinstance(turn, dict) and turn.get("role") == "user"]
            value = turns[-1].get("content") if turns else None
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{where}, row {number} (from 0): {column} holds no problem")
        texts.append(value)
    return texts
