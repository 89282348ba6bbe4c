import numpy as np
import pytest
import torch

from sam_ext.automatic import default_grid, generate_masks, non_maximum_suppression
from sam_ext.errors import ConfigError
from sam_ext.predictor import Predictor

SIZE_HW = (96, 128)  # 48 x 64 at the encoder's input, 12 x 16 cells of the decoder's logits


def cells(top, left, height, width):
    """Logits [16, 16] of a rectangle of cells; one cell is 8 x 8 pixels of the image."""
    logits = torch.full((16, 16), -80.0)
    logits[12:] = 80.0  # padding, where a mask means nothing
    logits[top : top + height, left : left + width] = 80.0
    return logits


SMALL_THING = cells(1, 1, 4, 5)
LARGE_THING = cells(2, 8, 8, 7)
PART = cells(6, 9, 3, 3)
SPECK = cells(10, 2, 1, 1)
EVERYTHING = cells(0, 0, 16, 16)
NOTHING = cells(0, 0, 0, 0)
THE_SINGLE_MASK = cells(0, 12, 3, 3)  # not one of the three
UNSTABLE = 0.01 * cells(7, 1, 4, 5)

# What the model sees at a cell, and what it says: three masks and their predicted IoUs.
ANSWERS = [
    (SMALL_THING, [SMALL_THING, EVERYTHING, NOTHING], [0.9, 0.99, 0.97]),
    (PART, [PART, LARGE_THING, cells(2, 8, 8, 6)], [0.91, 0.96, 0.95]),
    (LARGE_THING, [LARGE_THING, cells(3, 8, 7, 7), SMALL_THING], [0.96, 0.94, 0.89]),
    (SPECK, [SPECK, SPECK, SPECK], [0.98, 0.98, 0.98]),
    (UNSTABLE, [UNSTABLE, UNSTABLE, UNSTABLE], [0.98, 0.98, 0.98]),
    (EVERYTHING, [cells(0, 0, 12, 7), EVERYTHING, NOTHING], [0.87, 0.99, 0.5]),
]


