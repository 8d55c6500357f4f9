"""What is handed over: the folder with the selected weights, its base, and the run's own samples.

Folders and JSON are looked at, and of two bases a few rows of each tensor; no model is built (loading.py), and what
happens to an adapter is not decided here (handoff.py).
"""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, nearest
from ..files import (
    CHAIN,
    DIVERSITY,
    SAMPLES,
    SELECTION,
    read_json,
    read_rows,
    read_settings,
    sft_dir,
    stays_inside,
)
from .folder import ADAPTER_CONFIG, CONFIG, check_weights, first_difference, is_quantized, quantization_of


DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True)
class Source:
    """What is handed over.

    `folder` holds the weights. For an adapter, `base` is what it goes on with, and `trained_on` and `quantization` say
    what it was trained on: the same model, quantized as this dict says (None: not at all), or another folder that
    holds quantized weights already.
    """

    folder: Path
    base: str | None
    trained_on: str | None
    quantization: dict | None
    step: int | None
    samples: list[dict]
    max_new_tokens: int
    trust_remote_code: bool = False


def find_source(run: Path, base: str | None = None, trust_remote_code: bool = False) -> Source:
    """The selected weights of `run` (a chain run or an SFT folder), or `run` itself if it is a model or an adapter."""
    if not run.is_dir():
        siblings = [item.name for item in run.absolute().parent.glob("*") if item.is_dir()]
        raise InputError(f"{run} is not a folder{nearest(run.name, siblings)}")
    folder, step, sft = _selected(run)
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if not is_adapter and not (folder / CONFIG).is_file():
        hint = f"select one: aesl select {run}" if sft else "name a run, a model or an adapter"
        raise InputError(f"{folder} holds neither {CONFIG} with weights nor {ADAPTER_CONFIG}; {hint}")
    check_weights(folder)
    if base and not is_adapter:
        raise InputError(f"--base is for adapters: {folder} holds full weights")
    samples, max_new_tokens = _samples(sft, step)
    if not is_adapter:
        return Source(folder, None, None, None, step, samples, max_new_tokens, trust_remote_code)
    recorded = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    base = check_base(base, recorded, folder)
    trained_on = recorded if recorded and is_quantized(recorded) else base
    quantization = quantization_of(trained_on, [folder, folder.parent, sft])
    if quantization and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"{folder} was trained on a quantized base, which needs the package bitsandbytes: it is not installed"
        )
    return Source(folder, base, trained_on, quantization, step, samples, max_new_tokens, trust_remote_code)


def _selected(run: Path) -> tuple[Path, int | None, Path | None]:
    """Folder with the weights, their step, and the SFT folder that has their samples."""
    try:
        sft = sft_dir(run)
    except InputError:
        if (run / CHAIN).exists():  # a run it is, and one that cannot be read
            raise
        sft = None
    if sft:
        read_settings(sft)
    for place in filter(None, (run, sft)):
        if (place / SELECTION).is_file():
            selection = _selection(place, run)
            path = selection.get("path") or ""
            folder = place / path
            if not path or not stays_inside(path) or not folder.is_dir():
                what = "is not a folder" if stays_inside(path) else "is outside of its folder"
                raise InputError(f"{place / SELECTION} points to {folder}, which {what}; run aesl select {run} again")
            return folder, selection.get("step"), sft
    return run, None, sft


def _selection(place: Path, run: Path) -> dict:
    try:
        selection = read_json(place / SELECTION)
    except InputError as error:
        raise InputError(f"{error}; make it anew: aesl select {run}") from None
    return selection if isinstance(selection, dict) else {}


def _samples(sft: Path | None, step: int | None) -> tuple[list[dict], int]:
    """Lines of samples/step-N.jsonl, N the selected step or else the newest, and the length they were cut at."""
    steps = (
        {int(path.stem[5:]): path for path in (sft / SAMPLES).glob("step-*.jsonl") if path.stem[5:].isdigit()}
        if sft
        else {}
    )
    if not steps:
        return [], DEFAULT_NEW_TOKENS
    measured = step if step in steps else max(steps)
    rows = read_rows(sft / DIVERSITY) if (sft / DIVERSITY).is_file() else []
    figures = next((row for row in rows if row.get("step") == measured), {})
    samples = read_rows(steps[measured], needs=("prompt", "completions"))
    for sample in samples:
        # Entropy is the model's own only at temperature 1 and at its own step.
        sample["comparable"] = measured == step and figures.get("temperature") == 1.0
    return samples, figures.get("max_new_tokens") or DEFAULT_NEW_TOKENS


def check_base(given: str | None, recorded: str | None, adapter: Path) -> str:
    """The base of `adapter`: the recorded one, or the given one if it is not seen to be another model."""
    base = given or recorded
    if not base:
        raise InputError(f"{adapter / ADAPTER_CONFIG} does not name its base: give it with --base")
    if os.path.isabs(base) or base.startswith("."):
        if not Path(base).is_dir():
            hint = "" if given else "; it has moved: give it with --base"
            raise InputError(f"the base of {adapter} is {base}, which is not a folder{hint}")
    if given and recorded and Path(given).is_dir() and Path(recorded).is_dir() and not is_quantized(recorded):
        tensor = first_difference(Path(given), Path(recorded))
        if tensor:
            raise InputError(
                f"--base {given} is another model than {recorded}, on which the adapter was trained: {tensor} differs"
            )
    return str(Path(base).resolve()) if Path(base).is_dir() else base
