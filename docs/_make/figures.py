"""Draw the first figure of the README: `make figures`.

It shows test questions of mini that a rule chooses: at a quarter of the tokens, the first question about
the first image of each level; at a ninth, the first question about a number in each level, because digits are the
smallest things in the images. The first image whose level is not yet in the row has its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import vlmzip
from vlmzip import NoCompression, VisionZip
from vlmzip.compressor import Compressor
from vlmzip.mini import load
from vlmzip.mini.questions import ImageQuestion
from vlmzip.mini.splits import test_split
from vlmzip.visualize.overlay import INK, PAPER, draw_fates, seen_image

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "docs" / "figures"
LEVELS = ("flat", "patterned", "cluttered")
CELL, MARGIN, LINE = 20, 16, 24
SEARCHED = 600  # test questions; the first of each level are among them


def main() -> None:
    model, processor = load()
    questions = test_split(SEARCHED)
    typical = [pair(model, processor, question, 36) for question in first_of_each_level(questions, lambda _: True)]
    lost = [pair(model, processor, q, 16) for q in first_of_each_level(questions, lambda q: q.type == "read")]
    titles = (
        "Typical: VisionZip keeps 36 of 144 visual tokens (25 %). First test question of each level.",
        "Limit: VisionZip keeps 16 of 144 (11 %). First test question about a number in each level.",
    )
    page([(titles[0], typical), (titles[1], lost)]).save(FIGURES / "first.png")


def first_of_each_level(
    questions: Iterable[ImageQuestion], fits: Callable[[ImageQuestion], bool]
) -> list[ImageQuestion]:
    """Return the first question that fits in each level, in the order of `LEVELS`."""
    first: dict[str, ImageQuestion] = {}
    for question in questions:
        if fits(question):
            first.setdefault(question.level, question)
    return [first[level] for level in LEVELS]


def pair(model, processor, question: ImageQuestion, keep: int) -> tuple[list[Image.Image], list[str]]:
    """Return the image and its kept tokens, and the lines below: question, expected answer, answers."""
    inputs = inputs_of(processor, question.image, question.question)
    plain, plain_answer = answered(model, processor, inputs, NoCompression())
    tokens, answer = answered(model, processor, inputs, VisionZip(keep=keep))
    lines = [
        question.question,
        f"expected: {question.answer}",
        f"144 tokens: {plain_answer}",
        f"{keep} tokens: {answer}",
    ]
    return [plain, tokens], lines


def inputs_of(processor, image: Image.Image, question: str):
    return processor(images=image, text=f"USER: <image>\n{question} ASSISTANT:", return_tensors="pt")


def answered(model, processor, inputs, method: Compressor) -> tuple[Image.Image, str]:
    """Return the drawing of the tokens' fates under a method, and the answer."""
    with vlmzip.attach(model, method) as compressed:
        out = compressed.generate(**inputs, max_new_tokens=8, do_sample=False)
        answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        image = compressed.report.images[0]
    if method.changes_nothing:
        side = CELL * image.grid.cols
        return seen(processor, inputs).resize((side, side), Image.Resampling.NEAREST), answer
    return draw_fates(seen(processor, inputs), image.token_map, image.grid, image.prefix, cell=CELL), answer


def seen(processor, inputs) -> Image.Image:
    images = processor.image_processor
    return seen_image(inputs["pixel_values"][0], images.image_mean, images.image_std)


def page(rows: list[tuple[str, list[tuple[list[Image.Image], list[str]]]]]) -> Image.Image:
    """Draw rows of pairs, each row below its title, each pair above its lines."""
    side = rows[0][1][0][0][0].width
    width = len(LEVELS) * (2 * side + 6 + 2 * MARGIN)
    height = sum(2 * MARGIN + 5 * LINE + side + MARGIN for _ in rows)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw, font, bold = ImageDraw.Draw(sheet), ImageFont.load_default(size=17), ImageFont.load_default(size=20)
    top = MARGIN
    for title, pairs in rows:
        draw.text((MARGIN, top), title, fill=INK, font=bold)
        for number, (images, lines) in enumerate(pairs):
            left = MARGIN + number * (2 * side + 6 + 2 * MARGIN)
            for place, image in enumerate(images):
                sheet.paste(image, (left + place * (side + 6), top + LINE + MARGIN))
            below = top + LINE + MARGIN + side + 6
            draw.text((left, below), f"{lines[0]}   {lines[1]}", fill=INK, font=font)
            draw.text((left, below + LINE), lines[2], fill=INK, font=font)
            draw.text((left + side + 6, below + LINE), lines[3], fill=INK, font=font)
        top += LINE + MARGIN + side + 6 + 2 * LINE + 2 * MARGIN
    return sheet.crop((0, 0, width, top))


if __name__ == "__main__":
    main()
