import cv2
import numpy as np
import pytest

from sam_ext.errors import ConfigError
from sam_ext.training.synthetic import SyntheticConfig, generate_scene

CONFIG = SyntheticConfig(size=64, objects=(2, 5))


def scenes(count):
    return [generate_scene(CONFIG, np.random.default_rng(seed)) for seed in range(count)]


def test_the_same_seed_draws_the_same_scene_and_another_seed_another():
    first, again, other = (generate_scene(CONFIG, np.random.default_rng(s)) for s in (3, 3, 4))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.masks, again.masks)
    assert not np.array_equal(first.image, other.image)


def test_every_object_can_be_seen():
    for scene in scenes(40):
        assert scene.image.shape == (64, 64, 3)
        assert scene.image.dtype == np.uint8
        assert scene.masks.shape[1:] == (64, 64)
        assert scene.masks.dtype == bool
        assert (scene.masks.sum((1, 2)) >= 16).all()


def test_an_object_differs_from_what_lies_around_it():
    """Mean colour inside against a ring outside: most objects stand out, as drawn."""
    far = []
    for scene in scenes(40):
        for mask in scene.masks:
            ring = cv2.dilate(mask.astype(np.uint8), np.ones((7, 7))).astype(bool) & ~mask
            inside, outside = scene.image[mask].mean(0), scene.image[ring].mean(0)
            far.append(np.abs(inside - outside).max() > 8)
    assert np.mean(far) > 0.8


class Reds:
    """Photographs in pure red, with an object in pure green, 20 x 30 px, lower half missing."""

    def photograph(self, rng):
        return np.full((40, 50, 3), (255, 0, 0), np.uint8)

    def cutout(self, rng):
        mask = np.zeros((20, 30), np.uint8)
        mask[:10] = 1
        return np.full((20, 30, 3), (0, 255, 0), np.uint8), mask

    def annotated(self, rng):
        masks = np.zeros((1, 40, 50), np.uint8)
        masks[:, 10:30, 10:40] = 1
        return np.full((40, 50, 3), (0, 0, 255), np.uint8), masks


def test_photographs_give_textures_and_objects_with_their_masks():
    red = green = 0
    for seed in range(30):
        scene = generate_scene(CONFIG, np.random.default_rng(seed), Reds())
        pixels = scene.image.astype(int)
        red += (pixels[..., 0] > 2 * pixels[..., 1:].max(2) + 60).mean()
        for mask in scene.masks:
            colours = scene.image[mask].astype(int)
            if np.mean(colours[:, 1] > 2 * colours[:, [0, 2]].max(1) + 60) > 0.9:
                ys, xs = np.nonzero(mask)
                wide = (np.ptp(xs) + 1) * (np.ptp(ys) + 1)
                green += mask.sum() / wide > 0.5  # the half that is there fills its box
    assert red / 30 > 0.15
    assert green >= 5
    plain = [generate_scene(CONFIG, np.random.default_rng(seed)) for seed in range(5)]
    for seed, scene in enumerate(plain):
        other = generate_scene(CONFIG, np.random.default_rng(seed), Reds())
        assert not np.array_equal(scene.image, other.image)


def test_a_photograph_as_the_ground_brings_its_objects():
    config = SyntheticConfig(size=64, objects=(1, 1))
    brought = 0
    for seed in range(30):
        scene = generate_scene(config, np.random.default_rng(seed), Reds())
        pixels = scene.image.astype(int)
        if np.mean(pixels[..., 2] > 2 * pixels[..., :2].max(2) + 60) > 0.4:
            brought += any(0.1 < mask.mean() < 0.8 for mask in scene.masks)
    assert brought >= 3


def test_things_have_parts_and_parts_have_parts():
    """A mask that lies within another, and one within that."""
    deepest = 0
    for scene in scenes(80):
        masks = scene.masks.reshape(len(scene.masks), -1).astype(int)
        shared = masks @ masks.T
        within = (shared == np.diag(shared)[:, None]) & (np.diag(shared)[:, None] < np.diag(shared))
        deepest = max(deepest, 1 + within.any(1).any(), 2 + (within @ within).any())
    assert deepest == 3


def test_some_objects_are_thin():
    slim = 0
    for scene in scenes(60):
        for mask in scene.masks:
            core = cv2.erode(mask.astype(np.uint8), np.ones((5, 5), np.uint8))
            slim += not core.any() and np.ptp(np.nonzero(mask)[0]) > 16
    assert slim >= 5


@pytest.mark.parametrize(
    "change",
    [{"size": 16}, {"objects": (0, 3)}, {"objects": (4, 3)}],
    ids=["size", "none", "order"],
)
def test_an_impossible_scene_is_refused(change):
    with pytest.raises(ConfigError, match="SyntheticConfig must have"):
        SyntheticConfig(**change)
