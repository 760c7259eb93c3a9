"""The code blocks and commands of the pages."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: A comment before a block that no test runs.
MARK = r"(?:<!-- not run: (?P<reason>[^>]+) -->\n+)?"
PYTHON = re.compile(MARK + r"^```python\n(?P<code>.*?)^```\n(?:\n^```text\n(?P<printed>.*?)^```)?", flags=re.S | re.M)
INDENTED = re.compile(MARK + r"(?P<code>(?:^ {4}\S.*\n(?:^ {4}.*\n|^\n(?= {4}))*))", flags=re.M)
FENCED = re.compile(r"^```.*?^```", flags=re.S | re.M)


@dataclass
class Block:
    page: str
    code: str
    reason: str
    """Why no test runs it; empty if one does."""
    printed: str | None = None
    """What it prints, if the page says so."""


def name(page):
    return str(page.relative_to(ROOT))


def python_blocks(page):
    text = page.read_text(encoding="utf-8")
    return [Block(name(page), m["code"], m["reason"] or "", m["printed"]) for m in PYTHON.finditer(text)]


def commands(page):
    """Return the lines of a page's indented blocks, each with the block's mark; a backslash continues a line.

    An indented block after Python is what it prints.
    """
    text = FENCED.sub("```", page.read_text(encoding="utf-8"))
    return [
        Block(name(page), " ".join(line.split()), m["reason"] or "")
        for m in INDENTED.finditer(text)
        if text[: m.start()].endswith("\n\n")  # else it continues a list
        and not text[: m.start()].rstrip().endswith("```")  # else it is what a block of Python prints
        for line in m["code"].replace("\\\n", " ").splitlines()
        if line.strip()
    ]


def words(command):
    """Return a command's words, without a comment and without the folder of its program."""
    first, *rest = shlex.split(command, comments=True)
    return [first.rpartition("/")[2], *rest]
