import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ml_backend import embeddings as embeddings_module
from ml_backend.embeddings import EmbeddingCache, EmbeddingKey, EmbeddingStore
from sam_ext.predictor import Crop, Embedding

ROOT = Path(__file__).parents[2]
SIDE = 8
FILE_BYTES = 16_640
"""About what `large` takes as a file."""


def embedding(value: float = 0.0) -> Embedding:
    """One of 24 bytes."""
    return Embedding(
        image_embeddings=torch.full((1, 1, 2, 3), value),
        original_size=(2, 3),
        input_size=(2, 3),
        padded_size=(2, 3),
    )


def large(
    seed: int,
    dtype: torch.dtype = torch.float32,
    crop: Crop | None = None,
    *,
    has_guide: bool = False,
) -> Embedding:
    """One as the encoder makes it: 64 channels, the channels of a token side by side."""
    numbers = torch.randn((1, 8, SIDE, 64), generator=torch.Generator().manual_seed(seed))
    return Embedding(
        image_embeddings=numbers.to(dtype).permute(0, 3, 1, 2),
        original_size=(75, 60),
        input_size=(128, 102),
        padded_size=(128, 112),
        crop=crop,
        guide=np.random.default_rng(seed).integers(0, 256, (128, 102, 3), np.uint8)
        if has_guide
        else None,
    )


def key(name: str, fingerprint: str = "weights", crop: Crop | None = None) -> EmbeddingKey:
    return EmbeddingKey(name, fingerprint, crop)


def test_the_cache_remembers():
    cache, kept = EmbeddingCache(100), embedding()
    assert cache.get(key("a")) is None
    cache.put(key("a"), kept)
    assert cache.get(key("a")) is kept


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(key("a", "others"), id="other-weights"),
        pytest.param(key("a", crop=Crop(0, 0, 2, 2)), id="a-crop-of-it"),
        pytest.param(key("b"), id="another-image"),
    ],
)
@pytest.mark.parametrize("on_disk", [False, True])
def test_another_key_is_another_entry(tmp_path, other, on_disk):
    if on_disk:
        store = EmbeddingStore(tmp_path, max_bytes=10**6)
        store.write(key("a"), embedding())
        assert (store.read(key("a")) is None, store.read(other) is None) == (False, True)
        assert (key("a") in store, other in store) == (True, False)
    else:
        cache = EmbeddingCache(100)
        cache.put(key("a"), embedding())
        assert cache.get(other) is None


def test_the_cache_drops_what_was_used_longest_ago():
    cache = EmbeddingCache(2 * 24)
    for name in ("a", "b"):
        cache.put(key(name), embedding())
    cache.get(key("a"))
    cache.put(key("c"), embedding())
    assert [key(name) in cache for name in ("a", "b", "c")] == [True, False, True]
    assert cache.nbytes == 2 * 24


def test_the_cache_counts_what_is_put_twice_once():
    cache = EmbeddingCache(2 * 24)
    for value in (1.0, 2.0):
        cache.put(key("a"), embedding(value))
    assert cache.nbytes == 24
    assert cache.get(key("a")).image_embeddings.max() == 2.0


@pytest.mark.parametrize("max_bytes", [0, 23])
def test_what_is_larger_than_the_cache_is_not_kept(max_bytes):
    cache = EmbeddingCache(max_bytes)
    cache.put(key("a"), embedding())
    assert key("a") not in cache
    assert cache.nbytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("crop", [None, Crop(3, 5, 40, 50)])
@pytest.mark.parametrize("has_guide", [False, True])
def test_what_is_read_is_what_was_written_to_the_last_bit(tmp_path, dtype, crop, has_guide):
    written = large(1, dtype, crop, has_guide=has_guide)
    assert EmbeddingStore(tmp_path, max_bytes=10**6).write(key("a", crop=crop), written)
    read = EmbeddingStore(tmp_path, max_bytes=10**6).read(key("a", crop=crop))
    assert torch.equal(read.image_embeddings, written.image_embeddings)
    # In memory too: kernels choose their order of summation by it.
    assert read.image_embeddings.stride() == written.image_embeddings.stride()
    assert read.image_embeddings.data_ptr() % 64 == 0
    for name in ("original_size", "input_size", "padded_size", "crop"):
        assert getattr(read, name) == getattr(written, name)
    assert read.image_embeddings.dtype == dtype
    assert (read.guide is None) == (not has_guide)
    if has_guide:
        np.testing.assert_array_equal(read.guide, written.guide)
        assert read.guide.flags.owndata  # the file's bytes are not kept for it


def test_files_from_before_there_were_guides_are_read(tmp_path, monkeypatch):
    def without_guides(fields):
        del fields["has_guide"]
        return dumps(fields)

    dumps = json.dumps
    written = large(1)
    store = EmbeddingStore(tmp_path, max_bytes=10**6)
    with monkeypatch.context() as patch:
        patch.setattr(embeddings_module.json, "dumps", without_guides)
        store.write(key("a"), written)
    read = store.read(key("a"))
    assert torch.equal(read.image_embeddings, written.image_embeddings)
    assert read.guide is None


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def cut(data: bytes) -> bytes:
    return data[:-1]


def flip(place: int):
    return lambda data: data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(cut, id="truncated"),
        pytest.param(lambda _: b"", id="empty"),
        pytest.param(lambda data: data + b"0", id="longer"),
        pytest.param(flip(0), id="another-format"),
        pytest.param(flip(20), id="checksum"),
        pytest.param(flip(60), id="header"),
        pytest.param(flip(-5), id="a-number"),
    ],
)
def test_a_broken_entry_is_deleted_and_said_to_be_gone(tmp_path, caplog, spoil):
    store = EmbeddingStore(tmp_path, max_bytes=10**6)
    store.write(key("a"), large(1))
    path = only_file(tmp_path)
    path.write_bytes(spoil(path.read_bytes()))
    assert store.read(key("a")) is None
    assert not path.exists()
    assert "damaged or foreign" in caplog.text
    assert store.write(key("a"), large(1))
    assert store.read(key("a")) is not None


