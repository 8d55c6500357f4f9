"""Build a model of a recipe's real shape with random weights, where its trained weights cannot be had.

    python scripts/build_random_model.py FOLDER [--recipe Qwen2.5-1.5B-Instruct] [--small]

Time and memory depend on shapes alone, so that the folder serves for measuring both. The shape is that of the recipe's
model_config.json; the tokenizer has a word of letters for each entry of the vocabulary. Such a model ends a sample by
chance alone: its samples are as long as they may be. `--small` shrinks the shape for a CPU. A folder that is there
stays as it is.
"""

import argparse
from itertools import chain, islice, product
from pathlib import Path
from string import ascii_lowercase

import torch
from tiny_bases import ASSISTANT, END, PAD, SPACE, SPECIAL, USER, word_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from aesl_trl.estimates.facts import MODEL_CONFIG
from aesl_trl.files import read_json, swapped
from aesl_trl.recipes.recipes import recipes_dir


CHAT_TEMPLATE = (
    f"{{% for message in messages %}}{{% if message.role == 'assistant' %}}{ASSISTANT}{{% generation %}}"
    f"{{{{ message.content }}}}{END}{{% endgeneration %}}{{% else %}}{USER}{{{{ message.content }}}}{END}{{% endif %}}"
    f"{{% endfor %}}{{% if add_generation_prompt %}}{ASSISTANT}{{% endif %}}"
)
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 600,
}


def words(count: int) -> list[str]:
    """Return the first `count` words of one letter, two letters and so on, each with a space before it."""
    letters = chain.from_iterable(product(ascii_lowercase, repeat=length) for length in (1, 2, 3, 4))
    return [SPACE + "".join(word) for word in islice(letters, count)]


def build(folder: Path, recipe: str, small: bool) -> None:
    """Write model and tokenizer, on a GPU where there is one."""
    shape = {**read_json(recipes_dir() / recipe / MODEL_CONFIG)["config"], **(SMALL if small else {})}
    num_words = shape["vocab_size"] - 256 - len(SPECIAL)
    tokenizer = word_tokenizer(words(num_words), CHAT_TEMPLATE, shape["max_position_embeddings"])
    ids = {"eos_token_id": tokenizer.convert_tokens_to_ids(END), "pad_token_id": tokenizer.convert_tokens_to_ids(PAD)}
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = AutoConfig.for_model(**{**shape, **ids, "bos_token_id": None})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if small else torch.bfloat16)
    model.generation_config = GenerationConfig(**ids, do_sample=True)
    with swapped(folder) as place:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", default="Qwen2.5-1.5B-Instruct")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    if (args.folder / "config.json").is_file():
        print(f"{args.folder} is there")
        return
    build(args.folder, args.recipe, args.small)
    print(f"{args.folder}: {args.recipe}{', shrunk' if args.small else ''}, random weights")


if __name__ == "__main__":
    main()
