"""errors: what a user reads of a refusal, in one line, whichever process says it."""

import errno
import os
import warnings

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


# ---- Control characters

HOSTILE = "\x1b]0;owned\x07 \x1b[2J\x9b2J \u202egnp.exe \ud83d \x00"
SHOWN = "\u241b]0;owned\u2407 \u241b[2J\ufffd2J \ufffdgnp.exe \ufffd \u2400"


def test_an_error_cannot_command_the_terminal(capsys):
    with pytest.raises(SystemExit):
        errors.exit_on_input_error("aesl report", refusing(InputError(f"no number in {HOSTILE}")))
    assert capsys.readouterr().err == f"aesl report: no number in {SHOWN}\n"


def test_what_a_command_tells_and_warns_cannot_either(capsys):
    formatted, before = [], warnings.formatwarning

    def main():
        errors.tell(f"weights in {HOSTILE}\nnext line")
        formatted.append(warnings.formatwarning(f"the folder {HOSTILE}", UserWarning, "a.py", 1, line=""))

    errors.exit_on_input_error("aesl select", main)
    assert capsys.readouterr().out == f"weights in {SHOWN}\nnext line\n"
    assert formatted == [f"a.py:1: UserWarning: the folder {SHOWN}\n"]
    assert warnings.formatwarning is before


# ---- File errors


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (errno.ENOSPC, 1, "No space left on device: report.html"),
        (errno.EROFS, 1, "Read-only file system: report.html"),
        (errno.EACCES, 2, "Permission denied: report.html"),
        (errno.ENAMETOOLONG, 2, "File name too long: report.html"),
        (errno.ELOOP, 2, "Too many levels of symbolic links: report.html"),
        (errno.ENOTDIR, 2, "Not a directory: report.html"),
    ],
)
def test_a_path_or_a_disk_is_one_line(number, code, says, capsys):
    with pytest.raises(SystemExit) as leaving:
        errors.exit_on_input_error("aesl report", refusing(OSError(number, os.strerror(number), "report.html")))
    assert leaving.value.code == code
    assert capsys.readouterr().err == f"aesl report: {says}\n"


def test_a_full_disk_under_safetensors_is_one_line(capsys):
    error = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SystemExit) as leaving:
        errors.exit_on_input_error("aesl handoff", refusing(error))
    assert leaving.value.code == 1
    assert capsys.readouterr().err == f"aesl handoff: {error}\n"


def test_a_file_that_is_missing_in_our_own_code_rises():
    with pytest.raises(FileNotFoundError):
        errors.exit_on_input_error("aesl sft", refusing(FileNotFoundError(errno.ENOENT, "No such file", "x")))


def test_what_transformers_says_of_its_own_calls_is_left_out():
    def main():
        for name in ("gradient_checkpointing", "is_gradient_checkpointing", "gradient_checkpointing_enable", "other"):
            warnings.warn(f"`{name}` is deprecated and will be removed in v6. Use `x`.", FutureWarning, stacklevel=1)

    filters = list(warnings.filters)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        errors.exit_on_input_error("aesl sft", main)
    assert [str(each.message).split("`")[1] for each in said] == ["other"]
    assert warnings.filters == filters
