"""Most tests of commands need no pixels of a figure, and drawing takes a third of their time."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _blank_figures(request, monkeypatch):
    """Let commands build their figures and save empty files in their place, except in tests marked `draws`.

    Figures that become part of another file, such as a report, are drawn: they are saved in a buffer.
    """
    from matplotlib.figure import Figure  # slow to import, and most folders of tests need none

    draw = Figure.savefig

    def save(figure, place, **options):
        return Path(place).touch() if isinstance(place, (str, Path)) else draw(figure, place, **options)

    if not request.node.get_closest_marker("draws"):
        monkeypatch.setattr(Figure, "savefig", save)
