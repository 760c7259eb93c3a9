"""The steps of long work and the time left: counted by the library, shown by commands."""

from contextlib import contextmanager

import pytest

from vlmzip.progress import Work, in_words, showing, working


def test_the_time_left_is_the_mean_of_the_steps_so_far():
    now = 0.0
    work = Work("asking", 4, clock=lambda: now)
    assert work.left == ""
    now = 10.0
    work.advance()
    assert work.left == "about 30 s left"
    now = 1000.0
    work.advance()
    assert work.left == "about 16.5 min left"  # two steps of 500 s
    now = 1300.0
    assert work.left == "about 11.5 min left"  # time goes by within a step
    now = 9000.0
    assert work.left == "about 5 s left"
    work.advance(2)
    assert work.left == ""


def test_steps_that_are_left_out_take_no_time():
    now = 0.0
    work = Work("asking", 10, clock=lambda: now)
    work.leave_out(6)
    now = 20.0
    work.advance(2)
    assert (work.steps, work.left) == (4, "about 20 s left")


def test_work_is_shown_only_within_showing():
    seen = []

    @contextmanager
    def show(work):
        yield lambda: seen.append((work.what, work.done, work.steps))

    with working("before", 2) as work:
        work.advance()
    with showing(show):
        with working("measuring", 3) as work:
            work.advance(2)
            work.begin("drawing")
        with working("nothing", 0):
            pass
    assert seen == [("measuring", 2, 3), ("drawing", 2, 3)]


@pytest.mark.parametrize(("seconds", "text"), [(0, "5 s"), (62, "60 s"), (100, "1.5 min"), (5400, "1.5 h")])
def test_durations_in_words(seconds, text):
    assert in_words(seconds) == text
