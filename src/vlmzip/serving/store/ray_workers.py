"""Encode the parts of a store in several processes, on one machine or many, with Ray Data.

A part whose process died is encoded again by another one. All machines need the folder, the store and the model under
the same paths.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError, how_to_install
from vlmzip.files import is_folder
from vlmzip.runtime.attach import attach
from vlmzip.runtime.loading import load
from vlmzip.runtime.saving import saved_weights
from vlmzip.serving.store.encoding import Encoder
from vlmzip.serving.store.manifest import Manifest
from vlmzip.serving.store.parts import Part, write_part

# Ray reads these when it is imported or started. It would report its use to its makers, and print about its own work.
for variable, value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DEDUP_LOGS": "0",
}.items():
    os.environ.setdefault(variable, value)

try:
    import ray
    import ray.data
except ImportError:
    raise UserError(f"several workers need Ray Data: {how_to_install('ray')}") from None

#: Bytes of the store of objects of a Ray that this process starts. Only names and counts go through it.
OBJECT_STORE = 100 * 2**20


@dataclass(frozen=True)
class Job:
    """What a worker needs to encode parts."""

    folder: Path
    store: Path
    model: str
    device: str | None
    dtype: str | None
    allow_pickle: bool
    compressor: Compressor
    manifest: Manifest

    @classmethod
    def of(
        cls, folder: Path, store: Path, model: str, device: str | None, dtype: str | None, *, allow_pickle: bool,
        compressor: Compressor, manifest: Manifest,
    ) -> Job:  # fmt: skip
        """Return a job with absolute paths: workers run in other folders."""
        model = os.path.abspath(model) if is_folder(model) else model
        return cls(folder.resolve(), store.resolve(), model, device, dtype, allow_pickle, compressor, manifest)


class Worker:
    """A process that has the model and encodes parts. Ray Data makes it."""

    def __init__(self, job: Job) -> None:
        loaded = load(job.model, job.device, job.dtype, allow_pickle=job.allow_pickle)
        compressed = attach(loaded.model, job.compressor, weights=saved_weights(job.compressor, job.model))
        self.job, self.encoder = job, Encoder(loaded, compressed)
        mine = Manifest.of(loaded, compressed, job.manifest.batch, job.manifest.shard, takes_several=True)
        mine.refuse_other(job.manifest, job.store)

    def __call__(self, row: dict[str, Any]) -> dict[str, int]:
        part = Part(int(row["number"]), tuple(row["names"]))
        write_part(self.job.store, self.job.folder, part, self.encoder, self.job.manifest.batch)
        return {"images": len(part.names)}


def encode_with_workers(job: Job, parts: Sequence[Part], workers: int) -> Iterator[int]:
    """Encode the parts in `workers` processes, and yield the number of images of each part that is done.

    With RAY_ADDRESS set, the processes run on that cluster, else on this machine.
    """
    items = [{"number": part.number, "names": list(part.names)} for part in parts]
    gpus = 1 if job.manifest.made_with["device"] == "cuda" else 0
    made_in_each_process: Any = Worker  # Ray's types ask for a function
    with _ray(workers), _own_errors():
        data = ray.data.from_items(items, override_num_blocks=len(items)).map(
            made_in_each_process,
            fn_constructor_args=(job,),
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(items))),
            num_cpus=1,
            num_gpus=gpus,
        )
        for row in data.iter_rows():
            yield row["images"]


@contextmanager
def _ray(workers: int) -> Iterator[None]:
    """Connect to a cluster, or start Ray on this machine, and leave it as it was."""
    started = not ray.is_initialized()
    with redirect_stdout(sys.stderr):  # Ray prints there that it starts a worker again, also when it ends
        if started:
            quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
            if "RAY_ADDRESS" not in os.environ:
                # One more CPU than workers: Ray Data's own tasks need one.
                quiet |= {"num_cpus": workers + 1, "include_dashboard": False, "object_store_memory": OBJECT_STORE}
            ray.init(**quiet)
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        try:
            yield
        finally:
            if started:
                ray.shutdown()


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raise a `UserError` of a worker as one of this process."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            for each in (cause, getattr(cause, "cause", None)):
                if isinstance(each, UserError):
                    raise UserError(str(each)) from None
            cause = cause.__cause__
        raise
