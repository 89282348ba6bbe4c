"""Who runs on the model, and when.

Every request has a thread of its own; the model's work is done in lanes of few threads, so that
clicks on images that are already encoded pass by encodings, which pass by automatic masks, and so
that torch keeps threads of its own for a handful of callers, not for every request.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from ml_backend.embeddings import EmbeddingCache, EmbeddingKey
from ml_backend.errors import OverloadedError
from ml_backend.images import LoadedImage
from sam_ext.automatic import AutomaticMask, generate_masks
from sam_ext.predictor import Embedding, ObjectMasks, ObjectPrompt, Predictor

__all__ = ["Engine"]

_DECODES_AT_ONCE = 2
_RETRY_AFTER_S = 5


class Engine:
    """Answers prompts about images with one model; safe from several threads."""

    def __init__(
        self,
        predictor: Predictor,
        *,
        cache_bytes: int,
        max_waiting: int,
        automatic_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Start the lanes.

        Args:
            predictor: The model.
            cache_bytes: Bound of the embeddings kept in memory.
            max_waiting: Predictions that may be admitted at the same time.
            automatic_options: Arguments for `generate_masks`, where its defaults do not suit.
        """
        self.predictor = predictor
        self.embeddings = EmbeddingCache(cache_bytes)
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._decoding = ThreadPoolExecutor(_DECODES_AT_ONCE, thread_name_prefix="decode")
        self._surveying = ThreadPoolExecutor(1, thread_name_prefix="automatic")
        self._max_waiting = max_waiting
        self._automatic_options = dict(automatic_options or {})
        self._lock = threading.Lock()
        self._admitted = 0

    @property
    def waiting(self) -> int:
        """The predictions that are admitted now, running or waiting."""
        return self._admitted

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Hold a place in the queue for the length of the block.

        Raises:
            OverloadedError: If all places are taken.
        """
        with self._lock:
            if self._admitted >= self._max_waiting:
                raise OverloadedError(
                    f"predictions under way must be at most {self._max_waiting}, got one more; "
                    "try again shortly, or raise WORKERS or THREADS",
                    retry_after_s=_RETRY_AFTER_S,
                )
            self._admitted += 1
        try:
            yield
        finally:
            with self._lock:
                self._admitted -= 1

    def embed(self, image: LoadedImage) -> Embedding:
        """Encode an image, unless that has been done; its pixels are decoded only if it is new."""
        key = EmbeddingKey(image.content_hash, self.predictor.fingerprint)
        return self.embeddings.get_or_compute(key, lambda: self._encode(image))

    def masks(self, embedding: Embedding, prompts: Sequence[ObjectPrompt]) -> list[ObjectMasks]:
        """Answer each prompt, in their order.

        Raises:
            PromptError: If a prompt does not fit the image.
        """
        return self._decoding.submit(self.predictor.decode, embedding, prompts).result()

    def automatic_masks(self, embedding: Embedding) -> list[AutomaticMask]:
        """Find the things in an image without any prompt, largest first."""
        return self._surveying.submit(
            generate_masks, self.predictor, embedding, **self._automatic_options
        ).result()

    def close(self) -> None:
        """Finish what runs, drop what waits, and end the lanes' threads."""
        for lane in (self._encoding, self._decoding, self._surveying):
            lane.shutdown(cancel_futures=True)

    def _encode(self, image: LoadedImage) -> Embedding:
        # The pixels are decoded inside the lane, so that waiting images take no memory for them.
        return self._encoding.submit(lambda: self.predictor.embed(image.pixels)).result()
