from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch

from ml_backend.embeddings import EmbeddingKey
from ml_backend.lanes import EncodeAbandonedError, EncodeLanes, Priority
from sam_ext.predictor import Embedding

WAIT_S = 20
DRAWING, BATCH, OPENED, NEIGHBOUR = Priority


def embedding() -> Embedding:
    return Embedding(
        image_embeddings=torch.zeros(1, 1, 2, 3),
        original_size=(2, 3),
        input_size=(2, 3),
        padded_size=(2, 3),
    )


@dataclass
class Encoder:
    """Encodes in steps that a test lets through one by one, and pauses before each."""

    begun: threading.Event = field(default_factory=threading.Event)
    steps: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    done: int = 0
    total: int = 1
    made: list[Embedding] = field(default_factory=list)
    thread: str = ""

    def __call__(self, pause) -> Embedding:
        self.thread = threading.current_thread().name
        self.begun.set()
        for _ in range(self.total):
            assert self.steps.acquire(timeout=WAIT_S)
            pause()
            self.done += 1
        self.made.append(embedding())
        return self.made[-1]


@pytest.fixture
def lanes():
    lanes = EncodeLanes()
    yield lanes
    lanes.close()


@pytest.fixture
def ask(lanes):
    """Asks in a thread of its own; the answer is a future."""
    with ThreadPoolExecutor(16) as pool:

        def call(name: str, encoder, priority=DRAWING, **options) -> Future[Embedding]:
            key = EmbeddingKey(name, "weights")
            future = pool.submit(lanes.run, key, encoder, priority=priority, **options)
            until(lambda: key in lanes._jobs or future.done())
            return future

        yield call
        lanes.close()


def until(holds) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def stays(holds) -> bool:
    """Whether something that could change at once does not for a while."""
    deadline = time.monotonic() + 0.1
    while holds() and time.monotonic() < deadline:
        time.sleep(0.005)
    return holds()


def order_of(names: list[str]):
    """An encode that takes no time and notes its turn."""

    def note(name: str):
        def encode(_pause) -> Embedding:
            names.append(name)
            return embedding()

        return encode

    return note


def test_many_who_ask_at_once_get_one_embedding(ask):
    encoder = Encoder()
    answers = [ask("a", encoder) for _ in range(8)]
    encoder.steps.release()
    got = [answer.result(WAIT_S) for answer in answers]
    assert len(encoder.made) == 1
    assert all(one is encoder.made[0] for one in got)


def test_a_failure_goes_to_all_who_wait_and_is_forgotten(ask):
    go_on = threading.Event()

    def fail(_pause) -> Embedding:
        assert go_on.wait(WAIT_S)
        raise ValueError("no picture")

    answers = [ask("a", fail) for _ in range(4)]
    go_on.set()
    for answer in answers:
        with pytest.raises(ValueError, match="no picture"):
            answer.result(WAIT_S)
    encoder = Encoder(total=0)
    assert ask("a", encoder).result(WAIT_S) is encoder.made[0]


def test_drawings_are_encoded_one_after_the_other_in_their_order(ask):
    first, names = Encoder(), []
    answers = [ask("first", first)]
    answers += [ask(name, order_of(names)(name)) for name in ("a", "b", "c")]
    assert stays(lambda: names == [])
    first.steps.release()
    for answer in answers:
        answer.result(WAIT_S)
    assert names == ["a", "b", "c"]


def test_the_background_takes_the_most_urgent_first(ask):
    first, names = Encoder(), []
    answers = [ask("first", first, NEIGHBOUR)]
    assert first.begun.wait(WAIT_S)
    for name, priority in (("n", NEIGHBOUR), ("o", OPENED), ("b1", BATCH), ("b2", BATCH)):
        answers.append(ask(name, order_of(names)(name), priority))
    first.steps.release()
    for answer in answers:
        answer.result(WAIT_S)
    assert names == ["b1", "b2", "o", "n"]


@pytest.mark.parametrize("priority", [BATCH, OPENED, NEIGHBOUR])
def test_a_drawing_does_not_wait_for_the_background_which_waits_for_it(ask, priority):
    behind, drawing = Encoder(total=2), Encoder()
    background = ask("behind", behind, priority)
    behind.steps.release()
    until(lambda: behind.done == 1)

    answer = ask("drawing", drawing)
    behind.steps.release()
    assert drawing.begun.wait(WAIT_S)
    assert stays(lambda: behind.done == 1)
    drawing.steps.release()
    answer.result(WAIT_S)
    background.result(WAIT_S)
    assert behind.done == 2


