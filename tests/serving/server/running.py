"""Run the server of a test in a thread, on a free port of this machine."""

import base64
import io
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from PIL import Image

from vlmzip.methods import VisionZip
from vlmzip.serving.server.app import create_app
from vlmzip.serving.server.metrics import Metrics
from vlmzip.serving.server.run import config_of
from vlmzip.serving.server.worker import HuggingFaceEngine

EXAMPLES = Path(__file__).parents[3] / "examples"
QUESTION = "what color is the ring ?"


@contextmanager
def serving(engine, settings, metrics=None):
    """Yield the address of a server."""
    with running_app(create_app(engine, settings, metrics)) as address:
        yield address


@contextmanager
def running_app(app):
    """Yield the address of a server with an application."""
    config = config_of(app)
    config.port, config.timeout_graceful_shutdown = 0, 1
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def engine_of(mini, settings, metrics=None):
    return HuggingFaceEngine(mini, VisionZip(keep=16), settings, metrics or Metrics())


def data_url(content, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def image_url(name="flat"):
    return data_url((EXAMPLES / f"{name}.png").read_bytes())


def encoded(image, kind="PNG", **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def plain_image(color, size=(48, 48)):
    return data_url(encoded(Image.new("RGB", size, color)))


def user(text, *urls):
    """A message of a user with images before its text."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def asking(text=QUESTION, *urls, **fields):
    """The body of a request."""
    return {"model": "mini", "messages": [user(text, *(urls or [image_url()]))], **fields}
