"""Generated images: textured, shaded, overlapping, anti-aliased shapes with exact masks.

With photographs at hand, textures are also cut from them, and objects cut out of them are pasted
among the shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from sam_ext.errors import ConfigError

__all__ = ["Photographs", "SyntheticConfig", "SyntheticScene", "generate_scene"]

_SHIFT = 4  # OpenCV draws with coordinates of 1 / 2**_SHIFT pixel
_OVERSAMPLE = 2


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """What a generated scene looks like."""

    size: int = 192
    """Side of the square image in pixels."""
    objects: tuple[int, int] = (3, 12)
    """Fewest and most objects."""

    def __post_init__(self) -> None:
        if self.size < 32 or not 1 <= self.objects[0] <= self.objects[1]:
            raise ConfigError(
                f"SyntheticConfig must have size >= 32 and 1 <= objects[0] <= objects[1], "
                f"got {self.size=}, {self.objects=}"
            )


@dataclass(frozen=True, eq=False)
class SyntheticScene:
    """One generated image and the visible mask of each of its objects."""

    image: NDArray[Any]
    """[H, W, 3] uint8 RGB."""
    masks: NDArray[Any]
    """[P, H, W] bool; only objects of which something can be seen."""


class Photographs(Protocol):
    """Real images to cut textures and objects from."""

    def photograph(self, rng: np.random.Generator) -> NDArray[Any]:
        """Draw an image [H, W, 3] uint8 RGB."""
        ...

    def cutout(self, rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
        """Draw an object: its bounding box's pixels [h, w, 3] uint8 and mask [h, w], 0 or 1."""
        ...


def generate_scene(
    config: SyntheticConfig, rng: np.random.Generator, photographs: Photographs | None = None
) -> SyntheticScene:
    """Draw one scene; the same generator state draws the same scene.

    The ground is one texture, or several that meet along wavy borders (as sky, water and grass do);
    each is an object, too. Objects are drawn from back to front; a later one hides what lies under
    it. Some carry a part
    (a patch of another texture) or a hole through which the scene behind is seen; in some scenes
    all objects are alike, so that telling them apart is the task.
    """
    size = config.size
    image, masks = _ground(size, rng, photographs)
    if rng.random() < 0.5:
        image = _shade(image, rng)
    count = int(rng.integers(config.objects[0], config.objects[1] + 1))
    alike = rng.random() < 0.25
    scale = float(np.exp(rng.uniform(np.log(0.05), np.log(0.35))))
    shared = _texture(size, rng, photographs)
    for _ in range(count):
        radius = size * (
            scale * rng.uniform(0.8, 1.2)
            if alike
            else float(np.exp(rng.uniform(np.log(0.04), np.log(0.4))))
        )
        if photographs is not None and not alike and rng.random() < 0.5:
            texture, alpha = _paste(size, max(radius, 4.0), rng, *photographs.cutout(rng))
        else:
            alpha = _shape(size, max(radius, 4.0), rng)
            texture = shared if alike else _texture(size, rng, photographs)
        if rng.random() < 0.6:
            texture = _shade(texture, rng)
        if rng.random() < 0.25:
            image = _shadow(image, alpha, rng)
        opacity = alpha if rng.random() < 0.9 else alpha * rng.uniform(0.6, 0.9)
        image = image + (texture - image) * opacity[..., None]
        solid = alpha > 0.5
        masks = [mask & ~solid for mask in masks] + [solid]
        if rng.random() < 0.2 and radius > 0.08 * size and solid.any():
            part = _shape(size, radius * 0.5, rng, center=_inside(solid, rng)) * alpha
            image = image + (_texture(size, rng, photographs) - image) * part[..., None]
            masks.append(part > 0.5)
    image = _camera(image, rng)
    seen = [mask for mask in masks if mask.sum() >= 16]
    if not seen:
        return generate_scene(config, rng)
    return SyntheticScene(image=image, masks=np.stack(seen))


