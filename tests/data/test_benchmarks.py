"""The table of benchmarks, and rows of each one's schema from local copies."""

import pytest
from benchmark_rows import ROWS, write_copy
from datasets import Dataset

from aesl_trl.arguments import parse
from aesl_trl.data import benchmarks
from aesl_trl.data.benchmarks import BENCHMARKS, PROMPT, load_benchmark
from aesl_trl.errors import InputError
from aesl_trl.evaluation.evaluate import ARGUMENT_TYPES
from aesl_trl.recipes.recipes import recipes_dir
from aesl_trl.rewards.grading import SHARED_GRADERS, Answer


SOLUTIONS = {
    "GSM8K": [r"\boxed{36}", r"\boxed{1200}"],
    "AIME24": [r"\boxed{042}", r"\boxed{081}"],
    "AIME25": [r"\boxed{128}", r"\boxed{2}"],
    "AMC23": [r"\boxed{27}", r"\boxed{14}"],
    "MATH-500": [r"\boxed{\frac{3}{4}}", r"\boxed{\text{Evelyn}}"],
    "Minerva": [r"\boxed{4.5e33}", r"\boxed{m v^2 / 2}"],
    "OlympiadBench": [r"\boxed{2}", r"\boxed{-1, 5}"],
}


@pytest.mark.parametrize("path", sorted(recipes_dir().glob("*/eval.yaml")), ids=lambda path: path.parent.name)
def test_the_recipes_can_be_read(path):
    (args,) = parse(ARGUMENT_TYPES, ["--config", str(path)], prog="aesl eval")
    assert args.benchmarks == list(dict.fromkeys(args.benchmarks)) if args.benchmarks else args.dataset_name


def test_the_table_says_where_everything_was_read():
    assert list(BENCHMARKS) == ["GSM8K", "AIME24", "AIME25", "AMC23", "MATH-500", "Minerva", "OlympiadBench"]
    for benchmark in BENCHMARKS.values():
        assert benchmark.read_at and all(page.startswith("https://") for page in benchmark.read_at)
        assert "{problem}" in benchmark.prompt and benchmark.hub.count("/") == 1


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_local_copy_gives_prompts_and_gold_answers(tmp_path, name, suffix):
    rows, source = load_benchmark(name, data_dir=write_copy(tmp_path / "copies", name, suffix=suffix))
    column = BENCHMARKS[name].problem
    expected = [[{"role": "user", "content": PROMPT.replace("{problem}", row[column])}] for row in ROWS[name]]
    assert [row["prompt"] for row in rows] == expected
    assert [row["solution"] for row in rows] == SOLUTIONS[name]
    assert source["hub"] == BENCHMARKS[name].hub and source["read_from"].endswith(f"{name}{suffix}")


def test_a_copy_is_known_by_its_contents_whatever_its_form(tmp_path):
    texts = [
        load_benchmark("AIME25", data_dir=write_copy(tmp_path / s, "AIME25", suffix=f".{s}"))
        for s in ("jsonl", "parquet")
    ]
    changed = write_copy(tmp_path / "other", "AIME25", [{"problem": "other", "answer": "2"}, *ROWS["AIME25"][1:]])
    hashes = [source["sha256"] for _, source in (*texts, load_benchmark("AIME25", data_dir=changed))]
    assert hashes[0] == hashes[1] != hashes[2]


def test_each_gold_answer_is_right_against_itself():
    """What the table makes of an answer is something that the grader can read."""
    pytest.importorskip("math_verify")
    golds = [gold for solutions in SOLUTIONS.values() for gold in solutions]
    grades = SHARED_GRADERS.grade([Answer("math_reward", gold, gold) for gold in golds], 10.0)
    assert [grade.reward for grade in grades] == [1.0] * len(golds)


