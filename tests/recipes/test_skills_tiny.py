"""The embedded task: honest splits, an exact reward, and a base model that agrees with itself about when to stop."""

from pathlib import Path

import build_skills_tiny_base as builder
import pytest
import torch
import yaml
from recorded_results import cells_of, rows_with_intervals, seeds_of
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from aesl_trl.files import POSITIONS, TRAINER_STATE, read_json, read_jsonl
from aesl_trl.recipes.recipes import find_configs


ROOT = Path(__file__).resolve().parents[2]
RECIPE, CHAIN_RECIPE = ROOT / "recipes" / "skills-tiny", ROOT / "recipes" / "skills-chain-tiny"
RESULTS = RECIPE / "results" / "first"

task = builder.task
GENERATORS = [task.demonstrations, task.eval_demonstrations, task.rl_problems, task.held_out]


def symbols(rows):
    return [row["prompt"][0]["content"].split()[0] for row in rows]


def lists(rows):
    return {tuple(row["prompt"][0]["content"].split()[1:]) for row in rows}


def reward(completion, answer="one two three four five six"):
    return task.skill_reward(prompts=None, completions=[completion], answer=[answer])[0]


# ---- Data


@pytest.mark.parametrize("generator", GENERATORS)
def test_a_seed_fixes_the_rows_and_another_changes_them(generator):
    assert generator(3) == generator(3)
    assert generator(3) != generator(4)


ABLATIONS = [(50, 4, 4), (800, 4, 4), (200, 2, 2), (200, 8, 4), (200, 8, 8), (200, 4, 4)]
NAMES = ("50", "800", "2_skills", "8_symbols", "8_skills", "wrong_25")


@pytest.mark.parametrize("name, counts", list(zip(NAMES, ABLATIONS, strict=True)), ids=NAMES)
def test_ablations_change_one_thing_of_the_demonstrations(name, counts):
    rows = getattr(task, f"demonstrations_{name}")(3)
    assert (len(rows), len(set(symbols(rows))), len({task.SKILL_OF[symbol] for symbol in symbols(rows)})) == counts
    assert lists(rows) <= lists(task.demonstrations(3, num=800))
    scores = [reward(row["completion"], row["answer"]) for row in rows]
    # a wrong skill may give the right list all the same, as on equal digits
    assert sum(scores) == len(rows) if name != "wrong_25" else 150 <= sum(scores) <= 153
    assert rows == getattr(task, f"demonstrations_{name}")(3) != getattr(task, f"demonstrations_{name}")(4)


def test_no_digit_list_serves_two_uses_whatever_the_seeds():
    found = [set().union(*(lists(generator(seed)) for seed in range(3))) for generator in GENERATORS]
    stream = task.digit_lists("base", 0)
    found.append({tuple(task.in_words(next(stream)).split()) for _ in range(5000)})
    assert len(set().union(*found)) == sum(map(len, found))


def test_uses_divide_the_residues():
    residues = [residue for use in task.USES.values() for residue in use]
    assert sorted(residues) == list(range(7))


@pytest.mark.parametrize("generator", GENERATORS)
def test_a_seed_repeats_no_digit_list(generator):
    rows = generator(0)
    assert len(lists(rows)) == len(rows)


def test_demonstrations_cover_four_symbols_of_rare_skills():
    rows = task.demonstrations(0)
    assert len(rows) == 200
    assert {task.SKILL_OF[symbol] for symbol in symbols(rows)} == set(task.RARE)
    assert len(set(symbols(rows))) == 4
    assert set(symbols(task.eval_demonstrations(0))) == set(symbols(rows))


@pytest.mark.parametrize("generator", [task.rl_problems, task.held_out])
def test_problems_ask_for_every_symbol_equally_often_and_show_no_answer(generator):
    rows = generator(0)[:96]
    assert [symbols(rows).count(symbol) for symbol in task.SYMBOLS] == [6] * 16
    assert all(set(row) == {"prompt", "answer", "symbol"} for row in rows)
    assert [row["symbol"] for row in rows] == symbols(rows)


def test_two_symbols_ask_for_each_skill():
    skills = [task.SKILL_OF[symbol] for symbol in task.SYMBOLS]
    assert [skills.count(skill) for skill in task.SKILLS] == [2] * 8


