"""Keep other runs out of a folder that a run writes."""

from __future__ import annotations

import errno
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from vlmzip.errors import UserError

#: The lock file of a folder. It stays when the run ends: removing it could let two runs in.
LOCK = ".lock"
#: What the system says where a file system has no locks.
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def hold(folder: Path, process: int = 0) -> BaseFileLock:
    """Keep other runs out of a folder until nothing refers to the result any more, or the process dies.

    Makes the folder if it is missing. `process` is the number of this process among those of the run, each of which has
    a lock. Calls for the same lock within a process return the same object. Raises `UserError` if another run holds the
    folder, or if it cannot be written. Where the file system has no locks, nobody is kept out.
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
    """Return the error for a disk that refuses, which also says that a run can go on."""
    return UserError(
        f"cannot write {str(path)!r}: {error.strerror or error}; the records so far are kept, and the same"
        " command goes on from them"
    )
