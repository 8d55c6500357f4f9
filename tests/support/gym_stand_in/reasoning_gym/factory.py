"""The register of tasks, with the real one's names and signatures."""

from dataclasses import dataclass
from random import Random


@dataclass
class SumConfig:
    low: int = 0
    high: int = 999
    seed: int | None = None
    size: int = 500

    def validate(self):
        assert self.low <= self.high, "low must be <= high"


class Sums:
    """Sums of two numbers; half of a point for any number, as some of the real scorers give."""

    answer_cot = None

    def __init__(self, config):
        self.config = config

    def __getitem__(self, index):
        draw = Random(self.config.seed + index)
        a, b = (draw.randint(self.config.low, self.config.high) for _ in range(2))
        cot = {"answer_cot": f"{a} plus {b}\n#### {a + b}"} if self.answer_cot else {}
        return {"question": f"{a} + {b} =", "answer": f"{a + b}", "metadata": {"terms": (a, b), **cot}}

    def score_answer(self, answer, entry):
        if answer == str(sum(entry["metadata"]["terms"] or [2])):
            return 1.0
        return 0.5 if answer.lstrip("-").isdigit() else 0.0


class WorkedSums(Sums):
    answer_cot = True


class Pairs(Sums):
    """As JSON the pair becomes a list, which this scorer does not take."""

    def score_answer(self, answer, entry):
        return float(isinstance(entry["metadata"]["terms"], tuple))


class Open(Sums):
    """No single answer is right, and the answer is run as code."""

    def __getitem__(self, index):
        return {**super().__getitem__(index), "answer": None}

    def score_answer(self, answer, entry):
        return float(eval(answer) == sum(entry["metadata"]["terms"]))


class OddItems(Sums):
    """One in five has an answer that earns nothing, or that JSON cannot hold."""

    def __getitem__(self, index):
        entry = super().__getitem__(index)
        if int(entry["answer"]) % 10 == 0:
            entry["metadata"]["odd"] = {1, 2}
        return {**entry, "answer": "" if int(entry["answer"]) % 10 == 5 else entry["answer"]}


class Words(Sums):
    """The order of a set of strings depends on the process."""

    def __getitem__(self, index):
        word = " ".join({f"word-{number}" for number in range(12)})
        return {"question": f"say {index}: {word}", "answer": word, "metadata": {"terms": None}}

    def score_answer(self, answer, entry):
        return float(answer == entry["answer"])


class ChainSum(Sums):
    """Its name is the real one's, for the self-test of the grading children."""

    def score_answer(self, answer, entry):
        return float(answer == entry["answer"])


DATASETS = {
    name: (kind, SumConfig)
    for name, kind in {
        "sums": Sums,
        "worked_sums": WorkedSums,
        "pairs": Pairs,
        "open_sums": Open,
        "odd_items": OddItems,
        "words": Words,
        "chain_sum": ChainSum,
        "composite": Sums,
    }.items()
}


def create_dataset(name, **settings):
    kind, config_class = DATASETS[name]
    config = config_class(**settings)
    config.validate()
    return kind(config)
