"""rows: every form of a dataset's name, and one line for each dataset that cannot be loaded."""

import json

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from refusals import refused

from aesl_trl.data.checks import check_demonstrations
from aesl_trl.data.rows import load_rows
from aesl_trl.errors import InputError


ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(5)]


@pytest.fixture
def jsonl(tmp_path):
    def write(text: str | bytes, name: str = "rows.jsonl"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_local_files(suffix, streaming, tmp_path):
    path = tmp_path / f"rows{suffix}"
    writer = {".parquet": Dataset.to_parquet, ".csv": Dataset.to_csv}.get(suffix, Dataset.to_json)
    writer(Dataset.from_list(ROWS), str(path))
    rows = load_rows(path.name, base_dir=tmp_path, streaming=streaming)
    assert list(rows) == ROWS
    assert isinstance(rows, IterableDataset) is streaming


def test_split_of_a_file(jsonl, tmp_path):
    jsonl(lines(ROWS))
    assert list(load_rows("rows.jsonl", split="train[:2]", base_dir=tmp_path)) == ROWS[:2]
    refused(
        ["eval_dataset_name", "rows.jsonl", "tset"],
        load_rows,
        "rows.jsonl",
        split="tset",
        base_dir=tmp_path,
        field="eval_dataset_name",
    )


def test_folder_of_files(jsonl, tmp_path):
    jsonl(lines(ROWS), "train.jsonl")
    assert list(load_rows(str(tmp_path))) == ROWS


def test_saved_to_disk(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])).save_to_disk(str(tmp_path / "two"))
    assert list(load_rows(str(tmp_path / "one"))) == ROWS
    assert list(load_rows(str(tmp_path / "two"), split="test")) == ROWS[:1]
    refused(["two", "unknown split 'dev'", "train, test"], load_rows, str(tmp_path / "two"), split="dev")


def test_function(jsonl, tmp_path):
    jsonl("SEP = ':'\n", "neighbour_of_make.py")
    jsonl(
        "from neighbour_of_make import SEP\n"
        "def rows(seed):\n    return [{'prompt': f'{seed}{SEP}{i}'} for i in range(3)]\n"
        "def none(seed):\n    return []\n"
        "def number(seed):\n    return 3\n"
        "def noseed():\n    return []\n",
        "make.py",
    )
    rows = load_rows("make.py:rows", seed=7, base_dir=tmp_path)
    assert list(rows) == [{"prompt": f"7:{i}"} for i in range(3)]
    assert isinstance(load_rows("make.py:rows", streaming=True, base_dir=tmp_path), IterableDataset)
    refused(["make.py has no function 'row'", "'rows'"], load_rows, "make.py:row", base_dir=tmp_path)
    refused(["make.py:none", "non-empty"], load_rows, "make.py:none", base_dir=tmp_path)
    refused(["make.py:number", "int"], load_rows, "make.py:number", base_dir=tmp_path)
    refused(["make.py:noseed", "seed"], load_rows, "make.py:noseed", base_dir=tmp_path)
    refused(["mak.py does not exist", "'make.py'"], load_rows, "mak.py:rows", base_dir=tmp_path)


def test_function_file_that_fails(jsonl, tmp_path):
    jsonl("import no_such_module_here\n", "broken_import.py")
    refused(["cannot be imported", "ModuleNotFoundError"], load_rows, "broken_import.py:f", base_dir=tmp_path)


def test_missing_names(jsonl, tmp_path):
    jsonl(lines(ROWS), "demonstrations.jsonl")
    refused(["'demonstrations.jsonl'", str(tmp_path)], load_rows, "demonstration.jsonl", base_dir=tmp_path)
    refused(["./none does not exist"], load_rows, "./none", base_dir=tmp_path)
    refused(["dataset_name is missing"], load_rows, None)
    jsonl("x", "rows.txt")
    refused(["rows.txt", ".jsonl"], load_rows, "rows.txt", base_dir=tmp_path)


def test_hub_name_that_cannot_be_reached(tmp_path):
    # Offline, as every test runs.
    refused(["dataset_name: no-such-org/no-such-rows cannot be loaded"], load_rows, "no-such-org/no-such-rows")


@pytest.mark.parametrize(
    "content, parts",
    [
        (b"", ["is empty"]),
        (b"\n\n", ["is empty"]),
        (b'{"text": "a"}\n{"text": \n', ["line 2 is not valid JSON"]),
        (b'{"text": "a"}\n\n{"text": "b"', ["line 3 is not valid JSON"]),
        (b'{"text": "a"}\n3\n', ["line 2 must be a JSON object, got int"]),
        (b'{"text": "a"}\n{"text": "\xff"}\n', ["line 2 is not UTF-8"]),
    ],
)
def test_broken_jsonl(content, parts, jsonl):
    path = jsonl(content)
    refused([*parts, str(path), "dataset_name"], load_rows, str(path))


def test_broken_jsonl_when_streaming(jsonl):
    path = jsonl(b'{"text": "a"}\n{"text": \n')
    with pytest.raises(InputError) as error:
        check_demonstrations(load_rows(str(path), streaming=True))
    assert "dataset_name" in str(error.value)


def test_broken_parquet(jsonl):
    path = jsonl(b"not parquet", "rows.parquet")
    refused([str(path), "cannot be loaded"], load_rows, str(path))
