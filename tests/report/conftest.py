"""A report that all tests of the room may read, and a way to leave the plots out."""

from pathlib import Path

import pytest
from report_runs import fake_run

from aesl_trl.report import report
from aesl_trl.report.report import write_report


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """A live AESL run with its report, laid over two seeds each of three recorded arms."""
    root = tmp_path_factory.mktemp("chain")
    live = fake_run(root / "runs/aesl", "aesl", weights=True)
    arms = ("base", "nll_last", "nll_turning_point")
    recorded = [fake_run(root / f"results/{arm}/seed-{seed}", arm, seed) for arm in arms for seed in (0, 1)]
    write_report([live], recorded)
    return live


@pytest.fixture
def undrawn(monkeypatch):
    """Leave the plots out where only the texts matter: other tests draw them."""
    monkeypatch.setattr(report, "svg", lambda panel, name: "")
    monkeypatch.setattr(report, "png", lambda panels: b"")
