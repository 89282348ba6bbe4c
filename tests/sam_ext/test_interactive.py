import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from sam_ext.errors import ConfigError
from sam_ext.interactive import CropPolicy, LogitsMemo, answer_prompts, default_crops
from sam_ext.predictor import Crop, Embedding, ObjectMasks, ObjectPrompt, Predictor
from sam_ext.resolution import default_policy

IMAGE_HW = (300, 500)
CROPS = CropPolicy(min_object_px=8, context=4, min_side=32)  # 8 px of 64 are 62.5 px of the image


def prompt(points=(), labels=None, box=None, mask=None):
    return ObjectPrompt(
        point_coords=np.array(points, np.float64).reshape(-1, 2),
        point_labels=np.array([1] * len(points) if labels is None else labels, np.int64),
        box_xyxy=None if box is None else np.array(box, np.float64),
        mask_input=mask,
    )


def filled(x0, y0, x1, y1):
    mask = np.zeros(IMAGE_HW, np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


class Painter:
    """A model whose answers are painted: `masks(crop, prompt)` gives them; it writes down calls."""

    def __init__(self, masks, scores=(0.9,)):
        self.masks, self.scores = masks, scores
        self.encoded, self.decoded = [], []
        self.embeddings = {}

    def embed(self, crop):
        self.encoded.append(crop)
        if crop not in self.embeddings:
            self.embeddings[crop] = Embedding(
                image_embeddings=torch.zeros(1, 1, 1, 1),
                original_size=IMAGE_HW,
                input_size=(16, 16),
                padded_size=(16, 16),
                crop=crop,
            )
        return self.embeddings[crop]

    def decode(self, embedding, prompts, *, multimask_output=None):
        self.decoded.append((embedding.crop, list(prompts), multimask_output))
        answers = []
        for one in prompts:
            several = one.is_single_point if multimask_output is None else multimask_output
            masks = self.masks(embedding.crop, one)
            masks = masks[1:] if several and len(masks) > 1 else masks[:1]
            x0, y0, x1, y1 = embedding.region
            shown = np.zeros(IMAGE_HW, np.bool_)
            shown[y0:y1, x0:x1] = True
            answers.append(
                ObjectMasks(
                    masks=np.stack(masks) & shown,
                    iou_predictions=np.array(self.scores[-len(masks) :], np.float32),
                    low_res_logits=np.arange(len(masks), dtype=np.float32)[:, None, None]
                    + len(self.decoded),
                )
            )
        return answers


@pytest.fixture
def predictor(small_sam):
    return Predictor(small_sam)  # 64 px: the policy and the side are what counts here


def ask(predictor, painter, prompts, **options):
    options = {"crops": CROPS, "refine": True, **options}
    return answer_prompts(
        predictor,
        prompts,
        image_hw=IMAGE_HW,
        embed=painter.embed,
        decode=painter.decode,
        **options,
    )


@pytest.mark.parametrize(
    ("box", "longer_than", "crop"),
    [
        pytest.param([200, 100, 208, 104], 0, Crop(192, 80, 224, 112), id="the smallest"),
        pytest.param([200, 100, 209, 104], 0, Crop(160, 64, 224, 128), id="a pixel longer"),
        pytest.param([203, 106, 211, 110], 0, Crop(192, 96, 224, 128), id="shares along x"),
        pytest.param([0, 0, 8, 8], 0, Crop(0, 0, 32, 32), id="first corner"),
        pytest.param([492, 293, 500, 300], 0, Crop(468, 268, 500, 300), id="last corner"),
        pytest.param([200, 100, 208, 104], 32, Crop(160, 64, 224, 128), id="grown"),
        pytest.param([200, 100, 280, 104], 0, Crop(0, 0, 500, 300), id="image is shorter"),
        pytest.param([200, 100, 270, 104], 0, Crop(0, 0, 500, 300), id="image is shorter"),
        pytest.param([200.5, 9.5, 200.5, 9.5], 0, Crop(192, 0, 224, 32), id="a point"),
    ],
)
def test_crops_lie_on_a_lattice(box, longer_than, crop):
    got = CROPS.crop(np.array(box, np.float64), IMAGE_HW, longer_than=longer_than)
    assert got == (None if crop == Crop(0, 0, 500, 300) else crop)


def test_an_axis_shorter_than_the_side_is_cut_off():
    assert CROPS.crop(np.array([700.0, 10, 720, 40]), (70, 999)) == Crop(640, 0, 768, 70)


def test_a_crop_always_holds_the_object_and_is_shared():
    rng = np.random.default_rng(0)
    policy = CropPolicy(min_object_px=1, context=2, min_side=32)
    sides = set()
    for _ in range(500):
        size = rng.uniform(0, 100, 2)
        corner = rng.uniform(0, 1, 2) * (np.array(IMAGE_HW[::-1]) - size)
        box = np.concatenate([corner, corner + size])
        crop = policy.crop(box, IMAGE_HW)
        assert crop is not None
        side = max(crop.size)
        assert side >= 2 * size.max()
        assert side / 2 < 2 * size.max() or side == 32
        assert (np.array(crop[:2]) <= box[:2]).all()
        assert (box[2:] <= crop[2:]).all()
        sides.add(crop)
    # A row of crops for every half side, moved inwards at the end: 31 x 18 + 15 x 9 + 7 x 4 + 3 x 2
    assert len(sides) < 31 * 18 + 15 * 9 + 7 * 4 + 3 * 2


def test_a_small_box_is_asked_in_its_crop_alone_and_a_large_one_on_the_whole(predictor):
    painter = Painter(lambda crop, one: [filled(*one.box_xyxy.astype(int))])
    small, large = prompt(box=[100, 50, 120, 60]), prompt(box=[100, 50, 163, 60])
    got = ask(predictor, painter, [large, small, large])
    assert painter.encoded == [None, Crop(64, 0, 192, 128)]
    assert [answer.crop for answer in got] == [None, Crop(64, 0, 192, 128), None]
    np.testing.assert_array_equal(got[1].mask, filled(100, 50, 120, 60))
    assert got[1].iou_prediction == pytest.approx(0.9)
    assert [len(prompts) for _, prompts, _ in painter.decoded] == [2, 1]  # in batches


def test_a_crop_that_shows_little_more_is_not_worth_an_encode(predictor):
    painter = Painter(lambda crop, one: [filled(*one.box_xyxy.astype(int))])
    crops = CropPolicy(min_object_px=64, context=2, min_side=32)
    [answer] = ask(predictor, painter, [prompt(box=[100, 50, 200, 60])], crops=crops)
    assert answer.crop == Crop(0, 0, 256, 256)  # 1.95 times as large
    crops = CropPolicy(min_object_px=64, context=2, min_side=400)
    [answer] = ask(predictor, painter, [prompt(box=[100, 50, 200, 60])], crops=crops)
    assert answer.crop is None  # 1.25 times


def test_a_point_is_asked_again_in_crops_that_grow_until_the_mask_fits(predictor):
    def masks(crop, one):
        return [filled(240, 140, 250, 150) if crop is None else filled(230, 130, 290, 150)]

    painter = Painter(masks)
    [answer] = ask(predictor, painter, [prompt([[245, 145]])])
    assert painter.encoded == [None, Crop(224, 128, 288, 192), Crop(128, 0, 384, 256)]
    np.testing.assert_array_equal(answer.mask, filled(230, 130, 290, 150))


def test_a_mask_at_the_images_own_edge_is_not_cut_off(predictor):
    painter = Painter(lambda crop, one: [filled(0, 290, 9, 300)])
    [answer] = ask(predictor, painter, [prompt([[3, 295]])])
    assert painter.encoded == [None, Crop(0, 236, 64, 300)]
    assert answer.crop == Crop(0, 236, 64, 300)


@pytest.mark.parametrize(
    "reach",
    [(-1, 0, 0, 0), (0, -1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)],
    ids=["left", "top", "right", "bottom"],
)
def test_each_inner_edge_cuts_off(predictor, reach):
    x0, y0, x1, y1 = np.array([240, 140, 250, 150]) + 50 * np.array(reach)

    def masks(crop, one):
        return [filled(240, 140, 250, 150) if crop is None else filled(x0, y0, x1, y1)]

    painter = Painter(masks)
    ask(predictor, painter, [prompt([[245, 145]])])
    assert painter.encoded[1] == Crop(224, 128, 288, 192)
    assert len(painter.encoded) > 2


def test_a_mask_that_outgrows_all_crops_is_the_whole_images(predictor):
    def masks(crop, one):
        return [filled(240, 140, 250, 150) if crop is None else filled(0, 0, 500, 300)]

    painter = Painter(masks)
    [answer] = ask(predictor, painter, [prompt([[245, 145]])])
    assert answer.crop is None
    np.testing.assert_array_equal(answer.mask, filled(240, 140, 250, 150))


def test_a_crop_holds_all_points(predictor):
    painter = Painter(lambda crop, one: [filled(240, 140, 250, 150)])
    points = [[245, 145], [300, 145]]
    [answer] = ask(predictor, painter, [prompt(points, [1, 0])])
    assert answer.crop == Crop(128, 0, 384, 256)
    far = prompt([[245, 145], [20, 20]], [1, 0])
    assert ask(predictor, painter, [far])[0].crop is None


def test_an_empty_mask_is_looked_for_around_the_point(predictor):
    painter = Painter(lambda crop, one: [filled(0, 0, 0, 0)])
    [answer] = ask(predictor, painter, [prompt([[245, 145]])])
    assert answer.crop == Crop(224, 128, 256, 160)
    assert answer.mask.sum() == 0


def test_without_crops_and_with_a_mask_everything_is_asked_on_the_whole(predictor):
    painter = Painter(lambda crop, one: [filled(100, 50, 110, 60)])
    prompts = [prompt(box=[100, 50, 110, 60]), prompt([[105, 55]])]
    assert [a.crop for a in ask(predictor, painter, prompts, crops=None)] == [None, None]
    mask = np.zeros((1, 1), np.float32)
    with_mask = [prompt([[105, 55]], mask=mask), prompt(box=[100, 50, 110, 60], mask=mask)]
    assert [a.crop for a in ask(predictor, painter, with_mask)] == [None, None]
    assert ask(predictor, painter, []) == []


def test_each_click_continues_from_the_answer_before(predictor):
    painter = Painter(lambda crop, one: [filled(0, 0, 400, 300)] * 3, scores=(0.3, 0.4))
    points = [[50, 50], [80, 90], [20, 30]]
    ask(predictor, painter, [prompt(points), prompt(points[:1], box=[0, 0, 400, 300])])
    asked = [
        [(len(one.point_coords), one.box_xyxy is None, one.mask_input) for one in prompts]
        for _, prompts, _ in painter.decoded
    ]
    assert asked == [
        [(1, True, None), (0, False, None)],
        [(2, True, [[2.0]]), (1, False, [[1.0]])],  # the second of two masks, in the first call
        [(3, True, [[2.0]])],
    ]
    painter.decoded.clear()
    ask(predictor, painter, [prompt(points)], refine=False)
    [(_, [one], _)] = painter.decoded
    assert (len(one.point_coords), one.mask_input) == (3, None)


def test_a_memo_saves_the_clicks_before_and_changes_nothing(small_sam):
    predictor = Predictor(small_sam)
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    embedding, memo, calls = predictor.embed(image), LogitsMemo(), []

    def decode(*arguments, **options):
        calls.append(len(arguments[1]))
        return predictor.decode(*arguments, **options)

    def answer(one, memo, embedding=embedding):
        [got] = answer_prompts(
            predictor,
            [one],
            image_hw=(40, 60),
            embed=lambda crop: embedding,
            decode=decode,
            refine=True,
            memo=memo,
        )
        return got

    points = [[10, 20], [30, 30], [50, 5], [44, 12]]
    for count in range(1, 5):
        one = prompt(points[:count], [1] * count)
        calls.clear()
        got = answer(one, memo)
        assert sum(calls) <= 2  # the click, and other masks where its own disagrees with a point
        wanted = answer(one, None)
        np.testing.assert_array_equal(got.mask, wanted.mask)
        np.testing.assert_array_equal(
            got.candidates.low_res_logits, wanted.candidates.low_res_logits
        )
    calls.clear()
    answer(prompt(points[:3], [1, 0, 1]), memo)  # other labels share the first click alone
    assert sum(calls) >= 2
    calls.clear()
    answer(prompt(points[:3]), memo, predictor.embed(image))  # another embedding shares nothing
    assert sum(calls) >= 3


def test_a_memo_is_bounded_and_keeps_no_embedding_alive():
    painter = Painter(None)
    memo = LogitsMemo(max_entries=2)
    embedding = painter.embed(None)
    clicks = [prompt([[x, 1]]) for x in range(3)]
    for x, click in enumerate(clicks):
        memo.put(embedding, click, np.full((1, 1), x, np.float32))
        memo.get(embedding, clicks[0])  # used last, so it stays
    assert [memo.get(embedding, click) for click in clicks] == [[[0.0]], None, [[2.0]]]
    painter.embeddings.clear()
    reference = weakref.ref(embedding)
    del embedding
    gc.collect()
    assert reference() is None


def test_threads_may_share_a_memo():
    memo, embedding = LogitsMemo(max_entries=4), Painter(None).embed(None)

    def work(first):
        for x in range(first, first + 500):
            click = prompt([[x % 7, 1]])
            memo.put(embedding, click, np.full((1, 1), x % 7, np.float32))
            assert memo.get(embedding, click) in (None, x % 7)

    failed = []
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    threading.excepthook, hook = failed.append, threading.excepthook
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threading.excepthook = hook
    assert not failed


@pytest.mark.parametrize(
    ("points", "labels", "chosen_score"),
    [
        pytest.param([[1, 1]], [1], 0.8, id="one point: highest score of the three"),
        pytest.param([[150, 1]], [1], 0.6, id="one point: only those that hold it"),
        pytest.param([[1, 1], [2, 2]], [1, 1], 0.5, id="two points: the single mask"),
        pytest.param([[1, 1], [150, 1]], [1, 1], 0.6, id="the single mask disagrees"),
        pytest.param([[1, 1], [150, 1]], [1, 0], 0.5, id="the single mask agrees"),
        pytest.param([[450, 1], [451, 1]], [1, 1], 0.5, id="none is better: the single mask"),
    ],
)
def test_the_mask_that_agrees_with_the_points_is_chosen(predictor, points, labels, chosen_score):
    widths = (100, 50, 100, 200)  # the single mask, then the three
    painter = Painter(
        lambda crop, one: [filled(0, 0, width, 300) for width in widths],
        scores=(0.5, 0.7, 0.8, 0.6),
    )
    painter.scores = {1: (0.5,), 3: (0.7, 0.8, 0.6)}
    decode = painter.decode

    def with_scores(embedding, prompts, *, multimask_output=None):
        scores = painter.scores
        one_or_three = multimask_output or prompts[0].is_single_point
        painter.scores = scores[3 if one_or_three else 1]
        try:
            return decode(embedding, prompts, multimask_output=multimask_output)
        finally:
            painter.scores = scores

    painter.decode = with_scores
    [answer] = ask(predictor, painter, [prompt(points, labels)], crops=None, refine=False)
    assert answer.iou_prediction == pytest.approx(chosen_score)


def test_clicks_in_a_row_equal_segment_anythings(small_sam):
    """As its notebook does it: each answer's best logits are the next call's mask input."""
    image = np.random.default_rng(5).integers(0, 255, (40, 60, 3), np.uint8)
    points, labels = np.array([[10.0, 20.0], [30.0, 30.5], [50.0, 5.0]]), np.array([1, 0, 1])
    predictor, reference = Predictor(small_sam), SamPredictor(small_sam)
    embedding = predictor.embed(image)
    [answer] = answer_prompts(
        predictor,
        [prompt(points, labels)],
        image_hw=(40, 60),
        embed=lambda crop: embedding,
        refine=True,
    )

    reference.set_image(image)
    masks, scores, logits = reference.predict(points[:1], labels[:1])
    best = ObjectMasks(masks=masks, iou_predictions=scores, low_res_logits=logits).best(
        prompt(points[:1])
    )
    mask_input = logits[best : best + 1]
    for count in (2, 3):
        for multimask in (False, True):  # the three where the single one disagrees with a point
            masks, scores, logits = reference.predict(
                points[:count], labels[:count], mask_input=mask_input, multimask_output=multimask
            )
            got = ObjectMasks(masks=masks, iou_predictions=scores, low_res_logits=logits)
            one = prompt(points[:count], labels[:count])
            if not multimask:
                single = got
            elif got.agreeing(one).max() <= single.agreeing(one)[0]:
                got = single
        best = got.best(one)
        mask_input = got.low_res_logits[best : best + 1]
    np.testing.assert_allclose(
        answer.candidates.low_res_logits, got.low_res_logits, rtol=0, atol=1e-4
    )
    assert answer.chosen == best


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            {"min_object_px": 0},
            "CropPolicy.min_object_px must be above 0, got 0; give no CropPolicy to do without "
            "crops",
            id="never",
        ),
        pytest.param(
            {"min_object_px": 9, "context": 1.5},
            "CropPolicy.context must be at least 2, got 1.5",
            id="no surroundings",
        ),
        pytest.param(
            {"min_object_px": 9, "min_side": 1},
            "CropPolicy.min_side must be at least 2, got 1",
            id="no side",
        ),
    ],
)
def test_crops_that_could_not_hold_an_object_are_refused(arguments, message):
    with pytest.raises(ConfigError) as raised:
        CropPolicy(**arguments)
    assert str(raised.value) == message


