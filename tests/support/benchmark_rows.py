"""Rows of each benchmark, and a folder with a copy of them."""

import json

from datasets import Dataset


# Two rows of each benchmark's columns; the problems are made up.
ROWS = {
    "GSM8K": [
        {"question": "Three dozen eggs?", "answer": "3 * 12 = <<3*12=36>>36\n#### 36"},
        {"question": "Half of $2,400?", "answer": "It is 1,200.\n#### 1,200"},
    ],
    "AIME24": [
        {"id": 60, "problem": "Find $6 \\cdot 7$.", "solution": "...", "answer": "042", "url": "", "year": "2024"},
        {"id": 61, "problem": "Find $9^2$.", "solution": "...", "answer": "081", "url": "", "year": "2024"},
    ],
    "AIME25": [
        {"problem": "Find $2^7$.", "answer": "128", "id": "0"},
        {"problem": "$1+1$?", "answer": "2", "id": "1"},
    ],
    "AMC23": [
        {"id": 0, "question": "How many {a, b}?", "answer": "27", "url": ""},
        {"id": 1, "question": "Half?", "answer": "14", "url": ""},
    ],
    "MATH-500": [
        {"problem": "$1/2+1/4$?", "answer": "\\frac{3}{4}", "subject": "Algebra", "level": 2, "unique_id": "a"},
        {"problem": "Who?", "answer": "\\text{Evelyn}", "subject": "Algebra", "level": 2, "unique_id": "b"},
    ],
    "Minerva": [
        {"question": "Luminosity in erg/s?", "answer": "4.5e33"},
        {"question": "Momentum?", "answer": "m v^2 / 2"},
    ],
    "OlympiadBench": [
        {"question": "Find x.", "final_answer": ["$2$"], "unit": None, "is_multiple_answer": False},
        {"question": "Find all x.", "final_answer": ["$-1$", "$5$"], "unit": None, "is_multiple_answer": True},
    ],
}


def write_copy(folder, name, rows=None, suffix=".jsonl"):
    """Write a local copy of a benchmark, and return its folder."""
    folder.mkdir(exist_ok=True)
    rows = ROWS[name] if rows is None else rows
    if suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(folder / f"{name}.parquet"))
    else:
        (folder / f"{name}{suffix}").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)
