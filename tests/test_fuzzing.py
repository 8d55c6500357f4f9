"""Files that nobody thought of: a config, a dataset or a run is read or refused in one line, and no more happens.

Each example spoils one value, key or stretch of text of a file that works. The slow forms try thousands.
"""

import contextlib
import copy
import json
import random
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_runs import fake_run, readiness
from small_chains import chain_project
from small_compare import compare_project

from aesl_trl import files
from aesl_trl.arguments import load_config
from aesl_trl.chain import config as chain_config
from aesl_trl.compare import config as compare_config
from aesl_trl.data.config import DataArguments
from aesl_trl.data.rows import load_rows
from aesl_trl.diversity.selection import RULES, select_run
from aesl_trl.errors import exit_on_input_error
from aesl_trl.evaluation.evaluate import EvalArguments
from aesl_trl.models.source import find_source
from aesl_trl.report import report
from aesl_trl.training.config import AESLSFTConfig


FEW = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
MANY = settings(FEW, max_examples=3000, derandomize=False)
# What no library writes: these marks stand for texts that only a file can hold.
RAW = {'"@digits@"': "9" * 5000, '"@deep@"': "[" * 20_000 + "]" * 20_000, '"@nan@"': "NaN", '"@cut@"': '"'}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from(
        [-1, 2**32, 10**30, -(10**400), 1e308, "@digits@", "@deep@", "@nan@", "@cut@", "..", "/", "~x", ""]
    ),
    st.floats(),
    st.text(),
    st.text(alphabet="\x00\x1b\u202e\ud83d\n\t:{}[]&*!|>'\"%@`#-", max_size=8),
    st.text(alphabet="ab", min_size=250, max_size=300),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


def spoilt(value, new, rng: random.Random):
    """Return a copy of nested `value` with one item of it, or one key, replaced by `new`, or taken out."""
    value = copy.deepcopy(value)
    place, parent = value, None
    while isinstance(place, dict | list) and place and (parent is None or rng.random() < 0.8):
        parent, key = place, rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        place = place[key]
    if parent is None:
        return new
    if isinstance(parent, dict) and rng.random() < 0.3:
        kept = parent.pop(key)
        if rng.random() < 0.5:
            parent[str(new)] = kept
    else:
        parent[key] = new
    return value


def as_text(value) -> str:
    text = json.dumps(value)
    for mark, raw in RAW.items():
        text = text.replace(mark, raw)
    return text


def cut_or_mixed(text: str, rng: random.Random) -> str:
    """Return `text`, now and then without its end or with a stretch of it twice."""
    first, last = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    return rng.choice([text] * 6 + [text[:last], text[:last] + text[first:]])


def held(run) -> int:
    """Call `run` as a command does: it returns, or it leaves with the code of one line."""
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aesl_trl.errors.say", said.append)
        try:
            exit_on_input_error("aesl", run)
        except SystemExit as leaving:
            assert leaving.code in (1, 2, 3) and len(said) == 1 and "\n" not in said[0]
            assert len(said[0]) < 5000
            return leaving.code
    return 0


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


