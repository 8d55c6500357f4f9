"""demonstrations: the first that can serve are taken, and chat templates that would spoil them are refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_problems import problems_in
from tiny_models import build_tokenizer

from aesl_trl.data.demonstrations import choose_demonstrations, keep_gradable
from aesl_trl.data.problems import Drops, Problem
from aesl_trl.errors import InputError
from aesl_trl.rewards.functions import load_reward_funcs
from aesl_trl.rewards.grading import SHARED_GRADERS, Grade


@given(st.lists(st.booleans(), min_size=1, max_size=300), st.integers(1, 100))
def test_demonstrations_that_cannot_serve_stay_for_rl(serves, num):
    read = [Problem(row, str(row), str(row), "$1$") for row in range(len(serves))]
    drops = Drops()
    judge = lambda batch: [("text", "" if serves[p.row] else "too_long", "") for p in batch]  # noqa: E731
    taken = choose_demonstrations(read, num, judge, drops)
    good = [row for row, serving in enumerate(serves) if serving]
    assert [problem.row for problem, _ in taken] == good[:num]
    last = good[num - 1] if len(good) >= num else len(serves)
    assert [row["row"] for row in drops.rows] == [row for row in range(last) if not serves[row]]


def saved_tokenizer(folder, template, tiny_model_dir) -> str:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text((Path(tiny_model_dir) / "config.json").read_text())
    return str(folder)


USUAL = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ TEXT }}<|im_end|>\n{% endfor %}"
GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no system role') }}", r"row \d+ .* the chat template refuses it: no system role"),
        (
            USUAL.replace("TEXT", "m['content'].split('</think>')[-1]") + GENERATION,
            "the chat template leaves out the reasoning",
        ),
        (
            USUAL.replace("TEXT", "m['content']") + GENERATION.replace("nt\n", "nt\n<think>\n\n"),
            "writes another prompt",
        ),
    ],
)
def test_templates_that_would_spoil_the_data(template, message, run, tmp_path, tiny_model_dir):
    (tmp_path / "model").mkdir()
    model = saved_tokenizer(tmp_path / "model", template, tiny_model_dir)
    with pytest.raises(InputError, match=message) as error:
        run(model_name_or_path=model)
    assert "\n" not in str(error.value)


def test_a_template_may_trim_an_answer(run, tmp_path, tiny_model_dir):
    (tmp_path / "model").mkdir()
    template = USUAL.replace("TEXT", "m['content'] | trim") + GENERATION
    out = run(model_name_or_path=saved_tokenizer(tmp_path / "model", template, tiny_model_dir))
    assert len(problems_in(out / "sft.jsonl")) == 12


def test_solutions_that_no_answer_can_earn_are_said(monkeypatch):
    lost = {"$b$"}
    grade = lambda answers, deadline_s: [Grade(float(answer.solution not in lost)) for answer in answers]  # noqa: E731
    monkeypatch.setattr(SHARED_GRADERS, "grade", grade)
    read, (reward,) = (
        [Problem(row, text, text, f"${text}$") for row, text in enumerate("abc")],
        load_reward_funcs(["math_reward"]),
    )
    with pytest.warns(UserWarning, match=r"dataset_name: 1 of 3 golds .* with math_reward.* such as \$b\$"):
        assert [problem.row for problem in keep_gradable(read, reward, 1.0, Drops())] == [0, 2]
    lost.add("$c$")
    with pytest.raises(InputError, match="2 of 3 golds"):
        keep_gradable(read, reward, 1.0, Drops())
