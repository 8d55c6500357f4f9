"""Sixteen symbols, eight list transformations: a verifiable task for a model of 0.37 M parameters.

A prompt is a task symbol and six digits; a completion names a skill and writes the transformed digits:

    B three one four one five nine  ->  ascend one one three four five nine

[skills-chain-tiny](../skills-chain-tiny/README.md) asks for two skills in turn, the second of which the base knows:

    B c three one four one five nine  ->  ascend one one three four five nine descend nine five four three one one

Digits are words, so that each is one token of a Qwen2 tokenizer and one word of BLEU. Two symbols ask for each skill,
and nothing in a prompt says which: it has to be learnt from demonstrations or from reward. Each use of the task has
digit lists of its own, whatever the seed, so that no problem is seen twice.
"""

import random
from collections.abc import Callable, Iterator


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SKILLS: dict[str, Callable[[list[int]], list[int]]] = {
    "reverse": lambda digits: digits[::-1],
    "ascend": sorted,
    "descend": lambda digits: sorted(digits, reverse=True),
    "left": lambda digits: digits[1:] + digits[:1],
    "right": lambda digits: digits[-1:] + digits[:-1],
    "add": lambda digits: [(digit + 1) % 10 for digit in digits],
    "complement": lambda digits: [9 - digit for digit in digits],
    "swap": lambda digits: [digits[i ^ 1] for i in range(len(digits))],
}
FIRST = tuple("ABCDEFGHIJKLMNOPQRSTUVWX")  # the first symbols of skills-chain-tiny
SYMBOLS = FIRST[:16]
SKILL_OF = {symbol: tuple(SKILLS)[i % len(SKILLS)] for i, symbol in enumerate(FIRST)}
SECOND = dict(zip("abcdefgh", SKILLS, strict=True))  # the second symbols, and the skills that they ask for
LENGTH = 6  # digits in a list
NUM_CHAINS = 24  # demonstrations of skills-chain-tiny

# The digit lists of each use, by their number modulo 7 (which shares no factor with 10, so no digit betrays the use).
USES = {"base": (0, 1), "demonstrations": (2,), "eval_demonstrations": (3,), "rl": (4, 5), "held_out": (6,)}


def digit_lists(use: str, seed: int) -> Iterator[list[int]]:
    """Digit lists that belong to `use` (a key of `USES`), in the order of `seed`, endless, none twice."""
    rng, seen = random.Random(f"{use} {seed}"), set()
    while True:
        number = rng.randrange(10**LENGTH)
        if number % 7 in USES[use] and number not in seen:
            seen.add(number)
            yield [int(digit) for digit in f"{number:0{LENGTH}d}"]


def roles(base: int = 0) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the four skills that base number `base` prefers, the four that are rare, and the demonstrated symbols.

    Those are one symbol of each rare skill. Base 0 is the recipe's own; the others permute skills and symbols by their
    number. No base is taught what a symbol means, so which skill a symbol asks for need not be permuted.
    """
    skills, later = list(SKILLS), 0
    if base:
        draw = random.Random(f"skills {base}")
        draw.shuffle(skills)
        later = draw.getrandbits(4)  # a bit for each rare skill: its first symbol, or its second
    common, rare = tuple(skills[:4]), tuple(skills[4:])
    demonstrated = (SYMBOLS[tuple(SKILLS).index(skill) + 8 * (later >> i & 1)] for i, skill in enumerate(rare))
    return common, rare, tuple(demonstrated)


COMMON, RARE, DEMONSTRATED = roles()


def in_words(digits: list[int]) -> str:
    return " ".join(DIGITS[digit] for digit in digits)


def prompt_of(instruction: str, digits: list[int]) -> str:
    """`instruction` is a symbol, or a skill's name."""
    return f"{instruction} {in_words(digits)}"


def completion_of(skill: str, digits: list[int]) -> str:
    return f"{skill} {in_words(SKILLS[skill](digits))}"


def _rows(use: str, seed: int, symbols: tuple[str, ...], num: int) -> list[dict]:
    """`num` problems that go round `symbols`, so that every prefix of the list asks for each symbol equally often."""
    rows = []
    for i, digits in zip(range(num), digit_lists(use, seed), strict=False):
        symbol = symbols[i % len(symbols)]
        answer = in_words(SKILLS[SKILL_OF[symbol]](digits))
        prompt = [{"role": "user", "content": prompt_of(symbol, digits)}]
        rows.append({"prompt": prompt, "answer": answer, "symbol": symbol, "digits": digits})
    return rows


def _with_gold(rows: list[dict]) -> list[dict]:
    def gold(row: dict) -> list[dict]:
        return [{"role": "assistant", "content": completion_of(SKILL_OF[row["symbol"]], row["digits"])}]

    return [{"prompt": row["prompt"], "completion": gold(row), "answer": row["answer"]} for row in rows]


def demonstrations(seed: int = 0, num: int = 200, base: int = 0) -> list[dict]:
    """Gold answers for four symbols only, all of them rare skills: "prompt", "completion" (messages) and "answer"."""
    return _with_gold(_rows("demonstrations", seed, roles(base)[2], num))


# What an ablation trains on instead of `demonstrations`: another number, other symbols, or answers that are wrong.


def demonstrations_50(seed: int = 0) -> list[dict]:
    return demonstrations(seed, num=50)


def demonstrations_800(seed: int = 0) -> list[dict]:
    return demonstrations(seed, num=800)


def demonstrations_2_skills(seed: int = 0, num: int = 200) -> list[dict]:
    """Two symbols, of two rare skills: RL has to find the two others by itself."""
    return _with_gold(_rows("demonstrations", seed, DEMONSTRATED[:2], num))


