"""`vlmzip encode FOLDER --out STORE`: write the compressed visual tokens of many images, to ask about them often."""

from __future__ import annotations

import logging
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from vlmzip import spec
from vlmzip.cli._options.common import check_counts, check_folder
from vlmzip.cli._shared.loading import load
from vlmzip.cli._shared.method import check_method, make_method, without_budget
from vlmzip.compressor import Compressor
from vlmzip.errors import UserError, counted
from vlmzip.lab.table import print_json, show_bytes
from vlmzip.progress import working
from vlmzip.runtime.loading import Loaded, check_dtype, source_of
from vlmzip.serving.store.encoding import refuse_unfit
from vlmzip.serving.store.index import left_out
from vlmzip.serving.store.manifest import Manifest
from vlmzip.serving.store.parts import Part
from vlmzip.serving.store.reading import Damage, Store
from vlmzip.serving.store.writing import EncodeParts, Written, check_before_load, write_store

log = logging.getLogger(__name__)
#: The most images that a message names.
MOST_NAMED = 5


def run(args: Namespace) -> None:
    if args.verify is not None:
        if args.folder is not None or args.out is not None:
            raise UserError("--verify takes a store alone: vlmzip encode --verify STORE")
        _verify(args.verify, as_json=args.json)
        return
    if args.folder is None or args.out is None:
        raise UserError("give a folder of images and a store: vlmzip encode FOLDER --out STORE")
    check_counts(args, "batch", "shard", "workers")
    check_folder(args)
    check_method(args)
    names = _check_before_load(args)
    loaded = load(args.model, args.device, args.dtype, allow_pickle=args.allow_pickle)
    compressor = make_method(args, loaded.family.profile())
    start = time.monotonic()
    in_processes = _workers(args, compressor) if args.workers > 1 else None
    written = write_store(
        args.folder,
        args.out,
        loaded,
        compressor,
        batch=args.batch,
        shard=args.shard,
        update=args.update,
        names=names,
        in_processes=in_processes,
    )
    _print(args, loaded, compressor, written, time.monotonic() - start)
    for name, reason in written.failed.items():
        log.warning(left_out(name, reason))
    if old := _old_tokens(written):
        log.warning(old)
    if failed := written.failed:
        images = counted(len(failed) + written.stored, "image")
        raise UserError(f"{len(failed):,} of {images} could not be stored: {_some(list(failed))}")


def _check_before_load(args: Namespace) -> list[str]:
    """Return the names of the images. Raise `UserError` for all that is wrong without the model, which loads slowly."""
    method = without_budget(args)
    refuse_unfit(method)
    check_dtype(args.dtype)
    source_of(args.model)
    if args.workers > 1:
        import_module("vlmzip.serving.store.ray_workers")  # needs ray, an extra
    # The model decides how a method without a field `keep` reaches a budget.
    known = args.keep is None or "keep" in method.field_names()
    return check_before_load(args.folder, args.out, method if known else None, args.batch, args.shard, args.dtype)


def _workers(args: Namespace, compressor: Compressor) -> Callable[[Manifest], EncodeParts]:
    """Return the function with which `write_store` encodes parts in other processes."""
    from vlmzip.serving.store.ray_workers import Job, encode_with_workers  # needs ray, an extra

    def in_processes(manifest: Manifest) -> EncodeParts:
        job = Job.of(
            args.folder, args.out, args.model, args.device, args.dtype, allow_pickle=args.allow_pickle,
            compressor=compressor, manifest=manifest,
        )  # fmt: skip

        def encode(parts: Sequence[Part]) -> Iterator[int]:
            return encode_with_workers(job, parts, args.workers)

        return encode

    return in_processes


def _print(args: Namespace, loaded: Loaded, compressor: Compressor, written: Written, seconds: float) -> None:
    rate = written.encoded / seconds if written.encoded else None
    if args.json:
        out = {"store": str(args.out), "model": loaded.name, "compressor": compressor.to_dict(), **asdict(written)}
        print_json({**out, "seconds": seconds, "images_per_second": rate})
        return
    speed = "" if rate is None else f", {rate:.1f} images/s"
    print(f"{counted(written.encoded, 'image')} encoded with {spec.write(compressor)}{speed}")
    tokens, files = _size(written.token_bytes), _size(written.file_bytes)
    removed = f" ({written.removed:,} removed)" if written.removed else ""
    print(f"{args.out} has {counted(written.stored, 'image')}{removed}: {tokens} of tokens for {files} of image files")
    if written.unused_bytes:
        print(f"{_size(written.unused_bytes)} of its shards are old tokens, which are not used any more")


def _old_tokens(written: Written) -> str:
    """Say which images have other tokens in the store than their files would give now, or return ""."""
    groups = ((written.changed, "changed"), (written.gone, "gone"))
    counts = [
        f"{counted(len(names), 'image')} {state} since stored: {_some(names)}" for names, state in groups if names
    ]
    if not counts:
        return ""
    return f"{'; '.join(counts)}. The store keeps the old tokens; --update brings it to the state of the folder"


def _verify(path: Path, *, as_json: bool) -> None:
    store = Store(path)
    damaged: list[Damage] = []
    with working("verifying", len(store)) as work:
        for damage in store.damaged():
            damaged += [] if damage is None else [damage]
            work.advance()
    if as_json:
        print_json({"store": str(path), "images": len(store), "damaged": [asdict(damage) for damage in damaged]})
    for damage in damaged:
        log.warning(damage.reason)
    if damaged:
        raise UserError(
            f"{len(damaged):,} of {counted(len(store), 'image')} {'is' if len(damaged) == 1 else 'are'} damaged:"
            f" {_some([damage.path for damage in damaged])}"
        )
    if not as_json:
        print(f"{path}: {counted(len(store), 'image')}, none damaged")


def _size(count: int) -> str:
    """Return bytes with one decimal place, so that sizes beside each other can be compared."""
    number, unit = show_bytes(count).split()
    return f"{count} B" if unit == "B" else f"{float(number):.1f} {unit}"


def _some(names: list[str]) -> str:
    """Return the first names, and the number of the others."""
    more = f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
    return f"{', '.join(names[:MOST_NAMED])}{more}"
