"""`aesl handoff RUN`: a selected checkpoint -> a folder that GRPO can start from, proven by reading it back.

Full weights are copied, an adapter is merged into its base or goes on as an adapter. In the result tokenizer, chat
template, config and generation config agree on the tokens that end a completion: where they do not, samples never stop
and every reward is zero. Then the folder is loaded from disk, must give the log-probs of its source, and must stop by
itself at least once.
"""

import copy
import gc
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from .arguments import parse
from .errors import InputError, exit_on_input_error, nearest
from .files import (
    CHAIN,
    DIVERSITY,
    HANDOFF,
    HANDOFF_DIR,
    RUN,
    SAMPLES,
    SELECTION,
    read_json,
    read_jsonl,
    sft_dir,
    write_json,
)


ADAPTER_CONFIG = "adapter_config.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
MODES = ("auto", "merge", "continue")
WEIGHTS = (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json")
# Trainer's state lies beside the weights in an output folder: not part of a model, and training_args.bin is a pickle.
NOT_MODEL = ("training_args.bin", "optimizer.bin", "scheduler.bin")
# Largest difference in log-prob (nats) between a folder and its exact copy.
COPY_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
# A merge rounds once per weight, so its difference grows with the logits: on a random Qwen2 (width 512, 8 layers,
# logits up to 15, adapter worth 0.79 nats a token) a right merge differs by 0.10 nats on average in bfloat16 (at most
# 0.41) and 9e-6 in float32 (3.4e-5). It is therefore measured against the adapter's own effect: (mean difference that
# always passes, allowed share of that effect).
MERGE_LIMIT = {torch.float32: (1e-5, 0.01), torch.bfloat16: (0.05, 0.3), torch.float16: (0.05, 0.3)}
# A model's log-likelihood of its own samples is, on average, minus its entropy: beyond this many nats it is another
# model's samples.
OWN_SAMPLES_LIMIT = 1.0
MAX_PROMPTS, SAMPLES_PER_PROMPT, MAX_SCORED, MAX_LENGTH, DEFAULT_NEW_TOKENS = 8, 4, 16, 2048, 256
# Something to compare log-probs on where a folder has no samples of its own.
CONVERSATION = [
    {"role": "user", "content": "Count from one to five."},
    {"role": "assistant", "content": "one two three four five"},
]


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


@dataclass(frozen=True)
class Stops:
    """Ids that end a completion (`eos`) and pad it, and what had to change for all files to agree."""

    eos: list[int]
    pad: int
    turn_end: str | None
    changes: list[str]


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


# ---- What to hand over


def find_source(run: Path, base: str | None = None, trust_remote_code: bool = False) -> Source:
    """The selected weights of `run` (a chain run or an SFT folder), or `run` itself if it is a model or an adapter."""
    if not run.is_dir():
        siblings = [item.name for item in run.absolute().parent.glob("*")]
        raise InputError(f"{run} is not a folder{nearest(run.name, siblings)}")
    folder, step, sft = _selected(run)
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if not is_adapter and not (
        (folder / CONFIG).is_file() and any(folder.glob("*.safetensors")) | any(folder.glob("*.bin"))
    ):
        raise InputError(
            f"{folder} holds neither {CONFIG} with weights nor {ADAPTER_CONFIG}; select one: aesl select {run}"
        )
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
        sft = None
    for place in filter(None, (run, sft)):
        if (place / SELECTION).is_file():
            selection = read_json(place / SELECTION)
            folder = place / selection.get("path", "")
            if not selection.get("path") or not folder.is_dir():
                raise InputError(
                    f"{place / SELECTION} points to {folder}, which is not a folder; run aesl select {run} again"
                )
            return folder, selection.get("step"), sft
    return run, None, sft


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
    rows = read_jsonl(sft / DIVERSITY) if (sft / DIVERSITY).is_file() else []
    figures = next((row for row in rows if row.get("step") == measured), {})
    samples = read_jsonl(steps[measured])
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


def first_difference(one: Path, other: Path) -> str | None:
    """First tensor in which two model folders differ: name, shape, a vector's values or a matrix's first 4 rows."""
    left, right = (_tensor_files(folder) for folder in (one, other))
    for name in sorted(left.keys() | right.keys()):
        if name not in left or name not in right:
            return name
        a, b = (_head(files[name], name) for files in (left, right))
        if a[0] != b[0] or not torch.equal(a[1], b[1]):
            return name
    return None


def _tensor_files(folder: Path) -> dict[str, Path]:
    from safetensors import safe_open

    files = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    return files


def _head(path: Path, name: str) -> tuple[list[int], torch.Tensor]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensor = file.get_slice(name)
        shape = tensor.get_shape()
        # bfloat16: a float32 copy of a bfloat16 model is the same model.
        return shape, (tensor[:4] if len(shape) > 1 else tensor[:]).to(torch.bfloat16)


def quantization_of(base: str, folders: list[Path | None]) -> dict | None:
    """How `base` was quantized in training: its own config, else `quantization` in a run.json of `folders`."""
    if is_quantized(base):
        return read_json(Path(base) / CONFIG)["quantization_config"]
    runs = [read_json(folder / RUN) for folder in folders if folder and (folder / RUN).is_file()]
    return next((run["quantization"] for run in runs if run.get("quantization")), None)


def is_quantized(model: str) -> bool:
    """Whether the folder `model` holds quantized weights."""
    config = Path(model) / CONFIG
    return config.is_file() and bool(read_json(config).get("quantization_config"))


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


# ---- Loading and scoring


def load_tokenizer(source: Source):
    """The tokenizer beside the weights, else the base's."""
    beside = source.base is None or (source.folder / TOKENIZER_CONFIG).is_file()
    place = str(source.folder if beside else source.base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"no tokenizer in {place}: {' '.join(str(error).split())}") from None
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        # Without its files transformers builds an empty one from the model's type, and says nothing.
        raise InputError(f"no tokenizer in {place}: what is there encodes nothing")
    return tokenizer


def num_embeddings(source: Source) -> int:
    config = AutoConfig.from_pretrained(source.base or source.folder, trust_remote_code=source.trust_remote_code)
    return config.get_text_config().vocab_size


def generation_config(source: Source) -> dict:
    """The generation config beside the weights, else the base's, else what the model's config declares."""
    for place in (source.folder, source.base):
        try:
            return GenerationConfig.from_pretrained(place).to_diff_dict() if place else {}
        except OSError:
            continue
    return {}


def load_model(
    path: str | Path, quantization: dict | None = None, *, device: str | None = None, trust_remote_code: bool = False
):
    """A model in the dtype of its files, not training; by default on the GPU when there is one."""
    device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    kwargs = {"quantization_config": BitsAndBytesConfig.from_dict(quantization)} if quantization else {}
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", device_map=device, trust_remote_code=trust_remote_code, **kwargs
    )
    return model.eval()


