"""diversity.jsonl as a series: its turning point, and rows that were measured in different ways are refused."""

import pytest
from small_runs import user

from aesl_trl import files
from aesl_trl.diversity.selection import select_checkpoint
from aesl_trl.diversity.series import (
    SETTINGS,
    base_groups,
    by_step,
    check_prompts,
    check_settings,
    prompts_digest,
    turning_point_of,
)
from aesl_trl.diversity.turning_point import find_turning_point
from aesl_trl.errors import InputError


ROW = {
    "num_prompts": 16,
    "num_samples": 8,
    "temperature": 1.0,
    "max_new_tokens": 256,
    "backend": "generate",
    "entropy_estimator": "exact",
    "prompts": "0a",
}
OTHER = {
    "num_prompts": 64,
    "num_samples": 4,
    "temperature": 0.7,
    "max_new_tokens": 512,
    "backend": "vllm_colocate",
    "entropy_estimator": "sampled",
    "prompts": "0b",
}


def rows(**changes):
    return [{"step": step, **ROW, **(changes if step == 20 else {}), "entropy": 1.0} for step in (0, 10, 20, 30)]


ENTROPY = [0.21, 0.25, 0.32, 0.25, 0.20, 0.12, 0.10, 0.07]


def test_the_turning_point_of_rows_is_that_of_their_values():
    measured = [{"step": step, "entropy": value, "self_bleu": 1 - value} for step, value in enumerate(ENTROPY)]
    assert turning_point_of(measured, "entropy") == find_turning_point(range(8), ENTROPY)
    assert turning_point_of(measured, "self_bleu").evidence["mode"] == "min"
    assert turning_point_of(measured, "self_bleu").step == 2
    assert turning_point_of(measured, "entropy", patience=6).step is None
    stale = [row | {"entropy": 9.0} for row in measured[5:]]  # a resumed run measures again after its checkpoint
    assert turning_point_of([*measured[:5], *stale, *measured[5:]], "entropy").evidence["values"] == ENTROPY


def test_a_row_without_the_figure_is_a_gap():
    measured = [{"step": step, "entropy": value} for step, value in enumerate(ENTROPY)]
    found = turning_point_of([*measured[:3], {"step": 3, "entropy": None}, *measured[4:], {"step": 9}], "entropy")
    assert found.evidence["missing"] == [3, 9]


def test_per_prompt_values_are_handed_on():
    values = [[value + prompt / 100 for prompt in range(16)] for value in ENTROPY]
    measured = [{"step": step, "entropy": value} for step, value in enumerate(ENTROPY)]
    given = [row | {"by_prompt": {"entropy": prompts}} for row, prompts in zip(measured, values, strict=True)]
    assert turning_point_of(given, "entropy").evidence["prompts"] == 16
    assert turning_point_of(measured, "entropy").evidence["prompts"] == 0
    unknown = [row | {"by_prompt": None} for row in measured]
    assert turning_point_of(unknown, "entropy") == turning_point_of(measured, "entropy")


def test_rows_by_step():
    assert by_step([{"step": 3, "a": 1}, {"step": 1}, {"step": 3, "a": 2}]) == {1: {"step": 1}, 3: {"step": 3, "a": 2}}
    with pytest.raises(InputError, match="diversity.jsonl, row 2 has no whole number 'step': '3'"):
        by_step([{"step": 3}, {"step": "3"}])


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_must_agree(name):
    before, after = repr(ROW[name]), repr(OTHER[name])
    with pytest.raises(InputError, match=f"diversity.jsonl: {name} is {before} at step 0 and {after} at step 20"):
        check_settings(rows(**{name: OTHER[name]}))
    with pytest.raises(InputError, match=f"{name} is {before}"):
        select_checkpoint(rows(**{name: OTHER[name]}), [], [10, 20, 30], rule="last")


def test_what_may_differ():
    check_settings(rows(seed=1, batch_size=4, token_budget=5))
    check_settings(rows(entropy_estimator=None))  # a gap
    check_settings([{"step": 0}, *rows()])  # a row of an older version
    assert select_checkpoint(rows(), [], [10, 20, 30], rule="last")["step"] == 30


PROMPTS = [{"prompt": user("2+3"), "solution": "5"}, {"prompt": user("2+4"), "solution": "6"}, {"prompt": user("7")}]


@pytest.mark.parametrize("has_digest", [True, False])  # a run of an older version has none
def test_the_prompts_of_a_series_must_stay(has_digest, tmp_path):
    row = {"step": 10, "num_prompts": 2, **({"prompts": prompts_digest(PROMPTS[:2])} if has_digest else {})}
    files.write_jsonl(tmp_path / files.DIVERSITY, [row, {**row, "step": 20, "prompts": "0a"}])
    files.write_jsonl(tmp_path / files.SAMPLES / "step-10.jsonl", [{"prompt": row["prompt"]} for row in PROMPTS[:2]])
    check_prompts(tmp_path, 15, PROMPTS)  # more than are measured
    check_prompts(tmp_path, 5, PROMPTS[1:])  # nothing was measured by then
    check_prompts(tmp_path, 15, [{**row, "tools": None} for row in PROMPTS])
    with pytest.raises(InputError, match=r"other prompts: prompt 0 \(from 0\) is '2\+4', it was '2\+3'"):
        check_prompts(tmp_path, 15, PROMPTS[1:])
    others = [{**row, "solution": "8"} for row in PROMPTS]
    if has_digest:
        with pytest.raises(InputError, match="a column beside the prompts, is another"):
            check_prompts(tmp_path, 15, others)
    else:
        check_prompts(tmp_path, 15, others)


def test_base_groups(tmp_path):
    prompts = ["2+3=", user("hello")]
    assert base_groups(tmp_path, prompts) is None
    samples = [{"prompt": prompt, "completions": [str(place), "x"]} for place, prompt in enumerate(prompts)]
    files.write_jsonl(tmp_path / files.SAMPLES / "step-0.jsonl", samples)
    assert [group.completions for group in base_groups(tmp_path, prompts)] == [["0", "x"], ["1", "x"]]
    assert base_groups(tmp_path, prompts[:1]) is None
