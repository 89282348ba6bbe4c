import gc
import os
import threading
import weakref

import numpy as np
import pytest

from ml_backend.embeddings import EmbeddingKey, EmbeddingStore
from ml_backend.engine import Engine
from ml_backend.errors import OverloadedError
from ml_backend.images import LoadedImage
from ml_backend.lanes import Priority
from sam_ext.errors import PromptError
from sam_ext.interactive import CropPolicy
from sam_ext.predictor import Crop, Embedding, ObjectPrompt, Predictor
from sam_ext.prompt_free import answer_prompt_free
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

    def embed(self, image, *, crop=None, pause=lambda: None) -> Embedding:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.encoding.release()
        assert self.go_on.acquire(timeout=WAIT_S)
        try:
            self.encoded += 1
            return super().embed(image, crop=crop, pause=pause)
        finally:
            self.running -= 1


class CountingPredictor(Predictor):
    """Says which parts of images it has encoded, and answers as its parent does."""

    def __init__(self, sam) -> None:
        super().__init__(sam)
        self.crops: list[Crop | None] = []

    def embed(self, image, *, crop=None, pause=None) -> Embedding:
        self.crops.append(crop)
        return super().embed(image, crop=crop, pause=pause)


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

    def make(*, cache_bytes=2**24, max_waiting: int = 4, **options) -> Engine:
        engines.append(Engine(cache_bytes=cache_bytes, max_waiting=max_waiting, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def test_answers_as_the_predictor_does(small_sam, make_engine):
    predictor = Predictor(small_sam)
    got = make_engine().answer(predictor, image(1), [POINT, BOX])
    expected = predictor.decode(predictor.embed(pixels(1)), [POINT, BOX])
    for prompt, one, other in zip([POINT, BOX], got, expected, strict=True):
        np.testing.assert_array_equal(one.mask, other.masks[other.best(prompt)])
        assert one.iou_prediction == other.iou_predictions[other.best(prompt)]


def test_a_known_image_is_neither_decoded_nor_encoded_again(small_sam, make_engine):
    predictor = Predictor(small_sam)
    engine = make_engine()

    def fail() -> np.ndarray:
        raise AssertionError("the pixels were asked for")

    first = engine.embed(predictor, image(1))
    assert engine.embed(predictor, image(1, decode=fail)) is first


def test_an_image_that_does_not_decode_is_asked_again_the_next_time(small_sam, make_engine):
    predictor = Predictor(small_sam)
    engine = make_engine()

    def fail() -> np.ndarray:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        engine.embed(predictor, image(1, decode=fail))
    assert engine.embed(predictor, image(1)).original_size == (40, 56)


def test_what_is_no_prompt_is_said_to_the_caller(small_sam, make_engine):
    predictor = Predictor(small_sam)
    engine = make_engine()
    prompt = ObjectPrompt(
        point_coords=np.empty((0, 2)), point_labels=np.empty(0), mask_input=np.zeros((3, 3))
    )
    with pytest.raises(PromptError, match="mask_input"):
        engine.answer(predictor, image(1), [prompt])


def test_a_drawing_on_a_known_image_passes_by_an_encode(small_sam, make_engine):
    predictor = SteppedPredictor(small_sam)
    engine = make_engine()
    predictor.go_on.release()
    engine.embed(predictor, image(1))
    assert predictor.encoding.acquire(timeout=WAIT_S)
    other = threading.Thread(target=engine.embed, args=(predictor, image(2)))
    other.start()
    assert predictor.encoding.acquire(timeout=WAIT_S)  # it encodes now, and waits there

    (answer,) = engine.answer(predictor, image(1), [BOX])
    assert answer.mask.shape == (40, 56)
    assert predictor.encoded == 1
    predictor.go_on.release()
    other.join(WAIT_S)
    assert predictor.encoded == 2


def test_a_drawing_never_waits_for_prefetching(small_sam, make_engine):
    predictor = SteppedPredictor(small_sam)
    engine = make_engine()
    prefetch = threading.Thread(
        target=engine.embed,
        args=(predictor, image(1)),
        kwargs={"priority": Priority.NEIGHBOUR},
    )
    prefetch.start()
    assert predictor.encoding.acquire(timeout=WAIT_S)
    drawing = threading.Thread(target=engine.answer, args=(predictor, image(2), [BOX]))
    drawing.start()
    assert predictor.encoding.acquire(timeout=WAIT_S)
    # Whichever of the two goes on first, it can only be the drawing's that gets to its end.
    predictor.go_on.release(2)
    drawing.join(WAIT_S)
    prefetch.join(WAIT_S)
    assert not drawing.is_alive()
    assert predictor.most_running == 2


def test_images_are_encoded_one_after_the_other(small_sam, make_engine):
    predictor = SteppedPredictor(small_sam)
    engine = make_engine()
    threads = [
        threading.Thread(target=engine.embed, args=(predictor, image(seed))) for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    predictor.go_on.release(len(threads))
    for thread in threads:
        thread.join(WAIT_S)
    assert (predictor.encoded, predictor.most_running) == (4, 1)


def test_a_full_queue_says_so_and_when_to_come_back(make_engine):
    engine = make_engine(max_waiting=2)
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


def test_a_place_is_given_back_after_a_failure(make_engine):
    engine = make_engine(max_waiting=1)
    with pytest.raises(ZeroDivisionError), engine.admitted():
        1 / 0  # noqa: B018
    assert engine.waiting == 0


def test_automatic_masks_are_those_of_the_image(small_sam, make_engine):
    predictor = Predictor(make_sure_of_itself(small_sam))
    engine = make_engine()
    found = engine.automatic_masks(predictor, engine.embed(predictor, image(1)))
    assert found
    assert {one.mask.shape for one in found} == {(40, 56)}


def test_what_is_found_without_prompts_is_the_images(small_sam, make_engine):
    predictor, engine = Predictor(small_sam), make_engine()
    embedding = engine.embed(predictor, image(1))
    found = engine.prompt_free_masks(predictor, embedding)
    expected = answer_prompt_free(predictor, embedding).instances
    assert [one.area_px for one in found] == [one.area_px for one in expected] != []
    assert found[0].mask.shape == (40, 56)


@pytest.mark.parametrize("kind", ["drawn", "automatic", "prompt-free"])
def test_batches_stand_still_while_somebody_draws(small_sam, make_engine, kind):
    options = {"points_per_side": 1}  # so that it would be done in no time
    predictor = Predictor(make_sure_of_itself(small_sam))
    engine = make_engine(automatic_options=options)
    embedding = engine.embed(predictor, image(1))
    done = threading.Event()

    def batch() -> None:
        if kind == "automatic":
            engine.automatic_masks(predictor, embedding)
        elif kind == "prompt-free":
            engine.prompt_free_masks(predictor, embedding)
        else:
            engine.answer(predictor, image(1), [BOX], priority=Priority.BATCH)
        done.set()

    thread = threading.Thread(target=batch)
    with engine._lanes.decoding():
        thread.start()
        engine.answer(predictor, image(1), [BOX])
        assert not done.wait(0.2)
    thread.join(WAIT_S)
    assert done.is_set()


SMALL_BOX = ObjectPrompt(
    point_coords=np.empty((0, 2)),
    point_labels=np.empty(0, np.int64),
    box_xyxy=np.array([4.0, 6.0, 10.0, 12.0]),
)
CROPS = CropPolicy(min_object_px=16, min_side=24)


def test_a_small_object_is_looked_at_in_a_crop_that_is_kept_like_an_image(
    small_sam, make_engine, tmp_path
):
    predictor = CountingPredictor(small_sam)
    for _ in range(2):  # the second one finds it on disk
        store = EmbeddingStore(tmp_path, max_bytes=2**24)
        engine = make_engine(store=store, crops=CROPS)
        answers = [engine.answer(predictor, image(1), [SMALL_BOX])[0] for _ in range(2)]
        assert [answer.crop for answer in answers] == predictor.crops * 2
        engine.close()
    (crop,) = predictor.crops
    assert crop is not None


def test_without_crops_it_is_looked_at_in_the_whole_image(small_sam, make_engine):
    predictor = CountingPredictor(small_sam)
    make_engine().answer(predictor, image(1), [SMALL_BOX])
    assert predictor.crops == [None]


def test_after_a_restart_the_answer_is_the_same_and_nothing_is_encoded(
    small_sam, make_engine, tmp_path
):
    predictor = Predictor(small_sam)
    engine = make_engine(store=EmbeddingStore(tmp_path, max_bytes=2**24))
    (before,) = engine.answer(predictor, image(1), [POINT])
    engine.close()  # which waits until it is written

    def fail() -> np.ndarray:
        raise AssertionError("the pixels were asked for")

    predictor = CountingPredictor(small_sam)
    engine = make_engine(store=EmbeddingStore(tmp_path, max_bytes=2**24))
    (after,) = engine.answer(predictor, image(1, decode=fail), [POINT])
    assert predictor.crops == []
    np.testing.assert_array_equal(after.candidates.low_res_logits, before.candidates.low_res_logits)
    np.testing.assert_array_equal(after.mask, before.mask)


def test_an_image_on_disk_does_not_wait_for_an_encode(small_sam, make_engine, tmp_path):
    store = EmbeddingStore(tmp_path, max_bytes=2**24)
    predictor = Predictor(small_sam)
    engine = make_engine(store=store)
    engine.embed(predictor, image(1))
    engine.close()
    predictor = SteppedPredictor(small_sam)
    engine = make_engine(store=store)
    other = threading.Thread(target=engine.embed, args=(predictor, image(2)))
    other.start()
    assert predictor.encoding.acquire(timeout=WAIT_S)
    engine.answer(predictor, image(1), [BOX])
    assert predictor.encoded == 0
    predictor.go_on.release()
    other.join(WAIT_S)


def test_what_others_have_put_on_disk_while_it_waited_is_not_encoded(
    small_sam, make_engine, tmp_path
):
    predictor = SteppedPredictor(small_sam)
    store = EmbeddingStore(tmp_path, max_bytes=2**24)
    engine = make_engine(store=store)
    threads = [
        threading.Thread(target=engine.embed, args=(predictor, image(seed))) for seed in (1, 2)
    ]
    threads[0].start()
    assert predictor.encoding.acquire(timeout=WAIT_S)
    threads[1].start()
    key = EmbeddingKey("hash 2", predictor.embedding_fingerprint)
    while key not in engine._lanes._jobs:
        pass
    store.write(key, Predictor(small_sam).embed(pixels(2)))
    predictor.go_on.release()
    for thread in threads:
        thread.join(WAIT_S)
    assert predictor.encoded == 1


def test_what_is_used_from_memory_stays_on_disk_too(small_sam, make_engine, tmp_path):
    predictor = Predictor(small_sam)
    store = EmbeddingStore(tmp_path, max_bytes=2**24)
    engine = make_engine(store=store)
    engine.embed(predictor, image(1))
    key = EmbeddingKey("hash 1", predictor.embedding_fingerprint)
    while key not in store:
        pass
    (path,) = tmp_path.iterdir()
    os.utime(path, (0, 0))
    engine.embed(predictor, image(1))
    assert path.stat().st_mtime > 0


def test_without_memory_or_disk_it_still_answers(small_sam, make_engine, tmp_path):
    (tmp_path / "file").touch()
    store = EmbeddingStore(tmp_path / "file", max_bytes=2**24)
    predictor = Predictor(small_sam)
    engine = make_engine(cache_bytes=0, store=store)
    for _ in range(2):
        assert engine.answer(predictor, image(1), [BOX])[0].mask.shape == (40, 56)


def test_nothing_is_held_on_to_beyond_the_caches_bounds(small_sam, make_engine, tmp_path):
    predictor = CountingPredictor(small_sam)
    one = predictor.embed(pixels(0)).nbytes
    store = EmbeddingStore(tmp_path, max_bytes=20 * one)
    engine = make_engine(cache_bytes=4 * one, store=store, crops=CROPS)
    made = []
    for seed in range(40):
        loaded = image(seed)
        answers = engine.answer(predictor, loaded, [POINT, SMALL_BOX])
        made += [weakref.ref(each) for each in (loaded, loaded.pixels, *answers)]
        made += [
            weakref.ref(engine.embed(predictor, loaded, crop=answer.crop)) for answer in answers
        ]
    del loaded, answers
    gc.collect()
    assert len(predictor.crops) == 1 + 40 * 2
    assert len([each for each in made if each() is not None]) == 4
    assert engine.embeddings.nbytes == 4 * one
    assert engine._lanes._jobs == {}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 20 * one
