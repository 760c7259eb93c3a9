"""`vlmzip serve` and `vlmzip tokens` as a user runs them."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from importlib import import_module

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

from tests.serving.server.running import EXAMPLES, asking
from vlmzip.cli.main import main
from vlmzip.errors import how_to_install
from vlmzip.methods import VisionZip
from vlmzip.serving.server import vllm_command
from vlmzip.serving.server.settings import Settings
from vlmzip.serving.server.vllm_command import Served

FLAT = str(EXAMPLES / "flat.png")


def ran(capsys, *arguments):
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_tokens_of_images_and_sizes(capsys):
    code, out, _ = ran(
        capsys, "tokens", FLAT, "--size", "200x100", "--question", "what color", "--keep", "16", "--json"
    )
    count = json.loads(out)
    assert code == 0
    assert [image["image"] for image in count["images"]] == [FLAT, "200x100"]
    assert [image["after"] for image in count["images"]] == [16, 16]
    assert count["visual_tokens"] == {"before": 288, "after": 32, "last_layer": 32}
    assert count["prompt_tokens"]["after"] == count["text_tokens"] + 32
    code, out, _ = ran(capsys, "tokens", FLAT, "--method", "dfmr")
    assert ["the", "prompt", "148", "20", "to", "148", "–"] in [line.split() for line in out.splitlines()]
    assert "dfmr decides by what an image shows; the numbers are limits." in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokens"], "give an image, or its size: vlmzip tokens image.png, vlmzip tokens --size 640x480"),
        (["tokens", "--size", "640"], "--size must be WIDTHxHEIGHT up to 20000 pixels, such as 640x480, got '640'"),
        (["tokens", "--size", "0x4"], "--size must be WIDTHxHEIGHT up to 20000 pixels, such as 640x480, got '0x4'"),
        (["tokens", "--size", "20000x20000"], "--size: 400,000,000 pixels; a request may have 50,000,000"),
        (["tokens", "--size", "9000x3000", "--size", "8000x3000"], "--size: 51,000,000 pixels together; a request may"),
        (["tokens", "nothing.png"], "there is no file 'nothing.png'"),
        (
            ["tokens", FLAT, "--keep", "-1"],
            "--keep -1 keeps nothing; give at least 1 token, or a fraction such as 0.25",
        ),
        (["serve", "--engine", "trt"], "--engine must be auto, hf or vllm, got 'trt'"),
        (["serve", "--port", "99999"], "--port must be from 0 to 65535, got 99999"),
        (["serve", "--port", "1", "--host", "203.0.113.7"], "cannot listen on 203.0.113.7:1: "),
        (["serve", "--store", "nothing"], "there is no folder 'nothing'; make a store with vlmzip encode"),
        (["serve", "--store", "nothing", "--engine", "vllm"], "--store needs --engine hf"),
        (
            ["serve", "--max-queue", "4", "--engine", "vllm"],
            "--max-queue needs --engine hf: vLLM has limits of its own",
        ),
        (["serve", "--device", "cpu", "--engine", "vllm"], "--device needs --engine hf: vLLM chooses the device"),
        (["serve", "--allow-pickle", "--engine", "vllm"], "--allow-pickle needs --engine hf: vLLM loads the weights"),
        (["serve", "--max-batch", "0"], "--max-batch 0: give at least 1"),
        (["serve", "--keep", "2.5"], "--keep must be a fraction in (0, 1], got '2.5'"),
        (
            ["serve", "--allow-hosts", "https://example.org"],
            "--allow-hosts takes names such as images.example.org, got",
        ),
        (["serve", "--api-key-file", "nothing.txt"], "--api-key-file 'nothing.txt' cannot be read: No such file"),
    ],
)
def test_mistakes(capsys, arguments, message):
    code, _, err = ran(capsys, *arguments)
    assert code == 2
    assert err.splitlines()[-1].startswith(f"vlmzip: {message}")


def test_a_key_that_cannot_be_sent(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("VLMZIP_API_KEY", " ")
    assert "$VLMZIP_API_KEY must have one key" in ran(capsys, "serve")[2]
    (tmp_path / "key").write_text("two keys")
    assert "must have one key of ASCII letters" in ran(capsys, "serve", "--api-key-file", str(tmp_path / "key"))[2]


def test_the_command_line_of_vllm():
    served = Served("mini", VisionZip(keep=64), "127.0.0.1", 8080, "small", "float32")
    command = vllm_command.vllm_command(served, Settings(api_key="secret", max_images=3))
    assert command[:5] == [sys.executable, "-P", "-m", "vlmzip.serving.server.vllm_process", "serve"]
    assert command[5].endswith("mini/weights")
    options = dict(zip(command[6::2], command[7::2], strict=True))
    assert options == {
        "--served-model-name": "small", "--host": "127.0.0.1", "--port": "8080", "--dtype": "float32",
        "--hf-overrides": '{"vlmzip": "visionzip(keep=64)"}', "--limit-mm-per-prompt": '{"image": 3}',
        "--allowed-media-domains": "none.invalid",
        "--middleware": "vlmzip.serving.server.vllm_refusal.RefuseChoice", "--shutdown-timeout": "30",
    }  # fmt: skip
    assert "secret" not in str(command)
    environment = vllm_command.vllm_environment(Settings(api_key="secret"), {"PATH": "/bin"})
    assert environment == {"PATH": "/bin", "VLLM_API_KEY": "secret", "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0"}
    hosts = vllm_command.vllm_command(served, Settings(allow_hosts=frozenset(["b.org", "a.org"])))
    at = hosts.index("--allowed-media-domains")
    assert "--disable-uvicorn-access-log" in vllm_command.vllm_command(served, Settings(log_requests=False))
    assert hosts[at : at + 3] == ["--allowed-media-domains", "a.org", "b.org"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"model": "mini", "vlmzip": {"keep": 4}}', 400),
        (b'{"model": "mini", "messages": [{"content": "\\"vlmzip\\": "}]}', 200),
        (b'{"mm_processor_kwargs": {"vlmzip": "visionzip(keep=4)"}}', 200),
        (b'["vlmzip"]', 200),
        (b'{"vlmzip"', 200),
        (b"", 200),
    ],
)
def test_with_vllm_a_request_that_chooses_a_method_is_refused(body, status):
    """All other requests pass unchanged."""

    async def echo(scope, receive, send):
        content = b"".join([chunk async for chunk in Request(scope, receive).stream()])
        await Response(content)(scope, receive, send)

    module, _, name = vllm_command.MIDDLEWARE.rpartition(".")
    app = getattr(import_module(module), name)(echo)

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.post("/v1/chat/completions", content=body)

    answer = asyncio.run(ask())
    assert answer.status_code == status
    if status == 200:
        assert answer.content == body
    else:
        assert "serve it with --engine hf" in answer.json()["error"]["message"]


def test_vllm_serves_where_it_can(monkeypatch):
    choose = vllm_command.choose_engine
    monkeypatch.setattr(vllm_command, "find_spec", lambda name: None)
    assert choose("auto", "mini", VisionZip()) == choose("hf", "mini", VisionZip()) == "hf"
    with pytest.raises(ValueError, match=re.escape(f"vLLM is not installed: {how_to_install('vllm')}")):
        choose("vllm", "mini", VisionZip())


@pytest.mark.slow  # it starts a process
def test_a_server_runs_until_a_signal(tmp_path):
    """It says when it is ready, answers, and ends well."""
    command = [
        sys.executable,
        "-m",
        "vlmzip.cli.main",
        "serve",
        "--port",
        "0",
        "--keep",
        "16",
        "--engine",
        "hf",
        "--no-playground",
    ]
    environment = os.environ | {"VLMZIP_API_KEY": "secret"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        ready = server.stdout.readline()
        address = ready.split()[-1]
        assert ready == f"mini with visionzip(keep=16) at {address}\n"
        headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
        request = urllib.request.Request(f"{address}/chat/completions", json.dumps(asking()).encode(), headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert json.load(answer)["choices"][0]["message"]["content"] == "orange"
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=30)
    assert (server.returncode, out) == (0, "")
    loading, line = err.splitlines()
    assert loading == "loading mini …"
    assert re.fullmatch(
        r"[\d-]+T[\d:]+[+-]\d\d:\d\d POST /v1/chat/completions 200 [\d.]+ s,"
        r" visionzip\(keep=16\): 144 -> 16 visual tokens, 2 new tokens",
        line,
    )


@pytest.mark.slow  # it starts a process
def test_a_server_whose_stderr_is_not_read_answers_and_ends():
    command = [sys.executable, "-m", "vlmzip.cli.main", "serve", "--port", "0", "--engine", "hf", "--no-playground"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            address = server.stdout.readline().split()[-1]
            with httpx.Client(base_url=address, timeout=30) as http:
                for _ in range(1500):  # a pipe holds 64 KiB
                    assert http.get(f"/nothing/{'a' * 200}").status_code == 404
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=30) == 0
        finally:
            server.kill()


#: Before each answer, what libraries do writes more to stderr than a pipe holds.
LOUD = """
import sys, warnings
from transformers.utils import logging
from vlmzip.cli.main import main
from vlmzip.serving.server.batch import Batch

