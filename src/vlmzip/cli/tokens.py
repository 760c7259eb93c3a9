"""`vlmzip tokens`: count the tokens of a request before it is sent, from shapes alone."""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections.abc import Sequence

from PIL import Image

from vlmzip.cli._shared.console import spinner
from vlmzip.cli._shared.images import load_image
from vlmzip.cli._shared.method import check_method, make_method
from vlmzip.errors import UserError, refusing
from vlmzip.lab.table import print_json, print_table, show_count
from vlmzip.runtime.fitting import fitted
from vlmzip.runtime.loading import load_without_weights
from vlmzip.runtime.prompt_text import chat_prompt, special_tokens
from vlmzip.serving.server.counting import ImageCount, count_tokens
from vlmzip.serving.server.settings import Settings

#: The largest side of an image of `--size`.
LARGEST = 20_000


def run(args: Namespace) -> None:
    if not (args.images or args.size or args.question):
        raise UserError("give an image, or its size: vlmzip tokens image.png, vlmzip tokens --size 640x480")
    check_method(args)
    named = [(path, load_image(path)) for path in args.images] + _blanks(args.size)
    with spinner(f"reading {args.model}"):
        loaded = load_without_weights(args.model)
        method = fitted(make_method(args, loaded.family.profile()), loaded.family)
    prompt = chat_prompt(loaded.family, loaded.processor, args.question, len(named))
    special = special_tokens(loaded.processor.tokenizer, prompt)
    with refusing(f"{args.model}'s processor refuses the request"):
        images = [image for _, image in named] or None
        inputs = loaded.processor(images=images, text=[prompt], return_tensors="pt", **special)
    count = count_tokens(loaded.family, inputs, method)
    if args.json:
        content = count.content()
        each = [{"image": name, **image.content()} for (name, _), image in zip(named, count.images, strict=True)]
        print_json({"model": args.model, **content, "images": each})
        return
    rows = [_row(name, image) for (name, _), image in zip(named, count.images, strict=True)]
    visual, text = count.visual, show_count(count.text)
    rows += [["text", text, text, text]]
    rows += [_row("the prompt", visual.plus(count.text))]
    print_table(["", "before", count.method, "at the last layer"], rows)
    if visual.least != visual.most or visual.last_layer is None:
        print(f"\n{count.name} decides by what an image shows; the numbers are limits.")


def _blanks(sizes: Sequence[str]) -> list[tuple[str, Image.Image]]:
    """Return sizes such as "640x480", each with an image of this size. Processors need pixels."""
    sides = [_sides(size) for size in sizes]
    pixels, most = sum(map(math.prod, sides)), Settings.max_pixels
    if pixels > most:
        together = " together" if len(sizes) > 1 else ""
        raise UserError(f"--size: {pixels:,} pixels{together}; a request may have {most:,}, as in vlmzip serve")
    return [(size, Image.new("RGB", each)) for size, each in zip(sizes, sides, strict=True)]


def _sides(size: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})[x×](\d{1,6})", size)
    if match is None or not all(1 <= int(side) <= LARGEST for side in match.groups()):
        raise UserError(f"--size must be WIDTHxHEIGHT up to {LARGEST} pixels, such as 640x480, got {size!r}")
    return int(match[1]), int(match[2])


def _row(name: str, image: ImageCount) -> list[str]:
    after = show_count(image.least)
    if image.least != image.most:
        after += f" to {show_count(image.most)}"
    return [name, show_count(image.before), after, "–" if image.last_layer is None else show_count(image.last_layer)]
