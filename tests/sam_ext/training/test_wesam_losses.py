import cv2
import numpy as np
import pytest
import torch

from sam_ext.errors import ConfigError
from sam_ext.training.losses import dice_loss, focal_loss
from sam_ext.training.wesam_losses import (
    box_projection_loss,
    color_affinity,
    contrastive_loss,
    pairwise_loss,
    pooled_features,
    self_training_focal_loss,
)
from tests.reference import losses as losses_reference
from tests.reference import wesam as reference


@pytest.fixture
def logits():
    return torch.randn(3, 4, 5, dtype=torch.float64) * 3


@pytest.fixture
def targets():
    return (torch.rand(3, 4, 5, dtype=torch.float64) > 0.6).double()


def test_focal_is_the_papers_with_its_own_alpha(logits, targets):
    wanted = reference.focal(logits.tolist(), targets.tolist(), alpha=0.8)
    got = self_training_focal_loss(logits, targets).mean()
    assert got.item() == pytest.approx(wanted, rel=0, abs=1e-12)


def test_the_official_calls_focal_is_as_many_times_larger_as_there_are_masks(logits, targets):
    """It passes the number of masks in alpha's place: N / 0.8 times the loss that was meant."""
    official = reference.focal(logits.tolist(), targets.tolist(), alpha=3)
    ours = self_training_focal_loss(logits, targets).mean().item()
    assert official / ours == pytest.approx(3 / 0.8)
    assert focal_loss(logits, targets, alpha=-1).mean().item() * 3 == pytest.approx(official)


def test_dice_is_each_objects_own_while_the_official_one_flattens_them(logits, targets):
    flat = [masks.view(1, -1).tolist() for masks in (logits, targets)]
    official = losses_reference.dice(*flat, smooth=3)
    each = [
        losses_reference.dice(mask, target, smooth=1)
        for mask, target in zip(logits.tolist(), targets.tolist(), strict=True)
    ]
    assert dice_loss(logits, targets).mean().item() == pytest.approx(sum(each) / 3, abs=1e-12)
    together = dice_loss(logits.view(1, 1, -1), targets.view(1, 1, -1), smooth=3)
    assert together.item() == pytest.approx(official, abs=1e-12)
    assert abs(official - sum(each) / 3) > 1e-3


def test_pooled_features_are_the_papers():
    embeddings = torch.randn(6, 4, 5, dtype=torch.float64)
    masks = torch.rand(3, 4, 5) > 0.5
    masks[1] = False
    masks[2] = False
    masks[2, 1, 3] = True
    wanted = [reference.pooled(embeddings.tolist(), mask) for mask in masks.tolist()]
    got = pooled_features(embeddings, masks)
    expected = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert not got[1].any()


def test_the_contrastive_loss_is_the_papers():
    teacher, anchor = torch.randn(2, 4, 6, dtype=torch.float64).unbind()
    wanted = reference.contrastive(teacher.tolist(), anchor.tolist(), tau=0.3)
    assert contrastive_loss(teacher, anchor).item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        pytest.param(torch.eye(4)[:1], 0.0, id="one instance has nothing to differ from"),
        pytest.param(torch.zeros(2, 4), 0.6931, id="two empty masks"),
        pytest.param(torch.eye(4), 0.10167, id="four unlike ones"),
    ],
)
def test_known_values_of_the_contrastive_loss(features, expected):
    assert contrastive_loss(features, features).item() == pytest.approx(expected, abs=1e-4)


def test_other_instances_are_refused():
    with pytest.raises(ConfigError, match=r"got \(2, 4\) and \(3, 4\)"):
        contrastive_loss(torch.zeros(2, 4), torch.zeros(3, 4))


