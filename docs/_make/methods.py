"""Write docs/methods.md, the gallery of methods, from the methods' own docstrings and fields, and docs/api/methods.md.

python docs/_make/methods.py            writes the pages, and draws images into docs/figures/methods
python docs/_make/methods.py --check    exits with 1 if a page is not what this would write; draws nothing

The images show examples/first.png and its question on mini, with a quarter of the tokens. A method without a budget has
its first example, or its defaults. A method that compares frames has a drawn clip, and one that compares patches has
its first frame. The cost comes from benchmarks/results/selection-by-method.csv.
"""

import csv
import re
import sys
from pathlib import Path

from checked_page import write_or_check

from vlmzip import blueprint, outline
from vlmzip.lab.table import markdown
from vlmzip.outline import Facts, Outline, source_letters

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "methods.md"
API = ROOT / "docs" / "api" / "methods.md"
FIGURES = ROOT / "docs" / "figures" / "methods"
COSTS = ROOT / "benchmarks" / "results" / "selection-by-method.csv"
EXAMPLE = ROOT / "examples" / "first.png"
FAILS = "When it fails: "
#: Frames of the clip, in which a circle moves by `STEP` pixels, two visual tokens, from frame to frame.
FRAMES, STEP = 4, 16
SPECS = {"chain": ("visionzip(keep=50%)+fastv(keep=50%)",)}
ACTS = {
    "pixels": "on the pixels",
    "encoder": "inside the vision encoder",
    "pre_projector": "before the projector",
    "post_projector": "after the projector",
    "in_llm": "inside the LLM",
}
#: Every method has these options, or every method with a budget; the head of the page explains them.
COMMON = ("positions", "keep_per_view")

API_HEAD = """# API: methods

Each method is a frozen dataclass. Its fields are also its options on the command line and the keys of
`compressor.json`. [The gallery](../methods.md) shows what each method does."""

HEAD = """# Method gallery

Each image shows what a method keeps of the visual tokens of one image: `examples/first.png` on [mini](mini.md), with a
quarter of the tokens or, for methods without such a budget, an example setting. White frames: kept tokens. Tints:
tokens merged into one, whose place is the small square. Dark: dropped tokens. Methods inside the LLM are drawn as its
last layer sees the image. Methods that compare frames have four frames of a drawn clip, and methods that compare
patches its first frame.

*Cost* is the time of deciding and applying, as a share of what the encoder CLIP ViT-L/14-336 takes for the same input,
and the peak memory: for one view of 576 tokens, and for five, 2,880 tokens. About a ninth of the tokens remain
([measured](results.md#what-each-methods-selection-costs) on one CPU thread, without the signals that a method reads).
Every method also has `--positions`: `contiguous` renumbers the remaining tokens, `original` keeps their positions.
Methods with `keep` also have `keep_per_view`, a budget for each view (tile or frame) of an image or video.

In the table, *cost* is how a method's time grows with N visual tokens, of which k remain, and *192 / 128 / 64* is the
published share of LLaVA-1.5-7B's score, in percent, at these numbers of its 576 tokens. A letter names the source.
Sources differ in their benchmarks, so compare only values with the same letter. `vlmzip methods --kind prune
--no-text-aware` filters this list, and `vlmzip.available(kind="prune", text_aware=False)` does in Python.

`python docs/_make/methods.py` writes this page from the methods' source. `vlmzip methods NAME` prints the same and the
differences from the authors' code.
"""


def main() -> int:
    if "--check" not in sys.argv:
        draw_all()
    return max(write_or_check(PAGE, page, __doc__ or ""), write_or_check(API, api_page, __doc__ or ""))


def api_page() -> str:
    """Return the API reference of all methods."""
    return "\n\n".join([API_HEAD, *(f"::: vlmzip.{name}" for name in sorted(outline.method_classes()))]) + "\n"


