"""What the files around the package say agrees with it: version, workflow, citation."""

import re
from pathlib import Path

import yaml

import dpa_xtuner

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()


def test_one_version_everywhere():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    newest = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    declared = re.findall(r"^version = (.+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert [dpa_xtuner.__version__] * 3 == [cited, newest, *declared]


def workflow() -> dict:
    return yaml.safe_load((ROOT / ".github/workflows/check.yml").read_text())["jobs"]


def test_the_workflow_runs_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))
    runs = [step["run"].split() for job in workflow().values() for step in job["steps"][2:]]
    assert len(runs) == 3 and all(words[0] == "make" for words in runs)
    asked = {word for words in runs for word in words[1:] if re.fullmatch("[a-z]+", word)}
    assert {"check", "fast", "install", "docs"} == asked and asked <= targets


def test_the_workflow_has_the_matrix_of_the_makefile():
    listed = re.findall(r"^MATRIX := (.+)$", MAKEFILE, re.MULTILINE)[0].split()
    rows = workflow()["matrix"]["strategy"]["matrix"]["include"]
    assert listed == [f"{row['stack']}:python{row['python']}" for row in rows]
    assert all((ROOT / "constraints" / f"{row['stack']}.txt").is_file() for row in rows)


def test_forms_of_issues_are_what_github_reads():
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        content = yaml.safe_load(form.read_text())
        assert content.keys() == {"name", "description", "body"}
        for field in content["body"]:
            assert field["type"] in ("textarea", "checkboxes") and field["attributes"]["label"]
