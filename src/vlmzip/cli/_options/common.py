"""Options that several commands have, and their checks."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from vlmzip.errors import UserError
from vlmzip.files import refuse_place
from vlmzip.lab.tasks.metrics import METRICS

#: What --task and --tasks take.
TASKS = (
    "mini, easy-vqa, easy-vqa:tuned (for a model fine-tuned on it), or FOLDER:METRIC, a folder with images and a"
    f" JSONL of image, question and answers, under {', '.join(METRICS)}"
)


def add_model(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="mini", help="checkpoint folder or hub id; default: mini, which ships with vlmzip"
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, …; default: a GPU if there is one")
    parser.add_argument("--dtype", default=None, help="float32, bfloat16 or float16; default: the checkpoint's")
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read pickled weights (pytorch_model.bin) too, which can run code: only of checkpoints that you trust",
    )


def add_frames(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help="take N evenly spaced frames of each video; default: as many as the model's processor expects",
    )


def add_answer_length(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="length of the answer; default: %(default)s"
    )


def check_counts(args: Namespace, *names: str, least: int = 1) -> None:
    """Raise `UserError` if one of the named options is given and less than `least`."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: give at least {least}")


def check_folder(args: Namespace) -> None:
    """Raise `UserError` if --out cannot be a folder."""
    if args.out is None:
        return
    refuse_place(args.out, "--out")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {str(args.out)!r} is a file; give a folder")
