"""Embeddings kept in memory: bounded by bytes, and one encode per image however many ask."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

from sam_ext.predictor import Embedding

__all__ = ["EmbeddingCache", "EmbeddingKey"]


class EmbeddingKey(NamedTuple):
    """What an embedding depends on; two images of equal bytes share one."""

    content_hash: str
    """Digest of the image file's bytes."""
    fingerprint: str
    """Digest of the model that encoded it."""


class EmbeddingCache:
    """The embeddings used last, at most `max_bytes` of them together; safe from several threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[EmbeddingKey, Embedding] = OrderedDict()  # used last at the end
        self._computing: dict[EmbeddingKey, Future[Embedding]] = {}
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """The bytes of all embeddings that are kept."""
        return self._nbytes

    def __contains__(self, key: EmbeddingKey) -> bool:
        with self._lock:
            return key in self._kept

    def get_or_compute(self, key: EmbeddingKey, compute: Callable[[], Embedding]) -> Embedding:
        """Look an embedding up, or compute it while everybody else who asks for it waits.

        An embedding larger than the whole cache is handed out and not kept.

        Args:
            key: What is asked for.
            compute: Makes it. What it raises is raised to all who wait, and the next one to ask
                computes again.
        """
        with self._lock:
            if (kept := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return kept
            computing = self._computing.get(key)
            if computing is None:
                mine = self._computing[key] = Future()
        if computing is not None:
            return computing.result()
        try:
            embedding = compute()
        except BaseException as error:
            with self._lock:
                del self._computing[key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._computing[key]
            self._keep(key, embedding)
        mine.set_result(embedding)
        return embedding

    def _keep(self, key: EmbeddingKey, embedding: Embedding) -> None:
        if embedding.nbytes > self._max_bytes:
            return
        self._kept[key] = embedding
        self._nbytes += embedding.nbytes
        while self._nbytes > self._max_bytes:
            _, dropped = self._kept.popitem(last=False)
            self._nbytes -= dropped.nbytes
