"""`vlmzip calibrate FOLDER|IMAGE|VIDEO…`: find the threshold with which similar ones meet a budget on average."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from pathlib import Path, PurePath

from vlmzip import catalogue, spec
from vlmzip.cli._options.common import check_counts
from vlmzip.cli._shared.images import check_target, save_image
from vlmzip.cli._shared.loading import load
from vlmzip.cli._shared.method import settings, without_budget
from vlmzip.compressor import Calibratable, Compressor
from vlmzip.errors import UserError
from vlmzip.files import is_file, is_folder, is_there
from vlmzip.keep import parse_keep
from vlmzip.lab.table import print_json, print_table
from vlmzip.runtime.calibration import Calibration, calibrate
from vlmzip.runtime.images import common_suffixes
from vlmzip.runtime.videos import VIDEO_FILES, is_video
from vlmzip.visualize.figure import import_matplotlib
from vlmzip.visualize.histogram import draw_deviations


def run(args: Namespace) -> None:
    check_counts(args, "frames")
    compressor = _compressor(args)
    paths = _visuals(args.images)
    if args.histogram:
        import_matplotlib()
        check_target(args.histogram, paths)
    loaded = load(args.model, args.device, args.dtype, allow_pickle=args.allow_pickle)
    calibration = calibrate(
        loaded.model,
        paths,
        compressor,
        args.keep,
        keep_per_view=args.keep_per_view,
        processor=loaded.processor,
        frames=args.frames,
    )
    threshold = getattr(calibration.compressor, _threshold(compressor))
    out: dict[str, object] = {
        "model": args.model,
        "compressor": calibration.compressor.to_dict(),
        "keep": args.keep,
        "keep_per_view": args.keep_per_view,
        "images": len(paths),
        "kinds": _kinds(paths),
        "average": calibration.average,
        "upper": calibration.upper,
        "reached": calibration.reached,
        "by_factor": dict(sorted(Counter(calibration.factors).items())),
    }
    if args.histogram:
        title = f"{compressor.name()} on {PurePath(args.model).name}"
        save_image(draw_deviations(calibration.deviations, threshold, title), args.histogram, paths)
        out["histogram"] = str(args.histogram)
    print_json(out) if args.json else _print(paths, calibration, threshold, args)


def _compressor(args: Namespace) -> Compressor:
    """Return the method without a budget. Raise `UserError` if it has no threshold to calibrate."""
    if args.keep is None and args.keep_per_view is None:
        raise UserError("calibrate needs a budget: --keep 64, --keep 0.25 or --keep 25%")
    if args.keep is not None and args.keep_per_view is not None:
        raise UserError("give --keep or --keep-per-view, not both")
    if args.keep is not None:
        parse_keep(args.keep, "--keep")
    else:
        parse_keep(args.keep_per_view, "--keep-per-view")
    compressor = without_budget(args)
    if not isinstance(compressor, Calibratable):
        able = [name for name, cls in catalogue.available().items() if hasattr(cls, "threshold")]
        raise UserError(f"{compressor.name()} has no threshold to calibrate; these methods do: {', '.join(able)}")
    if compressor.threshold in settings(args):
        raise UserError(f"leave out --{compressor.threshold}: calibrate sets it")
    return compressor


def _threshold(compressor: Compressor) -> str:
    assert isinstance(compressor, Calibratable)
    return compressor.threshold


def _kinds(paths: list[str]) -> str:
    """Return "image", "video", or "image or video"."""
    kinds = {"video" if is_video(path) else "image" for path in paths}
    return " or ".join(sorted(kinds))


def _visuals(words: list[str]) -> list[str]:
    """Return the paths of the images and videos that `words` name and of those in the folders that `words` name."""
    known = (*common_suffixes(), *VIDEO_FILES)
    paths: list[str] = []
    for word in words:
        if not is_there(word):
            raise UserError(f"there is no image, video or folder {word!r}")
        if not is_folder(word):
            paths.append(word)
            continue
        inside = sorted(str(path) for path in Path(word).iterdir() if is_file(path) and path.suffix.lower() in known)
        if not inside:
            raise UserError(f"there is no image in the folder {word!r}, and no video (subfolders are not searched)")
        paths += inside
    return paths


def _print(paths: list[str], calibration: Calibration, threshold: float, args: Namespace) -> None:
    name, kinds = _threshold(calibration.compressor), _kinds(paths)
    print(
        f"{name} {threshold}: {calibration.average:.4g} visual tokens per {kinds} on average,"
        f" {calibration.reached:.1%} of all; at most {calibration.upper}\n"
    )
    after: dict[int, set[int]] = {}
    for factor, count in zip(calibration.factors, calibration.after_by_view, strict=True):
        after.setdefault(factor, set()).add(count)
    rows = [
        [str(factor), str(views), " to ".join(str(n) for n in sorted({min(after[factor]), max(after[factor])}))]
        for factor, views in sorted(Counter(calibration.factors).items())
    ]
    views = "images" if len(calibration.factors) == len(paths) else "views"
    print_table(["factor", "frames" if kinds == "video" else views, "visual tokens"], rows)
    visual = kinds.upper().replace(" OR ", "|")
    print(f'\nuse it: vlmzip ask {visual} QUESTION --method "{spec.write(calibration.compressor)}"')
    if args.histogram:
        print(f"deviations drawn in {args.histogram}")
