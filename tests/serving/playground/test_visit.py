"""A visit in headless Chromium, on the screens of a desktop and a phone."""

import pytest

from tests.serving.playground.running import serving_page

pytest.importorskip("gradio")
pytest.importorskip("playwright")
visits = pytest.importorskip("tests.serving.playground.visit")

pytestmark = [
    pytest.mark.slow,  # it starts a browser
    pytest.mark.skipif(visits.browser() is None, reason="there is no Chromium"),
]


@pytest.mark.parametrize("screen", ["desktop", "phone"])
def test_a_visit(mini, tmp_path, screen):
    with serving_page(mini) as (address, _):
        seen = visits.visit(address, screen, tmp_path)
    first, uploaded, too_small = seen["at first"], seen["uploaded"], seen["too small"]
    assert list(first) == ["uncompressed", "fastv", "visionzip"]
    assert all("\norange\n" in card for card in first.values())
    assert "144×2 → 48×6" in first["fastv"]
    assert seen["share"] == "16 of 144 visual tokens, 11.1%"
    assert list(uploaded) == ["uncompressed", "random_tokens", "visionzip", "pool2d"]
    assert "\nbottom left\n" in uploaded["uncompressed"]
    assert "144 → 16" in uploaded["visionzip"]
    assert "; give a budget of 37 or more, or count the tokens after the method has acted" in too_small["fastv"]
    assert too_small["dfmr"].startswith("dfmr\n\nignores the budget")
    assert "\n6\n" in seen["example"]["uncompressed"]
    assert seen["hosts"] == {address.removeprefix("http://")}
    assert seen["troubles"] == []
    assert not seen["too wide"]
    assert screen == "desktop" or seen["top of the first card"] == pytest.approx(0, abs=2)
    assert len(list(tmp_path.glob("*.png"))) == 4
