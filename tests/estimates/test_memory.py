"""The memory arithmetic against what torch really keeps: saved tensors, caches, optimizer states, parameters."""

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import build_tokenizer

from aesl_trl.estimates import memory
from aesl_trl.estimates.facts import Facts, shape_of
from aesl_trl.estimates.memory import ALWAYS, EVALUATE, GB, GENERATE, TRAIN, VLLM, Item, Training
from aesl_trl.losses import head


TOKENS = 52  # the width of no weight, which are told apart by their shapes


def config_of(kind, **changes):
    sizes = {
        "vocab_size": len(build_tokenizer()),
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": kind == "qwen2",
    }
    return {"model_type": kind, **sizes, **changes}


def model_of(config, dtype=torch.bfloat16, seed=0):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).to(dtype)


def facts_of(config):
    return Facts("stand-in", "stand-in", config, None, frozenset(), None, None)


def saved(model, inner, autocast, rows=1):
    """Bytes of all tensors that autograd keeps for a backward pass of the layers, weights and their casts left out."""
    kept, sizes = [], {}
    shapes = {tuple(parameter.shape) for parameter in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes}

    def pack(tensor):
        kept.append(tensor)  # alive, so that no storage's address is used twice
        if tuple(tensor.shape) not in shapes:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(0, 200, (rows, TOKENS))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            inner(ids, use_cache=False)
    return sum(sizes.values())


def layer_bytes(build, autocast):
    """Of one layer and token: what four layers keep beyond two."""
    two, four = (build(layers) for layers in (2, 4))
    return (saved(*four, autocast) - saved(*two, autocast)) / 2 / TOKENS


SHAPES = [{}, {"intermediate_size": 320}, {"hidden_size": 128}, {"num_key_value_heads": 8}]
CASES = [(kind, changes) for kind in ("qwen2", "llama") for changes in SHAPES] + [("llama", {"head_dim": 16})]


