"""From a selected checkpoint to a folder that GRPO can start from, and what is refused on the way."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import build_model, build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from aesl_trl.diversity.selection import select_run
from aesl_trl.errors import InputError
from aesl_trl.files import write_json, write_jsonl
from aesl_trl.models import handoff
from aesl_trl.models.handoff import hand_off
from aesl_trl.models.handoff_checks import check_differences, compare, encode, log_probs
from aesl_trl.models.loading import load_model
from aesl_trl.models.tokens import prompt_ids
from aesl_trl.sampling.draws import SamplingSettings
from aesl_trl.sampling.groups import sample_groups


IM_END, END_OF_TEXT, IM_START = 256, 257, 258
PROMPTS = [{"prompt": [{"role": "user", "content": f"say {letter}"}]} for letter in "abcd"]
IDS = [(list(range(40, 90)), 10), (list(range(3, 40)), 5)]


def make_run(folder: Path, model, tokenizer, *, step: int = 4) -> Path:
    """An SFT folder as training leaves it: selected weights, and samples that these weights gave."""
    groups = sample_groups(model, tokenizer, PROMPTS, SamplingSettings(4, 1.0, 64))
    model.save_pretrained(folder / "selected")
    tokenizer.save_pretrained(folder / "selected")
    write_json(folder / "selection.json", {"rule": "last", "applied": "last", "step": step, "path": "selected"})
    write_jsonl(folder / "diversity.jsonl", [{"step": step, "temperature": 1.0, "max_new_tokens": 64}])
    write_jsonl(folder / "samples" / f"step-{step}.jsonl", [dataclasses.asdict(group) for group in groups])
    return folder


@pytest.fixture
def full_run(tmp_path, tiny_model_dir):
    return make_run(tmp_path / "run", AutoModelForCausalLM.from_pretrained(tiny_model_dir), build_tokenizer())


def lora(base: str, dtype=torch.float32, **settings):
    """A LoRA model with an effect: PEFT starts B at zero, which would let a lost adapter go unseen."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(model, LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def lora_run(tmp_path, tiny_model_dir):
    return make_run(tmp_path / "run", lora(tiny_model_dir), build_tokenizer())