def page() -> str:
    methods = outline.methods()
    costs = {
        (row["method"], row["tokens"]): row for row in csv_rows() if not row["setting"] and row["keep"] != "64 tokens"
    }
    return "\n".join([HEAD, overview(methods), *(section(method, costs) for method in methods)])


def csv_rows() -> list[dict[str, str]]:
    with COSTS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def overview(methods: list[Outline]) -> str:
    letters = source_letters(Facts.of(m) for m in methods)
    rows = [
        [
            f"[`{m.name}`](#{m.name})",
            facts.kind,
            m.summary,
            sites(m),
            "yes" if facts.text_aware else "no",
            facts.cost,
            facts.scores_from(letters),
        ]
        for m, facts in ((m, Facts.of(m)) for m in methods)
    ]
    heads = ["method", "kind", "what it does", "acts", "reads the question", "cost", "192 / 128 / 64"]
    sources = "".join(f"- {letter}: {source}\n" for source, letter in letters.items())
    return f"{markdown(heads, rows)}\nSources of the published scores:\n\n{sources}"


def section(method: Outline, costs: dict[tuple[str, str], dict[str, str]]) -> str:
    """Return a method's part of the page: summary, image, facts, options."""
    parts = [f"## {method.name}", method.summary]
    if (FIGURES / f"{method.name}.png").exists():
        seen = "frames of a video, in which a circle moves" if method.name in clip_methods() else "an image"
        parts.append(f"![What {method.name} keeps of {seen}](figures/methods/{method.name}.png)")
    else:
        parts.append("No image: its tokens are learned queries, which have no place in the image.")
    fails = re.search(rf"{FAILS}(.*?)(?:\n\n|\Z)", method.doc, flags=re.S)
    if not fails:
        raise ValueError(f"the docstring of {method.name} has no paragraph that begins with {FAILS!r}")
    facts = [f"**Paper**: {paper(method)}.", f"**Acts** {sites(method)}; reads {reads(method)}."]
    linked = re.sub(r"\(docs/((\w+)\.md)\)", r"([\2](\1))", " ".join(fails[1].split()))
    known = Facts.of(method)
    trained = "; **it must be trained**" if known.trained_weights else ""
    facts.append(f"**Kind**: {known.kind}; time grows as {known.cost}{trained}.")
    if known.published:
        facts.append(f"**Published** at 192 / 128 / 64 of 576 tokens: {known.scores} % ({known.published_in}).")
    facts.append(f"**When it fails**: {linked}")
    if cost := [cell for tokens in ("576", "2880") if (cell := cost_cell(costs.get((method.name, tokens))))]:
        facts.append(f"**Cost**: {'; '.join(cost)}.")
    if examples := [f"`{method.name}({settings})`" for settings in method.values["examples"]]:
        facts.append(f"**Try**: {', '.join(examples)}.")
    parts.append("\n".join(f"- {fact}" for fact in facts))
    _, fields = blueprint.method(method.name)
    rows = [[f"`{f.name}`", f.type, default(f.default), f.doc] for f in fields if f.name not in COMMON]
    parts.append(markdown(["option", "value", "default", "meaning"], rows).strip())
    return "\n\n".join(parts) + "\n"


def default(value: object) -> str:
    """Return a default, or dots for one that is too long for a table."""
    return str(value) if len(str(value)) < 60 else "…"


def sites(method: Outline) -> str:
    return ", ".join(ACTS[str(site)] for site in method.values["sites"])


def reads(method: Outline) -> str:
    return ", ".join(
        [
            "the features",
            *(str(signal).replace("_", " ").replace("cls", "CLS") for signal in sorted(method.values["needs"])),
        ]
    )


def paper(method: Outline) -> str:
    named = re.sub(r"arXiv:(\S+?)(?=,|$)", r"[arXiv:\1](https://arxiv.org/abs/\1)", method.values["paper"])
    return named or "none"


