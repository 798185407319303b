"""The pages of README.md and docs/: their code runs, their commands and settings exist."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from support import encoder_folders, runs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CONFIGS = {path.stem for path in (ROOT / "configs").glob("*.py")}
TOOLS = {path.name for path in (ROOT / "tools").glob("*.py")}
# Programs of others.
OTHERS = {"source", "export", "pip", "rm", "make", "xtuner"}


def blocks(page: Path, *kinds: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind in kinds]


def commands(page: Path) -> list[list[str]]:
    """Each command of the page's shell blocks, in words, without variables set before it."""
    found = []
    for block in blocks(page, "bash", "sh", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"\w+=\S*", words[0]):
                words.pop(0)
            if words and words[0] == "srun":
                words = words[words.index("python") :]
            found += [words] if words else []
    return found


ALL = [(page.name, " ".join(words)) for page in PAGES for words in commands(page)]


def test_the_pages_have_commands():
    assert len(ALL) > 40 and {name for name, _ in ALL} > {"README.md", "quickstart.md"}


@pytest.mark.parametrize(("page", "command"), ALL)
def test_a_command_names_what_exists(page, command):
    words = command.split()
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
    named = {Path(word).name for _, line in ALL for word in line.split() if "tools/" in word}
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
        tool = Path(words[1]).name if words[:1] == ["python"] and len(words) > 1 else ""
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


def test_every_python_block_is_code_and_every_json_block_is_json():
    seen = 0
    for page in PAGES:
        for block in blocks(page, "python"):
            compile(block, page.name, "exec")
            seen += 1
        for block in blocks(page, "json", "jsonl"):
            decoder, rest = json.JSONDecoder(), block.strip()
            while rest:
                _, end = decoder.raw_decode(rest)
                rest = rest[end:].strip()
                seen += 1
    assert seen > 10


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


@pytest.mark.slow
def test_the_quick_start_runs_as_it_stands(pieces, tmp_path):
    """On tiny models in place of those that the demo prepares."""
    page = ROOT / "docs/quickstart.md"
    for name in ("configs", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    models = tmp_path / "data/models"
    runs.write_llm(models / "smollm2-135m-instruct", pieces, "smollm2")
    encoder_folders.clip(models / "openmoji-vit")
    written = {}
    for block in blocks(page, "python"):
        name = re.match(r"# (my_\w+\.py)\n", block)[1]
        written[name] = block
        (tmp_path / name).write_text(block)
    assert sorted(written) == ["my_first.py", "my_pictures.py"]
    assert Config.fromfile(tmp_path / "my_first.py", import_custom_modules=False).captions
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "DPA_CACHE": str(tmp_path / "cache"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    asked = [words for words in commands(page) if words[0] == "python" and words[1] != "-m"]
    said = ""
    for words in asked:
        done = subprocess.run(
            [sys.executable, *words[1:]], cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}"
        said = done.stdout
    assert len(asked) == 5 and "Wrote" in said
    assert (tmp_path / "work_dirs/my_first/tune/hf/README.md").is_file()
    stages = [json.loads(f.read_text()) for f in tmp_path.glob("work_dirs/my_first/*/stage.json")]
    assert [stage["status"] for stage in stages] == ["finished"] * 3


def test_the_readme_is_short_and_its_links_and_pictures_exist():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", BLOCK.sub("", page.read_text())):
            if not target.startswith(("http", "mailto")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_site_s_menu():
    """``make docs`` refuses a page that is not; this says so before."""
    menu = set(re.findall(r": ([\w./]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert menu == {page.name for page in (ROOT / "docs").glob("*.md")}
