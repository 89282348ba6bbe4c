"""Embeddings that are kept: the last ones in memory, more of them on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import struct
import tempfile
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sam_ext.predictor import Crop, Embedding

__all__ = ["EmbeddingCache", "EmbeddingKey", "EmbeddingStore"]

_log = logging.getLogger(__name__)

_MAGIC = b"sam embedding 1\n"
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_UNFINISHED = "new-"
_OWNER = "of-"
_PREFIX = 16  # hex digits of a fingerprint in the names of its files
_ABANDONED_S = 3600.0  # after that nobody writes a file any more
# The folder is looked through each time that a process has written this part of the bound.
_LOOK_AGAIN = 32


class EmbeddingKey(NamedTuple):
    """What an embedding depends on; two images of equal bytes share one."""

    content_hash: str
    """Digest of the image file's bytes."""
    fingerprint: str
    """Digest of the model that encoded it and of its settings."""
    crop: Crop | None = None
    """The part of the image that was encoded; None for all of it."""


class EmbeddingCache:
    """The embeddings used last, at most `max_bytes` of them together; safe from several threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[EmbeddingKey, Embedding] = OrderedDict()  # used last at the end
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """The bytes of all embeddings that are kept."""
        return self._nbytes

    def __contains__(self, key: EmbeddingKey) -> bool:
        with self._lock:
            return key in self._kept

    def get(self, key: EmbeddingKey) -> Embedding | None:
        """Look an embedding up."""
        with self._lock:
            if (kept := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
            return kept

    def put(self, key: EmbeddingKey, embedding: Embedding) -> None:
        """Keep an embedding, unless it is larger than the whole cache."""
        with self._lock:
            if embedding.nbytes > self._max_bytes:
                return
            if (replaced := self._kept.pop(key, None)) is not None:
                self._nbytes -= replaced.nbytes
            self._kept[key] = embedding
            self._nbytes += embedding.nbytes
            while self._nbytes > self._max_bytes:
                _, dropped = self._kept.popitem(last=False)
                self._nbytes -= dropped.nbytes


class EmbeddingStore:
    """Embeddings as files in one folder, shared by processes: whole or absent, bounded.

    A file is a magic line, the SHA-256 of what follows, the length of a JSON header, the header and
    the numbers. It is written under another name and renamed. Its modification time is when it was
    last used; what was not used for longest goes first, after all that is of a model that is gone.
    The bound holds for two processes that write; each further one may exceed it by a
    thirty-second of it.

    A disk that cannot be used costs time, not answers: it is logged once, until it works again.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._unseen = max_bytes  # bytes written since the folder was looked through
        self._is_failing = False

    def __contains__(self, key: EmbeddingKey) -> bool:
        return self._path(key).exists()

    def belongs_to(self, fingerprint: str, folder: Path) -> None:
        """Note that a model is of a folder: its embeddings are of no use once that is gone."""
        path = self._folder / f"{_OWNER}{fingerprint[:_PREFIX]}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._put(path, os.path.relpath(folder, self._folder).encode())
        except OSError as error:
            self._failed(error)

    def touch(self, key: EmbeddingKey) -> None:
        """Note that an embedding was used, wherever it was kept."""
        with contextlib.suppress(OSError):
            os.utime(self._path(key))

    def read(self, key: EmbeddingKey) -> Embedding | None:
        """Read an embedding into memory; None if it is not there.

        A file that is damaged, or is not what its name says, is deleted.
        """
        path = self._path(key)
        try:
            data = bytearray(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            self._failed(error)
            return None
        embedding = _unpack(data, key)
        if embedding is None:
            _log.warning("%s is damaged or foreign; it is deleted, and made anew", path)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        self.touch(key)
        return embedding

    def write(self, key: EmbeddingKey, embedding: Embedding) -> bool:
        """Keep an embedding; say whether it is there now."""
        data = _pack(key, embedding)
        with self._lock:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                if not self._make_room(len(data)):
                    return False
                self._put(self._path(key), data)
            except OSError as error:
                self._failed(error)
                return False
        self._is_failing = False
        return True

    def _path(self, key: EmbeddingKey) -> Path:
        digest = hashlib.sha256(repr(tuple(key)).encode()).hexdigest()
        return self._folder / f"{key.fingerprint[:_PREFIX]}-{digest}"

    def _put(self, path: Path, data: bytes) -> None:
        descriptor, name = tempfile.mkstemp(dir=self._folder, prefix=_UNFINISHED)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            Path(name).replace(path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise

    def _failed(self, error: OSError) -> None:
        if not self._is_failing:
            _log.warning(
                "%s must be a folder that embeddings can be kept in, got %s; they are lost at a "
                "restart until that is mended",
                self._folder,
                error.strerror or error,
            )
        self._is_failing = True

    def _make_room(self, nbytes: int) -> bool:
        """Delete what was not used for longest, if it is time for that; False if they never fit."""
        if nbytes > self._max_bytes:
            return False
        slack = self._max_bytes // _LOOK_AGAIN
        self._unseen += nbytes
        if self._unseen > slack:
            self._evict(self._max_bytes - 2 * slack - nbytes)
            self._unseen = nbytes
        return True

    def _evict(self, max_bytes: int) -> None:
        files = []
        gone = self._gone()
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                stat = entry.stat()
                age_s = time.time() - stat.st_mtime
                is_abandoned = entry.name.startswith(_UNFINISHED) and age_s > _ABANDONED_S
                if is_abandoned or entry.name.removeprefix(_OWNER).partition("-")[0] in gone:
                    Path(entry).unlink()
                elif not entry.name.startswith(_OWNER):
                    files.append((stat.st_mtime_ns, stat.st_size, entry.path))
        left = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if left <= max_bytes:
                return
            Path(path).unlink(missing_ok=True)
            left -= size

    def _gone(self) -> set[str]:
        """Find the models whose folders are gone, by the beginnings of their files' names."""
        gone = set()
        for path in self._folder.glob(f"{_OWNER}*"):
            with contextlib.suppress(OSError):
                if not (self._folder / path.read_text()).exists():
                    gone.add(path.name.removeprefix(_OWNER))
        return gone


def _pack(key: EmbeddingKey, embedding: Embedding) -> bytes:
    # In the order in which the encoder leaves them, so that it comes back the same in memory too.
    tensor = embedding.image_embeddings.cpu().permute(0, 2, 3, 1).contiguous()  # [1, h, w, 256]
    fields: dict[str, Any] = {
        "key": key,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": tensor.shape,
        "original_size": embedding.original_size,
        "input_size": embedding.input_size,
        "padded_size": embedding.padded_size,
        "has_guide": embedding.guide is not None,
    }
    header = json.dumps(fields).encode()
    numbers = tensor.flatten().view(torch.uint8).numpy().tobytes()
    guide = b"" if embedding.guide is None else embedding.guide.tobytes()
    content = struct.pack("<I", len(header)) + header + numbers + guide
    return _MAGIC + hashlib.sha256(content).digest() + content


def _unpack(data: bytearray, key: EmbeddingKey) -> Embedding | None:
    """Read what `_pack` wrote for this key; None if it is anything else."""
    start = len(_MAGIC) + 32
    view = memoryview(data)
    digest = hashlib.sha256(view[start:]).digest()
    if view[:start] != _MAGIC + digest:
        return None
    (length,) = struct.unpack_from("<I", data, start)
    numbers_at = start + 4 + length
    fields = json.loads(bytes(view[start + 4 : numbers_at]))
    # JSON has no tuples.
    if fields["key"] != json.loads(json.dumps(key)):
        return None
    shape, input_size = fields["shape"], tuple(fields["input_size"])
    dtype = _DTYPES[fields["dtype"]]
    nbytes = math.prod(shape) * dtype.itemsize
    numbers = torch.frombuffer(data, dtype=torch.uint8, count=nbytes, offset=numbers_at)
    tensor = numbers.clone().view(dtype)  # cloned to where memory is aligned
    guide = None
    if fields.get("has_guide"):  # older files say nothing of it
        pixels = np.frombuffer(data, np.uint8, offset=numbers_at + nbytes)
        guide = pixels.reshape(*input_size, 3).copy()
    return Embedding(
        image_embeddings=tensor.reshape(shape).permute(0, 3, 1, 2),
        original_size=tuple(fields["original_size"]),
        input_size=input_size,
        padded_size=tuple(fields["padded_size"]),
        crop=key.crop,
        guide=guide,
    )