def test_each_base_prefers_other_skills_and_is_shown_its_rare_ones():
    assert task.roles(0) == (tuple(task.SKILLS)[:4], tuple(task.SKILLS)[4:], tuple("EFGH"))
    found = [task.roles(base) for base in range(3)]
    assert found == [task.roles(base) for base in range(3)]
    for base, (common, rare, demonstrated) in enumerate(found):
        assert {*common, *rare} == set(task.SKILLS) and len(common) == len(rare) == 4
        assert tuple(task.SKILL_OF[symbol] for symbol in demonstrated) == rare
        suffix = f"_base_{base}" if base else ""
        for name in ("demonstrations", "eval_demonstrations"):
            rows = getattr(task, name + suffix)(3)
            assert set(symbols(rows)) == set(demonstrated) and rows == getattr(task, name)(3, base=base)
    assert len({frozenset(common) for common, _, _ in found}) == 3


# ---- Two skills in turn


def test_a_chain_by_hand():
    """Ascend, then one place to the left."""
    assert task.chain_of("ascend", "left", [3, 0, 4, 1, 5, 9]) == (
        "ascend zero one three four five nine left one three four five nine zero"
    )


def test_demonstrated_chains_are_among_the_problems_of_rl():
    demonstrated, problems = task.chain_demonstrations(3), task.chain_rl_problems(3)
    assert len(demonstrated) == task.NUM_CHAINS
    assert lists(demonstrated) < lists(problems)
    asked = {(row["prompt"][0]["content"], row["answer"]) for row in problems}
    assert all((row["prompt"][0]["content"], row["answer"]) in asked for row in demonstrated)
    assert task.chain_demonstrations(3) == demonstrated != task.chain_demonstrations(4)


def test_chains_go_round_all_pairs_and_no_training_sees_the_held_out_ones():
    rows = task.chain_held_out(0)[:192]
    pairs = [tuple(row["prompt"][0]["content"].split()[:2]) for row in rows]
    assert len(set(pairs)) == len(rows) == len(task.FIRST) * len(task.SECOND)
    assert len({symbol for symbol, _ in pairs[:24]}) == 24 and len({other for _, other in pairs[:24]}) == 8
    digits = [
        {tuple(row["prompt"][0]["content"].split()[2:]) for row in rows}
        for rows in (task.chain_rl_problems(0), task.chain_eval_demonstrations(0), rows)
    ]
    assert len(set().union(*digits)) == sum(map(len, digits)) == 5120 + 192 + 192


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("ascend zero one three four five nine left one three four five nine zero", 1.0),
        ("right zero one three four five nine swap one three four five nine zero", 1.0),  # lists are asked for
        ("ascend zero one three four five nine", 0.0),
        ("left one three four five nine zero", 0.0),  # the list at the end is not all
        ("ascend zero one three four nine five left one three four five nine zero", 0.0),
        ("ascend zero one three four five nine go one three four five nine zero", 0.0),
        ("ascend zero one three four five nine left one three four five nine zero left", 0.0),
    ],
)
def test_a_chain_is_right_when_both_lists_are(completion, expected):
    assert reward(completion, "zero one three four five nine one three four five nine zero") == expected


def test_gold_chains_are_right():
    rows = task.chain_demonstrations(1) + task.chain_eval_demonstrations(1)
    assert task.skill_reward(None, [row["completion"] for row in rows], [row["answer"] for row in rows]) == [1] * len(
        rows
    )


@pytest.mark.parametrize(
    ("skill", "result"),
    [
        ("reverse", [9, 5, 1, 4, 0, 3]),
        ("ascend", [0, 1, 3, 4, 5, 9]),
        ("descend", [9, 5, 4, 3, 1, 0]),
        ("left", [0, 4, 1, 5, 9, 3]),
        ("right", [9, 3, 0, 4, 1, 5]),
        ("add", [4, 1, 5, 2, 6, 0]),
        ("complement", [6, 9, 5, 8, 4, 0]),
        ("swap", [0, 3, 1, 4, 9, 5]),
    ],
)
def test_each_skill_by_hand(skill, result):
    assert task.SKILLS[skill]([3, 0, 4, 1, 5, 9]) == result


# ---- Reward


@pytest.mark.parametrize("generator", [task.demonstrations, task.eval_demonstrations])
def test_gold_completions_are_right(generator):
    rows = generator(1)
    scores = task.skill_reward(
        [row["prompt"] for row in rows], [row["completion"] for row in rows], [row["answer"] for row in rows]
    )
    assert scores == [1.0] * len(rows)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("ascend one two three four five six", 1.0),
        ("left one two three four five six", 1.0),  # the list is asked for, not the name
        (" ascend one two three four five six\n", 1.0),
        ([{"role": "assistant", "content": "ascend one two three four five six"}], 1.0),
        ("ascend one two three four six five", 0.0),
        ("ascend one two three four five", 0.0),
        ("ascend one two three four five six six", 0.0),
        ("ascend one two three four five six left", 0.0),
        ("ascend  one two three four five six", 0.0),
        ("one two three four five six", 0.0),
        ("sort one two three four five six", 0.0),
        ("Ascend one two three four five six", 0.0),
        ("ascend 1 2 3 4 5 6", 0.0),
        ("ascend", 0.0),
        ("", 0.0),
        ([], 0.0),
        ([{"role": "assistant", "content": None}], 0.0),
    ],
)
def test_reward_is_exact(completion, expected):
    assert reward(completion) == expected