def test_the_background_waits_while_something_is_decoded(ask, lanes):
    behind = Encoder(total=2)
    background = ask("behind", behind, OPENED)
    behind.steps.release()
    until(lambda: behind.done == 1)
    with lanes.decoding():
        with lanes.decoding():
            behind.steps.release()
        assert stays(lambda: behind.done == 1)
    background.result(WAIT_S)


def test_a_drawings_encode_lets_decodes_pass_but_not_forever(ask, lanes, monkeypatch):
    monkeypatch.setattr("ml_backend.lanes._COURTESY_S", 0.3)
    drawing = Encoder(total=3)
    drawing.steps.release(3)
    with lanes.decoding():
        answer = ask("drawing", drawing)
        assert stays(lambda: drawing.done == 0)
        answer.result(WAIT_S)


def test_a_drawing_takes_over_the_encode_that_has_begun_in_the_background(ask, lanes):
    encoder, other = Encoder(total=2), Encoder()
    background = ask("a", encoder, NEIGHBOUR)
    assert encoder.begun.wait(WAIT_S)
    drawings = [ask("other", other)]  # for which the background stands still
    encoder.steps.release(2)
    assert stays(lambda: encoder.done == 0)

    again = Encoder()
    drawings.append(ask("a", again))
    assert drawings[1].result(WAIT_S) is background.result(WAIT_S) is encoder.made[0]
    assert not again.begun.is_set()
    assert not drawings[0].done()
    other.steps.release()
    drawings[0].result(WAIT_S)


def test_a_drawing_takes_over_the_encode_that_waits_in_the_background(ask):
    behind, wanted = Encoder(), Encoder(total=0)
    background = ask("behind", behind, OPENED)
    assert behind.begun.wait(WAIT_S)
    waiting = ask("a", wanted, NEIGHBOUR, is_wanted=lambda: False)
    assert ask("a", Encoder()).result(WAIT_S) is waiting.result(WAIT_S) is wanted.made[0]
    assert wanted.thread == "encode"
    behind.steps.release()
    background.result(WAIT_S)


def test_a_neighbour_that_nobody_wants_any_more_is_not_begun(ask):
    behind, unwanted, wanted = Encoder(), Encoder(), Encoder(total=0)
    is_wanted = threading.Event()
    is_wanted.set()
    answers = [ask("behind", behind, OPENED)]
    assert behind.begun.wait(WAIT_S)
    dropped = ask("a", unwanted, NEIGHBOUR, is_wanted=is_wanted.is_set)
    answers.append(ask("b", wanted, NEIGHBOUR))
    # What a batch wants, too, is made in any case.
    for priority in (NEIGHBOUR, BATCH):
        answers.append(ask("c", Encoder(total=0), priority, is_wanted=is_wanted.is_set))
    is_wanted.clear()
    behind.steps.release()
    for answer in answers:
        answer.result(WAIT_S)
    with pytest.raises(EncodeAbandonedError):
        dropped.result(WAIT_S)
    assert not unwanted.begun.is_set()


def test_it_is_kept_when_those_who_wait_have_it(ask):
    kept, answered = [], threading.Event()

    def keep(made) -> None:
        assert answered.wait(WAIT_S)
        kept.append(made)

    encoder = Encoder(total=0)
    made = ask("a", encoder, keep=keep).result(WAIT_S)
    answered.set()
    until(lambda: kept == [made])


def test_what_cannot_be_kept_is_logged_and_the_lane_goes_on(ask, caplog):
    def fail(_made) -> None:
        raise RuntimeError("no room")

    for name in ("a", "b"):
        ask(name, Encoder(total=0), keep=fail).result(WAIT_S)
    until(lambda: caplog.text.count("could not be kept") == 2)


def test_closing_finishes_a_drawings_encode_and_abandons_the_rest(ask, lanes):
    drawing, behind = Encoder(), Encoder(total=2)
    background = ask("behind", behind, BATCH)
    assert behind.begun.wait(WAIT_S)
    answer = ask("drawing", drawing)
    assert drawing.begun.wait(WAIT_S)
    waiting = [ask("a", Encoder()), ask("b", Encoder(), BATCH)]
    closing = threading.Thread(target=lanes.close)
    closing.start()
    behind.steps.release()
    for abandoned in (*waiting, background):
        with pytest.raises(EncodeAbandonedError, match="try again shortly"):
            abandoned.result(WAIT_S)
    assert behind.done == 0
    drawing.steps.release()
    assert answer.result(WAIT_S) is drawing.made[0]
    closing.join(WAIT_S)
    with pytest.raises(EncodeAbandonedError):
        lanes.run(EmbeddingKey("a", "weights"), Encoder(), priority=DRAWING)