def edit_json(path: Path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def assert_nothing_left(run: Path):
    assert not (run / "handoff.json").exists()
    assert [path.name for path in run.iterdir() if "handoff" in path.name] == []


# ---- Full weights


def test_full_weights_are_copied_and_checked(full_run):
    result = hand_off(full_run)
    assert (result["mode"], result["source"], result["base"]) == ("full", "selected", None)
    assert result["log_probs_max_difference"] == 0
    assert result["samples"]["num"] == 16 and 0 < result["samples"]["stopped"] <= 16
    assert result["eos_token_id"] == [IM_END]
    assert result["template"] == {"chat": True, "turn_end": "<|im_end|>"}
    # The samples are the model's own: its log-likelihood of them is its entropy, about log 259 here.
    own = result["checks"]["own_samples"]
    assert abs(own["nll"] - own["entropy"]) < 0.2 and 5 < own["entropy"] < 5.6
    assert json.loads((full_run / "handoff.json").read_text()) == result
    source, copy = (AutoModelForCausalLM.from_pretrained(full_run / name) for name in ("selected", "handoff"))
    assert compare(log_probs(source, IDS), log_probs(copy, IDS))["max"] == 0


def test_a_folder_of_weights_needs_no_run(tmp_path, tiny_model_dir):
    """A run's samples are what shows that it stops; without any nothing is claimed."""
    result = hand_off(tiny_model_dir, output=tmp_path / "out")
    assert result["samples"] == {"num": 0, "stopped": 0, "max_new_tokens": 256}
    assert result["checks"]["own_samples"] is None
    assert json.loads((tmp_path / "out" / "handoff.json").read_text()) == result
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (Path(tiny_model_dir) / "handoff.json").exists()


def test_a_chain_hands_over_what_it_selected(tmp_path, full_run):
    chain = tmp_path / "chain"
    chain.mkdir()
    shutil.move(full_run, chain / "sft")
    write_json(chain / "chain.json", {"sft_dir": "sft"})
    assert hand_off(chain)["source"] == "sft/selected"
    shutil.copytree(chain / "sft" / "selected", chain / "selected")
    write_json(chain / "selection.json", {"step": 4, "path": "selected"})
    result = hand_off(chain)
    assert result["source"] == "selected" and result["samples"]["num"] == 16
    assert (chain / "handoff" / "config.json").is_file() and (chain / "handoff.json").is_file()


def select(run: Path, step: int, **options) -> None:
    """Select the candidate `step` of a run whose candidates are all its selected weights, and differ in their values.

    All have one name, one size and one header.
    """
    if not (run / "candidates").exists():
        model = AutoModelForCausalLM.from_pretrained(run / "selected")
        for each in (4, 8):
            shutil.copytree(run / "selected", run / f"candidates/step-{each}")
            with torch.no_grad():
                model.lm_head.weight.add_(each * 1e-6)
            model.save_pretrained(run / f"candidates/step-{each}")
        shutil.rmtree(run / "selected")
        write_json(run / "run.json", {"stage": "sft"})
    select_run(run, step=step, **options)


def test_a_selection_that_was_cut_off_is_found(full_run):
    """The weights are those of another step than selection.json says, as a kill between the two leaves them."""
    select(full_run, 4)
    before = (full_run / "selection.json").read_bytes()
    select(full_run, 8)
    (full_run / "selection.json").write_bytes(before)
    with pytest.raises(InputError) as refused:
        hand_off(full_run)
    problem = "holds the weights of step 8, and selection.json names step 4"
    assert str(refused.value) == f"{full_run / 'selected'} {problem}: run aesl select {full_run} --step 4 again"
    assert_nothing_left(full_run)
    select(full_run, 4)
    assert hand_off(full_run)["step"] == 4


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: (run / "selected/identity.json").unlink(), "holds the weights of no known step, and"),
        (lambda run: edit_json(run / "selected/identity.json", candidate="step-1"), "is of another selection than"),
        (lambda run: save_model(run / "selected", hidden_size=32), "has another model.safetensors than was selected"),
        (lambda run: (run / "selected/more.safetensors").write_bytes(b""), "has another more.safetensors than"),
        (lambda run: (run / "selected/model.safetensors").unlink(), "has another model.safetensors than was"),
    ],
)
def test_other_weights_than_were_selected_are_refused(full_run, spoil, said):
    select(full_run, 4)
    spoil(full_run)
    with pytest.raises(InputError, match=f"selected {said}"):
        hand_off(full_run)
    assert_nothing_left(full_run)


def test_contents_are_compared_when_asked(full_run):
    """Weights of one shape have one header: only the whole file tells them apart."""
    with pytest.raises(InputError, match="has no sha256 to be compared with: run aesl select .* --verify again"):
        hand_off(full_run, verify=True)
    select(full_run, 4)
    with pytest.raises(InputError, match="has no sha256 to be compared with: run aesl select .* --verify again"):
        hand_off(full_run, verify=True)
    select_run(full_run, verify=True)  # with no other option it makes the selection again
    assert hand_off(full_run, verify=True)["step"] == 4
    weights = full_run / "selected" / "model.safetensors"
    weights.unlink()  # it is a hard link of the candidate's
    shutil.copy2(full_run / "candidates/step-8/model.safetensors", weights)
    assert hand_off(full_run)["step"] == 4
    with pytest.raises(InputError, match="selected has another model.safetensors than was selected"):
        hand_off(full_run, verify=True)
    with pytest.raises(InputError, match="--verify is for a selection"):
        hand_off(full_run / "selected", verify=True)


def test_trainers_own_files_are_left_behind(full_run):
    for name in ("training_args.bin", "optimizer.pt", "trainer_state.json"):
        (full_run / "selected" / name).write_text("not a model")
    hand_off(full_run)
    names = {path.name for path in (full_run / "handoff").iterdir()}
    assert not names & {"training_args.bin", "optimizer.pt", "trainer_state.json"}
    assert {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    } <= names


