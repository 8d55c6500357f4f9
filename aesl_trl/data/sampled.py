"""Check what a model's rows and samples can be, before it loads: is there room, and can a reward be had.

A reward that no sample can earn looks like a model that cannot do the task. Two causes are known beforehand: the chat
template writes what the reward asks for into the prompt, and the reward does not take the demonstrations themselves.
"""

import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from ..diversity.figures import Group
from ..errors import InputError
from ..models.chat import ChatWriter, has_images, template_kwargs
from ..models.folder import ModelFolder
from ..models.loading import load_processing_class, tokenizer_of
from ..models.positions import check_prompt_tokens, check_room, num_positions_at
from ..models.stripped import warn_of_stripped_tokens
from ..models.tokens import row_prompt_ids
from ..rewards.functions import check_columns, reward_name, score_groups
from ..sampling.draws import PROMPT_TOKENS
from ..values import without_none
from .checks import STREAMED_ROWS
from .rendered import check_rendered


SCORED_ROWS = 64  # demonstrations that are given to the rewards
OPENED = re.compile(r"<(\w+)>\s*$")  # a tag with which a prompt ends


def check_samples(
    processing_class: Any,
    positions: int | None,
    rows: list[dict],
    reward_funcs: Iterable[Callable],
    new_tokens: int,
    *,
    field: str,
    setting: str,
    template_defaults: dict | None = None,
) -> list[str]:
    """Refuse prompts that the template cannot write, or that leave no room for an answer of `new_tokens`.

    Warn of rewards that no sample can earn.

    Args:
        positions: of the model ([`~aesl_trl.models.positions.num_positions_at`]).
        rows: with a `prompt`, and the columns that the rewards need.
        field, setting: the settings that name the prompts and the number of new tokens.
        template_defaults: keywords for the template; those of a row come before them.

    Returns:
        Why a reward cannot be earned, a line for each such reward.
    """
    check_rendered(rows, processing_class, field=field, defaults=template_defaults)
    # A token holds at least a byte, and a character at most four: of other rows we need not ask
    asked = [positions is not None or 4 * len(str(row["prompt"])) > PROMPT_TOKENS for row in rows]
    prompts = [
        row_prompt_ids(processing_class, row, template_defaults) if is_asked else []
        for row, is_asked in zip(rows, asked, strict=True)
    ]
    check_prompt_tokens(prompts, PROMPT_TOKENS, field=field)
    if positions is not None:
        check_room(positions, prompts, new_tokens, field=field, setting=setting)
    found = opened_by_template(processing_class, rows[0], reward_funcs, template_defaults)
    for line in found:
        warnings.warn(line, stacklevel=2)
    return found


def check_rows_fit(
    processing_class: Any, positions: int | None, rows: Iterable[dict], max_length: int | None, text_field: str
) -> None:
    """Refuse the first demonstration that is longer than the model's `positions`, and is not cut before them."""
    if positions is None or (max_length or math.inf) <= positions:
        return
    for number, row in enumerate(rows if hasattr(rows, "__len__") else islice(rows, STREAMED_ROWS)):
        length = min(_num_tokens(processing_class, row, text_field), max_length or math.inf)
        if length > positions:
            raise InputError(
                f"dataset_name, row {number} (from 0) has {length} tokens, and the model {positions} positions: set "
                f"max_length to {positions}"
            )


def _num_tokens(processing_class: Any, row: dict, text_field: str) -> int:
    tokenizer, pair = tokenizer_of(processing_class), _pair(row)
    if "input_ids" in row:
        return len(row["input_ids"])
    if pair is not None:
        return len(_written(processing_class, *pair)) + isinstance(pair[1], str)  # TRL adds eos to text
    text = row.get(text_field)
    return len(tokenizer(text)["input_ids"]) + 1 if isinstance(text, str) else 0


def check_samples_of(model: ModelFolder, *args, access: dict, **kwargs) -> list[str]:
    """Call [`check_samples`] for a trained model, and warn of special tokens in its answers that no reward will see.

    `access` says how its config and tokenizer are loaded.
    """
    processing_class = load_processing_class(model.tokenizer_at, **access)
    warn_of_stripped_tokens(tokenizer_of(processing_class))
    return check_samples(processing_class, num_positions_at(model.config_at, **access), *args, **kwargs)


