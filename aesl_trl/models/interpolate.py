"""`aesl interpolate A B --weight W --output_dir DIR`: write (1 - W) A + W B, WiSE-FT's average of two checkpoints.

Source: Dang et al., "Weight Ensembling Improves Reasoning in Language Models" (arXiv 2504.10478): half an early and
half a late checkpoint of one SFT run recovers the pass@k that over-training lost. It is a baseline without a loss.

Full weights are averaged tensor by tensor, in float32 or better, and kept in the dtype of A. Two LoRA adapters cannot
be averaged matrix by matrix, because an adapter acts through the product B A. On one base their ranks are stacked,

    (1 - W) s1 B1 A1 + W s2 B2 A2  =  [B1, B2] [(1 - W) s1 A1; W s2 A2],

which is exact, leaves the base untouched and gives r1 + r2 ranks. Modules trained as a whole (modules_to_save) are
averaged. Tokenizer, configs and model code are A's. No model is built: weights are read and written a file at a time.

The average of an adapter and its own base is the adapter with each product scaled: B A becomes (W B) A.
"""

import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from ..arguments import check_replaceable, parse, positionals
from ..errors import InputError, exit_on_input_error, tell
from ..files import read_json, swapped, write_json, wrote
from ..provenance import package_versions
from .folder import ADAPTER_CONFIG, CONFIG, INDEX, TOKENIZER_CONFIG, ModelFolder, check_weights, open_tensors
from .source import find_source


INTERPOLATION = "interpolation.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Trainer's state and the model card describe A alone, and are not copied.
BESIDE_WEIGHTS = ("*config.json", "*token*", "vocab*", "merges.txt", "*.model", "*.jinja", "*.py")
# What a config says that is not about the network
CONFIG_NOTES = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
CONFIG_NOTES |= {"bos_token_id", "eos_token_id", "pad_token_id"}
FLOATS = {"F64", "F32", "F16", "BF16"}  # safetensors' names
# Settings of an adapter that make the adapted weight more than W + s B A, or move the base that it is added to
NOT_PLAIN = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "monteclora_config",
)
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")  # the others subtract the first B A from the base
LORA_A, LORA_B = ("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B")  # [r, in], [out, r]


