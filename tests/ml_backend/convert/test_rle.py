"""The brush code, held against the one of Label Studio's own SDK."""

from __future__ import annotations

import numpy as np
import pytest
from label_studio_sdk.converter.brush import decode_rle, mask2rle

from ml_backend.convert.rle import rle_from_mask


def noise(*shape: int, share: float) -> np.ndarray:
    return np.random.default_rng(0).random(shape) < share


def corner(*shape: int, pixels: int) -> np.ndarray:
    return (np.arange(shape[0] * shape[1]) < pixels).reshape(shape)


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(np.ones((1, 1), bool), id="one pixel"),
        pytest.param(np.zeros((3, 5), bool), id="empty"),
        pytest.param(noise(3, 5, share=0.5), id="a few pixels"),
        pytest.param(noise(37, 61, share=0.5), id="noise"),
        pytest.param(noise(61, 37, share=0.95), id="runs of 9 to 256 bytes"),
        pytest.param(corner(150, 131, pixels=16_384), id="a run of 65,536 bytes: just one piece"),
        pytest.param(corner(150, 131, pixels=16_385), id="a run of 65,540 bytes: two pieces"),
        pytest.param(corner(250, 400, pixels=99_999), id="a run of many pieces"),
    ],
)
def test_is_the_code_of_the_sdk_and_decodes_to_the_mask(mask):
    rle = rle_from_mask(mask)

    assert rle == mask2rle(mask.astype(np.uint8) * 255)
    decoded = decode_rle(rle).reshape(*mask.shape, 4)
    np.testing.assert_array_equal(decoded, np.repeat(mask[..., None] * np.uint8(255), 4, axis=2))
