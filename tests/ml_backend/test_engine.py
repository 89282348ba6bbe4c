import threading

import numpy as np
import pytest

from ml_backend.engine import Engine
from ml_backend.errors import OverloadedError
from ml_backend.images import LoadedImage
from sam_ext.errors import PromptError
from sam_ext.predictor import Embedding, ObjectPrompt, Predictor
from tests.ml_backend.backend import make_sure_of_itself

WAIT_S = 20
POINT = ObjectPrompt(point_coords=np.array([[20.5, 30.0]]), point_labels=np.array([1]))
BOX = ObjectPrompt(
    point_coords=np.empty((0, 2)),
    point_labels=np.empty(0, np.int64),
    box_xyxy=np.array([4.0, 6.0, 50.0, 33.0]),
)


class SteppedPredictor(Predictor):
    """Encodes only as far as a test lets it; says how many encode at the same time."""

    def __init__(self, sam) -> None:
        super().__init__(sam)
        self.encoding = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)
        self.running = self.most_running = self.encoded = 0

    def embed(self, image) -> Embedding:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.encoding.release()
        assert self.go_on.acquire(timeout=WAIT_S)
        try:
            self.encoded += 1
            return super().embed(image)
        finally:
            self.running -= 1


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 56, 3), np.uint8)


def image(seed: int, decode=None) -> LoadedImage:
    return LoadedImage(
        uri=f"/{seed}.png",
        content_hash=f"hash {seed}",
        size_hw=(40, 56),
        pixels=decode or (lambda: pixels(seed)),
    )


@pytest.fixture
def make_engine():
    engines = []

    def make(predictor: Predictor, *, max_waiting: int = 4) -> Engine:
        engines.append(Engine(predictor, cache_bytes=2**24, max_waiting=max_waiting))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def test_answers_as_the_predictor_does(small_sam, make_engine):
    predictor = Predictor(small_sam)
    engine = make_engine(predictor)
    got = engine.masks(engine.embed(image(1)), [POINT, BOX])
    expected = predictor.decode(predictor.embed(pixels(1)), [POINT, BOX])
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one.masks, other.masks)
        np.testing.assert_array_equal(one.iou_predictions, other.iou_predictions)


def test_a_known_image_is_neither_decoded_nor_encoded_again(small_sam, make_engine):
    engine = make_engine(Predictor(small_sam))

    def fail() -> np.ndarray:
        raise AssertionError("the pixels were asked for")

    first = engine.embed(image(1))
    assert engine.embed(image(1, decode=fail)) is first


def test_an_image_that_does_not_decode_is_asked_again_the_next_time(small_sam, make_engine):
    engine = make_engine(Predictor(small_sam))

    def fail() -> np.ndarray:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        engine.embed(image(1, decode=fail))
    assert engine.embed(image(1)).original_size == (40, 56)


def test_what_is_no_prompt_is_said_to_the_caller(small_sam, make_engine):
    engine = make_engine(Predictor(small_sam))
    prompt = ObjectPrompt(
        point_coords=np.empty((0, 2)), point_labels=np.empty(0), mask_input=np.zeros((3, 3))
    )
    with pytest.raises(PromptError, match="mask_input"):
        engine.masks(engine.embed(image(1)), [prompt])


def test_a_drawing_on_a_known_image_passes_by_an_encode(small_sam, make_engine):
    predictor = SteppedPredictor(small_sam)
    engine = make_engine(predictor)
    predictor.go_on.release()
    known = engine.embed(image(1))
    assert predictor.encoding.acquire(timeout=WAIT_S)
    other = threading.Thread(target=engine.embed, args=(image(2),))
    other.start()
    assert predictor.encoding.acquire(timeout=WAIT_S)  # it encodes now, and waits there

    (answer,) = engine.masks(known, [BOX])
    assert answer.masks.shape == (1, 40, 56)
    assert predictor.encoded == 1
    predictor.go_on.release()
    other.join(WAIT_S)
    assert predictor.encoded == 2


def test_images_are_encoded_one_after_the_other(small_sam, make_engine):
    predictor = SteppedPredictor(small_sam)
    engine = make_engine(predictor)
    threads = [threading.Thread(target=engine.embed, args=(image(seed),)) for seed in range(4)]
    for thread in threads:
        thread.start()
    predictor.go_on.release(len(threads))
    for thread in threads:
        thread.join(WAIT_S)
    assert (predictor.encoded, predictor.most_running) == (4, 1)


def test_a_full_queue_says_so_and_when_to_come_back(small_sam, make_engine):
    engine = make_engine(Predictor(small_sam), max_waiting=2)
    with engine.admitted():
        with engine.admitted():
            assert engine.waiting == 2
            with pytest.raises(OverloadedError) as caught, engine.admitted():
                pass
        with engine.admitted():
            pass
    assert engine.waiting == 0
    assert (caught.value.status, caught.value.retry_after_s) == (503, 5)
    assert str(caught.value) == (
        "predictions under way must be at most 2, got one more; try again shortly, or raise "
        "WORKERS or THREADS"
    )


def test_a_place_is_given_back_after_a_failure(small_sam, make_engine):
    engine = make_engine(Predictor(small_sam), max_waiting=1)
    with pytest.raises(ZeroDivisionError), engine.admitted():
        1 / 0  # noqa: B018
    assert engine.waiting == 0


def test_automatic_masks_are_those_of_the_image(small_sam, make_engine):
    engine = make_engine(Predictor(make_sure_of_itself(small_sam)))
    found = engine.automatic_masks(engine.embed(image(1)))
    assert found
    assert {one.mask.shape for one in found} == {(40, 56)}
