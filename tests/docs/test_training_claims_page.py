"""docs/training_claims.md is what its command writes from the committed results."""


def test_the_page_is_what_the_command_writes(maker, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["training_claims.py", "--check"])
    assert maker("training_claims").main() == 0, capsys.readouterr().err