def test_samples_that_are_all_empty_are_no_evidence(tmp_path, full_run):
    """A model that stops at once can still be handed over; what it is compared on then is no sample of its own."""
    row = {
        "completions": ["", ""],
        "num_tokens": [1, 1],
        "truncated": [False] * 2,
        "entropy": [0.0, 0.0],
        "rewards": None,
    }
    write_jsonl(full_run / "samples" / "step-4.jsonl", [{"prompt": PROMPTS[0]["prompt"], **row}])
    assert hand_off(full_run)["checks"]["own_samples"] is None


def rewrite_samples(run: Path, **changes) -> None:
    path = run / "samples" / "step-4.jsonl"
    write_jsonl(path, [{**json.loads(line), **changes} for line in path.read_text().splitlines()])


def test_the_tokens_that_were_drawn_are_compared_not_their_text(full_run):
    """Decoding drops special tokens, as `<think>` in some tokenizers: the text is not what the model said."""
    rows = [json.loads(line) for line in (full_run / "samples" / "step-4.jsonl").read_text().splitlines()]
    assert [encode(build_tokenizer(), [row], 259)[0][0] for row in rows] == [
        [*prompt_ids(build_tokenizer(), row["prompt"]), *row["token_ids"][0]] for row in rows
    ]
    rewrite_samples(full_run, completions=["zzzzzzzzzz"] * 4)
    own = hand_off(full_run)["checks"]["own_samples"]
    assert abs(own["nll"] - own["entropy"]) < 0.2
    (old, *_) = encode(build_tokenizer(), [{**rows[0], "token_ids": None, "completions": ["zz"]}], 259)
    assert old[0][old[1] :] == [build_tokenizer().convert_tokens_to_ids("z")] * 2  # an older run has nothing but text


@pytest.mark.parametrize(
    ("ids", "message"), [([[999]] * 4, "a token that is none of the model's 259"), ([5] * 4, "not one list of ids")]
)
def test_tokens_that_the_model_cannot_have_drawn_are_refused(full_run, ids, message):
    rewrite_samples(full_run, token_ids=ids)
    with pytest.raises(InputError, match=message):
        hand_off(full_run)


# ---- Adapters


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]}]
)
def test_merged_and_continued_give_the_adapters_log_probs(tmp_path, tiny_model_dir, settings):
    from peft import PeftModel

    model = lora(tiny_model_dir, **settings)
    run = make_run(tmp_path / "run", model, build_tokenizer())
    truth = log_probs(model, IDS)
    merged = hand_off(run, mode="auto")
    assert (merged["mode"], merged["base"]) == ("merge", str(Path(tiny_model_dir).resolve()))
    assert not (run / "handoff" / "adapter_config.json").exists()
    assert compare(truth, log_probs(AutoModelForCausalLM.from_pretrained(run / "handoff"), IDS))["max"] <= 1e-5
    continued = hand_off(run, mode="continue")
    assert continued["mode"] == "continue" and continued["log_probs_max_difference"] == 0
    base = AutoModelForCausalLM.from_pretrained(continued["base"])
    without = log_probs(base, IDS)
    with_adapter = log_probs(PeftModel.from_pretrained(base, run / "handoff").eval(), IDS)
    assert compare(truth, with_adapter)["max"] <= 1e-6
    # or the comparisons above would say nothing
    assert settings or compare(truth, without)["mean"] > 0.01


def test_a_bfloat16_adapter_is_merged_in_bfloat16(tmp_path, tiny_model_dir):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).save_pretrained(base)
    build_tokenizer().save_pretrained(base)
    run = make_run(tmp_path / "run", lora(str(base), dtype=torch.bfloat16), build_tokenizer())
    result = hand_off(run)
    assert result["checks"]["dtype"] == "bfloat16"
    assert 0 < result["checks"]["log_probs_mean_difference"] < 0.3 * result["checks"]["adapter_effect"]
    assert AutoModelForCausalLM.from_pretrained(run / "handoff", dtype="auto").dtype == torch.bfloat16


