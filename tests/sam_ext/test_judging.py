from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sam_ext import judging
from sam_ext.errors import ConfigError
from sam_ext.interactive import CropPolicy, answer_prompts
from sam_ext.judging import judge
from sam_ext.labels import LabelledImage, LabelledObject
from sam_ext.metrics import iou
from sam_ext.predictor import Embedding, ObjectMasks, ObjectPrompt, Predictor
from sam_ext.resolution import ResolutionPolicy
from tests.conftest import build_small_sam

SIZE_HW = (40, 60)
PIXELS = np.random.default_rng(0).integers(0, 256, (*SIZE_HW, 3), np.uint8)


class Fixed:
    """A predictor whose masks are known: `mask_of` makes them from an object's number and prompt.

    Objects are told apart by the nearest of `centers`.
    """

    policy = ResolutionPolicy()
    image_size = 64

    def __init__(self, mask_of, centers):
        self.mask_of, self.centers = mask_of, np.array(centers, float)
        self.embedded = 0

    def embed(self, image, *, crop=None):
        self.embedded += 1
        return Embedding(
            image_embeddings=torch.zeros(1, 256, 4, 4),
            original_size=SIZE_HW,
            input_size=(43, 64),
            padded_size=(64, 64),
            crop=crop,
        )

    def decode(self, embedding, prompts, *, multimask_output=None):
        return [
            ObjectMasks(
                masks=self.mask_of(self._nearest(prompt), prompt)[None],
                iou_predictions=np.ones(1, np.float32),
                low_res_logits=np.zeros((1, 16, 16), np.float32),
            )
            for prompt in prompts
        ]

    def _nearest(self, prompt):
        box = prompt.box_xyxy
        at = prompt.point_coords[0] if box is None else (box[:2] + box[2:]) / 2
        return int(np.linalg.norm(self.centers - at, axis=1).argmin())


def rectangle(x0, y0, x1, y1):
    mask = np.zeros(SIZE_HW, bool)
    mask[y0:y1, x0:x1] = True
    return mask


TRUTHS = [rectangle(2 + 11 * i, 5, 10 + 11 * i, 35) for i in range(5)]
CENTERS = [(6 + 11 * i, 20) for i in range(5)]


def short(mask, rows):
    """A mask without its last rows."""
    cut = mask.copy()
    cut[35 - rows :] = False
    return cut


def answering(*rows):
    """A model that misses so many rows of each object."""
    return Fixed(lambda number, prompt: short(TRUTHS[number], rows[number % len(rows)]), CENTERS)


def judged(*objects, name="a"):
    return LabelledImage(name=name, read=lambda: PIXELS, objects=tuple(objects))


def known(number, *, label="cell", mask=False, box=False, points=()):
    y, x = np.nonzero(TRUTHS[number])
    edges = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1], float)
    return LabelledObject(
        label=label,
        mask=TRUTHS[number] if mask else None,
        box_xyxy=edges if box else None,
        point_coords=np.array([point[:2] for point in points], float).reshape(-1, 2),
        point_labels=np.array([point[2] for point in points], int),
    )


def decide(candidate, active, base, images=None, **options):
    if images is None:
        images = [judged(*(known(i, mask=True) for i in range(5)))]
    models = {"candidate": candidate, "active": active, "base": base}
    return judge(models, images, **({"crops": None, "margin": 0.01, "seed": 0} | options))


def value(judgement, model, prompt, label="all"):
    [found] = [
        row
        for row in judgement.rows
        if (row.model, row.prompt, row.label) == (model, prompt, label)
    ]
    return found


def test_a_better_candidate_is_promoted_and_everything_is_said():
    base = answering(6)
    judgement = decide(answering(3), base, base)
    assert judgement.promoted
    assert judgement.sentence == (
        "Promoted: the candidate reached 0.900 against 0.800 of the active and 0.800 of the base "
        "model, over 15 held-out answers."
    )
    assert judgement.means == pytest.approx({"candidate": 0.9, "active": 0.8, "base": 0.8})
    assert judgement.distance == pytest.approx(1 - 24 / 27)
    assert len(judgement.rows) == 3 * 3 * 2
    for prompt in ("tight box", "jittered box", "point"):
        row = value(judgement, "candidate", prompt)
        assert (row.measure, row.objects, row.value) == ("iou", 5, pytest.approx(0.9))
        assert value(judgement, "active", prompt, "cell").value == pytest.approx(0.8)


def test_a_model_that_is_active_and_base_is_measured_once():
    base = answering(6)
    decide(answering(3), base, base)
    assert base.embedded == 1


