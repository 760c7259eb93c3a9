"""Pages are what their commands write, and `--check` notices where they are not."""

import pytest


@pytest.mark.parametrize(
    ("name", "text", "other", "line"),
    [
        ("models", "works", "work", "| llava (llava) |"),
        ("papers", "6912", "6913", "gives 6912 tokens, 266.7 %"),
    ],
)
def test_the_page_is_what_the_command_writes(maker, tmp_path, monkeypatch, capsys, name, text, other, line):
    script = maker(name)
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--check"])
    assert script.main() == 0, f"run python docs/_make/{name}.py"
    old = tmp_path / f"{name}.md"
    old.write_text(script.PAGE.read_text().replace(text, other))
    monkeypatch.setattr(script, "PAGE", old)
    assert script.main() == 1
    assert f"run python docs/_make/{name}.py" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [f"{name}.py"])
    assert script.main() == 0
    assert line in old.read_text()
