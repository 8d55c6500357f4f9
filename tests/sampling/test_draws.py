"""Which errors are about memory, and the seeds of the pieces of a draw."""

import pytest
import torch

from aesl_trl.sampling.draws import draw_seed, is_out_of_memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (ConnectionError("no server"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_seeds_differ_and_do_not_neighbour():
    """vLLM adds 0 .. n - 1 to a request's seed: no two requests may come that close."""
    seeds = [draw_seed(0, problem, chunk) for problem in range(500) for chunk in range(4)]
    assert len(set(seeds)) == 2000 and all(0 <= seed < 2**32 for seed in seeds)
    ordered = sorted(seeds)
    assert sum(after - before < 64 for before, after in zip(ordered, ordered[1:], strict=False)) < 5
    assert draw_seed(7, 0, 0) == 7 and draw_seed(7, 1, 0) == draw_seed(7, 1, 0) != draw_seed(8, 1, 0)
