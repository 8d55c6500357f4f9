"""Two processes against one, over gloo on the CPU: the same weights, figures, samples and files."""

import pytest
import torch
import torchrun_script
from small_runs import assert_close_by_name
from transformers import AutoModelForCausalLM
from two_processes import results_of_two

from aesl_trl import files


def launch(folder):
    ranks = results_of_two(torchrun_script, folder, ACCELERATE_USE_CPU="true")
    assert files.read_json(folder / "rank-0.json")["num_processes"] == 2
    return ranks


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of both ranks and of one process."""
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    first, second = launch(two)
    return {"rank0": first, "rank1": second, "one": torchrun_script.run_all(one, 1), "two_dir": two, "one_dir": one}


KINDS = ("aesl", "nll", "psft", "gem", "accumulated", "packed", "auto", "measured")


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(kind, runs):
    two, one = runs["rank0"][kind], runs["one"][kind]
    assert two["num_processes"] == 2 and one["num_processes"] == 1
    assert_close_by_name(two["weights"], one["weights"], rtol=0, atol=1e-6)
    for key in ("loss", "nll", "weight_mean", "temperature_mean", "num_tokens", "weight_effective", "nll_learnt"):
        assert two[key] == pytest.approx(one[key], abs=1e-5), key


@pytest.mark.parametrize("kind", KINDS)
def test_both_ranks_hold_the_same(kind, runs):
    first, second = runs["rank0"][kind], runs["rank1"][kind]
    assert all(torch.equal(first["weights"][name], weight) for name, weight in second["weights"].items())
    for key in first.keys() - {"weights"}:
        assert first[key] == second[key], key


def test_t_scaling_auto_is_found_over_both_processes(runs):
    """Both ranks hold the same value, by the test above; that of one process differs by the order of the sums."""
    (two,), (one,) = (runs[name]["auto"]["t_scaling_found"] for name in ("rank0", "one"))
    assert two == pytest.approx(one, rel=1e-6) and 0.1 < one < 10
    assert files.read_settings(runs["two_dir"] / "auto")["t_scaling_found"] == two


@pytest.mark.parametrize("kind", ["aesl", "nll"])
def test_eval_nll_counts_no_row_twice(kind, runs):
    """Five rows for two processes: accelerate repeats one, and the longest row would weigh most."""
    assert runs["rank0"][kind]["eval_nll"] == pytest.approx(runs["one"][kind]["eval_nll"], abs=1e-5)


def test_measurement_under_two_processes(runs):
    """Drawn by prompt across the ranks, gathered in the prompts' order, written once."""
    folder = runs["two_dir"] / "measured"
    rows = files.read_jsonl(folder / files.OWN / files.DIVERSITY)
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert runs["rank1"]["measured"]["diversity/own_entropy"] == [row["entropy"] for row in rows]
    assert runs["rank1"]["measured"]["diversity/pass@1"] == [row["pass@1"] for row in rows]
    for step in (0, 2, 4):
        samples = files.read_jsonl(folder / files.OWN / files.SAMPLES / f"step-{step}.jsonl")
        assert [sample["prompt"] for sample in samples] == ["2+3=", "abc", "Name a colour: "]
        assert all(len(sample["completions"]) == 3 for sample in samples)
        assert samples[0]["completions"] != samples[1]["completions"]  # a seed for each rank


def test_measuring_does_not_change_the_training(runs):
    plain, measured = runs["rank0"]["aesl"], runs["rank0"]["measured"]
    assert all(torch.equal(plain["weights"][name], weight) for name, weight in measured["weights"].items())
    assert plain["loss"] == measured["loss"]


def test_selected_weights_under_two_processes(runs):
    folder = runs["two_dir"] / "measured"
    assert files.read_json(folder / files.OWN / files.SELECTION)["step"] == 4
    loaded = AutoModelForCausalLM.from_pretrained(folder / files.OWN / files.SELECTED)
    weights = runs["rank0"]["measured"]["weights"]
    assert all(torch.equal(weights[name], weight) for name, weight in loaded.named_parameters())
    assert files.read_json(folder / files.OWN / files.RUN)["num_processes"] == 2


def test_positions_are_summed_over_processes(runs):
    counts = [
        [line["count"] for line in files.read_jsonl(runs[name] / "aesl" / files.OWN / files.POSITIONS)]
        for name in ("two_dir", "one_dir")
    ]
    assert counts[0] == counts[1] and len(counts[0]) == 4
