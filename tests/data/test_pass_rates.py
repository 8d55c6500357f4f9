"""pass_rates: rates from files, columns and samples; difficulties; sampling that goes on where it was cut off."""

import pytest
from small_problems import RATES, contents_of, openr1_rows, problems_in, write_rows

from aesl_trl.data import pass_rates
from aesl_trl.data.problems import problem_id
from aesl_trl.diversity.figures import Group
from aesl_trl.errors import InputError
from aesl_trl.files import read_json, read_jsonl
from aesl_trl.sampling import offline


def check_difficulties(out, size=20):
    pool = read_jsonl(out / f"sft_{size}.jsonl")
    assert all(row["pass_rate"] == RATES[row["prompt"][-1]["content"]] for row in pool)
    by_name = {
        "hard": [row for row in pool if row["pass_rate"] <= 0.25],
        "medium": [row for row in pool if row["pass_rate"] == 0.5],
        "easy": [row for row in pool if row["pass_rate"] >= 0.75],
    }
    for name, rows in by_name.items():
        assert rows and read_jsonl(out / f"sft_{name}.jsonl") == rows
    counts = {name: len(rows) for name, rows in by_name.items()} | {"unknown": 0}
    assert read_json(out / "data.json")["difficulty"] == counts


def test_difficulty_from_a_file(run, tmp_path):
    write_rows(tmp_path / "rates.jsonl", [{"problem": text, "pass_rate": rate} for text, rate in RATES.items()])
    check_difficulties(run(pass_rate_file="rates.jsonl", subsets=[20]))
    write_rows(tmp_path / "ids.jsonl", [{"id": problem_id(text), "pass_rate": rate} for text, rate in RATES.items()])
    check_difficulties(run(pass_rate_file="ids.jsonl", subsets=[20], output_dir="ids"))


def test_difficulty_from_a_column(run):
    rows = [row | {"rate": RATES[row["prompt"][1]["content"]]} for row in openr1_rows()]
    check_difficulties(run(rows, pass_rate_column="rate", subsets=[20]))


def test_difficulty_size_and_unknown_rates(run, tmp_path):
    known = list(RATES.items())[:50]
    write_rows(tmp_path / "rates.jsonl", [{"problem": text, "pass_rate": rate} for text, rate in known])
    out = run(pass_rate_file="rates.jsonl", subsets=[30], difficulty_size=2)
    assert [len(problems_in(out / f"sft_{name}.jsonl")) for name in ("hard", "medium", "easy")] == [2, 2, 2]
    assert sum(read_json(out / "data.json")["difficulty"].values()) == 30
    assert read_json(out / "data.json")["difficulty"]["unknown"] > 0


# ---- Sampled


REWARD = """
def starts_low(completions, solution, **kwargs):
    return [float(text[0]["content"][:1] < "a") for text in completions]
"""
SAMPLED = {
    "pass_rate_samples": 4,
    "max_new_tokens": 3,
    "use_cpu": True,
    "reward_funcs": ["own.py:starts_low"],
    "num_demonstrations": 10,
}


@pytest.fixture
def sampled(run, tmp_path, monkeypatch):
    """Runs with pass rates of the untrained model, three problems a chunk; also counts the problems it samples."""
    (tmp_path / "own.py").write_text(REWARD)
    monkeypatch.setitem(pass_rates.CHUNK, "transformers", 3)
    drawn, real = [], offline.sample_groups

    def counting(model, tokenizer, rows, *args, **kwargs):
        drawn.append(len(rows))
        if counting.fails_after == len(drawn):
            raise KeyboardInterrupt
        return real(model, tokenizer, rows, *args, **kwargs)

    counting.fails_after = None
    monkeypatch.setattr(offline, "sample_groups", counting)

    def call(*flags, **settings):
        drawn.clear()
        return run(None, *flags, **(SAMPLED | settings)), sum(drawn)

    call.sampler = counting
    return call


def rates(folder) -> dict:
    return {line["id"]: line["pass_rate"] for line in read_jsonl(folder / "pass_rates.jsonl")}


def test_pass_rates_are_the_models(sampled):
    out, num = sampled()
    assert num == 10 and len(rates(out)) == 10
    assert set(rates(out).values()) <= {0, 0.25, 0.5, 0.75, 1} and len(set(rates(out).values())) > 1
    assert {row["id"]: row["pass_rate"] for row in read_jsonl(out / "sft.jsonl")} == rates(out)
    line = read_jsonl(out / "pass_rates.jsonl")[0]
    assert line["graded"] == 4 and line["right"] == 4 * line["pass_rate"] and 0 <= line["truncated"] <= 4


def test_pass_rates_on_disk_are_not_sampled_again(sampled):
    out, _ = sampled()
    before = contents_of(out)
    assert sampled("--num_demonstrations", "14", "--overwrite") == (out, 4)
    assert contents_of(out)["pass_rates.jsonl"].startswith(before["pass_rates.jsonl"])
    # another temperature or prompt draws anew, and all stay
    assert sampled("--temperature", "2.0", "--overwrite") == (out, 10)
    assert sampled("--system_prompt", "Be brief.", "--overwrite") == (out, 10)
    assert sampled("--overwrite") == (out, 0)
    assert len(read_jsonl(out / "pass_rates.jsonl")) == 34


def test_vllm_samples_in_large_chunks_of_problems(run, tmp_path, monkeypatch):
    """Its cache needs room for a prompt and an answer, not for the model's whole context."""
    (tmp_path / "own.py").write_text(REWARD)
    drawn = []

    class Engine:
        def __init__(self, path, settings, accelerator):
            assert settings.max_model_len == 1024 + SAMPLED["max_new_tokens"] and settings.max_new_tokens == 3

        def sample(self, rows, piece):
            drawn.append((len(rows), piece.num, piece.samples))
            return [Group(row["prompt"], ["Z", "a", "z", "z"], [1] * 4, [False] * 4, [None] * 4) for row in rows]

        def close(self):
            drawn.append("closed")

    monkeypatch.setattr(offline, "OfflineVLLM", Engine)
    monkeypatch.setattr(pass_rates, "choose_engine", lambda asked, _: ("vllm", asked))
    monkeypatch.setitem(pass_rates.CHUNK, "vllm", 6)
    out = run(None, **SAMPLED)
    assert drawn == [(6, 6, 4), (4, 4, 4), "closed"]
    assert set(rates(out).values()) == {0.25}


def test_vllm_that_cannot_run_is_refused(run, tmp_path):
    (tmp_path / "own.py").write_text(REWARD)
    with pytest.raises(InputError, match="backend: vllm cannot be used"):
        run(None, **SAMPLED, backend="vllm")


def test_sampling_that_was_cut_off_goes_on(sampled, tmp_path):
    undisturbed, _ = sampled(output_dir="undisturbed")
    sampled.sampler.fails_after = 3
    with pytest.raises(KeyboardInterrupt):
        sampled()
    assert len(rates(tmp_path / "out")) == 6 and not (tmp_path / "out" / "data.json").exists()
    sampled.sampler.fails_after = None
    out, num = sampled()
    assert num == 4 and rates(out) == rates(undisturbed)
    assert (out / "sft.jsonl").read_bytes() == (undisturbed / "sft.jsonl").read_bytes()
