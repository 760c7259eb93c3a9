"""The cost of a training schedule, with the numbers that LLaVolta prints for its schemes."""

from __future__ import annotations

from dataclasses import replace

from vlmzip.compressor import Profile
from vlmzip.lab.papers import Published, published
from vlmzip.models.family import Family
from vlmzip.training.explain import Cost, explain
from vlmzip.training.schedule import PUBLISHED_DEPTH, SCHEMES, Schedule

#: Names of LLaVolta's schemes in its tables.
IN_THE_PAPER = {
    "two-stage": "two",
    "three-stage-deeper": "deeper",
    "three-stage-wider": "wider",
    "four-stage-wider-then-deeper": "wider then deeper",
    "four-stage-deeper-then-wider": "deeper then wider",
    "last-stage-compression": "last stage",
}
#: Visual tokens per image in LLaVA-1.5, the model of the paper's numbers.
PUBLISHED_TOKENS = 576


def explain_beside_paper(schedule: Schedule, family: Family, steps: int, text_tokens: int) -> Cost:
    """Return `explain`'s cost, with the paper's numbers if it has any for the same scheme and model."""
    cost, profile = explain(schedule, family, steps, text_tokens), family.profile()
    stages = tuple(
        replace(stage, printed=_printed_of_stage(schedule, number, profile)) for number, stage in enumerate(cost.stages)
    )
    whole = all(stage.steps for stage in stages)
    return replace(cost, stages=stages, printed=_printed_in_all(schedule, profile) if whole else ())


def _printed_of_stage(schedule: Schedule, number: int, profile: Profile) -> tuple[str, ...]:
    rows = [row for row in _paper_rows(schedule, profile, "Table 1") if row.settings.get("stage") == str(number + 1)]
    return tuple(f"CR {row.value:g} %" for row in rows)


def _printed_in_all(schedule: Schedule, profile: Profile) -> tuple[str, ...]:
    """Return the paper's totals. They only apply to stages of equal length."""
    if len({stage.share for stage in schedule.stages}) > 1:
        return ()
    rows = _paper_rows(schedule, profile, "Table 2")
    names = {"tokens over all layers": "{:g} tokens", "compression ratio": "CR {:g} %", "training time": "{:g} h"}
    return tuple(form.format(row.value) for name, form in names.items() for row in rows if row.metric == name)


def _paper_rows(schedule: Schedule, profile: Profile, table: str) -> list[Published]:
    """Return the paper's rows for this scheme. There are none for a model of another size or a left-out stage."""
    if (profile.layers, profile.size) != (PUBLISHED_DEPTH, PUBLISHED_TOKENS):
        return []
    if schedule.name not in IN_THE_PAPER or len(schedule.stages) != len(SCHEMES[schedule.name]):
        return []
    name = IN_THE_PAPER[schedule.name]
    return [row for row in published("llavolta") if row.table == table and row.settings.get("scheme") == name]
