"""Compare the tokens a second of our samples with those of a bare `model.generate`, and of vLLM where it runs.

    python scripts/bench/sampling.py [--model FOLDER] [--rows train.jsonl] [--prompts 8] [--samples 4] [--json FILE]

Ours is `sample_groups` with the engine of diversity monitoring: it keeps the exact entropy, the log-probability and
the end probability of every token, and decodes the texts. The peer is transformers' `generate` with the same settings
and seed, which keeps the tokens alone. Both must draw the same tokens, or there is no table. The methods take turns,
and a ratio is the median of the ratios within a turn. On CPU the time is this process's CPU time. vLLM, where there is
a GPU and vLLM is installed, loads the folder anew and draws other tokens from the same distribution.

The prompts are the `question` of `--rows` (GSM8K's JSONL), else random tokens.
"""

import argparse
import json
import time
from pathlib import Path

import record
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from aesl_trl.models.tokens import left_pad, row_prompt_ids, stop_ids
from aesl_trl.recipes.recipes import recipes_dir
from aesl_trl.sampling.backends import choose_engine
from aesl_trl.sampling.draws import Piece, SamplingSettings
from aesl_trl.sampling.groups import sample_groups
from aesl_trl.sampling.offline import OfflineVLLM


BARE, OURS, VLLM = "transformers' generate", "aesl_trl by generate", "aesl_trl by vLLM"
PROMPT_TOKENS = 32  # of a random prompt


def make_prompts(args: argparse.Namespace, tokenizer) -> list[dict]:
    """Return rows with a prompt each."""
    if args.rows:
        lines = args.rows.read_text(encoding="utf-8").splitlines()[: args.prompts]
        return [{"prompt": json.loads(line)["question"]} for line in lines]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, len(tokenizer), (args.prompts, PROMPT_TOKENS), generator=generator)
    return [{"prompt": tokenizer.decode(row)} for row in ids]


@torch.no_grad()
def bare(model, tokenizer, rows: list[dict], settings: SamplingSettings) -> list[list[int]]:
    """Return the sampled tokens of transformers' `generate`, ends included, prompt by prompt."""
    torch.manual_seed(settings.seed * 1_000_003)  # as our engine does on the first rank
    prompts = [ids for row in rows for ids in [row_prompt_ids(tokenizer, row, None)] * settings.num_samples]
    stops = stop_ids(tokenizer, model.generation_config.eos_token_id)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    config = GenerationConfig(
        do_sample=True,
        temperature=settings.temperature,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=stops,
        pad_token_id=pad,
    )
    drawn = []
    for first in range(0, len(prompts), settings.batch_size):
        input_ids, attention_mask = left_pad(prompts[first : first + settings.batch_size], pad, model.device)
        sequences = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config)
        drawn += [up_to_end(row, stops) for row in sequences[:, input_ids.size(1) :].tolist()]
    return drawn


def up_to_end(ids: list[int], stops: list[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return ids[: end + 1]


def ours(model, tokenizer, rows: list[dict], settings: SamplingSettings) -> list[list[int]]:
    return [ids for group in sample_groups(model, tokenizer, rows, settings) for ids in group.token_ids]


def clock() -> float:
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def bench(args: argparse.Namespace) -> dict:
    """Return the table of the ratios, and on GPU of the tokens a second."""
    on_gpu = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16 if on_gpu else torch.float32)
    model = model.to("cuda" if on_gpu else "cpu").eval()
    rows = make_prompts(args, tokenizer)
    settings = SamplingSettings(args.samples, 1.0, args.max_new_tokens, args.batch_size)
    methods = {
        BARE: lambda: bare(model, tokenizer, rows, settings),
        OURS: lambda: ours(model, tokenizer, rows, settings),
    }
    if methods[OURS]() != methods[BARE]():
        raise SystemExit("generate and aesl_trl draw other tokens: nothing is timed")
    engine, why = choose_engine("auto", Accelerator(cpu=not on_gpu))
    if engine == "vllm":
        served = OfflineVLLM(args.model, SamplingSettings(args.samples, 1.0, args.max_new_tokens))
        methods[VLLM] = lambda: vllms(served, rows, args.samples)
    rates = {name: [] for name in methods}
    for _ in range(args.repeats):
        for name, draw in methods.items():
            start = clock()
            tokens = sum(map(len, draw()))
            rates[name].append(tokens / (clock() - start))
    title = (
        f"Sampled tokens a second, {record.model_name(args.model)}, {args.prompts} prompts x {args.samples} samples x "
        f"at most {args.max_new_tokens} tokens, {args.batch_size} at once"
    )
    rates_columns = ["tokens a second"] if on_gpu else []
    rows = [
        [name, *[record.spread(own) for _ in rates_columns], record.ratio(own, rates[BARE])]
        for name, own in rates.items()
    ]
    if VLLM not in methods:
        rows.append([f"{VLLM}: {why}", *[None] * (1 + len(rates_columns))])
    columns = ["sampled by", *rates_columns, f"tokens a second to {BARE}"]
    return record.table(title, columns, rows, {"tokens_per_s": rates})


def vllms(served: OfflineVLLM, rows: list[dict], samples: int) -> list[range]:
    """Return for each sample a range as long as the sample: an engine in a folder keeps no token ids."""
    groups = served.sample(rows, Piece(0, len(rows), 0, samples))
    return [range(length) for group in groups for length in group.num_tokens]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(recipes_dir() / "skills-tiny" / "base"), help="folder of a model")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="JSONL with a column question; else random tokens")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=32, help="samples at once")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="record every rate")
    args = parser.parse_args()
    record.write(args.json, "sampling", [record.show(bench(args))])


if __name__ == "__main__":
    main()
