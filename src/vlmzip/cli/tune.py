"""`vlmzip tune`: find the method and budget within a limit on cost or loss, by asking your questions."""

from __future__ import annotations

import logging
import math
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from vlmzip import spec
from vlmzip.cli._options.common import check_counts, check_folder
from vlmzip.cli._shared.loading import load
from vlmzip.errors import UserError
from vlmzip.keep import count_to_keep, parse_keep
from vlmzip.lab.budgets import read_rows
from vlmzip.lab.configurations import TOO_FAR, Configuration
from vlmzip.lab.study import Study
from vlmzip.lab.tasks.catalogue import read_one_task
from vlmzip.lab.tasks.task import Task
from vlmzip.lab.tasks.words import warn_of_unknown_words
from vlmzip.lab.tune.output import SearchOutcome, show
from vlmzip.lab.tune.search import Target, Tuning
from vlmzip.lab.tune.study import Cost, TunedStudy, halves, prefill_milliseconds
from vlmzip.outline import FILE
from vlmzip.processes import Processes

log = logging.getLogger(__name__)


def run(args: Namespace) -> None:
    _check(args)
    methods, budgets = read_rows(args.methods, args.average_keep, args.keep)
    task = read_one_task(args.task, args.limit, args.calibrate_on)
    if args.max_new_tokens is not None:
        task = replace(task, max_new_tokens=args.max_new_tokens)
    halves(task.samples, args.seed)  # raises for too few images, before the model is loaded
    folder = args.out or Path("runs", "tune", Path(args.model).name)
    with Processes() as processes:
        loaded = load(args.model, processes.device(args.device), args.dtype, allow_pickle=args.allow_pickle)
        if processes.first:
            warn_of_unknown_words(loaded, task)
        study = Study(loaded.model, loaded.processor, args.model, folder, args.batch, processes)
        rows = study.configure([task], methods, budgets)
        if processes.first and (folder / FILE).exists():
            (folder / FILE).unlink()
            log.warning(
                f"{folder / FILE} of an earlier run is removed, so that it is not mistaken for a result of this run"
            )
        outcome = _search(study, task, rows, args, processes)
        if processes.first:
            show(outcome, args)
    if outcome.asked.failures:
        if processes.first:
            log.info(f"candidates broke: {len(outcome.asked.failures):,}; their reasons are above")
        sys.exit(1)


def _search(
    study: Study, task: Task, rows: list[Configuration], args: Namespace, processes: Processes
) -> SearchOutcome:
    configurations = _distinct(rows)
    tuned_study = TunedStudy(study, task, configurations, _cost(args), args.seed)
    if tuned_study.cost == "ms":
        tuned_study.milliseconds, tuned_study.failures = processes.from_first(
            lambda: prefill_milliseconds(study, task, configurations)
        )
    loss = None if args.max_loss is None else args.max_loss / 100
    tuning = Tuning(
        tuned_study,
        tuned_study.expected(),
        {part: [sample.image for sample in half.samples] for part, half in tuned_study.parts.items()},
        Target(_most(args, tuned_study), loss),
        study.batch,
        args.seed,
        margin=0.0 if tuned_study.cost == "ms" else TOO_FAR,
    )
    return SearchOutcome(tuned_study, tuning, tuning.run(), [row for row in rows if row.compressor is None])


def _distinct(rows: list[Configuration]) -> list[Configuration]:
    """Return the configurations that can run, each setting once, the uncompressed model first."""
    distinct: dict[str, Configuration] = {}
    for row in rows:
        if row.compressor is not None:
            distinct.setdefault(spec.write(row.compressor), row)
    return list(distinct.values())


def _cost(args: Namespace) -> Cost:
    return "ms" if args.max_prefill_ms is not None else "flops" if args.max_flops is not None else "tokens"


def _most(args: Namespace, tuned_study: TunedStudy) -> float | None:
    """Return the limit on the cost, in the unit of the cost.

    A share of the visual tokens becomes a count by the median image.
    """
    if args.max_tokens is not None:
        return float(count_to_keep(args.max_tokens, tuned_study.profile.size))
    return args.max_prefill_ms if args.max_flops is None else float(parse_keep(args.max_flops))


def _is_share(text: str) -> bool:
    try:
        return isinstance(parse_keep(text), float)
    except UserError:
        return False


def _check(args: Namespace) -> None:
    """Raise `UserError` for invalid options before the model is loaded."""
    if args.max_loss is None and args.max_tokens is None and args.max_flops is None and args.max_prefill_ms is None:
        raise UserError("tune needs a limit: --max-tokens, --max-flops or --max-prefill-ms, or --max-loss, or both")
    if args.max_tokens is not None:
        parse_keep(args.max_tokens, "--max-tokens")
    if args.max_flops is not None and not _is_share(args.max_flops):
        raise UserError(f"--max-flops {args.max_flops}: give a share, such as 30% or 0.3")
    if args.max_prefill_ms is not None and not (args.max_prefill_ms > 0 and math.isfinite(args.max_prefill_ms)):
        raise UserError(f"--max-prefill-ms {args.max_prefill_ms:g}: give more than 0")
    if args.max_loss is not None and not 0 <= args.max_loss <= 100:
        raise UserError(f"--max-loss {args.max_loss:g}: give points from 0 to 100")
    check_counts(args, "limit", "batch", "max_new_tokens")
    check_counts(args, "seed", least=0)
    check_folder(args)
    if args.out is not None and (args.out / "config.json").exists():
        raise UserError(
            f"--out {str(args.out)!r} holds a model, and tune would replace its compressor.json; give another folder"
        )
