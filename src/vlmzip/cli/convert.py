"""`vlmzip convert CHECKPOINT`: make a Mini-Gemini that transformers loads from the checkpoint of its authors."""

from __future__ import annotations

import warnings
from argparse import Namespace

from transformers.utils import logging

from vlmzip.cli._shared.console import spinner
from vlmzip.errors import UserError
from vlmzip.files import is_there, refuse_place
from vlmzip.mini_gemini.convert import convert


def run(args: Namespace) -> None:
    refuse_place(args.out, "--out")
    if is_there(args.out):
        raise UserError(f"--out {str(args.out)!r} exists already; give a new folder")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with spinner("converting"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert(args.checkpoint, args.clip, args.convnext, args.out)
    print(f"the model and its processor are in {args.out}; use them with --model ./{args.out}")
