"""What check_extras.py makes of pip's answers; a shell script stands in for pip."""

import configparser
import importlib.util
import time
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("check_extras", ROOT / "scripts" / "check_extras.py")
check_extras = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_extras)

REPORT = (
    '{"install": [{"metadata": {"name": "trl", "version": "1.16.0"}}, {"metadata": {"name": "x", "version": "1"}}]}'
)
SLOW = "INFO: This is taking longer than usual. You might need to provide the dependency resolver with"


@pytest.mark.parametrize(
    ("does", "verdict", "why"),
    [
        (
            f'while [ "$1" != --report ]; do shift; done; echo \'{REPORT}\' > "$2"',
            "ok",
            "2 packages in 0 s: trl 1.16.0",
        ),
        ("echo 'ERROR: ResolutionImpossible: for help'; exit 1", "FAIL", "ERROR: ResolutionImpossible"),
        ("echo 'ERROR: No matching distribution found for vllm>=9'; exit 1", "FAIL", "vllm>=9"),
        ("echo 'WARNING: Retrying'; echo 'ERROR: Could not fetch URL'; exit 1", "NOT CHECKED", "Could not fetch URL"),
        (f"echo '{SLOW}'; exec sleep 60", "FAIL", "taking longer than usual"),
        ("echo 'INFO: pip is looking at multiple versions of trl'; exec sleep 60", "NOT CHECKED", "no answer within"),
        (
            "echo 'WARNING: Retrying (Retry(total=4)) after NewConnectionError'; "
            "echo 'ERROR: No matching distribution found for torch'; exit 1",
            "NOT CHECKED",
            "No matching distribution",
        ),
        ("exec sleep 60", "NOT CHECKED", "no answer within 1 s"),
    ],
)
def test_verdicts(tmp_path, does, verdict, why):
    pip = tmp_path / "python"
    pip.write_text(f"#!/bin/sh\n{does}\n")
    pip.chmod(0o755)
    found, line = check_extras.resolve(pip, "vllm", ["vllm"], time.monotonic() + 0.5)
    assert found == verdict and why in line


def test_every_set_bounds_what_the_package_bounds():
    """`pip install ".[vllm]"` with an unbounded TRL went back through all of TRL's versions."""
    sets = check_extras.read_sets(ROOT / "setup.cfg")
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert list(sets) == [*config["options.extras_require"], ",".join(config["options.extras_require"])]
    for requirements in sets.values():
        trl = [line for line in requirements if line.startswith("trl")]
        assert trl and all(line.endswith(">=1.15,<2") for line in trl)
        assert not any(line.startswith("#") for line in requirements)


def test_no_text_names_a_distribution_that_is_on_no_index():
    places = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    places += [
        path
        for name in ("aesl_trl", "recipes")
        for path in (ROOT / name).rglob("*")
        if path.suffix in (".py", ".md", ".yaml")
    ]
    assert [path for path in places if "aesl_trl[" in path.read_text() or "aesl-trl[" in path.read_text()] == []
