"""Run a server with the playground, and send its page's form as a browser does."""

import json
from contextlib import contextmanager

import httpx

from tests.serving.server.running import QUESTION, engine_of, running_app
from vlmzip.mini.examples import asked
from vlmzip.serving.playground.examples import Example
from vlmzip.serving.playground.mount import mount
from vlmzip.serving.server.app import create_app
from vlmzip.serving.server.settings import Settings

EXAMPLES = [Example(image, question) for image, question in asked()]


@contextmanager
def serving_page(loaded, settings=None, examples=EXAMPLES):
    """Yield the address of a server with the page, and its app."""
    settings = settings or Settings()
    engine = engine_of(loaded, settings)
    app = create_app(engine, settings)
    mount(app, engine, settings, examples)
    with running_app(app) as address:
        yield address, app


def submit(address, url, names, question=QUESTION, keep=48, session="visitor"):
    """Send the form, and return the HTML of the results."""
    api = f"{address}/playground/gradio_api"
    with httpx.Client(timeout=60) as http:
        config = http.get(f"{address}/playground/config").json()
        run = next(each for each in config["dependencies"] if len(each["inputs"]) > 4)
        groups = [part["props"] for part in config["components"] if part["type"] == "checkboxgroup"]
        chosen = [[name for _, name in group["choices"] if name in names] for group in groups]
        counts = "on average over the LLM's layers"
        body = {"data": [url, question, keep, counts, *chosen], "fn_index": run["id"], "session_hash": session}
        joined = http.post(f"{api}/queue/join", json=body)
        joined.raise_for_status()
        with http.stream("GET", f"{api}/queue/data", params={"session_hash": session}) as events:
            for line in events.iter_lines():
                event = json.loads(line.removeprefix("data: ")) if line else {}
                if event.get("msg") == "process_completed":
                    return event["output"]["data"][0]
    raise AssertionError("the results did not come")
