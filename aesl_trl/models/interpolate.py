"""`aesl interpolate A B --weight W --output DIR`: the model (1 - W) A + W B, WiSE-FT's average of two checkpoints.

Source: Dang et al., "Weight Ensembling Improves Reasoning in Language Models" (arXiv 2504.10478): half an early and
half a late checkpoint of one SFT run recovers the pass@k that over-training lost. A baseline without its own loss.

Full weights are averaged tensor by tensor, in float32 or better, and kept in the dtype of A. An adapter is no average
of its matrices, since B A is a product: of two LoRA adapters on one base the ranks are stacked,

    (1 - W) s1 B1 A1 + W s2 B2 A2  =  [B1, B2] [(1 - W) s1 A1; W s2 A2],

exact, with the base untouched and r1 + r2 ranks; modules trained as a whole (modules_to_save) are averaged. Tokenizer,
configs and model code are A's. No model is built: weights are read and written a file at a time.
"""

import math
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..arguments import check_folder, parse
from ..errors import InputError, exit_on_input_error
from ..files import read_json, write_json
from ..provenance import package_versions
from .folder import ADAPTER_CONFIG, CONFIG, INDEX, is_quantized, tensor_files
from .source import Source, find_source


INTERPOLATION = "interpolation.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BESIDE_WEIGHTS = (  # Trainer's state and the model card are those of A alone
    "*config.json",
    "token*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "*.py",
)
CONFIG_NOTES = ("_name_or_path", "transformers_version", "torch_dtype", "use_cache")  # say nothing of the network
# In an adapter's config: what makes the adapted weight more than W + s B A, or moves the base that it is added to
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
# (in A, in B, the dimension of the rank in each)
LORA_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


@dataclass
class InterpolateArguments:
    """`aesl interpolate A B`: average two checkpoints of one run (WiSE-FT)."""

    first: str | None = field(default=None, metadata={"help": "A: a run, a model or an adapter; the early one."})
    second: str | None = field(default=None, metadata={"help": "B: the late one, of the same kind and shape."})
    weight: float = field(default=0.5, metadata={"help": "Share of B, above 0 and below 1."})
    output: str | None = field(default=None, metadata={"help": "Folder to write."})


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    for name in ("second", "first"):  # the leading arguments that are no flags
        place = {"first": 0, "second": 1}[name]
        if len(argv) > place and not any(argument.startswith("-") for argument in argv[: place + 1]):
            argv[place : place + 1] = [f"--{name}", argv[place]]
    (args,) = parse((InterpolateArguments,), argv, prog="aesl interpolate")
    if args.first is None or args.second is None:
        raise InputError("which two? aesl interpolate A B --weight W --output DIR")
    if args.output is None:
        raise InputError("output: where to? aesl interpolate A B --weight W --output DIR")
    result = interpolate(args.first, args.second, args.output, weight=args.weight)
    print(
        f"{args.output}: {1 - args.weight:g} of {args.first} and {args.weight:g} of {args.second} ({result['kind']})"
    )