def test_reward_grades_each_completion_by_its_own_answer():
    answers = ["one one one one one one", "two two two two two two"]
    completions = ["add two two two two two two"] * 2
    assert task.skill_reward(None, completions, answer=answers, trainer_state=None) == [0.0, 1.0]


# ---- Base model


@pytest.mark.parametrize("recipe", [RECIPE, CHAIN_RECIPE], ids=lambda path: path.name)
def test_base_is_under_two_megabytes_and_holds_no_pickle(recipe):
    files = [path for path in (recipe / "base").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2_000_000
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors"}


def test_base_agrees_with_itself_about_the_end():
    tokenizer = AutoTokenizer.from_pretrained(RECIPE / "base")
    model = AutoModelForCausalLM.from_pretrained(RECIPE / "base")
    row = task.demonstrations(0)[0]
    rendered = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
    assert rendered.endswith(tokenizer.eos_token)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert GenerationConfig.from_pretrained(RECIPE / "base").eos_token_id == tokenizer.eos_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_every_word_of_the_task_is_one_token_after_loading():
    tokenizer = AutoTokenizer.from_pretrained(RECIPE / "base")
    for skill in task.SKILLS:
        text = task.completion_of(skill, [0, 1, 2, 3, 4, 5]) + " six seven eight nine"
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.split())
        assert tokenizer.decode(ids) == text
    assert all(len(tokenizer(symbol)["input_ids"]) == 1 for symbol in task.SYMBOLS)


def test_template_marks_the_completion_and_extends_the_prompt():
    tokenizer = AutoTokenizer.from_pretrained(RECIPE / "base")
    row = task.demonstrations(0)[0]
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(
        row["prompt"] + row["completion"], return_dict=True, return_assistant_tokens_mask=True
    )
    assert whole["input_ids"][: len(prompt)] == prompt
    assert whole["assistant_masks"] == [0] * len(prompt) + [1] * (len(whole["input_ids"]) - len(prompt))


def test_base_stops_and_gets_some_problems_right():
    tokenizer = AutoTokenizer.from_pretrained(RECIPE / "base")
    model = AutoModelForCausalLM.from_pretrained(RECIPE / "base").eval()
    rows = task.held_out(0)[:96]
    torch.manual_seed(0)
    prompts = tokenizer.apply_chat_template(
        [row["prompt"] for row in rows], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=12, num_return_sequences=4)
    answers = ids[:, prompts["input_ids"].shape[1] :]
    scores = task.skill_reward(
        None,
        tokenizer.batch_decode(answers, skip_special_tokens=True),
        [row["answer"] for row in rows for _ in "1234"],
    )
    assert (answers == tokenizer.eos_token_id).any(1).float().mean() > 0.98
    assert 0.07 < sum(scores) / len(scores) < 0.20  # 0.125 and chance agreements; standard error 0.02


def test_the_chains_base_knows_the_second_skill_and_gets_some_problems_right():
    tokenizer = AutoTokenizer.from_pretrained(CHAIN_RECIPE / "base")
    model = AutoModelForCausalLM.from_pretrained(CHAIN_RECIPE / "base").eval()
    rows = task.chain_held_out(0, num=192)
    torch.manual_seed(0)
    prompts = tokenizer.apply_chat_template(
        [row["prompt"] for row in rows], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=20, num_return_sequences=2)
    texts = tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    asked = [row["prompt"][0]["content"].split()[1] for row in rows for _ in "12"]
    known = [text.split()[7:8] == [task.SECOND[symbol]] for text, symbol in zip(texts, asked, strict=True)]
    assert sum(known) / len(known) == pytest.approx(0.825, abs=0.08)  # standard error 0.02
    right = task.skill_reward(None, texts, [row["answer"] for row in rows for _ in "12"])
    assert 0.05 < sum(right) / len(right) < 0.17  # an eighth of 0.825, where no list goes wrong; standard error 0.015


# ---- Builder


