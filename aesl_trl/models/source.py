"""Find what a handoff starts from: the folder with the selected weights, its base, and the run's own samples.

Only folders, JSON and, to compare two bases, a few rows of each tensor are read; no model is built.
"""

import importlib.util
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..files import (
    CHAIN,
    DIVERSITY,
    OWN,
    SELECTION,
    RunFolder,
    check_candidate,
    check_unlinked,
    chosen,
    is_mix,
    read_json,
    read_object,
    read_rows,
    read_settings,
    repeats,
    stays_inside,
)
from ..identity import mismatch
from .folder import (
    ADAPTER_CONFIG,
    CONFIG,
    ModelFolder,
    adapter_config,
    check_weights,
    first_difference,
    found_from,
)


DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Source(ModelFolder):
    """The weights that are handed over, and what the run says about them.

    For an adapter, `base` is the model that it goes on with; `trained_on` and `quantization` say what it was trained
    on: the same model, quantized as this dict says (None: not at all), or another folder with quantized weights.
    """

    trained_on: str | None = None
    quantization: dict | None = None
    step: int | None
    candidate: str | None  # in words: `step 400`, or `mix-0.7`
    samples: list[dict]
    max_new_tokens: int
    trust_remote_code: bool


def find_source(
    run: Path, base: str | None = None, trust_remote_code: bool = False, *, verify: bool = False
) -> Source:
    """Find the selected weights of `run` (a chain run or an SFT folder), or take `run` itself as model or adapter.

    `verify` also compares the weights' sha256 with what the selection recorded.
    """
    found = RunFolder(run)
    folder, selection, sft = _selected(found, verify)
    step, candidate = selection.get("step"), chosen(selection)
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if not is_adapter and not (folder / CONFIG).is_file():
        hint = f"select a checkpoint: aesl select {run}" if sft else "name a run, a model or an adapter"
        raise InputError(f"{folder} holds neither {CONFIG} with weights nor {ADAPTER_CONFIG}; {hint}")
    check_weights(folder)
    if base and not is_adapter:
        raise InputError(f"--base is for adapters: {folder} holds full weights")
    samples, max_new_tokens = _samples(found if sft else None, selection)
    rest = {
        "step": step,
        "candidate": candidate,
        "samples": samples,
        "max_new_tokens": max_new_tokens,
        "trust_remote_code": trust_remote_code,
    }
    if not is_adapter:
        return Source(str(folder), **rest)
    recorded = adapter_config(str(folder), "run").base_model_name_or_path
    recorded = recorded and found_from(recorded, str(folder))
    base = check_base(base, recorded, folder)
    trained_on = recorded if recorded and ModelFolder(recorded).is_quantized else base
    if ModelFolder(trained_on).is_quantized:
        quantization = read_json(Path(trained_on) / CONFIG)["quantization_config"]
    else:  # a run.json says how the base was quantized in training
        runs = [read_settings(place) for place in (folder, folder.parent, sft) if place]
        quantization = next((run["quantization"] for run in runs if run.get("quantization")), None)
    if quantization and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"{folder} was trained on a quantized base, which needs the package bitsandbytes: it is not installed"
        )
    return Source(str(folder), base, trained_on=trained_on, quantization=quantization, **rest)


def _selected(run: RunFolder, verify: bool) -> tuple[Path, dict, Path | None]:
    """Return the folder with the weights, their selection.json, and the SFT folder that has their samples."""
    try:
        sft = run.sft
    except InputError:
        if (run.path / CHAIN).exists():  # it is a run, but a broken one
            raise
        sft = None
    if sft:
        run.settings  # noqa: B018 (refuses the files of a newer version)
    for place in run.places:
        if (place / SELECTION).is_file():
            try:
                selection = read_object(place / SELECTION)
            except InputError as error:
                raise InputError(f"{error}; make it anew: aesl select {run.path}") from None
            path, step = selection.get("path") or "", selection.get("step")
            options = [f"--{name} {shlex.quote(str(value))}" for name, value in repeats(selection).items()]
            again = " ".join([f"aesl select {run.path}", *options])
            if not isinstance(path, str) or not isinstance(step, int | None):
                wanted = "'path' must be a text and 'step' a whole number"
                raise InputError(f"{place / SELECTION}: {wanted}; run {again} again")
            folder = place / path
            if not path or not stays_inside(path) or not folder.is_dir():
                problem = "is not a folder" if stays_inside(path) else "is outside of its folder"
                raise InputError(f"{place / SELECTION} points to {folder}, which {problem}; run {again} again")
            check_unlinked(folder, place.parent if place.name == OWN else place, inside=True)
            if problem := mismatch(folder, selection, contents=verify):
                again += " --verify" if verify else ""
                raise InputError(f"{folder} {problem}: run {again} again")
            return folder, selection, sft
    if verify:
        raise InputError(f"--verify is for a selection: {run.path} has no {SELECTION}")
    check_candidate(run.path)
    return run.path, {}, sft


def _samples(run: RunFolder | None, selection: dict) -> tuple[list[dict], int]:
    """Return the selected candidate's samples, else the newest step's, and the length at which they were cut off.

    Those of an average are its own while mix.json has the row that was selected: a later `aesl mix` replaces both.
    """
    files, candidate = run.sample_files if run else {}, selection.get("candidate")
    if not files:
        return [], DEFAULT_NEW_TOKENS
    path, is_own = files[max(files)].with_name(f"{candidate}.jsonl"), False
    if is_mix(candidate):
        figures, evidence = run.mixes.get(candidate), selection.get("evidence")
        is_own = (
            bool(figures) and isinstance(evidence, dict) and figures == evidence.get("measured") and path.is_file()
        )
    if not is_own:
        step = None if is_mix(candidate) else selection.get("step")
        measured = step if step in files else max(files)
        path, is_own = files[measured], measured == step
        figures = next((row for row in run.rows(DIVERSITY) if row.get("step") == measured), {})
    samples = read_rows(path, needs=("prompt", "completions"))
    for number, sample in enumerate(samples, 1):
        ids = sample.get("token_ids")
        if ids is not None and not (isinstance(ids, list) and all(isinstance(each, list) for each in ids)):
            raise InputError(f"{path}, row {number}: 'token_ids' is not one list of ids for each completion")
        # Entropy is the model's own only at temperature 1 and on its own samples.
        sample["comparable"] = is_own and figures.get("temperature") == 1.0
    return samples, figures.get("max_new_tokens") or DEFAULT_NEW_TOKENS


def check_base(given: str | None, recorded: str | None, adapter: Path) -> str:
    """Return the given base of `adapter`, else the recorded one; refuse a given base that is another model."""
    base = given or recorded
    if not base:
        raise InputError(f"{adapter / ADAPTER_CONFIG} does not name its base: give it with --base")
    if (os.path.isabs(base) or base.startswith(".")) and not Path(base).is_dir():
        hint = "" if given else "; it has moved: give it with --base"
        raise InputError(f"the base of {adapter} is {base}, which is not a folder{hint}")
    can_compare = given and recorded and Path(given).is_dir() and Path(recorded).is_dir()
    if can_compare and not ModelFolder(recorded).is_quantized:
        if tensor := first_difference(Path(given), Path(recorded)):
            raise InputError(
                f"--base {given} is another model than {recorded}, on which the adapter was trained: {tensor} differs"
            )
    return str(Path(base).resolve()) if Path(base).is_dir() else base