def test_prompts_can_be_replaced(tmp_path):
    folder = write_copy(tmp_path / "copies", "AMC23")
    rows, _ = load_benchmark("AMC23", data_dir=folder, num=1, template="Q: {problem} A:", system="Be brief.")
    question = {"role": "user", "content": "Q: How many {a, b}? A:"}
    assert [row["prompt"] for row in rows] == [[{"role": "system", "content": "Be brief."}, question]]
    rows, _ = load_benchmark("AMC23", data_dir=folder, num=1, template="Q: {problem} A:", as_chat=False)
    assert rows[0]["prompt"] == "Q: How many {a, b}? A:"


@pytest.mark.parametrize(
    ("name", "value", "gold"),
    [
        ("AIME25", 7, "7"),
        ("AIME25", 7.0, "7"),
        ("AIME25", 7.5, "7.5"),
        ("AIME25", True, None),
        ("AIME25", " ", None),
        ("AIME25", None, None),
        ("Minerva", "-2.5E-7", "-2.5E-7"),
        ("GSM8K", "#### 1,234", "1234"),
        ("Minerva", "x e2", "x e2"),
        ("GSM8K", "no marker 5", None),
        ("GSM8K", "#### ", None),
        ("GSM8K", 5, None),
        ("OlympiadBench", ["$1$", "$2$"], "1, 2"),
        ("OlympiadBench", "3", "3"),
        ("OlympiadBench", [], None),
        ("OlympiadBench", ["$1$", ""], None),
        ("OlympiadBench", None, None),
    ],
)
def test_gold_answers(name, value, gold):
    assert BENCHMARKS[name].gold(value) == gold


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a", "answer": "1"}], "no column 'problem'.* it needs problem and answer, its columns are"),
        ([{"problem": "a", "answers": "1"}], "no column 'answer'; did you mean 'answers'"),
        (
            [{"problem": "a", "answer": "1"}, {"problem": " ", "answer": "1"}],
            r"row 1 \(from 0\): problem holds no text",
        ),
        ([{"problem": "a", "answer": "1"}, {"problem": "b", "answer": None}], r"row 1 \(from 0\): no gold answer"),
        ([], "is empty"),
    ],
)
def test_a_copy_that_cannot_be_used_is_one_line(tmp_path, rows, message):
    folder = write_copy(tmp_path / "copies", "AIME24", rows)
    with pytest.raises(InputError, match=message) as caught:
        load_benchmark("AIME24", data_dir=folder)
    assert "\n" not in str(caught.value) and "AIME24" in str(caught.value)


def test_a_missing_copy_names_what_is_there(tmp_path):
    folder = write_copy(tmp_path / "copies", "AIME24")
    with pytest.raises(
        InputError, match="no copy of AIME25: AIME25.jsonl or .parquet is needed, it holds AIME24.jsonl"
    ):
        load_benchmark("AIME25", data_dir=folder)
    with pytest.raises(InputError, match="data_dir: .* is not a folder"):
        load_benchmark("AIME25", data_dir=str(tmp_path / "nowhere"))


def test_a_hub_that_cannot_be_reached_is_one_line_with_its_name(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'math-ai/amc23' on the Hub\n(no route)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match="AMC23: math-ai/amc23 cannot be loaded from the hub .*data_dir") as caught:
        load_benchmark("AMC23")
    assert "\n" not in str(caught.value)


def test_the_hub_is_asked_for_what_the_table_says(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, name, *, split, streaming):
        asked.append((path, name, split))
        return Dataset.from_list(next(rows for key, rows in ROWS.items() if BENCHMARKS[key].hub == path))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    solutions = [[row["solution"] for row in load_benchmark(name)[0]] for name in BENCHMARKS]
    assert solutions == list(SOLUTIONS.values())
    assert asked[0] == ("openai/gsm8k", "main", "test")
    assert asked[-1] == ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["AIME26"], "unknown benchmark 'AIME26'; did you mean 'AIME2[45]'"),
        (["gsm8k"], "did you mean 'GSM8K'"),
        (["AIME24", "AIME24"], "AIME24 is named twice"),
    ],
)
def test_names(names, message):
    with pytest.raises(InputError, match=message):
        benchmarks.check_names(names)
