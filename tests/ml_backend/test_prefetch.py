from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from ml_backend.engine import Engine
from ml_backend.errors import ImageFetchError
from ml_backend.images import LoadedImage
from ml_backend.lanes import Priority
from ml_backend.prefetch import Prefetcher
from sam_ext.predictor import Predictor
from tests.ml_backend.test_engine import SteppedPredictor, image

WAIT_S = 20


class Recorder(Engine):
    """Notes what is embedded, for whom, in which order."""

    def __init__(self) -> None:
        super().__init__(cache_bytes=2**24, max_waiting=4)
        self.asked: list[tuple[str, Priority]] = []

    def embed(self, predictor, loaded: LoadedImage, *, priority=Priority.DRAWING, **options):
        self.asked.append((loaded.uri, priority))
        return super().embed(predictor, loaded, priority=priority, **options)


class OneModelPrefetcher(Prefetcher):
    """Embeds with one model for all projects."""

    def __init__(self, engine: Engine, predictor: Predictor) -> None:
        super().__init__(engine)
        self._predictor = predictor

    def open(self, project, own, following, predictor=None) -> None:
        predictor = predictor or (lambda: self._predictor)
        super().open(project, predictor=predictor, own=own, following=following)


@pytest.fixture
def make():
    made = []

    def call(predictor: Predictor) -> tuple[Recorder, OneModelPrefetcher]:
        engine = Recorder()
        made.append((engine, OneModelPrefetcher(engine, predictor)))
        return made[-1]

    yield call
    for engine, prefetcher in made:
        prefetcher.close()
        engine.close()


def images(*seeds: int) -> Callable[[], list[Callable[[], LoadedImage]]]:
    return lambda: [lambda seed=seed: image(seed) for seed in seeds]


def until(holds) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_opened_task_comes_first_then_the_next_ones(small_sam, make):
    engine, prefetcher = make(Predictor(small_sam))
    prefetcher.open("1.5", images(1, 2), images(3, 4))
    until(lambda: len(engine.asked) == 4)
    assert engine.asked == [
        ("/1.png", Priority.OPENED),
        ("/2.png", Priority.OPENED),
        ("/3.png", Priority.NEIGHBOUR),
        ("/4.png", Priority.NEIGHBOUR),
    ]


def test_opening_returns_at_once(small_sam, make):
    _, prefetcher = make(Predictor(small_sam))
    go_on = threading.Event()

    def slow() -> list[Callable[[], LoadedImage]]:
        assert go_on.wait(WAIT_S)
        return []

    for _ in range(50):
        prefetcher.open("1.5", slow, slow)
    go_on.set()


@pytest.mark.parametrize(
    ("project", "asked"),
    [
        pytest.param("1.5", ["/1.png", "/2.png", "/4.png", "/5.png"], id="of-the-project"),
        pytest.param("2.5", ["/1.png", "/2.png", "/4.png", "/5.png", "/3.png"], id="of-another"),
    ],
)
def test_next_tasks_are_given_up_when_another_task_is_opened(small_sam, make, project, asked):
    predictor = SteppedPredictor(small_sam)
    engine, prefetcher = make(predictor)
    predictor.go_on.release()
    prefetcher.open("1.5", images(1), images(2, 3))
    for _ in range(2):
        assert predictor.encoding.acquire(timeout=WAIT_S)
    # 2 has begun and is finished, 3 has not.
    prefetcher.open(project, images(4), images(5))
    until(lambda: len(engine.asked) == 3)
    predictor.go_on.release(4)
    until(lambda: predictor.encoded == len(asked))
    assert sorted(uri for uri, _ in engine.asked) == sorted(asked)


def test_of_tasks_opened_in_a_row_the_newest_come_first_and_the_oldest_are_forgotten(
    small_sam, make
):
    predictor = SteppedPredictor(small_sam)
    engine, prefetcher = make(predictor)
    for seed in range(2):
        prefetcher.open("1.5", images(seed), images())
    until(lambda: len(engine.asked) == 2)  # both threads are at work
    for seed in range(2, 30):
        prefetcher.open("1.5", images(seed), images())
    predictor.go_on.release(100)
    until(lambda: predictor.encoded == 2 + 16)
    seeds = [int(uri[1:-4]) for uri, _ in engine.asked]
    assert sorted(seeds) == [0, 1, *range(14, 30)]
    assert seeds[2] == 29


def test_failures_are_logged_and_the_rest_goes_on(small_sam, make, caplog):
    engine, prefetcher = make(Predictor(small_sam))

    def fail(error: Exception):
        def load() -> LoadedImage:
            raise error

        return load

    loads = [fail(ImageFetchError("fetch: no")), fail(RuntimeError("?")), lambda: image(1)]
    prefetcher.open("1.5", lambda: loads, fail(ImageFetchError("list: no")))
    prefetcher.open("2.5", images(2), images(3))
    until(lambda: {"/1.png", "/2.png", "/3.png"} == {uri for uri, _ in engine.asked})
    until(lambda: "prefetch: list: no" in caplog.text)
    assert "prefetch: fetch: no" in caplog.text
    assert "RuntimeError" in caplog.text


def test_only_so_many_projects_are_remembered(small_sam, make):
    _, prefetcher = make(Predictor(small_sam))
    for number in range(400):
        prefetcher.open(str(number), images(), images())
    assert len(prefetcher._newest) <= 256


def test_closing_ends_it_in_the_middle(small_sam, make):
    predictor = SteppedPredictor(small_sam)
    engine, prefetcher = make(predictor)
    prefetcher.open("1.5", images(1, 2), images(3))
    assert predictor.encoding.acquire(timeout=WAIT_S)
    prefetcher.close()
    closing = threading.Thread(target=engine.close)
    closing.start()
    until(lambda: engine._lanes._closed)
    predictor.go_on.release()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    assert predictor.encoded == 1  # as far as the first pause