@pytest.mark.parametrize(("kind", "changes"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "float32 under autocast"])
def test_what_a_layer_saves_is_what_autograd_keeps(kind, changes, dtype):
    config = config_of(kind, **changes)

    def build(layers):
        model = model_of({**config, "num_hidden_layers": layers}, dtype)
        return model, model.model

    run = Training(shape_of(facts_of(config)), weight_bytes=dtype.itemsize)
    assert layer_bytes(build, dtype == torch.float32) == memory.saved_bytes(run)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_what_an_adapter_adds(changes, dropout):
    from peft import LoraConfig, get_peft_model

    config = config_of("qwen2", **changes)

    def build(layers):
        settings = LoraConfig(r=8, target_modules="all-linear", lora_dropout=dropout)
        model = get_peft_model(model_of({**config, "num_hidden_layers": layers}), settings)
        model.enable_input_require_grads()
        return model, model.base_model.model.model

    run = Training(shape_of(facts_of(config)), lora_rank=8, lora_dropout=dropout)
    assert layer_bytes(build, True) == memory.saved_bytes(run)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_parameters_weights_and_optimizer_are_those_of_a_real_step(kind):
    config = config_of(kind)
    run, model = Training(shape_of(facts_of(config)), weight_bytes=4), model_of(config, torch.float32)
    assert run.shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    sizes = {item.name: item.gb for item in memory.training_items(run)}
    assert sizes["weights"] == sum(parameter.nbytes for parameter in model.parameters()) / GB
    assert sizes["gradients"] == sum(parameter.grad.nbytes for parameter in model.parameters()) / GB
    assert sizes["optimizer"] == sum(moment.nbytes for moment in moments) / GB


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_a_trained_adapter_has_as_many_parameters(kind):
    from peft import LoraConfig, get_peft_model

    config = config_of(kind)
    model = get_peft_model(model_of(config), LoraConfig(r=4, target_modules="all-linear"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    run = Training(shape_of(facts_of(config)), lora_rank=4)
    assert run.trained == sum(parameter.numel() for parameter in trained)
    assert {parameter.dtype.itemsize for parameter in trained} == {run.trained_bytes}


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_the_cache_is_as_large_as_the_models_own(kind):
    config = config_of(kind)
    with torch.no_grad():
        cache = model_of(config)(input_ids=torch.zeros(3, 11, dtype=torch.long), use_cache=True).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    shape = shape_of(facts_of(config))
    assert memory.cache_bytes(shape) * 3 * 11 == real
    items = memory.sampling_items(shape, samples=3, prompt=5, new_tokens=6)
    assert items[0].gb == real / GB


@pytest.mark.parametrize("vocab", [32_000, 128_256, 151_936])
@pytest.mark.parametrize("trained", [True, False])
def test_the_heads_tile_is_the_heads(vocab, trained):
    """The constants are head.py's; importing torch for them would make the arithmetic a matter of seconds."""
    weight = torch.empty(vocab, 64, dtype=torch.float32, device="meta")
    rows = head._tile_rows(weight, trained, vocab * 6, False)
    config = config_of("qwen2", vocab_size=vocab)
    run = Training(shape_of(facts_of(config)), lora_rank=None if trained else 8)
    tile = next(item for item in memory.training_items(run) if item.name == "head's tile")
    assert tile.gb == rows * vocab * 6 / GB
    assert (memory.TILE_BYTES, memory.TILE_MIN_ROWS) == (head.GPU_TILE_BYTES, head.GPU_MIN_ROWS)


# ---- Placement


def items_of(**changes):
    return {item.name: item.gb for item in memory.training_items(Training(SHAPE, **changes))}


SHAPE = memory.Shape(1000, 800, 30, 40, 7, 4, 8, 16, 2, 1, 4, 20, False)


@pytest.mark.parametrize(
    ("sharding", "weights", "gradients", "optimizer"),
    [("none", 2, 2, 4), ("zero2", 2, 2 / 8, 12 / 8), ("zero3", 2 / 8, 2 / 8, 12 / 8), ("fsdp", 4 / 8, 4 / 8, 1)],
)
def test_what_is_sharded(sharding, weights, gradients, optimizer):
    found = items_of(sharding=sharding, processes=8)
    each = [found[name] * GB / SHAPE.parameters for name in ("weights", "gradients", "optimizer")]
    assert each == pytest.approx([weights, gradients, optimizer])
    assert ("buckets of DDP" in found) == (sharding == "none")
    assert ("gathered" in found) == (sharding in ("zero3", "fsdp"))


def test_a_quantized_base_keeps_embeddings_and_head_whole():
    found = items_of(bits=4, nested=True, lora_rank=2)
    assert found["weights"] * GB == pytest.approx(800 * (0.5 + 1 / 64 + 4 / (64 * 256)) + 200 * 2)
    assert found["adapter"] * GB == 2 * (30 + 40) * 4 * 2
    assert items_of(bits=8, lora_rank=2)["weights"] * GB == pytest.approx(800 + 400)


def test_checkpointing_keeps_the_layers_inputs_only():
    run = {"rows": 3, "length": 100}
    kept, all_ = items_of(checkpointing=True, **run), items_of(checkpointing=False, **run)
    assert kept["activations"] * GB == 4 * 8 * 2 * 300
    assert all_["activations"] == pytest.approx(4 * memory.saved_bytes(Training(SHAPE)) * 300 / GB)


# ---- The sum


def test_sizes_are_in_gb_of_a_card():
    assert memory.GB == 1e9


def test_phases_take_turns_and_vllm_is_not_fragmented():
    items = [Item("a", ALWAYS, 1.0, ""), Item("b", TRAIN, 4.0, ""), Item("c", GENERATE, 5.0, "")]
    total = memory.budget([*items, memory.vllm_item(24.0, 0.5, True), Item("d", EVALUATE, 2.0, "")], 24.0)
    assert total.peaks == pytest.approx({TRAIN: 2 + 4.4, GENERATE: 2 + 5.5, VLLM: 2 + 12, EVALUATE: 2 + 2.2})
    assert total.peak_gb == pytest.approx(14) and total.fits
    awake = memory.budget([*items, memory.vllm_item(24.0, 0.8, False)], 24.0)
    assert awake.peaks == pytest.approx({TRAIN: 2 + 4.4 + 19.2, GENERATE: 2 + 5.5 + 19.2}) and not awake.fits


@given(st.lists(st.tuples(st.sampled_from([ALWAYS, TRAIN, GENERATE, EVALUATE]), st.floats(0, 100)), max_size=8))
def test_a_peak_is_never_less_than_any_item(sizes):
    total = memory.budget([Item("x", phase, gb, "") for phase, gb in sizes], 24.0)
    assert total.peak_gb >= max((gb for _, gb in sizes), default=0.0)


@given(rows=st.integers(1, 16), length=st.integers(1, 8192), rank=st.sampled_from([None, 8, 64]))
def test_more_tokens_never_take_less(rows, length, rank):
    def total(**changes):
        return sum(items_of(lora_rank=rank, masked=True, **{"rows": rows, "length": length, **changes}).values())

    assert total(rows=rows + 1) > total() < total(length=length + 1)


def test_vllms_room_is_what_weights_and_its_own_leave():
    weights, share = 2 * SHAPE.parameters / GB, 10.0
    expected = (share - memory.VLLM_OWN_GB - weights) * GB / (memory.cache_bytes(SHAPE) * 50)
    assert memory.vllm_sequences(SHAPE, share, 50) == pytest.approx(expected)
    assert memory.vllm_sequences(SHAPE, 1.0, 50) < 0


def test_accumulated_gradients_are_whole_under_fsdp2():
    shape = shape_of(facts_of(config_of("qwen2")))
    run = Training(shape, processes=4, sharding="fsdp", micro_batches=8)
    (item,) = [item for item in memory.training_items(run) if item.name == "accumulated gradients"]
    assert item.gb == shape.parameters * 2 / GB and item.phase == TRAIN
    for other in ({"micro_batches": 1}, {"processes": 1}, {"sharding": "zero3"}, {"sharding": "none"}):
        names = [item.name for item in memory.training_items(replace(run, **other))]
        assert "accumulated gradients" not in names, other


@pytest.mark.slow
def test_two_processes_hold_whole_gradients_until_the_last_micro_batch(tmp_path):
    import accumulated_script
    from accelerate import Accelerator
    from two_processes import results_of_two

    model = Mock(spec=["set_requires_gradient_sync"])
    with Accelerator.no_sync(Mock(is_fsdp2=True), model):  # what transformers calls before the last micro-batch
        model.set_requires_gradient_sync.assert_called_once_with(False)
    for found in results_of_two(accumulated_script, tmp_path):
        # 32 x 64 weights: all of them in bf16, where half of them in float32 are this process's own
        assert found == {"first": {"whole": 4096, "sharded": 0}, "last": {"whole": 0, "sharded": 4096}}
