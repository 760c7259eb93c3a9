"""The documents' code runs as it stands."""

import re
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

import vlmzip
from tests.docs.blocks import FENCED, PAGES, ROOT, python_blocks
from vlmzip.lab.asking import build_inputs
from vlmzip.runtime.loading import load

PACKAGE = Path(vlmzip.__file__).parent


@pytest.mark.filterwarnings("error::UserWarning")
def test_using(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    names = run("using")
    assert capsys.readouterr().out.strip() == "orange"
    assert names["report"].after == 36
    assert names["out"].shape[1] > names["more"]["input_ids"].shape[1]
    assert names["again"].compressor == names["compressed"].compressor


def test_engines(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = run("engines")
    torch.testing.assert_close(names["logits"], names["same"])
    assert names["ids"].shape[1] == names["inputs"]["input_ids"].shape[1] - 144 + 36


def run(page):
    """Run a page's blocks of Python, and return the names that they define."""
    names = {}
    for block in python_blocks(ROOT / "docs" / f"{page}.md"):
        exec(compile(block.code, block.page, "exec"), names)
    return names


def test_add_a_family(capsys):
    """The file on the page is the family's, and each block prints what the page says."""
    page = (ROOT / "docs" / "add_a_family.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    assert (PACKAGE / "models" / "paligemma.py").read_text() in blocks
    names = {}
    for block in blocks:
        exec(compile(block, "docs/add_a_family.md", "exec"), names)
    prose = re.sub(r"```python\n.*?```", "", page, flags=re.S)
    printed = "\n".join(re.findall(r"^    (.*)", prose, flags=re.M) + re.findall(r"It prints `(.*?)`", prose))
    assert capsys.readouterr().out.strip() == printed


def test_an_image_goes_the_way_that_is_described():
    """Each function of the list is called for the first time after the one before it."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    stations = re.findall(r"^\d+\. `([\w/]+\.py)`, `(\w+)`", page, flags=re.M)
    called = {}

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            called.setdefault((str(path.relative_to(PACKAGE)), frame.f_code.co_name), len(called))

    loaded = load("mini")
    compressed = vlmzip.attach(loaded.model, vlmzip.VisionZip(keep=36))
    sys.setprofile(note)
    try:
        inputs = build_inputs(loaded, [str(ROOT / "examples" / "flat.png")], "what color is the ring ?")
        compressed.generate(**inputs, max_new_tokens=1, do_sample=False)
    finally:
        sys.setprofile(None)
    assert len(stations) == 10
    assert [station for station in stations if station not in called] == []
    assert sorted(stations, key=called.get) == stations


def test_links_between_documents_lead_somewhere():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#:]*?)(?:#([^)]*))?\)", FENCED.sub("", page.read_text())):
            path = page.parent / unquote(target) if target else page
            assert path.exists(), f"{page.name} links to {target}"
            # The API's anchors are made on the site, where `make docs` checks them.
            if anchor and path.parent.name != "api":
                assert anchor in anchors(path.read_text()), f"{page.name} links to {target}#{anchor}"


def anchors(text):
    """Return the anchors that GitHub makes from a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), flags=re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_numbers_come_from_committed_code():
    """A commit with `-dirty` behind it names code that nobody can look up."""
    files = [*PAGES, *(ROOT / "benchmarks" / "results").rglob("*.csv")]
    assert len(files) > 20
    assert [path.name for path in files if "-dirty" in path.read_text(encoding="utf-8")] == []


def test_every_page_is_in_the_menu():
    menu = re.findall(r"^ +- .*?([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M)
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(menu) == sorted([*pages, "CHANGELOG.md", "CONTRIBUTING.md"])


def test_the_api_reference_has_every_public_name():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    assert sorted(re.findall(r"^::: vlmzip\.(\w+)$", pages, flags=re.M)) == sorted({*dir(vlmzip)} - {"__version__"})
