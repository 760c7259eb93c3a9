"""The form and its events, in Gradio's blocks. Files stay in the browser and come as data URLs: Gradio stores none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.routing import Mount

from vlmzip.errors import UserError
from vlmzip.serving.playground.cards import Card, Results
from vlmzip.serving.playground.choices import AVERAGE, REMAINING
from vlmzip.serving.playground.examples import Example
from vlmzip.serving.playground.guard import PageGuard
from vlmzip.serving.playground.play import SHARE, Budget, Playground
from vlmzip.serving.playground.question import LONGEST
from vlmzip.serving.server.errors import RequestError
from vlmzip.serving.server.guard import PLAYGROUND
from vlmzip.serving.server.settings import Settings
from vlmzip.visualize.page import data_uri, render_page

#: Visitors whose form Gradio remembers, a tenth of a megabyte each.
MOST_SESSIONS = 500
#: The share of the budget, computed in the browser.
SHOW_SHARE = "(keep, total) => `${keep} of ${total} visual tokens, ${(100 * keep / total).toFixed(1)}%`"

#: On a narrow screen the results are below the form. The first card that is not of the results before goes to the top.
SHOW_RESULTS = """() => {
  if (innerWidth >= 768) return;
  document.querySelectorAll('.vz-card').forEach((card) => { card.dataset.old = ''; });
  const show = (tries) => {
    const card = document.querySelector('.vz-card:not([data-old])');
    if (card) card.scrollIntoView({behavior: 'smooth', block: 'start'});
    else if (tries) setTimeout(show, 50, tries - 1);
  };
  show(400);
}"""


def asset(name: str) -> str:
    """Return the text of a file beside this module."""
    return files("vlmzip.serving.playground").joinpath("assets", name).read_text(encoding="utf-8")


def theme() -> gr.themes.Base:
    """Return the theme. It uses the fonts of the visitor's system, which are not downloaded."""
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def put_on(app: FastAPI, playground: Playground, settings: Settings, examples: Sequence[Example]) -> None:
    """Put the page on a server. Gradio reports nothing about it and loads nothing from other hosts."""
    gr.mount_gradio_app(
        app, build(playground, settings, examples), PLAYGROUND, footer_links=[], run_history=False, show_error=False,
        ssr_mode=False, mcp_server=False, enable_monitoring=False, pwa=False, theme=theme(), css=asset("page.css"),
        max_file_size=1, app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
    )  # fmt: skip
    (page,) = (route.app for route in app.routes if isinstance(route, Mount) and route.path == PLAYGROUND)
    assert isinstance(page, FastAPI)
    page.add_middleware(PageGuard, bodies=app.state.service.bodies)  # one limit for all bodies of the server


