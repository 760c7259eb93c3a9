"""Check model folders of transformers in child processes."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from vlmzip.children import ChildFailed, in_child
from vlmzip.lab.conformance.cells import check, versions
from vlmzip.lab.conformance.results import Checked, Results

#: Seconds after which the check of a model folder is ended.
LIMIT = 300


def check_all(folders: Sequence[str], jobs: int, report: Callable[[Checked], None]) -> Results:
    """Check model folders in `jobs` processes. Return the results as JSON, in the order of the folders."""
    start, lock = time.monotonic(), threading.Lock()
    results: dict[str, Checked] = {}

    def check_share(share: Sequence[str]) -> None:
        for checked in _in_children(share):
            with lock:
                results[checked.folder] = checked
                report(checked)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(check_share, [folders[first::jobs] for first in range(jobs)]))
    return {
        "versions": versions(),
        "seconds": round(time.monotonic() - start),
        "models": [asdict(results[folder]) for folder in folders],
    }


def _in_children(folders: Sequence[str]) -> Iterator[Checked]:
    """Yield the results of folders, from one child process. Start another one after a folder that ends it."""
    left = list(folders)
    while left:
        try:
            for checked in in_child(check_each, tuple(left)):
                left.remove(checked.folder)
                yield checked
        except ChildFailed as error:
            yield Checked(left.pop(0), "", "", "fails", f"its check was ended ({error})", {})


def check_each(folders: Sequence[str]) -> Iterator[Checked]:
    """Yield the results of each folder. End this process if a folder takes longer than `LIMIT`."""
    for folder in folders:
        signal.alarm(LIMIT)  # without a handler, the signal ends the process even inside a library
        yield check(folder)
    signal.alarm(0)
