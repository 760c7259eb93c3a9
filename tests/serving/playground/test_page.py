"""The page with Gradio, without a browser."""

import re
import threading
from pathlib import Path

import httpx
import pytest

from tests.serving.playground.running import serving_page, submit
from tests.serving.server.running import asking
from vlmzip.serving.server.settings import Settings

pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def served(mini):
    with serving_page(mini) as served:
        yield served


@pytest.fixture(scope="module")
def address(served):
    return served[0]


def test_the_form_answers_with_numbers_and_drawings(address, image):
    html = submit(address, image, ["visionzip", "fastv"])
    assert html.count("<article") == 3
    assert html.count("data:image/png;base64,") == 3
    for text in ("orange", "144 → 48", "144×2 → 16×6", "16 kept, 128 dropped", "prefill FLOPs", "visionzip(keep=48)"):
        assert text in html


def test_an_error_is_a_line_on_a_card(address, image):
    assert "2 of 8 layers see all tokens before fastv acts" in submit(address, image, ["fastv"], keep=20)
    assert "image 1 is not PNG, JPEG, WEBP, GIF or BMP" in submit(address, "data:image/png;base64,AAAA", ["fastv"])


def test_visitors_at_once_get_their_own_answers(address, image):
    questions = {"what color is the ring ?": "orange", "what item is there ?": "boot"}
    pages = {}

    def visit(question):
        pages[question] = submit(address, image, ["pool2d"], question, session=question[:10])

    threads = [threading.Thread(target=visit, args=[question]) for question in questions]
    for thread in threads:
        thread.start()
    answer = httpx.post(f"{address}/v1/chat/completions", json=asking(), timeout=60)
    for thread in threads:
        thread.join()
    assert answer.json()["choices"][0]["message"]["content"] == "orange"
    for question, expected in questions.items():
        assert f'<p class="vz-answer">{expected}' in pages[question]


def test_the_first_page_leads_to_the_playground(address):
    answer = httpx.get(address, follow_redirects=True)
    assert answer.url.path == "/playground/"
    assert "vlmzip playground" in answer.text


def test_the_page_names_no_other_host(address):
    page = httpx.get(f"{address}/playground/").text
    style = httpx.get(f"{address}/playground/theme.css").text
    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?(https?:)?//", page)
    assert loaded == []
    assert not re.search(r"url\([\"']?(https?:)?//", style)
    assert '"analytics_enabled":false' in page.replace(" ", "")


def test_files_of_the_server_cannot_be_read(address):
    assert httpx.get(f"{address}/playground/gradio_api/file=/etc/hostname").status_code == 404


def test_nothing_is_written_that_stays(served, image):
    address, app = served
    submit(address, image, ["visionzip"])
    folder = Path(app.state.playground_folder.name)
    assert [path for path in folder.rglob("*") if path.is_file()] == []


def test_the_page_asks_for_the_key_and_leaves_no_folder(mini):
    with serving_page(mini, Settings(api_key="secret")) as (address, app):
        folder = Path(app.state.playground_folder.name)
        assert folder.exists()
        assert httpx.get(f"{address}/playground/").headers["www-authenticate"].startswith("Basic")
        assert "vlmzip playground" in httpx.get(f"{address}/playground/", auth=("me", "secret")).text
    assert not folder.exists()


def test_a_number_above_the_slider_is_refused_in_words(address, image):
    assert "the budget is 9,999 visual tokens; give 1 to 144" in submit(address, image, ["visionzip"], keep=9999)
