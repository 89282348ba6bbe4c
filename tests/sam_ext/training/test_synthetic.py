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
    import cv2

    far = []
    for scene in scenes(40):
        for mask in scene.masks:
            ring = cv2.dilate(mask.astype(np.uint8), np.ones((7, 7))).astype(bool) & ~mask
            inside, outside = scene.image[mask].mean(0), scene.image[ring].mean(0)
            far.append(np.abs(inside - outside).max() > 8)
    assert np.mean(far) > 0.8


@pytest.mark.parametrize(
    "change",
    [{"size": 16}, {"objects": (0, 3)}, {"objects": (4, 3)}],
    ids=["size", "none", "order"],
)
def test_an_impossible_scene_is_refused(change):
    with pytest.raises(ConfigError, match="SyntheticConfig must have"):
        SyntheticConfig(**change)
