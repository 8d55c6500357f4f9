"""`math_reward`: is the answer in a completion the gold answer? math-verify decides; this file cleans the notation.

math-verify reads LaTeX strictly, while people write `\\frac43`, `4.5e33`, `104.` or `\\textbf{(073)}`. Both sides are
normalised first. Of several boxes the last one counts, with those that only commas, "and" or "or" join to it. A gold
may be a whole solution, a boxed answer, LaTeX between dollars, GSM8K's `#### 18`, or a bare answer as in MATH-500.

The functions parse text only. They run in the grading children (grading.py), because math-verify can hang.
"""

import re
from collections.abc import Iterator
from typing import Any


# ---- Notation

COMMAND = re.compile(r"\\(?:[a-zA-Z]+|.)", re.S)
SHORT = re.compile(r"\\[dtc]?frac(?![a-zA-Z])|\\sqrt(?![a-zA-Z])")
ROOT = re.compile(r"\s*\[[^\[\]]*\]")
FONT = re.compile(r"\\(?:textbf|mathbf|boldsymbol|bm|textit|mathit)\s*(?=\{)")
EXPONENT = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))[eE]([+-]?\d+)")
NUMBER_IN_PARENTHESES = re.compile(r"\(\s*([+-]?[\d.]*\d)\s*\)")


def normalise(answer: str) -> str:
    r"""Rewrite one answer in the notation that math-verify reads.

    `\frac43` becomes `\frac{4}{3}`, `\textbf{(073)}` becomes `073`, `104.` becomes `104`, and `4.5e33` becomes
    `4.5 \times 10^{33}`. Everything else stays.
    """
    answer = _without_fonts(brace_arguments(answer.replace(r"\varnothing", r"\emptyset"))).strip()
    answer = re.sub(r"(?<=[\w})\]])\.$", "", answer).strip()
    if match := NUMBER_IN_PARENTHESES.fullmatch(answer):
        answer = match[1]
    if match := EXPONENT.fullmatch(answer):
        answer = rf"{match[1]} \times 10^{{{int(match[2])}}}"
    return answer


def brace_arguments(text: str) -> str:
    r"""Put the one-token arguments of `\frac` and `\sqrt` in braces, as TeX reads them: `\sqrt2` is `\sqrt{2}`."""
    parts, at = [], 0
    while match := SHORT.search(text, at):
        parts.append(text[at : match.end()])
        at = match.end()
        if match[0] == r"\sqrt" and (root := ROOT.match(text, at)):
            parts.append(root[0])
            at = root.end()
        arguments, after = [], at
        for _ in range(1 if match[0] == r"\sqrt" else 2):
            argument, after = _argument(text, after)
            arguments.append(argument)
        if None not in arguments:
            parts += [brace_arguments(argument) for argument in arguments]
            at = after
    return "".join([*parts, text[at:]])


def _argument(text: str, at: int) -> tuple[str | None, int]:
    """Return the argument that starts at `at`, in braces, and the place after it; None where there is none."""
    at += len(text[at:]) - len(text[at:].lstrip(" "))
    if text[at : at + 1] == "{":
        end = _end_of_group(text, at)
        return (text[at:end], end) if end else (None, at)
    if match := COMMAND.match(text, at):
        return f"{{{match[0]}}}", match.end()
    return (f"{{{text[at]}}}", at + 1) if text[at : at + 1].isalnum() else (None, at)


def _end_of_group(text: str, at: int) -> int | None:
    """Return the place after the brace that closes the group opened at `at`; None where it stays open."""
    depth = 0
    while at < len(text):
        if text[at] == "\\":
            at += 1
        else:
            depth += (text[at] == "{") - (text[at] == "}")
        at += 1
        if depth == 0:
            return at
    return None


def _without_fonts(text: str) -> str:
    while match := FONT.search(text):
        end = _end_of_group(text, match.end())
        if end is None:
            break
        text = text[: match.start()] + text[match.end() + 1 : end - 1] + text[end:]
    return text


# ---- Where the answer stands

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# What may stand between two boxes that are one answer
JOINED = re.compile(
    r"(?:\s|,|\$|\band\b|\bor\b|\\text\s*\{\s*,?\s*(?:and|or)\s*\}|\\[,;: ]|\\q?quad(?![a-z])|\\[()\[\]])*"
)
BRACKETS = ("(", "[", "{", r"\{", r"\left")  # of a point, an interval, a set: the commas in them part numbers
EDGES = re.compile(r"^(?:\$\$?|\\[(\[])|(?:\$\$?|\\[)\]])$")  # the delimiters of a formula
DELIMITED = re.compile(r"(?<!\\)\$\$?\s*[^\s$][^$]*(?<!\\)\$|\\\(.+\\\)|\\\[.+\\\]", re.S)


def last_boxes(text: str) -> list[str]:
    r"""Return the contents of the last `\boxed{}`, after those of the boxes that are joined to it."""
    found = list(_boxes(text))
    kept = found[-1:]
    for box in reversed(found[:-1]):
        if not JOINED.fullmatch(text[box[1] : kept[0][0]]):
            break
        kept.insert(0, box)
    return [content for _, _, content in kept]


