"""Options of `vlmzip serve`."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction
from pathlib import Path

from vlmzip.cli._options.common import add_model
from vlmzip.cli._options.method import add_method
from vlmzip.cli._options.store import add_store

EXAMPLES = """  vlmzip serve --keep 16
  vlmzip serve --model llava-hf/llava-1.5-7b-hf --method visionzip --keep 64 --port 8080
  vlmzip serve --store store
  VLMZIP_API_KEY=… vlmzip serve --host 0.0.0.0 --allow-hosts images.example.org"""
#: The environment variable with the API key. Arguments can be read by other users of a machine.
KEY = "VLMZIP_API_KEY"
ENGINES = ("auto", "hf", "vllm")


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    add_model(parser)
    limits = parser.add_argument_group("limits, also of what requests can ask for")  # before the fields of the method
    add_method(parser, arguments)
    add_store(parser, arguments, "let requests name images that `vlmzip encode` stored there, such as store:cat.jpg")
    parser.add_argument(
        "--engine", default="auto", help="hf, vllm or auto: vLLM where it is installed and can; default: %(default)s"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default: %(default)s, this machine only"
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="port to listen on, 0 for a free one; default: %(default)s"
    )
    parser.add_argument("--name", help="name of the model in requests; default: what --model says")
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"file with the key that requests must send; default: ${KEY}, if set",
    )
    parser.add_argument(
        "--allow-hosts", metavar="HOST,HOST", help="hosts to fetch images from; default: none, images come in requests"
    )
    parser.add_argument(
        "--playground",
        action=BooleanOptionalAction,
        help="a page at /playground to try methods in a browser; default: if Gradio is installed",
    )
    parser.add_argument("--quiet", action="store_true", help="log no line for each request")
    for name, text in LIMITS.items():
        limits.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text)


#: The limits by their names in `Settings`.
LIMITS = {
    "max_new_tokens": "tokens of an answer; default: 512",
    "max_batch": "requests that are answered together; default: 16",
    "max_queue": "requests that wait; more get status 429; default: 64",
    "max_seconds": "seconds that a request may take; default: 120",
    "max_images": "images of a request; default: 16",
    "max_pixels": "pixels of all images of a request; default: 50000000",
    "max_body": "bytes of a request; default: 33554432",
}
