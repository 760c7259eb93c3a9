"""Write docs/models.md: what works with each model folder of transformers, from the committed results.

python docs/_make/models.py            writes the page
python docs/_make/models.py --check    exits with 1 if the page is not what this would write

`make conformance` checks the models again first.
"""

import re
import sys
from pathlib import Path

from checked_page import write_or_check

from vlmzip.lab.conformance.results import Checked, committed, counts, models_of
from vlmzip.lab.table import markdown

PAGE = Path(__file__).resolve().parents[1] / "models.md"
#: The mark of each status of a method.
MARKS = {"works": "+", "refused": "–", "fails": "fails"}
SOME = "(+)"
VIDEO = MARKS | {"plain model fails": "plain fails", "takes no video": "", "": ""}

HEAD = """# Which models work

Look up here which methods work with your model. transformers {transformers} and vlmzip (`mini_gemini`) have {folders}
model folders whose models take `mm_encoder_outputs`, the interface that vlmzip uses. `make conformance` builds a tiny
model with random weights of each, asks it with every method, and writes this page (vlmzip {vlmzip}, torch {torch},
{minutes} minutes). `vlmzip models NAME` prints a model's cells with their reasons.

{counts}

- A model *works* if it answers as without vlmzip when nothing is compressed, at least one method that compresses works,
  and none fails.
- *refused*: a sentence says what is missing. Adding a family takes one file
  ([Add a family](add_a_family.md)).
- *plain model fails*: the model cannot be asked about images without vlmzip either.

Each cell asks about one image, about several images, and with a batch of rows of two images, one image and text alone.
An answer must be the same with and without a cache, a row in a batch the same as alone, and `no_compression` the same
as the plain model. Methods run with half of the tokens or, if they have no budget, with their default settings. `evs`
keeps all tokens of an image. `vlmzip convert` [makes the checkpoints](using.md#mini-gemini) of `mini_gemini`.

The column `video` asks about one video of two frames with `no_compression`, `random_tokens` and `evs`: `+` if
`no_compression` is the same as the plain model and the others answer, `–` refused, `plain fails` if the plain model
could not be asked about a video of this form; empty if the model takes no video.

A tiny model stands for all checkpoints of its folder. Some of them differ: PaliGemma 2 refuses methods inside the LLM,
which `paligemma` takes, because its LLM has sliding windows. In `qwen3_vl`, methods inside the LLM begin at the fourth
layer or later ([more](surprises.md)).

`+` works; `(+)` works in some of these cases and is refused in others; `–` refused.
"""


def main() -> int:
    return write_or_check(PAGE, page, __doc__)


def page() -> str:
    results = committed()
    models = models_of(results)
    minutes = round(results["seconds"] / 60)
    numbers = "; ".join(f"{status}: {count}" for status, count in counts(models).items())
    head = HEAD.format(folders=len(models), minutes=minutes, counts=f"**{numbers}.**", **results["versions"])
    return "\n".join(part.strip() + "\n" for part in (head, table(models), untried(models), reasons(models)))


def table(models: list[Checked]) -> str:
    """Return a row for each model with which methods were tried."""
    tried = [model for model in models if not model.untried]
    methods = list(tried[0].cells)
    rows = [
        [f"{model.folder} ({model.family})", *(mark(model, method) for method in methods), VIDEO[model.video[0]]]
        for model in tried
    ]
    return (
        "## Models and methods\n\nThe family in brackets is a file of `models/`; `family` is the default family.\n\n"
        + (markdown(["model", *methods, "video"], rows))
    )


def mark(model: Checked, method: str) -> str:
    status = model.status_of(method)
    return SOME if status == "refused" and model.modes_of(method) else MARKS[status]


def untried(models: list[Checked]) -> str:
    """Return a row for each model with which no method was tried."""
    rows = [[model.folder, model.untried, without_names(model, model.reason)] for model in models if model.untried]
    return "## Models that were not tried\n\n" + markdown(["model", "status", "reason"], rows)


def reasons(models: list[Checked]) -> str:
    """Return the reasons of refused and failed cells, with the models and methods of each."""
    places: dict[str, dict[str, list[str]]] = {}
    for model in models:
        for method, modes in model.cells.items():
            for status, reason in modes.values():
                if status != "works":
                    folders = places.setdefault(without_names(model, reason), {}).setdefault(method, [])
                    if model.folder not in folders:
                        folders.append(model.folder)
        if model.video[0] in ("refused", "fails", "plain model fails"):
            places.setdefault(without_names(model, model.video[1]), {}).setdefault("a video", []).append(model.folder)
    lines = []
    for reason, by_method in sorted(places.items(), key=lambda place: -sum(map(len, place[1].values()))):
        by_folders: dict[str, list[str]] = {}
        for method, folders in by_method.items():
            by_folders.setdefault(", ".join(folders), []).append(method)
        where = "; ".join(f"{', '.join(methods)} with {folders}" for folders, methods in by_folders.items())
        lines.append(f"- {reason}: {where}")
    return "## Reasons\n\n" + "\n".join(lines)


def without_names(model: Checked, reason: str) -> str:
    """Return a reason without names of classes and counts of tokens, so that equal reasons read the same."""
    reason = reason.partition("; these methods work")[0].partition("; see docs/")[0]
    reason = re.sub(r"^\d+ of \d+ visual tokens", "some visual tokens", reason)
    reason = re.sub(r" \(\d+ patches, \d+ tokens\)", "", reason)
    reason = reason.replace(model.model, "the model") if model.model else reason
    reason = re.sub(r"\b[A-Z]\w*Vision\w*\b", "the encoder", reason)
    return re.sub(r"\b[A-Z]\w*[a-z](Model|Attention)\b", lambda name: f"the {name[1].lower()}", reason)


if __name__ == "__main__":
    sys.exit(main())
