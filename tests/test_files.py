"""files: valid JSON and never half of it, folders swapped as a whole, and a run as it lies on disk."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aesl_trl import files
from aesl_trl.errors import InputError


def test_what_json_cannot_hold_becomes_null(tmp_path):
    files.write_json(tmp_path / "a.json", {"x": math.nan, "y": [math.inf, 1.5, (2,)], 3: "ä"})
    assert files.read_json(tmp_path / "a.json") == {"x": None, "y": [None, 1.5, [2]], "3": "ä"}


def test_lines_are_added(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    for step in range(3):
        files.append_jsonl(path, {"step": step, "nll": math.nan})
    assert files.read_jsonl(path) == [{"step": step, "nll": None} for step in range(3)]
    assert path.read_text().endswith("\n")


def test_a_failed_append_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    files.append_jsonl(path, {"step": 0})
    before = path.read_bytes()

    def full_disk(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        files.append_jsonl(path, {"step": 1})
    assert path.read_bytes() == before


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"step": 0}) + "\n{\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 2 is not valid JSON"):
        files.read_jsonl(path)


def test_a_full_disk_leaves_the_old_file_and_no_part_of_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"x": 1})

    def full_disk(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        files.write_json(path, {"x": 2})
    assert files.read_json(path) == {"x": 1} and [item.name for item in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("text", "is_ours"), [('{"applied": "last"}', True), ('{"a', True), ("[1]", False), ('{"name": 1}', False)]
)
def test_a_file_of_ours_is_known_by_its_key_or_is_torn(text, is_ours, tmp_path):
    (tmp_path / "selection.json").write_text(text)
    assert files.wrote(tmp_path / "selection.json", "applied") == is_ours
    assert not files.wrote(tmp_path / "nothing.json", "applied")


def test_a_file_of_any_name_is_known_by_all_its_keys(tmp_path):
    for text, is_ours in (
        ('{"models": 1}\n{"models": 2}\n', False),
        ('{"models": 1}', False),
        ('{"a": 1, "models": 1}', True),
    ):
        (tmp_path / "train.json").write_text(text)
        assert files.wrote(tmp_path / "train.json", "models", "a", torn=False) == is_ours


def test_a_selection_is_repeated_by_its_options():
    evidence = {"evaluation": {"metric": "pass@1"}}
    chosen = {"rule": "best_eval", "metric": "entropy", "step": 4, "evidence": evidence}
    assert files.repeats(chosen) == {"rule": "best_eval", "metric": "entropy", "best_eval_metric": "pass@1"}
    assert files.repeats({**chosen, "rule": "step"}) == {"step": 4}
    assert files.repeats({**chosen, "rule": "last"}) == {"rule": "last", "metric": "entropy"}
    assert files.repeats({**chosen, "evidence": 3}) == {"rule": "best_eval", "metric": "entropy"}
    assert files.repeats({"rule": ["last"]}) == files.repeats({}) == {}


# ---- A folder is swapped


def litter(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_swapped_makes_a_folder_and_replaces_it(tmp_path):
    target = tmp_path / "new" / "target"
    for number in range(3):
        with files.swapped(target) as folder:
            assert list(folder.iterdir()) == [] and folder.parent == target.parent
            (folder / f"file-{number}").write_text("")
        assert [path.name for path in target.iterdir()] == [f"file-{number}"]
        assert litter(target.parent) == []


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_leaves_the_old_folder_whole(tmp_path, is_there, error):
    target = tmp_path / "target"
    if is_there:
        files.write_text(target / "weights", "old")
    with pytest.raises(error), files.swapped(target) as folder:
        (folder / "weights").write_text("half")
        raise error
    assert (target / "weights").read_text() == "old" if is_there else not target.exists()
    assert litter(tmp_path) == []


SWAPS = """
import sys
from pathlib import Path
from aesl_trl.files import swapped
for number in range(50):
    with swapped(sys.argv[1]) as folder:
        (folder / "weights").write_text(f"{sys.argv[2]} {number}")