def build(playground: Playground, settings: Settings, examples: Sequence[Example]) -> gr.Blocks:
    """Return the page."""
    total = playground.usual_tokens
    with gr.Blocks(title="vlmzip playground", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(_title(playground), elem_id="title")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                drop = _drop(playground, settings, examples)
                question = gr.Textbox(
                    examples[0].question if examples else "", label="Question", max_length=LONGEST, lines=1
                )
                ask = gr.Button("Answer", variant="primary")
                with gr.Group():
                    keep = gr.Slider(1, total, round(SHARE * total), step=1, label="Budget in visual tokens")
                    # Gradio would answer numbers outside with a message of its own; the playground says what is wrong.
                    keep.preprocess = lambda tokens: tokens
                    share = gr.HTML(_share(round(SHARE * total), total), elem_id="share", padding=True)
                    counts = gr.Radio([REMAINING, AVERAGE], value=REMAINING, label="The budget counts the tokens")
                known = gr.Number(total, visible=False)
                methods = _methods(playground)
            with gr.Column(scale=5, min_width=320):
                results = gr.HTML(elem_id="results")
        _connect(playground, examples, drop, question, ask, keep, share, counts, known, methods, results)
    blocks.state_session_capacity = MOST_SESSIONS
    blocks.queue(max_size=_places(settings), default_concurrency_limit=1)
    return blocks


def _connect(
    playground: Playground,
    examples: Sequence[Example],
    drop: Any,
    question: gr.Textbox,
    ask: gr.Button,
    keep: gr.Slider,
    share: gr.HTML,
    counts: gr.Radio,
    known: gr.Number,
    methods: Sequence[gr.CheckboxGroup],
    results: gr.HTML,
) -> None:
    def run(url: str, text: str, tokens: float, counted: str, *chosen: list[str]) -> Iterator[str]:
        names = [name for group in chosen for name in group]
        budget = Budget(max(1, int(tokens)), counted == REMAINING)
        for so_far in playground.run(url or "", text or "", budget, names):
            yield so_far.html()

    def count(url: str, tokens: float, before: float) -> tuple[Any, float, str]:
        try:
            total = playground.count(url or "")
        except (UserError, RequestError) as error:
            return gr.skip(), gr.skip(), Results([Card("this cannot be asked about", error=str(error))]).html()
        return gr.Slider(maximum=total, value=max(1, round(total * tokens / before))), total, ""

    def example(event: gr.EventData) -> str:
        return examples[int(event.index) % len(examples)].question

    hidden = dict(api_visibility="private", show_progress="hidden")
    counting = dict(fn=count, inputs=[drop, keep, known], outputs=[keep, known, results], **hidden)
    running = dict(
        fn=run, inputs=[drop, question, keep, counts, *methods], outputs=results, api_visibility="private",
        show_progress="minimal", concurrency_id="model",
    )  # fmt: skip
    show_share = dict(fn=None, inputs=[keep, known], outputs=share, js=SHOW_SHARE, **hidden)
    drop.change(**counting).then(**show_share)
    drop.select(fn=example, outputs=question, **hidden).then(**counting).then(**show_share).then(**running)
    keep.change(**show_share)
    ask.click(**running)
    question.submit(**running)
    for start in (ask.click, drop.select):
        start(fn=None, js=SHOW_RESULTS, **hidden)


def _title(playground: Playground) -> str:
    loaded = playground.engine.loaded
    profile = loaded.family.profile()
    facts = [
        f"{playground.engine.model}: {playground.usual_tokens:,} visual tokens for a typical image",
        f"{profile.layers} LLM layers",
        str(loaded.model.device),
    ]
    return render_page(
        "title.html.j2", "vlmzip playground", facts, "vlmzip.serving.playground", clips=playground.reader.about_clips
    )


def _share(keep: int, total: int) -> str:
    return f"{keep} of {total} visual tokens, {keep / total:.1%}"


def _drop(playground: Playground, settings: Settings, examples: Sequence[Example]) -> gr.HTML:
    """Return the field for an image or a clip, with the examples below it."""
    pairs = [{"url": data_uri(example.image), "question": example.question} for example in examples]
    clips = playground.reader.takes_clips
    return gr.HTML(
        pairs[0]["url"] if pairs else None,
        html_template=asset("drop.html"),
        css_template=asset("drop.css"),
        js_on_load=asset("drop.js"),
        elem_id="drop",
        examples=pairs,
        accept="image/*,video/*" if clips else "image/*",
        what="image or a clip" if clips else "image",
        most_bytes=settings.max_body * 3 // 4 - 10_000,  # base64 writes 3 bytes as 4 characters
    )


def _methods(playground: Playground) -> list[gr.CheckboxGroup]:
    fields = []
    for group in playground.groups:
        # Those that are chosen at first come first, so that they are seen without scrolling.
        choices = sorted(group.choices, key=lambda choice: choice.name not in playground.chosen)
        chosen = [choice.name for choice in choices if choice.name in playground.chosen]
        with gr.Accordion(f"{group.heading} ({len(choices)})", open=bool(chosen)):
            labelled = [(choice.label, choice.name) for choice in choices]
            fields.append(
                gr.CheckboxGroup(labelled, value=chosen, show_label=False, container=False, elem_classes="vz-methods")
            )
    return fields


def _places(settings: Settings) -> int:
    """Return how many visitors can wait; each of them may hold a whole request in memory."""
    return max(1, min(settings.max_queue, settings.max_held // settings.max_body))