def _ground(
    size: int, rng: np.random.Generator, photographs: Photographs | None
) -> tuple[NDArray[Any], list[NDArray[Any]]]:
    """Draw what lies behind all objects, and the masks of its regions if it has several."""
    image = _texture(size, rng, photographs)
    if rng.random() < 0.4:
        return image, []
    masks: list[NDArray[Any]] = [np.ones((size, size), bool)]
    ys, xs = np.mgrid[:size, :size].astype(np.float32) / size - 0.5
    for _ in range(int(rng.integers(1, 4))):
        angle = rng.uniform(0, 2 * np.pi)
        cells = int(rng.integers(2, 9))
        waves = cv2.resize(
            rng.standard_normal((cells, cells), dtype=np.float32),
            (size, size),
            interpolation=cv2.INTER_CUBIC,
        )
        height = xs * np.cos(angle) + ys * np.sin(angle) + waves * rng.uniform(0, 0.25)
        coverage = np.clip((height - rng.uniform(-0.4, 0.4)) * size + 0.5, 0, 1)
        image = image + (_texture(size, rng, photographs) - image) * coverage[..., None]
        solid = coverage > 0.5
        masks = [mask & ~solid for mask in masks] + [solid]
    return image, masks


def _inside(mask: NDArray[Any], rng: np.random.Generator) -> tuple[float, float]:
    ys, xs = np.nonzero(mask)
    pick = int(rng.integers(len(xs)))
    return float(xs[pick]), float(ys[pick])


def _texture(size: int, rng: np.random.Generator, photographs: Photographs | None) -> NDArray[Any]:
    """Draw a texture [size, size, 3], float32 in 0..255: noise, stripes, plain or photographed."""
    if photographs is not None and rng.random() < 0.5:
        photograph = photographs.photograph(rng)
        side = int(min(photograph.shape[:2]) * rng.uniform(0.15, 1.0))
        y = int(rng.integers(photograph.shape[0] - side + 1))
        x = int(rng.integers(photograph.shape[1] - side + 1))
        part: NDArray[Any] = cv2.resize(photograph[y : y + side, x : x + side], (size, size))
        if rng.random() < 0.5:
            part = part[:, ::-1]
        lit: NDArray[Any] = part.astype(np.float32) * np.float32(rng.uniform(0.6, 1.3))
        return lit
    low, high = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    if rng.random() < 0.6:  # colours of one material lie close together
        high = low + (high - low) * np.float32(rng.uniform(0.05, 0.5))
    kind = rng.random()
    field: NDArray[Any]
    if kind < 0.15:
        field = np.full((size, size), rng.random(), np.float32)
    elif kind < 0.35:
        angle, period = rng.uniform(0, np.pi), size * np.exp(rng.uniform(np.log(0.02), np.log(0.3)))
        ys, xs = np.mgrid[:size, :size].astype(np.float32)
        phase = (xs * np.cos(angle) + ys * np.sin(angle)) * (2 * np.pi / period)
        field = (0.5 + 0.5 * np.sin(phase + rng.uniform(0, 6.3))).astype(np.float32)
        if rng.random() < 0.5:
            field = (field > rng.uniform(0.3, 0.7)).astype(np.float32)
    else:
        field = np.zeros((size, size), np.float32)
        total, persistence = 0.0, rng.uniform(0.3, 0.9)
        cells, weight = int(rng.integers(2, 6)), 1.0
        while cells < size:
            noise = rng.random((cells, cells), dtype=np.float32)
            field += weight * cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
            total += weight
            cells, weight = cells * 2, weight * persistence
        field = np.clip(field / total, 0, 1)
        if rng.random() < 0.2:
            field = (field > np.median(field)).astype(np.float32)
    texture: NDArray[Any] = low + (high - low) * field[..., None]
    return texture


