"""Candidates: how many are on disk, which ones, and who must leave them alone."""

from types import SimpleNamespace

import pytest
from monitored_runs import PEAKED, monitored_trainer, plan

from aesl_trl import files
from aesl_trl.errors import InputError
from aesl_trl.training.candidates import Candidates
from aesl_trl.training.run_record import forget_after


@pytest.mark.parametrize("max_candidates", [2, 3])
def test_candidates_are_bounded_and_keep_what_can_be_selected(max_candidates, tokenizer, tmp_path, monkeypatch):
    plan(monkeypatch, PEAKED)
    seen = []
    original = Candidates.keep

    def keep(self, step, rows):
        original(self, step, rows)
        seen.append(sorted(path.name for path in (tmp_path / files.OWN / files.CANDIDATES).iterdir()))

    monkeypatch.setattr(Candidates, "keep", keep)
    monitored_trainer(
        tokenizer, tmp_path, diversity_steps=1, max_steps=10, max_candidates=max_candidates, selection="turning_point"
    ).train()
    assert max(len(names) for names in seen) == max_candidates
    assert all(f"step-{step}" in names for step, names in enumerate(seen, 1))  # the newest is always there
    assert {"step-4", "step-10"} <= set(seen[-1])
    assert files.read_json(tmp_path / files.OWN / files.SELECTION)["step"] == 4


def test_best_evaluation_is_among_the_candidates(tokenizer, tmp_path):
    trainer = monitored_trainer(
        tokenizer,
        tmp_path,
        diversity_steps=1,
        max_steps=5,
        max_candidates=2,
        selection="best_eval",
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=0.3,
    )
    trainer.train()
    evaluated = {row["step"]: row["eval_nll"] for row in trainer.state.log_history if "eval_nll" in row}
    chosen = files.read_json(tmp_path / files.OWN / files.SELECTION)
    assert chosen["applied"] == "best_eval" and chosen["step"] == min(evaluated, key=evaluated.get)


def test_what_a_series_that_only_falls_needs_is_kept():
    """By hand: the last step (6), the best by eval_nll (5), the most diverse (1), the one with most mixed groups (4),
    and the next most diverse (2). A gap (7) and a step without weights (8) count nothing."""
    state = SimpleNamespace(log_history=[{"step": step, "eval_nll": abs(step - 5) + 1.0} for step in range(1, 7)])
    mixed = [0.1, 0.2, 0.3, 0.6, 0.5, 0.2, 0.9]
    series = [{"step": step, "entropy": 7 - step, "groups_mixed": mixed[step - 1]} for step in (1, 2, 3, 4, 5, 6)]
    series += [{"step": 7, "entropy": None}, {"step": 8, "entropy": 9.0, "groups_mixed": 0.9}]
    kept = {
        number: Candidates(SimpleNamespace(state=state), "entropy", "eval_nll", number)._worth_keeping(
            [3, 1, 2, 6, 5, 4, 7], 6, series
        )
        for number in (2, 3, 4, 5)
    }
    assert kept == {2: {6, 5}, 3: {6, 5, 1}, 4: {6, 5, 1, 4}, 5: {6, 5, 1, 4, 2}}


def test_candidates_survive_the_trainers_rotation(tokenizer, tmp_path):
    monitored_trainer(
        tokenizer, tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1, max_steps=4
    ).train()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1
    assert sorted(path.name for path in (tmp_path / files.OWN / files.CANDIDATES).iterdir()) == ["step-2", "step-4"]


def test_candidates_are_not_pushed_to_the_hub(tokenizer, tmp_path, monkeypatch):
    trainer = monitored_trainer(tokenizer, tmp_path)
    monkeypatch.setattr(trainer, "push_to_hub", lambda *args, **kwargs: pytest.fail("pushed"))
    monkeypatch.setattr(trainer, "_finish_current_push", lambda: None)
    trainer.args.push_to_hub = True
    trainer.train()
    assert (tmp_path / files.OWN / files.SELECTED).exists()


@pytest.mark.parametrize("link", ["candidates", "samples", ""])
def test_nothing_is_forgotten_behind_a_link(link, tmp_path):
    """A training in the folder of somebody else's run deletes nothing where the run's links lead."""
    mine = tmp_path / "mine" / files.OWN
    for name in ("candidates/step-5/model.safetensors", "samples/step-5.jsonl"):
        files.write_text(mine / name, "mine")
    place = tmp_path / "theirs" / files.OWN / link
    place.parent.mkdir(parents=True)
    place.symlink_to(mine / link)
    with pytest.raises(InputError, match="leads by a symlink to"):
        forget_after(tmp_path / "theirs", 0)
    assert len([path for path in mine.rglob("*") if path.is_file()]) == 2


def test_a_selection_is_forgotten_as_a_whole_and_other_names_stay(tmp_path):
    own = tmp_path / files.OWN
    for name in ("selected/model.safetensors", "candidates/step-5/a", "candidates/step-x/a", "candidates/.step-y.tmp"):
        files.write_text(own / name, "")
    files.write_text(own / files.CANDIDATES / ".step-9.tmp" / "a", "")
    files.write_json(own / files.SELECTION, {"applied": "last"})
    forget_after(tmp_path, 5)
    assert {path.name for path in own.iterdir()} == {"candidates"}
    assert {path.name for path in (own / files.CANDIDATES).iterdir()} == {"step-5", "step-x", ".step-y.tmp"}
