"""The rule that chooses the images of the first figure."""

from types import SimpleNamespace


def question(level, type_):
    return SimpleNamespace(level=level, type=type_)


def test_the_first_question_of_each_level_is_shown(maker):
    figures = maker("figures")
    first, second = question("cluttered", "exist"), question("cluttered", "read")
    flat, patterned, read = question("flat", "read"), question("patterned", "exist"), question("patterned", "read")
    questions = [first, flat, second, patterned, read, question("flat", "exist")]
    assert figures.first_of_each_level(questions, lambda _: True) == [flat, patterned, first]
    assert figures.first_of_each_level(questions, lambda q: q.type == "read") == [flat, read, second]
