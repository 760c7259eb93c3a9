"""Options of `vlmzip ask`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from vlmzip.cli._options.common import add_answer_length, add_frames, add_model
from vlmzip.cli._options.method import add_method
from vlmzip.cli._options.store import add_store

EXAMPLES = """  vlmzip ask examples/flat.png "what color is the ring ?"
  vlmzip ask street.jpg "What does the sign say?" --model llava-hf/llava-1.5-7b-hf --keep 64
  vlmzip ask a.png b.png "What differs?" --method pool2d --factor 2 --overlay tokens.png
  vlmzip ask clip.mp4 "What happens?" --model Qwen/Qwen2.5-VL-7B-Instruct --frames 16 --keep-per-view 24
  vlmzip ask --store store cat.jpg "What is the cat doing?"
  vlmzip ask a.png "How many?" --dominant 13 --contextual 3 --merge mean --baseline --json"""


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.usage = f"{parser.prog} IMAGE|VIDEO… QUESTION [options]"
    parser.add_argument("words", nargs="+", metavar="IMAGE|VIDEO… QUESTION", help="images or videos, then the question")
    add_model(parser)
    add_frames(parser)
    add_method(parser, arguments)
    add_store(parser, arguments, "answer about images that `vlmzip encode` stored there; --method acts inside the LLM")
    parser.add_argument("--baseline", action="store_true", help="also answer without compression, and compare")
    parser.add_argument("--overlay", type=Path, metavar="FILE", help="draw the tokens kept, merged and dropped")
    add_answer_length(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
