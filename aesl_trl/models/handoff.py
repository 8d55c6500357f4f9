"""`aesl handoff RUN`: a selected checkpoint -> a folder that GRPO can start from, proven by reading it back.

Full weights are copied, an adapter is merged into its base or goes on as an adapter. In the result tokenizer, chat
template, config and generation config agree on the tokens that end a completion: where they do not, samples never stop
and every reward is zero. Then the folder is loaded from disk, must give the log-probs of its source, and must stop by
itself at least once.

Left to others: which folder it is (source.py), loading it, the tokens (tokens.py) and the checks
(handoff_checks.py).
"""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig

from ..arguments import check_folder, parse
from ..errors import InputError, exit_on_input_error, nearest
from ..files import CHAIN, HANDOFF, HANDOFF_DIR, SELECTION, read_json, write_json
from .folder import ADAPTER_CONFIG, CONFIG, is_quantized
from .handoff_checks import check_differences, check_own_samples, check_stops, compare, encode, log_probs
from .loading import (
    check_model,
    generation_config,
    load_adapter,
    load_model,
    load_tokenizer,
    num_embeddings,
    release_memory,
)
from .source import Source, find_source
from .tokens import agree_on_stops, write_stops


MODES = ("auto", "merge", "continue")
WEIGHTS = (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json")
# Trainer's state lies beside the weights in an output folder: not part of a model, and training_args.bin is a pickle.
NOT_MODEL = ("training_args.bin", "optimizer.bin", "scheduler.bin")


@dataclass
class HandoffArguments:
    """`aesl handoff RUN`: make the folder that GRPO starts from."""

    run: str | None = field(
        default=None, metadata={"help": "Chain run, SFT output folder, or a model or adapter folder."}
    )
    mode: str = field(
        default="auto",
        metadata={
            "help": "What happens to an adapter: merge it into its base, or continue (RL trains that adapter). auto "
            "merges; full weights are copied.",
            "choices": list(MODES),
        },
    )
    base: str | None = field(
        default=None, metadata={"help": "Base of the adapter, by default the one that the adapter names."}
    )
    output: str | None = field(default=None, metadata={"help": f"Folder to write, by default RUN/{HANDOFF_DIR}."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code that lies in the model's repository."}
    )


def main(argv: list[str] | None = None) -> None:
    (args,) = parse(
        (HandoffArguments,), name_first(sys.argv[1:] if argv is None else argv, "run"), prog="aesl handoff"
    )
    if args.run is None:
        raise InputError("which run? aesl handoff RUN")
    result = hand_off(
        args.run, mode=args.mode, base=args.base, output=args.output, trust_remote_code=args.trust_remote_code
    )
    print(summary(result))


def name_first(argv: list[str], name: str) -> list[str]:
    """`argv` with a first argument that is no flag given as `--name`."""
    return [f"--{name}", *argv] if argv and not argv[0].startswith("-") else list(argv)


def summary(result: dict) -> str:
    samples, eos = result["samples"], ", ".join(map(str, result["eos_token_id"]))
    stopped = (
        f"{samples['stopped']} of {samples['num']} samples stopped" if samples["num"] else "no prompts to sample from"
    )
    return f"{result['mode']}: log-probs within {result['log_probs_max_difference']:.2g} nats, {stopped}, eos {eos}"


def hand_off(
    run: str | Path,
    *,
    mode: str = "auto",
    base: str | None = None,
    output: str | Path | None = None,
    trust_remote_code: bool = False,
) -> dict:
    """Write the folder `output` (default `run`/handoff) and handoff.json in it and in `run`; returns what that holds.

    Raises:
        InputError: nothing to hand over, a base that does not fit, files that cannot be made to agree, log-probs that
            differ, or samples that never stop. Nothing is left of the new folder then, and an older one stays.
    """
    run = Path(run)
    source = find_source(run, base, trust_remote_code)
    mode = choose_mode(mode, source)
    target = Path(output) if output else run / HANDOFF_DIR
    check_target(target, source, run)
    weights, field = (source.base, f"the base of {source.folder}") if source.base else (str(source.folder), "run")
    check_model(weights, field, trust_remote_code=trust_remote_code)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, so that the last step is a rename and a kill before it leaves no folder that looks whole.
    temporary = target.absolute().with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        result = _write_and_check(source, mode, temporary)
        result["source"] = _relative(source.folder, run)
        write_json(temporary / HANDOFF, result)
        _replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if output is None or any((run / name).exists() for name in (SELECTION, CHAIN)):  # a run, not somebody's model
        write_json(run / HANDOFF, result)
    return result


def check_target(target: Path, source: Source, run: Path) -> None:
    """Refuse a folder that the handoff may not replace: it is swapped as a whole, and what was in it is gone."""
    check_folder("output", target)
    for kept in (source.folder, run):
        if kept.resolve().is_relative_to(target.resolve()):
            raise InputError(f"output: {target} holds what is handed over, and would be replaced; name a new folder")
    if target.is_dir() and any(target.iterdir()) and not (target / HANDOFF).is_file():
        raise InputError(f"output: {target} holds other files, and would be replaced; name a new folder")


def choose_mode(asked: str, source: Source) -> str:
    if asked not in MODES:
        raise InputError(f"mode must be one of {', '.join(MODES)}, got {asked!r}{nearest(asked, MODES)}")
    if source.base is None:
        if asked != "auto":
            raise InputError(f"mode {asked} is for adapters, and {source.folder} holds full weights: use mode auto")
        return "full"
    mode = "merge" if asked == "auto" else asked
    if mode == "merge" and is_quantized(source.base):
        raise InputError(
            f"{source.base} holds quantized weights, into which nothing can be merged: give the original with --base"
        )
    return mode


def _relative(folder: Path, run: Path) -> str:
    return (
        str(folder.resolve().relative_to(run.resolve()))
        if folder.resolve().is_relative_to(run.resolve())
        else str(folder)
    )


def _replace(temporary: Path, target: Path) -> None:
    old = target.absolute().with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        os.replace(target, old)
    os.replace(temporary, target)
    shutil.rmtree(old, ignore_errors=True)


def _write_and_check(source: Source, mode: str, folder: Path) -> dict:
    tokenizer = load_tokenizer(source)
    declared = generation_config(source)
    stops = agree_on_stops(tokenizer, declared, num_embeddings(source))
    texts = encode(tokenizer, source.samples)
    reference, effect, quantized = WRITERS[mode](source, folder, texts)
    own_samples = check_own_samples(quantized or reference, source)
    write_stops(folder, tokenizer, declared, stops)
    model = reload(folder, mode, source)
    scores = log_probs(model, texts)
    differences = compare(reference, scores)
    check_differences(differences, effect, mode, model.dtype)
    stopped = check_stops(model, AutoTokenizer.from_pretrained(folder), source, stops)
    return {
        "mode": mode,
        "base": source.base,
        "quantization": source.quantization,
        "checks": {
            "dtype": str(model.dtype).removeprefix("torch."),
            "log_probs_mean_difference": differences["mean"],
            "adapter_effect": effect,
            "quantization_shift": None if quantized is None else compare(quantized, scores),
            "own_samples": own_samples,
            "stop_changes": stops.changes,
        },
        "log_probs_max_difference": differences["max"],
        "samples": stopped,
        "eos_token_id": stops.eos,
        "pad_token_id": stops.pad,
        "template": {"chat": tokenizer.chat_template is not None, "turn_end": stops.turn_end},
    }


# ---- Writing. Each writer returns the source's log-probs, the adapter's effect in nats, and those of the quantized
# model or None.


def write_full(source: Source, folder: Path, texts: list) -> tuple:
    reference = log_probs(load_model(source.folder, trust_remote_code=source.trust_remote_code), texts)
    release_memory()
    for path in source.folder.iterdir():
        if path.name.endswith(WEIGHTS) and path.name not in NOT_MODEL:
            _link_or_copy(path, folder / path.name)
        elif path.suffix == ".py" or path.name == CONFIG:
            shutil.copy2(path, folder)
    return reference, None, None


def _link_or_copy(source: Path, target: Path) -> None:
    # Only weights: a file that is rewritten here must not be the source's.
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)


def write_merged(source: Source, folder: Path, texts: list) -> tuple:
    quantized = None
    if source.quantization:
        quantized = log_probs(load_adapter(source, source.folder, as_trained=True), texts)
        release_memory()
    model = load_adapter(source, source.folder)
    reference = log_probs(model, texts)
    with model.disable_adapter():
        effect = compare(reference, log_probs(model, texts))["mean"]
    try:
        model = model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise InputError(f"{source.folder} cannot be merged: {error}; use --mode continue") from None
    model.generation_config = GenerationConfig()  # written by write_stops; an inconsistent one would make saving fail
    model.save_pretrained(folder)
    del model
    release_memory()
    return reference, effect, quantized


def write_continued(source: Source, folder: Path, texts: list) -> tuple:
    reference = log_probs(load_adapter(source, source.folder, as_trained=True), texts)
    release_memory()
    for path in source.folder.glob("adapter_model*"):
        _link_or_copy(path, folder / path.name)
    config = read_json(source.folder / ADAPTER_CONFIG)
    write_json(folder / ADAPTER_CONFIG, {**config, "base_model_name_or_path": source.base})
    return reference, None, None


WRITERS: dict[str, Callable] = {"full": write_full, "merge": write_merged, "continue": write_continued}


def reload(folder: Path, mode: str, source: Source):
    if mode == "continue":
        model = load_adapter(source, folder, as_trained=True)
        model.base_model.model.generation_config = GenerationConfig.from_pretrained(folder)
        return model
    return load_model(folder, trust_remote_code=source.trust_remote_code)


if __name__ == "__main__":
    exit_on_input_error("aesl handoff", main)