def test_the_projection_loss_is_the_papers(logits):
    boxes = torch.zeros(3, 4, 5, dtype=torch.bool)
    boxes[0, 1:3, 2:5] = True
    boxes[1, :, :1] = True
    got = box_projection_loss(logits, boxes, slack=0)
    for mask, box, value in zip(logits.tolist(), boxes.tolist(), got.tolist(), strict=True):
        assert value == pytest.approx(reference.projection(mask, box, smooth=1), abs=1e-12)


def test_a_mask_that_touches_all_four_sides_projects_onto_its_box():
    boxes = torch.zeros(2, 8, 9, dtype=torch.bool)
    boxes[:, 2:6, 1:7] = True
    cross = torch.full((2, 8, 9), -30.0)
    cross[:, 3, 1:7] = 30.0
    cross[:, 2:6, 4] = 30.0
    cross[1, 3, 8] = 30.0  # reaches beyond
    for slack in (0, 1):
        losses = box_projection_loss(cross, boxes, slack=slack)
        assert losses[0].item() == pytest.approx(0, abs=1e-6)
        assert losses[1] > 0.05


def test_on_the_sides_of_a_box_a_mask_may_end_a_pixel_earlier_or_later():
    boxes = torch.zeros(3, 9, 9, dtype=torch.bool)
    boxes[:, 2:7, 2:7] = True
    masks = torch.full((3, 9, 9), -30.0)
    masks[0, 3:6, 3:6] = 30.0
    masks[1, 1:8, 1:8] = 30.0
    masks[2, 4, 4] = 30.0  # two pixels short
    strict, slack = (box_projection_loss(masks, boxes, slack=slack) for slack in (0, 1))
    assert (strict > 0.1).all()
    assert slack[:2].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert slack[2] > 0.5


@pytest.mark.parametrize("distance", [1, 2])
def test_which_pixels_look_alike_is_the_papers(distance):
    rng = np.random.default_rng(0)
    blocks = 120 + rng.integers(0, 8, (6, 7, 3))
    image = np.kron(blocks, np.ones((4, 4, 1))).astype(np.uint8)  # a mask's pixel is one colour
    lab = cv2.cvtColor(blocks.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    wanted = reference.alike(lab.astype(float).tolist(), distance)
    got = color_affinity(image, stride=4, distance=distance)
    assert got.shape == (4, 6, 7)
    assert {tuple(one) for one in got.nonzero().tolist()} == wanted
    assert 5 < len(wanted) < got.numel() / 2  # some do, most do not


def test_an_image_that_is_no_multiple_of_the_stride_has_masks_that_are_rounded_up():
    assert color_affinity(np.zeros((10, 21, 3), np.uint8), stride=4).shape == (4, 3, 6)


@pytest.mark.parametrize("distance", [1, 2])
def test_the_pairwise_loss_is_the_papers(logits, distance):
    affinity = torch.rand(4, 4, 5) > 0.4
    region = torch.rand(3, 4, 5) > 0.5
    region[2] = False
    kept = {tuple(one) for one in affinity.nonzero().tolist()}
    got = pairwise_loss(logits, affinity, region, distance=distance)
    for mask, where, value in zip(logits.tolist(), region.tolist(), got.tolist(), strict=True):
        wanted = reference.pairwise(mask, kept, where, distance)
        assert value == pytest.approx(wanted, rel=0, abs=1e-12)
    assert got[2] == 0
    assert (got[:2] > 0).all()


def test_a_mask_that_ends_where_the_colour_does_costs_less():
    image = np.full((48, 64, 3), 60, np.uint8)
    image[12:36, 16:48] = (200, 180, 40)
    affinity = color_affinity(image, stride=4)
    masks = torch.full((3, 12, 16), -8.0)
    masks[0, 3:9, 4:12] = 8.0
    masks[1, 4:10, 4:12] = 8.0  # a row too low
    masks[2, 2:10, 3:13] = 8.0  # too large
    region = torch.ones(3, 12, 16, dtype=torch.bool)
    right, low, large = pairwise_loss(masks, affinity, region).tolist()
    assert right < 0.01
    assert min(low, large) > 0.1
