"""What runs on the model for a request, and what is kept of it.

Every request has a thread of its own; the model's work is done in lanes of few threads, so that
clicks on images that are already encoded pass by encodings, which pass by batches, and so that
torch keeps threads of its own for a handful of callers, not for every request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from ml_backend.embeddings import EmbeddingCache, EmbeddingKey, EmbeddingStore
from ml_backend.errors import OverloadedError
from ml_backend.images import LoadedImage
from ml_backend.lanes import EncodeLanes, Priority
from sam_ext.automatic import AutomaticMask, generate_masks
from sam_ext.interactive import (
    Answer,
    CropPolicy,
    LogitsMemo,
    answer_prompts,
    default_refine,
)
from sam_ext.predictor import Crop, Embedding, ObjectMasks, ObjectPrompt, Predictor
from sam_ext.prompt_free import Instance, answer_prompt_free

__all__ = ["Engine"]

_DECODES_AT_ONCE = 2


class Engine:
    """Answers prompts about images with the models it is given; safe from several threads."""

    def __init__(
        self,
        *,
        cache_bytes: int,
        max_waiting: int,
        store: EmbeddingStore | None = None,
        crops: CropPolicy | None = None,
        automatic_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Start the lanes.

        Args:
            cache_bytes: Bound of the embeddings kept in memory.
            max_waiting: Predictions that may be admitted at the same time.
            store: Where embeddings outlive the process; None keeps them in memory only.
            crops: When small objects are looked at in a crop; None never does.
            automatic_options: Arguments for `generate_masks`, where its defaults do not suit.
        """
        self.embeddings = EmbeddingCache(cache_bytes)
        self._store = store
        self._reading = threading.Lock()
        self._lanes = EncodeLanes()
        self._decoding = ThreadPoolExecutor(_DECODES_AT_ONCE, thread_name_prefix="decode")
        self._batches = ThreadPoolExecutor(1, thread_name_prefix="batch")
        self._crops = crops
        self._memo = LogitsMemo()
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
                )
            self._admitted += 1
        try:
            yield
        finally:
            with self._lock:
                self._admitted -= 1

    def embed(
        self,
        predictor: Predictor,
        image: LoadedImage,
        *,
        crop: Crop | None = None,
        priority: Priority = Priority.DRAWING,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> Embedding:
        """Look an embedding up in memory, then on disk, or encode the image or its crop.

        Its pixels are decoded only if it is new, and when its turn has come.

        Args:
            predictor: The model.
            image: The image.
            crop: The part of it that is meant; None for all of it.
            priority: Who waits for it.
            is_wanted: As `EncodeLanes.run` takes it.

        Raises:
            EncodeAbandonedError: If it is not wanted any more, or the engine is closed.
        """
        key = EmbeddingKey(image.content_hash, predictor.embedding_fingerprint, crop)
        if (kept := self.embeddings.get(key)) is not None:
            if self._store is not None:
                self._store.touch(key)
            return kept
        if (kept := self._kept(key, predictor)) is not None:
            return kept

        def encode(pause: Callable[[], None]) -> Embedding:
            if (kept := self._kept(key, predictor)) is not None:  # made while this one waited
                return kept
            pause()
            embedding = predictor.embed(image.pixels, crop=crop, pause=pause)
            self.embeddings.put(key, embedding)
            return embedding

        def keep(embedding: Embedding) -> None:
            if self._store is not None and key not in self._store:
                self._store.write(key, embedding)

        return self._lanes.run(key, encode, priority=priority, keep=keep, is_wanted=is_wanted)

    def known_size(
        self, content_hash: str, predictors: Iterable[Predictor]
    ) -> tuple[int, int] | None:
        """Give the size (H, W) of an image whose embedding is kept; None for others.

        Args:
            content_hash: Digest of the image file's bytes.
            predictors: Whose embeddings are looked for, one after the other.
        """
        for predictor in predictors:
            key = EmbeddingKey(content_hash, predictor.embedding_fingerprint)
            if (kept := self._kept(key, predictor)) is not None:
                return kept.original_size
        return None

    def answer(
        self,
        predictor: Predictor,
        image: LoadedImage,
        prompts: Sequence[ObjectPrompt],
        *,
        priority: Priority = Priority.DRAWING,
    ) -> list[Answer]:
        """Answer each prompt with one mask, in their order.

        Raises:
            PromptError: If a prompt does not fit the image.
        """
        decode = self._decode if priority == Priority.DRAWING else self._decode_in_a_batch
        return answer_prompts(
            predictor,
            prompts,
            image_hw=image.size_hw,
            embed=lambda crop: self.embed(predictor, image, crop=crop, priority=priority),
            decode=partial(decode, predictor),
            crops=self._crops,
            refine=default_refine(predictor.image_size),
            memo=self._memo,
        )

    def automatic_masks(self, predictor: Predictor, embedding: Embedding) -> list[AutomaticMask]:
        """Find the things in an image without any prompt, largest first."""
        return self._batches.submit(
            generate_masks,
            predictor,
            embedding,
            pause=self._lanes.give_way,
            **self._automatic_options,
        ).result()

    def prompt_free_masks(self, predictor: Predictor, embedding: Embedding) -> tuple[Instance, ...]:
        """Find all things of the one kind that a model was trained to find without a prompt."""

        def find() -> tuple[Instance, ...]:
            self._lanes.give_way()
            return answer_prompt_free(predictor, embedding).instances

        return self._batches.submit(find).result()

    def close(self) -> None:
        """Finish what runs for an annotator, drop the rest, and end the lanes' threads."""
        self._lanes.close()
        for lane in (self._decoding, self._batches):
            lane.shutdown(cancel_futures=True)

    def _decode(
        self,
        predictor: Predictor,
        embedding: Embedding,
        prompts: Sequence[ObjectPrompt],
        *,
        multimask_output: bool | None = None,
    ) -> list[ObjectMasks]:
        with self._lanes.decoding():
            return self._decoding.submit(
                predictor.decode, embedding, prompts, multimask_output=multimask_output
            ).result()

    def _decode_in_a_batch(
        self,
        predictor: Predictor,
        embedding: Embedding,
        prompts: Sequence[ObjectPrompt],
        *,
        multimask_output: bool | None = None,
    ) -> list[ObjectMasks]:
        def decode() -> list[ObjectMasks]:
            self._lanes.give_way()
            return predictor.decode(embedding, prompts, multimask_output=multimask_output)

        return self._batches.submit(decode).result()

    def _kept(self, key: EmbeddingKey, predictor: Predictor) -> Embedding | None:
        """Look an embedding up in memory, then on disk; what was there is in memory then."""
        with self._reading:  # so that many who ask for one file read it once
            kept = self.embeddings.get(key)
            if kept is None and self._store is not None:
                kept = self._store.read(key)
                if kept is not None:
                    on_device = kept.image_embeddings.to(predictor.device)
                    kept = replace(kept, image_embeddings=on_device)
                    self.embeddings.put(key, kept)
            return kept
