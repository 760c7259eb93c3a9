"""The hooks of the docs site (mkdocs.yml): pages from the root of the repository, and links that leave docs/.

A link in docs/*.md works on GitHub as it stands. On the site, a link to CHANGELOG.md or CONTRIBUTING.md leads to the
page of that name, and a link to any other file outside docs/ leads to the file on GitHub.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
FENCE = re.compile(r"^```.*?^```", flags=re.M | re.S)
LOG = logging.getLogger("mkdocs.plugins.site")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that stand at the root of the repository."""
    for name in ROOT_PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page that lead out of docs/, outside blocks of code."""
    home = "" if page.file.src_uri in ROOT_PAGES else posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def rewritten(link: re.Match[str]) -> str:
        return site_link(link[1], home, page, config)

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(rewritten, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(rewritten, markdown[end:])])


def site_link(link: str, home: str, page: Page, config: MkDocsConfig) -> str:
    """Return where a link leads on the site; `home` is the page's folder in the repository."""
    target = posixpath.normpath(posixpath.join(home, link))
    if target in ROOT_PAGES:
        return posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")
    if target.startswith("docs/"):
        return posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(page.file.src_uri) or ".")
    path = ROOT / target.replace("%2B", "+")
    if not path.exists():
        LOG.warning("%s links to %s, which is not in the repository", page.file.src_uri, target)
    return f"{config.repo_url.rstrip('/')}/{'tree' if path.is_dir() else 'blob'}/main/{target}"