run = Batch.run

def loud(batch):
    for number in range(200):
        logging.get_logger("transformers.models").error("a" * 1000)
        warnings.warn(f"{chr(97 + number % 26) * 1000}")
        print("a" * 1000, file=sys.stderr, flush=True)
    run(batch)

Batch.run = loud
sys.exit(main(["serve", "--port", "0", "--engine", "hf", "--no-playground"]))
"""


@pytest.mark.slow  # it starts a process
def test_a_server_answers_while_libraries_fill_a_stderr_that_is_not_read():
    command = [sys.executable, "-c", LOUD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            address = server.stdout.readline().split()[-1]
            with httpx.Client(base_url=address, timeout=30) as http:
                for _ in range(3):
                    assert http.post("/chat/completions", json=asking()).status_code == 200
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=30) == 0
        finally:
            server.kill()


@pytest.mark.slow  # it starts a process
def test_a_server_whose_engine_ends_ends_too():
    code = "import sys; from vlmzip.cli.main import main; from vlmzip.serving.server.batch import Batch;"
    code += "Batch.run = lambda batch: sys.exit(3); sys.exit(main(['serve', '--port', '0', '--engine', 'hf']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        address = server.stdout.readline().split()[-1]
        request = urllib.request.Request(
            f"{address}/chat/completions", json.dumps(asking()).encode(), {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(request, timeout=30)
        _, err = server.communicate(timeout=30)
    assert server.returncode == 1
    assert "the engine has stopped" in err
