"""A comparison as one self-contained web page: inline styles, images as data URIs, no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

#: The content security policy: the browser fetches nothing and runs no script.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
LEGEND = (
    ("#fff", "kept, framed"),
    ("linear-gradient(90deg, #f2672b 34%, #2bb26f 34% 67%, #7a4be0 67%)", "merged, one colour a group, anchor framed"),
    ("#343434", "dropped"),
)


@dataclass(frozen=True)
class Card:
    """The card of one method: its images, answer and token counts."""

    title: str
    answer: str
    counts: str
    marked: bool
    """Whether to highlight the answer."""
    images: Sequence[Image.Image]


def render(
    title: str,
    facts: Sequence[str],
    cards: Sequence[Card],
    columns: Sequence[str],
    rows: Sequence[tuple[Sequence[str], bool]],
    notes: Sequence[str],
) -> str:
    """Return the page as HTML; the templates escape all text.

    A row is its cells and whether to highlight its answer, the second cell.
    """
    return render_page("comparison.html.j2", title, facts, cards=cards, columns=columns, rows=rows, notes=notes)


def render_page(template: str, title: str, facts: Sequence[str], *packages: str, **content: object) -> str:
    """Return the HTML of a template that extends `page.html.j2`, from this room or from one of `packages`."""
    loaders = [PackageLoader(package) for package in ("vlmzip.visualize", *packages)]
    environment = Environment(
        loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"data_uri": data_uri, "breakable": _breakable}
    return environment.get_template(template).render(title=title, facts=facts, policy=POLICY, legend=LEGEND, **content)


def data_uri(image: Image.Image) -> str:
    """Return the image as a data URI, in PNG: one-pixel frames do not survive JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _breakable(name: str) -> Markup:
    """Return a method's name, escaped, that may break after each underscore."""
    return Markup("_<wbr>").join(name.split("_"))
