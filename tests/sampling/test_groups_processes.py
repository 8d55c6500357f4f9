"""Sampling on two processes over gloo on the CPU: rows and decisions are the same on both, also when one fails, and
the training is what it is without. FSDP2 and ZeRO-3 are sharded for real, vLLM is the stand-in of vllm_stand_in.py.

The three prompts leave one process with half the work: one that waited for the other in a collective would hang.
"""

from importlib.util import find_spec

import pytest
import sampling_script
import torch
from accelerate import PartialState
from two_processes import results_of_two

from aesl_trl import files


NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="ZeRO-3 needs deepspeed")
DDP = ("plain", "measured", "one-at-a-time", "memory", "gap", "turned")
VLLM = ("server", "server-gone", "server-start", "colocate-start", "colocate-sync", "colocate-generate")
FSDP = ("fsdp-plain", "fsdp", "fsdp-memory", "fsdp-colocate", "fsdp-scored")
ZERO = ("zero-plain", "zero", "zero-memory", "zero-colocate")


def launch(folder, names):
    ranks = results_of_two(sampling_script, folder, *names)
    for name in names:
        for run in (ranks[0][name], ranks[1][name]):
            assert run["num_processes"] == 2
        _assert_same_on_both(ranks[0][name], ranks[1][name])
    return folder, ranks


def _assert_same_on_both(first, second):
    """Rows with times and all: the first process's are broadcast."""
    for key in ("series", "step", "batch_size", "loss", "distributed_type"):
        assert first[key] == second[key], key
    assert all(torch.equal(weight, second["weights"][name]) for name, weight in first["weights"].items())


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("ddp"), DDP)


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("vllm"), VLLM)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("fsdp"), FSDP)


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("zero"), ZERO)


CLOCK = ("seconds", "time_share")


def figures(rows, *without):
    return [{key: value for key, value in row.items() if key not in (*CLOCK, *without)} for row in rows]


def samples(folder, step):
    return files.read_jsonl(folder / files.OWN / files.SAMPLES / f"step-{step}.jsonl")


# ---- Data parallel


def test_rows_are_those_of_the_file(ddp):
    folder, (first, _) = ddp
    assert first["measured"]["series"] == files.read_jsonl(folder / "measured" / files.OWN / files.DIVERSITY)
    assert [row["step"] for row in first["measured"]["series"]] == [0, 1, 2]


@pytest.mark.parametrize("name", ["measured", "memory", "gap"])
def test_training_is_bit_equal_with_and_without(name, ddp):
    plain, measured = ddp[1][0]["plain"], ddp[1][0][name]
    assert plain["loss"] == measured["loss"]
    assert all(torch.equal(weight, measured["weights"][key]) for key, weight in plain["weights"].items())


def test_out_of_memory_on_one_process_makes_the_batch_smaller_on_both(ddp):
    folder, ranks = ddp
    assert [run["memory"]["batch_size"] for run in ranks] == [1, 1]
    found, expected = (ranks[0][name]["series"] for name in ("memory", "one-at-a-time"))
    assert figures(found) == figures(expected)
    assert samples(folder / "memory", 1) == samples(folder / "one-at-a-time", 1)


def test_an_error_on_one_process_is_a_gap_on_both(ddp):
    folder, ranks = ddp
    for run in ranks:
        assert [row.get("gap") for row in run["gap"]["series"]] == [None, "ConnectionError: gone (rank 1)", None]
        assert run["gap"]["step"] == 2
    whole, broken = (ranks[0][name]["series"] for name in ("measured", "gap"))
    assert figures(whole)[0::2] == figures(broken)[0::2]
    assert not (folder / "gap" / files.OWN / files.SAMPLES / "step-1.jsonl").exists()


def test_both_stop_at_the_same_turning_point(ddp):
    assert [run["turned"]["step"] for run in ddp[1]] == [7, 7]  # patience 3 after the peak at 4


# ---- vLLM


@pytest.mark.slow
def test_a_server_answers_for_all_processes(vllm, tmp_path):
    """The seeds are of the prompts, so that one process gets the same samples from the same weights."""
    folder, ranks = vllm
    assert "generate" in ranks[0]["server"]["events"] and "generate" not in ranks[1]["server"]["events"]
    assert PartialState().num_processes == 1
    sampling_script.train(tmp_path, 0, **sampling_script.RUNS["server"])
    found, expected = samples(folder / "server", 0), samples(tmp_path, 0)
    assert [row["prompt"] for row in found] == sampling_script.PROMPTS
    assert [row["completions"] for row in found] == [row["completions"] for row in expected]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in VLLM if name != "server"])
def test_an_engine_that_fails_on_one_process_is_a_gap_on_both(name, vllm):
    for run in vllm[1]:
        rows = run[name]["series"]
        assert len(rows) == 3 and all("ConnectionError: gone (rank" in row["gap"] for row in rows)
        assert all(row["entropy"] is None for row in rows) and run[name]["step"] == 2


# ---- Sharded


SHARDED = [
    pytest.param("fsdp", id="fsdp", marks=pytest.mark.slow),
    pytest.param("zero", id="zero", marks=[pytest.mark.slow, NEEDS_DEEPSPEED]),
]


@pytest.fixture
def sharded(kind, request):
    return request.getfixturevalue(kind)


@pytest.mark.parametrize("kind", SHARDED)
def test_model_is_sharded_and_trained_as_without(kind, sharded):
    first = sharded[1][0]
    plain = first[f"{kind}-plain"]
    for name in (kind, f"{kind}-memory", f"{kind}-colocate"):
        assert first[name]["distributed_type"] == {"fsdp": "FSDP", "zero": "DEEPSPEED"}[kind]
        assert first[name]["loss"] == plain["loss"]
        assert all(torch.equal(weight, first[name]["weights"][key]) for key, weight in plain["weights"].items())


@pytest.mark.parametrize("kind", SHARDED)
def test_sharded_samples_are_those_of_the_whole_model(kind, sharded, ddp):
    """1e-6: weights of float32 that were gathered, not rounded."""
    for step in (0, 2):
        for found, expected in zip(samples(sharded[0] / kind, step), samples(ddp[0] / "measured", step), strict=True):
            assert found["completions"] == expected["completions"]
            assert found["entropy"] == pytest.approx(expected["entropy"], abs=1e-6 if step == 0 else 1e-4)


@pytest.mark.parametrize("kind", SHARDED)
def test_out_of_memory_on_one_process_of_a_sharded_model(kind, sharded, ddp):
    assert [run[f"{kind}-memory"]["batch_size"] for run in sharded[1]] == [1, 1]
    found, expected = samples(sharded[0] / f"{kind}-memory", 0), samples(ddp[0] / "one-at-a-time", 0)
    assert [row["completions"] for row in found] == [row["completions"] for row in expected]


@pytest.mark.parametrize("kind", SHARDED)
def test_trl_gathers_sharded_weights_for_vllm(kind, sharded):
    """And the samples, of another temperature than 1, are scored through the sharded model."""
    for run in sharded[1]:
        rows = run[f"{kind}-colocate"]["series"]
        assert [row.get("gap") for row in rows] == [None] * 3
        assert all(row["entropy_estimator"] == "exact" and 0 < row["entropy"] < 6 for row in rows)
        assert run[f"{kind}-colocate"]["events"].count("load") > 60  # each of its parameters, three times
