"""Pieces, their seeds, and the file that a run goes on from."""

import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aesl_trl.diversity.figures import Group
from aesl_trl.errors import InputError
from aesl_trl.evaluation.samples import SamplesFile, assemble, draw_missing, folder_for, pieces
from aesl_trl.models.folder import ModelFolder
from aesl_trl.sampling.draws import Piece


def group(prompt: str, texts: list[str]) -> Group:
    num = len(texts)
    return Group(prompt, texts, [2] * num, [False] * num, [0.25] * num)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 50))
def test_pieces_cover_each_sample_once(num_problems, samples, answers):
    found = pieces(num_problems, samples, answers)
    drawn = [
        index for piece in found for index in range(piece.first, piece.first + piece.num) for _ in range(piece.samples)
    ]
    assert sorted(drawn) == [index for index in range(num_problems) for _ in range(samples)]
    assert all(piece.num * piece.samples <= max(answers, 1) for piece in found)
    assert len({(piece.first, piece.chunk) for piece in found}) == len(found)


def test_pieces_by_hand():
    assert pieces(5, 8, 16) == [Piece(0, 2, 0, 8), Piece(2, 2, 0, 8), Piece(4, 1, 0, 8)]
    assert pieces(2, 10, 4) == [Piece(p, 1, c, n) for p in (0, 1) for c, n in enumerate((4, 4, 2))]


@pytest.fixture
def file(tmp_path):
    return SamplesFile(tmp_path / "model", "AIME24", ["a", "b"], {"seed": 0})


WANTED = [Piece(0, 1, 0, 2), Piece(0, 1, 1, 1), Piece(1, 1, 0, 2), Piece(1, 1, 1, 1)]


def drawing(log):
    def draw(piece):
        log.append(piece)
        return [group("ab"[piece.first], [f"{piece.first}.{piece.chunk}.{i}" for i in range(piece.samples)])]

    return draw


def test_samples_are_saved_and_put_together(file):
    draw_missing(file, WANTED, set(), drawing([]), is_main=True)
    groups = assemble(file.read(WANTED), WANTED)
    assert [g.completions for g in groups] == [["0.0.0", "0.0.1", "0.1.0"], ["1.0.0", "1.0.1", "1.1.0"]]
    assert [g.prompt for g in groups] == ["a", "b"] and groups[0].num_tokens == [2, 2, 2] and groups[0].rewards is None
    assert json.loads((file.path.parent / "settings.json").read_text()) == {"seed": 0}


def test_only_what_is_missing_is_drawn(file):
    file.add(WANTED[2], drawing([])(WANTED[2]))
    drawn = []
    draw_missing(file, WANTED, set(file.read(WANTED)), drawing(drawn), is_main=True)
    assert drawn == [WANTED[0], WANTED[1], WANTED[3]]
    assert assemble(file.read(WANTED), WANTED)[1].completions == ["1.0.0", "1.0.1", "1.1.0"]


def test_another_process_draws_and_does_not_write(file):
    drawn = []
    draw_missing(file, WANTED, set(), drawing(drawn), is_main=False)
    assert drawn == WANTED and not file.path.exists()


def test_a_line_that_a_kill_cut_off_is_drawn_anew(file, capsys):
    draw_missing(file, WANTED[:2], set(), drawing([]), is_main=True)
    whole = file.path.read_bytes()
    file.path.write_bytes(whole + whole[: len(whole) // 3])
    assert set(file.read(WANTED)) == set(WANTED[:2])
    assert file.path.read_bytes() == whole and "ends in half a line" in capsys.readouterr().err


def test_what_no_entropy_is_known_of_stays_unknown(file):
    unknown = group("a", ["x"])
    unknown.entropy = [math.nan]
    piece = Piece(0, 1, 0, 1)
    file.add(piece, [unknown])
    assert file.read([piece])[piece][0].entropy == [None]  # JSON holds no nan


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"piece": [9, 1, 0, 2], "groups": []}', "line 2 is no piece of this evaluation"),
        ('{"piece": [1, 1, 0, 2], "groups": []}', "line 2 is no piece of this evaluation"),
        ('{"other": 1}', "line 2 is no piece of an evaluation"),
        ('{"piece": [1, 1, 0, 2], "groups": [{"text": 1}]}', "line 2 is no piece of an evaluation"),
        ("{half", "line 2 is not valid JSON"),
    ],
)
def test_a_file_that_is_not_of_this_run_is_one_line(file, line, message):
    draw_missing(file, WANTED[:1], set(), drawing([]), is_main=True)
    file.path.write_bytes(file.path.read_bytes() + line.encode() + b"\n")
    with pytest.raises(InputError, match=message) as caught:
        file.read(WANTED)
    assert "\n" not in str(caught.value)


def test_other_prompts_have_another_file(file, tmp_path):
    others = SamplesFile(tmp_path / "model", "AIME24", ["a", "c"], {"seed": 0})
    assert others.path.parent == file.path.parent and others.path != file.path


def test_a_model_that_trained_on_is_another_model(tmp_path):
    (tmp_path / "m").mkdir()
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(b"1234")
    os.utime(weights, ns=(1, 1))
    (tmp_path / "m" / "notes.log").write_text("1")
    one = ModelFolder(str(tmp_path / "m")).identity()
    (tmp_path / "m" / "notes.log").write_text("12")
    assert ModelFolder(str(tmp_path / "m")).identity() == one
    os.utime(weights, ns=(1, 2))
    two = ModelFolder(str(tmp_path / "m")).identity()
    assert one != two
    folders = [folder_for(tmp_path, "org/My model", {"model": identity}) for identity in (one, two, one)]
    assert folders[0] == folders[2] != folders[1] and folders[0].name.startswith("My-model-")
