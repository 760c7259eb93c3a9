"""Count the cost of LLaVolta's training schemes, and show it beside the paper's numbers.

`python docs/_make/schedules.py [--check]` writes docs/schedules.md. It needs only the shapes of LLaVA-1.5-7B, no
weights.
"""

import argparse
import sys
from pathlib import Path

import torch

from vlmzip.lab.bench.presets import PRESETS, make_config, make_model
from vlmzip.lab.papers.llavolta import explain_beside_paper
from vlmzip.lab.table import markdown
from vlmzip.models import family_of
from vlmzip.training.explain import COLUMNS, lines
from vlmzip.training.schedule import SCHEMES, scheme

PAGE = Path(__file__).resolve().parents[1] / "schedules.md"
#: LLaVA-1.5's second step has 5,197 steps: 665k records, 128 to a step, one epoch. One less is a multiple of 2, 3 and
#: 4, so the stages are equally long and the totals are the exact ones of the schemes.
STEPS = 5196
TEXT = 62

HEAD = f"""# What training schedules cost

See here what each training schedule saves. The tables show LLaVolta's schemes (arXiv:2406.20092, Table 1) on
LLaVA-1.5-7B: visual tokens per image summed over all 32 layers, compression ratio (CR, Eq. 3), and FLOPs of the LLM's
forward with {TEXT} tokens of text, as a share of those without compression. Forward and backward together have the
same share. There are {STEPS:,} steps, which 2, 3 and 4 stages divide equally; an epoch of LLaVA-1.5's instruction
data has one more. *paper*: as printed there. `python docs/_make/schedules.py` writes this page, and the tests check
it.

The stages' ratios agree with the paper's to the percent that it prints. Not all of its totals (Table 2) follow from
its stages: only that of `last-stage-compression` does exactly. In `four-stage-deeper-then-wider` the first stage
seems already divided by 4, and in `four-stage-wider-then-deeper` it seems to have 72 x 32 tokens instead of 3,312.
The means of three stages are a little low, as if each weighed 0.33. We found no such reading for the total of
`two-stage`. Training times are the paper's, on its hardware; this repository has not measured them.
"""


def page() -> str:
    family = family_of(make_model(make_config(PRESETS["llava-1.5-7b"]), "meta", torch.bfloat16))
    parts = [HEAD]
    for name in SCHEMES:
        cost = explain_beside_paper(scheme(name), family, STEPS, TEXT)
        parts.append(f"## {name}\n\n{markdown(COLUMNS, lines(cost))}")
    return "\n".join(parts)


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
