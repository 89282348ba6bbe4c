import pytest
import torch

from sam_ext.training.views import (
    FLIPS,
    Flip,
    flip_boxes,
    flip_image,
    flip_points,
    strong_view,
)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("flip", FLIPS)
def test_what_is_drawn_stays_on_its_pixels(flip):
    image = torch.arange(2 * 5 * 7).view(2, 5, 7)
    points = torch.tensor([[0.0, 0.0], [6.0, 4.0], [2.0, 1.0]])
    boxes = torch.tensor([[1.0, 2.0, 4.0, 5.0], [0.0, 0.0, 7.0, 1.0]])
    turned = flip_image(image, flip)
    moved_points = flip_points(points, flip, image_hw=(5, 7)).long()
    for (x, y), (u, v) in zip(points.long().tolist(), moved_points.tolist(), strict=True):
        assert torch.equal(turned[:, v, u], image[:, y, x])
    moved_boxes = flip_boxes(boxes, flip, image_hw=(5, 7)).long().tolist()
    for (x0, y0, x1, y1), (u0, v0, u1, v1) in zip(boxes.long().tolist(), moved_boxes, strict=True):
        wanted = flip_image(image[:, y0:y1, x0:x1], flip)
        assert torch.equal(turned[:, v0:v1, u0:u1], wanted)


def test_the_four_flips_are_their_own_inverses_and_differ():
    image = torch.randn(3, 4, 6)
    assert torch.equal(flip_image(image, Flip(False, False)), image)
    views = [flip_image(image, flip) for flip in FLIPS]
    for flip, view in zip(FLIPS, views, strict=True):
        assert torch.equal(flip_image(view, flip), image)
    assert len({tuple(view.flatten().tolist()) for view in views}) == 4


def test_a_strong_view_moves_no_edge():
    """In the upper half, where no shadow falls, only the edge's two columns touch each other."""
    image = torch.full((3, 40, 60), 50, dtype=torch.uint8)
    image[:, :, 25:] = 190
    seen = 0
    for seed in range(60):
        view = strong_view(image, generator=generator(seed))[:, 1:19]
        left, right = view[:, :, 1:24], view[:, :, 26:-1]
        assert (left == left[:, :1, :1]).all()
        assert (right == right[:, :1, :1]).all()
        seen += bool((left[:, 0, 0] != right[:, 0, 0]).any())
    assert seen >= 40  # two colours may become one


def test_a_strong_view_recolours_differently_each_time_and_repeatably():
    image = torch.randint(0, 256, (3, 24, 36), dtype=torch.uint8)
    views = [strong_view(image, generator=generator(seed)) for seed in range(20)]
    assert all(view.shape == image.shape and view.dtype == torch.uint8 for view in views)
    assert len({tuple(view.flatten().tolist()) for view in views}) >= 18
    assert torch.equal(views[3], strong_view(image, generator=generator(3)))
    assert torch.equal(strong_view(image, generator=generator(0), chance=0.0), image)


def test_a_shadow_darkens_a_part_of_the_lower_half_by_half():
    image = torch.full((3, 40, 60), 200, dtype=torch.uint8)
    shadows = 0
    for seed in range(40):
        view = strong_view(image, generator=generator(seed), chance=0.2)
        if (view[:, 20:] != view[:, :1, :1]).any():
            shadows += 1
            lit, dark = view[:, 0, 0], view[:, 20:].amin((1, 2))
            assert torch.equal(dark, lit // 2)
            assert torch.equal(view[:, :20], lit[:, None, None].expand(3, 20, 60))
    assert 4 <= shadows <= 14
