"""Run the notebooks in examples/ and write their outputs into them: `python docs/_make/notebooks.py`, or `--check`."""

import argparse
import base64
import io
import os
import re
import sys
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
#: Progress bars and tqdm's warning that Jupyter's are not installed do not belong into a committed notebook.
QUIET = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
#: The kinds of output to keep. An image also comes as JPEG, and as text with its address in memory.
KEPT = ("image/png", "text/plain")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
#: Another processor rounds otherwise, which changes one of some hundred answers, and a pixel of a drawing.
NEAR, NEAR_PIXELS = 0.01, 1.0


def executed(path: Path) -> NotebookNode:
    """Return a notebook with the outputs of a run in its folder. Raise `CellExecutionError` if a cell fails."""
    notebook = read(path)
    os.environ |= QUIET  # the kernel inherits them
    settings = {"timeout": 600, "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources={"metadata": {"path": path.parent}}, **settings).execute()
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if "data" in output:
                kind = next(kind for kind in KEPT if kind in output.data)
                output.data = {kind: output.data[kind]}
    return notebook


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def differences(committed: NotebookNode, new: NotebookNode) -> list[str]:
    """Return which code cells have other outputs. Numbers and pixels may differ a little."""
    pairs = zip(code_cells(committed), code_cells(new), strict=True)
    return [
        f"cell {number}: {shown(old)} became {shown(now)}"
        for number, (old, now) in enumerate(pairs, 1)
        if not alike(old, now)
    ]


def alike(old: NotebookNode, new: NotebookNode) -> bool:
    if len(old.outputs) != len(new.outputs):
        return False
    return all(map(same_output, old.outputs, new.outputs))


def same_output(old: NotebookNode, new: NotebookNode) -> bool:
    if "image/png" in old.get("data", {}) and "image/png" in new.get("data", {}):
        images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one.data["image/png"])))) for one in (old, new)]
        return images[0].shape == images[1].shape and abs(images[0].astype(float) - images[1]).mean() <= NEAR_PIXELS
    texts = [text_of(old), text_of(new)]
    numbers = [np.array([float(number) for number in NUMBER.findall(text)]) for text in texts]
    if NUMBER.sub("N", texts[0]) != NUMBER.sub("N", texts[1]):
        return False
    return bool(np.allclose(*numbers, rtol=NEAR, atol=NEAR))


def text_of(output: NotebookNode) -> str:
    """Return the text of an output, or the kind of one that is no text."""
    if output.output_type == "stream":
        return f"{output.name}: {output.text}"
    return output.data.get("text/plain", "image")


def shown(cell: NotebookNode) -> list[str]:
    return list(map(text_of, cell.outputs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if outputs are out of date")
    check = parser.parse_args().check
    changed = []
    for path in NOTEBOOKS:
        new = executed(path)
        if check:
            changed += [f"{path.name}, {change}" for change in differences(read(path), new)]
        else:
            nbformat.write(new, path)
    print("\n".join(changed), file=sys.stderr)
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
