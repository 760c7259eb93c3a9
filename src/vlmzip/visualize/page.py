"""A comparison as one self-contained web page: inline styles, images as data URIs, no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

#: The content security policy: the browser fetches nothing and runs no script.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --paper: #fafaf8; --card: #fff; --ink: #1e1e1e; --soft: #5c5c58; --line: #dddcd6;
  --mark: #a83800; --shade: #0003; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #141619; --card: #1d2024; --ink: #e8e8e4; --soft: #a3a7ad; --line: #34383e; --mark: #ffab70;
    --shade: #fff3; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.45 system-ui, sans-serif; }
h1 { margin: 0 0 .25rem; font-size: 1.5rem; overflow-wrap: anywhere; }
p { margin: 0; }
.facts, .counts, .legend, .notes { color: var(--soft); font-size: .875rem; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 9.5rem), 1fr)); gap: .75rem;
  margin: 1rem 0 .5rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; overflow: hidden; }
.card img { display: block; width: 100%; height: auto; }
.card div { padding: .5rem .625rem .625rem; }
.card h2 { margin: 0; font-size: .9375rem; overflow-wrap: anywhere; }
.answer { overflow-wrap: anywhere; }
.marked .answer { color: var(--mark); font-weight: 600; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .3em; border: 1px solid var(--soft); }
.legend span { margin-right: 1rem; white-space: nowrap; }
.scroll { overflow-x: auto; margin: 1.25rem 0 .75rem; border: 1px solid var(--line); border-radius: .5rem;
  /* A shade at the right edge as long as there is more to scroll to. */
  background: linear-gradient(to left, var(--card) 50%, transparent) right / 2.5rem 100% no-repeat local,
    linear-gradient(to left, var(--shade), transparent) right / 1rem 100% no-repeat scroll, var(--card); }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .6rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child { position: sticky; left: 0; background: var(--card); text-align: left;
  white-space: normal; overflow-wrap: anywhere; min-width: 8.25rem; }
th:nth-child(2), td.answer { text-align: left; white-space: normal; min-width: 11rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .25rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 0; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem; }
.curves img { width: 100%; height: auto; border-radius: .5rem; background: #fff; }
.cards.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); }
.plain th:nth-child(2), .plain td.answer { min-width: 0; }
details { border-top: 1px solid var(--line); padding: .5rem 0; }
summary { cursor: pointer; }
.notes { margin: 0; padding: 0; list-style: none; }
.notes li { margin: .25rem 0; }
@media (min-width: 48rem) {
  body { padding: 2rem; }
  th:first-child { min-width: 10rem; }
  th:nth-child(2), td.answer { min-width: 9rem; }
  .cards { grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
}
"""

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
    """Return the page as HTML; all text is escaped here.

    A row is its cells and whether to highlight its answer, the second cell.
    """
    return document(
        title,
        facts,
        f"""<section class="cards">
{"".join(map(card_html, cards))}</section>
{legend_html()}
{table_html(columns, rows)}
{notes_html(notes)}""",
    )


def document(title: str, facts: Sequence[str], body: str) -> str:
    """Return a complete page around `body`, which is HTML."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="facts">{escape(" · ".join(facts))}</p>
</header>
<main>
{body}
</main>
</body>
</html>
"""


def legend_html() -> str:
    """Return the legend of the token maps."""
    return f'<p class="legend">{"".join(_swatch(fill, name) for fill, name in LEGEND)}</p>'


def notes_html(notes: Sequence[str]) -> str:
    """Return the notes as a list."""
    return f"""<ul class="notes">
{"".join(f"<li>{escape(note)}</li>" for note in notes)}
</ul>"""


def data_uri(image: Image.Image) -> str:
    """Return the image as a data URI, in PNG: one-pixel frames do not survive JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def card_html(card: Card) -> str:
    """Return one card for a `<section class="cards">`."""
    images = "".join(
        f'<img src="{data_uri(image)}" width="{image.width}" height="{image.height}"'
        f' alt="visual tokens of image {number} under {escape(card.title)}">'
        for number, image in enumerate(card.images, 1)
    )
    return (
        f'<article class="card{" marked" * card.marked}">{images}<div><h2>{escape(card.title)}</h2>'
        f'<p class="answer">{escape(card.answer)}</p><p class="counts">{escape(card.counts)}</p></div></article>\n'
    )


def _breakable(name: str) -> str:
    """Return a method's name, escaped, that may break after each underscore."""
    return escape(name).replace("_", "_<wbr>")


def _swatch(fill: str, name: str) -> str:
    return f'<span><i class="swatch" style="background: {fill}"></i>{escape(name)}</span>'


def table_html(columns: Sequence[str], rows: Sequence[tuple[Sequence[str], bool]]) -> str:
    """Return a table that scrolls sideways if it must. A row is its cells and whether to highlight its answer."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr{" class=marked" * marked}><th scope="row">{_breakable(name)}</th><td class="answer">{escape(answer)}</td>'
        f"{''.join(f'<td>{escape(cell)}</td>' for cell in numbers)}</tr>\n"
        for (name, answer, *numbers), marked in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'
    )
