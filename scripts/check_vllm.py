"""vLLM against transformers on the same weights, through the engine that the diversity monitor uses.

    python scripts/check_vllm.py --kind full|adapter [--model MODEL]

scripts/check_vllm.sh runs both kinds. Without --model the model is an untrained Qwen2 of 2 layers with heads of 64, in
bf16, its weights wide enough that the next token is not a matter of rounding. Checked are the log-probabilities of
vLLM's samples, its most likely tokens, that changed weights arrive, that seeds are kept apart, and that the weights
under an adapter are left as they were.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config
from trl.import_utils import is_vllm_available

from aesl_trl.losses.scoring import add_fused_head
from aesl_trl.recipes.recipes import recipes_dir
from aesl_trl.sampling.backends import VLLMSettings
from aesl_trl.sampling.draws import Draw, Piece, Request, SamplingSettings, split_over_ranks
from aesl_trl.sampling.groups import preserved_random_state
from aesl_trl.sampling.vllm_synced import SyncedVLLM


PROMPTS = ["1 2 3", "a", "4 5 6 7 8 9 and so on"]
SAMPLES = 4
MAX_NEW_TOKENS = 24
COLD = 0.01  # the lowest temperature that vLLM does not raise
# bf16 keeps 8 bits: logits near 10 are off by up to 0.04, in two programs that add in another order
LOG_PROB_TOLERANCE = 0.05  # nats a token, mean over a sample
TIE_TOLERANCE = 0.3  # nats: a token that is this close to the most likely one may be taken for it


def request_of(model, tokenizer, accelerator, *, temperature: float = 1.0, seed: int = 0) -> Request:
    return split_over_ranks(
        [tokenizer(prompt)["input_ids"] for prompt in PROMPTS],
        accelerator,
        settings=SamplingSettings(SAMPLES, temperature, MAX_NEW_TOKENS, seed=seed),
        piece=Piece(0, len(PROMPTS), 0, SAMPLES),
        model=model,
        tokenizer=tokenizer,
    )


@torch.no_grad()
def log_probs(model, prompt: list[int], draw: Draw) -> torch.Tensor:
    """Return the log-probability of every token after each of the sample's positions, by transformers: `[T, V]`."""
    ids = torch.tensor([prompt + draw.ids], device=model.device)
    return model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)


def taken(model, prompt: list[int], draw: Draw) -> torch.Tensor:
    return log_probs(model, prompt, draw).gather(1, torch.tensor(draw.ids, device=model.device).unsqueeze(1))


def largest_difference(model, request: Request, drawn: list[Draw]) -> float:
    """Return by how much vLLM's and transformers' mean log-probability of a sample differ, in nats a token."""
    return max(
        abs(draw.neg_log_prob + taken(model, prompt, draw).mean().item())
        for prompt, draw in zip(request.prompt_of_each_sample, drawn, strict=True)
    )


def checks(model, tokenizer, engine: SyncedVLLM, cold_engine: SyncedVLLM | None, accelerator) -> Iterator[tuple]:
    """Yield (name, whether it holds, the number behind it) of each check; change the model's weights."""
    request = request_of(model, tokenizer, accelerator)
    base = {name: value.clone() for name, value in model.named_parameters()}
    drawn = engine.draw(request)
    found = largest_difference(model, request, drawn)
    yield "log-probabilities of the samples", found <= LOG_PROB_TOLERANCE, f"off by {found:.3f} nats at most"
    if cold_engine is not None:
        cold = request_of(model, tokenizer, accelerator, temperature=COLD)
        gap = furthest_from_the_top(model, cold, cold_engine.draw(cold))
        yield "tokens at temperature 0.01", gap <= TIE_TOLERANCE, f"{gap:.3f} nats below the most likely at most"
    again = engine.draw(request)
    yield "the same seed draws the same", [d.ids for d in again] == [d.ids for d in drawn], ""
    other = engine.draw(request_of(model, tokenizer, accelerator, seed=1))
    yield "another seed draws others", [d.ids for d in other] != [d.ids for d in drawn], ""
    different = [
        len({tuple(d.ids) for d in drawn[start : start + SAMPLES]}) for start in range(0, len(drawn), SAMPLES)
    ]
    yield "samples of a prompt differ", min(different) > 1, f"{different} of {SAMPLES}"
    changed = [name for name, value in model.named_parameters() if not torch.equal(value, base[name])]
    yield "drawing leaves the weights as they were", not changed, ", ".join(changed[:3])
    change(model)
    stale = largest_difference(model, request, drawn)
    found = largest_difference(model, request, engine.draw(request))
    yield "changed weights arrive", found <= LOG_PROB_TOLERANCE < stale, f"off by {found:.3f}, before by {stale:.3f}"


def furthest_from_the_top(model, request: Request, drawn: list[Draw]) -> float:
    """Return by how many nats the drawn tokens stay below the most likely ones at most."""
    gaps = []
    for prompt, draw in zip(request.prompt_of_each_sample, drawn, strict=True):
        scores = log_probs(model, prompt, draw)
        ids = torch.tensor(draw.ids, device=scores.device).unsqueeze(1)
        gaps.append((scores.amax(1) - scores.gather(1, ids).squeeze(1)).max().item())
    return max(gaps)


def change(model) -> None:
    """Change the trained weights as a training would, only more; with an adapter those of the adapter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * parameter.std().nan_to_num(0.0) * 0.5)


def build(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(recipes_dir() / "skills-tiny" / "base")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def adapted(model):
    """Put an adapter that does something on the model: PEFT initializes its second half with zeros."""
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


def missing() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    return None if is_vllm_available() else "vLLM is not installed: pip install '.[vllm]'"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("full", "adapter"), default="full")
    parser.add_argument("--model", help="a folder or a name on the hub; default: a tiny untrained one")
    args = parser.parse_args()
    if (reason := missing()) is not None:
        print(f"check_vllm: SKIP: {reason}; nothing was checked")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            build(folder)
        accelerator = Accelerator()
        path = args.model or folder
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(accelerator.device).eval()
        add_fused_head(model)
        model = adapted(model).eval() if args.kind == "adapter" else model
        # A second engine would want the GPU's state that the first one has: the temperature is the engine's alone
        engine = SyncedVLLM("vllm_colocate", VLLMSettings(), rescore_batch_size=4)
        return report(args.kind, checks(model, AutoTokenizer.from_pretrained(path), engine, Cold(engine), accelerator))


class Cold:
    """Draws with the same engine at another temperature."""

    def __init__(self, engine: SyncedVLLM):
        self.engine = engine

    def draw(self, request: Request) -> list[Draw]:
        generation = self.engine.generation
        before, generation.temperature = generation.temperature, request.settings.temperature
        try:
            return self.engine.draw(request)
        finally:
            generation.temperature = before


def report(kind: str, results: Iterator[tuple]) -> int:
    failed = 0
    with preserved_random_state():
        for what, holds, number in results:
            failed += not holds
            print(
                f"check_vllm: {kind}: {'ok' if holds else 'WRONG'}: {what}{f' ({number})' if number else ''}",
                flush=True,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
