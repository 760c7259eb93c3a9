"""Visit the playground in headless Chromium, and take screenshots.

    python -m tests.serving.playground.visit FOLDER

It needs playwright and a Chromium; see docs/serve.md.
"""

import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

from tests.serving.playground.running import serving_page
from tests.serving.server.running import EXAMPLES
from vlmzip.runtime.loading import load

#: Widths and heights.
SCREENS = {"desktop": (1280, 900), "phone": (390, 844), "figure": (1280, 830)}


def browser():
    """Return the path of an installed Chromium; `None` if there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def visiting(address, screen, **settings):
    """Yield the open page, with the requests that it sent and the errors of its console."""
    width, height = SCREENS[screen]
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": width, "height": height}, **settings)
        page.requests, page.troubles = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("pageerror", lambda error: page.troubles.append(str(error)))
        page.on("console", lambda line: line.type == "error" and page.troubles.append(line.text))
        page.goto(f"{address}/playground/")
        expect(page.locator("#drop .drop")).to_be_visible(timeout=30_000)
        yield page
        chromium.close()


def choose(page, *names):
    """Choose exactly these methods. Closed groups are opened."""
    closed = page.locator("button.label-wrap:not(.open)")
    while closed.count():
        closed.first.click()
    for field in page.locator(".vz-methods input").all():
        field.set_checked(field.get_attribute("name") in names)


def answered(page):
    """Return the texts of the cards by title, once all have an answer or an error."""
    expect(page.locator(".vz-pending")).to_have_count(0, timeout=60_000)
    cards = page.locator(".vz-card")
    titles, texts = cards.locator("h3").all_inner_texts(), cards.all_inner_texts()
    return dict(zip(titles, texts, strict=True))


def ask(page, question=None, keep=None):
    """Send the form, and return the texts of the cards."""
    if question is not None:
        page.get_by_role("textbox", name="Question").fill(question)
    if keep is not None:
        page.get_by_label("number input for Budget in visual tokens").fill(str(keep))
        page.get_by_label("number input for Budget in visual tokens").press("Tab")
        expect(page.locator("#share")).to_contain_text(f"{keep} of ")
    page.locator("#results").evaluate("element => element.querySelectorAll('.vz').forEach((old) => old.remove())")
    page.get_by_role("button", name="Answer").click()
    expect(page.locator(".vz-card").first).to_be_visible(timeout=30_000)
    return answered(page)


def is_too_wide(page):
    """Return whether the page scrolls sideways, or a text is wider than its card."""
    return page.evaluate(
        "() => document.documentElement.scrollWidth > innerWidth"
        " || [...document.querySelectorAll('.vz-card *')].some((part) => part.scrollWidth > part.clientWidth + 1"
        " && getComputedStyle(part).display !== 'inline')"
    )


def visit(address, screen, folder):
    """Ask with an example, an uploaded image, other budgets and methods; return what was seen."""
    seen = {}
    with visiting(address, screen) as page:
        page.locator(".examples button").first.click()
        expect(page.locator(".vz-answer")).to_have_count(3, timeout=60_000)
        page.wait_for_timeout(500)  # scrolling is smooth
        seen["top of the first card"] = page.locator(".vz-card").first.evaluate(
            "card => card.getBoundingClientRect().top"
        )
        page.screenshot(path=folder / f"{screen}-example.png")
        seen["at first"] = ask(page)
        page.screenshot(path=folder / f"{screen}-first.png", full_page=True)
        page.locator("#drop input[type=file]").set_input_files(EXAMPLES / "cluttered.png")
        choose(page, "visionzip", "pool2d", "random_tokens")
        seen["uploaded"] = ask(page, "where is the red star ?", 16)
        seen["share"] = page.locator("#share").inner_text()
        page.screenshot(path=folder / f"{screen}-uploaded.png", full_page=True)
        choose(page, "fastv", "pool2d", "dfmr", "vcc")
        page.get_by_label("on average over the LLM's layers").check()
        seen["too small"] = ask(page, keep=9)
        page.screenshot(path=folder / f"{screen}-too-small.png", full_page=True)
        page.locator(".examples button").nth(1).click()
        expect(page.get_by_role("textbox", name="Question")).to_have_value(re.compile("what number"))
        expect(page.locator(".vz-answer").first).to_contain_text("6", timeout=30_000)
        seen["example"] = answered(page)
        seen["hosts"] = {url.split("/")[2] for url in page.requests if url.startswith("http")}
        seen["troubles"] = [text for text in page.troubles if "favicon" not in text and "404" not in text]
        seen["too wide"] = is_too_wide(page)
    return seen


def draw_figure(address, path):
    """Take the screenshot of docs/serve.md."""
    with visiting(address, "figure") as page:
        page.locator("#drop input[type=file]").set_input_files(EXAMPLES / "cluttered.png")
        ask(page, "where is the red star ?")
        page.mouse.move(0, 0)
        page.screenshot(path=path)


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    with serving_page(load("mini")) as (address, _):
        for screen in ("desktop", "phone"):
            print(screen, visit(address, screen, folder))
        draw_figure(address, folder / "playground.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
