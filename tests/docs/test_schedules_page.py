"""docs/schedules.md is what its command writes."""


def test_the_page_is_what_the_command_writes(maker):
    schedules = maker("schedules")
    assert schedules.page() == schedules.PAGE.read_text(encoding="utf-8")
