"""diversity.jsonl as a series: rows that were measured in different ways are refused."""

import pytest
from small_runs import user

from aesl_trl import files
from aesl_trl.diversity.selection import select_checkpoint
from aesl_trl.diversity.series import SETTINGS, base_completions, check_settings
from aesl_trl.errors import InputError


ROW = {
    "num_prompts": 16,
    "num_samples": 8,
    "temperature": 1.0,
    "max_new_tokens": 256,
    "backend": "generate",
    "entropy_estimator": "exact",
}
OTHER = {
    "num_prompts": 64,
    "num_samples": 4,
    "temperature": 0.7,
    "max_new_tokens": 512,
    "backend": "vllm_colocate",
    "entropy_estimator": "sampled",
}


def rows(**changes):
    return [{"step": step, **ROW, **(changes if step == 20 else {}), "entropy": 1.0} for step in (0, 10, 20, 30)]


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


def test_base_completions(tmp_path):
    prompts = ["2+3=", user("hello")]
    assert base_completions(tmp_path, prompts) is None
    samples = [{"prompt": prompt, "completions": [str(place), "x"]} for place, prompt in enumerate(prompts)]
    files.write_jsonl(tmp_path / files.SAMPLES / "step-0.jsonl", samples)
    assert base_completions(tmp_path, prompts) == [["0", "x"], ["1", "x"]]
    assert base_completions(tmp_path, prompts[:1]) is None
