"""What tests of data/ share: a cache of their own, and `aesl data` run on a few rows."""

from pathlib import Path

import pytest
import yaml
from small_problems import openr1_rows, write_rows

from aesl_trl.data import prepare


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def run(tmp_path, tiny_model_dir):
    """Run the command on the given rows, or on 60 of OpenR1's schema; return the folder. Keywords are settings.

    Grading is the slow part, so `verify` is off unless a test sets it.
    """

    def prepared(rows=None, *flags, **settings) -> Path:
        write_rows(tmp_path / "rows.jsonl", openr1_rows() if rows is None else rows)
        values = {
            "dataset_name": "rows.jsonl",
            "model_name_or_path": tiny_model_dir,
            "output_dir": "out",
            "num_demonstrations": 12,
            "num_held_out": 8,
        }
        values |= {"verify": False} | settings
        config = tmp_path / "data.yaml"
        config.write_text(yaml.safe_dump({key: value for key, value in values.items() if value != "unset"}))
        prepare.main(["--config", str(config), *flags])
        return tmp_path / values["output_dir"]

    return prepared
