"""FSDP2 and ZeRO-3 on two processes against one, over gloo on the CPU: the fused head gathers its weight where it is
sharded, and the gradient finds its way back to every shard."""

from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest
import sharded_script
import torch
from safetensors.torch import load_file
from sharded_script import RUNS
from small_runs import assert_close_by_name
from tiny_models import build_model, build_tokenizer
from two_processes import results_of_two

from aesl_trl import files
from aesl_trl.diversity.intervals import bootstrap_interval


FSDP = ("root", "root-tied", "auto", "auto-tied", "own", "own-nll", "own-psft", "own-accumulated")
FSDP += ("own-without-average", "auto-measured")
FSDP_MORE = ("root-nll", "root-psft", "root-tied-accumulated", "auto-accumulated", "auto-tied-accumulated")
ZERO = ("zero", "zero-nll", "zero-psft", "zero-tied", "zero-accumulated", "zero-tied-accumulated", "zero-measured")
NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="ZeRO-3 needs deepspeed")
# (fixture that launches it, name)
EVERY_RUN = [
    *(pytest.param("fsdp", name, id=name) for name in FSDP if RUNS[name].get("average", True)),
    *(pytest.param("fsdp_more", name, id=name, marks=pytest.mark.slow) for name in FSDP_MORE),
    *(pytest.param("zero", name, id=name, marks=NEEDS_DEEPSPEED) for name in ZERO),
]


def launch(folder, names):
    """Results of both ranks by the names of the runs, and each run's folder."""
    ranks = results_of_two(sharded_script, folder, *names)
    return [{name: {**run, "folder": folder / name} for name, run in rank.items()} for rank in ranks]


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("fsdp"), FSDP)


@pytest.fixture(scope="module")
def fsdp_more(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("fsdp-more"), FSDP_MORE)


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("zero"), ZERO)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """By a run's name the same training in one process and in one piece: neither sharded nor accumulated."""

    @cache
    def trained(**settings):
        folder = tmp_path_factory.mktemp("one")
        return {**sharded_script.train(folder, **settings), "folder": folder}

    def train_whole(name):
        return trained(**{key: value for key, value in RUNS[name].items() if key in ("tied", "loss", "measured")})

    return train_whole


@pytest.fixture
def ranks(group, name, request):
    """What each rank holds at the end of the run."""
    return [results[name] for results in request.getfixturevalue(group)]


@pytest.mark.parametrize("group, name", EVERY_RUN)
def test_two_processes_train_as_one(name, ranks, one):
    """1e-6: sums in float32 and in another order, of losses near 5; the weights move by more than 1e-2."""
    (found, other), expected = ranks, one(name)
    assert_close_by_name(found["weights"], expected["weights"], rtol=0, atol=1e-6)
    for key in ("loss", "nll", "weight_mean", "temperature_mean", "eval_nll"):
        assert found[key] == pytest.approx(expected[key], rel=0, abs=1e-6), key
        assert found[key] == other[key], key
    assert all(torch.equal(found["weights"][key], weight) for key, weight in other["weights"].items())


@pytest.mark.parametrize("group, name", EVERY_RUN)
def test_model_is_sharded(group, ranks):
    for run in ranks:
        assert run["num_processes"] == 2
        assert run["distributed_type"] == ("DEEPSPEED" if group == "zero" else "FSDP")
        assert all(run["sharded"]) and len(run["sharded"]) > 20


@pytest.mark.parametrize("group, name", EVERY_RUN)
def test_head_is_found_where_it_was_put(name, ranks):
    """When its scores are computed. ZeRO-3 finds it on the way and from the second step on gathers it before."""
    expected = {"root": {"whole"}, "auto": {"whole"}, "own": {"sharded"}, "zero": {"sharded", "whole"}}
    assert [run["heads"] for run in ranks] == [expected[RUNS[name]["sharding"]]] * 2


@pytest.mark.parametrize(
    "group, name",
    [
        pytest.param("fsdp", "auto-measured", id="auto-measured"),
        pytest.param("zero", "zero-measured", id="zero-measured", marks=NEEDS_DEEPSPEED),
    ],
)
def test_a_sharded_model_is_measured_and_selected_as_one(name, ranks, one):
    """The ranks hold the same figures, within the one process's intervals: the draw depends on the rank's prompts."""
    (found, other), expected = ranks, one(name)
    for key in ("diversity/own_entropy", "diversity/self_bleu", "diversity/pass@1"):
        assert found[key] == other[key] and len(found[key]) == 3, key
    series = files.read_jsonl(found["folder"] / files.OWN / files.DIVERSITY)
    assert [row["entropy"] for row in series] == found["diversity/own_entropy"]
    for row in series:
        samples = files.read_jsonl(expected["folder"] / files.OWN / files.SAMPLES / f"step-{row['step']}.jsonl")
        assert len(samples) == row["num_prompts"] == 8
        for key, values in by_prompt(samples).items():
            low, high = bootstrap_interval(values, level=0.99)
            assert low <= row[key] <= high, (row["step"], key)
    selection = files.read_json(found["folder"] / files.OWN / files.SELECTION)
    best = max((row for row in series if row["step"]), key=lambda row: row["pass@1"])
    assert (selection["applied"], selection["step"]) == ("best_eval", best["step"])
    chosen = load_file(found["folder"] / files.OWN / selection["path"] / "model.safetensors")
    assert all(len(tensor) for tensor in chosen.values()) and len(chosen) > 20
    if best["step"] == 4:
        assert_close_by_name(chosen, {name: found["weights"][name] for name in chosen}, rtol=0, atol=0)


def by_prompt(samples):
    return {
        "entropy": [np.average(group["entropy"], weights=group["num_tokens"]) for group in samples],
        "pass@1": [np.mean(group["rewards"]) for group in samples],
    }


def test_runs_are_worth_comparing(one):
    """The weights move, and AESL trains another model than plain nll."""
    aesl, nll, start = one("own"), one("own-nll"), build_model(build_tokenizer(), tie_word_embeddings=False)
    head = "lm_head.weight"
    assert (aesl["weights"][head] - start.lm_head.weight).abs().max() > 1e-2
    assert (aesl["weights"][head] - nll["weights"][head]).abs().max() > 1e-2
    assert min(aesl["weight_mean"]) < 0.9


def test_head_of_its_own_needs_the_average(fsdp, one):
    """Without it each shard gets its own rank's gradient alone."""
    found, expected = fsdp[0]["own-without-average"], one("own-without-average")
    assert found["heads"] == {"sharded"}
    assert (found["weights"]["lm_head.weight"] - expected["weights"]["lm_head.weight"]).abs().max() > 1e-2
