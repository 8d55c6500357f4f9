"""Fixtures that the tests of comparisons share."""

import sys

import pytest
import small_compare

from aesl_trl.chain import chain as chains
from aesl_trl.compare import compare


@pytest.fixture
def project(tmp_path):
    return small_compare.compare_project(tmp_path)


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    """Cells are chains of fake stages, here and in the processes that are started."""
    (tmp_path / "runs").mkdir()
    monkeypatch.setenv("FAKE_ROOT", str(tmp_path / "runs"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # else torch is asked, which takes seconds to import
    monkeypatch.setattr(compare, "CHAIN", [sys.executable, small_compare.__file__])
    monkeypatch.setattr(compare, "check_in_child", lambda command, argv: None)
    monkeypatch.setattr(chains, "check_in_child", lambda command, argv: None)
    small_compare.install()
    yield tmp_path / "runs"
    small_compare.uninstall()
