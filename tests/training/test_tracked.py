"""What trackers get of a measurement: the names of the charts, the interval ends, and the samples as a table."""

import sys
from contextvars import ContextVar
from types import ModuleType, SimpleNamespace

import pytest
from monitored_runs import monitored_trainer
from transformers.integrations import TensorBoardCallback

from aesl_trl.diversity.figures import Group
from aesl_trl.training.tracked import SUMMARY, logged_figures, track


ROW = {"step": 30, "entropy": 0.25, "self_bleu": 0.8, "pass@1": 0.12, "groups_mixed": 0.54, "length": 9.0}
GROUPS = [
    Group(f"prompt {i}", ["a", "b"], [1, 1], [False, False], [0.1, 0.2], rewards=[[1.0], [0.0]]) for i in range(6)
]


class Table:
    """As wandb's and trackio's, which TRL's own trainers build in this way."""

    def __init__(self, dataframe):
        self.dataframe = dataframe


class Writer:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))


@pytest.fixture
def trackers(monkeypatch):
    """Stand-ins of wandb and trackio that keep what they are given."""
    found = {}
    for name in ("wandb", "trackio"):
        module = ModuleType(name)
        module.logged, module.Table = [], Table
        module.log = module.logged.append
        if name == "wandb":
            module.run = object()
        else:
            module.context_vars = SimpleNamespace(current_run=ContextVar("current_run", default="a run"))
        monkeypatch.setitem(sys.modules, name, module)
        found[name] = module
    return found


def test_nothing_of_ours_is_called_entropy():
    logs = logged_figures(
        {"entropy": 0.25, "pass@1": 0.12, "length": 9.0}, {"entropy": [0.24, 0.26], "pass@1": [None, 0.2]}
    )
    assert logs == {
        "diversity/own_entropy": 0.25,
        "diversity/pass@1": 0.12,
        "diversity/length": 9.0,
        "diversity/intervals/own_entropy_low": 0.24,
        "diversity/intervals/own_entropy_high": 0.26,
        "diversity/intervals/pass@1_high": 0.2,
    }


def test_four_charts_come_first_and_the_samples_are_a_table(trackers):
    writer, callback = Writer(), object.__new__(TensorBoardCallback)  # its __init__ asks for the package
    callback.tb_writer = writer
    handler = SimpleNamespace(callbacks=[callback])
    trainer = SimpleNamespace(args=SimpleNamespace(report_to=["wandb", "trackio"]), callback_handler=handler)
    track(trainer, ROW, GROUPS)
    charts = {f"diversity/summary/{name}": ROW[key] for name, key in SUMMARY.items()}
    assert list(charts) == [
        *("diversity/summary/own_entropy", "diversity/summary/groups_mixed"),
        *("diversity/summary/pass@1", "diversity/summary/self_bleu"),
    ]
    assert all(name < "eval/entropy" < "train/diversity/own_entropy" for name in charts)  # trackers sort by name
    assert writer.scalars == [(name, value, 30) for name, value in charts.items()]
    for module in trackers.values():
        (logged,) = module.logged
        table = logged.pop("diversity/samples").dataframe
        assert logged == {**charts, "train/global_step": 30}
        assert table.shape == (8, 4) and list(table.columns) == ["step", "prompt", "completion", "rewards"]
        assert table.iloc[1].tolist() == [30, "prompt 0", "b", "[0.0]"]


def reporting_to(*names: str) -> SimpleNamespace:
    return SimpleNamespace(args=SimpleNamespace(report_to=list(names)), callback_handler=SimpleNamespace(callbacks=[]))


def test_a_gap_and_a_run_without_rewards_log_what_is_known(trackers):
    trainer = reporting_to("wandb")
    track(trainer, {"step": 10, "entropy": None, "self_bleu": 0.5}, None)
    assert trackers["wandb"].logged == [{"diversity/summary/self_bleu": 0.5, "train/global_step": 10}]
    assert trackers["trackio"].logged == []


def test_a_tracker_without_a_run_gets_nothing(trackers):
    trackers["wandb"].run = None  # as with WANDB_DISABLED
    trackers["trackio"].context_vars.current_run.set(None)  # as before `init` and after `finish`: its log raises
    track(reporting_to("wandb", "trackio"), ROW, GROUPS)
    assert [module.logged for module in trackers.values()] == [[], []]


# ---- The real packages, where they are installed


def test_what_tensorboard_holds(tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    monitored_trainer(tokenizer, tmp_path / "run", report_to=["tensorboard"]).train()
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    names = set(events.Tags()["scalars"])
    assert {"diversity/summary/own_entropy", "diversity/summary/self_bleu", "train/diversity/own_entropy"} <= names
    assert not {"diversity/entropy", "train/diversity/entropy"} & names
    assert [each.step for each in events.Scalars("diversity/summary/own_entropy")] == [0, 2, 4]


def test_what_wandb_logs_offline(tokenizer, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monitored_trainer(tokenizer, tmp_path / "run", report_to=["wandb"]).train()
    keys = set(dict(wandb.run.summary))
    wandb.finish()
    wanted = {"diversity/summary/own_entropy", "diversity/summary/self_bleu", "diversity/samples"}
    assert wanted | {"train/diversity/own_entropy", "train/diversity/intervals/own_entropy_low"} <= keys
    assert "train/diversity/entropy" not in keys


def test_a_trackio_that_was_not_opened_gets_nothing(monkeypatch, tmp_path):
    trackio = pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    with pytest.raises(RuntimeError, match="init"):
        trackio.log({"loss": 1.0})
    track(reporting_to("trackio"), ROW, GROUPS)


def test_what_trackio_logs(tokenizer, tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    rows, log = [], trackio.log
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    monkeypatch.setattr(trackio, "log", lambda row, **more: (rows.append(row), log(row, **more)))
    monitored_trainer(tokenizer, tmp_path / "run", report_to=["trackio"]).train()
    ours = [row for row in rows if "diversity/summary/own_entropy" in row]
    assert [row["train/global_step"] for row in ours] == [0, 2, 4]
    assert all(isinstance(row["diversity/samples"], trackio.Table) for row in ours)
