"""CPU seconds for the self-BLEU of one prompt's completions: this package, sacrebleu's double loop, fast-bleu.

    python scripts/bench/self_bleu.py [--completions 8 16 32 64] [--words 500 4000] [--repeats 5] [--json FILE]

The completions are halves of sentences that they share and halves of words of their own with Zipf's frequencies, so
that n-grams of every order match. Before a size is timed, our scores must equal sacrebleu's to 1e-9, or there is no
table. The methods then take turns, and a ratio is the median of the ratios within a turn. CPU seconds are of this
process with all its threads: on an idle machine they are the wall time of the methods in Python, which use one thread,
and those of fast-bleu are what its threads spend together. All methods pay for sacrebleu's 13a tokenizer, each text
once.

sacrebleu's loop scores each completion against all others with one `BLEU` object. Where it would take minutes
(`--full` bounds completions^2 x words), only the first `--hypotheses` completions are scored, against all others, and
their time is scaled; the table marks those with ~.

fast-bleu (C++; pip install fast-bleu) is left out where it is not installed. It smooths as NLTK does, so that its
value is another one and is not compared.
"""

import argparse
import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path

import record
from sacrebleu.metrics.bleu import BLEU

from aesl_trl.diversity.bleu import self_bleu, sentence_bleus, tokenized


try:
    from fast_bleu import SelfBLEU
except ImportError:
    SelfBLEU = None

VOCABULARY = [f"word{index}" for index in range(20_000)]
ZIPF = [1 / (index + 1) for index in range(len(VOCABULARY))]
SHARED_SENTENCES = 200


def make_completions(num: int, words: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    shared = [_sentence(draw, 12) for _ in range(SHARED_SENTENCES)]
    return [_completion(draw, shared, words) for _ in range(num)]


def _completion(draw: random.Random, shared: list[str], words: int) -> str:
    sentences = []
    while 12 * len(sentences) < words:
        sentences.append(draw.choice(shared) if draw.random() < 0.5 else _sentence(draw, 12))
    return " ".join(" ".join(sentences).split()[:words])


def _sentence(draw: random.Random, words: int) -> str:
    return " ".join([*draw.choices(VOCABULARY, ZIPF, k=words - 1), f"{draw.randrange(100)}."])


def ours(texts: list[str]) -> float:
    start = time.process_time()
    self_bleu(texts)
    return time.process_time() - start


def sacrebleus_loop(texts: list[str], num_scored: int) -> tuple[float, list[float]]:
    """Seconds for all texts, scaled from the first `num_scored`, and the scores of those."""
    metric = BLEU(effective_order=True)  # its tokenizer keeps the texts it has seen; a new one has seen none
    start = time.process_time()
    for text in texts:
        metric.tokenizer(text.rstrip())
    tokenizing = time.process_time() - start
    start = time.process_time()
    scores = [
        metric.sentence_score(texts[place], texts[:place] + texts[place + 1 :]).score for place in range(num_scored)
    ]
    return tokenizing + (time.process_time() - start) * len(texts) / num_scored, scores


def fast_bleu(texts: list[str]) -> float:
    start = time.process_time()
    SelfBLEU(tokenized(texts)).get_score()
    return time.process_time() - start


def time_size(args: argparse.Namespace, num: int, words: int) -> dict:
    """Return the CPU seconds of one size, by method and turn."""
    num_scored = num if num * num * words <= args.full else min(num, args.hypotheses)
    check(make_completions(num, words, seed=0), min(num, args.hypotheses))
    methods: dict[str, Callable[[list[str]], float]] = {
        "aesl_trl": ours,
        "sacrebleu": lambda texts: sacrebleus_loop(texts, num_scored)[0],
    }
    if SelfBLEU is not None:
        methods["fast-bleu"] = fast_bleu
    seconds = {name: [] for name in methods}
    for turn in range(args.repeats):
        texts = make_completions(num, words, seed=turn + 1)
        for name, method in methods.items():
            seconds[name].append(method(texts))
    return {"completions": num, "words": words, "scored": num_scored, "seconds": seconds}


def check(texts: list[str], num_scored: int) -> None:
    found, (_, expected) = sentence_bleus(tokenized(texts)), sacrebleus_loop(texts, num_scored)
    for place, score in enumerate(expected):
        if abs(found[place] - score) > 1e-7:  # of 100
            raise SystemExit(f"completion {place} scores {found[place]}, by sacrebleu {score}: nothing is timed")


def bench(args: argparse.Namespace) -> dict:
    """Return the table of the peers' times to ours."""
    sizes = [time_size(args, num, words) for words, num in itertools.product(args.words, args.completions)]
    rows = []
    for size in sizes:
        seconds, scored = size["seconds"], size["scored"]
        is_scaled = scored < size["completions"]
        name = f"{size['completions']} completions of {size['words']} words{f' ~ ({scored} scored)' * is_scaled}"
        peers = (seconds.get(peer) for peer in ("sacrebleu", "fast-bleu"))
        rows.append([name, *(peer and record.ratio(peer, seconds["aesl_trl"]) for peer in peers)])
    columns = ["one prompt", "sacrebleu's time to ours", "fast-bleu's time to ours"]
    return record.table("Self-BLEU, CPU time", columns, rows, sizes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--completions", type=int, nargs="+", default=[8, 16, 32, 64], help="completions of a prompt")
    parser.add_argument("--words", type=int, nargs="+", default=[500, 4000], help="words of a completion")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--full", type=int, default=2_100_000, help="completions^2 x words that sacrebleu does fully")
    parser.add_argument("--hypotheses", type=int, default=4, help="completions that it scores beyond that")
    parser.add_argument("--json", type=Path, metavar="FILE", help="record every time")
    args = parser.parse_args()
    if min(*args.completions, args.repeats + 1, args.hypotheses + 1) < 2 or min(args.words) < 1:
        parser.error("at least 2 completions, 1 word, 1 repeat and 1 hypothesis are needed")
    record.write(args.json, "self_bleu", [record.show(bench(args))])


if __name__ == "__main__":
    main()
