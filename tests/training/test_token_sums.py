"""TokenSums: the figures of a batch by hand, and sums that add up over batches, ranks and a vector."""

from types import SimpleNamespace

import pytest
import torch

from aesl_trl.losses.scoring import TokenScores
from aesl_trl.training.token_sums import POSITION_BINS, TokenSums


EOS = 9


def scores(log_probs, weights, mask, temperatures=None):
    """Two sequences; their last token is the end token."""
    mask = torch.tensor(mask, dtype=torch.bool)
    labels = torch.where(mask, 1, -100)
    labels[:, -1] = EOS
    values = [torch.tensor(value, dtype=torch.float32) * mask for value in (log_probs, weights)]
    return TokenScores(
        log_probs=values[0],
        label_mask=mask,
        entropy=0.5 * mask,
        is_top1=mask.clone(),
        weights=values[1],
        temperatures=None if temperatures is None else torch.tensor(temperatures) * mask,
        labels=labels,
        sequence_ids=None,
    )


@pytest.fixture
def batch():
    return scores(
        [[-1.0, -2.0, -4.0], [0.0, -1.0, -2.0]],
        [[0.5, 0.05, 1.0], [0.0, 0.25, 0.5]],
        [[1, 1, 1], [0, 1, 1]],
        [[2.0, 2.0, 2.0], [0.0, 4.0, 5.0]],
    )


def test_figures_by_hand(batch):
    figures = TokenSums.of_batch(batch, [EOS]).figures(with_temperature=True)
    assert figures == {
        "nll": pytest.approx(10 / 5),
        "weight_mean": pytest.approx(2.3 / 5),
        "weight_low_share": pytest.approx(1 / 5),
        "temperature_mean": pytest.approx(15 / 5),
        "weight_effective": pytest.approx((0.5 * 1 + 0.05 * 2 + 1 * 4 + 0.25 * 1 + 0.5 * 2) / 10),
        # prefix means 1, 3/2, 7/3 and 1, 3/2
        "nll_learnt": pytest.approx((1 * 1 + 2 * 3 / 2 + 4 * 7 / 3 + 1 * 1 + 2 * 3 / 2) / 10),
        "weight_eos": pytest.approx(0.75),
        "prob_eos": pytest.approx((torch.tensor(-4.0).exp().item() + torch.tensor(-2.0).exp().item()) / 2),
    }
    assert "temperature_mean" not in TokenSums.of_batch(batch, [EOS]).figures(with_temperature=False)


def test_positions_by_hand(batch):
    """Positions count the trained tokens of a sequence; bin 2 holds positions 3 and 4."""
    row = TokenSums.of_batch(batch, [EOS]).by_position(with_temperature=True)
    assert row["position"] == [1, 2, 4] and row["count"] == [2, 2, 1]
    assert row["weight"] == pytest.approx([(0.5 + 0.25) / 2, (0.05 + 0.5) / 2, 1.0])
    assert row["temperature"] == pytest.approx([3.0, 3.5, 2.0])
    assert TokenSums.of_batch(batch, [EOS]).by_position(with_temperature=False)["temperature"] == [None] * 3


def test_a_batch_without_trained_tokens_has_no_figures():
    empty = TokenSums.of_batch(scores([[0.0, 0.0]], [[0.0, 0.0]], [[0, 0]]), [EOS])
    assert empty.figures(with_temperature=True) == {}
    assert empty.by_position(with_temperature=True) == {"position": [], "weight": [], "temperature": [], "count": []}


def test_batches_and_ranks_add_up(batch):
    sums = TokenSums.of_batch(batch, [EOS])
    both = SimpleNamespace(gather=lambda vector: torch.cat([vector, vector]))
    for twice in (sums + sums, sums.over_ranks(both)):
        assert torch.equal(twice.to_vector(), 2 * sums.to_vector())
        assert twice.figures(True) == sums.figures(True)


def test_a_vector_keeps_every_sum(batch):
    sums = TokenSums.of_batch(batch, [EOS])
    vector = sums.to_vector()
    assert vector.dtype == torch.float64 and len(vector) == 12 + 3 * POSITION_BINS
    assert all(torch.equal(value, vars(sums)[name]) for name, value in vars(TokenSums.of_vector(vector)).items())


def test_a_vector_of_an_older_version_lacks_the_newer_figures(batch):
    """It goes on adding up, through JSON's null as well (resuming.py)."""
    sums = TokenSums.of_batch(batch, [EOS])
    vector = sums.to_vector()
    older = TokenSums.of_vector(torch.cat([vector[:10], vector[12:]]))
    figures = (older + sums).figures(True)
    assert figures == {name: value for name, value in sums.figures(True).items() if name in figures}
    assert sums.figures(True).keys() - figures.keys() == {"weight_effective", "nll_learnt"}
