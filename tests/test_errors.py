"""errors: what a user reads of a refusal, in one line, whichever process says it."""

import pytest

from aesl_trl import errors
from aesl_trl.errors import Diverged, InputError


@pytest.mark.parametrize(
    ("name", "hint"),
    [("t_scalling", "; did you mean 't_scaling'?"), ("nothing like it", ""), (3, ""), ("", "")],
)
def test_nearest(name, hint):
    assert errors.nearest(name, ["t_scaling", "max_steps"]) == hint


def test_nearest_sibling_looks_at_files_of_the_pattern_only(tmp_path):
    for name in ("train.jsonl", "grpo.yaml"):
        (tmp_path / name).write_text("")
    assert errors.nearest_sibling(tmp_path / "trian.jsonl") == "; did you mean 'train.jsonl'?"
    assert errors.nearest_sibling(tmp_path / "trian.jsonl", "*.y*ml") == ""
    assert errors.nearest_sibling(tmp_path / "grop.yaml", "*.y*ml") == "; did you mean 'grpo.yaml'?"
    assert errors.nearest_sibling(tmp_path / "nowhere" / "train.jsonl") == ""


def test_in_one_line():
    assert errors.in_one_line(ValueError("two\n  lines\tof it")) == "two lines of it"
    long = errors.in_one_line("word " * 200)
    assert len(long) <= 300 and long.endswith(" ...")


def refusing(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(("error", "code"), [(InputError("no\n such file"), 2), (Diverged("no\n such file"), 3)])
@pytest.mark.parametrize(("rank", "end"), [(None, ""), ("0", ""), ("1", " (local rank 1)")])
def test_a_refusal_is_one_line_and_an_exit_code(error, code, rank, end, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit) as leaving:
        errors.exit_on_input_error("aesl sft", refusing(error))
    assert leaving.value.code == code
    assert capsys.readouterr().err == f"aesl sft: no such file{end}\n"
    assert waited == ([errors.OTHER_RANK_S] if rank == "1" else [])


def test_any_other_error_rises():
    with pytest.raises(ZeroDivisionError):
        errors.exit_on_input_error("aesl sft", refusing(ZeroDivisionError()))