@pytest.mark.parametrize(
    ("candidate", "active", "base"),
    [
        pytest.param(5, 6, 6, id="less than the margin"),
        pytest.param(3, 3, 9, id="better than the base alone"),
        pytest.param(3, 9, 3, id="better than the active model alone"),
        pytest.param(9, 6, 6, id="worse"),
    ],
)
def test_no_gain_is_no_promotion(candidate, active, base):
    models = [answering(rows) for rows in (candidate, active, base)]
    judgement = decide(*models, margin=0.05)
    assert not judgement.promoted
    assert "no gain of 0.05" in judgement.sentence
    assert "Kept the active model" in judgement.sentence


@pytest.mark.parametrize(("copies", "promoted"), [(2, False), (1, True)])
def test_no_label_may_fall_if_it_has_enough_objects(copies, promoted):
    """Three objects improve and two fall; twice two are not few, and twice two are enough."""
    objects = [known(i, mask=True, label="grows" if i < 3 else "shrinks") for i in range(5)]
    images = [judged(*objects, name=str(i)) for i in range(3 if copies == 2 else 2)]
    judgement = decide(answering(0, 0, 0, 5, 5), answering(4), answering(4), images)
    assert judgement.promoted is promoted
    if not promoted:
        assert "fell from 0.867 to 0.833 on the label shrinks" in judgement.sentence


def test_a_fall_of_a_little_is_forgiven():
    objects = [known(i, mask=True, label="grows" if i < 3 else "shrinks") for i in range(5)]
    images = [judged(*objects, name=str(i)) for i in range(3)]
    base = Fixed(lambda number, prompt: short(TRUTHS[number], 4), CENTERS)

    def slightly_worse(number, prompt):
        mask = short(TRUTHS[number], 0 if number < 3 else 4)
        mask[5, 2 + 11 * number] &= number < 3
        return mask

    assert decide(Fixed(slightly_worse, CENTERS), base, base, images).promoted


def test_masks_that_have_collapsed_are_not_promoted_however_well_they_agree():
    """A drawn box cannot tell an object from a filled rectangle."""

    def cross(number, prompt):
        x0, y0 = 2 + 11 * number, 5
        return rectangle(x0, y0 + 14, x0 + 8, y0 + 17) | rectangle(x0 + 3, y0 + 1, x0 + 5, y0 + 29)

    base = Fixed(cross, CENTERS)
    images = [judged(*(known(i, box=True) for i in range(5)))]
    judgement = decide(answering(0), base, base, images)
    assert judgement.means["candidate"] == pytest.approx(1)
    assert judgement.distance > 0.6
    assert not judgement.promoted
    assert "looks like a collapse" in judgement.sentence


def test_drawn_boxes_are_held_against_the_answers_boxes():
    images = [judged(known(0, box=True), known(1, box=True))]
    judgement = decide(answering(3), answering(6), answering(6), images)
    assert judgement.promoted
    for prompt in ("jittered box", "point"):
        row = value(judgement, "candidate", prompt)
        assert (row.measure, row.objects, row.value) == ("box agreement", 2, pytest.approx(0.9))
    empty = Fixed(lambda number, prompt: np.zeros(SIZE_HW, bool), CENTERS)
    assert value(decide(empty, empty, empty, images), "base", "point").value == 0


def test_drawn_points_are_held_against_the_answers():
    """The first is asked with, the others are measured; one alone is both."""
    points = [(4, 10, 1), (5, 33, 1), (30, 20, 0), (70, 20, 0)]
    images = [judged(known(0, points=points), known(1, points=[(15, 10, 1)]))]
    asked = []

    def mask_of(number, prompt):
        asked.append(prompt.point_coords.tolist())
        return short(TRUTHS[number], 3)

    model = Fixed(mask_of, CENTERS)
    judgement = decide(model, model, model, images)
    row = value(judgement, "base", "point")
    assert (row.measure, row.objects) == ("point agreement", 2)
    assert row.value == pytest.approx((2 / 3 + 1) / 2)
    assert asked == [[[4.0, 10.0]], [[15.0, 10.0]]]


def test_all_models_get_the_same_jitter_which_follows_from_seed_and_name():
    def asked_for(seed, name):
        boxes = []

        def mask_of(number, prompt):
            if prompt.box_xyxy is not None:
                boxes.append(prompt.box_xyxy.tolist())
            return TRUTHS[number]

        models = [Fixed(mask_of, CENTERS) for _ in range(3)]
        decide(*models, [judged(known(2, mask=True), name=name)], seed=seed)
        assert boxes[:2] == boxes[2:4] == boxes[4:]
        return boxes[1]

    tight = [24.0, 5.0, 32.0, 35.0]
    jittered = asked_for(0, "a")
    assert jittered != tight
    np.testing.assert_allclose(jittered, tight, atol=30 * 0.2 * 1.01)
    assert asked_for(0, "a") == jittered
    assert asked_for(1, "a") != jittered
    assert asked_for(0, "b") != jittered