def _boxes(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield start, end and content of each box that is not inside another one."""
    at = 0
    while match := BOX.search(text, at):
        at = _end_of_group(text, match.end() - 1) or match.end()
        if at > match.end():
            yield match.start(), at, text[match.end() : at - 1]


def gold_answers(gold: str) -> list[str]:
    """Return the contents of the gold's last boxes; without a box, the text after GSM8K's `####` or all of it."""
    return last_boxes(gold) or [_answer_text(gold)]


def after_hashes(solution: Any) -> str | None:
    """Return the answer behind the `####` with which GSM8K ends a worked solution, as in `#### 1,234`, else None."""
    text = solution.rpartition("####")[2].strip() if isinstance(solution, str) and "####" in solution else ""
    if "\n" in text:  # a heading
        return None
    return (text if text.startswith(BRACKETS) else re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)) or None


def _answer_text(gold: str) -> str:
    return after_hashes(gold) or gold


def readable_gold(gold: str) -> str:
    """Write a gold for math-verify: its boxes, its own LaTeX, or the bare answer in a box."""
    return brace_arguments(_answer_text(gold)) if _delimited(gold) else _in_boxes(gold_answers(gold))


def _delimited(gold: str) -> list[str]:
    """Return what stands between LaTeX's delimiters in a gold without a box.

    The dollars of a GSM8K solution are money: we look behind its `####`.
    """
    return [] if last_boxes(gold) else DELIMITED.findall(_answer_text(gold))


def readable_answer(completion: str) -> str:
    """Write a completion for math-verify: its last boxes, or all of it where there is no box."""
    boxes = last_boxes(completion)
    return _in_boxes(boxes) if boxes else brace_arguments(completion)


def _in_boxes(contents: list[str]) -> str:
    return " and ".join(rf"\boxed{{{normalise(content)}}}" for content in contents)


def right_answers(gold: str) -> tuple[str, str]:
    """Write two short completions that give the gold in its own notation: whole, and its last formula alone.

    The second is the answer of a solution in prose. Where the gold is one formula or has a box, both are equal.
    """
    formulas = _delimited(gold)
    if not formulas:
        boxes = " and ".join(rf"\boxed{{{answer.strip()}}}" for answer in gold_answers(gold))
        return (f"The final answer is {boxes}",) * 2
    text = _answer_text(gold).strip()
    last = rf"The final answer is \boxed{{{EDGES.sub('', formulas[-1])}}}"
    return last if formulas == [text] else f"The final answer is {text}", last


# ---- What math-verify takes for another thing

GOLD_CHOICE = re.compile(r"\(?([A-J])\)?")
CHOICE = re.compile(r"(?:\(([A-J])\)|([A-J])(?=[.:)]|$))")  # the option, with its value or alone: (B) 12
TEXT = re.compile(r"\\(?:text|mathrm|textrm|mbox)\s*\{\s*([^{}]*?)\s*\}")
NUMERAL = re.compile(r"([0-9A-Fa-f,\s]+)_\{?(\d+)\}?")  # of another base
SIZE = re.compile(r"\\(?:left|right|[bB]igl?|[bB]igr?)(?![a-zA-Z])\s*")


def verdict_by_form(gold: str, answer: str) -> bool | None:
    r"""Decide the kinds that math-verify confuses, by their form; None for all others.

    It reads `(B)\ 12` as a product, drops the base of `2516_8`, and takes `(1,2)` for the set of its ends.
    """
    gold, answer = (TEXT.sub(r"\1", _without_fonts(text)).strip(" $") for text in (gold, answer))
    if (letter := GOLD_CHOICE.fullmatch(gold)) and (option := CHOICE.match(answer)):
        return letter[1] in option.groups()
    numerals = NUMERAL.fullmatch(gold), NUMERAL.fullmatch(answer)
    if all(numerals) and numerals[0][2] != numerals[1][2]:
        return False
    return False if {_brackets(gold), _brackets(answer)} == {"{}", "()"} else None


def _brackets(text: str) -> str:
    text = SIZE.sub("", text)
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return "{}"
    return "()" if "," in text and text.startswith("(") and text.endswith(")") else ""


# ---- The reward


def math_reward(completions: list[list[dict]], solution: list[str | None], **kwargs) -> list[float | None]:
    """Return 1.0 for each completion whose answer equals its gold, else 0.0; None where the gold cannot be read.

    Args:
        completions: one list of messages each, of which the first holds the answer.
        solution: the golds, in any form that [`readable_gold`] takes.
        kwargs: other columns, which are not read.
    """
    from math_verify import parse, verify

    def reward(completion: str, gold: str | None) -> float | None:
        wanted, boxes = parse(readable_gold(gold)) if gold else [], last_boxes(completion)
        if not wanted:
            return None
        golds = gold_answers(gold)
        if len(golds) == len(boxes) == 1 and (verdict := verdict_by_form(golds[0], boxes[0])) is not None:
            return float(verdict)
        # The relation x > 1 is the set (1, oo)
        return float(verify(wanted, _parsed_answer(completion), allow_set_relation_comp=True))

    return [reward(completion[0]["content"], gold) for completion, gold in zip(completions, solution, strict=True)]


def _parsed_answer(completion: str) -> list:
    """Return what math-verify finds in a completion; the last item is the answer's text."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # TRL's accuracy_reward uses the same settings
    latex = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
    )
    found = parse(readable_answer(completion), extraction_config=[latex], extraction_mode="first_match")
    if found or last_boxes(completion):
        return found
    expression = ExprExtractionConfig(try_extract_without_anchor=False)  # "The answer is 72."
    return parse(completion, extraction_config=[expression], extraction_mode="first_match")


def math_answer(completions: list[list[dict]], **kwargs) -> list[str | None]:
    """Return the text of each completion's answer as `math_reward` reads it; None where there is none."""

    def answer(completion: str) -> str:
        if boxes := last_boxes(completion):
            return ", ".join(map(normalise, boxes))
        return next((str(item) for item in _parsed_answer(completion)[-1:]), "")

    return [" ".join(answer(completion[0]["content"]).split()) or None for completion in completions]
