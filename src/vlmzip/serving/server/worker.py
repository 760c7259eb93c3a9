"""The embedded engine: a queue, and one thread that answers it in batches with a Hugging Face model."""

from __future__ import annotations

import gc
import logging
import threading
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from time import monotonic
from typing import Any, NamedTuple, TypeVar

import torch

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError, counted
from vlmzip.runtime.attach import attach
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.loading import Loaded
from vlmzip.runtime.prompt import pad_id
from vlmzip.runtime.saving import saved_weights
from vlmzip.serving.server.batch import Batch
from vlmzip.serving.server.choose import Methods
from vlmzip.serving.server.errors import RequestError, from_user_error, overloaded
from vlmzip.serving.server.metrics import Metrics
from vlmzip.serving.server.prepare import Preparer, Request
from vlmzip.serving.server.progress import Progress
from vlmzip.serving.server.schema import ChatRequest
from vlmzip.serving.server.settings import Settings
from vlmzip.serving.server.stored import ImageStore

log = logging.getLogger(__name__)
T = TypeVar("T")

#: Compressors that stay attached, those that were used last.
MOST_ATTACHED = 16
#: Seconds that the end of the server waits for the model's current step.
LONGEST_STEP = 30.0
#: How errors begin after which the device is lost to this process.
LOST = "CUDA error"
STOPPED = "the engine has stopped"
#: The model counts as stuck if it makes no token for this many times the longest time of a request.
STUCK = 2


class Waiting(NamedTuple):
    request: Request
    progress: Progress


