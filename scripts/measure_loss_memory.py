"""Peak memory of one AESL loss and its backward pass beyond the model, per trained token and vocabulary entry.

    python scripts/measure_loss_memory.py [--tokens 2048] [--vocab 32768]

Runs the scoring of `cold_start_loss: aesl` and of TRL's fused nll on a one-layer model of width 64 in float32 on CPU,
each in a fresh process, and takes the rise of the peak resident memory over the one of a forward pass without a head.
With that factor the longest micro-batch that fits is `free bytes / (factor * vocabulary)`.
"""

import argparse
import resource
import subprocess
import sys


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(loss: str, tokens: int, vocab: int) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from aesl_trl.head import score_aesl, score_nll

    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    ids = torch.randint(vocab, (1, tokens + 1))
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    model.model(input_ids=ids).last_hidden_state.sum().backward()
    before = peak_gib()
    if loss == "aesl":
        scores = score_aesl(model, inputs, t_scaling=3.0, min_temperature=1e-2, prefix_mode="inclusive")
    else:
        scores = score_nll(model, inputs)
    (scores.weights * scores.log_probs).sum().backward()
    print(peak_gib() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--loss", choices=["aesl", "nll"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loss:
        measure(args.loss, args.tokens, args.vocab)
        return
    print(f"{'loss':<6} {'peak GiB':>9} {'bytes per token and vocabulary entry':>38}")
    for loss in ("nll", "aesl"):
        command = [sys.executable, __file__, "--loss", loss, "--tokens", str(args.tokens), "--vocab", str(args.vocab)]
        gib = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{loss:<6} {gib:>9.2f} {gib * 2**30 / (args.tokens * args.vocab):>38.1f}")


if __name__ == "__main__":
    main()
