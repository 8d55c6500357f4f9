"""TRL's features, one by one: each works with AESL or is refused by name when the trainer is built.

In other files: forms of data (test_trainer_data_modes.py), evaluation, resume and model card (test_trainer.py),
    several processes (test_trainer_processes.py), GPU-only features (marked `gpu` here).
"""

import copy
import importlib.util
import math
import shutil

import pytest
import torch
from accelerate.utils import DeepSpeedSequenceParallelConfig, ParallelismConfig
from datasets import Dataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from small_runs import (
    PAIRS,
    assert_close_by_name,
    cpu_settings,
    documents,
    double_model,
    gradients,
    prompt_completion_rows,
    small_config,
    steps_of,
    trained_weights,
    trainer_for,
    true_gradients,
)
from tiny_models import build_model, tiny_shape
from tiny_vision import vision_language_model
from transformers import Trainer

from aesl_trl import AESLSFTTrainer
from aesl_trl.errors import InputError
from aesl_trl.losses.definition import aesl_loss


LOSSES = ("aesl", "nll")


def assert_trains(trainer):
    """Finite losses, a lower nll on what was trained, and no other parameter touched."""
    nll = trainer.evaluate(trainer.train_dataset)["eval_nll"]
    before = trained_weights(trainer)
    trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    trainer.train()
    after = trained_weights(trainer)
    assert all(math.isfinite(value) for value in steps_of(trainer) + steps_of(trainer, "grad_norm"))
    assert trainer.evaluate(trainer.train_dataset)["eval_nll"] < nll
    assert any(not torch.equal(before[name], after[name]) for name in trainable)
    assert all(torch.equal(before[name], after[name]) for name in before if name not in trainable)


def batch_of(trainer):
    rows = [{key: row[key] for key in ("input_ids", "labels")} for row in trainer.train_dataset]
    return trainer.data_collator(rows)


# ---- Models


def test_model_by_name(tiny_model_dir, tmp_path):
    args = small_config(tmp_path, model_init_kwargs={"dtype": "float32"})
    trainer = AESLSFTTrainer(model=tiny_model_dir, args=args, train_dataset=prompt_completion_rows())
    assert_trains(trainer)