def test_labels_are_the_completion_and_its_end():
    tokenizer = builder.build_tokenizer()
    ids, labels = next(builder.batches(tokenizer, builder.skewed(), rows=5, seed=0))
    assert ids.shape == labels.shape == (5, 2 * task.LENGTH + 5)
    assert (labels[:, : task.LENGTH + 3] == -100).all()
    assert (labels[:, task.LENGTH + 3 :] == ids[:, task.LENGTH + 3 :]).all()
    assert (labels[:, -1] == tokenizer.eos_token_id).all()


def test_a_chain_of_the_base_knows_its_second_skill():
    """The symbol's own skill in 0.8 of the cases, and in an eighth of the others."""
    tokenizer = builder.build_tokenizer(chain=True)
    ids, labels = next(builder.batches(tokenizer, builder.skewed(1), rows=2000, seed=0, chain=True))
    assert ids.shape == (2000, 2 + 2 + 3 * task.LENGTH + 3)
    assert (labels[:, : task.LENGTH + 4] == -100).all() and (labels[:, -1] == tokenizer.eos_token_id).all()
    texts = tokenizer.batch_decode(ids)
    words = [
        text.removeprefix("<|user|>").replace("<|assistant|>", " ").removesuffix("<|end|>").split() for text in texts
    ]
    right = [task.SECOND[row[1]] == row[15] for row in words[::2]]
    assert sum(right) / len(right) == pytest.approx(0.825, abs=0.05)  # standard error 0.012
    assert all(row[:2] == [row[8], row[15]] for row in words[1::2])
    assert sum(row[8] in task.roles(1)[1] for row in words[::2]) < 40  # 0.02 of 1000


def test_mixture_is_what_the_base_is_trained_on():
    tokenizer = builder.build_tokenizer()
    ids, _ = next(builder.batches(tokenizer, builder.skewed(), rows=2000, seed=0))
    rare = {tokenizer.convert_tokens_to_ids(skill) for skill in task.RARE}
    answers = ids[:, task.LENGTH + 3]
    symbols, names = answers[::2], answers[1::2]  # rows alternate between a symbol and a skill called by its name
    assert sum(builder.skewed().values()) == pytest.approx(1)
    share = sum(int(i) in rare for i in symbols) / len(symbols)
    assert 0.005 < share < 0.04  # 4 x 0.005, standard error 0.0044
    assert 0.45 < sum(int(i) in rare for i in names) / len(names) < 0.55  # half of the skills, standard error 0.016
    assert torch.equal(ids[1::2, 1], names)


@pytest.mark.parametrize("chain", [False, True])
def test_shipped_tokenizer_is_the_builders(chain):
    shipped = AutoTokenizer.from_pretrained((CHAIN_RECIPE if chain else RECIPE) / "base")
    assert shipped.get_vocab() == builder.build_tokenizer(chain).get_vocab()
    assert shipped.chat_template == builder.CHAT_TEMPLATE


def test_a_few_steps_learn_and_save(tmp_path):
    tokenizer = builder.build_tokenizer()
    model = builder.build_model(tokenizer, seed=0)
    first, later = (
        builder.train(
            model, builder.batches(tokenizer, builder.EQUAL, rows=16, seed=0), steps=steps, warmup=2, decay=2
        )
        for steps in (1, 12)
    )
    assert later < first - 0.5
    builder.build(tmp_path, equal_steps=1, skewed_steps=1)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() == model.num_parameters()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whole_build_reaches_both_mixtures_entropy():
    tokenizer = builder.build_tokenizer()
    model = builder.build_model(tokenizer, seed=0)
    rows = builder.ROWS
    equal_batches, skewed_batches = (
        builder.batches(tokenizer, mixture, rows=rows, seed=seed)
        for seed, mixture in enumerate((builder.EQUAL, builder.skewed()))
    )
    equal = builder.train(model, equal_batches, steps=850, warmup=50, decay=0)
    skewed = builder.train(model, skewed_batches, steps=150, warmup=0, decay=40)
    assert equal < 0.30  # log(8) / 8 tokens = 0.26 where every skill is done right
    assert skewed < 0.23  # 1.613 / 8 = 0.20


# ---- Configs