# ---- Configs


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a folder with working configs, and what each says: a chain, a comparison, an evaluation, data, SFT."""
    folder = tmp_path_factory.mktemp("configs")
    tune = {"seeds": [7], "grid": {"learning_rate": [0.1, 0.2]}, "keep": 1}
    compared = json.loads(json.dumps(yaml.safe_load(compare_project(folder)(tune=tune).read_text())))
    shutil.rmtree(folder / "base")
    chain = yaml.safe_load(chain_project(folder)(selection={"rule": "last"}, report={"compare": []}).read_text())
    env = {"OMP_NUM_THREADS": "1"}
    sampled = {"dataset_name": "rows.jsonl", "reward_funcs": ["a", "b"], "samples": 8, "seed": 3, "env": env}
    data = {"dataset_name": "rows.jsonl", "output_dir": "data", "subsets": [3], "decontaminate": ["AIME24"]}
    sft = {"dataset_name": "rows.jsonl", "max_steps": 3, "learning_rate": 1e-5, "model_init_kwargs": {"a": [1]}}
    return folder, {"chain": chain, "compare": compared, "eval": sampled, "data": data, "sft": sft}


def read(kind: str, path: Path):
    readers = {"chain": chain_config.read_config, "compare": compare_config.read_config}
    types = {"eval": EvalArguments, "data": DataArguments, "sft": AESLSFTConfig}
    return readers[kind](path) if kind in readers else load_config(path, [types[kind]])


def check_config(project, kind, new, rng):
    folder, values = project
    path = folder / f"fuzzed_{kind}.yaml"
    value = values[kind] if rng.random() < 0.02 else spoilt(values[kind], new, rng)
    # JSON is YAML, too, but for its escapes of lone surrogates
    text = as_text(value) if rng.random() < 0.5 else yaml.safe_dump(value, allow_unicode=True)
    path.write_text(cut_or_mixed(text, rng), encoding="utf-8", errors="surrogatepass")
    before = tree(folder)
    held(lambda: read(kind, path))
    assert tree(folder) == before


KINDS = st.sampled_from(["chain", "compare", "eval", "data", "sft"])


@FEW
@given(kind=KINDS, new=VALUES, rng=st.randoms())
def test_any_config_is_read_or_refused(project, kind, new, rng):
    check_config(project, kind, new, rng)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@MANY
@given(kind=KINDS, new=VALUES, rng=st.randoms())
def test_thousands_of_configs(project, kind, new, rng):
    check_config(project, kind, new, rng)


# ---- Rows


ROW = {
    "prompt": [{"role": "user", "content": "1 + 1"}],
    "completion": "2",
    "solution": "$2$",
    "tags": ["a"],
    "level": 3,
}


@pytest.fixture(scope="module")
def rows_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield tmp_path_factory.mktemp("rows")


def check_rows(folder, new, rng):
    path = folder / f"rows{rng.randrange(2**60)}.jsonl"
    text = "".join(as_text(row) + "\n" for row in (ROW, spoilt(ROW, new, rng), ROW))
    path.write_text(cut_or_mixed(text, rng), encoding="utf-8", errors="surrogatepass")
    try:
        held(lambda: list(load_rows(str(path))))
        held(lambda: files.read_rows(path, ("prompt",)))
        assert list(folder.iterdir()) == [path]
    finally:
        path.unlink()


@settings(FEW, max_examples=8)  # the library takes a tenth of a second for each
@given(new=VALUES, rng=st.randoms())
def test_any_rows_are_read_or_refused(rows_folder, new, rng):
    check_rows(rows_folder, new, rng)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(MANY, max_examples=500)
@given(new=VALUES, rng=st.randoms())
def test_hundreds_of_rows(rows_folder, new, rng):
    check_rows(rows_folder, new, rng)


# ---- Runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a small run with every file that a reader looks at, beside a folder of somebody else."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "others").mkdir()
    (folder / "others/thesis.txt").write_text("mine")
    run = fake_run(folder / "run", "nll_turning_point")
    files.write_json(run / files.READINESS, {"checkpoints": [readiness(20, 0.5)]})
    for step in (10, 20, 40, 800):
        (run / f"sft/candidates/step-{step}").mkdir(parents=True)
    files.write_json(run / files.SELECTED / "config.json", {"model_type": "qwen2", "quantization_config": None})
    files.write_bytes(run / files.SELECTED / "model.safetensors", (2).to_bytes(8, "little") + b"{}")
    for path in run.rglob("*.png"):
        path.unlink()
    return run


def check_run(run, new, rng):
    paths = sorted(path for path in run.rglob("*.json*") if not path.name.startswith("report"))
    path = rng.choice(paths)
    before, text = path.read_bytes(), path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        lines = text.splitlines()
        number = rng.randrange(len(lines))
        lines[number] = as_text(spoilt(json.loads(lines[number]), new, rng))
        text = "\n".join(lines) + "\n"
    else:
        text = as_text(spoilt(json.loads(text), new, rng))
    path.write_text(cut_or_mixed(text, rng), encoding="utf-8", errors="surrogatepass")
    out = run.parent / "selected"
    others = tree(run.parent / "others")
    try:
        rule = rng.choice([None, *RULES])
        with contextlib.redirect_stdout(None):
            held(lambda: select_run(run, out=out, rule=rule))
            held(lambda: report.write_report([run], output=out))
            held(lambda: find_source(run).is_quantized)
    finally:
        path.write_bytes(before)
        shutil.rmtree(out, ignore_errors=True)
    assert tree(run.parent / "others") == others
    assert sorted(item.name for item in run.parent.iterdir()) == ["others", "run"]


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(report, "svg", lambda panel, name: "")
    monkeypatch.setattr(report, "png", lambda panels: b"")


@FEW
@given(new=VALUES, rng=st.randoms())
def test_any_run_is_read_or_refused(run, undrawn, new, rng):
    check_run(run, new, rng)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@MANY
@given(new=VALUES, rng=st.randoms())
def test_thousands_of_runs(run, undrawn, new, rng):
    check_run(run, new, rng)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(MANY, max_examples=40)
@given(new=VALUES, rng=st.randoms())
def test_runs_with_their_plots(run, new, rng):
    check_run(run, new, rng)
