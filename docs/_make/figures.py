"""Draw the figures of README and docs: `make figures`."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import vlmzip
from vlmzip import NoCompression, Pool2d, RandomTokens, VisionZip
from vlmzip.compressor import Compressor
from vlmzip.mini import load
from vlmzip.visualize.overlay import INK, PAPER, draw_fates, draw_tokens, seen_image

ROOT = Path(__file__).resolve().parents[2]
FIGURES, EXAMPLES = ROOT / "docs" / "figures", ROOT / "examples"
SHOWN: list[tuple[str, Compressor]] = [
    ("all 144 tokens", NoCompression()),
    ("random_tokens, 16", RandomTokens(keep=16)),
    ("pool2d, 16", Pool2d(factor=3)),
    ("visionzip, 16", VisionZip(keep=16)),
]


def main() -> None:
    model, processor = load()
    for name in ("flat", "cluttered"):
        question = (EXAMPLES / f"{name}.txt").read_text().strip()
        inputs = processor(
            images=Image.open(EXAMPLES / f"{name}.png").convert("RGB"),
            text=f"USER: <image>\n{question} ASSISTANT:",
            return_tensors="pt",
        )
        panels = [panel(model, processor, inputs, title, method) for title, method in SHOWN]
        side_by_side(panels, question).save(FIGURES / f"methods_{name}.png")
        compressed = vlmzip.attach(model, VisionZip(keep=16))
        with torch.no_grad():
            compressed(**inputs)
        image = compressed.report.images[0]
        page = draw_tokens(seen(processor, inputs), image.token_map, image.grid, image.prefix, "visionzip: 144 to 16")
        page.save(FIGURES / f"tokens_{name}.png")


def panel(model, processor, inputs, title: str, method: Compressor) -> tuple[Image.Image, str, str]:
    """Return the drawing of the tokens' fates under one method, its title, and the answer."""
    compressed = vlmzip.attach(model, method)
    out = compressed.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    image = compressed.report.images[0]
    if method.changes_nothing:
        fates = seen(processor, inputs).resize((360, 360), Image.Resampling.NEAREST)
    else:
        fates = draw_fates(seen(processor, inputs), image.token_map, image.grid, image.prefix, cell=30)
    return fates, title, answer


def seen(processor, inputs) -> Image.Image:
    images = processor.image_processor
    return seen_image(inputs["pixel_values"][0], images.image_mean, images.image_std)


def side_by_side(panels: list[tuple[Image.Image, str, str]], question: str) -> Image.Image:
    margin, line = 16, 30
    width = sum(image.width + margin for image, _, _ in panels) + margin
    page = Image.new("RGB", (width, panels[0][0].height + 3 * line + 2 * margin), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=18)
    draw.text((margin, margin - 6), question, fill=INK, font=font)
    left = margin
    for image, title, answer in panels:
        page.paste(image, (left, margin + line))
        draw.text((left, margin + line + image.height + 6), title, fill=INK, font=font)
        draw.text((left, margin + 2 * line + image.height), f"“{answer}”", fill=INK, font=font)
        left += image.width + margin
    return page


if __name__ == "__main__":
    main()
