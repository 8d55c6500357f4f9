"""Sixty maths problems of our own, in the schemas of OpenR1-Math-46k and GSM8K, and what `aesl data` makes of them."""

import json
from pathlib import Path

from aesl_trl.files import read_jsonl


SYSTEM = "Think step by step between <think> and </think>, then answer in \\boxed{}."
NAMES = ("Ada", "Bela", "Chloe", "Dario", "Emre", "Farah")
THINGS = ("pears", "stamps", "marbles", "tickets", "buttons")


def problem_text(number: int) -> str:
    """Return one of 60 texts of about 20 words, of which no two share eight words in a row."""
    a, b, name, thing = 3 * number + 2, 5 * number + 7, NAMES[number % 6], THINGS[number % 5]
    return (
        f"{name} has ${a}$ {thing} and gets ${b}$ more. {name} then loses {number % 7} of the {thing} while running "
        f"{number + 1} km. How many {thing} has {name} in the end?"
    )


def answer_of(number: int) -> int:
    return 3 * number + 2 + 5 * number + 7 - number % 7


def demonstration(number: int) -> str:
    a, b, lost, end = 3 * number + 2, 5 * number + 7, number % 7, answer_of(number)
    return (
        f"<think>\n{a} and {b} make {a + b}. Of these {lost} are lost.\n</think>\n\n"
        f"What is left is ${a} + {b} - {lost} = {end}$, so the answer is $\\boxed{{{end}}}$."
    )


def openr1_row(number: int, **changes) -> dict:
    """Return a row as Elliott/Openr1-Math-46k-8192 has it; `changes` replace columns."""
    row = {
        "data_source": "own",
        "prompt": [{"content": SYSTEM, "role": "system"}, {"content": problem_text(number), "role": "user"}],
        "target": [{"content": demonstration(number), "role": "assistant"}],
        "ability": "math",
        "reward_model": {"ground_truth": str(answer_of(number)), "style": "rule"},
        "extra_info": {"index": number, "split": "default"},
    }
    return row | changes


def asked(text: str) -> dict:
    """Return the column `prompt` for another problem."""
    return {"prompt": [{"content": SYSTEM, "role": "system"}, {"content": text, "role": "user"}]}


def gsm8k_row(number: int) -> dict:
    a, b, lost, end = 3 * number + 2, 5 * number + 7, number % 7, answer_of(number)
    steps = f"There are {a}+{b}=<<{a}+{b}={a + b}>>{a + b}.\nLess {lost} that is <<{a + b}-{lost}={end}>>{end}."
    return {"question": problem_text(number), "answer": f"{steps}\n#### {end:,}"}


def openr1_rows(num: int = 60) -> list[dict]:
    return [openr1_row(number) for number in range(num)]


RATES = {problem_text(number): (number % 5) / 4 for number in range(60)}


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- What `aesl data` wrote


def problems_in(path: Path) -> list[str]:
    """Return the problems of a file, in order."""
    return [row["prompt"][-1]["content"] for row in read_jsonl(path)]


def dropped_in(folder: Path) -> list[tuple]:
    return [(row["row"], row["of"], row["reason"]) for row in read_jsonl(folder / "dropped.jsonl")]


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.json*"))}
