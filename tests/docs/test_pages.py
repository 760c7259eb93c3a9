"""The documents' code runs as it stands."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.filterwarnings("error::UserWarning")
def test_using(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "using.md").read_text(), flags=re.S)
    assert len(blocks) >= 6
    names = {}
    for block in blocks:
        exec(compile(block, "docs/using.md", "exec"), names)
    assert capsys.readouterr().out.strip() == "orange"
    assert names["report"].after == 36
    assert names["out"].shape[1] > names["more"]["input_ids"].shape[1]
    torch.testing.assert_close(names["logits"], names["same"])
    assert names["ids"].shape[1] == names["inputs"]["input_ids"].shape[1] - 144 + 36
    assert names["again"].compressor == names["compressed"].compressor


def test_links_between_documents_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / unquote(target)).exists(), f"{page.name} links to {target}"


def test_numbers_come_from_committed_code():
    """A commit with `-dirty` behind it names code that nobody can look up."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks" / "results").rglob("*.csv")]
    assert len(files) > 20
    assert [path.name for path in files if "-dirty" in path.read_text(encoding="utf-8")] == []
