"""Hooks of mkdocs.

Links of a page to files outside docs/ are checked, and shown as text: on the repository's pages
they are links, the site has no such files. Roles of docstrings (``:func:``) are left out.
"""

import re
from pathlib import Path

_ROLE = re.compile(r":(?:mod|class|func|meth|data|attr):(?=<code>)")
_OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page, **_) -> str:
    """Replace the links of a page.

    Raises:
        FileNotFoundError: a file that a page links to does not exist.
    """
    folder = Path(page.file.abs_src_path).parent

    def shown(match: re.Match) -> str:
        if not (folder / match[2]).exists():
            raise FileNotFoundError(f"{page.file.src_path} links to {match[2]}, which is not there")
        return match[1]

    return _OUTSIDE.sub(shown, markdown)


def on_page_content(html: str, **_) -> str:
    """Take the roles out of the docstrings' text."""
    return _ROLE.sub("", html)
