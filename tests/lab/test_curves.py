"""The titles of plots name the model and the task in words."""

import pytest

from tests.lab.test_tasks import question, write
from vlmzip.lab.curves import plot_title
from vlmzip.lab.tasks.catalogue import read_one_task


@pytest.mark.parametrize(
    ("model", "name"),
    [("mini", "mini"), ("llava-hf/llava-1.5-7b-hf", "llava-1.5-7b-hf"), ("/home/me/models/tuned/", "tuned")],
)
def test_a_title_says_what_is_shown_for_which_model_on_which_questions(model, name):
    task = read_one_task("mini", 30, None)
    assert plot_title("Score against cost", model, task) == (
        f"Score against cost\n{name} on 30 questions of mini's test split"
    )


def test_questions_in_a_folder_are_named_after_it(tmp_path):
    place = write(tmp_path / "my questions", question("a.png"), question("b.png"))
    title = plot_title("Score", "mini", read_one_task(f"{place}:exact", None, None))
    assert title == "Score\nmini on 2 questions of my questions"
