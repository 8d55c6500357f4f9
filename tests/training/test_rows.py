"""rows: what TRL makes of a row, and what samples and RL start from, is what the data say."""

import copy
import json
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from small_runs import trainer_for
from tiny_vision import vision_language_model

from aesl_trl.data.rows import load_rows, with_json_text
from aesl_trl.errors import InputError
from aesl_trl.models.handoff_checks import encode
from aesl_trl.models.tokens import prompt_ids
from aesl_trl.sampling.draws import Draw
from aesl_trl.sampling.groups import sample_groups
from aesl_trl.training.grpo import build_trainer, trainer_class


ASK, ANSWER = {"role": "user", "content": "Do."}, {"role": "assistant", "content": "ok"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}
START, EMPTY_THOUGHT = "<|im_start|>user\nDo.<|im_end|>\n<|im_start|>assistant\n", "<think>\n\n</think>\n\n"


def calls(name, **arguments):
    return [{"type": "function", "function": {"name": name, "arguments": arguments}}]


def calling(name, **arguments):
    return {"messages": [ASK, {"role": "assistant", "tool_calls": calls(name, **arguments)}]}


@pytest.fixture(scope="module")
def written_by(tokenizer):
    """Return the tokenizer with one of TRL's bundled templates."""

    def with_template(name):
        other = copy.deepcopy(tokenizer)
        other.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
        return other

    return with_template


def trained(tokenizer, folder, rows, **changes):
    trainer = trainer_for(tokenizer, folder, rows=rows, **changes)
    return [tokenizer.decode(row["input_ids"]) for row in trainer.train_dataset]


def test_calls_are_trained_as_they_were_written(written_by, tmp_path):
    """Arrow merges the arguments of different tools; a null among them is not trained."""
    rows = [calling("add", a=1.68, b=2), calling("weather", city="Rome")]
    for text in trained(written_by("qwen2_5"), tmp_path, Dataset.from_list(rows)):
        assert "null" not in text and "None" not in text and '\\"' not in text
    (tmp_path / "calls.py").write_text(f"def rows(seed):\n    return {rows!r}\n")
    found = trained(written_by("qwen2_5"), tmp_path, load_rows(str(tmp_path / "calls.py:rows")))
    assert '{"name": "add", "arguments": {"a": 1.68, "b": 2}}' in found[0] + found[1]


def test_a_null_that_a_function_writes_is_trained(written_by, tmp_path):
    rows = [calling("add", a=None, b=float("1.6800000000000002"))]
    (tmp_path / "calls.py").write_text(f"def rows(seed):\n    return {rows!r}\n")
    (text,) = trained(written_by("qwen2_5"), tmp_path, load_rows(str(tmp_path / "calls.py:rows")))
    assert '"arguments": {"a": null, "b": 1.6800000000000002}' in text


def test_roles_of_sharegpt_are_trained_as_those_of_rl(written_by, tmp_path):
    turns = [{"from": "human", "value": "Do."}, {"from": "gpt", "value": "ok"}]
    rows = Dataset.from_list([{"conversations": turns}])
    assert START + "ok<|im_end|>" in trained(written_by("qwen2_5"), tmp_path, rows)[0]
    both = Dataset.from_list([{"conversations": turns, "messages": [{**ASK, "content": "Other."}, ANSWER]}])
    assert "user\nOther.<|im_end|>" in trained(written_by("qwen2_5"), tmp_path, both)[0]


def test_rows_with_and_without_keywords(written_by, tmp_path):
    row = {"messages": [ASK, {"role": "user", "content": "Now."}, ANSWER]}
    rows = Dataset.from_list([{**row, "chat_template_kwargs": {"add_vision_id": True}}, row])
    assert len(trained(written_by("qwen3"), tmp_path, rows)) == 2


def test_a_trainer_of_ones_own_names_the_row(written_by, tmp_path):
    thought = {"role": "assistant", "content": "<think>Thought1</think>ok"}
    rows = Dataset.from_list([{"messages": [ASK, ANSWER]}, {"messages": [ASK, thought]}])
    with pytest.raises(InputError, match=r"the train dataset, row 1 .* leaves out the reasoning"):
        trainer_for(written_by("deepseek_r1_distill"), tmp_path, rows=rows)


class Noting:
    """An engine that notes the prompts, and draws one token."""

    name, batch_size = "noting", 1

    def draw(self, request):
        self.prompts = request.prompts
        return [Draw([65], True, 1.0, 1.0, 1.0) for _ in request.prompt_of_each_sample]


def sampled_from(trainer):
    measurement, engine = trainer.diversity_callback.measurement, Noting()
    sample_groups(trainer.model, trainer.processing_class, measurement.rows, measurement.sampling, engine=engine)
    return [trainer.processing_class.decode(ids) for ids in engine.prompts]


