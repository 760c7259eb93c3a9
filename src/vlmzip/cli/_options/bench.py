"""Options of `vlmzip bench`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from vlmzip.cli._options.budget import add_budget
from vlmzip.keep import A_NINTH
from vlmzip.outline import METHOD_FORMS

EXAMPLES = """  vlmzip bench
  vlmzip bench --preset llava-next-7b --methods visionzip,pool2d --average-keep 11% --scale 1/16
  vlmzip bench --preset llava-1.5-13b --device cuda --dtype bfloat16 --batch 8 --out benchmarks/results
  vlmzip bench --methods "llavolta(layer=2,stride=8),fastv(layer=3,keep=50%)" --average-keep as-set --json"""

METHODS = "visionzip,pool2d,kmeans,downsample,random_tokens,llavolta,fastv,sparsevlm"
ATTENTION = ("sdpa", "eager", "flash_attention_2")
CLOCKS = ("wall", "cpu")
#: The scale with which a small CPU finishes in a few minutes.
SMALL = "1/8"
#: Integer options: name, default, smallest value, description.
WHOLE = (
    ("text-tokens", 64, 1, "tokens of text in a prompt"),
    ("new-tokens", 8, 2, "tokens of an answer"),
    ("batch", 1, 1, "prompts at once"),
    ("repeats", 11, 1, "timed rounds"),
)


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("--preset", default="llava-1.5-7b", help=_presets_help())
    parser.add_argument(
        "--scale",
        metavar="S",
        help="make LLM and vision encoder narrower: attention heads and MLP widths times S (0.125 or 1/8; at least one"
        f" head); layers, tokens and vocabulary stay; default: 1 on a GPU, {SMALL} on a CPU",
    )
    parser.add_argument("--methods", default=METHODS, metavar="A,B,…", help=f"each {METHOD_FORMS}; default: {METHODS}")
    add_budget(parser, default=A_NINTH, in_words="a ninth", several=False)
    for name, usual, least, what in WHOLE:
        parser.add_argument(
            f"--{name}", type=int, metavar="N", default=usual, help=f"{what}, at least {least}; default: {usual}"
        )
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, …; default: a GPU if there is one")
    parser.add_argument("--dtype", default=None, help="float32, bfloat16 or float16; default: bfloat16 on a GPU")
    parser.add_argument("--attention", default=ATTENTION[0], help=f"{', '.join(ATTENTION)}; default: %(default)s")
    parser.add_argument(
        "--clock",
        default=CLOCKS[0],
        help="wall, or cpu: CPU seconds of this process, for a CPU that other processes use too (with one thread);"
        " default: %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write a CSV there, named by hardware and versions")


def _presets_help() -> str:
    return (
        "llava-1.5-7b, llava-1.5-13b: 576 visual tokens; llava-next-7b, llava-next-13b: the same models at LLaVA-NeXT's"
        " 2,880, as five images; video-llava-7b: at Video-LLaVA's 2,048, as eight;"
        " mgm-2b: 576, with an LLM of Gemma-2B's dimensions; qwen2.5-vl-3b, qwen2.5-vl-7b: 972, an image of 1008 x 756"
        " pixels; qwen2.5-vl-3b-video, qwen2.5-vl-7b-video: 1,008, a clip of 8 frames of 588 x 336 pixels;"
        " default: %(default)s"
    )
