"""Count the cost of LLaVolta's training schemes, and show it beside the paper's numbers.

`python docs/_make/schedules.py [--check]` writes docs/schedules.md. It needs only the shapes of the models, no weights.
"""

import argparse
import sys
from pathlib import Path

import torch

from vlmzip.lab.bench.presets import PRESETS, make_model
from vlmzip.lab.papers.llavolta import FOUR_STAGES, explain_beside_paper
from vlmzip.lab.table import markdown
from vlmzip.models import family_of
from vlmzip.training.explain import COLUMNS, lines, profile_of
from vlmzip.training.schedule import SCHEMES, scheme

PAGE = Path(__file__).resolve().parents[1] / "schedules.md"
#: LLaVA-1.5's second step has 5,197 steps: 665k records, 128 to a step, one epoch. One less is a multiple of 2, 3 and
#: 4, so the stages are equally long and the totals are the exact ones of the schemes.
STEPS = 5196
TEXT = 62

HEAD = f"""# What training schedules cost

See here what each training schedule saves. The tables show LLaVolta's schemes (arXiv:2406.20092, Table 1) on
LLaVA-1.5-7B, and further below on [LLaVA-1.5-13B](#llava-15-13b), [Video-LLaVA](#video-llava) and [MGM-2B](#mgm-2b):
visual tokens per image summed over all layers, compression ratio (CR, Eq. 3), and FLOPs of the LLM's forward with
{TEXT} tokens of text, as a share of those without compression. Forward and backward together have the
same share. There are {STEPS:,} steps, which 2, 3 and 4 stages divide equally; an epoch of LLaVA-1.5's instruction
data has one more. *paper*: as printed there. `python docs/_make/schedules.py` writes this page, and the tests check
it.

The stages' ratios agree with the paper's to the percent that it prints. Not all of its totals (Table 2) follow from
its stages: only that of `last-stage-compression` does exactly. In `four-stage-deeper-then-wider` the first stage
seems already divided by 4, and in `four-stage-wider-then-deeper` it seems to have 72 x 32 tokens instead of 3,312.
The means of three stages are a little low, as if each weighed 0.33. We found no such reading for the total of
`two-stage`. Training times are the paper's, on its hardware; this repository has not measured them.
"""

#: Further models of the paper: the shape, the schemes that were trained, and what differs from the paper.
OTHERS = {
    "LLaVA-1.5-13B": (
        "llava-1.5-13b",
        FOUR_STAGES,
        """\
Table 6 says "four stages" and prints neither their order nor their layers. Both orders are shown, with layers 2
and 16 of 32 in proportion to this LLM's 40. The paper trains for 17.6 hours, and 21.1 without compression.
[`llava-1.5-13b-llavolta.yaml`](../configs/llava-1.5-13b-llavolta.yaml)""",
    ),
    "Video-LLaVA": (
        "video-llava-7b",
        [name for name in SCHEMES if name != "last-stage-compression"],
        """\
A video is 8 frames. Table 8 counts 147,456 tokens without compression, which is 8 x 576 x 32, and pools each frame.
Video-LLaVA's frames of 224 pixels have 256 tokens: 65,536 over all layers, as here; CLS of each frame, which its LLM
also gets, is not counted. Without compression the paper trains for 40.7 hours.
[`video-llava-7b-llavolta.yaml`](../configs/video-llava-7b-llavolta.yaml)""",
    ),
    "MGM-2B": (
        "mgm-2b",
        FOUR_STAGES,
        """\
Table 10 does not say which scheme was trained. Both of four stages are shown, with layers 2 and 16 of 32 in
proportion to the 18 of Gemma-2B. The paper trains for 14.8 hours, and 18.1 without compression.
[`mgm-2b-llavolta.yaml`](../configs/mgm-2b-llavolta.yaml)""",
    ),
}


def page() -> str:
    parts = [HEAD, *(f"## {name}\n\n{table('llava-1.5-7b', name)}" for name in SCHEMES)]
    for model, (shape, names, text) in OTHERS.items():
        parts.append(f"## {model}\n\n{text}\n")
        parts += [f"### {model}, {name}\n\n{table(shape, name)}" for name in names]
    return "\n".join(parts)


def table(shape: str, name: str) -> str:
    """Return the costs of a scheme on a model of this shape."""
    preset = PRESETS[shape]
    family = family_of(make_model(preset.config(), "meta", torch.bfloat16))
    profile = profile_of(family, preset.images if preset.images > 1 else None)
    cost = explain_beside_paper(scheme(name, profile.layers), family, STEPS, TEXT, profile)
    return markdown(COLUMNS, lines(cost))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page differs")
    text = page()
    if parser.parse_args().check:
        return int(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
