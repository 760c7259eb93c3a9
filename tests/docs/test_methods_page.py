"""docs/methods.md is what its command writes, and shows an image of every method that can be drawn."""

from vlmzip import catalogue


def test_the_page_is_what_the_command_writes(maker, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["methods.py", "--check"])
    assert maker("methods").main() == 0, capsys.readouterr().err


def test_every_method_has_an_image_unless_its_tokens_have_no_place_in_the_image(maker):
    drawn = {path.stem for path in maker("methods").FIGURES.glob("*.png")}
    assert drawn == {name for name, cls in catalogue.available().items() if not cls.trained_weights}
