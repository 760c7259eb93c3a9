"""`vlmzip serve` with and without the playground."""

import re
import signal
import subprocess
import sys
from importlib.util import find_spec

import httpx
import pytest

from vlmzip.cli import serve
from vlmzip.cli.main import main
from vlmzip.errors import how_to_install


@pytest.fixture
def without_gradio(monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "gradio" else find_spec(name))


def test_the_playground_needs_gradio(capsys, without_gradio):
    assert main(["serve", "--playground"]) == 2
    assert capsys.readouterr().err == f"vlmzip: the playground needs Gradio: {how_to_install('playground')}\n"


def test_the_playground_needs_the_engine_that_knows_token_maps(capsys):
    assert main(["serve", "--playground", "--engine", "vllm"]) == 2
    assert "the playground needs --engine hf" in capsys.readouterr().err


def test_without_gradio_there_is_no_playground(without_gradio):
    assert serve._examples(None) is None
    assert serve._examples(False) is None


@pytest.mark.parametrize(("options", "status"), [([], 200), (["--no-playground"], 404)])
def test_the_command_says_where_the_playground_is(options, status):
    pytest.importorskip("gradio")
    command = [sys.executable, "-m", "vlmzip.cli.main", "serve", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        address = re.search(r"http://[\d.:]+", server.stdout.readline())[0]
        try:
            if status == 200:
                assert server.stdout.readline() == f"playground at {address}/playground\n"
            assert httpx.get(f"{address}/playground/").status_code == status
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
        assert server.stdout.read() == ""