def test_without_objects_nothing_is_promoted():
    model = answering(0)
    judgement = decide(model, model, model, [judged(), judged(name="b")])
    assert not judgement.promoted
    assert judgement.rows == ()
    assert judgement.means == {}
    assert "no held-out image has an object" in judgement.sentence
    assert model.embedded == 0


def test_progress_is_told_image_by_image():
    told = []
    model = answering(0)
    images = [judged(known(0, box=True)), judged(name="b")]
    decide(model, model, model, images, on_progress=lambda *done: told.append(done))
    assert told == [(1, 2), (2, 2)]


def finding(sam, *numbers):
    """Let a model find some objects without a prompt."""
    sam.finds = np.logical_or.reduce([np.zeros(SIZE_HW, bool), *(TRUTHS[n] for n in numbers)])
    return sam


@pytest.fixture
def _found_by_itself(monkeypatch):
    def answer(model, embedding):
        assert embedding.crop is None
        return SimpleNamespace(
            mask=model.finds, instances=("a piece",) if model.finds.any() else ()
        )

    monkeypatch.setattr(judging, "answer_prompt_free", answer)


def union_rows(judgement):
    return {
        row.model: (row.measure, row.label, row.objects, pytest.approx(row.value))
        for row in judgement.rows
        if row.prompt == "nothing"
    }


@pytest.mark.usefixtures("_found_by_itself")
def test_a_candidate_that_finds_all_by_itself_is_held_against_all_objects_together():
    candidate, base = finding(answering(3), 0, 1), answering(6)
    images = [
        judged(*(known(i, mask=True) for i in range(4)), name="a"),
        judged(known(0, mask=True), known(1, mask=True), known(2, mask=True, label="other")),
        judged(known(0, mask=True), known(3, box=True), name="not all masks are known"),
        judged(known(4, mask=True, label="other"), name="nothing of that label"),
    ]
    judgement = decide(candidate, base, base, images, prompt_free={"candidate": "cell"})
    assert union_rows(judgement) == {"candidate": ("union iou", "all", 2, (2 / 4 + 1) / 2)}
    assert judgement.promoted
    assert judgement.sentence.endswith("held-out answers, and 0.750 without a prompt.")
    without = decide(candidate, base, base, images)
    assert without.means == judgement.means
    assert [row for row in judgement.rows if row.prompt != "nothing"] == list(without.rows)
    assert without.sentence.endswith("held-out answers.")


@pytest.mark.usefixtures("_found_by_itself")
@pytest.mark.parametrize(
    ("found", "labels", "promoted"),
    [
        pytest.param((0, 1), {"candidate": "cell", "active": "cell"}, False, id="it falls"),
        pytest.param((0, 1, 2), {"candidate": "cell", "active": "cell"}, True, id="it does not"),
        pytest.param((0, 1), {"candidate": "cell"}, True, id="the active model never had it"),
        pytest.param((0, 1), {"active": "cell"}, True, id="the candidate never had it"),
        pytest.param(
            (0, 1), {"candidate": "cell", "active": "nucleus"}, True, id="of another label"
        ),
    ],
)
def test_a_candidate_may_not_fall_without_prompts_either(found, labels, promoted):
    candidate, active = finding(answering(3), *found), finding(answering(6), 0, 1, 2)
    judgement = decide(candidate, active, answering(6), prompt_free=labels)
    assert judgement.promoted is promoted
    assert set(union_rows(judgement)) == (
        set() if "candidate" not in labels else {n for n in labels if labels[n] == "cell"}
    )
    if not promoted:
        assert "but fell from 0.600 to 0.400 without a prompt." in judgement.sentence


