"""docs/models.md is what its command writes from the committed results."""

import pytest


@pytest.fixture
def script(maker):
    return maker("models")


def test_the_page_is_what_the_command_writes(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["models.py", "--check"])
    assert script.main() == 0, "run python docs/_make/models.py"
    old = tmp_path / "models.md"
    old.write_text(script.PAGE.read_text().replace("works", "work"))
    monkeypatch.setattr(script, "PAGE", old)
    assert script.main() == 1
    assert "run python docs/_make/models.py" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["models.py"])
    assert script.main() == 0
    assert "| llava (llava) |" in old.read_text()
