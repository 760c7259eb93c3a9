"""Write a page of the docs, or check that it is what its script writes."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


def write_or_check(page: Path, make: Callable[[], str], about: str) -> int:
    """Write `make()` to `page`, or with `--check` compare them. Return the exit code: 1 if the page is out of date.

    `about` describes the script. The script has the page's name.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is out of date")
    check, text = parser.parse_args().check, make()
    if not check:
        page.write_text(text, encoding="utf-8")
        return 0
    if page.exists() and page.read_text(encoding="utf-8") == text:
        return 0
    print(f"{page} is out of date: run python docs/_make/{page.stem}.py", file=sys.stderr)
    return 1
