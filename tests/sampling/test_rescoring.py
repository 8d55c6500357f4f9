"""Scoring samples afterwards gives the figures that generating records."""

import pytest
from small_draws import KeepingEngine, draw, stopping_model

from aesl_trl.losses.scoring import add_fused_head
from aesl_trl.sampling.draws import Draw
from aesl_trl.sampling.rescoring import rescore


def test_scoring_gives_what_generating_records(tokenizer):
    """The fused head on right-padded rows against left-padded decoding."""
    model, engine = stopping_model(tokenizer), KeepingEngine(64)
    draw(model, tokenizer, engine)
    add_fused_head(model)
    blank = [Draw(sample.ids, sample.stopped, None, None, None) for sample in engine.drawn]
    scored = rescore(model, engine.prompts, blank, batch_size=5, num_batches=4, pad_id=0, device="cpu")
    assert len(scored) == len(blank) == 12
    for found, expected in zip(scored, engine.drawn, strict=True):
        assert found[:2] == expected[:2]
        assert found.entropy == pytest.approx(expected.entropy, abs=1e-5)
        assert found.neg_log_prob == pytest.approx(expected.neg_log_prob, abs=1e-5)
        if found.stopped:  # of the one token that it ended with, where generating knows all of them
            assert 0 < found.eos_prob < expected.eos_prob
        else:
            assert found.eos_prob is None