class ScenePredictor(Predictor):
    """Knows the scene above instead of looking at an image; the rest is the real predictor."""

    def __init__(self, sam):
        super().__init__(sam)
        self.asked = []

    def decode_low_res(self, embedding, prompts):
        answers = []
        for prompt in prompts:
            assert (prompt.is_single_point, prompt.point_labels.tolist()) == (True, [1])
            ((x, y),) = prompt.point_coords.tolist()
            self.asked.append((x, y))
            masks, scores = next(
                (masks, scores)
                for seen, masks, scores in ANSWERS
                if seen[int(y // 8), int(x // 8)] > 0
            )
            logits = torch.stack([THE_SINGLE_MASK, *masks])
            answers.append((logits, torch.tensor([1.0, *scores]), None))
        return answers


@pytest.fixture
def scene(small_sam):
    predictor = ScenePredictor(small_sam)
    return predictor, predictor.embed(np.zeros((*SIZE_HW, 3), np.uint8))


def test_every_thing_is_found_once_and_the_largest_comes_first(scene):
    found = generate_masks(*scene, points_per_side=16)
    assert [(one.box_xyxy, round(one.iou_prediction, 4), one.stability_score) for one in found] == [
        ((64, 16, 120, 80), 0.96, 1.0),
        ((8, 8, 48, 40), 0.9, 1.0),
        ((72, 48, 96, 72), 0.91, 1.0),
    ]
    predictor, embedding = scene
    for one, logits in zip(found, [LARGE_THING, SMALL_THING, PART], strict=True):
        mask = predictor.full_mask(embedding, logits)
        np.testing.assert_array_equal(one.mask, mask)
        assert one.area_px == mask.sum()


@pytest.mark.parametrize(
    ("options", "boxes"),
    [
        pytest.param({"pred_iou_threshold": 0.95}, [(64, 16, 120, 80)], id="predicted IoU"),
        pytest.param(
            {"stability_threshold": 0.0, "pred_iou_threshold": 0.955},
            [(64, 16, 120, 80), (8, 56, 48, 88)],
            id="stability",
        ),
        pytest.param(
            {"stability_offset": 0.001, "pred_iou_threshold": 0.955, "stability_threshold": 0.9},
            [(64, 16, 120, 80), (8, 56, 48, 88)],
            id="a smaller offset of the stability",
        ),
        pytest.param(
            {"min_area_px": 32, "pred_iou_threshold": 0.955},
            [(64, 16, 120, 80), (17, 81, 23, 87)],
            id="a mask of just the smallest area stays",
        ),
        pytest.param(
            {"min_area_px": 33, "pred_iou_threshold": 0.955},
            [(64, 16, 120, 80)],
            id="a mask of one pixel less goes",
        ),
        pytest.param(
            {"max_area_share": 1.0, "pred_iou_threshold": 0.955},
            [(0, 0, 128, 96), (64, 16, 120, 80)],
            id="the background",
        ),
        pytest.param(
            {"max_area_share": 0.2},
            [(8, 8, 48, 40), (72, 48, 96, 72)],
            id="largest share",
        ),
        pytest.param(
            {"nms_iou": 0.9, "pred_iou_threshold": 0.945},
            [(64, 16, 120, 80), (64, 16, 112, 80)],
            id="suppression",
        ),
        pytest.param(
            {"max_masks": 2},
            [(64, 16, 120, 80), (72, 48, 96, 72)],
            id="at most so many, of highest score",
        ),
        pytest.param({"pred_iou_threshold": 1.1}, [], id="nothing is good enough"),
    ],
)
def test_each_filter_drops_what_it_should(scene, options, boxes):
    found = generate_masks(*scene, points_per_side=16, **options)
    assert [one.box_xyxy for one in found] == boxes


def test_points_lie_in_the_middle_of_about_square_cells(scene):
    generate_masks(*scene, points_per_side=4)
    assert scene[0].asked == [(x, y) for y in (16.0, 48.0, 80.0) for x in (16.0, 48.0, 80.0, 112.0)]


def test_a_real_model_answers_in_the_images_size(small_sam):
    predictor = Predictor(small_sam)
    embedding = predictor.embed(
        np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)
    )
    found = generate_masks(
        predictor,
        embedding,
        points_per_side=12,
        pred_iou_threshold=-100.0,
        stability_threshold=0.0,
        nms_iou=0.9,
        min_area_px=1,
    )
    assert found
    areas = [one.area_px for one in found]
    assert areas == sorted(areas, reverse=True)
    for one in found:
        assert one.mask.shape == (45, 70)
        left, top, right, bottom = one.box_xyxy
        inside = one.mask[top:bottom, left:right]
        assert inside.sum() == one.area_px
        assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


def test_a_grid_without_points_is_refused(scene):
    with pytest.raises(ConfigError, match="points_per_side must be at least 1, got 0"):
        generate_masks(*scene, points_per_side=0)


def suppressed_slowly(boxes, scores, iou_threshold):
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        for k in kept:
            a, b = boxes[i], boxes[k]
            width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
            height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
            if width * height > iou_threshold * union:
                break
        else:
            kept.append(i)
    return kept


@pytest.mark.parametrize("iou_threshold", [0.0, 0.3, 0.7])
def test_suppression_equals_its_slow_transcription(iou_threshold):
    rng = np.random.default_rng(5)
    corner, side = rng.uniform(0, 60, (80, 2)), rng.uniform(0, 50, (80, 2))
    boxes = np.concatenate([corner, corner + side], axis=1)
    boxes[7] = boxes[11]
    scores = rng.permutation(80) / 80
    kept = non_maximum_suppression(
        torch.tensor(boxes), torch.tensor(scores), iou_threshold=iou_threshold
    )
    wanted = suppressed_slowly(boxes.tolist(), scores.tolist(), iou_threshold)
    assert kept.tolist() == wanted
    assert 1 < len(wanted) < 80


def test_suppression_of_nothing_is_nothing():
    kept = non_maximum_suppression(torch.zeros(0, 4), torch.zeros(0), iou_threshold=0.5)
    assert kept.tolist() == []


def test_small_models_are_asked_for_less_certainty():
    assert default_grid(1024) == {}
    small = default_grid(256)
    assert small["pred_iou_threshold"] < 0.88
    assert small["stability_threshold"] < 0.95