"""


def test_two_processes_that_swap_at_once_leave_one_whole_folder(tmp_path):
    target = tmp_path / "selected"
    both = [subprocess.Popen([sys.executable, "-c", SWAPS, target, name]) for name in "ab"]
    assert [process.wait(60) for process in both] == [0, 0]
    assert os.listdir(tmp_path) == ["selected"] and (target / "weights").read_text().endswith("49")


def test_a_folder_that_another_process_swaps_at_the_same_moment_is_replaced(tmp_path, monkeypatch):
    target, replace, moments = tmp_path / "target", os.replace, []
    files.write_text(target / "weights", "old")

    def replace_late(source, to):
        moments.append(source)
        if len(moments) == 1:  # the other process has moved the old one aside
            shutil.rmtree(target)
        elif len(moments) == 2:  # and put its own in the place
            (target / "sub").mkdir(parents=True)
        replace(source, to)

    with monkeypatch.context() as patch, files.swapped(target) as folder:
        (folder / "weights").write_text("ours")
        patch.setattr(files.os, "replace", replace_late)
    assert [path.name for path in target.iterdir()] == ["weights"] and (target / "weights").read_text() == "ours"
    assert len(moments) == 4 and litter(tmp_path) == []


def test_a_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    target, replace = tmp_path / "target", os.replace
    files.write_text(target / "weights", "old")

    def fails_for_the_new(source, to):
        if str(source).endswith(".tmp"):
            raise OSError("no")
        replace(source, to)

    monkeypatch.setattr(files.os, "replace", fails_for_the_new)
    with pytest.raises(OSError, match="no"), files.swapped(target):
        pass
    assert (target / "weights").read_text() == "old"
    assert litter(tmp_path) == []


# ---- A run is read


def sft_run(folder, **settings):
    files.write_json(folder / files.RUN, {"stage": "sft", **settings})
    return folder


def test_the_sft_folder_of_a_run(tmp_path):
    with pytest.raises(InputError, match="holds no SFT run"):
        _ = files.RunFolder(tmp_path).sft
    files.write_json(tmp_path / "chain" / files.CHAIN, {"sft_dir": "../shared"})
    assert files.RunFolder(tmp_path / "chain").sft == (tmp_path / "shared").resolve()  # deleted when all was done
    sft_run(tmp_path / "run" / "sft")
    assert files.RunFolder(tmp_path / "run").sft == tmp_path / "run" / "sft"
    files.write_json(tmp_path / "base" / files.CHAIN, {"sft_dir": None})
    with pytest.raises(InputError, match="without an SFT stage"):
        _ = files.RunFolder(tmp_path / "base").sft


def test_has_sft(tmp_path):
    cases = {
        "itself": (sft_run(tmp_path / "itself"), True),
        "inside": (sft_run(tmp_path / "inside" / "sft").parent, True),
        "base": (tmp_path / "base", False),
        "not begun": (tmp_path / "not begun", False),
        "shared": (tmp_path / "shared", True),
        "nothing": (tmp_path / "nothing", False),
    }
    files.write_json(tmp_path / "base" / files.CHAIN, {"sft_dir": None})
    files.write_json(tmp_path / "not begun" / files.CHAIN, {"sft_dir": "sft"})
    files.write_json(tmp_path / "shared" / files.CHAIN, {"sft_dir": "../itself"})
    (tmp_path / "nothing").mkdir()
    assert {name: files.RunFolder(path).has_sft for name, (path, _) in cases.items()} == {
        name: expected for name, (_, expected) in cases.items()
    }


def test_an_old_chains_run_is_read_by_its_chain_json(tmp_path):
    """Find the SFT elsewhere, and the selection beside chain.json, as the first chains left them."""
    sft, run = sft_run(tmp_path / "shared", cold_start_loss="nll"), tmp_path / "run"
    files.write_json(run / files.CHAIN, {"sft_dir": "../shared", "stages": {"sft": {"status": "done"}}})
    files.write_json(run / files.SELECTION, {"step": 5})
    files.write_json(sft / files.SELECTION, {"step": 7})
    files.write_json(sft / files.READINESS, {"checkpoints": []})
    files.write_jsonl(sft / files.DIVERSITY, [{"step": 0, "entropy": 1.0}])
    found = files.RunFolder(run)
    assert found.chain["stages"]["sft"]["status"] == "done"
    assert found.settings["cold_start_loss"] == "nll"
    assert found.rows(files.DIVERSITY, ["step"]) == [{"step": 0, "entropy": 1.0}]
    assert found.object(files.SELECTION) == {"step": 5}  # the run's own goes before the SFT's
    assert found.object(files.READINESS) == {"checkpoints": []}
    assert found.object(files.EVALUATION) == {}


# ---- Where the files of a training lie


def fill(own):
    """Write what a monitored training leaves to `own`, its own part or, as version 0.1.0 did, its folder itself."""
    sft_run(own, cold_start_loss="nll")
    files.write_jsonl(own / files.DIVERSITY, [{"step": 0}, {"step": 5}])
    files.write_jsonl(own / files.SAMPLES / "step-5.jsonl", [])
    files.write_text(own / files.CANDIDATES / "step-5" / "config.json", "{}")
    files.write_json(own / files.SELECTION, {"step": 5})
    files.write_json(own / files.TRAINER_STATE, {"log_history": [{"step": 5}]})


@pytest.mark.parametrize("is_old", [False, True])
def test_a_training_is_read_where_its_version_left_it(is_old, tmp_path):
    own = tmp_path if is_old else tmp_path / "_aesl"
    fill(own)
    (tmp_path / "_aesl").mkdir(exist_ok=True)  # the lock of a training that goes on lies there
    run = files.RunFolder(tmp_path)
    assert files.own_folder(tmp_path) == run.own == own and run.places == [own]
    assert (run.settings["cold_start_loss"], run.log, len(run.rows(files.DIVERSITY))) == ("nll", [{"step": 5}], 2)
    assert run.candidates == [5] and run.candidate(5).parent == own / files.CANDIDATES == run.candidates_folder
    assert run.sample_files == {5: own / files.SAMPLES / "step-5.jsonl"}
    assert run.object(files.SELECTION) == {"step": 5}
    for weights in (run.candidate(5), own / files.SELECTED, own / files.HANDOFF_DIR, tmp_path / "checkpoint-5"):
        assert files.run_of(weights) == tmp_path


def test_another_programs_run_json_is_no_run_of_ours(tmp_path):
    files.write_json(tmp_path / files.RUN, {"project": "somebody's own"})
    assert files.own_folder(tmp_path) == tmp_path / "_aesl"
    files.renew_own_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_what_a_command_makes_of_a_run_lies_in_its_own_part_or_in_the_chains_folder(tmp_path):
    fill(tmp_path / "sft" / "_aesl")
    assert files.RunFolder(tmp_path).own == tmp_path and files.RunFolder(tmp_path / "sft").own.name == "_aesl"
    assert files.RunFolder(tmp_path).places == [tmp_path, tmp_path / "sft" / "_aesl"]
    (tmp_path / "model").mkdir()
    assert files.RunFolder(tmp_path / "model").own == tmp_path / "model"  # nobody's training


def test_a_training_that_starts_anew_moves_what_an_older_version_left(tmp_path):
    fill(tmp_path)
    files.write_text(tmp_path / "model.safetensors", "weights")
    files.write_text(tmp_path / "samples.txt", "somebody's own")
    files.write_json(tmp_path / files.MIXES, {"candidates": []})
    for _ in range(2):
        files.renew_own_folder(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"_aesl", "model.safetensors", "samples.txt"}
    run = files.RunFolder(tmp_path)
    assert run.own == tmp_path / "_aesl" and run.candidates == [5] and run.object(files.SELECTION) == {"step": 5}


def test_files_that_are_not_there_read_as_empty(tmp_path):
    found = files.RunFolder(sft_run(tmp_path))
    assert (found.chain, found.log, found.rows(files.DIVERSITY), found.sample_files) == ({}, [], [], {})
    assert found.object(files.SELECTION) == {}
    (tmp_path / files.RUN).unlink()
    files.write_jsonl(tmp_path / files.DIVERSITY, [])  # DiversityCallback beside another trainer writes no run.json
    assert files.RunFolder(tmp_path).settings == {}


def test_no_folder_names_the_nearest(tmp_path):
    (tmp_path / "seed-1").mkdir()
    with pytest.raises(InputError, match="seed-10 is not a folder; did you mean 'seed-1'"):
        files.RunFolder(tmp_path / "seed-10")


@pytest.mark.parametrize(
    ("name", "text", "read", "message"),
    [
        ("run.json", "{", lambda run: run.settings, "run.json is not valid JSON"),
        ("run.json", "[]", lambda run: run.settings, "run.json holds a list, not an object"),
        ("chain.json", "3", lambda run: run.chain, "chain.json holds a int, not an object"),
        ("chain.json", '{"sft', lambda run: run.sft, "chain.json is not valid JSON"),
        ("selection.json", "[]", lambda run: run.object("selection.json"), "selection.json holds a list"),
        ("diversity.jsonl", "{}\n{\n", lambda run: run.rows("diversity.jsonl"), "line 2 is not valid JSON.*take that"),
        ("diversity.jsonl", '{"a": 1}\n', lambda run: run.rows("diversity.jsonl", ["step"]), "row 1 has no 'step'"),
        ("diversity.jsonl", "3\n", lambda run: run.rows("diversity.jsonl", ["step"]), "row 1 has no 'object'"),
        ("trainer_state.json", '{"log_history": {}}', lambda run: run.log, "no list 'log_history'"),
        ("trainer_state.json", "[1]", lambda run: run.log, "trainer_state.json holds a list"),
    ],
)
def test_a_broken_file_of_a_run_is_named(name, text, read, message, tmp_path):
    sft_run(tmp_path)
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read(files.RunFolder(tmp_path))


@pytest.mark.parametrize("versions", [{"aesl_trl": "0.0.9"}, {"aesl_trl": "0.1.99"}, {"aesl_trl": None}, {}, None, 3])
def test_an_older_versions_run_is_read(versions, tmp_path):
    assert files.RunFolder(sft_run(tmp_path, versions=versions)).settings["stage"] == "sft"


@pytest.mark.parametrize("version", ["0.2.0", "1.0", "0.2.0rc1", "12.0.0"])
def test_a_newer_versions_run_is_refused(version, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "__version__", "0.1.5")
    run = files.RunFolder(sft_run(tmp_path, versions={"aesl_trl": version}))
    with pytest.raises(InputError, match=f"was written by aesl_trl {version}, and this is 0.1.5: update aesl_trl"):
        _ = run.settings


def test_the_log_is_the_newest_checkpoints_while_the_run_goes_on(tmp_path):
    sft_run(tmp_path)
    for step in (9, 10, 100):
        path = tmp_path / f"checkpoint-{step}" / files.TRAINER_STATE
        files.write_json(path, {"log_history": [{"step": step}]})
    (tmp_path / "checkpoint-200").mkdir()  # torn: it has no state yet
    assert files.RunFolder(tmp_path).log == [{"step": 100}]
    files.write_json(tmp_path / files.TRAINER_STATE, {"log_history": [{"step": 300}]})
    assert files.RunFolder(tmp_path).log == [{"step": 300}]


def test_candidates_and_samples_come_in_the_order_of_their_steps(tmp_path):
    run = files.RunFolder(sft_run(tmp_path))
    with pytest.raises(InputError, match="holds no candidate .*: train with diversity_steps above 0"):
        _ = run.candidates
    for step in (10, 9, 100):
        run.candidate(step).mkdir(parents=True)
        files.write_jsonl(tmp_path / files.SAMPLES / f"step-{step}.jsonl", [])
    (tmp_path / files.CANDIDATES / "step-x").mkdir()
    files.write_text(tmp_path / files.CANDIDATES / "step-7", "a file is no candidate")
    files.write_text(tmp_path / files.SAMPLES / "step-x.jsonl", "")
    assert run.candidates == [9, 10, 100]
    assert list(run.sample_files) == [9, 10, 100]
    assert run.sample_files[9] == tmp_path / files.SAMPLES / "step-9.jsonl"


@pytest.mark.parametrize(
    ("name", "is_inside"), [("selected", True), ("a/b", True), ("..", False), ("a/../../b", False), ("/etc", False)]
)
def test_a_name_that_leaves_its_folder_is_seen(name, is_inside):
    assert files.stays_inside(name) == is_inside


# ---- Files that somebody made to do harm


def test_no_line_is_added_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match="rows.jsonl is a symlink"):
        files.append_jsonl(tmp_path / "rows.jsonl", {"step": 1})
    assert (tmp_path / "precious").read_text() == "mine"


def test_sft_dir_names_a_run_of_ours(tmp_path, capsys):
    shared, run = sft_run(tmp_path / "shared"), tmp_path / "chains" / "run"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / files.TRAINER_STATE).write_text("{}")  # a training, but none of ours
    (tmp_path / "link").symlink_to(tmp_path)
    for name, said in (
        ("../../home", f"sft_dir names {tmp_path}/home, which is no SFT run of aesl_trl"),
        ("/", "sft_dir names /, which is no SFT run of aesl_trl"),
    ):
        files.write_json(run / files.CHAIN, {"sft_dir": name})
        with pytest.raises(InputError, match=f"chain.json: {said}$"):
            _ = files.RunFolder(run).sft
    assert capsys.readouterr().err == ""
    for name in ("../../shared", "../../link/shared"):  # it is said once
        files.write_json(run / files.CHAIN, {"sft_dir": name})
        assert files.RunFolder(run).sft == shared
    assert capsys.readouterr().err == f"aesl_trl: the SFT of {run} is {shared}, as its chain.json says\n"
    of_comparison = sft_run(tmp_path / "sft" / "nll" / "seed-0")  # where the cells of a comparison share theirs
    files.write_json(run / files.CHAIN, {"sft_dir": "../../sft/nll/seed-0"})
    assert files.RunFolder(run).sft == of_comparison and capsys.readouterr().err == ""
    files.write_json(run / files.CHAIN, {"sft_dir": "../../shared"})
    (shared / files.RUN).unlink()  # deleted when all was done, and its folder left
    assert files.RunFolder(run).sft == shared and not files.RunFolder(run).has_sft


def test_a_run_in_the_hubs_cache_is_all_links_to_its_blobs(tmp_path):
    cache = tmp_path / "models--me--run"
    candidate = cache / "snapshots/rev/_aesl/candidates/step-5"
    files.write_text(cache / "blobs/f00", "weights")
    files.write_text(tmp_path / "models--you--run/blobs/f00", "others")
    sft_run(cache / "snapshots/rev/_aesl")
    candidate.mkdir(parents=True)
    (candidate / "model.safetensors").symlink_to("../../../../../blobs/f00")
    found = files.RunFolder(cache / "snapshots/rev").candidate(5)
    files.link_or_copy(found / "model.safetensors", tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").is_symlink()
    assert (tmp_path / "model.safetensors").read_text() == "weights"
    for elsewhere in (tmp_path / "models--you--run/blobs/f00", cache / "blobs", tmp_path / "model.safetensors"):
        (candidate / "more.safetensors").symlink_to(elsewhere)
        with pytest.raises(InputError, match="more.safetensors leads by a symlink"):
            files.RunFolder(cache / "snapshots/rev").candidate(5)
        (candidate / "more.safetensors").unlink()


@pytest.mark.parametrize("link", ["candidates/step-5", "candidates/step-5/model.safetensors", "candidates", ""])
def test_no_symlink_leads_out_of_a_candidate(link, tmp_path):
    """Neither is the link followed nor what it leads to walked: it may be a whole disk."""
    run, elsewhere = sft_run(tmp_path / "run" / "_aesl"), tmp_path / "elsewhere"
    files.write_text(elsewhere / "step-5" / "model.safetensors", "mine")
    files.write_text(elsewhere / "candidates" / "step-5" / "model.safetensors", "mine")
    place = run / link
    if not link:
        (run / files.RUN).replace(elsewhere / files.RUN)
        run.rmdir()
    place = Path(str(place).rstrip("/"))
    place.parent.mkdir(parents=True, exist_ok=True)
    targets = {"": "", "candidates": "candidates", "candidates/step-5": "step-5"}
    place.symlink_to(elsewhere / targets.get(link, "step-5/model.safetensors"))
    with pytest.raises(InputError, match=f"leads by a symlink to {elsewhere}.*: put a copy in the link's place"):
        files.RunFolder(tmp_path / "run").candidate(5)
    with pytest.raises(InputError, match="leads by a symlink"):
        files.check_candidate(run / "candidates/step-5")
    if not link:
        with pytest.raises(InputError, match="_aesl leads by a symlink"):
            _ = files.RunFolder(tmp_path / "run").own
    (tmp_path / "candidates").mkdir()
    (tmp_path / "candidates" / "qwen").symlink_to(elsewhere)
    files.check_candidate(tmp_path / "candidates" / "qwen")  # a model of the user's own


@pytest.mark.parametrize(
    "text",
    ["[" * 10**5, "9" * 6000, '{"a": ' * 10**5, "\ufeff{}", "{"],
    ids=["lists", "digits", "objects", "byte order mark", "cut off"],
)
def test_json_that_python_cannot_read_is_one_line(text, tmp_path):
    for name, read in (("a.json", files.read_json), ("a.jsonl", files.read_jsonl)):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=f"{name}.* is not valid JSON") as error:
            read(tmp_path / name)
        assert len(str(error.value)) < 300 + len(str(tmp_path))


def test_half_a_character_is_no_text(tmp_path):
    path = tmp_path / "chain.json"
    path.write_text('{"sft_dir": "\\uD83d\\uDe00"}')
    assert files.read_json(path) == {"sft_dir": "\U0001f600"}
    path.write_text('{"sft_dir": "\\ud83d"}')
    with pytest.raises(InputError, match="chain.json is not valid JSON: an escape of"):
        _ = files.RunFolder(tmp_path).chain


@pytest.mark.parametrize(
    "write", [files.write_text, files.write_json, lambda path, text: files.write_jsonl(path, [text])]
)
def test_a_file_that_is_written_whole_replaces_a_link(write, tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "selection.json").symlink_to(tmp_path / "precious")
    write(tmp_path / "selection.json", "new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "selection.json").is_symlink() and "new" in (tmp_path / "selection.json").read_text()


def test_a_pipe_in_the_place_of_a_runs_file_is_not_waited_for(tmp_path):
    (tmp_path / files.RUN).write_text('{"stage": "sft"}')
    os.mkfifo(tmp_path / files.DIVERSITY)
    run = files.RunFolder(tmp_path)
    assert run.rows(files.DIVERSITY) == [] and run.settings == {"stage": "sft"}
