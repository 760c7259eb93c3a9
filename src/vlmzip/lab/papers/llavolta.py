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
#: The LLM's layers and the visual tokens per image or video of the models in the paper's tables.
MODELS = {
    (PUBLISHED_DEPTH, 576): "LLaVA-1.5-7B",
    (40, 576): "LLaVA-1.5-13B",
    (PUBLISHED_DEPTH, 8 * 256): "Video-LLaVA",
    (18, 576): "MGM-2B",
}
#: The tables of models whose scheme the paper does not name. Table 6 says only that it has four stages.
UNNAMED = {"LLaVA-1.5-13B": "Table 6", "MGM-2B": "Table 10"}
FOUR_STAGES = ("four-stage-wider-then-deeper", "four-stage-deeper-then-wider")
FORMS = {"tokens over all layers": "{:g} tokens", "compression ratio": "CR {:g} %", "training time": "{:g} h"}


def explain_beside_paper(
    schedule: Schedule, family: Family, steps: int, text_tokens: int, profile: Profile | None = None
) -> Cost:
    """Return `explain`'s cost, with the paper's numbers if it has any for the same scheme and model."""
    profile = profile or family.profile()
    cost = explain(schedule, family, steps, text_tokens, profile)
    model = MODELS.get((profile.layers, profile.size))
    stages = tuple(
        replace(stage, printed=_printed_of_stage(schedule, number, model)) for number, stage in enumerate(cost.stages)
    )
    whole = all(stage.steps for stage in stages)
    return replace(cost, stages=stages, printed=_printed_in_all(schedule, model) if whole else ())


def _printed_of_stage(schedule: Schedule, number: int, model: str | None) -> tuple[str, ...]:
    """Return what Table 1 prints for a stage of a scheme on LLaVA-1.5-7B."""
    if model != "LLaVA-1.5-7B" or not _is_whole_scheme(schedule):
        return ()
    settings = {"scheme": IN_THE_PAPER[schedule.name], "stage": str(number + 1)}
    rows = [row for row in published("llavolta") if row.table == "Table 1" and settings.items() <= row.settings.items()]
    return tuple(f"CR {row.value:g} %" for row in rows)


def _printed_in_all(schedule: Schedule, model: str | None) -> tuple[str, ...]:
    """Return what the paper prints for a whole training: Tables 2, 6, 8 and 10. It had stages of equal length."""
    if model is None or len({stage.share for stage in schedule.stages}) > 1:
        return ()
    rows = [row for row in published("llavolta") if row.model == model and _is_about(row, schedule, model)]
    return tuple(form.format(row.value) for name, form in FORMS.items() for row in rows if row.metric == name)


def _is_about(row: Published, schedule: Schedule, model: str) -> bool:
    """Return whether a row of Table 2, 6, 8 or 10 is about a training with this schedule."""
    if row.table != {"LLaVA-1.5-7B": "Table 2", "Video-LLaVA": "Table 8", **UNNAMED}[model]:
        return False
    if schedule.name == "none":
        return not row.compressed
    if not row.compressed or not _is_whole_scheme(schedule):
        return False
    if model in UNNAMED:
        return schedule.name in FOUR_STAGES
    return row.settings.get("scheme") == IN_THE_PAPER[schedule.name]


def _is_whole_scheme(schedule: Schedule) -> bool:
    """Return whether a schedule is a scheme of the paper, with all its stages."""
    return schedule.name in IN_THE_PAPER and len(schedule.stages) == len(SCHEMES[schedule.name])