def demonstrations_8_symbols(seed: int = 0, num: int = 200) -> list[dict]:
    """All eight symbols of the rare skills."""
    return _with_gold(_rows("demonstrations", seed, SYMBOLS[4:8] + SYMBOLS[12:], num))


def demonstrations_8_skills(seed: int = 0, num: int = 200) -> list[dict]:
    """One symbol of every skill, common or rare."""
    return _with_gold(_rows("demonstrations", seed, SYMBOLS[:8], num))


def demonstrations_wrong_25(seed: int = 0, num: int = 200) -> list[dict]:
    """Those of `demonstrations`, a quarter of them answered by another rare skill than the symbol asks for."""
    rng, rows = random.Random(f"wrong {seed}"), _rows("demonstrations", seed, DEMONSTRATED, num)
    wrong, demonstrated = set(rng.sample(range(num), num // 4)), _with_gold(rows)
    for i in sorted(wrong):
        skill = rng.choice([skill for skill in RARE if skill != SKILL_OF[rows[i]["symbol"]]])
        demonstrated[i]["completion"][0]["content"] = completion_of(skill, rows[i]["digits"])
    return demonstrated


def eval_demonstrations(seed: int = 0, num: int = 128, base: int = 0) -> list[dict]:
    """Gold answers for the demonstrated symbols on other digits: what "the best evaluation score" is measured on."""
    return _with_gold(_rows("eval_demonstrations", seed, roles(base)[2], num))


# The same for the bases of scripts/build_skills_tiny_base.py --seed 1, 2 and 3: their rare skills are others.


def demonstrations_base_1(seed: int = 0) -> list[dict]:
    return demonstrations(seed, base=1)


def demonstrations_base_2(seed: int = 0) -> list[dict]:
    return demonstrations(seed, base=2)


def demonstrations_base_3(seed: int = 0) -> list[dict]:
    return demonstrations(seed, base=3)


def eval_demonstrations_base_1(seed: int = 0) -> list[dict]:
    return eval_demonstrations(seed, base=1)


def eval_demonstrations_base_2(seed: int = 0) -> list[dict]:
    return eval_demonstrations(seed, base=2)


def eval_demonstrations_base_3(seed: int = 0) -> list[dict]:
    return eval_demonstrations(seed, base=3)


def _problems(use: str, seed: int, num: int) -> list[dict]:
    columns = ("prompt", "answer", "symbol")
    return [{column: row[column] for column in columns} for row in _rows(use, seed, SYMBOLS, num)]


def rl_problems(seed: int = 0, num: int = 5120) -> list[dict]:
    """Problems for all 16 symbols: "prompt" (messages), "answer" and "symbol". 5120 is 160 steps of 32."""
    return _problems("rl", seed, num)


def held_out(seed: int = 0, num: int = 512) -> list[dict]:
    """Problems for all 16 symbols that no training sees: diversity and evaluation take the first so many."""
    return _problems("held_out", seed, num)


# Two skills in turn. The demonstrations are a sample of RL's own problems.


def chain_of(first: str, second: str, digits: list[int]) -> str:
    """Return the completion that applies the skill `first`, and then `second` to what comes out."""
    return f"{completion_of(first, digits)} {completion_of(second, SKILLS[first](digits))}"


def _chains(use: str, seed: int, num: int) -> list[dict]:
    """Return `num` problems with their gold completions; they go round the 192 pairs of symbols."""
    rows = []
    for i, digits in zip(range(num), digit_lists(use, seed), strict=False):
        # each 24 rows have all first symbols, each 192 rows all pairs
        symbol, other = FIRST[i % len(FIRST)], tuple(SECOND)[(i + i // len(FIRST)) % len(SECOND)]
        gold = chain_of(SKILL_OF[symbol], SECOND[other], digits)
        prompt = [{"role": "user", "content": prompt_of(f"{symbol} {other}", digits)}]
        rows.append({"prompt": prompt, "completion": [{"role": "assistant", "content": gold}]})
        rows[-1]["answer"] = _lists_written(gold)
    return rows


def _asked(rows: list[dict]) -> list[dict]:
    return [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows]


def chain_demonstrations(seed: int = 0, num: int = NUM_CHAINS) -> list[dict]:
    """Gold answers for a random sample of the problems of `chain_rl_problems`."""
    return random.Random(f"chains {seed}").sample(_chains("rl", seed, 5120), num)


def chain_eval_demonstrations(seed: int = 0, num: int = 192) -> list[dict]:
    """Gold answers on other digits, each pair of symbols once."""
    return _chains("eval_demonstrations", seed, num)


def chain_rl_problems(seed: int = 0, num: int = 5120) -> list[dict]:
    """Problems without completions, those of the demonstrations among them. 5120 is 160 steps of 32."""
    return _asked(_chains("rl", seed, num))


def chain_held_out(seed: int = 0, num: int = 384) -> list[dict]:
    """Problems that no training sees, each pair of symbols twice."""
    return _asked(_chains("held_out", seed, num))


def skill_reward(prompts, completions, answer: list[str], **kwargs) -> list[float]:
    """1.0 where a completion is a skill's name and then exactly the digits of its `answer`, else 0.0.

    Of two skills in turn the `answer` holds both lists, and a name stands before each. The names are free: a symbol
    asks for a list, and a list that two skills agree on counts for both.
    """
    return [
        float(_lists_written(_text(completion)) == gold) for completion, gold in zip(completions, answer, strict=True)
    ]


def _text(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else (completion[-1]["content"] if completion else "")


def _lists_written(text: str | None) -> str | None:
    words = (text or "").strip().split(" ")
    digits = [word for i, word in enumerate(words) if i % (LENGTH + 1)]
    whole = len(words) % (LENGTH + 1) == 0 and all(name in SKILLS for name in words[:: LENGTH + 1])
    return " ".join(digits) if whole else None
