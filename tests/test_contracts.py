"""What we rely on in TRL, transformers, accelerate and PEFT beyond their documented interface, each by name.

When an upgrade breaks one of these, this file says which, before a training does.
"""

import inspect

import accelerate.utils
import pytest
import torch
import transformers
import trl
from small_runs import cpu_settings, prompt_completion_rows
from transformers import Trainer, TrainerState
from trl import SFTConfig, SFTTrainer


def parameters(function):
    return list(inspect.signature(function).parameters)


def source(function):
    return inspect.getsource(function)


@pytest.fixture(scope="module")
def trainer(tokenizer, tiny_model_dir, tmp_path_factory):
    args = SFTConfig(**cpu_settings(tmp_path_factory.mktemp("contract")))
    return SFTTrainer(tiny_model_dir, args, train_dataset=prompt_completion_rows(), processing_class=tokenizer)


# ---- TRL: SFTTrainer


def test_compute_loss_is_what_we_override():
    assert parameters(SFTTrainer.compute_loss) == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]


def test_compute_loss_asks_for_outputs_only_when_the_logits_are_wanted():
    assert "return_outputs=False" in source(SFTTrainer.prediction_step)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_metrics", dict),
        ("_total_train_tokens", int),
        ("_tokenizer", transformers.PreTrainedTokenizerBase),
        ("aux_loss_enabled", bool),
        ("router_aux_loss_coef", float),
        ("padding_free", bool),
        ("completion_only_loss", bool),
        ("accelerator", accelerate.Accelerator),
    ],
)
def test_attributes_of_sfttrainer(name, kind, trainer):
    assert isinstance(getattr(trainer, name), kind)


def test_metrics_are_kept_by_mode_and_averaged_by_log(trainer):
    assert set(trainer._metrics) == {"train", "eval"}
    trainer._metrics["train"]["entropy"] += [1.0, 3.0]
    trainer.model.train()
    trainer.log(logs := {"loss": 1.0})
    assert logs["entropy"] == 2.0 and not trainer._metrics["train"]


def test_class_attributes_reach_the_model_card():
    assert {"_tag_names", "_name", "_paper"} <= set(vars(SFTTrainer)) | set(dir(SFTTrainer))


def test_the_head_is_patched_onto_the_base_model_in_init():
    assert "add_fused_lm_head(" in source(SFTTrainer.__init__)


# ---- TRL: the rest


def test_gathering_a_zero3_head_is_a_context_manager():
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    weight = torch.nn.Parameter(torch.zeros(2, 2))
    with maybe_gather_lm_head_ctx(weight, None):  # not under ZeRO-3: nothing to gather
        assert weight.shape == (2, 2)


def test_unwrapping_for_generation():
    from trl.models.utils import unwrap_model_for_generation

    assert parameters(unwrap_model_for_generation)[:2] == ["model", "accelerator"]


def test_model_loading_and_names():
    from trl.trainer.utils import create_model_from_path, get_config_model_id

    assert parameters(create_model_from_path)[0] == "model_id" and parameters(get_config_model_id) == ["config"]


def test_scripts_and_rewards():
    from trl import rewards
    from trl.scripts.grpo import GRPOScriptArguments

    assert "reward_funcs" in GRPOScriptArguments.__dataclass_fields__
    for name in (
        "accuracy_reward",
        "reasoning_accuracy_reward",
        "think_format_reward",
        "get_soft_overlong_punishment",
    ):
        assert callable(getattr(rewards, name))
    assert {"completions", "solution"} <= set(parameters(rewards.accuracy_reward))


def test_grpo_logs_what_the_report_reads():
    text = source(trl.GRPOTrainer)
    for key in ("frac_reward_zero_std", "completions/clipped_ratio", "completions/mean_length", "reward_std"):
        assert key.rpartition("/")[2] in text, key


# ---- transformers: Trainer


def test_the_gradient_norm_is_taken_between_backward_and_step():
    assert parameters(Trainer._get_grad_norm) == ["self", "model", "grad_norm"]
    loop = source(next(function for function in vars(Trainer).values() if _calls_the_optimizer(function)))
    backward, norm, step = (
        loop.index(text) for text in ("self.training_step(", "self._get_grad_norm(", "self.optimizer.step()")
    )
    assert backward < norm < step


def _calls_the_optimizer(function):
    return inspect.isfunction(function) and "self.optimizer.step()" in source(function)


def test_accumulation_steps_of_the_current_update(trainer):
    trainer.train()
    assert trainer.current_gradient_accumulation_steps == 1


def test_log_clears_should_log():
    """The diversity callback restores it around a log of its own."""
    from transformers.trainer_callback import CallbackHandler

    assert "should_log = False" in source(CallbackHandler.on_log)


def test_internal_saves_do_not_push():
    assert "_internal_call" in parameters(Trainer.save_model)
    assert "not _internal_call" in source(Trainer.save_model)


def test_the_state_counts_input_tokens():
    assert TrainerState().num_input_tokens_seen == 0


def test_load_balancing_loss():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    assert parameters(load_balancing_loss_func) == ["gate_logits", "num_experts", "top_k", "attention_mask"]


def test_processors_of_the_caller_run_before_the_temperature(tokenizer, tiny_model_dir):
    """The recorded entropy is at temperature 1."""
    from aesl_trl.sampling import EntropyRecorder

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    inputs = tokenizer("abc", return_tensors="pt")
    entropies = []
    for temperature in (0.5, 2.0):
        recorder = EntropyRecorder()
        model.generate(
            **inputs, max_new_tokens=1, do_sample=True, temperature=temperature, top_k=0, logits_processor=[recorder]
        )
        entropies.append(recorder.steps[0].item())
    assert entropies[0] == pytest.approx(entropies[1], abs=1e-6)


# ---- torch


def test_products_of_half_precision_with_a_float32_result_exist():
    """CUDA only, so that a CPU can look at no more than the schema."""
    assert "out_dtype" in str(torch.ops.aten.mm.dtype_out._schema)
    assert "out_dtype" in str(torch.ops.aten.addmm.dtype_out._schema)


def test_the_gradient_of_a_gathered_dtensor_can_be_averaged():
    from torch.distributed.tensor import DTensor, Partial

    assert "grad_placements" in parameters(DTensor.full_tensor)
    assert Partial("avg").reduce_op == "avg"