def gemma2(tokenizer):
    """Soft-capped logits."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        **tiny_shape(tokenizer),
        head_dim=8,
        final_logit_softcapping=2.0,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config)


def cohere(tokenizer):
    """Scaled logits."""
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    config = CohereConfig(
        **tiny_shape(tokenizer),
        logit_scale=0.25,
    )
    return CohereForCausalLM(config)


@pytest.mark.parametrize("build", [gemma2, cohere])
@pytest.mark.parametrize("cold_start_loss", LOSSES)
def test_logits_are_those_after_soft_cap_and_scale(build, cold_start_loss, tokenizer, tmp_path):
    model = build(tokenizer).double()
    trainer = trainer_for(tokenizer, tmp_path, copy.deepcopy(model), cold_start_loss=cold_start_loss)
    truth, expected = true_gradients(model, documents(trainer.train_dataset), cold_start_loss)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch_of(trainer))
    loss.backward()
    torch.testing.assert_close(loss.detach(), truth, rtol=1e-5, atol=1e-6, check_dtype=False)
    found = gradients(trainer.model)
    assert_close_by_name(found, expected, rtol=1e-4, atol=1e-6)


def mixture_of_experts(tokenizer, kind):
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

    shape = {
        **tiny_shape(tokenizer),
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.5,
        "output_router_logits": True,
        "bos_token_id": None,
    }
    torch.manual_seed(0)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=4))
    qwen = Qwen2MoeConfig(**shape, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    return Qwen2MoeForCausalLM(qwen)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("cold_start_loss", LOSSES)
def test_mixture_of_experts_adds_its_auxiliary_loss(kind, cold_start_loss, tokenizer, tmp_path):
    model = mixture_of_experts(tokenizer, kind)
    trainer = trainer_for(tokenizer, tmp_path, copy.deepcopy(model), cold_start_loss=cold_start_loss)
    batch = batch_of(trainer)
    outputs = model(**{key: value for key, value in batch.items() if key != "labels"}, output_router_logits=True)
    labels = batch["labels"][:, 1:]
    t_scaling = 1e6 if cold_start_loss == "nll" else 3.0
    plain = aesl_loss(outputs.logits[:, :-1], labels, t_scaling=t_scaling)
    if cold_start_loss == "nll":
        plain = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels.flatten())
    expected = plain + 0.5 * outputs.aux_loss
    expected.backward()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    assert outputs.aux_loss.item() > 0.1
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    expected_gradients, found = gradients(model), gradients(trainer.model)
    assert any("gate" in name or "router" in name for name in expected_gradients)
    assert_close_by_name(found, expected_gradients, rtol=1e-4, atol=1e-5)
    assert_trains(trainer)
    assert min(steps_of(trainer, "aux_loss")) > 0.1


def test_auxiliary_loss_is_averaged_over_accumulation_steps(tokenizer, tmp_path):
    """Two equal micro-batches: one batch of them has the same load balance."""
    pair = [PAIRS[2]]
    weights = []
    for accumulation, batch in ((1, 2), (2, 1)):
        trainer = trainer_for(
            tokenizer,
            tmp_path / str(accumulation),
            mixture_of_experts(tokenizer, "qwen2_moe"),
            rows=prompt_completion_rows(pair * 4),
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=batch,
            optim="sgd",
        )
        trainer.train()
        weights.append(trained_weights(trainer))
    assert_close_by_name(weights[1], weights[0], rtol=0, atol=1e-6)


def test_auxiliary_loss_off_is_off(tokenizer, tmp_path):
    model = mixture_of_experts(tokenizer, "mixtral")
    trainer = trainer_for(tokenizer, tmp_path, model, router_aux_loss_coef=0.0)
    assert_trains(trainer)
    assert steps_of(trainer, "aux_loss") == []


# ---- Vision and language


def image_rows():
    from PIL import Image

    rows = []
    for colour in ("red", "blue", "green", "black"):
        question = [{"type": "image"}, {"type": "text", "text": "colour?"}]
        rows.append(
            {
                "images": [Image.new("RGB", (8, 8), colour)],
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": colour}]}],
            }
        )
    return Dataset.from_list(rows)


@pytest.mark.parametrize("cold_start_loss", LOSSES)
def test_vision_language_model(cold_start_loss, tmp_path):
    model, processor = vision_language_model()
    trainer = AESLSFTTrainer(
        model=copy.deepcopy(model),
        args=small_config(tmp_path, max_length=None, cold_start_loss=cold_start_loss),
        train_dataset=image_rows(),
        eval_dataset=image_rows(),
        processing_class=processor,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["labels"][:, 1:]
    assert batch["pixel_values"].shape == (2, 3, 8, 8) and (labels == -100).any()
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1]
    expected = aesl_loss(logits, labels)
    if cold_start_loss == "nll":
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss = trainer.compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_trains(trainer)
    assert math.isfinite(trainer.evaluate()["eval_nll"])


def test_diversity_prompts_with_images_are_refused(tmp_path):
    model, processor = vision_language_model()
    args = small_config(tmp_path, max_length=None, diversity_steps=2)
    with pytest.raises(InputError, match="images"):
        AESLSFTTrainer(model, args, train_dataset=image_rows(), eval_dataset=image_rows(), processing_class=processor)


# ---- PEFT


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("cold_start_loss", LOSSES)
def test_lora_gradients(cold_start_loss, tokenizer, tmp_path):
    model, lora = double_model(), LoraConfig(**LORA, init_lora_weights=False)
    reference = get_peft_model(copy.deepcopy(model), copy.deepcopy(lora)).double()
    trainer = trainer_for(tokenizer, tmp_path, model, peft_config=lora, cold_start_loss=cold_start_loss)
    trainer.model.double()
    reference.load_state_dict(trainer.model.state_dict())
    truth, expected = true_gradients(reference, documents(trainer.train_dataset), cold_start_loss)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch_of(trainer))
    loss.backward()
    found = gradients(trainer.model)
    assert expected.keys() == found.keys() and all("lora" in name for name in found) and len(found) == 8
    torch.testing.assert_close(loss.detach(), truth, rtol=1e-6, atol=1e-6, check_dtype=False)
    assert_close_by_name(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"packing": True, "max_length": 48}, {"gradient_checkpointing": True}])
def test_lora_trains_the_adapter_alone(changes, tokenizer, tmp_path):
    trainer = trainer_for(tokenizer, tmp_path, peft_config=LoraConfig(**LORA), **changes)
    assert_trains(trainer)
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


def test_lora_with_a_trained_head(tokenizer, tmp_path):
    lora = LoraConfig(**LORA, modules_to_save=["lm_head"])
    trainer = trainer_for(tokenizer, tmp_path, build_model(tokenizer, tie_word_embeddings=False), peft_config=lora)
    assert any("lm_head" in name for name, value in trainer.model.named_parameters() if value.requires_grad)
    assert_trains(trainer)


def test_loaded_peft_model(tokenizer, tmp_path):
    model = get_peft_model(build_model(tokenizer), LoraConfig(**LORA))
    trainer = trainer_for(tokenizer, tmp_path, model)
    assert isinstance(trainer.model, PeftModel)
    assert_trains(trainer)


def test_an_adapter_on_the_head_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="adapter to `lm_head`"):
        trainer_for(tokenizer, tmp_path, peft_config=LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))


PROMPT_LEARNING = {
    "prompt_tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix_tuning": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}


@pytest.mark.parametrize("kind", PROMPT_LEARNING)
@pytest.mark.parametrize("cold_start_loss", LOSSES)
def test_prompt_learning_scores_the_same_tokens(kind, cold_start_loss, tokenizer, tmp_path):
    """Prompt tuning lengthens the logits by its virtual tokens, prefix tuning does not."""
    trainer = trainer_for(
        tokenizer, tmp_path, peft_config=PROMPT_LEARNING[kind](), cold_start_loss=cold_start_loss, learning_rate=0.1
    )
    batch = batch_of(trainer)
    with torch.no_grad():
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    length = batch["labels"].size(1)
    assert logits.size(1) == length + (5 if kind == "prompt_tuning" else 0)
    logits, labels = logits[:, -length:-1], batch["labels"][:, 1:]
    expected = aesl_loss(logits, labels)
    if cold_start_loss == "nll":
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(
        trainer.compute_loss(trainer.model, dict(batch)).detach(), expected, rtol=1e-5, atol=1e-6
    )
    assert_trains(trainer)
    counted = sum(label != -100 for _, labels in documents(trainer.train_dataset) for label in labels)
    trainer.model.eval()
    trainer.compute_loss(trainer.model, dict(batch))
    assert trainer._sums["eval"].tokens.item() == counted


@pytest.mark.parametrize("kind", PROMPT_LEARNING)
@pytest.mark.parametrize(
    ("changes", "name"),
    [({"packing": True, "max_length": 48}, "packing"), ({"padding_free": True, "max_length": None}, "padding_free")],
)
def test_prompt_learning_in_packed_rows_is_refused(kind, changes, name, tokenizer, tmp_path):
    message = f"^{name} on qwen2 with {PROMPT_LEARNING[kind]().peft_type.value} with sdpa attention: "
    with pytest.raises(InputError, match=message):
        trainer_for(tokenizer, tmp_path, peft_config=PROMPT_LEARNING[kind](), **changes)
    loaded = get_peft_model(build_model(tokenizer), PROMPT_LEARNING[kind]())
    with pytest.raises(InputError, match=message):
        trainer_for(tokenizer, tmp_path, loaded, **changes)


# ---- How it trains


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"average_tokens_across_devices": False},
        {"pad_to_multiple_of": 8},
        {"neftune_noise_alpha": 1.0},
        {"optim": "adafactor"},
        {"use_liger_kernel": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("cold_start_loss", LOSSES)
@pytest.mark.filterwarnings("ignore:`use_liger_kernel=True` is deprecated:FutureWarning")
def test_setting_works(changes, cold_start_loss, tokenizer, tmp_path):
    if "use_liger_kernel" in changes and importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed")
    assert_trains(trainer_for(tokenizer, tmp_path, cold_start_loss=cold_start_loss, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])  # Dynamo traces; Inductor generates code as well
@pytest.mark.parametrize("cold_start_loss", LOSSES)
def test_torch_compile_trains_as_eager_does(cold_start_loss, backend, tokenizer, tmp_path):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("Inductor needs a C++ compiler on CPU")
    losses = []
    for compiled in (False, True):
        trainer = trainer_for(
            tokenizer,
            tmp_path / str(compiled),
            cold_start_loss=cold_start_loss,
            torch_compile=compiled,
            torch_compile_backend=backend if compiled else None,
        )
        trainer.train()
        losses.append(steps_of(trainer))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_gradient_checkpointing_changes_nothing(tokenizer, tmp_path):
    weights = []
    for checkpointing in (False, True):
        trainer = trainer_for(tokenizer, tmp_path, gradient_checkpointing=checkpointing)
        trainer.train()
        weights.append(trained_weights(trainer))
    assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())


@pytest.mark.gpu
@pytest.mark.parametrize("cold_start_loss", LOSSES)
def test_activation_offloading(cold_start_loss, tokenizer, tmp_path):
    losses = []
    for offloading in (False, True):
        settings = {"use_cpu": False, "activation_offloading": offloading, "cold_start_loss": cold_start_loss}
        trainer = trainer_for(tokenizer, tmp_path / str(offloading), **settings)
        trainer.train()
        losses.append(steps_of(trainer))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


# ---- What is refused, by name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": True, "packing_strategy": "wrapped"}, "packing_strategy is 'wrapped'"),
        ({"eval_packing": True}, "eval_packing=True with packing=False"),
        (
            {"label_smoothing_factor": 0.1},
            "label_smoothing_factor is 0.1, but label smoothing is not supported",
        ),
        (
            {"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.logits.mean()},
            "^compute_loss_func",
        ),
    ],
    ids=["wrapped", "eval_packing", "label_smoothing", "compute_loss_func"],
)
def test_refused_at_construction(changes, message, tokenizer, tmp_path):
    with pytest.raises(InputError, match=message):
        trainer_for(tokenizer, tmp_path, **changes)


@pytest.mark.parametrize("loss_type", ["dft", "forward_kl"])
def test_another_loss_type_is_refused(loss_type, tmp_path):
    with pytest.raises(InputError, match=f"loss_type is '{loss_type}', but the loss is chosen by cold_start_loss"):
        small_config(tmp_path, loss_type=loss_type)


def test_dft_of_an_sft_config_is_refused(tokenizer, tmp_path):
    from trl import SFTConfig

    args = SFTConfig(**cpu_settings(tmp_path, loss_type="dft"))
    with pytest.raises(InputError, match="loss_type is 'dft'"):
        AESLSFTTrainer(
            build_model(tokenizer), args, train_dataset=prompt_completion_rows(), processing_class=tokenizer
        )


PARALLEL = {
    "context parallelism": lambda: ParallelismConfig(cp_size=2),
    "tensor parallelism": lambda: ParallelismConfig(tp_size=2),
    "sequence parallelism": lambda: ParallelismConfig(
        sp_size=2, sp_backend="deepspeed", sp_handler=DeepSpeedSequenceParallelConfig(sp_seq_length=32)
    ),
}


@pytest.mark.parametrize("name", PARALLEL)
def test_parallelism_inside_a_sequence_is_refused(name, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_ALLOW_CP_STANDALONE", "true")
    args = small_config(tmp_path)
    args.parallelism_config = PARALLEL[name]()
    with pytest.raises(InputError, match=f"^{name}.* is not supported"):
        AESLSFTTrainer(
            build_model(tokenizer), args, train_dataset=prompt_completion_rows(), processing_class=tokenizer
        )


def test_parallelism_of_accelerates_own_config_is_refused(tokenizer, tmp_path, monkeypatch):
    """`accelerate launch --config_file` sets it on the accelerator and leaves args.parallelism_config None."""
    create = Trainer.create_accelerator_and_postprocess

    def create_with_tensor_parallelism(trainer):
        create(trainer)
        monkeypatch.setattr(trainer.accelerator.state, "parallelism_config", ParallelismConfig(tp_size=2))

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create_with_tensor_parallelism)
    with pytest.raises(InputError, match="^tensor parallelism is not supported"):
        trainer_for(tokenizer, tmp_path)


def test_a_model_sharded_by_tensor_parallelism_is_refused(tokenizer, tmp_path):
    model = build_model(tokenizer)
    model._tp_size = 2
    with pytest.raises(InputError, match="^tensor parallelism is not supported"):
        trainer_for(tokenizer, tmp_path, model)
