import pytest
import torch

from sam_ext.errors import ConfigError
from sam_ext.training.losses import (
    cross_entropy,
    dice_loss,
    focal_loss,
    mask_iou,
    soft_iou_loss,
    squared_dice_loss,
)
from tests.reference import losses as reference


@pytest.fixture
def logits():
    return torch.randn(2, 3, 4, 5, dtype=torch.float64) * 3


@pytest.fixture
def targets():
    return (torch.rand(2, 3, 4, 5, dtype=torch.float64) > 0.6).double()


def each(function, logits, targets):
    flat = [
        function(a.tolist(), b.tolist())
        for a, b in zip(logits.flatten(0, 1), targets.flatten(0, 1), strict=True)
    ]
    return torch.tensor(flat, dtype=torch.float64).view(logits.shape[:2])


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.8, 1.5)])
def test_focal_loss_is_the_papers(logits, targets, alpha, gamma):
    wanted = each(lambda a, b: reference.focal(a, b, alpha, gamma), logits, targets)
    got = focal_loss(logits, targets, alpha=alpha, gamma=gamma)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_focal_loss_without_alpha_weighs_both_classes_alike(logits, targets):
    got = focal_loss(logits, targets, alpha=-1.0)
    torch.testing.assert_close(got, 2 * focal_loss(logits, targets, alpha=0.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("smooth", [1.0, 0.1])
def test_dice_loss_is_the_papers(logits, targets, smooth):
    wanted = each(lambda a, b: reference.dice(a, b, smooth), logits, targets)
    got = dice_loss(logits, targets, smooth=smooth)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("smooth", [1.0, 0.1])
def test_squared_dice_loss_is_the_papers(logits, targets, smooth):
    soft = 0.7 * targets + 0.2
    wanted = each(lambda a, b: reference.squared_dice(a, b, smooth), logits, soft)
    got = squared_dice_loss(logits, soft, smooth=smooth)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_squared_dice_wants_exactly_a_soft_target_and_plain_dice_a_mask(logits):
    targets = logits.sigmoid()
    moved = {}
    for loss in (squared_dice_loss, dice_loss):
        given = logits.clone().requires_grad_()
        value = loss(given, targets)
        value.sum().backward()
        moved[loss] = value, given.grad
    value, gradient = moved[squared_dice_loss]
    assert value.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-12
    value, gradient = moved[dice_loss]
    assert (value > 0.01).all()
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("balanced", [False, True])
def test_cross_entropy_is_the_papers(logits, targets, balanced):
    wanted = each(lambda a, b: reference.cross_entropy(a, b, balanced), logits, targets)
    got = cross_entropy(logits, targets, balanced=balanced)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_balanced_cross_entropy_of_a_balanced_mask_is_half_of_the_plain_one(logits):
    target = torch.zeros(4, 5, dtype=torch.float64)
    target[:2] = 1
    got = cross_entropy(logits, target, balanced=True)
    torch.testing.assert_close(got, 0.5 * cross_entropy(logits, target), rtol=0, atol=1e-12)


def test_soft_iou_loss_is_the_papers(logits, targets):
    wanted = each(reference.soft_iou, logits, targets)
    torch.testing.assert_close(soft_iou_loss(logits, targets), wanted, rtol=0, atol=1e-12)


def test_soft_iou_loss_of_an_empty_target_is_finite():
    logits = torch.full((1, 4, 5), -200.0, requires_grad=True)
    loss = soft_iou_loss(logits, torch.zeros(1, 4, 5))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()


def test_one_target_serves_several_masks(logits, targets):
    one = targets[:, :1]
    for loss in (focal_loss, dice_loss, mask_iou, cross_entropy, soft_iou_loss):
        assert torch.equal(loss(logits, one), loss(logits, one.expand_as(logits)))


def test_the_loss_of_a_soft_target_is_least_at_that_target():
    target = torch.full((1, 4, 5), 0.3, dtype=torch.float64)
    guesses = torch.logit(torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64))
    losses = torch.stack(
        [focal_loss(torch.full((1, 4, 5), float(g)).double(), target) for g in guesses]
    )
    assert losses.argmin() == 1
    assert losses[1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("predicted", "wanted", "expected"),
    [
        pytest.param([[1, 1, 0]], [[0, 1, 1]], 1 / 3, id="one of three"),
        pytest.param([[1, 1, 0]], [[1, 1, 0]], 1.0, id="equal"),
        pytest.param([[1, 0, 0]], [[0, 1, 1]], 0.0, id="apart"),
        pytest.param([[0, 0, 0]], [[0, 0, 0]], 0.0, id="both empty"),
    ],
)
def test_mask_iou(predicted, wanted, expected):
    logits = torch.tensor(predicted).float() * 2 - 1
    assert mask_iou(logits, torch.tensor(wanted).float()).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", [focal_loss, dice_loss, mask_iou])
def test_masks_of_another_size_are_refused(loss):
    with pytest.raises(ConfigError, match=r"height and width \(4, 5\), got \(5, 4\)"):
        loss(torch.zeros(1, 4, 5), torch.zeros(1, 5, 4))
