"""What the tests of the served backend share: recorded requests, images, masks from regions."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from label_studio_sdk.converter.brush import decode_rle
from PIL import Image

from tests.ml_backend.servers import LEGACY_TOKEN, Answer, FakeLabelStudio

DATA = Path(__file__).parents[1] / "data"
EXIF_ORIENTATION = 0x0112


def payload(number: str) -> dict[str, Any]:
    """A recorded request, by the number that its file's name begins with."""
    (path,) = DATA.glob(f"{number}_*.json")
    return json.loads(path.read_text())


def random_image(seed: int, *, size_hw: tuple[int, int]) -> Image.Image:
    """Coarse coloured blocks: no two images and no two places look alike."""
    height, width = size_hw
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, image_format: str = "PNG", *, orientation: int = 1) -> bytes:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    image.save(file, image_format, exif=exif)
    return file.getvalue()


def serve_images(label_studio: FakeLabelStudio, request: dict[str, Any]) -> None:
    """Let Label Studio have the images that a recorded request names, 640 x 480 px."""
    label_studio.legacy_tokens_enabled = True
    for seed, task in enumerate(request["tasks"]):
        path = task["data"]["image"]
        turned = "exif6" in path
        body = encoded(
            random_image(seed, size_hw=(480, 640)),
            "JPEG" if path.endswith(".jpg") else "PNG",
            orientation=6 if turned else 1,
        )
        label_studio.routes[path] = Answer(body)


def setup_body(request: dict[str, Any], hostname: str, **fields: object) -> dict[str, Any]:
    """The /setup that Label Studio sends for the project of a predict request."""
    return {
        "project": request["project"],
        "schema": request["label_config"],
        "hostname": hostname,
        "access_token": LEGACY_TOKEN,
        "extra_params": None,
    } | fields


def mask_of(region: dict[str, Any]) -> np.ndarray:
    """The mask [H, W] bool of a brush region, decoded by Label Studio's own SDK."""
    height, width = region["original_height"], region["original_width"]
    return decode_rle(region["value"]["rle"]).reshape(height, width, 4)[..., 3] > 127


def make_sure_of_itself(sam):
    """Let a SAM with random weights say things that automatic masks keep."""
    sam.mask_decoder.iou_prediction_head.layers[-1].bias.data += 10
    for network in sam.mask_decoder.output_hypernetworks_mlps:
        network.layers[-1].weight.data *= 1000
        network.layers[-1].bias.data *= 1000
    return sam
