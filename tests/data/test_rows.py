"""data: every form of a dataset's name, and one line for each that SFT or RL could not use."""

import json
import re

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import given
from hypothesis import strategies as st

from aesl_trl.data import checks as data_checks
from aesl_trl.data import rows as data
from aesl_trl.data.prompts import check_held_out, prompt_rows
from aesl_trl.errors import InputError


ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(5)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def jsonl(tmp_path):
    def write(text: str | bytes, name: str = "rows.jsonl"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refused(parts, call, *args, **kwargs):
    with pytest.raises(InputError) as error:
        call(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_local_files(suffix, streaming, tmp_path):
    path = tmp_path / f"rows{suffix}"
    writer = {".parquet": Dataset.to_parquet, ".csv": Dataset.to_csv}.get(suffix, Dataset.to_json)
    writer(Dataset.from_list(ROWS), str(path))
    rows = data.load_rows(path.name, base_dir=tmp_path, streaming=streaming)
    assert list(rows) == ROWS
    assert isinstance(rows, IterableDataset) is streaming


def test_split_of_a_file(jsonl, tmp_path):
    jsonl(lines(ROWS))
    assert list(data.load_rows("rows.jsonl", split="train[:2]", base_dir=tmp_path)) == ROWS[:2]
    refused(
        ["eval_dataset_name", "rows.jsonl", "tset"],
        data.load_rows,
        "rows.jsonl",
        split="tset",
        base_dir=tmp_path,
        field="eval_dataset_name",
    )


def test_folder_of_files(jsonl, tmp_path):
    jsonl(lines(ROWS), "train.jsonl")
    assert list(data.load_rows(str(tmp_path))) == ROWS


def test_saved_to_disk(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])).save_to_disk(str(tmp_path / "two"))
    assert list(data.load_rows(str(tmp_path / "one"))) == ROWS
    assert list(data.load_rows(str(tmp_path / "two"), split="test")) == ROWS[:1]
    refused(["two", "unknown split 'dev'", "train, test"], data.load_rows, str(tmp_path / "two"), split="dev")


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
    rows = data.load_rows("make.py:rows", seed=7, base_dir=tmp_path)
    assert list(rows) == [{"prompt": f"7:{i}"} for i in range(3)]
    assert isinstance(data.load_rows("make.py:rows", streaming=True, base_dir=tmp_path), IterableDataset)
    refused(["make.py has no function 'row'", "'rows'"], data.load_rows, "make.py:row", base_dir=tmp_path)
    refused(["make.py:none", "non-empty"], data.load_rows, "make.py:none", base_dir=tmp_path)
    refused(["make.py:number", "int"], data.load_rows, "make.py:number", base_dir=tmp_path)
    refused(["make.py:noseed", "seed"], data.load_rows, "make.py:noseed", base_dir=tmp_path)
    refused(["mak.py does not exist", "'make.py'"], data.load_rows, "mak.py:rows", base_dir=tmp_path)


def test_function_file_that_fails(jsonl, tmp_path):
    jsonl("import no_such_module_here\n", "broken_import.py")
    refused(["cannot be imported", "ModuleNotFoundError"], data.load_rows, "broken_import.py:f", base_dir=tmp_path)


def test_missing_names(jsonl, tmp_path):
    jsonl(lines(ROWS), "demonstrations.jsonl")
    refused(["'demonstrations.jsonl'", str(tmp_path)], data.load_rows, "demonstration.jsonl", base_dir=tmp_path)
    refused(["./none does not exist"], data.load_rows, "./none", base_dir=tmp_path)
    refused(["dataset_name is missing"], data.load_rows, None)
    jsonl("x", "rows.txt")
    refused(["rows.txt", ".jsonl"], data.load_rows, "rows.txt", base_dir=tmp_path)


def test_hub_name_that_cannot_be_reached(tmp_path):
    # Offline, as every test runs.
    refused(["dataset_name: no-such-org/no-such-rows cannot be loaded"], data.load_rows, "no-such-org/no-such-rows")


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
    refused([*parts, str(path), "dataset_name"], data.load_rows, str(path))


