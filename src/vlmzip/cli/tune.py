"""`vlmzip tune`: from what may be spent and what may be lost to a method and its budget, by asking your questions."""

from __future__ import annotations

import math
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from vlmzip.cli.options import add_model, check_counts, check_folder
from vlmzip.errors import UserError
from vlmzip.keep import count_to_keep, parse_keep
from vlmzip.lab.tasks.catalogue import FORMS as TASKS
from vlmzip.outline import METHOD_FORMS

if TYPE_CHECKING:
    from vlmzip.cli.tune_output import SearchOutcome
    from vlmzip.lab.configurations import Configuration
    from vlmzip.lab.study import Study
    from vlmzip.lab.tasks.task import Task
    from vlmzip.lab.tune.study import Cost, TunedStudy
    from vlmzip.processes import Processes

EXAMPLES = """  vlmzip tune --max-loss 5 --limit 1000
  vlmzip tune --max-tokens 16 --methods visionzip,kmeans,pool2d
  vlmzip tune --model llava-hf/llava-1.5-7b-hf --task my_questions:vqa --max-prefill-ms 60 --max-loss 2
  vlmzip tune --task my_questions:exact --calibrate-on other_photos --max-flops 30% --keep 40%,30%,20%,10%

With a cost and a loss: the cheapest that meets both. With a cost alone: the best score within it. With a loss alone:
the cheapest within it, in visual tokens. Half of the images choose, the other half confirms. A loss counts as within
the limit only where a larger one would have shown on the confirming half in 39 of 40 cases; where it is the estimate
alone, that is said. If nothing meets
the limits there is no compressor.json, and the exit code is 0 all the same; it is 1 where a candidate broke.
Run the same command again to go on where it was stopped: nothing is asked twice."""

KEEP = "75%,50%,36%,25%,18%,11%,8%,5.6%"


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    add_model(parser)
    limits = parser.add_argument_group("limits, one of the costs or --max-loss or both")
    costs = limits.add_mutually_exclusive_group()
    costs.add_argument(
        "--max-tokens", metavar="Y", help="visual tokens per image, the mean over all layers of the LLM: 64 or 11%%"
    )
    costs.add_argument("--max-flops", metavar="SHARE", help="prefill FLOPs of the LLM, of the uncompressed: 30%%")
    costs.add_argument(
        "--max-prefill-ms",
        type=float,
        metavar="X",
        help="milliseconds of the LLM's prefill on this machine, one question at a time, measured at the beginning",
    )
    limits.add_argument(
        "--max-loss", type=float, metavar="Z", help="points of a hundred below the uncompressed model's score"
    )
    parser.add_argument(
        "--task", "--tasks", dest="task", default="mini", metavar="T", help=f"{TASKS}; default: %(default)s"
    )
    parser.add_argument(
        "--methods",
        metavar="A,B,…",
        help=f"separated by commas, each {METHOD_FORMS}; default: all that need no training",
    )
    parser.add_argument(
        "--keep",
        default=KEEP,
        metavar="K,K,…",
        help=f"average budgets to try, tokens per image or shares of them; default: {KEEP}".replace("%", "%%"),
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use only the first questions of the task")
    parser.add_argument(
        "--calibrate-on", metavar="FOLDER", help="images for the thresholds of methods that decide by content"
    )
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="questions at a time; default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="length of answers; default: the task's")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results go; default: runs/tune/MODEL")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the halves, the order of questions and the intervals"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: Namespace) -> None:
    from dataclasses import replace

    from vlmzip.cli.loading import load, note, note_unknown_words, tell
    from vlmzip.cli.tune_output import show
    from vlmzip.compressor_file import FILE
    from vlmzip.lab.configurations import read_rows
    from vlmzip.lab.study import Study
    from vlmzip.lab.tasks.catalogue import read_one_task
    from vlmzip.lab.tune.study import halves
    from vlmzip.processes import Processes

    _check(args)
    methods, budgets = read_rows(args.methods, args.keep)
    task = read_one_task(args.task, args.limit, args.calibrate_on)
    if args.max_new_tokens is not None:
        task = replace(task, max_new_tokens=args.max_new_tokens)
    halves(task.samples, args.seed)  # refuses what has too few images before the model is loaded
    folder = args.out or Path("runs", "tune", Path(args.model).name)
    with Processes() as processes:
        loaded = load(args.model, processes.device(args.device), args.dtype, allow_pickle=args.allow_pickle)
        if processes.first:
            note_unknown_words(loaded, task)
        study = Study(loaded.model, loaded.processor, args.model, folder, args.batch, processes, tell)
        rows = study.configure([task], methods, budgets)
        if processes.first and (folder / FILE).exists():
            (folder / FILE).unlink()
            note(f"{FILE} of an earlier run is removed: it must not pass for what this run finds ({folder / FILE})")
        found = _search(study, task, rows, args, processes)
        if processes.first:
            show(found, args)
    if found.asked.failures:
        if processes.first:
            tell(f"candidates broke: {len(found.asked.failures):,}; their reasons are above")
        sys.exit(1)


def _search(
    study: Study, task: Task, rows: list[Configuration], args: Namespace, processes: Processes
) -> SearchOutcome:
    from vlmzip.cli.tune_output import SearchOutcome
    from vlmzip.lab.configurations import TOO_FAR
    from vlmzip.lab.tune.search import Target, Tuning
    from vlmzip.lab.tune.study import TunedStudy, prefill_milliseconds

    configurations = _distinct(rows)
    asked = TunedStudy(study, task, configurations, _cost(args), args.seed)
    if asked.cost == "ms":
        asked.milliseconds, asked.failures = processes.from_first(
            lambda: prefill_milliseconds(study, task, configurations, study.tell)
        )
    loss = None if args.max_loss is None else args.max_loss / 100
    tuning = Tuning(
        asked,
        asked.expected(),
        {part: [sample.image for sample in some.samples] for part, some in asked.parts.items()},
        Target(_most(args, asked), loss),
        study.batch,
        args.seed,
        margin=0.0 if asked.cost == "ms" else TOO_FAR,
        tell=study.tell if processes.first else lambda _: None,
    )
    return SearchOutcome(asked, tuning, tuning.run(), [row for row in rows if row.compressor is None])


def _distinct(rows: list[Configuration]) -> list[Configuration]:
    """What can run, each setting once, the uncompressed model first."""
    from vlmzip import spec

    found: dict[str, Configuration] = {}
    for row in rows:
        if row.compressor is not None:
            found.setdefault(spec.write(row.compressor), row)
    return list(found.values())


def _cost(args: Namespace) -> Cost:
    return "ms" if args.max_prefill_ms is not None else "flops" if args.max_flops is not None else "tokens"


def _most(args: Namespace, asked: TunedStudy) -> float | None:
    """The wished limit in the unit of the cost; a share of the tokens is one of the middle image's."""
    if args.max_tokens is not None:
        return float(count_to_keep(args.max_tokens, asked.profile.size))
    return args.max_prefill_ms if args.max_flops is None else float(parse_keep(args.max_flops))


def _is_share(text: str) -> bool:
    try:
        return isinstance(parse_keep(text), float)
    except UserError:
        return False


def _check(args: Namespace) -> None:
    """Raises `UserError` for what can be refused before anything slow happens."""
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
        raise UserError(f"--out {str(args.out)!r} holds a model, whose own compressor.json is not tune's to replace")
