"""A copy of a recipe that a test may spoil."""

import shutil

import pytest
from stand_ins import RECIPES


@pytest.fixture
def recipe(tmp_path):
    """Copies of a recipe and the accelerate configs; `edit` replaces text in one file and returns its path."""

    def edit(name, old, new, of="Qwen2.5-1.5B-Instruct"):
        if not (tmp_path / of).exists():
            shutil.copytree(RECIPES / of, tmp_path / of)
            shutil.copytree(RECIPES / "accelerate_configs", tmp_path / "accelerate_configs")
        path = tmp_path / of / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        return path

    return edit
