"""The rehearsal: what TRL, PEFT or transformers refuse is one line before the weights load, and nothing changes."""

import copy
from importlib.util import find_spec

import pytest
from peft import LoraConfig
from small_runs import prompt_completion_rows, small_config
from transformers import PreTrainedModel
from trl import GRPOConfig, ModelConfig, SFTTrainer

from aesl_trl.errors import InputError
from aesl_trl.training import rehearsal
from aesl_trl.training.grpo import trainer_class
from aesl_trl.training.rehearsal import peft_config_of, refusals_in_one_line, rehearse


LINEAR = {"lr_scheduler_type": "linear"}


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))


def stream():
    return prompt_completion_rows().to_iterable_dataset()


def test_good_settings_pass_and_stay_as_they_are(tiny_model_dir, tmp_path):
    peft_config = LoraConfig(target_modules=["q_proj"])
    args = small_config(tmp_path, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1})
    before, peft_before = copy.deepcopy(vars(args)), peft_config.to_dict()
    rehearse(SFTTrainer, tiny_model_dir, args, stream(), eval_rows=stream(), peft_config=peft_config)
    assert {name: vars(args)[name] for name in before if name != "distributed_state"} == {
        name: value for name, value in before.items() if name != "distributed_state"
    }
    assert peft_config.to_dict() == peft_before


def test_a_template_with_new_tokens_passes(tiny_model_dir, tmp_path, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<new>"], special_tokens=True)
    other.save_pretrained(tmp_path / "other")
    args = small_config(tmp_path, chat_template_path=str(tmp_path / "other"))
    rehearse(SFTTrainer, tiny_model_dir, args, prompt_completion_rows(), peft_config=LoraConfig())


def test_under_deepspeed_the_names_of_modules_alone_are_checked(tiny_model_dir, tmp_path):
    """accelerate takes DeepSpeed's plugin once in a process: a second trainer would be refused."""
    args = small_config(tmp_path)
    args.deepspeed_plugin = object()
    rows = prompt_completion_rows()
    rehearse(lambda **_: pytest.fail("a trainer was built"), tiny_model_dir, args, rows, peft_config=LoraConfig())
    with pytest.raises(InputError, match="did you mean 'q_proj'"):
        rehearse(SFTTrainer, tiny_model_dir, args, rows, peft_config=LoraConfig(target_modules=["q_porj"]))


def test_a_reference_model_that_follows_is_no_contradiction(tiny_model_dir, tmp_path):
    """The rehearsal sets beta to 0, for which TRL refuses `sync_ref_model`."""
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "num_generations": 4, "report_to": "none"}
    args = GRPOConfig(**settings, per_device_train_batch_size=4, beta=0.1, sync_ref_model=True, max_steps=1)
    rows = prompt_completion_rows().select_columns(["prompt"])
    rehearse(trainer_class(), tiny_model_dir, args, rows, reward_funcs=[lambda completions, **_: [0.0] * 4])
    assert args.sync_ref_model and args.beta == 0.1


@pytest.mark.parametrize(
    ("rows", "changes", "part"),
    [
        (stream, {"max_steps": -1}, "transformers refuses this: .* max_steps has to be specified"),
        (prompt_completion_rows, {"padding_free": True}, "trl refuses this: .* `max_length` is not enforced"),
        (prompt_completion_rows, {"assistant_only_loss": True}, "trl refuses this: .* not conversational"),
        (prompt_completion_rows, LINEAR | {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}, "argument 'min_lr_rate'"),
        pytest.param(
            prompt_completion_rows,
            {"optim": "adamw_bnb_8bit"},
            "You need to install `bitsandbytes`",
            marks=pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed"),
        ),
        (prompt_completion_rows, {"adam_beta1": 2.0}, "torch.optim refuses this: Invalid beta parameter"),
        (prompt_completion_rows, {"use_liger_kernel": True}, "install liger-kernel"),
        (prompt_completion_rows, {"report_to": "wandb"}, "requires wandb to be installed"),
        (prompt_completion_rows, {"model_init_kwargs": {"attn_implementation": "flash"}}, "is not supported"),
    ],
)
def test_what_a_library_refuses_is_one_line_in_its_words(rows, changes, part, tiny_model_dir, tmp_path):
    args = small_config(tmp_path, **changes)
    with pytest.raises(InputError, match=part) as refused:
        rehearse(SFTTrainer, tiny_model_dir, args, rows())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (LoraConfig(target_parameters=["up_proj.weight"], lora_dropout=0.1), "peft refuses this: .* lora_dropout"),
        (LoraConfig(target_modules=["q_porj"]), "lora_target_modules: 'q_porj' .* did you mean 'q_proj'"),
    ],
)
def test_what_peft_refuses(config, part, tiny_model_dir, tmp_path):
    with pytest.raises(InputError, match=part):
        rehearse(SFTTrainer, tiny_model_dir, small_config(tmp_path), prompt_completion_rows(), peft_config=config)


def test_lora_settings_without_use_peft_are_a_warning():
    with pytest.warns(UserWarning, match="lora_target_modules is set, but use_peft is not"):
        assert peft_config_of(ModelConfig(lora_target_modules=["q_proj"])) is None
    assert peft_config_of(ModelConfig(use_peft=True, lora_target_modules=["q_proj"])).target_modules == {"q_proj"}


def test_a_mistake_in_a_program_is_no_refusal(tiny_model_dir, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="invalid literal"), refusals_in_one_line():
        int("x")

    def needs_weights(*args, **kwargs):
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(rehearsal, "skeleton", needs_weights)
    rehearse(
        SFTTrainer, tiny_model_dir, small_config(tmp_path), prompt_completion_rows()
    )  # the real trainer will tell
