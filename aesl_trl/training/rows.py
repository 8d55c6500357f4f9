"""Rows on their way to TRL: ShareGPT becomes messages, the template is held to each row, and calls stay whole."""

import copy
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import is_conversational

from ..data.checks import checked_when_read
from ..data.rendered import check_rendered
from ..data.sharegpt import CONVERSATIONS, as_messages
from ..models.chat import ChatWriter, template_kwargs
from ..models.loading import load_processing_class
from ..models.tokens import prompt_ids


class RowsMixin:
    """Lets SFTTrainer prepare conversations as they are written in the data (models/chat.py)."""

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        defaults = getattr(args, "chat_template_kwargs", None)
        if formatting_func is None:
            dataset = with_whole_columns(as_messages(dataset, dataset_name))
            if CONVERSATIONS in (dataset.column_names or ()):  # TRL would take it, roles and all, before the others
                dataset = dataset.remove_columns(CONVERSATIONS)
            field, how = f"the {dataset_name} dataset", {"chat_template": self.chat_template, "defaults": defaults}
            check = partial(check_rendered, processing_class=processing_class, **how)
            check(dataset, field=field, num_proc=args.dataset_num_proc)
            if not hasattr(dataset, "__len__") and is_conversational(next(iter(dataset), {})):
                dataset = checked_when_read(dataset, check, field=field)
        writer = ChatWriter(processing_class, defaults=defaults)
        if isinstance(processing_class, ProcessorMixin):  # TRL asks for its class
            processing_class = copy.copy(processing_class)
            processing_class.apply_chat_template = writer.apply_chat_template
        else:
            processing_class = writer
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)


class RowTemplateMixin:
    """Lets GRPOTrainer write each prompt with its row's `tools` and `chat_template_kwargs`, as SFTTrainer does."""

    _batch: list[dict] = []

    def _generate_and_score_completions(self, inputs):
        self._batch = inputs
        return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts):
        has_tools = self.tools or self.environment_factories  # of the trainer: TRL writes those itself
        if has_tools or self._is_vlm or not isinstance(prompts[0], list) or len(prompts) != len(self._batch):
            return super()._tokenize_prompts(prompts)
        keywords = [template_kwargs(row, self.chat_template_kwargs) for row in self._batch]
        pairs = zip(prompts, keywords, strict=True)
        return [prompt_ids(self.processing_class, prompt, **own) for prompt, own in pairs], None, {}


def check_rows(args: Any, processing_class: Any, datasets: dict[str, Any]) -> None:
    """Hold rows against the chat template before the model loads; `datasets` are by the setting that names them."""
    how = {"chat_template": training_template(processing_class, args), "num_proc": args.dataset_num_proc}
    for field, rows in datasets.items():
        if rows is not None:
            check_rendered(rows, processing_class, field=field, defaults=args.chat_template_kwargs, **how)


def training_template(processing_class: Any, args: Any) -> str | None:
    """Return the template of TRL that takes the place of the model's, where it does."""
    if not args.assistant_only_loss or has_generation_markers(processing_class.chat_template):
        return None
    with suppress(ValueError):  # TRL has none for this template, and refuses it when the trainer is built
        return get_training_chat_template(processing_class)


def processing_class_of(model: str, args: Any, **access) -> Any:
    """Load tokenizer or processor of `model` with the template of `chat_template_path`, as TRL does.

    The path names a file, or another tokenizer, whose tokens the model will get.
    """
    path = args.chat_template_path
    if not path or path.endswith((".jinja", ".j2")):
        processing_class = load_processing_class(model, **access)
        if path:
            processing_class.chat_template = Path(path).read_text(encoding="utf-8")
        return processing_class
    return load_processing_class(path, **access)


def with_whole_columns(dataset: Any) -> Any:
    """Give rows without `chat_template_kwargs`, beside rows with it, an empty mapping: TRL would fail on None."""
    column = "chat_template_kwargs"
    if column not in (dataset.column_names or ()) or not hasattr(dataset, "data"):
        return dataset
    if not dataset.data.column(column).null_count:
        return dataset
    return dataset.map(lambda row: {column: row[column] or {}}, features=dataset.features)