@dataclass
class InterpolateArguments:
    """`aesl interpolate A B`: average two checkpoints of one run (WiSE-FT)."""

    first: str | None = field(default=None, metadata={"help": "A, the early checkpoint: a run, model or adapter."})
    second: str | None = field(default=None, metadata={"help": "B, the late checkpoint, of the same kind and shape."})
    weight: float = field(default=0.5, metadata={"help": "Share of B, above 0 and below 1."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder to write."})


def main(argv: list[str] | None = None) -> None:
    names, flags = positionals(sys.argv[1:] if argv is None else argv)
    given = [text for flag, name in zip(("--first", "--second"), names, strict=False) for text in (flag, name)]
    (args,) = parse((InterpolateArguments,), [*given, *names[2:], *flags], prog="aesl interpolate")
    if args.first is None or args.second is None:
        raise InputError("which two? aesl interpolate A B --weight W --output_dir DIR")
    if args.output_dir is None:
        raise InputError("output_dir: where to? aesl interpolate A B --weight W --output_dir DIR")
    kind = interpolate(args.first, args.second, args.output_dir, weight=args.weight)["kind"]
    parts = f"{1 - args.weight:g} of {args.first} and {args.weight:g} of {args.second} ({kind})"
    tell(f"{parts} -> {args.output_dir}; next: aesl probe {args.output_dir} --config FILE")


def interpolate(first: str | Path, second: str | Path, output: str | Path, *, weight: float = 0.5) -> dict:
    """Write the folder `output`, and return what its interpolation.json holds.

    Args:
        first, second: A and B, each a run with a selected checkpoint, a model's folder or an adapter's.
        weight: W, the share of B, in (0, 1).

    Raises:
        InputError: a weight out of range, folders of different kinds, shapes, vocabularies or bases, quantized
            weights, or an adapter that is not plain LoRA. Nothing is written then.
    """
    check_weight(weight, first, second)
    sources = [find_source(Path(name)) for name in (first, second)]
    is_adapter = sources[0].is_adapter
    if is_adapter != sources[1].is_adapter:
        adapter, model = (first, second) if is_adapter else (second, first)
        raise InputError(
            f"{adapter} is an adapter and {model} holds full weights: merge it first "
            f"(aesl handoff {adapter} --output_dir {Path(adapter).name}-merged)"
        )
    return _averaged(*sources, output, weight)


def _averaged(
    first: ModelFolder, second: ModelFolder, output: str | Path, weight: float, *, second_may_have_more: bool = False
) -> dict:
    """Do what [`interpolate`] does, for two folders of one kind."""
    is_ours = wrote(Path(output) / INTERPOLATION, "weight")
    check_replaceable("output_dir", output, is_ours, [first.folder, second.folder])
    _check_safetensors(first, second)
    check, write = (_check_adapters, _write_adapter) if first.is_adapter else (_check_models, _write_model)
    check(first, second)
    _check_tensors(first.folder, second.folder, second_may_have_more)
    _check_vocabularies(first, second)
    return _written(output, first, second.weights, weight, lambda folder: write(first, second, weight, folder))


def average_with_base(tuned: str | Path, base: str | Path, output: str | Path, *, weight: float) -> dict:
    """Write the folder `output` with (1 - W) base + W tuned, and return what its interpolation.json holds.

    Tokenizer, configs and dtype are those of `tuned`. For full weights this is [`interpolate`] of what lies in the two
    folders themselves, and the base may have tensors that `tuned` lacks, such as a tied head. For a LoRA adapter it is
    the adapter on the same base with each B multiplied by W; modules trained as a whole are averaged with the base's.

    Args:
        tuned: a checkpoint's folder, with full weights or an adapter.
        base: the folder of the full weights from which `tuned` was trained. What a run selected in it does not count.
        weight: W, the share of `tuned`, in (0, 1).

    Raises:
        InputError: as [`interpolate`], or a module trained as a whole that the base does not have in the same shape.
    """
    check_weight(weight, base, tuned)
    for folder in (tuned, base):
        check_weights(Path(folder))
    source, base_share = ModelFolder.find(tuned, "run"), 1 - weight
    if not source.is_adapter:
        return _averaged(source, ModelFolder(str(base)), output, base_share, second_may_have_more=True)
    is_ours = wrote(Path(output) / INTERPOLATION, "weight")
    check_replaceable("output_dir", output, is_ours, [source.folder, base])
    _check_safetensors(source)
    _check_plain_lora(source)
    tensors, others = open_tensors(source.folder), open_tensors(Path(base))
    names = {name: name.removeprefix("base_model.model.").replace(".base_layer.", ".") for name in tensors}
    for name, plain in names.items():
        is_whole = not name.endswith(LORA_A + LORA_B)
        if is_whole and (plain not in others or others[plain].get_shape() != tensors[name].get_shape()):
            raise InputError(
                f"{tuned} trained {plain} as a whole, and {base} has no such tensor of shape "
                f"{tensors[name].get_shape()}: merge the adapter first (aesl handoff {tuned} --output_dir DIR)"
            )

    def write(folder: Path) -> None:
        scaled = {}
        for name, plain in names.items():
            value = tensors[name][...]
            if not name.endswith(LORA_A):
                other = torch.zeros_like(value) if name.endswith(LORA_B) else others[plain][...]
                value = average(value, other, base_share)
            scaled[name] = value
        save_file(scaled, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})

    return _written(output, source, str(base), base_share, write)


def _written(
    output: str | Path, first: ModelFolder, second: str, weight: float, write: Callable[[Path], None]
) -> dict:
    """Swap in the folder `output`: what lies beside the weights of `first`, and the weights, by `write(folder)`."""
    kind = "adapter" if first.is_adapter else "full"
    result = {"kind": kind, "first": first.weights, "second": second, "weight": weight, "versions": package_versions()}
    with swapped(output) as folder:
        for path in {path for pattern in BESIDE_WEIGHTS for path in first.folder.glob(pattern) if path.is_file()}:
            shutil.copy2(path, folder)
        write(folder)
        write_json(folder / INTERPOLATION, result)
    return result


# ---- Checks


def check_weight(weight: float, first: str | Path, second: str | Path) -> None:
    """Refuse a share of `second` that is not a number in (0, 1)."""
    if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 < weight < 1:
        raise InputError(
            f"weight is {weight!r}, but must be a number above 0 and below 1 (0 is {first}, 1 is {second})"
        )


def _check_safetensors(*sources: ModelFolder) -> None:
    for source in sources:
        if source.is_quantized and not source.is_adapter:
            raise InputError(f"{source.weights} holds quantized weights, which cannot be averaged: name the original")
        if not any(source.folder.glob("*.safetensors")):
            raise InputError(f"{source.weights} holds no *.safetensors: save the weights anew with save_pretrained")


def _check_models(first: ModelFolder, second: ModelFolder) -> None:
    one, other = (_without_notes(_network(source)) for source in (first, second))
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            raise InputError(
                f"{first.weights} and {second.weights} are different models: {name} is {one.get(name)!r} and "
                f"{other.get(name)!r} in {CONFIG}"
            )


def _network(source: ModelFolder) -> dict:
    """Read a model's config with the defaults that an older version did not write; as it stands, where unknown."""
    try:
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=False).to_dict()
    except (OSError, ValueError, KeyError):
        return read_json(source.folder / CONFIG)


