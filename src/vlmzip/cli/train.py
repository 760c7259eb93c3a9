"""`vlmzip train`: trains a model with compression, in stages, from a YAML file."""

from __future__ import annotations

import json
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmzip import own_files
from vlmzip.errors import UserError, closest
from vlmzip.files import refuse_place

if TYPE_CHECKING:
    from vlmzip.training.config import Config
    from vlmzip.training.explain import Cost

EXAMPLES = """  vlmzip train configs/llava-1.5-7b-llavolta.yaml --explain --shape llava-1.5-7b --set steps=5196
  vlmzip train configs/mini.yaml --set steps=200 --set schedule=two-stage
  torchrun --nproc-per-node 8 -m vlmzip.cli.main train configs/llava-1.5-7b-llavolta.yaml

Run the same command again to go on from the last checkpoint."""


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="what the run is; see configs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="instead of what the file says")
    parser.add_argument("--explain", action="store_true", help="print what the schedule costs, and train nothing")
    parser.add_argument("--shape", metavar="NAME", help="with --explain: a published model's, such as llava-1.5-7b")
    parser.add_argument("--staircase", type=Path, metavar="FILE.png", help="with --explain: draw it")
    parser.add_argument("--json", action="store_true", help="with --explain: print JSON")
    if {"-h", "--help"} & set(arguments):
        parser.epilog = f"{parser.epilog}\n\n{_settings()}"


def _settings() -> str:
    """Every setting of the file, with its default and what it is."""
    from vlmzip.schema import REQUIRED, describe
    from vlmzip.training.config import Config

    lines = ["settings, in the file or by --set:"]
    for field in describe(Config):
        default = "" if field.default in (REQUIRED, None, "{}") else f" = {field.default}"
        lines.append(f"  {field.name + default:<32} {field.doc}")
    return "\n".join(lines)


def run(args: Namespace) -> None:
    from vlmzip.training.config import read_config

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
    """Add to an error about a missing file that the configuration's first lines say how to get it.

    A configuration that does not begin with a comment adds nothing.
    """
    try:
        yield
    except UserError as error:
        files = [name for name in (config.model, config.records, config.images) if name and not Path(name).exists()]
        if not any(repr(name) in str(error) for name in files) or not path.read_text(encoding="utf-8").startswith("#"):
            raise
        raise UserError(f"{error}; the first lines of {path} say how to get it") from None


def _train(config: Config) -> None:
    from vlmzip.cli.loading import load, note, tell

    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise UserError("training needs accelerate: pip install 'vlmzip[train]'") from None
    from vlmzip.lab.score import TaskScore
    from vlmzip.lab.tasks.catalogue import read_task
    from vlmzip.processes import Processes
    from vlmzip.runtime.answering import Answerer
    from vlmzip.training.run import train, try_out

    refuse_place(Path(config.out), "out:")
    try_out(config)
    asked = config.evaluation
    task = None if asked is None else read_task(asked.task, asked.limit, None)
    first = Processes().first
    loaded = load(config.model, "cpu", config.weights)  # Trainer moves it to where it belongs
    _set_attention(loaded.model, config.attention)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is untrained")  # here it is trained
        score = None if task is None else TaskScore(Answerer(loaded.adapter, loaded.processor), task)
        tell_first = note if first else _say_nothing
        folder = train(config, loaded.model, loaded.processor, loaded.adapter, tell_first, score)
    if first:
        tell(f"the trained model is in {folder}")


def _set_attention(model: Any, name: str) -> None:
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"attention: {name} cannot be used, take sdpa or eager: {said[:200]}") from None


def _say_nothing(_text: str) -> None:
    return


def _explain(config: Config, args: Namespace) -> None:
    from vlmzip.cli.tables import print_table
    from vlmzip.lab.papers.llavolta import explain_beside_paper
    from vlmzip.training.explain import COLUMNS, as_json, lines

    if args.staircase:
        _check_image(args.staircase)
    _note_what_is_missing(config)
    adapter, steps = _on_paper(config, args.shape), _steps(config)
    schedule = config.schedule_for(adapter.profile().layers)
    cost = explain_beside_paper(schedule, adapter, steps, config.text_tokens)
    _note_unreached(cost, steps)
    if args.json:
        print(json.dumps(as_json(cost), indent=2))
    else:
        print_table(list(COLUMNS), lines(cost))
        print(
            f"\nCR: compression ratio; LLM FLOPs: with {config.text_tokens} tokens of text, as a share of those without"
        )
        print("compression; paper: as LLaVolta prints it, whose totals do not all follow from its stages")
    if args.staircase:
        _draw(cost, f"{args.shape or config.model}: {schedule.name}", args.staircase)


def _note_what_is_missing(config: Config) -> None:
    """Note what this machine lacks for the run; costs can be counted elsewhere than where it will run."""
    from vlmzip.cli.loading import note

    if not config.trainer:
        return
    try:
        from vlmzip.training.run import try_out

        try_out(config)
    except (UserError, ImportError) as error:
        note(f"on this machine the run would be refused: {error}")


def _on_paper(config: Config, preset: str | None) -> Any:
    """The adapter of the model, or of a published one, without its weights: shapes are all that costs need."""
    import torch
    from transformers import AutoModelForImageTextToText

    from vlmzip.lab.bench.presets import PRESETS, make_config, make_model
    from vlmzip.models import adapter_for
    from vlmzip.runtime.checkpoints import load_config, refusing
    from vlmzip.runtime.loading import source_of

    if preset is not None:
        if preset not in PRESETS:
            raise UserError(f"--shape: there is no {preset!r}{closest(preset, PRESETS)}")
        return adapter_for(make_model(make_config(PRESETS[preset]), "meta", torch.bfloat16))
    try:
        shape = load_config(source_of(config.model))
        with refusing(f"cannot read the shape of {config.model!r}"), torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(shape, trust_remote_code=False)
        return adapter_for(model)
    except UserError as error:
        said = str(error).replace("--model takes", "it takes")
        raise UserError(f"model: {said}; for costs alone: --shape llava-1.5-7b") from None


def _steps(config: Config) -> int:
    """How many optimiser steps a run takes; where the configuration says it, the records need not be there."""
    from vlmzip.training.records import Records

    if config.steps is not None:
        return config.steps
    try:
        records = Records(Path(config.records))
    except UserError as error:
        raise UserError(f"records: {error}; for costs alone: --set steps=1000") from None
    return config.steps_for(len(records))


def _note_unreached(cost: Cost, steps: int) -> None:
    from vlmzip.cli.loading import note

    unreached = [str(number) for number, stage in enumerate(cost.stages, 1) if not stage.steps]
    if unreached:
        note(f"too few steps, {steps:,}, to reach stage {', '.join(unreached)}")


def _check_image(path: Path) -> None:
    from vlmzip.files import refuse_source

    if path.suffix not in (".png", ".svg"):
        raise UserError(f"--staircase {str(path)!r}: give a name that ends in .png or .svg")
    refuse_source(path, [])


def _draw(cost: Cost, title: str, path: Path) -> None:
    from vlmzip.cli.loading import note
    from vlmzip.files import write_whole
    from vlmzip.training.explain import draw_staircase

    figure = draw_staircase(cost, title)
    write_whole(path, lambda name: figure.savefig(name))
    note(f"the staircase is in {path}")
