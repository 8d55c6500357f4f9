"""Parts that the builders of small base models share: a tokenizer of whole words, a Qwen2 model, the training."""

from collections.abc import Iterator

import torch
from tokenizers import AddedToken, pre_tokenizers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer


SPECIAL = PAD, USER, ASSISTANT, END = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"
SPACE = "\u0120"  # how byte-level tokenizers write it
LEARNING_RATE = 2e-3


def word_tokenizer(words: list[str], chat_template: str, max_length: int) -> Qwen2Tokenizer:
    """Build a byte-level Qwen2 tokenizer whose merges spell `words`, each as one token, in the given order.

    AutoTokenizer loads a Qwen2 folder with the Qwen2 splitting rule whatever its tokenizer.json says, so the words
    have to suit it, and no word's merge may break up a later one.
    """
    merges = list(dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word))))
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        unk_token=PAD,
        pad_token=PAD,
        eos_token=END,
        chat_template=chat_template,
        model_max_length=max_length,
        padding_side="left",
    )
    tokenizer.add_tokens([AddedToken(token, special=True) for token in (USER, ASSISTANT)])
    return tokenizer


def untrained_model(tokenizer: Qwen2Tokenizer, seed: int, **sizes: int) -> Qwen2ForCausalLM:
    """Build an untrained model; `sizes` are Qwen2Config's hidden_size, num_hidden_layers and so on."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        num_key_value_heads=sizes["num_attention_heads"],
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    return model


def train(model, batches: Iterator[tuple], *, steps: int, warmup: int, decay: int) -> float:
    """Train with AdamW at 2e-3, and return the last step's loss in nats per token.

    `batches` yields `(ids [rows, length], labels [rows, length])`. The rate rises over `warmup` steps and falls over
    the last `decay` steps, both linearly. It stays high nearly to the end: a base annealed to a sharp minimum loses
    its skills to the first steps of SFT or RL.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    model.train()
    for step, (ids, labels) in zip(range(steps), batches, strict=False):
        rate = LEARNING_RATE * min((step + 1) / (warmup + 1), (steps - step) / (decay + 1), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}", flush=True)
    return loss.item()
