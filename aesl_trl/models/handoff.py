"""`aesl handoff RUN`: make a folder that GRPO can start from out of a selected checkpoint, and prove it.

Full weights are copied; an adapter is merged into its base, or goes on as an adapter. In the new folder tokenizer,
chat template, config and generation config agree on the tokens that end a completion: where they do not, samples
never stop and every reward is zero. Then the folder is loaded from disk, must give the log-probs of its source, and
must stop by itself at least once.
"""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from transformers import GenerationConfig

from ..arguments import check_replaceable, parse, positionals
from ..errors import InputError, exit_on_input_error, tell
from ..files import (
    CHAIN,
    HANDOFF,
    HANDOFF_DIR,
    OWN,
    SELECTION,
    RunFolder,
    link_or_copy,
    read_json,
    read_object,
    swapped,
    write_json,
    wrote,
)
from ..progress import bar, step_on
from ..values import check_choice
from .folder import ADAPTER_CONFIG, CONFIG, ModelFolder, adapter_config
from .handoff_checks import check_differences, check_own_samples, check_stops, compare, encode, log_probs
from .loading import check_model, load_model, load_processing_class, put_adapter, release_memory
from .source import Source, find_source
from .tokens import agree_on_stops, tokenizer_of, write_stops
from .vocabulary import num_embeddings