class HuggingFaceEngine:
    """Answers with a loaded model. Requests of one kind that wait at the same time are answered together."""

    def __init__(
        self,
        loaded: Loaded,
        default: Compressor,
        settings: Settings,
        metrics: Metrics,
        name: str | None = None,
        store: ImageStore | None = None,
    ) -> None:
        self.loaded, self.model = loaded, name or loaded.name
        self.methods = Methods(loaded.family, default, () if store is None else (store.compressor,))
        self._preparer = Preparer(loaded, self.methods, settings, store)
        self._settings, self._metrics = settings, metrics
        self._attached: OrderedDict[Compressor, CompressedModel] = OrderedDict()
        self._queue: deque[Waiting] = deque()
        self._current: list[Waiting] = []
        """The batch that is being answered."""
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._change = threading.Condition()  # of an `RLock`: a thread that has it can take it again
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._beat_at: float | None = None
        """When the model last made a token; `None` while it is idle."""

    # --- called by the server -------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Return the number of requests in the queue. Those of clients that have gone leave it here."""
        with self._change:
            self._queue = deque(waiting for waiting in self._queue if not waiting.progress.cancelled)
            return len(self._queue)

    def prepare(self, request: ChatRequest) -> Request:
        return self._preparer.prepare(request)

    def submit(self, prepared: Request, progress: Progress) -> None:
        """Put a request in the queue. Raise `RequestError` if it is full or the engine has stopped."""
        with self._change:
            self._refuse_if_stopped()
            if (count := self.waiting) >= self._settings.max_queue:
                raise overloaded(f"too many requests are waiting ({count}); try again later")
            held = sum(waiting.request.nbytes for waiting in (*self._queue, *self._current))
            if held and held + prepared.nbytes > self._settings.max_inputs:
                raise overloaded("too many large images are waiting; try again later")
            self._queue.append(Waiting(prepared, progress))
            self._change.notify()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function in the thread of the model, between batches. Errors of it reach the future only."""
        future: Future[T] = Future()
        with self._change:
            self._refuse_if_stopped()
            self._calls.append((function, future))
            self._change.notify()
        return future

    def start(self, died: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=self._live, args=[died], name="vlmzip-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        with self._change:
            self._stopping = True
            self._change.notify()
        for waiting in self._current:
            waiting.progress.cancel()  # their answers end with the next token
        if self._thread is not None:
            self._thread.join(LONGEST_STEP)
        self._fail_all("the server is shutting down")

    def trouble(self) -> str | None:
        if self._thread is None or not self._thread.is_alive():
            return STOPPED
        beat, limit = self._beat_at, STUCK * self._settings.max_seconds
        if beat is not None and monotonic() - beat > limit:
            return f"the model has made no token for {counted(limit, 'second')}"
        return None

    def _refuse_if_stopped(self) -> None:
        if self._stopping or self._thread is None or not self._thread.is_alive():
            raise RequestError(STOPPED, 503, code="engine_stopped")

    # --- in the thread of the model -------------------------------------------------------------------------------

    def _live(self, died: Callable[[], None]) -> None:
        try:
            while (work := self._next()) is not None:
                self._beat()
                work()
                del work  # it has the requests that were answered
                self._current, self._beat_at = [], None
        except BaseException as error:
            log.critical("the engine has stopped", exc_info=error)
        finally:
            with self._change:
                expected, self._stopping = self._stopping, True
            self._fail_all(STOPPED)
            if not expected:
                died()

    def _next(self) -> Callable[[], None] | None:
        """Wait for work, and return it; `None` at the end."""
        with self._change:
            idle = not self._queue
            while not (self._stopping or self._queue or self._calls):
                self._change.wait()
            if self._stopping:
                return None
            if self._calls:
                function, future = self._calls.popleft()
                return lambda: _run(function, future)
            if idle:  # requests that arrive together should not be divided into the first and the rest
                self._change.wait_for(
                    lambda: self._stopping or len(self._queue) >= self._settings.max_batch, self._settings.batch_wait
                )
            batch = self._current = self._take_batch()
        return lambda: self._answer(batch)

    def _take_batch(self) -> list[Waiting]:
        """Take the request that waits longest and those of its kind out of the queue."""
        batch: list[Waiting] = []
        left: deque[Waiting] = deque()
        kind, held = None, 0
        for waiting in self._queue:
            if waiting.progress.cancelled:
                continue
            request = waiting.request
            fits = len(batch) < self._settings.max_batch and held + request.nbytes <= self._settings.batch_inputs
            if not batch or (fits and request.kind == kind):
                kind, held = request.kind, held + request.nbytes
                batch.append(waiting)
            else:
                left.append(waiting)
        self._queue = left
        return batch

    def _answer(self, batch: list[Waiting]) -> None:
        """Answer a batch. If it fails, answer each of its requests alone, so that only those at fault fail."""
        if not batch:
            return
        now = monotonic()
        for waiting in batch:
            waiting.progress.started = now
        self._metrics.batch_size.observe(len(batch))
        try:
            error = self._try(batch)
            if error is None or len(batch) == 1:
                self._finish(batch, error)
                return
            kind = type(error).__name__
            log.warning("a batch of %d failed (%s); its requests are answered alone", len(batch), kind)
            for waiting in batch:
                if not (waiting.progress.is_over or waiting.progress.cancelled):
                    self._finish([waiting], self._try([waiting]))
        except BaseException:  # this thread ends
            for waiting in batch:
                waiting.progress.fail(RequestError(STOPPED, 503, code="engine_stopped"))
            raise

    def _finish(self, batch: list[Waiting], error: Exception | None) -> None:
        """Report the error of a batch, or the lack of an answer, to those whose answer is not complete."""
        if isinstance(error, UserError):
            answer = from_user_error(error, "the model refused the request", code="invalid_request")
        elif isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            answer = RequestError("the memory is full; send fewer or smaller images", 503, code="out_of_memory")
        else:
            answer = RequestError("the model failed on this request", 500, code="internal_error")
            if error is not None:
                log.error("a request failed", exc_info=error)
        for waiting in batch:
            waiting.progress.fail(answer)

    def _try(self, batch: list[Waiting]) -> Exception | None:
        """Answer a batch, and return its error. Raise errors after which no call can succeed."""
        try:
            requests = [waiting.request for waiting in batch]
            progress = [waiting.progress for waiting in batch]
            compressed = self._facade(requests[0].compressor)
            pad = pad_id(self.loaded.family)
            Batch(compressed, self.loaded.processor, requests, progress, pad, self._beat).run()
        except Exception as error:
            if isinstance(error, RuntimeError) and str(error).startswith(LOST):
                log.critical("%s", str(error).partition("\n")[0])  # torch's own text, without parts of a request
                raise
            traceback.clear_frames(error.__traceback__)  # its frames hold tensors
            if isinstance(error, torch.OutOfMemoryError):
                gc.collect()
                torch.cuda.empty_cache()
            return error
        return None

    def _facade(self, compressor: Compressor) -> CompressedModel:
        """Return the model with a compressor. Those used last stay attached."""
        if compressor not in self._attached:
            weights = saved_weights(compressor, self.loaded.name)
            self._attached[compressor] = attach(self.loaded.model, compressor, weights=weights)
        self._attached.move_to_end(compressor)
        while len(self._attached) > MOST_ATTACHED:
            self._attached.popitem(last=False)[1].detach()
        return self._attached[compressor]

    def _beat(self) -> None:
        self._beat_at = monotonic()

    def _fail_all(self, reason: str) -> None:
        with self._change:
            waiting, self._queue = self._queue, deque()
            calls, self._calls = self._calls, deque()
        for each in waiting:
            each.progress.fail(RequestError(reason, 503, code="engine_stopped"))
        for _, future in calls:
            future.cancel()


def _run(function: Callable[[], T], future: Future[T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