def load_adapter(source: Source, adapter: Path, *, as_trained: bool = False):
    """The adapter in the folder `adapter` on its base, quantized as in training when `as_trained`.

    Raises:
        InputError: the base has another shape than the one that the adapter was trained on.
    """
    from peft import PeftModel

    name = source.trained_on if as_trained else source.base
    # Quantized weights bring their own config.
    quantization = source.quantization if as_trained and not is_quantized(name) else None
    base = load_model(name, quantization, trust_remote_code=source.trust_remote_code)
    try:
        model = PeftModel.from_pretrained(base, str(adapter))
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{adapter} does not fit the base {name}: {str(error)[:300]}") from None
    check_adapter_keys(model, adapter, name)
    return model.eval()


def check_adapter_keys(model, adapter: Path, base: str) -> None:
    """Refuse a base with more or fewer layers: PEFT leaves out what finds no place, with a warning at most."""
    from peft import get_peft_model_state_dict

    saved = {name for name in _tensor_files(adapter) if "embed" not in name and "lm_head" not in name}
    placed = {name for name in get_peft_model_state_dict(model) if "embed" not in name and "lm_head" not in name}
    if saved and saved != placed:
        raise InputError(
            f"{adapter} does not fit the base {base}: {sorted(saved ^ placed)[0]} is only in one of the two"
        )


def encode(tokenizer, samples: list[dict]) -> list[tuple[list[int], int]]:
    """Token ids to score and how many of them are prompt: the run's samples, else a short conversation or sentence."""
    pairs = [(row["prompt"], text) for row in samples for text in row["completions"] if text.strip()][
        :: _stride(samples)
    ][:MAX_SCORED]
    if not pairs:
        pairs = [
            (CONVERSATION[:1], CONVERSATION[1]["content"])
            if tokenizer.chat_template
            else ("Count: ", "one two three four")
        ]
    texts = []
    for prompt, completion in pairs:
        prompt_ids = prompt_tokens(tokenizer, prompt)
        ids = prompt_ids + tokenizer(completion, add_special_tokens=False)["input_ids"]
        texts.append((ids[:MAX_LENGTH], max(1, len(prompt_ids))))
    return [text for text in texts if len(text[0]) > text[1]]


