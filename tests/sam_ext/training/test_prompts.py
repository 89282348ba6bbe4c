import torch

from sam_ext.prompt_encoder import (
    BACKGROUND,
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    FOREGROUND,
    NOT_A_POINT,
)
from sam_ext.training.prompts import correction_clicks, first_prompts, jitter_boxes


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_an_object_is_prompted_by_its_box_or_by_its_point():
    boxes = torch.tensor([[1.0, 2.0, 30.0, 40.0], [5.0, 6.0, 7.0, 8.0]])
    points = torch.tensor([[10.0, 20.0], [6.0, 7.5]])
    coords, labels = first_prompts(boxes, points, torch.tensor([True, False]))
    assert coords.tolist() == [[[1.0, 2.0], [30.0, 40.0]], [[6.0, 7.5], [0.0, 0.0]]]
    assert labels.tolist() == [[BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], [FOREGROUND, NOT_A_POINT]]


def test_box_noise_is_a_tenth_of_the_side_and_at_most_twenty_pixels_of_1024():
    boxes = torch.tensor([[400.0, 300.0, 500.0, 340.0]]).repeat(4000, 1)
    moved = jitter_boxes(boxes, image_size=1024, generator=generator()) - boxes
    assert moved.abs().max() == 20
    clipped = torch.randn(400_000, generator=generator()) * 10
    wanted = torch.tensor([clipped.clamp(-20, 20).std(), 4.0])
    torch.testing.assert_close(moved.std(0), wanted.repeat(2), rtol=0.05, atol=0)


def test_noisy_boxes_stay_inside_the_image_and_right_side_up():
    boxes = torch.tensor([[0.0, 0.0, 64.0, 64.0], [60.0, 60.0, 61.0, 61.0]]).repeat(500, 1)
    moved = jitter_boxes(boxes, image_size=64, generator=generator(), std=1.0, most=1.0)
    assert moved.min() >= 0
    assert moved.max() <= 64
    assert (moved[:, 2:] >= moved[:, :2]).all()


def test_a_click_lands_where_the_answer_is_wrong_with_the_right_label():
    targets = torch.zeros(2, 3, 5)
    targets[0, 1, 3] = 1  # missed
    logits = torch.full((2, 3, 5), -1.0)
    logits[1, 2, 0] = 1.0  # too much
    coords, labels = correction_clicks(logits, targets, stride=4, generator=generator())
    assert coords.tolist() == [[[13.5, 5.5]], [[1.5, 9.5]]]
    assert labels.tolist() == [[FOREGROUND], [BACKGROUND]]


def test_all_wrong_pixels_are_clicked_equally_often():
    targets = torch.zeros(3000, 2, 3)
    targets[:, 0, 1] = 1
    logits = torch.full((3000, 2, 3), -1.0)
    logits[:, 1, 2] = 1.0
    coords, labels = correction_clicks(logits, targets, stride=1, generator=generator())
    missed = (coords[:, 0] == torch.tensor([1.0, 0.0])).all(1)
    assert (missed | (coords[:, 0] == torch.tensor([2.0, 1.0])).all(1)).all()
    assert abs(missed.float().mean() - 0.5) < 0.04
    assert torch.equal(labels[:, 0] == FOREGROUND, missed)


def test_a_right_answer_is_clicked_inside_the_object():
    targets = torch.zeros(1, 2, 3)
    targets[0, 1, 0] = 1
    coords, labels = correction_clicks(targets * 2 - 1, targets, stride=4, generator=generator())
    assert coords.tolist() == [[[1.5, 5.5]]]
    assert labels.tolist() == [[FOREGROUND]]
