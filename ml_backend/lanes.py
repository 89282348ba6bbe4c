"""Who encodes, and when: each embedding once, and the background gives way at every block."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import TypeAlias

from ml_backend.embeddings import EmbeddingKey
from ml_backend.errors import OverloadedError
from sam_ext.predictor import Embedding

__all__ = ["Encode", "EncodeAbandonedError", "EncodeLanes", "Priority"]

_log = logging.getLogger(__name__)

Encode: TypeAlias = Callable[[Callable[[], None]], Embedding]
"""Makes an embedding; calls its argument between steps, which may wait, or raise."""

# So long in all does a drawing's encode stand still for decodes: clicks on other images stay quick
# beside it, and many of them do not stop it.
_COURTESY_S = 1.0


class Priority(IntEnum):
    """Who waits for an embedding; smaller goes first."""

    DRAWING = 0
    """An annotator who has drawn something."""
    BATCH = 1
    """A request without a drawing that has something to answer."""
    OPENED = 2
    """Nobody yet: the task was opened."""
    NEIGHBOUR = 3
    """Nobody yet: the task before it was opened."""


class EncodeAbandonedError(OverloadedError):
    """The embedding is not made: nobody wants it any more, or the service ends."""

    def __init__(self) -> None:
        super().__init__(
            "the backend must stay up to encode an image, got told to stop; try again shortly"
        )


@dataclass(eq=False)
class _Job:
    key: EmbeddingKey
    priority: Priority
    encode: Encode
    keep: Callable[[Embedding], object]
    is_wanted: Callable[[], bool]
    stood_still_s: float = 0.0
    future: Future[Embedding] = field(default_factory=Future)
    begun: bool = False


class EncodeLanes:
    """Two threads that encode: one for drawings, one for all else, which waits meanwhile.

    The background lane stands still, between two blocks of the encoder, while a drawing waits for
    its embedding or anything is decoded. An encode that a drawing turns out to need goes on in the
    lane that it has begun in, and does not wait any more; if it has not begun, it changes lanes.
    """

    def __init__(self) -> None:
        """Start both threads; they end with the process, or at `close`."""
        self._changed = threading.Condition()
        self._jobs: dict[EmbeddingKey, _Job] = {}  # in the order of their arrival
        self._decodes = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, args=(lane,), name=name, daemon=True)
            for lane, name in ((self._is_drawing, "encode"), (self._is_background, "background"))
        ]
        for thread in self._threads:
            thread.start()

    def run(
        self,
        key: EmbeddingKey,
        encode: Encode,
        *,
        priority: Priority,
        keep: Callable[[Embedding], object] = lambda _: None,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> Embedding:
        """Have an embedding made, or wait for the one that is being made.

        Args:
            key: What is asked for.
            encode: Makes it, in a lane. What it raises is raised to all who wait, and the next one
                to ask makes it again.
            priority: Who asks; the most urgent one of those who wait counts.
            keep: Called in the lane with the embedding, when those who wait have it.
            is_wanted: Asked before the encode begins, as long as only neighbours want it.

        Raises:
            EncodeAbandonedError: If nobody wanted it when its turn came, or the lanes are closed.
        """
        with self._changed:
            if self._closed:
                raise EncodeAbandonedError
            job = self._jobs.get(key)
            if job is None:
                job = self._jobs[key] = _Job(key, priority, encode, keep, is_wanted)
            job.priority = min(job.priority, priority)
            self._changed.notify_all()
        return job.future.result()

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Keep encodes out of the way for the length of the block."""
        with self._changed:
            self._decodes += 1
        try:
            yield
        finally:
            with self._changed:
                self._decodes -= 1
                self._changed.notify_all()

    def give_way(self) -> None:
        """Stand still while something is decoded, or a drawing waits for its embedding."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._is_drawn())

    def close(self) -> None:
        """Drop what waits, abandon what runs in the background, finish a drawing's encode."""
        with self._changed:
            self._closed = True
            for job in [job for job in self._jobs.values() if not job.begun]:
                self._end(job, EncodeAbandonedError())
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    @staticmethod
    def _is_drawing(job: _Job) -> bool:
        return job.priority == Priority.DRAWING

    @staticmethod
    def _is_background(job: _Job) -> bool:
        return job.priority != Priority.DRAWING

    def _work(self, is_mine: Callable[[_Job], bool]) -> None:
        while (job := self._next(is_mine)) is not None:
            self._do(job)
            del job  # it holds an image and an embedding

    def _do(self, job: _Job) -> None:
        try:
            embedding = job.encode(partial(self._pause, job))
        except BaseException as error:  # noqa: BLE001  # it goes to those who wait
            with self._changed:
                self._end(job, error)
            return
        with self._changed:
            self._end(job, embedding)
        try:
            job.keep(embedding)
        except Exception:  # noqa: BLE001  # a lane that ends would encode nothing any more
            _log.exception("an embedding could not be kept")

    def _next(self, is_mine: Callable[[_Job], bool]) -> _Job | None:
        """Wait for the most urgent job of a lane; None when the lanes are closed."""
        with self._changed:
            while not self._closed:
                waiting = [job for job in self._jobs.values() if not job.begun and is_mine(job)]
                if not waiting:
                    self._changed.wait()
                    continue
                job = min(waiting, key=lambda job: job.priority)
                if job.priority == Priority.NEIGHBOUR and not job.is_wanted():
                    self._end(job, EncodeAbandonedError())
                    continue
                job.begun = True
                return job
        return None

    def _end(self, job: _Job, result: Embedding | BaseException) -> None:
        del self._jobs[job.key]
        if isinstance(result, BaseException):
            job.future.set_exception(result)
        else:
            job.future.set_result(result)
        self._changed.notify_all()

    def _pause(self, job: _Job) -> None:
        with self._changed:
            left_s = _COURTESY_S - job.stood_still_s
            if job.priority == Priority.DRAWING and self._decodes and left_s > 0:
                began = time.monotonic()
                self._changed.wait_for(lambda: not self._decodes, timeout=left_s)
                job.stood_still_s += time.monotonic() - began
            self._changed.wait_for(
                lambda: self._closed or job.priority == Priority.DRAWING or not self._is_drawn()
            )
            if self._closed and job.priority != Priority.DRAWING:
                raise EncodeAbandonedError

    def _is_drawn(self) -> bool:
        return self._decodes > 0 or any(map(self._is_drawing, self._jobs.values()))
