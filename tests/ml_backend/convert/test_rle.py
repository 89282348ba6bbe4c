"""The brush code, held against the one of Label Studio's own SDK."""

from __future__ import annotations

import numpy as np
import pytest
from label_studio_sdk.converter.brush import decode_rle, mask2rle

from ml_backend.convert.rle import mask_from_rle, rle_from_mask


def noise(*shape: int, share: float) -> np.ndarray:
    return np.random.default_rng(0).random(shape) < share


def corner(*shape: int, pixels: int) -> np.ndarray:
    return (np.arange(shape[0] * shape[1]) < pixels).reshape(shape)


MASKS = pytest.mark.parametrize(
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


@MASKS
def test_is_the_code_of_the_sdk_and_decodes_to_the_mask(mask):
    rle = rle_from_mask(mask)

    assert rle == mask2rle(mask.astype(np.uint8) * 255)
    decoded = decode_rle(rle).reshape(*mask.shape, 4)
    np.testing.assert_array_equal(decoded, np.repeat(mask[..., None] * np.uint8(255), 4, axis=2))


@MASKS
def test_a_mask_comes_back_from_its_code(mask):
    np.testing.assert_array_equal(mask_from_rle(rle_from_mask(mask), size_hw=mask.shape), mask)


def test_bytes_that_are_no_runs_are_read_across_byte_borders():
    alpha = np.random.default_rng(0).integers(0, 256, (9, 7), np.uint8)
    rle = mask2rle(alpha)
    assert decode_rle(rle).reshape(9, 7, 4)[..., 3].tolist() == alpha.tolist()
    np.testing.assert_array_equal(mask_from_rle(rle, size_hw=(9, 7)), alpha > 127)
    np.testing.assert_array_equal(mask_from_rle(rle, size_hw=(9, 7), threshold=0), alpha > 0)


def literal(values: bytes) -> list[int]:
    """The code of values that are written one by one, as the page does with soft edges."""
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    bits += "0" + "11" + f"{len(values) - 1:016b}" + "".join(f"{value:08b}" for value in values)
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def test_values_that_are_written_one_by_one_are_read():
    alpha = np.random.default_rng(0).integers(0, 256, (5, 3), np.uint8)
    rle = literal(np.repeat(alpha, 4).tobytes())
    assert decode_rle(rle).reshape(5, 3, 4)[..., 3].tolist() == alpha.tolist()
    np.testing.assert_array_equal(mask_from_rle(rle, size_hw=(5, 3)), alpha > 127)


@pytest.mark.parametrize(
    ("rle", "size_hw", "message"),
    [
        pytest.param(
            rle_from_mask(noise(6, 7, share=0.5)),
            (7, 5),
            "rle must hold 7 x 5 pixels of 4 bytes, got 168 words of 8 bits",
            id="another-size",
        ),
        pytest.param(
            rle_from_mask(noise(6, 7, share=0.5))[:20],
            (6, 7),
            "rle must be a whole code, got one that ends at byte 20",
            id="cut-off",
        ),
        pytest.param(
            [], (6, 7), "rle must be a whole code, got one that ends at byte 0", id="empty"
        ),
        pytest.param([256], (6, 7), "bytes must be in range(0, 256)", id="no-bytes"),
        pytest.param(
            [0, 0, 0, 4, *rle_from_mask(np.ones((1, 2), bool))[4:]],
            (1, 1),
            "rle must hold 4 bytes, got more",
            id="too-long-a-run",
        ),
    ],
)
def test_a_damaged_code_is_refused(rle, size_hw, message):
    with pytest.raises(ValueError) as caught:
        mask_from_rle(rle, size_hw=size_hw)
    assert str(caught.value) == message