@pytest.mark.usefixtures("_found_by_itself")
def test_images_of_nothing_are_for_who_finds_things_without_prompts():
    """They change no mean and no decision, but are told of."""
    candidate, active = finding(answering(3), 0, 1, 2), finding(answering(6))
    empty = [judged(name=name) for name in ("e", "f")]
    images = [judged(*(known(i, mask=True) for i in range(4)), name="a")]
    labels = {"candidate": "cell", "active": "cell"}
    judgement = decide(
        candidate, active, active, images + empty, prompt_free=labels, most_objects=20
    )
    alone = decide(candidate, active, active, images, prompt_free=labels)
    assert (judgement.means, judgement.sentence) == (alone.means, alone.sentence)
    more = [row for row in judgement.rows if row not in alone.rows]
    assert [(row.model, row.measure, row.objects, row.value) for row in more] == [
        ("candidate", "left empty", 2, 0.0),
        ("active", "left empty", 2, 1.0),
    ]

    def unread():
        raise AssertionError("nobody is asked about it")

    unasked = [replace(one, read=unread) for one in empty]
    assert decide(candidate, active, active, images + unasked).promoted is True


@pytest.mark.usefixtures("_found_by_itself")
def test_a_fall_of_a_little_without_prompts_is_forgiven():
    candidate, active = finding(answering(3), *range(5)), finding(answering(6), *range(5))
    labels = {"candidate": "cell", "active": "cell"}
    for pixels, promoted in ((20, True), (30, False)):  # of 5 times 240
        candidate.finds = active.finds.copy()
        candidate.finds[5 : 5 + pixels // 2, 2:4] = False
        assert decide(candidate, active, answering(6), prompt_free=labels).promoted is promoted


@pytest.mark.usefixtures("_found_by_itself")
def test_most_objects_bounds_what_is_asked_for_and_not_what_is_wanted_together():
    candidate, base = finding(answering(3), *range(5)), answering(6)
    judgement = decide(candidate, base, base, most_objects=2, prompt_free={"candidate": "cell"})
    assert value(judgement, "candidate", "point").objects == 2
    assert union_rows(judgement) == {"candidate": ("union iou", "all", 1, 1.0)}


def test_models_answer_as_they_are_served():
    crops = CropPolicy(min_object_px=40, context=2, min_side=24)
    predictors = [Predictor(build_small_sam(seed)) for seed in (0, 1)]
    images = [judged(known(1, mask=True))]
    judgement = decide(predictors[0], predictors[1], predictors[1], images, crops=crops)
    box = ObjectPrompt(
        point_coords=np.zeros((0, 2)),
        point_labels=np.zeros(0, int),
        box_xyxy=np.array([13.0, 5, 21, 35]),
    )
    for name, predictor in zip(("candidate", "active"), predictors, strict=True):
        [answer] = answer_prompts(
            predictor,
            [box],
            image_hw=SIZE_HW,
            embed=lambda crop, predictor=predictor: predictor.embed(PIXELS, crop=crop),
            crops=crops,
        )
        row = value(judgement, name, "tight box")
        assert row.value == pytest.approx(iou(answer.mask, TRUTHS[1]))


def test_few_answers_are_held_at_a_time(monkeypatch):
    """The judgement is the same; a large image's masks of three models would fill the memory."""
    models = answering(3, 1), answering(6), answering(4)
    wanted = decide(*models)
    asked = []
    answer = judging._answers

    def counting(predictor, size_hw, embed, questions, crops):
        asked.append(len(questions))
        return answer(predictor, size_hw, embed, questions, crops)

    monkeypatch.setattr(judging, "_answers", counting)
    monkeypatch.setattr(judging, "_ANSWERED_PIXELS", 4 * SIZE_HW[0] * SIZE_HW[1])
    assert decide(*models) == wanted
    assert asked == [4] * 9 + [3] * 3
    assert [model.embedded for model in models] == [2, 2, 2]


def test_bad_requests_are_refused():
    model = answering(0)
    with pytest.raises(ConfigError, match="active, base is missing"):
        judge({"candidate": model}, [], crops=None, margin=0.0, seed=0)
    with pytest.raises(ConfigError, match="margin must be at least 0, got -1"):
        decide(model, model, model, [], margin=-1)


@pytest.mark.usefixtures("_found_by_itself")
@pytest.mark.parametrize(
    ("found", "rows", "labels", "promoted"),
    [
        pytest.param((0, 1, 2), 6, {"candidate": "cell"}, True, id="useful and no worse"),
        pytest.param((0, 1, 2), 7, {"candidate": "cell"}, False, id="useful and worse"),
        pytest.param((0, 1), 6, {"candidate": "cell"}, False, id="of little use"),
        pytest.param(
            (0, 1, 2), 6, {"candidate": "cell", "active": "cell"}, False, id="nothing new"
        ),
    ],
)
def test_finding_things_without_prompts_for_the_first_time_is_a_gain(found, rows, labels, promoted):
    candidate, base = finding(answering(rows), *found), answering(6)
    active = finding(answering(6), *found)
    assert decide(candidate, active, base, prompt_free=labels).promoted is promoted
