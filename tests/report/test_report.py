"""The page: every plot, no script, hostile texts; runs that are only part of a story; the command."""

import json
import random
import re
import shutil
import subprocess
import sys

import pytest
from report_runs import HOSTILE, Page, fake_run, sample_row, written_page

from aesl_trl.files import write_json
from aesl_trl.report.report import main, write_report


def test_every_plot_of_the_story_is_drawn_in_the_page_and_beside_it(chain):
    page = Page((chain / "report.html").read_text(encoding="utf-8"))
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("figure", "aria-label")]
    assert [label.split(":")[0] for label in labels] == [
        *("pass@1", "pass@8"),
        "Entropy of own samples (nats per token)",
        "Self-BLEU of own samples",
        "Distinct 2-grams (share)",
        *("pass@1", "pass@8"),
        *("Prompts by outcome", "Prompts by outcome"),  # AESL, and the one nll run that two arms selected from
        *("Plain nll (nats per token)", "Loss as trained", "Held-out nll (nats per token)"),
        "Effective weight (loss / nll)",
        *("Mean weight", "Share of weights under 0.1", "Mean temperature", "Weight at the end-of-sequence token"),
        *("Mean weight by position", "Mean temperature by position"),
        *("Reward", "Standard deviation of the reward in a group", "Share of groups with equal rewards"),
        *("Entropy (nats per token)", "Share of completions cut at the length limit"),
    ]
    roots = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "viewbox")]
    assert len(roots) == len(labels)
    markdown = (chain / "report.md").read_text(encoding="utf-8")
    for name in ("headline", "diversity", "loss", "positions", "rl"):
        assert (chain / f"report_{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(report_{name}.png)" in markdown


def test_the_page_is_self_contained_and_runs_no_script(chain):
    html = (chain / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not re.findall(r"https?://|@import|url\((?!#)", html)
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(page.tags)
    references = [value for _, name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert references and all(value.startswith("#") for value in references)


def test_clip_paths_and_markers_of_one_panel_do_not_reach_into_another(chain):
    page = Page((chain / "report.html").read_text(encoding="utf-8"))
    clips = [value for tag, name, value in page.attributes if tag == "clippath" and name == "id"]
    assert clips and len(clips) == len(set(clips))
    ids = {value for _, name, value in page.attributes if name == "id"}
    used = {value[1:] for tag, name, value in page.attributes if tag == "use" and name == "xlink:href"}
    assert used and used <= ids


def test_colours_follow_the_theme(chain):
    html = (chain / "report.html").read_text(encoding="utf-8")
    body = html[html.index("<body>") :]
    assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", body)
    assert "prefers-color-scheme: dark" in html


def test_hostile_texts_are_shown_and_never_read_as_markup(tmp_path):
    run = fake_run(tmp_path / "<b>&\"'$x$|{{ 1 }}", "aesl", weights=True)
    rows = [{**sample_row(i, 0, 3, random.Random(i)), "prompt": HOSTILE[i]} for i in range(3)]
    rows = [{**row, "completions": [*HOSTILE, *HOSTILE[:2]]} for row in rows]
    for step in (0, 20, 100, 800):
        path = run / f"sft/samples/step-{step}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))  # ASCII, so that lone surrogates survive
    selection = json.loads((run / "selection.json").read_text())
    write_json(run / "selection.json", {**selection, "reason": HOSTILE[0]})
    html = write_report([run], title="</title><script>1</script>").read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "img"} & set(page.tags)
    assert page.tags.count("b") == 3  # the numbers of three prompts, none from the run's name
    assert "<script>alert('x')</script>" in page.words and "{{ 7 * 7 }}" in page.words
    assert "\u202e" not in html and "\x1b" not in html and "\x00" not in html
    assert "3400 more characters" in page.words
    assert html.count("very long ") <= 60 * 3 * 3
    assert "<script>" not in (run / "report.md").read_text(encoding="utf-8")


def test_a_run_that_has_only_begun_gets_a_page(tmp_path):
    run = fake_run(tmp_path / "aesl", "aesl")
    for path in [path for path in run.rglob("*") if path.is_file()]:
        if path.name not in ("diversity.jsonl", "run.json"):
            path.unlink()
    write_json(run / "chain.json", {"sft_dir": "sft", "seed": 0})
    first = (run / "sft/diversity.jsonl").read_text().splitlines()[0]
    (run / "sft/diversity.jsonl").write_text(first + "\n")
    page = written_page([run])
    assert "aesl has not been evaluated after RL" in page.words
    assert "Before and after RL" not in page.words  # nothing is known of it
    assert "figure" in page.tags


def test_a_base_arm_alone_says_that_it_has_no_cold_start(tmp_path, undrawn):
    words = written_page([fake_run(tmp_path / "base", "base", weights=True)]).words
    assert "RL from the base model" in words
    assert "Missing in base: an SFT stage (RL from the base model, or not started)" in words
    assert "Diversity during SFT" not in words


def test_an_sft_folder_is_a_run(tmp_path, undrawn):
    run = fake_run(tmp_path / "mine", "nll_turning_point")
    page = written_page([run / "sft"], output=tmp_path / "out")
    assert "From cold start to RL: mine" in page.words
    assert "Start of RL as measured during SFT" in page.words
    assert (tmp_path / "out/report.md").exists() and not (run / "sft/report.html").exists()


def test_a_record_without_its_sft_folder_is_not_taken_for_the_base_arm(tmp_path, undrawn):
    run = fake_run(tmp_path / "nll_last/seed-0", "nll_last")
    shutil.rmtree(run / "sft")
    words = written_page([run]).words
    assert "RL from the base model" not in words
    assert "Missing in nll last: the SFT settings (run.json)" in words


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path, capsys):
    fake_run(tmp_path / "aesl", "aesl")
    (tmp_path / "notes").mkdir()
    for argv, expected in (
        ([str(tmp_path / "notes")], "holds no run"),
        ([str(tmp_path / "aesI")], "did you mean 'aesl'?"),
        ([], "RUN"),
        ([str(tmp_path / "aesl"), "--outptu", "x"], "--outptu"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and error.startswith("aesl report: ") and error.count("\n") == 1
        assert expected in error


def test_main_prints_where_the_page_is(tmp_path, capsys, undrawn):
    run, other = fake_run(tmp_path / "aesl", "aesl"), fake_run(tmp_path / "base", "base")
    main([str(run), "--compare", str(other), "--output", str(tmp_path / "out"), "--title", "A & B"])
    assert capsys.readouterr().out == f"report -> {tmp_path / 'out/report.html'}; open it in a browser\n"
    assert "<h1>A &amp; B</h1>" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("benchmarks", "message"),
    [
        ([], "'benchmarks' is [], not an object"),
        ({"AIME24": 1}, "'benchmarks': 'AIME24' is 1, not an object"),
        ({"AIME24": {"models": []}}, "'AIME24': 'models' is [], not an object"),
        ({"AIME24": {"models": {"m": {"maj@8": "x"}}}}, "'m': 'maj@8' is \"x\", not a number"),
        ({"AIME24": {"models": {"m": {"maj@8_interval": 1}}}}, "'maj@8_interval' is 1, not a pair of numbers"),
    ],
)
def test_a_report_of_a_broken_evaluation_is_one_line(tmp_path, capsys, benchmarks, message):
    (tmp_path / "evaluation.json").write_text(json.dumps({"models": {}, "benchmarks": benchmarks}))
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert message in capsys.readouterr().err


def test_a_deleted_page_is_made_anew_beside_what_is_left_of_the_last_one(tmp_path, undrawn):
    run = fake_run(tmp_path / "aesl", "aesl")
    write_report([run]).unlink()
    assert write_report([run]).is_file()


def test_report_loads_neither_torch_nor_trl():
    code = (
        "import aesl_trl.report.report, sys; print([m for m in ('torch', 'trl', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_no_name_commands_the_terminal(tmp_path, undrawn, capsys):
    run = fake_run(tmp_path / "a\x1b]0;owned\x07\x9b2J\u202e", "aesl")
    selection = json.loads((run / "selection.json").read_text())
    write_json(run / "selection.json", {**selection, "reason": "\x1b[2J", "applied": "\x1b[31mlast", "rule": "\x07"})
    main([str(run)])
    written = [
        capsys.readouterr().out,
        *((run / name).read_text(encoding="utf-8") for name in ("report.md", "report.html")),
    ]
    for text in written:
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
        assert "0;owned\u2407\ufffd2J\ufffd" in text


@pytest.mark.slow
def test_any_name_of_a_folder_has_its_page(tmp_path):
    """matplotlib reads mathematics between dollars."""
    runs = [fake_run(tmp_path / name, "aesl") for name in (r"a$\frac$b", "$$", "100%", "a\nb", "x" * 200)]
    for run in runs:
        assert write_report([run]).stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_a_hundred_thousand_logged_rows(tmp_path):
    """The page of a long run is no larger and takes no more memory than its rows need."""
    run, rng = fake_run(tmp_path / "aesl", "aesl"), random.Random(0)
    keys = ("reward", "reward_std", "frac_reward_zero_std", "entropy", "completions/clipped_ratio", "loss", "kl")
    rows = [{"step": step, **{key: rng.random() for key in keys}} for step in range(1, 100_001)]
    write_json(run / "grpo/trainer_state.json", {"log_history": rows})
    code = (
        "import sys; from aesl_trl.report.report import main; main(sys.argv[1:]);"
        "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"  # maxrss would be our own, too
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 500_000  # kB
    assert (run / "report.html").stat().st_size < 2_000_000
