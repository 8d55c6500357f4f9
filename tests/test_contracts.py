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


# ---- TRL: vLLM, which is not run here: its signatures, and what of its source we rely on


def test_arguments_of_vllm_generation():
    from trl.generation.vllm_generation import VLLMGeneration

    assert {
        *("model", "accelerator", "processing_class", "mode"),
        *("server_base_url", "server_timeout", "group_port"),
        *("gpu_memory_utilization", "enable_sleep_mode", "max_model_length", "max_num_seqs"),
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_completion_length"),
        *("logprobs", "generation_kwargs"),
    } <= set(parameters(VLLMGeneration.__init__))
    assert parameters(VLLMGeneration.generate) == ["self", "prompts", "images", "num_generations", "profiler"]
    assert parameters(VLLMGeneration.sync_weights) == ["self"]


@pytest.mark.parametrize(
    "line",
    [
        # what we read, or change for a draw, is where the constructor keeps it and `generate` looks for it
        "self.model = model",
        "self.temperature = temperature",
        "self.generation_kwargs = generation_kwargs or {}",
        "self.enable_sleep_mode = enable_sleep_mode",
        "self.vllm_client = VLLMClient(",
        "self.llm.sleep(level=2)",
        "self._llm_weights_sleeping = True",
        # a rank that could not start waits in the same barrier
        "accelerator.wait_for_everyone()",
        # colocated: one sample for each prompt given, in this process, of log-probabilities after the temperature
        '"n": 1,  # vLLM on each GPU generates only 1 in colocate mode',
        'distributed_executor_backend="external_launcher"',
        'logprobs_mode="processed_logprobs"',
        "return prompt_ids, completion_ids, logprobs, logprob_token_ids",
        # adapters are merged for it and taken out again, which preserved_base makes good
        "model.merge_adapter()",
        "model.unmerge_adapter()",
    ],
)
def test_source_of_vllm_generation(line):
    from trl.generation import vllm_generation

    assert line in inspect.getsource(vllm_generation)


def test_the_constructor_of_vllm_generation_ends_with_a_barrier():
    from trl.generation.vllm_generation import VLLMGeneration

    assert source(VLLMGeneration._init_vllm).rstrip().endswith("accelerator.wait_for_everyone()")


def test_log_probabilities_of_vllm_are_lists_of_alternatives():
    from types import SimpleNamespace as Namespace

    from trl.generation.vllm_generation import extract_logprobs

    def entry(log_prob):
        return Namespace(logprob=log_prob, rank=1)

    output = Namespace(outputs=[Namespace(logprobs=[{7: entry(-0.5)}, {9: entry(float("nan"))}])])
    assert extract_logprobs([output, output]) == ([[[-0.5], [None]]] * 2, [[[7], [9]]] * 2)


def test_client_of_a_vllm_server():
    from trl.generation.vllm_client import VLLMClient

    assert parameters(VLLMClient.generate) == [
        *("self", "prompts", "features", "n", "repetition_penalty", "temperature", "top_p", "top_k", "min_p"),
        *("max_tokens", "logprobs", "structured_outputs_regex", "generation_kwargs"),
    ]
    assert inspect.signature(VLLMClient.check_server).parameters["total_timeout"].default == 0.0
    text = source(VLLMClient.generate)
    assert "sampling_params.update(generation_kwargs or {})" in text  # the seed
    assert '"completion_ids"' in text and '"logprobs"' in text


def test_vllm_is_looked_for_without_importing_it():
    from trl.import_utils import is_vllm_available

    assert is_vllm_available() in (True, False)


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
    """Check what makes the diversity callback restore the flag around a log of its own."""
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
    """Check that the recorded entropy is that at temperature 1."""
    from aesl_trl.sampling.generate import StepRecorder

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    inputs = tokenizer("abc", return_tensors="pt")
    entropies = []
    for temperature in (0.5, 2.0):
        recorder = StepRecorder([0])
        model.generate(
            **inputs, max_new_tokens=1, do_sample=True, temperature=temperature, top_k=0, logits_processor=[recorder]
        )
        entropies.append(recorder.entropy[0].item())
    assert entropies[0] == pytest.approx(entropies[1], abs=1e-6)


def test_adapters_keep_whether_they_are_merged():
    from peft.tuners.tuners_utils import BaseTunerLayer

    assert "merged_adapters" in vars(BaseTunerLayer) and callable(BaseTunerLayer.get_base_layer)


# ---- torch


def test_units_of_fsdp2_can_be_kept_whole():
    """Check the internals by which `unsharded` sets for one unit what `set_reshard_after_forward` sets for good."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    assert "post_forward_mesh_info" in source(FSDPModule.set_reshard_after_forward)
    assert "_fsdp_param_groups" in source(FSDPModule.unshard)
    assert callable(FSDPState._lazy_init) and callable(FSDPModule.reshard)


def test_products_of_half_precision_with_a_float32_result_exist():
    """Look at the schema alone, since these products run on CUDA only."""
    assert "out_dtype" in str(torch.ops.aten.mm.dtype_out._schema)
    assert "out_dtype" in str(torch.ops.aten.addmm.dtype_out._schema)


def test_the_gradient_of_a_gathered_dtensor_can_be_averaged():
    from torch.distributed.tensor import DTensor, Partial

    assert "grad_placements" in parameters(DTensor.full_tensor)
    assert Partial("avg").reduce_op == "avg"