def interpolate(first: str | Path, second: str | Path, output: str | Path, *, weight: float = 0.5) -> dict:
    """Write the folder `output`; returns what its interpolation.json holds.

    Args:
        first, second: A and B, each a run with a selected checkpoint, a model's folder or an adapter's.
        weight: W, the share of B, in (0, 1).

    Raises:
        InputError: a weight out of range, folders of different kinds, shapes, dtypes, vocabularies or bases, quantized
            weights, or an adapter that is not plain LoRA. Nothing is written then.
    """
    if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 < weight < 1:
        raise InputError(
            f"weight is {weight!r}, but must be a number above 0 and below 1 (0 is {first}, 1 is {second})"
        )
    sources = [find_source(Path(name)) for name in (first, second)]
    target = Path(output)
    _check_target(target, sources)
    adapters = [source.base is not None for source in sources]
    if adapters[0] != adapters[1]:
        adapter, model = (first, second) if adapters[0] else (second, first)
        raise InputError(
            f"{adapter} is an adapter and {model} holds full weights: merge it first "
            f"(aesl handoff {adapter} --output {Path(adapter).name}-merged)"
        )
    check, write = (_check_adapters, _write_adapter) if adapters[0] else (_check_models, _write_model)
    check(*sources)
    _check_vocabularies(*sources)
    result = {
        "kind": "adapter" if adapters[0] else "full",
        "first": str(sources[0].folder),
        "second": str(sources[1].folder),
        "weight": weight,
        "versions": package_versions(),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, so that the last step is a rename and a kill before it leaves no folder that looks whole
    temporary = target.absolute().with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _copy_beside_weights(sources[0].folder, temporary)
        write(*sources, weight, temporary)
        write_json(temporary / INTERPOLATION, result)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return result


# ---- Checks


def _check_target(target: Path, sources: list[Source]) -> None:
    check_folder("output", target)
    for source in sources:
        if source.folder.resolve().is_relative_to(target.resolve()):
            raise InputError(f"output: {target} holds {source.folder}, and would be replaced; name a new folder")
    if target.is_dir() and any(target.iterdir()) and not (target / INTERPOLATION).is_file():
        raise InputError(f"output: {target} holds other files, and would be replaced; name a new folder")


def _check_models(first: Source, second: Source) -> None:
    for source in (first, second):
        if is_quantized(str(source.folder)):
            raise InputError(f"{source.folder} holds quantized weights, which cannot be averaged: name the original")
        _check_safetensors(source.folder)
    one, other = (read_json(source.folder / CONFIG) for source in (first, second))
    for name in sorted((one.keys() | other.keys()) - set(CONFIG_NOTES) - {"dtype"}):
        if one.get(name) != other.get(name):
            raise InputError(
                f"{first.folder} and {second.folder} are different models: {name} is {one.get(name)!r} and "
                f"{other.get(name)!r} in {CONFIG}"
            )
    _check_tensors(first.folder, second.folder)


def _check_safetensors(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} holds no *.safetensors: save the weights anew with save_pretrained")


def _check_tensors(first: Path, second: Path, *, ranks_may_differ: bool = False) -> None:
    one, other = tensor_files(first), tensor_files(second)
    for name in sorted(one.keys() ^ other.keys()):
        raise InputError(f"{first if name in one else second} has the tensor {name}, the other one has not")
    for name in sorted(one):
        (shape, dtype), (other_shape, other_dtype) = _form(one[name], name), _form(other[name], name)
        if ranks_may_differ and _is_lora(name):
            shape, other_shape = _without_rank(name, shape), _without_rank(name, other_shape)
        if (shape, dtype) != (other_shape, other_dtype):
            raise InputError(
                f"{name} is {dtype} of shape {shape} in {first}, but {other_dtype} of shape {other_shape} in {second}"
            )


def _form(path: Path, name: str) -> tuple[list[int], str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        part = file.get_slice(name)
        return part.get_shape(), part.get_dtype()


def _check_adapters(first: Source, second: Source) -> None:
    if first.base != second.base:
        raise InputError(f"the adapters are on two bases, {first.base} and {second.base}: merge both first")
    for source in (first, second):
        _check_safetensors(source.folder)
        _check_plain_lora(source.folder)
    _check_tensors(first.folder, second.folder, ranks_may_differ=True)


def _check_plain_lora(folder: Path) -> None:
    config = read_json(folder / ADAPTER_CONFIG)
    used = [name for name in NOT_PLAIN if config.get(name)]
    if config.get("peft_type") != "LORA":
        used = [f"peft_type {config.get('peft_type')}"]
    elif config.get("init_lora_weights", True) not in PLAIN_INITS:
        used.append(f"init_lora_weights {config['init_lora_weights']!r}")
    if used:
        raise InputError(f"{folder} is more than plain LoRA ({used[0]}): merge both adapters first, then interpolate")


def _check_vocabularies(first: Source, second: Source) -> None:
    """Averaged rows of the embedding must be those of the same token."""
    from transformers import AutoTokenizer

    if not all((source.folder / "tokenizer_config.json").is_file() for source in (first, second)):
        return
    one, other = (AutoTokenizer.from_pretrained(source.folder).get_vocab() for source in (first, second))
    for token in sorted(one.keys() | other.keys()):
        if one.get(token) != other.get(token):
            raise InputError(
                f"{first.folder} and {second.folder} have different tokenizers: {token!r} is {one.get(token)} and "
                f"{other.get(token)}"
            )


# ---- Writing


def _copy_beside_weights(source: Path, target: Path) -> None:
    for pattern in BESIDE_WEIGHTS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copy2(path, target)


def average(one: Tensor, other: Tensor, weight: float) -> Tensor:
    """`(1 - weight) * one + weight * other` in float32 or better, in the dtype of `one`. Not of integers: they stay.

    Raises:
        InputError: integers that differ.
    """
    if not one.is_floating_point():
        if not torch.equal(one, other):
            raise InputError(f"a tensor of {one.dtype} differs between the two, and integers have no average")
        return one
    wide = torch.promote_types(one.dtype, torch.float32)
    return ((1 - weight) * one.to(wide) + weight * other.to(wide)).to(one.dtype)


def _write_model(first: Source, second: Source, weight: float, folder: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    others = tensor_files(second.folder)
    if (first.folder / INDEX).is_file():
        shutil.copy2(first.folder / INDEX, folder)
    for path in sorted(set(tensor_files(first.folder).values())):
        with safe_open(path, "pt") as file:
            tensors = {name: average(file.get_tensor(name), _read(others[name], name), weight) for name in file.keys()}
            save_file(tensors, folder / path.name, metadata=file.metadata())


def _read(path: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def _write_adapter(first: Source, second: Source, weight: float, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    one, other = ({} for _ in range(2))
    for source, tensors in ((first, one), (second, other)):
        for path in source.folder.glob("*.safetensors"):
            tensors |= load_file(path)
    configs = [read_json(source.folder / ADAPTER_CONFIG) for source in (first, second)]
    shares = (1 - weight, weight)
    stacked, ranks = {}, {}
    for name, tensor in one.items():
        if not _is_lora(name):
            stacked[name] = average(tensor, other[name], weight)
            continue
        parts, dimension = [tensor, other[name]], _rank_dimension(name)
        if dimension == 0:
            scales = [share * scaling(config, _module(name)) for share, config in zip(shares, configs, strict=True)]
            wide = torch.promote_types(tensor.dtype, torch.float32)
            parts = [(part.to(wide) * scale).to(part.dtype) for part, scale in zip(parts, scales, strict=True)]
            ranks[_module(name)] = sum(part.size(0) for part in parts)
        stacked[name] = torch.cat(parts, dimension).contiguous()
    save_file(stacked, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    write_json(folder / ADAPTER_CONFIG, _stacked_config(configs[0], ranks, first.base))


def _stacked_config(config: dict, ranks: dict[str, int], base: str) -> dict:
    """The scales are in the matrices, so alpha / r is 1 for every module."""
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {module: value for module, value in ranks.items() if value != rank}
    return {
        **config,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "init_lora_weights": True,
    }


def scaling(config: dict, module: str) -> float:
    """What a LoRA adapter's B A is multiplied by in `module`: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA.

    PEFT's own rule for patterns decides which rank and alpha the module has.
    """
    from peft.utils.other import get_pattern_key

    def setting(pattern: str, default: str) -> float:
        values = config.get(pattern) or {}
        return values.get(get_pattern_key(values.keys(), module), config[default])

    rank, alpha = setting("rank_pattern", "r"), setting("alpha_pattern", "lora_alpha")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _is_lora(name: str) -> bool:
    return any(name.endswith(end) for pair in LORA_PAIRS for end in pair)


def _rank_dimension(name: str) -> int:
    """0 for A `[r, in]`, 1 for B `[out, r]`."""
    return 0 if any(name.endswith(a) for a, _ in LORA_PAIRS) else 1


def _without_rank(name: str, shape: list[int]) -> list[int]:
    return [size for dimension, size in enumerate(shape) if dimension != _rank_dimension(name)]


def _module(name: str) -> str:
    """`base_model.model.model.layers.0.mlp.up_proj.lora_A.weight` -> `model.layers.0.mlp.up_proj`."""
    end = next(a for a, _ in LORA_PAIRS if name.endswith(a))
    return name.removeprefix("base_model.model.").removesuffix("." + end)


if __name__ == "__main__":
    exit_on_input_error("aesl interpolate", main)
