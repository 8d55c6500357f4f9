"""The pages: links and anchors lead somewhere, each page has its place, and the Python and shell in them runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from printed import blocks, run_printed, shrink, swapped
from site_hooks import linked, pages_beside_docs, place

from aesl_trl.files import read_jsonl


ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")


def pages() -> list[Path]:
    """Return every page of the project: all but what tools made, and the text that tests read."""
    tops = [*ROOT.glob("*.md"), *(ROOT / ".github").rglob("*.md")]
    return [*tops, *(path for name in ("docs", "recipes") for path in sorted((ROOT / name).rglob("*.md")))]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found, text = [], FENCE.sub("", page.read_text(encoding="utf-8"))
    for heading in re.findall(r"^#{1,6} +(.*?) *$", text, re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def nav() -> list[str]:
    """Return the pages of the site's navigation. The tags that name Python objects are mkdocs's own to read."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)

    def leaves(node):
        if isinstance(node, str):
            return [node]
        return [leaf for each in (node.values() if isinstance(node, dict) else node) for leaf in leaves(each)]

    return leaves(config["nav"])


# ---- Links


def test_each_relative_link_leads_to_a_file_and_to_a_heading_of_it():
    broken = []
    for page in pages():
        text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
        for target in LINK.findall(text):
            name, _, anchor = target.partition("#")
            if "://" in target or target.startswith("mailto:"):
                continue
            to = (page.parent / name).resolve() if name else page
            if not to.exists() or (anchor and anchor not in anchors(to)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_anchors_by_hand(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One: `two` & three?\n```\n# no heading\n```\n## [A link](x.md), t_scaling\n## Same\n## Same\n")
    assert anchors(page) == {"one-two--three", "a-link-t_scaling", "same", "same-1"}


# ---- The site


def test_the_navigation_names_each_page_once():
    named = nav()
    assert len(set(named)) == len(named)
    ours = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    beside = {path for path in pages_beside_docs() if path.endswith(".md")}
    assert ours <= set(named) and set(named) <= ours | beside


def test_links_of_the_site_by_hand(monkeypatch):
    monkeypatch.setattr("site_hooks.repository", lambda: None)
    page = "docs/howto/checkpoint.md"
    assert (
        linked("[a](../results.md#x) [b](#here) [c](https://x.y)", page)
        == "[a](../results.md#x) [b](#here) [c](https://x.y)"
    )
    assert linked("[a `b`](../../recipes/skills-tiny/README.md)", page) == "[a `b`](../recipes/skills-tiny/README.md)"
    assert linked("[code](../../aesl_trl/files.py), `[x](y)`", page) == "code, `[x](y)`"
    assert linked("![](../../recipes/skills-tiny/results/first/report_diversity.png)", page).startswith(
        "![](../recipes/"
    )
    assert linked("[docs](../../docs/data.md)", "recipes/skills-tiny/README.md") == "[docs](../../data.md)"
    monkeypatch.setattr("site_hooks.repository", lambda: "https://git.example/x")
    assert linked("[code](../../setup.cfg)", page) == "[code](https://git.example/x/blob/main/setup.cfg)"


def test_the_readme_is_the_sites_first_page():
    assert place("README.md") == "index.md" and place("docs/faq.md") == "faq.md" and place("setup.cfg") is None


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the site needs the extra docs: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    front = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert 'class="mermaid"' in front and (tmp_path / "site" / "recipes" / "skills-tiny" / "index.html").is_file()
    api = (tmp_path / "site" / "reference" / "api" / "index.html").read_text(encoding="utf-8")
    assert all(name in api for name in ("quantization_config", "diversity_prompts", "load_for_rl"))


# ---- What the pages print

SMALL = [
    {
        "prompt": [{"role": "user", "content": f"{n} + 1?"}],
        "completion": [{"role": "assistant", "content": f"\\boxed{{{n + 1}}}"}],
        "solution": str(n + 1),
    }
    for n in range(8)
]


def test_the_row_that_is_shown_is_the_recorded_one():
    (shown,) = map(json.loads, blocks(DOCS / "howto" / "checkpoint.md", "json"))
    recorded = read_jsonl(ROOT / "recipes/skills-tiny/results/first/nll_turning_point/seed-0/sft/diversity.jsonl")
    row = next(row for row in recorded if row["step"] == shown["step"])
    assert {name: round(row[name], 3) if isinstance(row[name], float) else row[name] for name in shown} == shown


@pytest.mark.parametrize(
    ("page", "index", "said"),
    [
        ("reference/run_folder.md", 0, "entropy is highest at step 30: 0.24 nats\n"),
        ("getting_started/own_sft_script.md", 2, "aesl 50\n"),
        ("getting_started/own_grpo_script.md", 1, "[1.0]\n"),
        ("howto/hub.md", 0, ""),
    ],
)
def test_python_without_a_training(page, index, said, capsys, monkeypatch, tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    run_printed(blocks(DOCS / page)[index], page)
    assert capsys.readouterr().out == said


@pytest.mark.slow
def test_your_own_scripts(tmp_path, tiny_model_dir, monkeypatch):
    """The two pages in their order: a callback, AESL, the two commands, and GRPO from what they made."""
    import datasets
    import trl

    monkeypatch.chdir(tmp_path)
    rows = datasets.Dataset.from_list(SMALL)
    shrink(monkeypatch, SMALL)
    watched = trl.SFTTrainer(tiny_model_dir, trl.SFTConfig(output_dir="watched"), train_dataset=rows)
    callback, aesl, _ = blocks(DOCS / "getting_started/own_sft_script.md")
    run_printed(
        swapped(callback, {"max_new_tokens=512": "max_new_tokens=12"}),
        "callback",
        {"trainer": watched, "held_out": rows},
    )
    assert (tmp_path / "watched/_aesl/selection.json").is_file()
    found = {"demonstrations": rows, "held_out": rows}
    run_printed(swapped(aesl, {"Qwen/Qwen2.5-1.5B-Instruct": tiny_model_dir}), "aesl", found)
    assert found["trainer"].state.global_step == 4
    (commands,) = blocks(DOCS / "getting_started/own_grpo_script.md", "bash")
    run_shell(commands, tmp_path)

    def reward(completions, **kwargs):
        return [float(len(completion[0]["content"])) for completion in completions]

    grpo = run_printed(
        blocks(DOCS / "getting_started/own_grpo_script.md")[0],
        "grpo",
        {"reward": reward, "prompts": rows.select_columns("prompt")},
    )
    assert grpo["trainer"].state.global_step == 1


def run_shell(text: str, folder: Path) -> str:
    """Run the lines of a block as a user would, one after the other, and return what they printed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


# Blocks of shell that no test can run, and why
NOT_RUN = {
    "pip install .": "needs a registry",
    "aesl recipes check recipes/Qwen2.5-1.5B-Instruct --brief": "run by tests/recipes/test_check.py",
}
SIZES = {
    "sft/config_aesl.yaml": {
        "max_steps: 400": "max_steps: 40",
        "diversity_num_prompts: 96": "diversity_num_prompts: 32",
    },
    "grpo/config.yaml": {"max_steps: 160": "max_steps: 4"},
    "eval.yaml": {"num_prompts: 384": "num_prompts: 32"},
    "probe.yaml": {"num_prompts: 96": "num_prompts: 64"},
}


def shell_blocks() -> dict[str, list[str]]:
    """Return the blocks of shell of the pages that a newcomer reads, in the order in which they run."""
    first = ["getting_started/installation.md", "getting_started/quick_start.md"]
    others = ["howto/checkpoint.md", "howto/ready.md", "howto/out_of_memory.md", "choose_recipe.md"]
    found = {page: blocks(DOCS / page, "bash") for page in [*first, *others]}
    return {page: [block for block in texts if block.strip() not in NOT_RUN] for page, texts in found.items()}


def test_every_block_of_the_newcomers_pages_is_run():
    """A new page with Python or shell needs its place in a test here."""
    run = {*shell_blocks(), "getting_started/own_sft_script.md", "getting_started/own_grpo_script.md"}
    run |= {"reference/run_folder.md", "howto/hub.md", "howto/lora.md"}
    folders = ("getting_started", "concepts", "howto", "commands", "reference")
    candidates = [*DOCS.glob("*.md"), *(path for name in folders for path in (DOCS / name).glob("*.md"))]
    older = {"compare", "data", "entropy", "evaluation", "handoff", "losses", "readiness", "recipes", "security"}
    older |= {
        "monitoring_cost",
        "turning_point",
        "benchmarks",
        "several_gpus",
        "trackers",
    }  # they have tests of their own
    with_code = {
        path.relative_to(DOCS).as_posix()
        for path in candidates
        if not (path.parent == DOCS and path.stem in older) and (blocks(path) or blocks(path, "bash"))
    }
    assert with_code == run


@pytest.mark.slow
def test_the_shell_of_the_newcomers_pages(tmp_path):
    """As printed, one after the other, in a folder with the recipes; only the sizes of skills-tiny are smaller."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("results"))
    for name, swaps in SIZES.items():
        path = tmp_path / "recipes" / "skills-tiny" / name
        path.write_text(swapped(path.read_text(encoding="utf-8"), swaps), encoding="utf-8")
    chain = tmp_path / "recipes/skills-tiny/chain.yaml"
    chain.write_text(chain.read_text(encoding="utf-8").split("  compare:")[0], encoding="utf-8")  # needs recorded runs
    for texts in shell_blocks().values():
        for text in texts:
            run_shell(text, tmp_path)
    assert (tmp_path / "runs/demo/report.html").is_file()
    assert json.loads((tmp_path / "runs/demo/selection.json").read_text())["step"] == 30


@pytest.mark.slow
def test_the_adapter_of_the_page_on_lora(tmp_path, tiny_model_dir, monkeypatch, tokenizer):
    """What RL goes on training is the adapter of the handoff; tests/models/test_handoff_page.py has the other way."""
    import datasets
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from aesl_trl.models.handoff import hand_off

    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), lora).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    hand_off(tmp_path / "adapter", output=tmp_path / "cold-start/_aesl/handoff", mode="continue")
    monkeypatch.chdir(tmp_path)
    shrink(monkeypatch, SMALL)

    def reward(completions, **kwargs):
        return [float(len(completion[0]["content"])) for completion in completions]

    found = {"reward": reward, "prompts": datasets.Dataset.from_list(SMALL).select_columns("prompt")}
    (block,) = blocks(DOCS / "howto/lora.md")
    run_printed(block, "howto/lora.md", found)
    trained = [name for name, parameter in found["trainer"].model.named_parameters() if parameter.requires_grad]
    assert found["trainer"].state.global_step == 1 and trained and all("lora_" in name for name in trained)
