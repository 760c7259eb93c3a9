"""`vlmzip show IMAGE`: which visual tokens of an image are kept, merged and dropped."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from vlmzip.cli.options import add_method, add_model, check_method, make_method, without_budget
from vlmzip.errors import UserError
from vlmzip.sites import Site

EXAMPLES = """  vlmzip show examples/cluttered.png
  vlmzip show examples/flat.png examples/cluttered.png --keep 25% --out tokens.png
  vlmzip show photo.jpg --method pool2d --factor 2 --model ./llava-1.5-7b"""


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="one or several images")
    add_model(parser)
    add_method(parser, arguments)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to draw; default: IMAGE_METHOD.png in this folder"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: Namespace) -> None:
    import torch

    from vlmzip.cli.asking import attach_and_note, build_inputs, draw
    from vlmzip.cli.images import check_target, load_image, save_image
    from vlmzip.cli.loading import load, progress
    from vlmzip.runtime.inputs import compress_inputs

    check_method(args, draws=True)
    method = without_budget(args)
    if any(stage.site is Site.IN_LLM for stage in method.stages()):
        raise UserError(f"{method.name()} chooses inside the LLM, by the question; use vlmzip ask … --overlay FILE")
    if args.out:
        check_target(args.out, args.images)
    for path in args.images:
        load_image(path)
    loaded = load(args.model, args.device, args.dtype, allow_pickle=args.allow_pickle)
    compressor = attach_and_note(loaded, make_method(args, loaded.adapter.profile())).compressor
    with progress("encoding"), torch.no_grad():
        inputs = build_inputs(loaded, args.images, "")
        report = compress_inputs(loaded.model, inputs, compressor).report
    out = args.out or Path(f"{Path(args.images[0]).stem}_{compressor.name()}.png")
    save_image(draw(loaded, inputs, report, args.images), out, args.images)
    counts = [
        {"path": path, "before": p.before, "after": p.after} for path, p in zip(args.images, report.images, strict=True)
    ]
    if args.json:
        print(
            json.dumps(
                {"model": args.model, "compressor": compressor.to_dict(), "images": counts, "overlay": str(out)},
                indent=2,
            )
        )
        return
    for one in counts:
        print(f"{one['path']}: {one['before']} → {one['after']} visual tokens")
    print(f"tokens drawn in {out}")