def test_the_defaults_answer_as_the_predictor_does(small_sam):
    predictor = Predictor(small_sam)
    embedding = predictor.embed(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    prompts = [prompt([[10, 20]]), prompt([[10, 20], [30, 30]]), prompt(box=[5, 6, 12, 20])]
    got = answer_prompts(predictor, prompts, image_hw=(40, 60), embed=lambda crop: embedding)
    for one, answer, wanted in zip(prompts, got, predictor.decode(embedding, prompts), strict=True):
        if wanted.agreeing(one)[0] == len(one.point_coords) or one.is_single_point:
            np.testing.assert_array_equal(answer.mask, wanted.masks[wanted.best(one)])
    assert [answer.crop for answer in got] == [None] * 3


@pytest.mark.parametrize("train_side", [256, 1024])
def test_default_crops_show_a_seedling_in_a_field(train_side):
    """40 px of 3264."""
    policy, crops = default_policy(train_side), default_crops(train_side)
    scale = [
        max(policy.input_size(size, train_side=train_side)) / max(size)
        for size in ((2448, 3264), (crops.min_side, crops.min_side))
    ]
    assert 40 * scale[0] < crops.min_object_px
    assert scale[1] > 3 * scale[0]
    crop = crops.crop(np.array([1000.0, 700, 1040, 730]), (2448, 3264))
    assert crop is not None
    assert max(crop.size) <= 1024
