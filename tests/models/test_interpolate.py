"""interpolate: averages read back by the libraries that load them, and one line for every pair that has no average."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import build_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from aesl_trl.cli import main as aesl
from aesl_trl.errors import InputError
from aesl_trl.files import read_json, write_json
from aesl_trl.models.interpolate import _without_notes, average, average_with_base, interpolate, scaling


IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    """Folders of two models of one shape, as save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("early", "late")):
        build_model(tokenizer, seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def adapter(base, folder, seed, **settings):
    """A LoRA adapter whose B is not 0, saved."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **settings})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return str(folder)


def merged(base, folder):
    """The adapter on its base, as plain weights in float64."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base).double(), folder).double()
    return model.merge_and_unload().state_dict()


@pytest.mark.parametrize("weight", [0.5, 0.3])
def test_full_weights(weight, models, tmp_path):
    result = interpolate(models / "early", models / "late", tmp_path / "out", weight=weight)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    ends = [AutoModelForCausalLM.from_pretrained(models / name).state_dict() for name in ("early", "late")]
    for name, value in loaded.items():
        torch.testing.assert_close(value, (1 - weight) * ends[0][name] + weight * ends[1][name], atol=1e-7, rtol=0)
    assert result["kind"] == "full" and result == read_json(tmp_path / "out" / "interpolation.json")
    assert result["weight"] == weight and result["first"].endswith("early")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_stays_and_the_mean_is_rounded_once(dtype, models, tmp_path):
    for name in ("early", "late"):
        AutoModelForCausalLM.from_pretrained(models / name).to(dtype).save_pretrained(tmp_path / name)
    interpolate(tmp_path / "early", tmp_path / "late", tmp_path / "out", weight=0.3)
    one, other, found = (load_file(tmp_path / name / "model.safetensors") for name in ("early", "late", "out"))
    for name, value in found.items():
        assert value.dtype == dtype
        wide = (0.7 * one[name].double() + 0.3 * other[name].double()).to(dtype)
        # Where the two nearly cancel, the float32 of the sum before the rounding shows
        torch.testing.assert_close(value, wide, atol=1e-8, rtol=2 * torch.finfo(dtype).eps)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == dtype


def test_shards_and_what_lies_beside_them(models, tmp_path, tokenizer):
    for name in ("early", "late"):
        shutil.copytree(models / name, tmp_path / name)
    model = AutoModelForCausalLM.from_pretrained(models / "early")
    (tmp_path / "early" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "early", max_shard_size="10KB")
    (tmp_path / "early" / "training_args.bin").write_bytes(b"pickle")
    (tmp_path / "early" / "README.md").write_text("the early one")
    interpolate(tmp_path / "early", tmp_path / "late", tmp_path / "out")
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and shards == sorted(path.name for path in (tmp_path / "early").glob("*.safetensors"))
    assert not (tmp_path / "out" / "training_args.bin").exists() and not (tmp_path / "out" / "README.md").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    mean = 0.5 * (model.lm_head.weight + AutoModelForCausalLM.from_pretrained(models / "late").lm_head.weight)
    torch.testing.assert_close(loaded.lm_head.weight, mean)
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    same = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert same.get_vocab() == tokenizer.get_vocab() and same.chat_template == tokenizer.chat_template


ADAPTERS = {
    "alike": ({}, {}),
    "ranks and scales that differ": ({"r": 2, "lora_alpha": 16}, {"r": 5, "lora_alpha": 3}),
    "rank-stabilised": ({"use_rslora": True}, {"use_rslora": True, "r": 3}),
    "patterns": (
        {"rank_pattern": {"layers.0.mlp.down_proj": 7}, "alpha_pattern": {"q_proj": 1}},
        {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"layers.1.mlp.down_proj": 9}},
    ),
    "modules trained whole": ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]}),
    "embeddings": ({"target_modules": ["embed_tokens", "v_proj"]}, {"target_modules": ["embed_tokens", "v_proj"]}),
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.filterwarnings("ignore")
def test_adapters_are_averaged_as_products_not_as_matrices(name, tokenizer, tmp_path):
    """What PEFT merges of the result is the average of what it merges of the two, to float32's rounding."""
    base = tmp_path / "base"
    build_model(tokenizer, tie_word_embeddings=False).save_pretrained(base)
    folders = [adapter(base, tmp_path / str(i), i, **settings) for i, settings in enumerate(ADAPTERS[name])]
    interpolate(*folders, tmp_path / "out", weight=0.3)
    early, late, found = (merged(base, folder) for folder in (*folders, tmp_path / "out"))
    assert found.keys() == early.keys()
    plain = AutoModelForCausalLM.from_pretrained(base).double().state_dict()
    moved = 0
    for key, value in found.items():
        expected = 0.7 * early[key] + 0.3 * late[key]
        torch.testing.assert_close(value, expected, atol=2e-6, rtol=0)
        moved += (expected - plain[key]).abs().max() > 1e-3
    assert moved >= 3
    config = read_json(tmp_path / "out" / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(base) and config["lora_alpha"] == config["r"]


@pytest.mark.filterwarnings("ignore")
def test_the_average_of_the_matrices_would_be_another_model(models, tmp_path):
    """The test above can tell: naive averages of A and B are far off."""
    folders = [adapter(models / "early", tmp_path / str(i), i) for i in range(2)]
    one, other = (load_file(f"{folder}/adapter_model.safetensors") for folder in folders)
    shutil.copytree(folders[0], tmp_path / "naive")
    save_file({key: 0.5 * (one[key] + other[key]) for key in one}, tmp_path / "naive" / "adapter_model.safetensors")
    early, late, naive = (merged(models / "early", folder) for folder in (*folders, tmp_path / "naive"))
    key = "model.layers.0.mlp.down_proj.weight"
    assert (naive[key] - 0.5 * (early[key] + late[key])).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore")
def test_the_stacked_adapter_can_be_trained_on(models, tmp_path):
    folders = [adapter(models / "early", tmp_path / str(i), i) for i in range(2)]
    interpolate(*folders, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(models / "early")
    model = PeftModel.from_pretrained(base, tmp_path / "out", is_trainable=True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert all(value.grad.abs().max() > 0 for value in trained.values())
    assert all(value.size(0) == 8 for name, value in trained.items() if "lora_A" in name)


# ---- With the base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_weights_with_the_base(dtype, models, tmp_path):
    """The base may lie in another dtype and have other end tokens: the result is as the tuned model is."""
    tuned = AutoModelForCausalLM.from_pretrained(models / "late")
    base = AutoModelForCausalLM.from_pretrained(models / "early").to(dtype)
    base.config.eos_token_id, base.generation_config.eos_token_id = 5, 5
    base.save_pretrained(tmp_path / "base")
    average_with_base(models / "late", tmp_path / "base", tmp_path / "out", weight=0.7)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    early, late = base.double().state_dict(), tuned.double().state_dict()
    for name, value in found.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), 0.3 * early[name] + 0.7 * late[name], atol=1e-7, rtol=0)
    assert found.generation_config.eos_token_id == tuned.generation_config.eos_token_id


def test_a_base_that_is_itself_a_run_is_averaged_by_its_own_weights(models, tmp_path, tokenizer):
    """As SFT leaves it: the last weights in the folder, the selected ones below. A tied head may be stored, too."""
    for name in ("base", "tuned"):
        build_model(tokenizer, seed=len(name), tie_word_embeddings=True).save_pretrained(tmp_path / name)
    base, tuned = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned"))
    assert "lm_head.weight" not in tuned
    head = {"lm_head.weight": base["model.embed_tokens.weight"].clone()}
    save_file(base | head, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    own = tmp_path / "base" / "_aesl"
    shutil.copytree(tmp_path / "tuned", own / "selected")
    write_json(own / "run.json", {"stage": "sft"})
    write_json(own / "selection.json", {"step": 4, "candidate": "step-4", "path": "selected"})
    result = average_with_base(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", weight=0.75)
    assert (result["first"], result["second"]) == (str(tmp_path / "tuned"), str(tmp_path / "base"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == tuned.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, 0.25 * base[name] + 0.75 * tuned[name], atol=1e-7, rtol=0)


def test_notes_in_the_configs_of_a_models_parts_do_not_tell_models_apart():
    one, other = ({"text_config": {"hidden_size": 16, "dtype": dtype}} for dtype in ("float32", "bfloat16"))
    assert _without_notes(one) == _without_notes(other) == {"text_config": {"hidden_size": 16}}


@pytest.mark.parametrize("name", ["rank-stabilised", "modules trained whole", "embeddings"])
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_with_its_base(name, tokenizer, tmp_path):
    """What PEFT merges of the result is the average of the base and of what it merges of the adapter."""
    base = tmp_path / "base"
    build_model(tokenizer, tie_word_embeddings=False).save_pretrained(base)
    tuned = adapter(base, tmp_path / "tuned", 1, **ADAPTERS[name][0])
    average_with_base(tuned, base, tmp_path / "out", weight=0.7)
    plain = AutoModelForCausalLM.from_pretrained(base).double().state_dict()
    late, found = (merged(base, folder) for folder in (tuned, tmp_path / "out"))
    moved = [key for key in plain if (late[key] - plain[key]).abs().max() > 1e-3]
    assert len(moved) >= 3
    for key, value in found.items():
        torch.testing.assert_close(value, 0.3 * plain[key] + 0.7 * late[key], atol=2e-7, rtol=0)
    one, out = (read_json(f"{folder}/adapter_config.json") for folder in (tuned, tmp_path / "out"))
    assert one == out  # ranks and scales are as they were


@pytest.mark.filterwarnings("ignore")
def test_what_has_no_average_with_the_base(models, tmp_path, tokenizer):
    base = tmp_path / "tied"
    build_model(tokenizer, tie_word_embeddings=True).save_pretrained(base)
    whole = adapter(base, tmp_path / "whole", 0, modules_to_save=["lm_head"])
    dora = adapter(models / "early", tmp_path / "dora", 0, use_dora=True)
    for tuned, other, message in (
        (whole, base, "trained lm_head.weight as a whole, and .* has no such tensor"),
        (dora, models / "early", "more than plain LoRA .use_dora.: merge it first"),
    ):
        with pytest.raises(InputError, match=message):
            average_with_base(tuned, other, tmp_path / "out", weight=0.5)
        assert not (tmp_path / "out").exists()


def test_scaling_follows_patterns():
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 16}, "alpha_pattern": {"layers.1.q_proj": 32}}
    assert scaling(config, "model.layers.0.q_proj") == 0.5 and scaling(config, "model.layers.1.q_proj") == 2.0
    assert scaling(config, "model.layers.0.v_proj") == 2.0
    assert scaling({**config, "use_rslora": True}, "model.layers.0.q_proj") == 2.0


def test_integers_have_no_average():
    ids = torch.arange(3)
    assert torch.equal(average(ids, ids.clone(), 0.5), ids)
    with pytest.raises(InputError, match="torch.int64 differs"):
        average(ids, ids + 1, 0.5)


def test_the_command(models, tmp_path, capsys):
    aesl(["interpolate", str(models / "early"), str(models / "late"), "--weight", "0.25", "--output", f"{tmp_path}/a"])
    out = capsys.readouterr().out
    assert out.startswith("0.75 of ") and f" -> {tmp_path}/a; next: aesl probe {tmp_path}/a --config FILE" in out
    assert read_json(tmp_path / "a" / "interpolation.json")["weight"] == 0.25
    aesl(["interpolate", str(models / "late"), str(models / "early"), "--output", f"{tmp_path}/a"])  # again, replaced
    assert read_json(tmp_path / "a" / "interpolation.json")["weight"] == 0.5


# ---- Refusals


def config_with(folder, target, file="config.json", **changes):
    shutil.copytree(folder, target)
    config = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps({**config, **changes}))
    return target


def other_tokenizer(models, folder):
    shutil.copytree(models / "late", folder)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|im_start|>", "<|im_begin|>"))
    settings = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(settings.replace("<|im_start|>", "<|im_begin|>"))
    return folder


def without(models, folder):
    shutil.copytree(models / "late", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def pickled(models, folder):
    shutil.copytree(models / "late", folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


REFUSED = {  # the second folder, from the models and a new folder -> the message
    "no folder": (lambda models, new: models / "lat", "is not a folder; did you mean 'late'"),
    "another shape": (lambda models, new: config_with(models / "late", new, hidden_size=8), "hidden_size is 16 and 8"),
    "a quantized one": (
        lambda models, new: config_with(models / "late", new, quantization_config={"quant_method": "bitsandbytes"}),
        "holds quantized weights",
    ),
    "a tensor less": (without, "early has the tensor model.norm.weight, the other one has not"),
    "a pickle": (pickled, r"holds no \*.safetensors"),
    "another tokenizer": (other_tokenizer, "different tokenizers: '<.im_begin.>' is None and 258"),
    "an adapter": (lambda models, new: adapter(models / "early", new, 0), "is an adapter and .* merge it first"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_two_that_have_no_average_are_refused_in_one_line(name, models, tmp_path):
    build, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as error:
        interpolate(models / "early", build(models, tmp_path / "new"), tmp_path / "out")
    assert "\n" not in str(error.value) and not list(tmp_path.glob("*out*"))


REFUSED_ADAPTERS = {
    "another base": ({"base_model_name_or_path": "LATE"}, "on two bases"),
    "dora": ({"use_dora": True}, r"more than plain LoRA .use_dora."),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, r"more than plain LoRA .peft_type PROMPT_TUNING."),
    "pissa": ({"init_lora_weights": "pissa"}, r"more than plain LoRA .init_lora_weights 'pissa'."),
}


@pytest.mark.parametrize("name", REFUSED_ADAPTERS)
def test_adapters_that_cannot_be_stacked_are_refused(name, models, tmp_path):
    changes, message = REFUSED_ADAPTERS[name]
    changes = {key: str(models / "late") if value == "LATE" else value for key, value in changes.items()}
    one = adapter(models / "early", tmp_path / "one", 0)
    other = config_with(one, tmp_path / "other", "adapter_config.json", **changes)
    with pytest.raises(InputError, match=message):
        interpolate(one, other, tmp_path / "out")


def test_adapters_of_other_modules_are_refused(models, tmp_path):
    one = adapter(models / "early", tmp_path / "one", 0)
    other = adapter(models / "early", tmp_path / "other", 0, target_modules=["q_proj"])
    with pytest.raises(InputError, match="one has the tensor .*down_proj.lora_A.weight, the other one has not"):
        interpolate(one, other, tmp_path / "out")


@pytest.mark.parametrize("weight", [0, 1, -0.1, 1.5, float("nan"), "0.5", True])
def test_weights_out_of_range_are_refused(weight, models, tmp_path):
    with pytest.raises(InputError, match="weight is .*, but must be a number above 0 and below 1"):
        interpolate(models / "early", models / "late", tmp_path / "out", weight=weight)


def test_output_folders_that_hold_other_files_are_refused(models, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    for output in (tmp_path / "thesis", models):
        with pytest.raises(InputError, match="output_dir: .* would be replaced; name a new folder"):
            interpolate(models / "early", models / "late", output)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "x"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "missing: A, B, output_dir; usage: aesl interpolate A B"),
        (["."], "missing: B, output_dir"),
        ([".", "."], "missing: output_dir"),
        (["A", "."], "A: A is not a folder"),
        ([".", ".", "C", "--output", "x"], "unknown argument C"),
        ([".", ".", "--wieght", "0.5", "--output", "x"], "did you mean"),
    ],
)
def test_command_lines_that_lack_something(argv, message, capsys):
    with pytest.raises(SystemExit) as leaving:
        aesl(["interpolate", *argv])
    shown = capsys.readouterr().err
    assert leaving.value.code == 2 and shown.count("\n") == 1 and message in shown