def _without_notes(config: dict) -> dict:
    """Drop CONFIG_NOTES, also from the configs of a composite model's parts (`text_config`)."""
    kept = {name: value for name, value in config.items() if name not in CONFIG_NOTES}
    return {name: _without_notes(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _check_adapters(first: ModelFolder, second: ModelFolder) -> None:
    if first.base != second.base:
        raise InputError(f"the adapters are on two bases, {first.base} and {second.base}: merge both first")
    for source in (first, second):
        _check_plain_lora(source)


def _check_plain_lora(source: ModelFolder) -> None:
    if extra := beyond_plain_lora(read_json(source.folder / ADAPTER_CONFIG)):
        raise InputError(f"{source.weights} is more than plain LoRA ({extra}): merge it first, then interpolate")


def beyond_plain_lora(config: dict) -> str | None:
    """Name a setting of an adapter that makes it more than W + s B A, which has an average; None for plain LoRA."""
    extras = [name for name in NOT_PLAIN if config.get(name)]
    if config.get("peft_type") != "LORA":
        extras = [f"peft_type {config.get('peft_type')}"]
    elif config.get("init_lora_weights", True) not in PLAIN_INITS:
        extras.append(f"init_lora_weights {config['init_lora_weights']!r}")
    return extras[0] if extras else None


def _check_tensors(first: Path, second: Path, second_may_have_more: bool) -> None:
    """Refuse tensors of other names or shapes, or of dtypes without an average. LoRA's ranks may differ."""
    one, other = open_tensors(first), open_tensors(second)
    for name in sorted(one.keys() - other.keys() if second_may_have_more else one.keys() ^ other.keys()):
        raise InputError(f"{first if name in one else second} has the tensor {name}, the other one has not")
    for name in sorted(one):
        shapes = [tensors[name].get_shape() for tensors in (one, other)]
        dtype, other_dtype = (tensors[name].get_dtype() for tensors in (one, other))
        if name.endswith(LORA_A + LORA_B):
            rank = _rank_dimension(name)
            shapes = [[*shape[:rank], *shape[rank + 1 :]] for shape in shapes]
        if shapes[0] != shapes[1] or (dtype != other_dtype and not {dtype, other_dtype} <= FLOATS):
            raise InputError(
                f"{name} is {dtype} of shape {shapes[0]} in {first}, but {other_dtype} of {shapes[1]} in {second}"
            )


def _check_vocabularies(first: ModelFolder, second: ModelFolder) -> None:
    """Refuse two tokenizers that differ: a row of the averaged embedding must belong to one token."""
    from transformers import AutoTokenizer

    if not all((source.folder / TOKENIZER_CONFIG).is_file() for source in (first, second)):
        return
    one, other = (AutoTokenizer.from_pretrained(source.folder).get_vocab() for source in (first, second))
    for token in sorted(one.keys() | other.keys()):
        if one.get(token) != other.get(token):
            raise InputError(
                f"{first.weights} and {second.weights} have different tokenizers: {token!r} is {one.get(token)} and "
                f"{other.get(token)}"
            )


# ---- Writing


def average(one: Tensor, other: Tensor, weight: float) -> Tensor:
    """Return `(1 - weight) * one + weight * other`, computed in float32 or better, in the dtype of `one`.

    Integers have no average: equal tensors are returned, different ones refused.
    """
    if not one.is_floating_point():
        if not torch.equal(one, other):
            raise InputError(f"a tensor of {one.dtype} differs between the two, and integers have no average")
        return one
    wide = torch.promote_types(one.dtype, torch.float32)
    return ((1 - weight) * one.to(wide) + weight * other.to(wide)).to(one.dtype)


def _write_model(first: ModelFolder, second: ModelFolder, weight: float, folder: Path) -> None:
    others = open_tensors(second.folder)
    if (first.folder / INDEX).is_file():
        shutil.copy2(first.folder / INDEX, folder)
    for path in sorted(first.folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {name: average(file.get_tensor(name), others[name][...], weight) for name in file.keys()}
            save_file(tensors, folder / path.name, metadata=file.metadata())


def _write_adapter(first: ModelFolder, second: ModelFolder, weight: float, folder: Path) -> None:
    one, other = open_tensors(first.folder), open_tensors(second.folder)
    configs = [read_json(source.folder / ADAPTER_CONFIG) for source in (first, second)]
    stacked, ranks = {}, {}
    for name in one:
        parts = [one[name][...], other[name][...]]
        if not name.endswith(LORA_A + LORA_B):
            stacked[name] = average(*parts, weight)
            continue
        if name.endswith(LORA_A):
            # `base_model.model.model.layers.0.mlp.up_proj.lora_A.weight` -> `model.layers.0.mlp.up_proj`
            end = next(end for end in LORA_A if name.endswith(end))
            module = name.removeprefix("base_model.model.").removesuffix("." + end)
            wide = torch.promote_types(parts[0].dtype, torch.float32)
            parts = [
                (part.to(wide) * (share * scaling(config, module))).to(part.dtype)
                for part, share, config in zip(parts, (1 - weight, weight), configs, strict=True)
            ]
            ranks[module] = sum(part.size(0) for part in parts)
        stacked[name] = torch.cat(parts, _rank_dimension(name)).contiguous()
    save_file(stacked, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {module: value for module, value in ranks.items() if value != rank}
    settings = {  # the scales are in the matrices, so alpha / r is 1 for every module
        "base_model_name_or_path": first.base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "init_lora_weights": True,
    }
    write_json(folder / ADAPTER_CONFIG, {**configs[0], **settings})


def _rank_dimension(name: str) -> int:
    return 0 if name.endswith(LORA_A) else 1


def scaling(config: dict, module: str) -> float:
    """Return the factor of a LoRA adapter's B A in `module`: alpha / r, or alpha / sqrt(r) if rank-stabilised.

    PEFT's own rule for patterns decides which rank and alpha the module has.
    """
    from peft.utils.other import get_pattern_key

    def setting(pattern: str, default: str) -> float:
        values = config.get(pattern) or {}
        return values.get(get_pattern_key(values.keys(), module), config[default])

    rank, alpha = setting("rank_pattern", "r"), setting("alpha_pattern", "lora_alpha")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


if __name__ == "__main__":
    exit_on_input_error("aesl interpolate", main)