def test_a_continued_adapter_names_its_base_and_brings_tokenizer_and_stops(lora_run, tiny_model_dir):
    hand_off(lora_run, mode="continue")
    config = json.loads((lora_run / "handoff" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(Path(tiny_model_dir).resolve())
    assert GenerationConfig.from_pretrained(lora_run / "handoff").eos_token_id == IM_END
    assert AutoTokenizer.from_pretrained(lora_run / "handoff").chat_template


def test_a_base_that_moved_is_given_anew(lora_run, tmp_path, tiny_model_dir):
    config = lora_run / "selected" / "adapter_config.json"
    edit_json(config, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(InputError, match="it has moved: give it with --base"):
        hand_off(lora_run)
    assert_nothing_left(lora_run)
    assert hand_off(lora_run, base=tiny_model_dir)["base"] == str(Path(tiny_model_dir).resolve())


# ---- Another base


def save_model(folder: Path, **settings) -> str:
    tokenizer = build_tokenizer()
    build_model(tokenizer, **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_another_model_of_the_same_shape_is_refused(lora_run, tmp_path):
    other = save_model(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="is another model than .*embed_tokens.weight differs"):
        hand_off(lora_run, base=other)
    assert_nothing_left(lora_run)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_base_with_other_layers_is_refused(tmp_path, tiny_model_dir, layers):
    """PEFT itself loads both: it drops what finds no place, and leaves the adapter of further layers at zero."""
    adapter, output = tmp_path / "adapter", tmp_path / "out"
    lora(tiny_model_dir, target_modules=["q_proj", "v_proj"]).save_pretrained(adapter)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="org/only-on-the-hub")
    other = save_model(tmp_path / "other", num_hidden_layers=layers)
    with pytest.raises(InputError, match="does not fit the base .*: .*layers.* is only in one of the two"):
        hand_off(adapter, base=other, output=output)
    assert not output.exists()


def test_a_base_of_another_width_is_refused(lora_run, tmp_path):
    other = save_model(tmp_path / "other", hidden_size=32)
    edit_json(lora_run / "selected" / "adapter_config.json", base_model_name_or_path="org/only-on-the-hub")
    with pytest.raises(InputError, match="does not fit the base") as caught:
        hand_off(lora_run, base=other)
    assert "size mismatch" in str(caught.value)


def test_samples_tell_another_model_where_shapes_do_not(full_run):
    """Weights that give other probabilities find the run's samples unlikely: here a model that is sure of one byte."""
    model = AutoModelForCausalLM.from_pretrained(full_run / "selected")
    with torch.no_grad():
        model.model.norm.weight.mul_(60)
    model.save_pretrained(full_run / "selected")
    with pytest.raises(InputError, match="is not the one that gave the samples of step 4"):
        hand_off(full_run)
    assert_nothing_left(full_run)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(full_run):
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|new_end|>"})
    tokenizer.save_pretrained(full_run / "selected")
    with pytest.raises(InputError, match=r"<\|new_end\|> has id 259, the model 259 embeddings"):
        hand_off(full_run)


# ---- The tokens that end a completion


def eos_of(folder: Path) -> tuple:
    files = [json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json")]
    return *(values["eos_token_id"] for values in files), AutoTokenizer.from_pretrained(folder).eos_token_id


@pytest.mark.parametrize("mode", ["full", "merge"])
def test_an_eos_mismatch_is_repaired(request, tmp_path, tiny_model_dir, mode):
    """A base model as it comes: eos is <|endoftext|> everywhere, and the chat template ends turns with <|im_end|>."""
    run = request.getfixturevalue("full_run" if mode == "full" else "lora_run")
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    selected = run / "selected"
    tokenizer = build_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.pad_token = None
    tokenizer.save_pretrained(selected)
    weights = selected if mode == "full" else base
    for name in ("config.json", "generation_config.json"):
        edit_json(weights / name, eos_token_id=END_OF_TEXT, pad_token_id=None)
    if mode == "merge":
        edit_json(selected / "adapter_config.json", base_model_name_or_path=str(base))
    before = (selected / "config.json").read_text() if mode == "full" else None
    result = hand_off(run)
    both = [END_OF_TEXT, IM_END]
    assert result["eos_token_id"] == both and eos_of(run / "handoff") == (both, both, END_OF_TEXT)
    assert AutoTokenizer.from_pretrained(run / "handoff").pad_token_id == END_OF_TEXT == result["pad_token_id"]
    assert "generation_config: eos_token_id 256 added" in result["checks"]["stop_changes"]
    assert before is None or (selected / "config.json").read_text() == before


def test_a_plain_token_does_not_stay_eos_and_a_missing_one_comes_from_the_template(full_run):
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(full_run / "selected")
    edit_json(full_run / "selected" / "generation_config.json", eos_token_id=[2, END_OF_TEXT])
    result = hand_off(full_run)
    # 2 is the byte "#": as eos it would cut texts short. <|endoftext|> is special and was declared: it stays.
    assert result["eos_token_id"] == [IM_END, END_OF_TEXT]
    assert "tokenizer: eos_token set to <|im_end|>" in result["checks"]["stop_changes"]
    assert "generation_config: eos_token_id 2 removed" in result["checks"]["stop_changes"]
    assert AutoTokenizer.from_pretrained(full_run / "handoff").eos_token == "<|im_end|>"


def test_nothing_that_ends_a_completion_is_refused(full_run):
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
    tokenizer.save_pretrained(full_run / "selected")
    with pytest.raises(InputError, match="nothing ends a completion"):
        hand_off(full_run)


def test_a_model_that_never_stops_is_refused(tmp_path, tiny_model_dir):
    """Its samples agree with it, it only never gives the end token."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        weight = model.model.embed_tokens.weight
        weight[:, 0] = 1.0  # every token carries this direction through the residual stream
        weight[IM_END, 0] = -40.0
    run = make_run(tmp_path / "run", model, build_tokenizer())
    with pytest.raises(InputError, match=r"none of 16 samples stopped within 64 tokens; eos is 256 \(<\|im_end\|>\)"):
        hand_off(run)
    assert_nothing_left(run)


# ---- Refusals and crashes


def test_an_older_handoff_outlives_a_failure(full_run):
    hand_off(full_run)
    kept = (full_run / "handoff" / "handoff.json").read_text()
    (full_run / "selected" / "tokenizer.json").unlink()
    (full_run / "selected" / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="no tokenizer in"):
        hand_off(full_run)
    assert (full_run / "handoff" / "handoff.json").read_text() == kept
    assert [path.name for path in full_run.iterdir() if path.name.startswith(".")] == []


def test_a_difference_beyond_the_limit_is_refused(full_run, monkeypatch):
    """As if the weights on disk were not those that were measured."""

    def spoil(folder, *args):
        original(folder, *args)
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[3] += 0.1
        (folder / "model.safetensors").unlink()  # a link to the source's
        model.save_pretrained(folder)

    original = handoff.write_stops
    monkeypatch.setattr(handoff, "write_stops", spoil)
    with pytest.raises(InputError, match="log-probs of handoff and source differ by .* float32 allows 1e-05"):
        hand_off(full_run)
    assert_nothing_left(full_run)


@pytest.mark.parametrize(
    ("mode", "message"), [("merge", "holds full weights: use mode auto"), ("merg", "did you mean 'merge'")]
)
def test_a_mode_that_does_not_apply_is_refused(full_run, mode, message):
    with pytest.raises(InputError, match=message):
        hand_off(full_run, mode=mode)


def test_a_folder_without_weights_is_refused(tmp_path, full_run):
    with pytest.raises(InputError, match="is not a folder; did you mean 'run'"):
        hand_off(tmp_path / "rn")
    shutil.rmtree(full_run / "selected")
    with pytest.raises(InputError, match="aesl select .* again"):
        hand_off(full_run)
    (full_run / "selection.json").unlink()
    with pytest.raises(InputError, match="aesl select"):
        hand_off(full_run)


def test_main_takes_the_run_first(full_run, capsys):
    handoff.main([str(full_run), "--mode", "auto"])
    out, folder = capsys.readouterr().out, full_run / "handoff"
    assert re.fullmatch(
        rf"handoff: step 4, copied, checked \(log-probs within 0 nats, \d+ of 16 samples stopped\) -> {folder}; "
        rf'next: GRPOTrainer\(model="{folder}"\)\n',
        out,
    )
    with pytest.raises(InputError, match="which run"):
        handoff.main([])


# ---- Quantized bases


def test_a_merge_that_loses_the_adapter_is_refused():
    """Limits by arithmetic: the share of the adapter's effect that may be lost, and noise that always passes."""
    check, bfloat16 = check_differences, torch.bfloat16
    check({"max": 0.4, "mean": 0.1}, 0.79, "merge", bfloat16)  # the measured case
    check({"max": 0.4, "mean": 0.05}, 0.001, "merge", bfloat16)
    check({"max": 1e-5, "mean": 1e-5}, 0.0, "merge", torch.float32)
    for differences, effect, dtype in (
        ({"max": 0.9, "mean": 0.5}, 0.79, bfloat16),
        ({"max": 1e-2, "mean": 1e-3}, 0.01, torch.float32),
        ({"max": float("nan"), "mean": float("nan")}, 0.79, torch.float32),
    ):
        with pytest.raises(InputError, match="use --mode continue"):
            check(differences, effect, "merge", dtype)


def test_a_quantized_base_needs_bitsandbytes(lora_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    write_json(lora_run / "run.json", {"stage": "sft", "quantization": {"load_in_4bit": True}})
    with pytest.raises(InputError, match="needs the package bitsandbytes"):
        hand_off(lora_run)


@pytest.mark.slow
def test_qlora_merges_into_the_original_with_its_shift_or_goes_on_in_4_bits(tmp_path, tiny_model_dir):
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig

    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "wide", hidden_size=64, intermediate_size=128)).to(
        torch.bfloat16
    ).save_pretrained(base)
    build_tokenizer().save_pretrained(base)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = load_model(base, quantization.to_dict())
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    run = make_run(tmp_path / "run", model.eval(), build_tokenizer())
    write_json(run / "run.json", {"stage": "sft", "quantization": quantization.to_dict()})
    merged = hand_off(run)
    assert merged["mode"] == "merge" and merged["checks"]["dtype"] == "bfloat16"
    shift = merged["checks"]["quantization_shift"]
    assert 0 < shift["mean"] < shift["max"] < 1
    continued = hand_off(run, mode="continue")
    assert continued["mode"] == "continue" and continued["log_probs_max_difference"] <= 2e-2
    assert continued["quantization"]["load_in_4bit"] is True


# ---- What it is for


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["merge", "continue"])
def test_grpo_starts_from_the_folder_and_its_samples_stop(lora_run, tmp_path, mode):
    from aesl_trl import grpo

    hand_off(lora_run, mode=mode)
    write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)
    (tmp_path / "own.py").write_text(
        "def length(completions, **kwargs):\n    return [len(c[0]['content']) for c in completions]\n"
    )
    name = "adapter_name_or_path" if mode == "continue" else "model_name_or_path"
    values = {
        name: lora_run / "handoff",
        "dataset_name": tmp_path / "prompts.jsonl",
        "reward_funcs": tmp_path / "own.py:length",
        "output_dir": tmp_path / "out",
        "max_steps": 1,
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 64,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
    }
    grpo.main([argument for key, value in values.items() for argument in (f"--{key}", str(value))])
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert log[0]["completions/clipped_ratio"] < 1