def _shade(texture: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    """Light a texture from one side."""
    size = texture.shape[0]
    angle = rng.uniform(0, 2 * np.pi)
    ys, xs = np.mgrid[:size, :size].astype(np.float32) / size - 0.5
    slope = (xs * np.cos(angle) + ys * np.sin(angle)) * rng.uniform(0.2, 1.2)
    shaded: NDArray[Any] = texture * (1 + slope[..., None]).astype(np.float32)
    return shaded


def _shape(
    size: int, radius: float, rng: np.random.Generator, center: tuple[float, float] | None = None
) -> NDArray[Any]:
    """Draw one shape's coverage [size, size], float32 in 0..1."""
    x, y = rng.uniform(0.02 * size, 0.98 * size, 2) if center is None else center
    big = size * _OVERSAMPLE
    canvas = np.zeros((big, big), np.uint8)
    kind = rng.random()
    if kind < 0.45:  # a blob: a circle bent by low harmonics
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        radii = np.ones_like(angles)
        for harmonic in range(1, 6):
            strength = rng.uniform(0, 0.35) / harmonic
            radii += strength * np.cos(harmonic * angles + rng.uniform(0, 6.3))
        outline = np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
    elif kind < 0.7:  # a polygon, convex or a star
        corners = int(rng.integers(3, 9))
        angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
        radii = rng.uniform(0.35, 1.0, corners)
        outline = np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
    elif kind < 0.85:  # a box
        outline = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float)
    else:  # a thin, bent band
        steps = np.linspace(-1, 1, 16)
        bend, width = rng.uniform(-1, 1), rng.uniform(0.06, 0.2)
        middle = np.stack([steps * 1.4, bend * steps**2], 1)
        edge = np.array([0, width])
        outline = np.concatenate([middle + edge, middle[::-1] - edge])
    stretch = np.array([1.0, rng.uniform(0.35, 1.0)])
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points = (outline * stretch * radius) @ rotation.T + [x, y]
    fixed = np.round(points * _OVERSAMPLE * 2**_SHIFT).astype(np.int32)
    cv2.fillPoly(canvas, [fixed], 255, lineType=cv2.LINE_AA, shift=_SHIFT)
    if rng.random() < 0.1 and radius > 0.08 * size:  # a hole
        hole = np.round(np.array([x, y]) * _OVERSAMPLE).astype(int)
        hole_radius = int(radius * rng.uniform(0.2, 0.45) * _OVERSAMPLE)
        cv2.circle(canvas, (int(hole[0]), int(hole[1])), hole_radius, 0, -1, cv2.LINE_AA)
    coverage = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    share: NDArray[Any] = coverage.astype(np.float32) / 255
    return share


def _paste(
    size: int,
    radius: float,
    rng: np.random.Generator,
    pixels: NDArray[Any],
    mask: NDArray[Any],
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Place a cut-out object: its texture [size, size, 3] and coverage [size, size]."""
    height, width = mask.shape
    scale = 2 * radius / max(height, width)
    turn = rng.normal(0, 15)
    x, y = rng.uniform(0.02 * size, 0.98 * size, 2)
    move = cv2.getRotationMatrix2D((width / 2, height / 2), turn, scale)
    move[:, 2] += [x - width / 2, y - height / 2]
    if rng.random() < 0.5:
        pixels, mask = pixels[:, ::-1], mask[:, ::-1]
    smooth = cv2.INTER_LINEAR
    if scale < 0.5:  # or thin parts would vanish between the samples
        shrunk = (max(round(width * scale), 1), max(round(height * scale), 1))
        pixels = cv2.resize(np.ascontiguousarray(pixels), shrunk, interpolation=cv2.INTER_AREA)
        mask = cv2.resize(mask.astype(np.float32), shrunk, interpolation=cv2.INTER_AREA)
        move = cv2.getRotationMatrix2D((shrunk[0] / 2, shrunk[1] / 2), turn, 1.0)
        move[:, 2] += [x - shrunk[0] / 2, y - shrunk[1] / 2]
    texture = cv2.warpAffine(
        np.ascontiguousarray(pixels),
        move,
        (size, size),
        flags=smooth,
        borderMode=cv2.BORDER_REPLICATE,
    )
    coverage = cv2.warpAffine(mask.astype(np.float32), move, (size, size), flags=smooth)
    return texture.astype(np.float32), coverage


def _shadow(image: NDArray[Any], alpha: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    size = alpha.shape[0]
    dx, dy = rng.uniform(-0.04, 0.04, 2) * size
    moved = cv2.warpAffine(alpha, np.array([[1, 0, dx], [0, 1, dy]], np.float32), (size, size))
    soft = cv2.GaussianBlur(moved, (0, 0), float(rng.uniform(0.8, 3.0)))
    shadowed: NDArray[Any] = image * (1 - soft[..., None] * np.float32(rng.uniform(0.2, 0.6)))
    return shadowed


def _camera(image: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    """Blur, noise and JPEG, as a camera would add them."""
    if rng.random() < 0.4:
        image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.4, 1.4)))
    if rng.random() < 0.5:
        noise = rng.standard_normal(image.shape, dtype=np.float32)
        image = image + noise * np.float32(rng.uniform(1, 14))
    out: Any = np.clip(image, 0, 255).astype(np.uint8)
    if rng.random() < 0.3:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 95))]
        out = cv2.imdecode(cv2.imencode(".jpg", out, quality)[1], cv2.IMREAD_COLOR)
    photo: NDArray[Any] = out
    return photo
