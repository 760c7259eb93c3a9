"""docs/papers.md is what its command writes, and `--check` notices where it is not."""

import pytest


@pytest.fixture
def script(maker):
    return maker("papers")


def test_the_page_is_what_the_command_writes(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["papers.py", "--check"])
    assert script.main() == 0, "run python docs/_make/papers.py"
    old = tmp_path / "papers.md"
    old.write_text(script.PAGE.read_text().replace("6912", "6913"))
    monkeypatch.setattr(script, "PAGE", old)
    assert script.main() == 1
    assert "run python docs/_make/papers.py" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["papers.py"])
    assert script.main() == 0
    assert "gives 6912 tokens, 266.7 %" in old.read_text()