def test_broken_jsonl_when_streaming(jsonl):
    path = jsonl(b'{"text": "a"}\n{"text": \n')
    with pytest.raises(InputError) as error:
        data_checks.check_demonstrations(data.load_rows(str(path), streaming=True))
    assert "dataset_name" in str(error.value)


def test_broken_parquet(jsonl):
    path = jsonl(b"not parquet", "rows.parquet")
    refused([str(path), "cannot be loaded"], data.load_rows, str(path))


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a"},
        {"messages": CHAT},
        {"prompt": "", "completion": "c"},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"input_ids": [1, 2]},
        {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
        {"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]},
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_good_demonstrations(row, streaming):
    dataset = Dataset.from_list([row] * 3)
    data_checks.check_demonstrations(dataset.to_iterable_dataset() if streaming else dataset)


GOOD = {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize(
    "rows, parts",
    [
        ([GOOD, GOOD, {"prompt": "p", "completion": None}], ["row 2 (from 0)", "completion is missing"]),
        ([GOOD, {"prompt": "p", "completion": ""}], ["row 1", "completion is empty"]),
        ([GOOD, {"prompt": None, "completion": "c"}], ["row 1", "prompt is missing"]),
        ([{"prompt": "p", "completion": 3}], ["row 0", "completion is an int"]),
        ([{"prompt": CHAT[:1], "completion": "a"}], ["row 0", "prompt is a list of messages and completion text"]),
        ([{"prompt": CHAT[:1], "completion": []}], ["row 0", "completion is empty"]),
        ([{"messages": CHAT}, {"messages": CHAT[:1]}], ["row 1", "no assistant message"]),
        ([{"messages": CHAT}, {"messages": []}], ["row 1", "messages is empty"]),
        ([{"messages": [*CHAT, CHAT[0]]}], ["row 0", "messages ends with a message of the user"]),
        (
            [{"messages": [CHAT[0], {"role": "assistant", "content": ""}]}],
            ["row 0", "the last message of messages is"],
        ),
        (
            [{"messages": [{"role": "user", "content": None}, CHAT[1]]}],
            ["message 0 of messages (user) has no content"],
        ),
        ([{"prompt": [{"role": "user", "content": None}], "completion": CHAT[1:]}], ["message 0 of prompt (user)"]),
        ([{"text": " \n"}], ["row 0", "text is blank"]),
        ([GOOD, {"prompt": "p" * 2**22, "completion": "c"}], ["row 1", f"it has {2**22 + 1} characters"]),
        ([{"messages": [{"content": "q"}]}], ["row 0", "without a role"]),
        ([{"text": "a"}, {"text": ""}], ["row 1", "text is empty"]),
        ([{"text": "a"}, {"text": None}], ["row 1", "text is missing"]),
        ([{"prompt": "p", "completions": "c"}], ["needs", "its columns are prompt, completions", "'completion'"]),
        ([{"question": "p", "answer": "c"}], ["no demonstrations", "its columns are question, answer"]),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_demonstrations(rows, parts, streaming):
    dataset = Dataset.from_list(rows)
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    refused([*parts, "train_rows"], data_checks.check_demonstrations, dataset, field="train_rows")


def test_text_field():
    data_checks.check_demonstrations(Dataset.from_list([{"body": "a"}]), text_field="body")
    refused(["body"], data_checks.check_demonstrations, Dataset.from_list([{"text": "a"}]), text_field="body")


def test_empty_dataset():
    refused(["dataset_name is empty"], data_checks.check_demonstrations, Dataset.from_list([GOOD]).select([]))
    empty = IterableDataset.from_generator(lambda: iter(()))
    refused(["dataset_name is empty"], data_checks.check_demonstrations, empty)


def test_streaming_looks_at_the_first_rows_only():
    def endless():
        while True:
            yield GOOD

    data_checks.check_demonstrations(IterableDataset.from_generator(endless))


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_the_first_bad_row_is_named(good):
    dataset = Dataset.from_list([{"prompt": "p", "completion": "c" if ok else ""} for ok in good])
    if all(good):
        data_checks.check_demonstrations(dataset)
    else:
        message = refused(["completion is empty"], data_checks.check_demonstrations, dataset)
        assert int(re.search(r"row (\d+)", message).group(1)) == good.index(False)


def test_prompts():
    data_checks.check_prompts(Dataset.from_list([{"prompt": "p", "answer": 1}]))
    data_checks.check_prompts(Dataset.from_list([{"messages": CHAT}]))
    refused(["no prompts", "'prompt'"], data_checks.check_prompts, Dataset.from_list([{"prompts": "p"}]))
    refused(
        ["row 1", "prompt is empty"], data_checks.check_prompts, Dataset.from_list([{"prompt": "p"}, {"prompt": ""}])
    )


def test_trainable():
    data_checks.check_trainable(Dataset.from_list([{"labels": [-100, -100]}, {"labels": [-100, 5]}]), 2)
    lost = Dataset.from_list([{"labels": [-100, -100]}, {"labels": [7, -100]}])
    refused(["every row lost its completion to max_length=2"], data_checks.check_trainable, lost, 2)
    refused(["max_length=2"], data_checks.check_trainable, lost.select([]), 2)
    refused(["masks"], data_checks.check_trainable, lost, None)


def test_a_token_without_an_embedding():
    rows = Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3, 9], "labels": [3, 9]}])
    data_checks.check_trainable(rows, None, num_embeddings=10)
    data_checks.check_trainable(rows.select([0]), None, num_embeddings=3)
    refused(["token 9", "the model 9 embeddings"], data_checks.check_trainable, rows, None, num_embeddings=9)


@pytest.mark.parametrize("streaming", [False, True])
def test_prompts_that_are_trained_on(streaming):
    """Counted by prompt, whether it is a column or the beginning of a conversation."""

    def check(train, held_out):
        train = Dataset.from_list(train)
        prompts = prompt_rows(Dataset.from_list(held_out))
        check_held_out(train.to_iterable_dataset() if streaming else train, prompts, field="held_out")

    check(ROWS, [{"prompt": "p"}, {"prompt": "p0 "}])
    check([{"text": "p0"}], [{"prompt": "p0"}])
    parts = ["2 of 3 prompts of held_out are in dataset_name too", "the first is row 1 (from 0), 'p1'"]
    refused(parts, check, ROWS, [{"prompt": "q"}, {"prompt": "p1"}, {"prompt": "p4"}])
    other = [{"role": "user", "content": "r"}]
    refused(["1 of 2", "'q'"], check, [{"messages": CHAT}], [{"prompt": other}, {"prompt": CHAT[:1]}])
    check([{"messages": CHAT}], [{"messages": [*other, CHAT[1]]}])


def test_all_rows_truncated_by_trl(tiny_model_dir, tmp_path):
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_length=2, report_to="none")
    rows = Dataset.from_list([{"prompt": "a long prompt", "completion": "c"}] * 3)
    trainer = SFTTrainer(str(tiny_model_dir), args=args, train_dataset=rows)
    refused(["max_length=2"], data_checks.check_trainable, trainer.train_dataset, args.max_length)


def test_prompt_rows_from_prompts():
    rows = prompt_rows(Dataset.from_list([{"prompt": f"p{i}", "answer": i} for i in range(5)]), 2)
    assert rows == [{"prompt": "p0", "answer": 0}, {"prompt": "p1", "answer": 1}]


def test_prompt_rows_from_messages():
    system = {"role": "system", "content": "s"}
    tool = {"role": "assistant", "content": "x", "tool_calls": "t"}
    turns = [[system, *CHAT], [*CHAT, *CHAT], CHAT[:1], [CHAT[0], tool]]
    rows = prompt_rows(
        Dataset.from_list([{"messages": messages, "answer": 1} for messages in turns]).to_iterable_dataset()
    )
    assert [row["prompt"] for row in rows] == [[system, CHAT[0]], [*CHAT, CHAT[0]], CHAT[:1], CHAT[:1]]
    assert all(row["answer"] == 1 and "messages" not in row for row in rows)


def test_prompt_rows_refuses():
    refused(["has no rows"], prompt_rows, Dataset.from_list([GOOD]).select([]), 3)
    refused(["no prompts", "text"], prompt_rows, Dataset.from_list([{"text": "a"}]), 3)
