"""`vlmzip show IMAGE|VIDEO`: draw which visual tokens of an image or video are kept, merged and dropped."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch

from vlmzip.cli._options.common import check_counts
from vlmzip.cli._shared.console import spinner
from vlmzip.cli._shared.images import check_target, check_visuals, save_image
from vlmzip.cli._shared.loading import load
from vlmzip.cli._shared.method import check_method, make_method, without_budget
from vlmzip.errors import UserError, counted
from vlmzip.lab.asking import (
    account_of,
    attach_and_note,
    build_inputs,
    by_visual,
    draw,
    read_visuals,
    refuse_methods_for_clips,
)
from vlmzip.lab.table import print_json
from vlmzip.runtime.inputs import compress_inputs
from vlmzip.runtime.videos import Clip
from vlmzip.sites import Site

#: The parts of an image's account that do not need the LLM.
SHOWN = ("path", "before", "after", "frames", "seconds")


def run(args: Namespace) -> None:
    check_method(args, draws=True)
    method = without_budget(args)
    for stage in method.stages():
        if stage.site is Site.IN_LLM or stage.text_aware:
            where = "inside the LLM, " if stage.site is Site.IN_LLM else ""
            raise UserError(f"{stage.name()} chooses {where}by the question; use vlmzip ask … --overlay FILE")
    if args.out:
        check_target(args.out, args.images)
    check_counts(args, "frames")
    check_visuals(args.images, args.frames)
    loaded = load(args.model, args.device, args.dtype, allow_pickle=args.allow_pickle)
    compressor = attach_and_note(loaded, make_method(args, loaded.family.profile())).compressor
    with spinner("encoding"), torch.no_grad():
        visuals = read_visuals(loaded, args.images, args.frames)
        inputs = build_inputs(loaded, visuals, "")
        refuse_methods_for_clips(loaded, compressor, visuals, inputs)
        report = compress_inputs(loaded.model, inputs, compressor).report
    out = args.out or Path(f"{Path(args.images[0]).stem}_{compressor.name()}.png")
    save_image(draw(loaded, inputs, report, visuals), out, args.images)
    accounts = map(account_of, visuals, by_visual(visuals, report))
    counts = [{key: value for key, value in account.items() if key in SHOWN} for account in accounts]
    profile = loaded.family.profile()
    stages = compressor.stages()
    only_images = not any(isinstance(visual, Clip) for visual in visuals)  # the count is that of a common image
    upper = stages[-1].upper_count(profile) if only_images and len(stages) == 1 else None
    if args.json:
        totals = {"average": report.average, "upper_count": upper}
        named = {"model": args.model, "compressor": compressor.to_dict(), "images": counts}
        print_json({**named, **totals, "overlay": str(out)})
        return
    for image, visual in zip(counts, visuals, strict=True):
        frames = "" if isinstance(visual, str) else f" in {counted(len(visual.frames), 'frame')}"
        print(f"{image['path']}: {image['before']} → {image['after']} visual tokens{frames}")
    if upper is not None and profile.tiles:
        views = len(profile.grids)
        print(
            f"{report.average:.4g} per image on average; upper count {upper}, for an image of {counted(views, 'view')}"
        )
    print(f"tokens drawn in {out}")
