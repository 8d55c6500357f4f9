"""The hours of a chain: what a finished stage measured wins over the arithmetic, and each is labelled."""

import shutil
from pathlib import Path

import pytest
from stand_ins import RECIPES

from aesl_trl.chain.config import read_config
from aesl_trl.chain.hours import COUNTED, chain_hours, hours_lines
from aesl_trl.chain.stages import Chain
from aesl_trl.errors import InputError
from aesl_trl.estimates.facts import promised_files
from aesl_trl.estimates.hours import Span


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A copy of the first recipe, with the files that `aesl data` would write, which are empty."""
    folder = tmp_path_factory.mktemp("hours")
    shutil.copytree(RECIPES / "accelerate_configs", folder / "accelerate_configs")
    copy = Path(shutil.copytree(RECIPES / "Qwen2.5-1.5B-Instruct", folder / "Qwen2.5-1.5B-Instruct"))
    for path in map(Path, promised_files(copy)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return copy


def chain_in(path, folder):
    chain = Chain(read_config(path, output_dir=str(folder)), path)
    chain.read_record()
    return chain


def test_a_finished_stage_wins_over_the_arithmetic(recipe, tmp_path):
    chain = chain_in(recipe / "chain.yaml", tmp_path)
    before = chain_hours(chain, chain.path)
    assert [*before] == [*COUNTED] and not any(time.measured for time in before.values())
    chain.note("grpo", status="done", seconds=7200.0)
    chain.note("eval", status="failed", seconds=1.0)  # says nothing about a whole evaluation
    after = chain_hours(chain, chain.path)
    assert after["grpo"].measured and after["grpo"].seconds == Span(7200, 7200)
    assert {name: time for name, time in after.items() if name != "grpo"} == {
        name: time for name, time in before.items() if name != "grpo"
    }
    lines = hours_lines(chain, chain.path)
    assert lines[0] == "time by stage, RTX 4090 to RTX 3090:"
    assert "  grpo   2.0 h (measured)" in lines and lines[1].endswith("measuring (estimated)")
    assert lines[-1].startswith("time in all: ") and "no GPU has measured it" in lines[-1]


def test_the_whole_is_the_sum_of_its_stages(recipe, tmp_path):
    found = chain_hours(chain_in(recipe / "chain.yaml", tmp_path), recipe / "chain.yaml")
    whole = sum((time.seconds for time in found.values()), Span())
    assert str(whole) in hours_lines(chain_in(recipe / "chain.yaml", tmp_path), recipe / "chain.yaml")[-1]
    without = chain_hours(chain_in(recipe / "chain_base.yaml", tmp_path), recipe / "chain_base.yaml")
    assert [*without] == ["probe", "grpo", "eval"] and without["grpo"] == found["grpo"]


def test_a_cpus_time_is_measured_only(tmp_path):
    chain = chain_in(RECIPES / "skills-tiny" / "chain.yaml", tmp_path)
    (line,) = hours_lines(chain, chain.path)
    assert line == "time not estimated: a CPU's time is not estimated, only measured"
    for name, seconds in zip(COUNTED, (60.0, 30.0, 120.0, 30.0), strict=True):
        chain.note(name, status="done", seconds=seconds)
    first, *stages, whole = hours_lines(chain, chain.path)
    assert first == "time of the last run:" and whole == "time in all: 4 min (measured)"
    assert stages[0] == "  sft    1 min (measured)"


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("# 1 x 24 GB", "# 1 x 23 GB", "no card of 23 GB is known"),
        ("# 1 x 24 GB", "# GPU", "names no hardware"),
    ],
)
def test_what_nothing_tells_is_one_line(recipe, tmp_path, old, new, part):
    path = recipe / "chain_other.yaml"
    path.write_text((recipe / "chain.yaml").read_text().replace(old, new))
    (line,) = hours_lines(chain_in(path, tmp_path), path)
    assert line.startswith("time not estimated: ") and part in line
    with pytest.raises(InputError):
        chain_hours(chain_in(path, tmp_path), path)
    path.unlink()
