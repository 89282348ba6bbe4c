"""A mask as Label Studio's bitmask stores it: a PNG with black pixels on nothing, as a data URL.

(https://github.com/HumanSignal/label-studio, libs/editor/src/regions/BitmaskRegion.jsx)
"""

from __future__ import annotations

import base64
import binascii
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["data_url_from_mask", "mask_from_data_url"]

_PREFIX = "data:image/png;base64,"


def data_url_from_mask(mask: NDArray[np.bool_]) -> str:
    """Encode a mask [H, W] bool as a bitmask region's `imageDataURL`."""
    black = np.zeros((*mask.shape, 2), np.uint8)  # grey, alpha
    black[..., 1] = np.where(mask, 255, 0)
    file = io.BytesIO()
    Image.fromarray(black).save(file, "PNG", compress_level=1)
    return _PREFIX + base64.b64encode(file.getvalue()).decode()


def mask_from_data_url(url: object, *, size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Decode a bitmask region's `imageDataURL`: what is more than half opaque.

    Args:
        url: The data URL.
        size_hw: The image's size (H, W), which is the mask's; no other is decoded.

    Returns:
        [H, W] bool.

    Raises:
        ValueError: If it is no such URL, damaged, or of another size.
    """
    if not isinstance(url, str) or not url.startswith(_PREFIX):
        got = url[:40] if isinstance(url, str) else type(url).__name__
        raise ValueError(f"imageDataURL must begin with {_PREFIX}, got {got!r}")
    try:
        file = io.BytesIO(base64.b64decode(url.removeprefix(_PREFIX), validate=True))
        with Image.open(file, formats=("PNG",)) as image:
            if image.size != size_hw[::-1]:
                width, height = image.size
                raise ValueError(
                    f"imageDataURL must be of the image's size {size_hw[1]} x {size_hw[0]}, "
                    f"got {width} x {height}"
                )
            alpha = np.asarray(image.convert("RGBA"))[..., 3]
    except (binascii.Error, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"imageDataURL must hold a PNG, got a damaged one ({error})") from error
    mask: NDArray[np.bool_] = alpha > 127
    return mask
