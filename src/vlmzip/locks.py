"""Lock a folder, so that only one run writes to it."""

from __future__ import annotations

import errno
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from vlmzip.errors import UserError

#: The lock file of a folder. It stays when the run ends: removing it could let two runs in.
LOCK = ".lock"
#: Error numbers of file systems without locks.
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def hold(folder: Path, process: int = 0) -> BaseFileLock:
    """Keep other runs out of a folder until the returned lock is garbage-collected or the process ends.

    The folder is created if it is missing. `process` is the number of this process in the run; each process has its own
    lock. Calls for the same lock within a process return the same object. Raise `UserError` if another run holds the
    folder or the lock cannot be written. File systems without locks keep no run out.
    """
    path = folder.resolve() / (f"{LOCK}.{process}" if process else LOCK)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(path), timeout=0, thread_local=False, is_singleton=True)
        if not lock.is_locked:
            lock.acquire()
    except Timeout:
        raise UserError(f"another run is writing {str(folder)!r}; wait for it, or give another --out") from None
    except NotImplementedError:
        return lock
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return lock
        raise cannot_write(path, error) from None
    return lock


def cannot_write(path: Path, error: OSError) -> UserError:
    """Return the error for a failed write. Its message says how to resume the run."""
    return UserError(
        f"cannot write {str(path)!r}: {error.strerror or error}; the records so far are kept: run the same"
        " command again to resume"
    )