def opened_by_template(
    processing_class: Any, row: dict, reward_funcs: Iterable[Callable], template_defaults: dict | None = None
) -> list[str]:
    """Name the rewards that ask a completion to begin with a tag which the prompt, as written, ends with already.

    Each reward is asked: it gives something to an answer with the tag, and nothing to the same answer without it.
    """
    ids = row_prompt_ids(processing_class, row, template_defaults)
    opened = OPENED.search(tokenizer_of(processing_class).decode(ids))
    if not opened:
        return []
    rest = f"ok\n</{opened[1]}>\nyes"
    answers, found = [f"<{opened[1]}>\n{rest}", rest], []
    for function in _that_take(reward_funcs, row):
        with_tag, without = _scores(function, [(row, answers)])[0]
        if _earns(with_tag) and not _earns(without):
            found.append(
                f"reward {reward_name(function)!r} cannot be earned: the prompt as the chat template writes it ends "
                f"with <{opened[1]}>, and the reward wants the answer to begin with it; take a reward that does not, "
                "or a template that leaves the tag to the model"
            )
    return found


def warn_of_unrewarded(
    processing_class: Any,
    rows: Iterable[dict],
    reward_funcs: Iterable[Callable],
    chat_template: str | None = None,
    template_defaults: dict | None = None,
) -> None:
    """Warn of a reward that gives 0 to every demonstration, written and decoded as a sample would be.

    A reward whose columns the demonstrations lack is not asked. `chat_template` replaces the template, as TRL's
    training template does; `template_defaults` are keywords for it.
    """
    pairs = [_pair(row) for row in islice(rows, SCORED_ROWS)]
    pairs = [pair for pair in pairs if pair is not None]
    if not pairs:
        return
    answers = [(pair[0], [_as_sample(processing_class, *pair, chat_template, template_defaults)]) for pair in pairs]
    for function in _that_take(reward_funcs, pairs[0][0]):
        if not any(_earns(score) for scores in _scores(function, answers) for score in scores):
            shown = textwrap.shorten(answers[0][1][0], 80)
            warnings.warn(
                f"reward {reward_name(function)!r} gives 0 to each of {len(answers)} demonstrations, as RL would show "
                f"them (the first: {shown!r}): unless that is the most it gives, no SFT on them can earn it",
                stacklevel=2,
            )


def _pair(row: dict) -> tuple[dict, Any, Any] | None:
    """Return a row with its prompt, the prompt and what follows; None where they are not told apart."""
    if has_images(row):
        return None
    if "prompt" in row and "completion" in row:
        prompt, answer = without_none(row["prompt"]), without_none(row["completion"])
    elif isinstance(row.get("messages"), list):
        messages = without_none(row["messages"])
        prompt, answer = messages[:-1], messages[-1:]
    else:
        return None
    if prompt == []:  # the assistant alone speaks, so there is nothing to sample from
        return None
    return {**row, "prompt": prompt}, prompt, answer


def _written(
    processing_class: Any,
    row: dict,
    prompt: Any,
    answer: Any,
    template: str | None = None,
    defaults: dict | None = None,
) -> list[int]:
    """Return the ids of prompt and answer as TRL tokenizes them together."""
    tokenizer = tokenizer_of(processing_class)
    if isinstance(prompt, str):
        return tokenizer(prompt + answer)["input_ids"]
    writer = ChatWriter(processing_class, template, defaults)
    text = writer.apply_chat_template([*prompt, *answer], tokenize=False, **template_kwargs(row))
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _as_sample(
    processing_class: Any, row: dict, prompt: Any, answer: Any, template: str | None, defaults: dict | None
) -> str:
    """Return a demonstration as GRPOTrainer would show it to a reward: decoded behind the prompt, without specials."""
    before = row_prompt_ids(processing_class, row, defaults)
    whole = _written(processing_class, row, prompt, answer, template, defaults)
    same = next((at for at, (one, two) in enumerate(zip(before, whole, strict=False)) if one != two), len(before))
    return tokenizer_of(processing_class).decode(whole[same:], skip_special_tokens=True)


def _that_take(reward_funcs: Iterable[Callable], row: dict) -> list[Callable]:
    """Return the functions whose columns `row` has; the name of a reward model is none."""
    found = []
    for function in filter(callable, reward_funcs):
        try:
            check_columns([function], row, where="", absent=("completion_ids",))
        except InputError:
            continue
        found.append(function)
    return found


def _scores(function: Callable, answers: list[tuple[dict, list[str]]]) -> list[list[float]]:
    groups = [
        Group(row["prompt"], texts, [0] * len(texts), [False] * len(texts), [math.nan] * len(texts))
        for row, texts in answers
    ]
    scored = score_groups(groups, [row for row, _ in answers], [function])
    return [[reward for (reward,) in group.rewards] for group in scored]


def _earns(score: float) -> bool:
    return not math.isnan(score) and score != 0