def cost_cell(row: dict[str, str] | None) -> str:
    if row is None or not row["milliseconds"]:
        return ""
    time = float(row["time_over_encoder_of_input"])
    shown = f"{time:.2%}" if time >= 0.0001 else "below 0.01%"
    return f"{int(row['tokens']):,} tokens: {shown} of the encoder's time, {float(row['peak_mib']):,.0f} MiB"


def clip_methods() -> set[str]:
    """Return the names of the methods that compare the frames of a video."""
    from vlmzip import catalogue  # slow: it imports torch

    return {name for name, cls in catalogue.available().items() if cls.sees_clip}


def clip() -> list:
    """Draw the frames of a clip in the style of mini's images."""
    from PIL import Image

    from vlmzip.mini.drawing import draw
    from vlmzip.mini.scene import Scene, Thing

    still = Thing("shape", "square", "blue", 22, 22, 0, (0, 0, 0), left=58, top=60)
    frames = []
    for number in range(FRAMES):
        moving = Thing("shape", "circle", "red", 22, 22, 0, (0, 0, 0), left=6 + STEP * number, top=14)
        frames.append(Image.fromarray(draw(Scene(3, "flat", "plain", (still, moving), "circle"), None)))
    return frames


def draw_clip(model, processor, name: str, cls) -> None:
    """Draw, frame by frame, what a method keeps of the clip with 40 % of the tokens."""
    import torch
    from figures import CELL
    from PIL import Image

    from vlmzip import Grid, VisualTokens
    from vlmzip.visualize.overlay import PAPER, draw_fates

    frames, grid = clip(), Grid(FRAMES, 12, 12)
    pixels = processor.image_processor(frames, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))
    token_map = cls(keep="40%").assign(VisualTokens(features.flatten(0, 1)[None], grid, prefix=0))
    side, gap = 12 * CELL, 6
    page = Image.new("RGB", (FRAMES * (side + gap) - gap, side), PAPER)
    for number, frame in enumerate(frames):
        of_frame = token_map.of_inputs(torch.arange(144) + 144 * number)
        page.paste(draw_fates(frame, of_frame, Grid(1, 12, 12), 0, CELL), (number * (side + gap), 0))
    page.save(FIGURES / f"{name}.png", optimize=True)


def draw_patches(name: str, cls) -> None:
    """Draw what a method keeps of a drawn image by its pixels, on mini's grid. mini's encoder takes whole images."""
    import torch
    from figures import CELL

    from vlmzip import Grid, VisualTokens
    from vlmzip.visualize.overlay import draw_fates

    image, grid = clip()[0], Grid(1, 12, 12)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(12, 8, 12, 8, 3) / 255
    tokens = VisualTokens(pixels.transpose(1, 2).reshape(1, grid.size, -1), grid)
    draw_fates(image, cls().assign(tokens), grid, 0, CELL).save(FIGURES / f"{name}.png", optimize=True)


def draw_all() -> None:
    """Draw what each method keeps of the example."""
    from figures import answered, inputs_of  # torch, which `--check` does not need
    from PIL import Image

    from vlmzip import Grid, Profile, UserError, catalogue, spec
    from vlmzip.mini import load

    model, processor = load()
    inputs = inputs_of(processor, Image.open(EXAMPLE), EXAMPLE.with_suffix(".txt").read_text().strip())
    mini = Profile(grid=Grid(1, 12, 12), layers=8)
    FIGURES.mkdir(exist_ok=True)
    for name, cls in catalogue.available().items():
        if cls.trained_weights:  # its tokens are learned queries, which have no place in the image
            continue
        if cls.sees_clip:
            draw_clip(model, processor, name, cls)
            continue
        if cls.drops_patches:
            draw_patches(name, cls)
            continue
        for text in SPECS.get(name, (f"{name}(keep=25%)", *(f"{name}({settings})" for settings in cls.examples), name)):
            try:
                image, _ = answered(model, processor, inputs, spec.read(text).placed(mini))
            except UserError:  # the method has no such setting
                continue
            image.save(FIGURES / f"{name}.png", optimize=True)
            break


if __name__ == "__main__":
    sys.exit(main())
