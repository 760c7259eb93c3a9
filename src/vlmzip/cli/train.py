"""`vlmzip train`: train a model with compression, in stages, as a YAML file describes."""

from __future__ import annotations

import atexit
import logging
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from vlmzip import own_files
from vlmzip.cli._shared.loading import load
from vlmzip.errors import UserError, closest, how_to_install, refusing
from vlmzip.files import refuse_place, refuse_source, write_whole
from vlmzip.lab.bench.presets import PRESETS, make_model
from vlmzip.lab.papers.llavolta import explain_beside_paper
from vlmzip.lab.score import TaskScore
from vlmzip.lab.table import print_json, print_table
from vlmzip.lab.tasks.catalogue import read_task
from vlmzip.models import family_of
from vlmzip.models.family import Family
from vlmzip.processes import leave_group
from vlmzip.runtime.answering import Answerer
from vlmzip.runtime.loading import source_of
from vlmzip.runtime.pretrained import load_config
from vlmzip.training.config import Config, read_config
from vlmzip.training.explain import COLUMNS, Cost, as_json, draw_staircase, lines, profile_of
from vlmzip.training.records import Records

log = logging.getLogger(__name__)


def run(args: Namespace) -> None:
    if args.explain:
        with own_files.left_alone():
            config = read_config(args.config, args.set)
            with _naming_the_head(args.config, config):
                _explain(config, args)
        return
    config = read_config(args.config, args.set)
    for name in ("shape", "staircase", "json"):
        if getattr(args, name):
            raise UserError(f"--{name} goes with --explain")
    with _naming_the_head(args.config, config):
        _train(config)


@contextmanager
def _naming_the_head(path: Path, config: Config) -> Iterator[None]:
    """Add a hint to an error about a missing file: the configuration's first lines say how to get it.

    Leave the error as it is if the configuration does not begin with a comment.
    """
    try:
        yield
    except UserError as error:
        files = [name for name in (config.model, config.records, config.images) if name and not Path(name).exists()]
        if not any(repr(name) in str(error) for name in files) or not path.read_text(encoding="utf-8").startswith("#"):
            raise
        raise UserError(f"{error}; the first lines of {path} say how to get it") from None


def _train(config: Config) -> None:
    if find_spec("accelerate") is None:
        raise UserError(f"training needs accelerate: {how_to_install('train')}")
    from vlmzip.training.run import train, try_out  # needs accelerate, an extra

    refuse_place(Path(config.out), "out:")
    try_out(config)
    evaluation = config.evaluation
    task = None if evaluation is None else read_task(evaluation.task, evaluation.limit, None)
    loaded = load(config.model, "cpu", config.weights)  # the Trainer moves it to its device
    _set_attention(loaded.model, config.attention)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is untrained")  # here it is trained
        score = None if task is None else TaskScore(Answerer(loaded.family, loaded.processor), task)
        atexit.register(leave_group)  # not before: a later run in this process uses the same group
        folder = train(config, loaded.model, loaded.processor, loaded.family, score)
    log.info(f"the trained model is in {folder}")


def _set_attention(model: PreTrainedModel, name: str) -> None:
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise UserError(f"attention: {name} cannot be used, use sdpa or eager: {cause[:200]}") from None


def _explain(config: Config, args: Namespace) -> None:
    if args.staircase:
        _check_image(args.staircase)
    _note_what_is_missing(config)
    family, steps = _on_paper(config, args.shape), _steps(config)
    shape = PRESETS[args.shape] if args.shape else None
    views = config.frames or (shape.images if shape else 1)
    profile = profile_of(family, views if views > 1 else None)
    if shape is not None:
        profile = replace(profile, grid=shape.grid, tiles=(shape.grid,) * len(profile.tiles))
    schedule = config.schedule_for(profile.layers)
    cost = explain_beside_paper(schedule, family, steps, config.text_tokens, profile)
    _note_unreached(cost, steps)
    if args.json:
        print_json(as_json(cost))
    else:
        print_table(list(COLUMNS), lines(cost))
        print(
            f"\nCR: compression ratio; LLM FLOPs: with {config.text_tokens} tokens of text, as a share of those without"
        )
        print("compression; paper: as LLaVolta prints it, whose totals do not all follow from its stages")
    if args.staircase:
        _draw(cost, f"{args.shape or config.model}: {schedule.name}", args.staircase)


def _note_what_is_missing(config: Config) -> None:
    """Log a warning if this machine cannot do the run. Costs can be computed on any machine."""
    if not config.trainer:
        return
    try:
        from vlmzip.training.run import try_out  # needs accelerate, which counting does not

        try_out(config)
    except (UserError, ImportError) as error:
        log.warning(f"on this machine the run would be refused: {error}")


def _on_paper(config: Config, preset: str | None) -> Family:
    """Return the family of the model or of a preset, without its weights.

    Costs depend only on shapes.
    """
    if preset is not None:
        if preset not in PRESETS:
            raise UserError(f"--shape: unknown preset {preset!r}{closest(preset, PRESETS)}")
        return family_of(make_model(PRESETS[preset].config(), "meta", torch.bfloat16))
    try:
        shape = load_config(source_of(config.model))
        with refusing(f"cannot read the shape of {config.model!r}"), torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(shape, trust_remote_code=False)
        return family_of(model)
    except UserError as error:
        cause = str(error).replace("--model takes", "it takes")
        raise UserError(f"model: {cause}; for costs alone: --shape llava-1.5-7b") from None


def _steps(config: Config) -> int:
    """Return the number of optimiser steps of a run. Read the records only if the file does not give the number."""
    if config.steps is not None:
        return config.steps
    try:
        records = Records(Path(config.records))
    except UserError as error:
        raise UserError(f"records: {error}; for costs alone: --set steps=1000") from None
    return config.steps_for(len(records))


def _note_unreached(cost: Cost, steps: int) -> None:
    unreached = [str(number) for number, stage in enumerate(cost.stages, 1) if not stage.steps]
    if unreached:
        log.warning(f"too few steps, {steps:,}, to reach stage {', '.join(unreached)}")


def _check_image(path: Path) -> None:
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"--staircase {str(path)!r}: give a name that ends in .png or .svg")
    refuse_source(path, [])


def _draw(cost: Cost, title: str, path: Path) -> None:
    figure = draw_staircase(cost, title)
    write_whole(path, lambda name: figure.savefig(name))
    log.warning(f"the staircase is in {path}")
