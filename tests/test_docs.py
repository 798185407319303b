"""The pages of README.md and docs/: what they name exists. test_docs_run.py runs their code."""

import re
import subprocess
import sys

import pytest
from support.documented import FENCED, PAGES, ROOT, commands

CONFIGS = {path.stem for path in (ROOT / "configs").glob("*.py")}
TOOLS = {path.name for path in (ROOT / "tools").glob("*.py")}
# Programs of others.
OTHERS = {"source", "export", "pip", "rm", "make", "xtuner", "srun"}
ALL = [(command.page, " ".join(command.words)) for command in commands()]


def test_the_pages_have_commands():
    assert len(ALL) > 40 and {name for name, _ in ALL} > {"README.md", "quickstart.md"}


@pytest.mark.parametrize(("page", "command"), ALL)
def test_a_command_names_what_exists(page, command):
    words = command.split()
    if words[0] == "srun":
        words = words[words.index("python") :]
    if words[:2] == ["python", "-m"]:
        path = ROOT / words[2].replace(".", "/")
        theirs = words[2].startswith("xtuner.")
        assert theirs or path.is_dir() or path.with_suffix(".py").is_file()
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file() or words[1].startswith("my_")
    else:
        assert words[0] in OTHERS
    for word in words[1:]:
        name = word.removeprefix("configs/").removesuffix(".py")
        if re.fullmatch(r"dpa_[a-z0-9_]+", name) and name != "dpa_xtuner":
            assert name in CONFIGS
    rules = re.findall(r"^([a-z][a-z -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = " ".join(rules).split()
    if words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= set(targets)


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What each tool that a page names says of its options, one process for each."""
    named = {word.removeprefix("tools/") for _, line in ALL for word in line.split()}
    found = {}
    for tool in sorted(named & TOOLS):
        done = subprocess.run(
            [sys.executable, str(ROOT / "tools" / tool), "--help"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found[tool] = done.stdout
    return found


@pytest.mark.slow
def test_the_options_of_each_tool_exist(helps):
    asked = 0
    for page, line in ALL:
        words = line.split()
        tool = words[1].removeprefix("tools/") if words[:1] == ["python"] and len(words) > 1 else ""
        if tool not in helps or tool == "train.py":  # which hands its options on to XTuner
            continue
        for word in words:
            option = word.split("=")[0]
            if option.startswith("--"):
                asked += 1
                assert re.search(rf"{option}\b", helps[tool]), f"{page}: {line}: no {option}"
    assert asked > 20


def test_the_settings_of_the_pages_exist():
    """Each ``stage.setting=value`` of a page, in a command or in a text."""
    known = set(re.findall(r"`([\w.]+)`", (ROOT / "docs/settings.md").read_text()))
    setting = re.compile(r"[\s`]((?:proxy|align|tune|captions|instructions)\.[\w.]+)=")
    found = {name for page in PAGES for name in setting.findall(page.read_text())}
    assert len(found) > 20
    for name in found:  # the arguments of a loss are the scheme's own
        assert name in known or name.partition(".loss.")[0] + ".loss" in known, name


def test_the_messages_of_troubleshooting_are_ours():
    """Each message quoted there is in the code, up to the parts that vary."""
    code = "".join(p.read_text() for p in (ROOT / "dpa_xtuner").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    foreign = ("cannot import name", "No module named", "CUDA out of memory", "No space left")
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = [
        message
        for row in re.findall(r"^(?:\| |\*\*)((?:`[^`]+`(?:, )?)+)", page, re.MULTILINE)
        for message in re.findall(r"`([^`]+)`", row)
        if " " in message and not message.startswith(foreign)
    ]
    assert len(quoted) >= 10
    for message in quoted:
        for part in message.replace("pip install", "...").replace("'.[eval]'", "").split("..."):
            assert part.strip() in code, message


def test_the_readme_is_short_and_its_links_and_pictures_exist():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", FENCED.sub("", page.read_text())):
            if not target.startswith(("http", "mailto")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_site_s_menu():
    """``make docs`` refuses a page that is not; this says so before."""
    menu = set(re.findall(r": ([\w./]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert menu == {page.name for page in (ROOT / "docs").glob("*.md")}
