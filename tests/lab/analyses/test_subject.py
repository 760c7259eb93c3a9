"""What analyses ask: what has no place in the model does not suit it, what breaks is an error."""

import pytest

from tests.lab.analyses.numbered import numbered_subject
from tests.lab.test_study import BreaksLater
from vlmzip import FastV
from vlmzip.errors import UserError
from vlmzip.lab.analyses.subject import Unsuited
from vlmzip.spec import Candidate


def test_what_has_no_place_in_the_model_does_not_suit_it(tmp_path):
    with pytest.raises(Unsuited, match="fastv"):
        numbered_subject(tmp_path).ask([FastV(layer=40, keep="25%")])


def test_what_breaks_is_another_error(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmzip.spec.candidates", lambda _: [Candidate("it", BreaksLater(), True)])
    with pytest.raises(UserError, match="it: failed with RuntimeError: boom") as caught:
        numbered_subject(tmp_path).ask([BreaksLater()])
    assert not isinstance(caught.value, Unsuited)