def _stride(samples: list[dict]) -> int:
    return max(1, sum(len(row["completions"]) for row in samples) // MAX_SCORED)


def prompt_tokens(tokenizer, prompt: str | list[dict]) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    if tokenizer.chat_template is None:
        raise InputError("the run's prompts are conversations, and the tokenizer has no chat template")
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def log_probs(model, texts: list[tuple[list[int], int]]) -> list[torch.Tensor]:
    """Log-probs (nats, float32) of each text's tokens after its prompt; one by one, so that padding plays no part."""
    scores = []
    for ids, num_prompt in texts:
        ids_1L = torch.tensor([ids], device=model.device)
        logits_LV = model(input_ids=ids_1L).logits[0, num_prompt - 1 : -1].float()
        scores.append(logits_LV.log_softmax(-1).gather(-1, ids_1L[0, num_prompt:, None])[:, 0].cpu())
    return scores


def compare(one: list[torch.Tensor], other: list[torch.Tensor]) -> dict[str, float]:
    """Largest and mean absolute difference of two lists of log-probs, in nats; nan where either is not finite."""
    difference = (torch.cat(one) - torch.cat(other)).abs()
    return {"max": difference.max().item(), "mean": difference.mean().item()}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- Writing. Each writer returns the source's log-probs, the adapter's effect in nats, and those of the quantized
# model or None.


def write_full(source: Source, folder: Path, texts: list) -> tuple:
    reference = log_probs(load_model(source.folder, trust_remote_code=source.trust_remote_code), texts)
    _free()
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
        _free()
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
    _free()
    return reference, effect, quantized


def write_continued(source: Source, folder: Path, texts: list) -> tuple:
    reference = log_probs(load_adapter(source, source.folder, as_trained=True), texts)
    _free()
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


# ---- The tokens that end a completion


def turn_end_token(tokenizer) -> int | None:
    """The special token right after an assistant's text in the chat template; None where there is none."""
    if tokenizer.chat_template is None:
        return None
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    start = text.rfind(CONVERSATION[1]["content"])
    if start < 0:
        raise InputError("the chat template does not show the assistant's text")
    after = text[start + len(CONVERSATION[1]["content"]) :].lstrip()
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    return ids[0] if ids and ids[0] in special_ids(tokenizer) else None


def special_ids(tokenizer) -> set[int]:
    """Ids that no plain text encodes to."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def agree_on_stops(tokenizer, declared: dict, num_rows: int) -> Stops:
    """Decide eos and pad, and set them on `tokenizer`.

    eos is the tokenizer's, the token that ends an assistant's turn in the chat template, and what the generation
    config declares besides, if that is a special token: a plain token there would cut texts short. pad is the
    tokenizer's, else its eos, as GRPOTrainer does.
    """
    changes, turn_end = [], turn_end_token(tokenizer)
    if tokenizer.eos_token_id is None:
        if turn_end is None:
            raise InputError("nothing ends a completion: no eos_token in the tokenizer, no special token after a turn")
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(turn_end)
        changes.append(f"tokenizer: eos_token set to {tokenizer.eos_token}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        changes.append(f"tokenizer: pad_token set to {tokenizer.pad_token}")
    before = _as_list(declared.get("eos_token_id"))
    kept = [index for index in before if index in special_ids(tokenizer)]
    eos = list(dict.fromkeys(filter(lambda index: index is not None, [tokenizer.eos_token_id, turn_end, *kept])))
    changes += [f"generation_config: eos_token_id {index} added" for index in eos if index not in before]
    changes += [f"generation_config: eos_token_id {index} removed" for index in before if index not in eos]
    if declared.get("pad_token_id") != tokenizer.pad_token_id:
        changes.append(f"generation_config: pad_token_id {declared.get('pad_token_id')} -> {tokenizer.pad_token_id}")
    for index in (*eos, tokenizer.pad_token_id):
        if index >= num_rows:
            token = tokenizer.convert_ids_to_tokens(index)
            raise InputError(
                f"token {token} has id {index}, the model {num_rows} embeddings: this tokenizer is another model's"
            )
    return Stops(
        eos, tokenizer.pad_token_id, None if turn_end is None else tokenizer.convert_ids_to_tokens(turn_end), changes
    )


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def write_stops(folder: Path, tokenizer, declared: dict, stops: Stops) -> None:
    """Tokenizer, generation_config.json and, where there is one, config.json, all with the same eos and pad."""
    eos = stops.eos[0] if len(stops.eos) == 1 else stops.eos
    ids = {"eos_token_id": eos, "pad_token_id": stops.pad}
    tokenizer.save_pretrained(folder)
    write_json(folder / GENERATION_CONFIG, {**json.loads(json.dumps(declared, default=str)), **ids})
    if (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG)
        nested = (
            {"text_config": {**config["text_config"], **ids}} if isinstance(config.get("text_config"), dict) else {}
        )
        write_json(folder / CONFIG, {**config, **nested, **ids})


# ---- Checks on what was read back


def check_differences(differences: dict[str, float], effect: float | None, mode: str, dtype: torch.dtype) -> None:
    limit = COPY_LIMIT.get(dtype, max(COPY_LIMIT.values()))
    if differences["max"] <= limit:
        return
    name = str(dtype).removeprefix("torch.")
    if mode != "merge":
        raise InputError(
            f"log-probs of handoff and source differ by {differences['max']:.3g} nats; {name} allows {limit:g}"
        )
    floor, share = MERGE_LIMIT.get(dtype, MERGE_LIMIT[torch.bfloat16])
    allowed = max(floor, share * effect)
    if not differences["mean"] <= allowed:  # also when it is nan
        raise InputError(
            f"merged in {name}, the model differs from its parts by {differences['mean']:.3g} nats a token; the "
            f"adapter is worth {effect:.3g}, which allows {allowed:.3g}: use --mode continue, or a base in float32"
        )


def check_own_samples(scores: list[torch.Tensor], source: Source) -> dict | None:
    """Compare the model's log-likelihood of the run's samples with the entropy that was recorded when it gave them.

    The two agree on average for the model that gave the samples. Another base of the same shape loads without
    complaint and fails here.
    """
    rows = [row for row in source.samples if row["comparable"] and row.get("entropy")]
    if not any(text.strip() for row in rows for text in row["completions"]):
        return None  # of empty samples nothing was scored
    values = [
        (value, tokens)
        for row in rows
        for value, tokens in zip(row["entropy"], row["num_tokens"], strict=True)
        if value is not None
    ]
    total = sum(tokens for _, tokens in values)
    if not total:
        return None
    entropy = sum(value * tokens for value, tokens in values) / total
    nll = -torch.cat(scores).mean().item()
    if not nll <= entropy + OWN_SAMPLES_LIMIT:
        what = f"base {source.base}" if source.base else f"model {source.folder}"
        raise InputError(
            f"{what} is not the one that gave the samples of step {source.step}: it finds them at {nll:.3g} nats a "
            f"token, and {entropy:.3g} were recorded"
        )
    return {"nll": nll, "entropy": entropy}


def check_stops(model, tokenizer, source: Source, stops: Stops) -> dict:
    """Sample from the run's prompts with the files as written; at least one sample must end by eos."""
    prompts = [prompt_tokens(tokenizer, row["prompt"]) for row in source.samples[:MAX_PROMPTS]]
    stopped = count_stopped(model, prompts, source.max_new_tokens, stops) if prompts else 0
    samples = {"num": len(prompts) * SAMPLES_PER_PROMPT, "stopped": stopped, "max_new_tokens": source.max_new_tokens}
    if prompts and not stopped:
        tokens = ", ".join(f"{index} ({tokenizer.convert_ids_to_tokens(index)})" for index in stops.eos)
        raise InputError(
            f"none of {samples['num']} samples stopped within {source.max_new_tokens} tokens; eos is {tokens}: was "
            "the end of a completion trained (TRL's SFT adds eos), and is max_new_tokens long enough?"
        )
    return samples


@torch.no_grad()
def count_stopped(model, prompts: list[list[int]], max_new_tokens: int, stops: Stops) -> int:
    """How many of `SAMPLES_PER_PROMPT` samples of each prompt end by eos: the one on disk, for none is passed."""
    longest = max(map(len, prompts))
    ids_NP = torch.tensor([[stops.pad] * (longest - len(ids)) + ids for ids in prompts], device=model.device)
    mask_NP = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    config = copy.deepcopy(model.generation_config)
    config.update(do_sample=True, temperature=1.0, top_p=1.0, top_k=0)
    config.update(max_new_tokens=max_new_tokens, num_return_sequences=SAMPLES_PER_PROMPT)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        ids_SL = model.generate(input_ids=ids_NP, attention_mask=mask_NP, generation_config=config)
    completions = ids_SL[:, longest:]
    return int(torch.isin(completions, torch.tensor(stops.eos, device=completions.device)).any(dim=1).sum())


if __name__ == "__main__":
    exit_on_input_error("aesl handoff", main)