@pytest.mark.parametrize(
    ("own", "settings"),
    [(NO_THINKING, {}), ({"tools": [TOOL]}, {}), ({"tools": json.dumps([TOOL])}, {}), ({}, NO_THINKING)],
    ids=["keywords", "tools", "tools as text", "config"],
)
def test_samples_start_from_the_prompt_that_was_trained(own, settings, written_by, tmp_path):
    rows = Dataset.from_list([{"prompt": [ASK], "completion": [ANSWER], **own}])
    small = {"diversity_steps": 1, "diversity_num_prompts": 1, "diversity_samples": 2, "diversity_max_new_tokens": 4}
    trainer = trainer_for(written_by("qwen3"), tmp_path, rows=rows, eval_rows=rows, **small, **settings)
    (start,) = sampled_from(trainer)
    text = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    assert text.startswith(start)
    assert start.endswith(EMPTY_THOUGHT) == ("tools" not in own) and ('"name": "add"' in start) == ("tools" in own)
    # The handoff has the file of the samples alone
    trainer.diversity_callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    (path,) = tmp_path.rglob("step-0.jsonl")
    (ids, num_prompt), *_ = encode(trainer.processing_class, [json.loads(path.read_text())], 300)
    assert trainer.processing_class.decode(ids[:num_prompt]) == start


def test_rl_starts_from_the_prompt_that_was_trained(written_by):
    class Trainer:
        chat_template_kwargs, tools, environment_factories, _is_vlm = {}, [], None, False
        processing_class = written_by("qwen3")

        def _generate_and_score_completions(self, inputs):
            return self._tokenize_prompts([row["prompt"] for row in inputs])

        def _tokenize_prompts(self, prompts):
            return "TRL's own"

    (mixin,) = (kind for kind in trainer_class().__mro__ if kind.__name__ == "RowTemplateMixin")
    trainer = type("OwnTrainer", (mixin, Trainer), {})()
    tokenizer = trainer.processing_class
    rows = [{"prompt": [ASK], **NO_THINKING}, {"prompt": [ASK], "tools": [TOOL]}]
    (first, second), images, fields = trainer._generate_and_score_completions(rows)
    assert tokenizer.decode(first) == START + EMPTY_THOUGHT and '"name": "add"' in tokenizer.decode(second)
    assert images is None and fields == {}
    trainer.chat_template_kwargs = NO_THINKING["chat_template_kwargs"]
    assert trainer._generate_and_score_completions([{"prompt": [ASK]}])[0] == [first]
    assert trainer._generate_and_score_completions([{"prompt": "text"}]) == "TRL's own"


def test_grpo_trainer_asks_us_for_its_prompts(written_by, tiny_model_dir, tmp_path, monkeypatch):
    """Through GRPOTrainer itself, up to the draw."""
    from trl import GRPOConfig, ModelConfig

    from aesl_trl.training.grpo import GRPOScriptArguments

    written_by("qwen3").save_pretrained(tmp_path / "model")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_bytes((Path(tiny_model_dir) / name).read_bytes())

    def note(self, prompt_ids, *args, **kwargs):
        raise StopIteration(prompt_ids)

    monkeypatch.setattr(trl.GRPOTrainer, "_generate_single_turn", note)
    args = GRPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to=[], num_generations=2, per_device_train_batch_size=2
    )
    model, rows = ModelConfig(str(tmp_path / "model")), Dataset.from_list([{"prompt": [ASK], **NO_THINKING}])
    trainer = build_trainer(GRPOScriptArguments("x"), args, model, [lambda completions, **_: [0.0, 0.0]], rows)
    with pytest.raises(StopIteration) as drawn:
        trainer._generate_and_score_completions([*rows, *rows])
    wanted = prompt_ids(trainer.processing_class, [ASK], enable_thinking=False)
    assert drawn.value.value == [wanted, wanted]


def test_the_rest_of_a_stream_is_held_against_the_template(written_by, tmp_path):
    """The first 64 rows are read before training, the others by it."""
    thought = {"role": "assistant", "content": "<think>Thought1</think>ok"}
    rows = Dataset.from_list([{"messages": [ASK, ANSWER]}] * 70 + [{"messages": [ASK, thought]}])
    trainer = trainer_for(
        written_by("deepseek_r1_distill"), tmp_path, rows=rows.to_iterable_dataset(), shuffle_dataset=False
    )
    with pytest.raises(InputError, match=r"the train dataset, row 70 .* leaves out the reasoning"):
        list(trainer.train_dataset)


def test_calls_reach_the_template_of_a_processor_as_mappings(tmp_path):
    """A function's rows keep the arguments of calls as JSON text; TRL asks for the processor's own class."""
    model, processor = vision_language_model()
    processor.chat_template = (Path(trl.__file__).parent / "chat_templates/qwen3_5_think.jinja").read_text()
    rows = [
        with_json_text(calling(name, **arguments)) for name, arguments in (("f", {"city": "Rome"}), ("g", {"a": 1}))
    ]
    trainer = trainer_for(processor, tmp_path, model, Dataset.from_list(rows), max_length=None)
    written = processor.tokenizer.decode(trainer.train_dataset[0]["input_ids"])
    assert "<parameter=city>\nRome\n</parameter>" in written and "<parameter=a>" not in written
