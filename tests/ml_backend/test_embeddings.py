import threading

import pytest
import torch

from ml_backend.embeddings import EmbeddingCache, EmbeddingKey
from sam_ext.predictor import Embedding

WAIT_S = 10


def embedding(value: float = 0.0) -> Embedding:
    """One of 24 bytes."""
    return Embedding(
        image_embeddings=torch.full((1, 1, 2, 3), value), original_size=(2, 3), input_size=(2, 3)
    )


def key(name: str, fingerprint: str = "weights") -> EmbeddingKey:
    return EmbeddingKey(name, fingerprint)


def test_computes_once_and_then_remembers():
    cache, made = EmbeddingCache(100), []

    def compute() -> Embedding:
        made.append(embedding())
        return made[-1]

    answers = [cache.get_or_compute(key("a"), compute) for _ in range(3)]
    assert len(made) == 1
    assert all(answer is made[0] for answer in answers)


def test_the_same_image_under_other_weights_is_another_entry():
    cache = EmbeddingCache(100)
    first = cache.get_or_compute(key("a", "old"), embedding)
    assert cache.get_or_compute(key("a", "new"), embedding) is not first


def test_drops_what_was_used_longest_ago():
    cache = EmbeddingCache(2 * 24)
    for name in ("a", "b", "a", "c"):
        cache.get_or_compute(key(name), embedding)
    assert [key(name) in cache for name in ("a", "b", "c")] == [True, False, True]
    assert cache.nbytes == 2 * 24


@pytest.mark.parametrize("max_bytes", [0, 23])
def test_what_is_larger_than_the_cache_is_handed_out_and_not_kept(max_bytes):
    cache = EmbeddingCache(max_bytes)
    assert cache.get_or_compute(key("a"), embedding).nbytes == 24
    assert key("a") not in cache
    assert cache.nbytes == 0


def ask_together(cache: EmbeddingCache, compute, count: int) -> list[object]:
    """Ask from several threads, the first of which is inside `compute` when the others ask."""
    answers: list[object] = [None] * count
    inside, go_on = threading.Event(), threading.Event()

    def slow() -> Embedding:
        inside.set()
        assert go_on.wait(WAIT_S)
        return compute()

    def ask(index: int) -> None:
        try:
            answers[index] = cache.get_or_compute(key("a"), slow)
        except ValueError as error:
            answers[index] = error

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(count)]
    threads[0].start()
    assert inside.wait(WAIT_S)
    for thread in threads[1:]:
        thread.start()
    go_on.set()
    for thread in threads:
        thread.join(WAIT_S)
    return answers


def test_many_who_ask_at_once_wait_for_one_computation():
    made = []

    def compute() -> Embedding:
        made.append(embedding())
        return made[-1]

    answers = ask_together(EmbeddingCache(100), compute, count=8)
    assert len(made) == 1
    assert all(answer is made[0] for answer in answers)


def test_one_that_is_not_kept_is_still_given_to_all_who_wait():
    answers = ask_together(EmbeddingCache(0), embedding, count=4)
    assert all(isinstance(answer, Embedding) for answer in answers)


def test_a_failure_goes_to_all_who_wait_and_is_forgotten():
    cache = EmbeddingCache(100)
    failure = ValueError("no picture")

    def fail() -> Embedding:
        raise failure

    answers = ask_together(cache, fail, count=4)
    assert all(isinstance(answer, ValueError) for answer in answers)
    assert isinstance(cache.get_or_compute(key("a"), embedding), Embedding)


def test_another_image_does_not_wait():
    cache = EmbeddingCache(100)

    def compute() -> Embedding:
        cache.get_or_compute(key("b"), embedding)  # would wait for itself forever
        return embedding()

    thread = threading.Thread(target=cache.get_or_compute, args=(key("a"), compute), daemon=True)
    thread.start()
    thread.join(WAIT_S)
    assert not thread.is_alive()
