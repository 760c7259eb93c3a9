"""The last report of each façade. A thread that has called the façade gets the report of its own last call."""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

from torch import nn

from vlmzip.errors import UserError
from vlmzip.runtime.report import Report

_in_this_thread = threading.local()
_in_any_thread: WeakKeyDictionary[nn.Module, Report] = WeakKeyDictionary()


def publish(facade: nn.Module, report: Report) -> None:
    """Store `report` as the last report of `facade`."""
    _reports()[facade] = _in_any_thread[facade] = report


def last_report(facade: nn.Module) -> Report:
    """Return the last report of `facade` in this thread, or in any thread if this one has not called it.

    Raise `UserError` before the first call.
    """
    report = _reports().get(facade) or _in_any_thread.get(facade)
    if report is None:
        raise UserError("there is no report yet: call the model first")
    return report


def _reports() -> WeakKeyDictionary[nn.Module, Report]:
    if not hasattr(_in_this_thread, "reports"):
        _in_this_thread.reports = WeakKeyDictionary()
    return _in_this_thread.reports
