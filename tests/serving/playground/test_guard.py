"""Which requests reach the page."""

import base64
import json

import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.testclient import TestClient

from vlmzip.serving.playground.guard import PageGuard
from vlmzip.serving.server.body import Bodies
from vlmzip.serving.server.guard import Guard
from vlmzip.serving.server.metrics import Metrics
from vlmzip.serving.server.settings import Settings

JOIN = "/playground/gradio_api/queue/join"


async def echo(scope, receive, send):
    body = await Request(scope, receive).body()
    await JSONResponse({"path": scope["path"], "body": body.decode()})(scope, receive, send)


def client(api_key=None, **settings):
    app = FastAPI()
    app.mount("/playground", PageGuard(echo, bodies=Bodies(Settings(**settings))))
    app.add_middleware(Guard, settings=Settings(api_key=api_key), metrics=Metrics(), paths=[])
    return TestClient(app)


@pytest.mark.parametrize("path", ["/", "/config", "/theme.css", "/assets/index-a.js", "/gradio_api/queue/data"])
def test_reads_of_the_page_pass_with_a_policy(path):
    answer = client().get(f"/playground{path}")
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/proxy=http://example.com"),
        ("GET", "/static/../../etc/passwd"),
        ("GET", "/gradio_api/info"),
        ("GET", "/monitoring"),
        ("POST", "/gradio_api/upload"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/gradio_api/call/run"),
        ("POST", "/login"),
        ("PUT", "/"),
    ],
)
def test_everything_else_is_closed(method, path):
    assert client().request(method, f"/playground{path}", json={"data": []}).status_code == 404


def test_a_form_passes_unchanged():
    body = {"data": ["data:image/png;base64,AA", "what ?", 48, True, None, ["visionzip"]], "fn_index": 1}
    assert json.loads(client().post(JOIN, json=body).json()["body"]) == body


@pytest.mark.parametrize(
    "data",
    [
        [{"path": "http://10.0.0.1/a.png", "meta": {"_type": "gradio.FileData"}}],
        [[{"path": "/etc/passwd"}]],
        [[["deep"]]],
        {"path": "/etc/passwd"},
        "text",
    ],
)
def test_a_field_that_could_be_a_file_is_refused(data):
    answer = client().post(JOIN, json={"data": data})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        (dict(content=b"{", headers={"Content-Type": "application/json"}), 400),
        (dict(content=b"[" * 100_000, headers={"Content-Type": "application/json"}), 400),
        (dict(content=b"[]", headers={"Content-Type": "application/json"}), 400),
        (dict(json={"data": []}, headers={"Origin": "http://elsewhere.example"}), 403),
        (dict(content=b"{}", headers={"Content-Type": "text/plain"}), 415),
        (dict(json={"data": ["x" * 300_000]}), 413),
    ],
)
def test_other_bodies_are_refused(changes, status):
    assert client(max_body=200_000).post(JOIN, **changes).status_code == status


def test_a_request_of_the_page_itself_has_its_origin():
    answer = client().post(JOIN, json={"data": []}, headers={"Origin": "http://testserver"})
    assert answer.status_code == 200


def test_a_browser_sends_the_key_as_a_password():
    server = client("key:1")

    def status(value, path="/playground/"):
        return server.get(path, headers={"Authorization": value} if value else {}).status_code

    def basic(text):
        return "Basic " + base64.b64encode(text.encode()).decode()

    assert server.get("/playground/").headers["www-authenticate"].startswith("Basic realm=")
    assert status(basic("me:key:1")) == 200
    assert [status(value) for value in (None, basic("me:key"), basic("key:1"), "Basic !", "Bearer key:1")] == [401] * 5
    assert status(basic("me:key:1"), "/v1/models") == 401
    assert [status(value, "/") for value in (None, basic("me:key:1"), "Bearer key:1")] == [401, 404, 404]
    assert "any name, and the key as the password" in server.get("/playground/").text
    assert "Bearer KEY" in server.get("/v1/models").text
    assert status(basic("me:key:1"), "/playgrounds") == 401
