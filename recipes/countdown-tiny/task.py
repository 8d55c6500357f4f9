"""Four numbers make a fifth: a verifiable task of several steps, for a model of 2.3 M parameters.

A prompt gives four numbers and a target; a completion uses each number once, from left to right, and ends at the
target. It may be written in one go, or step by step with every intermediate result:

    three five seven two make twenty  ->  three times five plus seven minus two
    three five seven two make twenty  ->  three times five is fifteen then fifteen plus seven is twentytwo then ...

Numbers are words, so that each is one token of a Qwen2 tokenizer and one word of BLEU. Most problems have several
solutions. Each use of the task has problems of its own, whatever the seed, so that none is seen twice.
"""

import random
from collections.abc import Callable, Iterator


ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
NUMBERS = (*ONES, *TEENS, *(ten + (one if one != "zero" else "") for ten in TENS for one in ONES))  # 0 to 99
VALUE_OF = {word: value for value, word in enumerate(NUMBERS)}
OPERATIONS: dict[str, Callable[[int, int], int | None]] = {  # None: no whole number from 0 to 99
    "plus": lambda a, b: a + b if a + b < 100 else None,
    "minus": lambda a, b: a - b if a >= b else None,
    "times": lambda a, b: a * b if a * b < 100 else None,
    "over": lambda a, b: a // b if b and a % b == 0 else None,
}
EASY = ("plus", "minus")  # all that the demonstrations use
MAKE, IS, THEN = "make", "is", "then"
WORDS = (*NUMBERS, *OPERATIONS, MAKE, IS, THEN)
SIZE, LARGEST = 4, 9  # numbers of a problem, from 1 to the largest

# The problems of each use, by a number made of them modulo 7.
USES = {"base": (0, 1), "demonstrations": (2,), "eval_demonstrations": (3,), "rl": (4, 5), "held_out": (6,)}


def random_chain(rng: random.Random, operations: tuple[str, ...]) -> tuple[list[int], list[str], list[int]]:
    """Numbers in the order of use, the operations between them, and the result of each; drawn until all are whole."""
    while True:
        numbers = [rng.randint(1, LARGEST) for _ in range(SIZE)]
        names = rng.choices(operations, k=SIZE - 1)
        results = [numbers[0]]
        for name, number in zip(names, numbers[1:], strict=True):
            if results[-1] is not None:
                results.append(OPERATIONS[name](results[-1], number))
        if None not in results:
            return numbers, names, results[1:]


def use_of(numbers: list[int], target: int) -> int:
    """A problem's residue, whatever the order of its numbers."""
    code = target
    for number in sorted(numbers):
        code = code * 11 + number
    return code * 2654435761 % 2**32 // 64 % 7


def chains(use: str, seed: int, operations: tuple[str, ...] = tuple(OPERATIONS)) -> Iterator[tuple]:
    """Solved problems that belong to `use` (a key of `USES`), in the order of `seed`, endless."""
    rng = random.Random(f"{use} {seed}")
    while True:
        numbers, names, results = random_chain(rng, operations)
        if use_of(numbers, results[-1]) in USES[use]:
            yield rng.sample(numbers, SIZE), numbers, names, results


def prompt_of(numbers: list[int], target: int) -> str:
    return " ".join([*(NUMBERS[number] for number in numbers), MAKE, NUMBERS[target]])


def at_once(numbers: list[int], names: list[str]) -> str:
    words = [NUMBERS[numbers[0]]]
    for name, number in zip(names, numbers[1:], strict=True):
        words += [name, NUMBERS[number]]
    return " ".join(words)


def in_steps(numbers: list[int], names: list[str], results: list[int]) -> str:
    left = [numbers[0], *results]
    steps = [
        f"{NUMBERS[left[i]]} {name} {NUMBERS[numbers[i + 1]]} {IS} {NUMBERS[results[i]]}"
        for i, name in enumerate(names)
    ]
    return f" {THEN} ".join(steps)


def _rows(use: str, seed: int, num: int, operations: tuple[str, ...] = tuple(OPERATIONS)) -> list[dict]:
    """`num` problems, none twice, with a solution in steps."""
    rows, seen = [], set()
    for shown, numbers, names, results in chains(use, seed, operations):
        problem = (*sorted(numbers), results[-1])
        if problem in seen:
            continue
        seen.add(problem)
        prompt = [{"role": "user", "content": prompt_of(shown, results[-1])}]
        completion = [{"role": "assistant", "content": in_steps(numbers, names, results)}]
        rows.append({"prompt": prompt, "completion": completion, "numbers": shown, "target": results[-1]})
        if len(rows) == num:
            return rows


def demonstrations(seed: int = 0, num: int = 200) -> list[dict]:
    """Solutions in steps, of sums and differences only: "prompt", "completion" (messages), "numbers" and "target"."""
    return _rows("demonstrations", seed, num, EASY)


def eval_demonstrations(seed: int = 0, num: int = 128) -> list[dict]:
    """As the demonstrations, other problems: what "the best evaluation score" is measured on."""
    return _rows("eval_demonstrations", seed, num, EASY)


def _problems(use: str, seed: int, num: int) -> list[dict]:
    return [{key: row[key] for key in ("prompt", "numbers", "target")} for row in _rows(use, seed, num)]


def rl_problems(seed: int = 0, num: int = 2048) -> list[dict]:
    """Problems made with all four operations, without completions: "prompt" (messages), "numbers" and "target"."""
    return _problems("rl", seed, num)


def held_out(seed: int = 0, num: int = 512) -> list[dict]:
    """As RL's, problems that no training sees: diversity and evaluation take the first so many."""
    return _problems("held_out", seed, num)


def countdown_reward(prompts, completions, numbers: list[list[int]], target: list[int], **kwargs) -> list[float]:
    """1.0 where a completion uses each number once, all that it states is true, and the last result is the target."""
    return [
        float(is_right(_text(completion), given, wanted))
        for completion, given, wanted in zip(completions, numbers, target, strict=True)
    ]


def _text(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else (completion[-1]["content"] if completion else "")


def is_right(text: str | None, numbers: list[int], target: int) -> bool:
    """Whether `text`, in either form, makes `target` of `numbers`."""
    words = (text or "").split()
    used, result = _in_steps(words) if IS in words else _at_once(words)
    return result == target and sorted(used) == sorted(numbers)


def _at_once(words: list[str]) -> tuple[list[int], int | None]:
    """The numbers used and the result; None where the words are no calculation."""
    used = [VALUE_OF.get(word) for word in words[::2]]
    if not used or None in used or len(words) % 2 == 0:
        return [], None
    result = used[0]
    for name, number in zip(words[1::2], used[1:], strict=True):
        if name not in OPERATIONS or (result := OPERATIONS[name](result, number)) is None:
            return [], None
    return used, result


def _in_steps(words: list[str]) -> tuple[list[int], int | None]:
    """The same of steps, each of which begins with the result of the one before and states its own."""
    used, result = [], None
    for number, step in enumerate(" ".join(words).split(f" {THEN} ")):
        match step.split():
            case [left, name, right, "is", stated] if {left, right, stated} <= VALUE_OF.keys() and name in OPERATIONS:
                a, b = VALUE_OF[left], VALUE_OF[right]
                if number and a != result or OPERATIONS[name](a, b) != VALUE_OF[stated]:
                    return [], None
                used += [b] if number else [a, b]
                result = VALUE_OF[stated]
            case _:
                return [], None
    return used, result