def test_an_entry_under_another_entrys_name_is_not_served(tmp_path):
    store = EmbeddingStore(tmp_path, max_bytes=10**6)
    store.write(key("a"), large(1))
    of_a = only_file(tmp_path)
    store.write(key("b"), large(2))
    (of_b,) = set(tmp_path.iterdir()) - {of_a}
    of_a.replace(of_b)
    assert store.read(key("b")) is None
    assert list(tmp_path.iterdir()) == []


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_the_store_keeps_to_its_bound_and_drops_what_was_used_longest_ago(tmp_path):
    store = EmbeddingStore(tmp_path, max_bytes=int(3.5 * FILE_BYTES))
    for name in ("a", "b", "c"):
        store.write(key(name), large(1))
        assert bytes_in(tmp_path) <= 3.5 * FILE_BYTES
        time.sleep(0.02)  # for the files' times
    store.read(key("a"))
    store.touch(key("c"))
    store.write(key("d"), large(1))
    assert [key(name) in store for name in ("a", "b", "c", "d")] == [True, False, True, True]
    assert len(list(tmp_path.iterdir())) == 3


def test_what_is_of_a_model_that_is_gone_goes_first(tmp_path):
    folder = tmp_path / "embeddings"
    models = {name: tmp_path / "versions" / name for name in ("gone", "there")}
    store = EmbeddingStore(folder, max_bytes=int(3.5 * FILE_BYTES))
    for name, place in models.items():
        place.mkdir(parents=True)
        store.belongs_to(f"{name} {'0' * 16}", place)
    fingerprints = {name: f"{name} {'0' * 16}" for name in models}
    keys = [key("a"), key("a", fingerprints["there"]), key("a", fingerprints["gone"])]
    for one in keys:
        store.write(one, large(1))
        time.sleep(0.02)  # for the files' times
    models["gone"].rmdir()
    store.write(key("b"), large(1))
    assert [one in store for one in keys] == [True, True, False]
    assert [path.read_text() for path in folder.glob("of-*")] == ["../versions/there"]


def test_whose_embeddings_they_are_can_be_lost_with_the_disk(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    EmbeddingStore(tmp_path / "file", max_bytes=10**6).belongs_to("fingerprint", tmp_path)
    assert "must be a folder that embeddings can be kept in" in caplog.text


def test_the_bound_holds_over_many_writes_of_small_entries(tmp_path):
    bound = 100 * FILE_BYTES
    stores = [EmbeddingStore(tmp_path, max_bytes=bound) for _ in range(2)]  # as two workers
    for index in range(260):
        stores[index % 2].write(key(str(index)), large(1))
        assert bytes_in(tmp_path) <= bound
    assert bytes_in(tmp_path) > 0.85 * bound


def test_what_is_larger_than_the_store_is_not_kept_and_nothing_goes_for_it(tmp_path):
    store = EmbeddingStore(tmp_path, max_bytes=2000)
    assert store.write(key("small"), embedding())
    assert not store.write(key("large"), large(1))
    assert key("small") in store


def test_what_a_killed_process_left_is_cleaned_up(tmp_path):
    for name, age_s in (("new-old", 4000), ("new-young", 60)):
        path = tmp_path / name
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age_s,) * 2)
    EmbeddingStore(tmp_path, max_bytes=10**6).write(key("a"), embedding())
    assert not (tmp_path / "new-old").exists()
    assert (tmp_path / "new-young").exists()


def test_a_disk_that_cannot_be_used_is_logged_once_and_costs_nothing_else(tmp_path, caplog):
    folder = tmp_path / "embeddings"
    folder.write_text("in the way")
    store = EmbeddingStore(folder, max_bytes=10**6)
    for _ in range(3):
        assert not store.write(key("a"), embedding())
        assert store.read(key("a")) is None
        store.touch(key("a"))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{folder} must be a folder that embeddings can be kept in" in record.message

    folder.unlink()
    assert store.write(key("a"), embedding())
    assert store.read(key("a")) is not None


def test_a_full_disk_leaves_no_half_file(tmp_path, caplog, monkeypatch):
    store = EmbeddingStore(tmp_path, max_bytes=10**6)

    def full(path: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert not store.write(key("a"), embedding())
    assert list(tmp_path.iterdir()) == []
    assert "No space left on device" in caplog.text


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from ml_backend.embeddings import EmbeddingStore
from tests.ml_backend.test_embeddings import FILE_BYTES, key, large
store, embedding = EmbeddingStore(Path(sys.argv[1]), max_bytes=6 * FILE_BYTES), large(1)
moments = random.Random(0)
for _ in range(40):
    if (child := os.fork()) == 0:
        while True:
            for index in range(10):
                store.write(key(str(index)), embedding)
    time.sleep(moments.uniform(0.002, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(any(name.startswith("new-") for name in os.listdir(sys.argv[1])))
"""


def test_a_process_killed_at_any_moment_leaves_nothing_broken(tmp_path, caplog):
    command = [sys.executable, "-c", KILLED, tmp_path]
    ended = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    assert "True" in ended.stdout  # in the middle of a file
    store = EmbeddingStore(tmp_path, max_bytes=10**6)
    found = [read for index in range(10) if (read := store.read(key(str(index)))) is not None]
    assert found
    for read in found:
        assert torch.equal(read.image_embeddings, large(1).image_embeddings)
    assert "damaged" not in caplog.text
