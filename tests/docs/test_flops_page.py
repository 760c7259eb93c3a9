"""docs/flops.md is what its command writes."""

import pytest

pytestmark = pytest.mark.slow  # computes the whole page


@pytest.fixture
def flops(maker):
    return maker("flops")


@pytest.mark.slow
def test_the_page_is_what_the_command_writes(flops):
    assert flops.PAGE.read_text(encoding="utf-8") == flops.page()


def test_the_limits_are_ratios_of_the_same_scope(flops):
    (plain, plain_ttft), (compressed, compressed_ttft) = flops.scopes("llava-1.5-7b")
    # Encoder alike, projector on 576 or 64 tokens: two matrices, 1024 to 4096 to 4096.
    assert (plain_ttft - plain) - (compressed_ttft - compressed) == 2 * 512 * (1024 * 4096 + 4096 * 4096)
    assert plain_ttft / compressed_ttft < plain / compressed
