import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmzip import VisionZip, spec
from vlmzip.errors import UserError
from vlmzip.keep import count_to_keep, parse_keep, round_half_up, shared_out
from vlmzip.methods import SparseVLM


@pytest.mark.parametrize(
    ("keep", "count"),
    [
        (64, 64),
        ("64", 64),
        (0.25, 144),
        ("25%", 144),
        ("0.25", 144),
        ("11%", 63),
        (1 / 9, 64),
        (1, 1),
        (1.0, 576),
        ("100%", 576),
        (1000, 576),
        (1e-9, 1),
        (np.int64(5), 5),
        (np.float32(0.5), 288),
    ],
)
def test_counts_of_576(keep, count):
    assert count_to_keep(keep, 576) == count


@pytest.mark.parametrize(
    "keep",
    [
        0,
        -3,
        "0",
        "-1",
        0.0,
        -0.5,
        1.5,
        "150%",
        "0%",
        "abc",
        "",
        "%",
        math.nan,
        "nan",
        math.inf,
        "inf",
        True,
        None,
        [3],
        "1e400",
    ],
)
def test_nonsense_is_refused_in_one_line(keep):
    with pytest.raises(UserError) as error:
        parse_keep(keep)
    message = str(error.value)
    assert message.startswith("keep")
    assert repr(keep) in message
    assert "\n" not in str(error.value)


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 5000))
def test_a_fraction_is_off_by_half_a_token_at_most(fraction, available):
    count = count_to_keep(fraction, available)
    assert 1 <= count <= available
    assert abs(count - fraction * available) <= 0.5 or count == 1


def test_halves_round_up():
    assert [round_half_up(x) for x in (0.5, 1.5, 2.5, 2.4)] == [1, 2, 3, 2]


@pytest.mark.parametrize(
    ("count", "sizes", "shares"),
    [
        (64, [576] * 5, [13, 13, 13, 13, 12]),
        (320, [576] * 5, [64] * 5),
        (10, [576, 288, 288], [5, 3, 2]),
        (3, [576, 1, 1], [1, 1, 1]),
        (9, [1, 1, 16], [1, 1, 7]),
        (100, [4, 2], [4, 2]),
        (5, [4, 2], [3, 2]),
        (7, [7], [7]),
    ],
)
def test_a_count_is_shared_out_over_views(count, sizes, shares):
    assert shared_out(count, sizes) == shares


def test_every_share_is_possible_and_they_add_up():
    for count in range(3, 30):
        shares = shared_out(count, [3, 17, 6])
        assert sum(shares) == min(count, 26)
        assert all(1 <= share <= size for share, size in zip(shares, [3, 17, 6], strict=True))


@pytest.mark.parametrize("one", [1.0, np.float64(1.0), "1.0"])
def test_all_tokens_and_one_token_are_different_compressors(one):
    """In Python and JSON, 1.0 equals 1, so caches and records would take one for the other."""
    for make in (lambda keep: VisionZip(keep=keep), lambda keep: VisionZip(keep_per_view=keep), VisionZip().with_keep):
        every, single = make(one), make(1)
        assert every != single
        assert json.loads(json.dumps(every.to_dict())) != json.loads(json.dumps(single.to_dict()))
        assert (every.count(144), single.count(144)) == (144, 1)
        assert spec.read(spec.write(every)) == every
    assert SparseVLM(counts=(one, 0.5, 1)) != SparseVLM(counts=(1, 0.5, 1))