MODES = ("auto", "merge", "continue")
WEIGHTS = (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json")
# Trainer's state lies beside the weights, but is no part of the model; training_args.bin is a pickle.
NOT_MODEL = ("training_args.bin", "optimizer.bin", "scheduler.bin")


@dataclass
class HandoffArguments:
    """`aesl handoff RUN`: make the folder that GRPO starts from."""

    run: str | None = field(default=None, metadata={"help": "Folder of a chain run, an SFT, a model or an adapter."})
    mode: str = field(
        default="auto",
        metadata={
            "help": "What to do with an adapter: merge it into its base, or continue (RL trains that adapter). auto "
            "merges an adapter and copies full weights.",
            "choices": list(MODES),
        },
    )
    base: str | None = field(default=None, metadata={"help": "Base of the adapter; by default the adapter names it."})
    output_dir: str | None = field(
        default=None,
        metadata={"help": f"Folder to write. Default: RUN/{HANDOFF_DIR}, for an SFT folder RUN/{OWN}/{HANDOFF_DIR}."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code in the model's repository."})
    verify: bool = field(
        default=False, metadata={"help": "Compare the weights' sha256 with that of aesl select --verify."}
    )


def main(argv: list[str] | None = None) -> None:
    names, flags = positionals(sys.argv[1:] if argv is None else argv)
    given = [argument for name in names[:1] for argument in ("--run", name)]
    (args,) = parse((HandoffArguments,), [*given, *names[1:], *flags], prog="aesl handoff")
    if args.run is None:
        raise InputError("which run? aesl handoff RUN")
    settings = {name: getattr(args, name) for name in ("mode", "base", "trust_remote_code", "verify")}
    result = hand_off(args.run, output=args.output_dir, **settings)
    tell(described(result, find_target(args.run, args.output_dir)))


def described(result: dict, folder: Path) -> str:
    """Say in one line what a handoff wrote, how it was checked, and how RL starts from it."""
    start = f"{result['candidate']}, " if result["candidate"] else ""
    samples, done = result["samples"], {"full": "copied", "merge": "merged", "continue": "adapter kept"}
    stopped = f"{samples['stopped']} of {samples['num']} samples stopped"
    checked = f"log-probs within {result['log_probs_max_difference']:.2g} nats, " + (
        stopped if samples["num"] else "no prompts to sample from"
    )
    following = f'GRPOTrainer(model="{folder}")'
    if result["mode"] == "continue":
        in_python = f'aesl_trl.models.handoff.load_for_rl("{folder}")'
        following = f"aesl grpo --adapter_name_or_path {folder}, or in Python {in_python}"
        if result["quantization"]:
            following += ", on the quantized base as in SFT"
    return f"handoff: {start}{done[result['mode']]}, checked ({checked}) -> {folder}; next: {following}"


def load_for_rl(folder: str | Path, *, trust_remote_code: bool = False) -> tuple:
    """Load what GRPOTrainer starts from: (`model`, `processing_class`), of a handoff with or without an adapter.

    An adapter comes on its base, trainable, so GRPOTrainer takes no `peft_config` beside it. The base is quantized as
    in SFT, has the vocabulary that the adapter was trained with, and ends its samples as handoff.json says.
    """
    found, access = ModelFolder.find(folder), {"trust_remote_code": trust_remote_code}
    processing_class = load_processing_class(found.tokenizer_at, **access)
    quantization = None if found.is_quantized else read_object(found.folder / HANDOFF).get("quantization")
    model = load_model(found.config_at, quantization, **access)
    if found.is_adapter:
        model = put_adapter(model, found.weights, found.base, is_trainable=True)
    tokenizer = tokenizer_of(processing_class)
    tokenizer.padding_side = tokenizer.truncation_side = "left"  # as GRPOTrainer loads it
    return model, processing_class


def hand_off(
    run: str | Path,
    *,
    mode: str = "auto",
    base: str | None = None,
    output: str | Path | None = None,
    trust_remote_code: bool = False,
    verify: bool = False,
) -> dict:
    """Write the folder `output` with a handoff.json, which a run gets too. Return its content.

    By default the folder is `handoff` in a chain's run or a model's folder, and `_aesl/handoff` in a training's.
    The selected weights must be those that selection.json names: by their step, names, sizes and headers, with
    `verify` by the sha256 that `select_run(verify=True)` recorded.

    Raises:
        InputError: nothing to hand over, a base that does not fit, files that cannot be made to agree, log-probs that
            differ, or samples that never stop. Nothing is left of the new folder then, and an older folder stays.
    """
    run = Path(run)
    source = find_source(run, base, trust_remote_code, verify=verify)
    mode = choose_mode(mode, source)
    own, target = RunFolder(run).own, find_target(run, output)
    check_replaceable("output_dir", target, wrote(target / HANDOFF, "mode"), [source.folder, run])
    # A run gets a handoff.json too, and somebody's model, named with an output, does not
    is_run = output is None or any((own / name).exists() for name in (SELECTION, CHAIN))
    if is_run:
        check_replaceable("output_dir", own / HANDOFF, wrote(own / HANDOFF, "mode"), is_file=True)
    field = f"the base of {source.weights}" if source.is_adapter else "run"
    check_model(source.config_at, field, trust_remote_code=trust_remote_code)
    with swapped(target) as folder:
        result = _write_and_check(source, mode, folder)
        is_inside = source.folder.resolve().is_relative_to(run.resolve())
        result["source"] = str(source.folder.resolve().relative_to(run.resolve())) if is_inside else source.weights
        write_json(folder / HANDOFF, result)
    if is_run:
        write_json(own / HANDOFF, result)
    return result


def find_target(run: str | Path, output: str | Path | None) -> Path:
    """Return the folder that a handoff of `run` writes."""
    return Path(output) if output else RunFolder(run).own / HANDOFF_DIR


def choose_mode(asked: str, source: Source) -> str:
    """Return full, merge or continue; refuse a mode that the source does not allow."""
    check_choice("mode", asked, MODES)
    if not source.is_adapter:
        if asked != "auto":
            raise InputError(f"mode {asked} is for adapters, and {source.weights} holds full weights: use mode auto")
        return "full"
    mode = "merge" if asked == "auto" else asked
    config = adapter_config(source.weights, "run")
    kind = config.peft_type
    if config.is_prompt_learning:
        learnt = f"{source.weights} is of type {kind.value}, which learns a prompt"
        raise InputError(f"{learnt}: PEFT neither merges it nor trains it further, so RL cannot start from it")
    if mode == "merge" and not hasattr(PEFT_TYPE_TO_TUNER_MAPPING[kind], "merge_and_unload"):
        raise InputError(f"{source.weights} is of type {kind.value}, which cannot be merged: use --mode continue")
    if mode == "merge" and source.is_quantized:
        raise InputError(
            f"{source.base} holds quantized weights, into which nothing can be merged: give the original with --base"
        )
    return mode


def _write_and_check(source: Source, mode: str, folder: Path) -> dict:
    trust = {"trust_remote_code": source.trust_remote_code}
    processing_class = load_processing_class(source.tokenizer_at, **trust)
    tokenizer = tokenizer_of(processing_class)
    try:
        declared = GenerationConfig.from_pretrained(source.generation_config_at).to_diff_dict()
    except OSError:  # there is none
        declared = {}
    num_rows = num_embeddings(source, **trust)
    stops = agree_on_stops(tokenizer, declared, num_rows)
    texts = encode(processing_class, source.samples, num_rows)
    with bar(3, "scoring and writing", unit="step", leave=False) as shown:
        reference, effect, quantized = WRITERS[mode](source, folder, texts)
        own_samples = check_own_samples(quantized or reference, source)
        write_stops(folder, processing_class, declared, stops)
        step_on(shown, "scoring what was written")
        model = _load_adapter(source, folder, as_trained=True) if mode == "continue" else load_model(folder, **trust)
        scores = log_probs(model, texts)
        differences = compare(reference, scores)
        check_differences(differences, effect, mode, model.dtype)
        step_on(shown, "sampling from it")
        stopped = check_stops(model, load_processing_class(folder, **trust), source, stops)
    return {
        "mode": mode,
        "step": source.step,
        "candidate": source.candidate,
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


def _load_adapter(source: Source, adapter: Path, *, as_trained: bool = False):
    """Load the adapter in the folder `adapter` on its base, quantized as in training when `as_trained`."""
    name = source.trained_on if as_trained else source.base
    brings_config = ModelFolder(name).is_quantized
    quantization = source.quantization if as_trained and not brings_config else None
    base = load_model(name, quantization, trust_remote_code=source.trust_remote_code)
    return put_adapter(base, str(adapter), name).eval()


# ---- Writing. Each writer returns the source's log-probs, the adapter's effect in nats, and the log-probs of the
# quantized model, or None.


def write_full(source: Source, folder: Path, texts: list) -> tuple:
    """Copy full weights."""
    reference = log_probs(load_model(source.weights, trust_remote_code=source.trust_remote_code), texts)
    release_memory()
    for path in source.folder.iterdir():  # weights alone are linked: other files are rewritten
        if path.name.endswith(WEIGHTS) and path.name not in NOT_MODEL:
            link_or_copy(path.resolve(), folder / path.name)
        elif path.suffix == ".py" or path.name == CONFIG:
            shutil.copy2(path, folder)
    return reference, None, None


def write_merged(source: Source, folder: Path, texts: list) -> tuple:
    """Merge an adapter into its base."""
    quantized = None
    if source.quantization:
        quantized = log_probs(_load_adapter(source, source.folder, as_trained=True), texts)
        release_memory()
    model = _load_adapter(source, source.folder)
    reference = log_probs(model, texts)
    with model.disable_adapter():
        effect = compare(reference, log_probs(model, texts))["mean"]
    untie(model)
    try:
        model = model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"{source.weights} cannot be merged: {error}; use --mode continue") from None
    head = model.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):  # it was under another wrapper, which alone PEFT takes off
        model.set_output_embeddings(head.modules_to_save[head.active_adapters[0]])
    inputs, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if head is not inputs and not torch.equal(head, inputs):
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    model.generation_config = GenerationConfig()  # write_stops brings it; an inconsistent one would fail the saving
    model.save_pretrained(folder)
    del model
    release_memory()
    return reference, effect, quantized


def untie(model) -> None:
    """Give a tied head weights of its own where the adapter adds to an embedding: a merge would add to both."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    if not any(isinstance(each, BaseTunerLayer) for each in layers):
        return
    inputs, head = (each.get_base_layer() if isinstance(each, BaseTunerLayer) else each for each in layers)
    if head.weight is inputs.weight:
        head.weight = torch.nn.Parameter(head.weight.clone())


def write_continued(source: Source, folder: Path, texts: list) -> tuple:
    """Copy an adapter, and name its base in its config."""
    reference = log_probs(_load_adapter(source, source.folder, as_trained=True), texts)
    release_memory()
    for path in source.folder.glob("adapter_model*"):
        link_or_copy(path.resolve(), folder / path.name)
    config = read_json(source.folder / ADAPTER_CONFIG)
    write_json(folder / ADAPTER_CONFIG, {**config, "base_model_name_or_path": source.base})
    return reference, None, None


WRITERS: dict[str, Callable] = {"full": write_full, "merge": write_merged, "continue": write_continued}


if __name__ == "__main__":
    exit_on_input_error("aesl handoff", main)
