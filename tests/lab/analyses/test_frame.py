"""What every analysis has, so that `vlmzip study` can run it."""

import inspect
from pathlib import Path

import pytest

from vlmzip.errors import UserError
from vlmzip.lab import analyses
from vlmzip.lab.analyses import NAMES, about, find


def test_the_names_are_the_files_of_the_folder():
    files = {path.stem for path in Path(analyses.__file__).parent.glob("*.py")} - {"__init__", "subject"}
    assert list(NAMES) == sorted(files)


@pytest.mark.parametrize("name", NAMES)
def test_each_has_its_functions_and_a_line_about_it(name):
    parameters = {"measure": ["subject"], "draw": ["rows", "title"], "findings": ["rows"]}
    for function, wanted in parameters.items():
        assert list(inspect.signature(getattr(find(name), function)).parameters) == wanted
    assert about(name).endswith(".")
    assert 20 < len(about(name)) < 121
    assert 20 < len(find(name).TITLE) < 90


def test_an_unknown_name_gets_the_closest():
    with pytest.raises(UserError, match="unknown analysis 'encoder_attenton'; did you mean 'encoder_attention'"):
        find("encoder_attenton")
