from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from ml_backend.convert.png import data_url_from_mask, mask_from_data_url

MASK = np.random.default_rng(0).random((20, 50)) > 0.5


def url_of(image: Image.Image, image_format: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, image_format)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_a_mask_is_black_on_nothing():
    url = data_url_from_mask(MASK)
    content = base64.b64decode(url.removeprefix("data:image/png;base64,"))
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))
    assert not pixels[..., :3].any()
    np.testing.assert_array_equal(pixels[..., 3], np.where(MASK, 255, 0))


@pytest.mark.parametrize("mask", [MASK, MASK[:1, :1], ~MASK & False])
def test_what_is_written_is_read(mask):
    got = mask_from_data_url(data_url_from_mask(mask), size_hw=mask.shape)
    np.testing.assert_array_equal(got, mask)


def test_what_is_more_than_half_opaque_is_painted_whatever_its_colour():
    pixels = np.zeros((1, 4, 4), np.uint8)
    pixels[0, :, 3] = (0, 127, 128, 255)
    pixels[0, 1] = (255, 255, 255, 100)
    got = mask_from_data_url(url_of(Image.fromarray(pixels)), size_hw=(1, 4))
    assert got.tolist() == [[False, False, True, True]]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        pytest.param(None, "must begin with data:image/png;base64,, got 'NoneType'", id="nothing"),
        pytest.param("http://x/a.png", "got 'http://x/a.png'", id="an address"),
        pytest.param("data:image/png;base64,@@", "damaged one", id="no base64"),
        pytest.param("data:image/png;base64,AAAA", "damaged one", id="no picture"),
        pytest.param(url_of(Image.new("L", (50, 20)), "JPEG"), "damaged one", id="a JPEG"),
        pytest.param(data_url_from_mask(MASK)[:-40], "damaged one", id="cut off"),
        pytest.param(
            url_of(Image.new("RGBA", (20, 50))),
            "must be of the image's size 50 x 20, got 20 x 50",
            id="another size",
        ),
    ],
)
def test_what_is_none_is_refused(url, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mask_from_data_url(url, size_hw=(20, 50))