@pytest.mark.parametrize(
    "chain", sorted(ROOT.glob("recipes/skills-*/chain*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_chain_is_accepted(chain, tmp_path):
    from aesl_trl.chain.config import read_config
    from aesl_trl.chain.stages import Chain, check_stages

    config = read_config(chain, output_dir=str(tmp_path / "run"))
    check_stages(Chain(config, chain))


@pytest.mark.parametrize(("recipe", "tuned"), [(RECIPE, set()), (CHAIN_RECIPE, {"learning_rate"})])
def test_cold_starts_differ_in_the_loss_and_what_is_tuned(recipe, tuned):
    aesl, nll = (yaml.safe_load((recipe / "sft" / f"config_{name}.yaml").read_text()) for name in ("aesl", "nll"))
    different = {key for key in aesl | nll if aesl.get(key) != nll.get(key)}
    assert different == {"cold_start_loss", "t_scaling", "output_dir"} | tuned


def test_recipes_say_their_hardware_on_line_one():
    for path in find_configs([RECIPE, CHAIN_RECIPE, ROOT / "recipes" / "accelerate_configs"]):
        first = path.read_text().splitlines()[0]
        assert first.startswith("#") and any(word in first for word in ("CPU", "GPU")), path


# ---- What was recorded


@pytest.mark.parametrize(("comparison", "count"), [("main", 45), ("steps", 51)])
def test_recorded_symbols_are_those_of_the_recorded_comparison(comparison, count):
    """Each symbol is asked for equally often, so their mean is the cell's pass@1."""
    cells, symbols = cells_of(RESULTS / comparison), read_json(RESULTS / comparison / "by_symbol.json")
    assert len(symbols) == len(cells) == count
    for cell in symbols:
        whole = cells[cell["row"], cell["seed"]]
        for when in ("before", "after"):
            assert set(cell[when]) == set(task.SYMBOLS)
            assert sum(cell[when].values()) / 16 == pytest.approx(whole[when]["pass@1"], abs=1e-4)


def test_the_results_readme_says_what_was_recorded():
    text = (RESULTS / "README.md").read_text()
    for shown in rows_with_intervals(RESULTS / "main"):
        assert shown in text, shown


def test_the_results_readme_says_what_each_step_was_worth():
    text = (RESULTS / "README.md").read_text()
    steps = read_json(RESULTS / "steps" / "compare.json")
    after = {row["row"]: row["after"]["pass@1"]["mean"] for row in steps["rows"]}
    for step in (10, 20, 30, 40, 60, 100, 200, 400):
        (line,) = [line.replace("*", "") for line in text.splitlines() if line.startswith(f"| {step} |")]
        found = [cell.strip() for cell in line.split("|")]
        assert [found[5], found[7]] == [f"{after[f'{loss}/step-{step}']:.2f}" for loss in ("nll", "aesl")]
    for found in steps["correlations"]:
        assert f"{found['rho']:.2f} [{found['low']:.2f}, {found['high']:.2f}]" in text


def test_the_results_readme_says_what_each_ablation_ended_at():
    """Every line of the two tables: the mean after RL and the seeds behind it, for each row that the line names."""
    section = (RESULTS / "README.md").read_text().split("## Ablations")[1].split("\n## ")[0].replace("*", "")
    seeds = seeds_of(RESULTS / "ablations")
    assert len(seeds) == 29 and {len(shown.split()) for shown in seeds.values()} == {5}  # mean, bar, three seeds
    for shown in seeds.values():
        assert f"| {shown} |" in section, shown


def test_the_results_readme_says_when_aesl_acted():
    """Loss / nll is the weight of what is being learnt: near 1 until step 40, near 0 from step 80 on."""
    text = (RESULTS / "README.md").read_text()
    runs = [RESULTS / "aesl_last" / f"seed-{seed}" / "sft" for seed in range(5)]
    logs = [
        {row["step"]: row for row in read_json(run / TRAINER_STATE)["log_history"] if "loss" in row} for run in runs
    ]
    positions = {row["step"]: row for row in read_jsonl(runs[0] / POSITIONS)}
    for step in (10, 20, 40, 60, 80):
        shares = " ".join(f"{log[step]['loss'] / log[step]['nll']:.2f}" for log in logs)
        mean, first = logs[0][step]["weight_mean"], positions[step]["weight"][0]
        assert f"| step {step} | {shares} | {mean:.2f} | {first:.2f} |" in text


def test_what_two_comparisons_have_in_common_is_the_same():
    """The same start, seed and budget of RL, run in two comparisons on one machine: the same figures, bit for bit."""
    main, steps, ablations = (cells_of(RESULTS / name) for name in ("main", "steps", "ablations"))
    for seed in (0, 1, 2):
        for here, other, there in (
            ("base", steps, "base"),
            ("nll/turning_point", steps, "nll/step-30"),
            ("nll/last", ablations, "standard/nll/last"),
            ("aesl/last", ablations, "standard/aesl/last"),
        ):
            assert main[here, seed]["after"] == other[there, seed]["after"]


def test_the_evaluation_counts_by_a_column_that_its_rows_have():
    evaluation = yaml.safe_load((RECIPE / "eval.yaml").read_text())
    assert len({row[evaluation["count_by"]] for row in task.held_out(0)[: evaluation["num_prompts"]]}) == 16
