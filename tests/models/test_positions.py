"""Which models have a limit of positions, read off their config alone."""

import pytest
from refusals import refused
from transformers import AutoConfig

from aesl_trl.models.positions import check_room, num_positions_at


SIZES = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("kind", "limit"),
    [("opt", 64), ("gpt2", 64), ("gptj", 64), ("qwen2", None), ("gpt_neox", None), ("bloom", None), ("xglm", None)],
)
def test_only_tables_of_positions_are_a_limit(tmp_path, kind, limit):
    """OPT's table has two rows more, GPT-J's is a buffer; XGLM's grows, and rotary positions are computed."""
    rotary = {"rotary_dim": 8} if kind == "gptj" else {}
    positions = {} if kind == "bloom" else {"max_position_embeddings": 64}
    AutoConfig.for_model(kind, **SIZES, **rotary, **positions).save_pretrained(tmp_path)
    assert num_positions_at(str(tmp_path)) == limit


def test_the_longest_prompt_needs_room_for_its_answer():
    check_room(64, [[1] * 4, [1] * 14], 50, field="rows", setting="max_new_tokens")
    parts = ["rows: the prompt of row 1 (from 0) has 14 tokens", "max_new_tokens=51", "64 positions", "to 50 or less"]
    refused(parts, check_room, 64, [[1] * 4, [1] * 14], 51, field="rows", setting="max_new_tokens")
    refused(["take longer prompts out"], check_room, 8, [[1] * 14], 1, field="rows", setting="max_new_tokens")
