"""The code that README.md and the pages of docs/ show, as it stands there."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"^ {4}((?:[A-Z_]+=\S+ )*python .*)$", re.MULTILINE)


class Command(NamedTuple):
    """A command of a page's shell code."""

    page: str
    line: str

    @property
    def words(self) -> list[str]:
        """Its words, without the variables set before it."""
        words = shlex.split(self.line)
        while re.fullmatch(r"\w+=\S*", words[0]):
            words.pop(0)
        return words

    def __str__(self) -> str:
        return f"{self.page}: {self.line}"


def blocks(*kinds: str) -> list[tuple[Path, str]]:
    """The fenced blocks of these languages, each with its page."""
    return [
        (page, text)
        for page in PAGES
        for kind, text in FENCED.findall(page.read_text())
        if kind in kinds
    ]


def commands() -> list[Command]:
    """Each command of the pages, in order; one that goes on in the next line is one."""
    found = []
    for page in PAGES:
        text = page.read_text()
        code = [block for kind, block in FENCED.findall(text) if kind == "bash"]
        for line in "\n".join([*code, *INDENTED.findall(text)]).replace("\\\n", " ").splitlines():
            if line := " ".join(re.sub(r"(^|\s+)#.*", "", line).split()):
                found.append(Command(page.name, line))
    return found


def files(page: str = "extending.md") -> dict[str, str]:
    """Name -> content of a page's code blocks that begin with a comment naming a file."""
    shown = [text for path, text in blocks("python") if path.name == page]
    named = {match[1]: text for text in shown if (match := re.match(r"# (my_\w+\.py)\n", text))}
    assert len(named) == len(shown), f"a block of {page} has no name"
    return named
