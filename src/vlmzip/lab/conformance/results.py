"""The results of the checks of each model folder of transformers: in memory, as JSON, and the committed ones."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from vlmzip.files import write_text

#: The results of a run as JSON: versions, seconds and models.
Results = dict[str, Any]
#: The committed results.
RESULTS = "results.json"
#: Statuses of a method or a model, the worst first.
STATUSES = ("fails", "plain model fails", "refused", "works")
#: The method that changes nothing. It shows whether a model runs under vlmzip at all.
BASELINE = "no_compression"


@dataclass(frozen=True)
class Checked:
    """The results of one model folder of transformers."""

    folder: str
    model: str
    """The class of the model. Empty if no class answers questions about images."""
    family: str
    """The module of `vlmzip.models` that has the family's class; "family" is the default family."""
    untried: str
    """The status of a model with which no method was tried. Empty if methods were tried."""
    reason: str
    """The reason for `untried`."""
    cells: dict[str, dict[str, list[str]]]
    """By method and mode: the status and its reason."""
    video: list[str] = field(default_factory=lambda: ["", ""])
    """The status of a question about a video and its reason. Empty if no method was tried."""

    def status_of(self, method: str) -> str:
        """Return the worst status of a method over all modes."""
        return min((status for status, _ in self.cells[method].values()), key=STATUSES.index)

    def modes_of(self, method: str) -> list[str]:
        """Return the modes in which a method works."""
        return [mode for mode, (status, _) in self.cells[method].items() if status == "works"]

    @property
    def status(self) -> str:
        """The status of the model. It works if it does so uncompressed and with a method, and no method fails."""
        if self.untried:
            return self.untried
        statuses = {method: self.status_of(method) for method in self.cells}
        if "fails" in (*statuses.values(), self.video[0]):
            return "fails"
        compresses = any(status == "works" for method, status in statuses.items() if method != BASELINE)
        return "works" if compresses and statuses[BASELINE] == "works" else "refused"


def write(path: Path, results: Results) -> None:
    """Write results as JSON, a line for each model."""
    models = ",\n".join(f"  {json.dumps(model)}" for model in results["models"])
    head = json.dumps({name: value for name, value in results.items() if name != "models"})
    write_text(path, f'{head[:-1]}, "models": [\n{models}\n]}}\n')


def committed() -> Results:
    """Return the committed results."""
    content: Results = json.loads((files("vlmzip.lab.conformance") / RESULTS).read_text())
    return content


def models_of(results: Results) -> list[Checked]:
    """Return the results of each model."""
    return [Checked(**model) for model in results["models"]]


def counts(models: Iterable[Checked]) -> dict[str, int]:
    """Return the number of models of each status, the best status first."""
    statuses = [model.status for model in models]
    return {status: statuses.count(status) for status in reversed(STATUSES)}
