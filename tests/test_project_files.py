"""What GitHub reads: the citation, the forms and the workflow say what the README and the scripts say."""

import configparser
import re
from pathlib import Path

import yaml

import aesl_trl


ROOT = Path(__file__).resolve().parents[1]


def test_the_citation_has_the_authors_of_the_readme():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper = citation["preferred-citation"]
    names = [f"{author['given-names']} {author['family-names']}" for author in paper["authors"]]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert names == re.search(r"author += \{(.*?)\}", readme)[1].split(" and ") and len(names) == 8
    assert paper["title"] in readme and paper["url"] in readme


def test_the_forms_ask_what_github_lets_a_form_ask():
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert [form.name for form in forms] == ["bug_report.yml", "config.yml", "proposal.yml", "result.yml"]
    for form in forms:
        if form.name == "config.yml":
            continue
        content = yaml.safe_load(form.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= set(content)
        ids = [field["id"] for field in content["body"]]
        assert len(set(ids)) == len(ids)
        assert all(field["attributes"]["label"] for field in content["body"])
        assert {field["type"] for field in content["body"]} <= {"input", "textarea"}


def test_the_workflow_runs_what_a_contributor_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    commands = {
        name: [step["run"] for step in job["steps"] if "run" in step] for name, job in workflow["jobs"].items()
    }
    assert commands["tests"] == [".ci/run"] and (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert commands["site"][-1].endswith("mkdocs build --strict")
    python = {
        str(step["with"]["python-version"])
        for job in workflow["jobs"].values()
        for step in job["steps"]
        if "with" in step
    }
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    tested = re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"])
    assert python == set(tested)


def test_the_newest_version_of_the_changelog_is_the_package_or_to_come():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    versions = [heading for heading in headings if heading != "Unreleased"]
    assert headings in (versions, ["Unreleased", *versions]) and versions[0] == aesl_trl.__version__
