"""Generated images: textured, shaded, overlapping, anti-aliased objects with exact masks.

With photographs at hand, textures are also cut from them, objects cut out of them are pasted among
the shapes, and some are the ground themselves, with their own objects.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    size: int = 256
    """Side of the square image in pixels."""
    objects: tuple[int, int] = (3, 14)
    """Fewest and most objects; a crowd of like ones has up to three times as many."""

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

    def annotated(self, rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
        """Draw an image [H, W, 3] uint8 RGB and the masks of its objects [K, H, W], 0 or 1."""
        ...


def generate_scene(
    config: SyntheticConfig, rng: np.random.Generator, photographs: Photographs | None = None
) -> SyntheticScene:
    """Draw one scene; the same generator state draws the same scene.

    The ground is one texture, several that meet along wavy or straight borders (as sky, water and
    grass do, or a floor and walls), or a photograph; each region is an object, too. Objects are
    drawn from back to front; a later one hides what lies under it. There are simple shapes, things
    made of parts (each part is an object, and may have a part of its own), thin structures, and
    objects cut out of photographs. Some have a hole through which the scene behind is seen, some
    are transparent; in some scenes all objects are alike, a crowd in which telling them apart is
    the task.
    """
    size = config.size
    image, masks = _ground(size, rng, photographs)
    if rng.random() < 0.5:
        image = _shade(image, rng)
    if rng.random() < 0.15:  # out of focus
        image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(1, 4)))
    count = int(rng.integers(config.objects[0], config.objects[1] + 1))
    likeness = _Likeness(size, rng, photographs) if rng.random() < 0.25 else None
    if likeness is not None:
        count *= int(rng.integers(1, 4))
    for _ in range(count):
        thing = _thing(size, rng, photographs) if likeness is None else likeness.another(rng)
        if rng.random() < 0.25:
            image = _shadow(image, thing.alpha, rng)
        opacity = thing.alpha if rng.random() < 0.9 else thing.alpha * rng.uniform(0.6, 0.9)
        image = image + (thing.texture - image) * opacity[..., None]
        solid = thing.alpha > 0.5
        masks = [mask & ~solid for mask in masks] + [solid, *thing.parts]
    if rng.random() < 0.3:
        image = _light(image, rng)
    image = _camera(image, rng)
    seen = [mask for mask in masks if mask.sum() >= 16]
    if not seen:
        return generate_scene(config, rng)
    return SyntheticScene(image=image, masks=np.stack(seen))


@dataclass(frozen=True, eq=False)
class _Thing:
    """An object that is not yet in its scene."""

    texture: NDArray[Any]
    """[H, W, 3] float32 in 0..255."""
    alpha: NDArray[Any]
    """[H, W] float32 in 0..1: its coverage."""
    parts: Sequence[NDArray[Any]] = ()
    """Masks [H, W] bool of its parts, and of theirs."""


class _Likeness:
    """What the objects of a crowd have in common: size, material, place, and perhaps shape."""

    def __init__(
        self, size: int, rng: np.random.Generator, photographs: Photographs | None
    ) -> None:
        self._size = size
        self._radius = size * float(np.exp(rng.uniform(np.log(0.03), np.log(0.25))))
        self._texture = _texture(size, rng, photographs)
        self._spread = rng.uniform(0.15, 0.6) * size
        self._middle = rng.uniform(0.2, 0.8, 2) * size
        self._cutout = (
            photographs.cutout(rng) if photographs is not None and rng.random() < 0.4 else None
        )
        self._outline = _outline(rng) if rng.random() < 0.5 else None

    def another(self, rng: np.random.Generator) -> _Thing:
        """Draw the next one."""
        radius = max(self._radius * rng.uniform(0.8, 1.2), 4.0)
        x, y = np.clip(rng.normal(self._middle, self._spread), 0, self._size - 1)
        if self._cutout is not None:
            texture, alpha = _paste(self._size, radius, rng, *self._cutout, center=(x, y))
            return _Thing(_shade(texture, rng), alpha)
        outline = _outline(rng) if self._outline is None else self._outline
        alpha = _shape(self._size, radius, rng, center=(x, y), outline=outline)
        return _Thing(_shade(self._texture, rng), alpha)


def _thing(size: int, rng: np.random.Generator, photographs: Photographs | None) -> _Thing:
    """Draw an object of any kind, size and place."""
    radius = max(size * float(np.exp(rng.uniform(np.log(0.04), np.log(0.45)))), 4.0)
    kind = rng.random()
    if photographs is not None and kind < 0.4:
        texture, alpha = _paste(size, radius, rng, *photographs.cutout(rng))
        return _Thing(_shade(texture, rng) if rng.random() < 0.6 else texture, alpha)
    if kind > 0.92:
        return _Thing(_texture(size, rng, photographs), _thin(size, radius, rng))
    if kind > 0.7 and radius > 0.08 * size:
        return _compound(size, radius, rng, photographs)
    alpha = _shape(size, radius, rng)
    texture = _texture(size, rng, photographs)
    if rng.random() < 0.6:
        texture = _shade(texture, rng)
    solid = alpha > 0.5
    if rng.random() < 0.25 and radius > 0.08 * size and solid.any():
        patch = _shape(size, radius * 0.5, rng, center=_inside(solid, rng)) * alpha
        texture = texture + (_texture(size, rng, photographs) - texture) * patch[..., None]
        return _Thing(texture, alpha, [patch > 0.5])
    return _Thing(texture, alpha)


def _compound(
    size: int, radius: float, rng: np.random.Generator, photographs: Photographs | None
) -> _Thing:
    """Draw a thing made of parts: a body, and members that start on it or behind it."""
    center = tuple(rng.uniform(0.05 * size, 0.95 * size, 2))
    body = _shape(size, radius * rng.uniform(0.4, 0.7), rng, center=center)
    material = _texture(size, rng, photographs)
    texture, alpha = _shade(material, rng), body
    parts = [body > 0.5]
    for _ in range(int(rng.integers(1, 6))):
        if not parts[0].any():
            break
        start = np.array(_inside(parts[0], rng))
        reach = radius * rng.uniform(0.2, 0.8)
        angle = rng.uniform(0, 2 * np.pi)
        if rng.random() < 0.5:  # a limb
            end = start + reach * 1.5 * np.array([np.cos(angle), np.sin(angle)])
            member = _stroke(size, np.stack([start, end]), radius * rng.uniform(0.08, 0.3))
        else:
            middle = start + 0.7 * reach * np.array([np.cos(angle), np.sin(angle)])
            member = _shape(size, reach * 0.6, rng, center=(middle[0], middle[1]))
        own = material if rng.random() < 0.4 else _texture(size, rng, photographs)
        own = _shade(own, rng)
        is_behind = rng.random() < 0.4
        seen = member * (1 - alpha) if is_behind else member
        texture = texture + (own - texture) * seen[..., None]
        alpha = np.maximum(alpha, member)
        solid = seen > 0.5
        parts = [part & ~solid for part in parts] + [solid]
    solid = parts[int(rng.integers(len(parts)))]
    if rng.random() < 0.4 and solid.any():  # a part of a part
        patch = _shape(size, radius * 0.25, rng, center=_inside(solid, rng)) * solid
        texture = texture + (_texture(size, rng, photographs) - texture) * patch[..., None]
        parts.append(patch > 0.5)
    return _Thing(texture, alpha, parts)


def _thin(size: int, radius: float, rng: np.random.Generator) -> NDArray[Any]:
    """Draw the coverage [size, size] of branches, or of a lattice seen at an angle."""
    x, y = rng.uniform(0.1 * size, 0.9 * size, 2)
    width = rng.uniform(1.0, max(0.12 * radius, 1.5))
    if rng.random() < 0.3:
        cover = np.zeros((size, size), np.float32)
        bars = int(rng.integers(2, 6))
        turn = rng.uniform(0, np.pi)
        for lean in (turn, turn + rng.uniform(0.8, np.pi / 2)):
            along, across = (
                np.array([np.cos(lean), np.sin(lean)]),
                np.array([-np.sin(lean), np.cos(lean)]),
            )
            for offset in np.linspace(-radius, radius, bars):
                middle = np.array([x, y]) + across * offset
                line = np.stack([middle - along * radius, middle + along * radius])
                cover = np.maximum(cover, _stroke(size, line, width))
        return cover
    cover = np.zeros((size, size), np.float32)
    tips = [(np.array([x, y]), rng.uniform(0, 2 * np.pi))]
    for _ in range(int(rng.integers(1, 8))):
        start, angle = tips[int(rng.integers(len(tips)))]
        angle = angle + rng.normal(0, 0.6)
        bend = rng.normal(0, 0.3)
        steps = [start]
        for _ in range(5):
            angle += bend
            steps.append(steps[-1] + radius / 4 * np.array([np.cos(angle), np.sin(angle)]))
        cover = np.maximum(cover, _stroke(size, np.stack(steps), width))
        tips += [(step, angle) for step in steps[2:]]
    return cover


def _stroke(size: int, points_xy: NDArray[Any], width: float) -> NDArray[Any]:
    """Draw the coverage [size, size], float32 in 0..1, of a line through points [T, 2]."""
    canvas = np.zeros((size * _OVERSAMPLE, size * _OVERSAMPLE), np.uint8)
    fixed = np.round(points_xy * _OVERSAMPLE * 2**_SHIFT).astype(np.int32)
    thickness = max(round(width * _OVERSAMPLE), 1)
    cv2.polylines(canvas, [fixed], False, 255, thickness, cv2.LINE_AA, _SHIFT)
    return _coverage(canvas, size)


def _coverage(canvas: NDArray[Any], size: int) -> NDArray[Any]:
    share: NDArray[Any] = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    return share.astype(np.float32) / 255


def _ground(
    size: int, rng: np.random.Generator, photographs: Photographs | None
) -> tuple[NDArray[Any], list[NDArray[Any]]]:
    """Draw what lies behind all objects, and the masks of its regions if it has several."""
    kind = rng.random()
    if photographs is not None and kind < 0.3:
        return _photographed_ground(size, rng, *photographs.annotated(rng))
    image = _texture(size, rng, photographs)
    if kind < 0.45:
        return image, []
    masks: list[NDArray[Any]] = [np.ones((size, size), bool)]
    ys, xs = np.mgrid[:size, :size].astype(np.float32) / size - 0.5
    meeting = rng.uniform(-0.3, 0.3, 2) if rng.random() < 0.3 else None  # a corner of a room
    for _ in range(int(rng.integers(1, 4))):
        angle = rng.uniform(0, 2 * np.pi)
        height = xs * np.cos(angle) + ys * np.sin(angle)
        level = rng.uniform(-0.4, 0.4)
        if meeting is not None:
            level = meeting[0] * np.cos(angle) + meeting[1] * np.sin(angle)
        else:
            cells = int(rng.integers(2, 9))
            waves = cv2.resize(
                rng.standard_normal((cells, cells), dtype=np.float32),
                (size, size),
                interpolation=cv2.INTER_CUBIC,
            )
            height = height + waves * rng.uniform(0, 0.25)
        coverage = np.clip((height - level) * size + 0.5, 0, 1)
        texture = _texture(size, rng, photographs)
        if rng.random() < 0.5:
            texture = _shade(texture, rng)
        image = image + (texture - image) * coverage[..., None]
        solid = coverage > 0.5
        masks = [mask & ~solid for mask in masks] + [solid]
    return image, masks


def _photographed_ground(
    size: int, rng: np.random.Generator, photograph: NDArray[Any], masks: NDArray[Any]
) -> tuple[NDArray[Any], list[NDArray[Any]]]:
    """Take a square part of a photograph, at its own scale or enlarged, with what lies in it."""
    shorter = min(photograph.shape[:2])
    side = int(shorter * rng.uniform(0.6, 1.0))
    y = int(rng.integers(photograph.shape[0] - side + 1))
    x = int(rng.integers(photograph.shape[1] - side + 1))
    place = np.s_[y : y + side, x : x + side]
    image = cv2.resize(photograph[place], (size, size), interpolation=cv2.INTER_AREA)
    cut = [
        cv2.resize(mask[place], (size, size), interpolation=cv2.INTER_NEAREST) > 0 for mask in masks
    ]
    return image.astype(np.float32), cut


def _light(image: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    """Let light and shade fall over everything: a soft field, or the edge of a shadow."""
    size = image.shape[0]
    cells = int(rng.integers(2, 6))
    field = cv2.resize(
        rng.standard_normal((cells, cells), dtype=np.float32),
        (size, size),
        interpolation=cv2.INTER_CUBIC,
    )
    if rng.random() < 0.5:
        field = np.clip(field * rng.uniform(3, 20), -1, 1)
    lit: NDArray[Any] = image * (1 + np.float32(rng.uniform(0.1, 0.35)) * field[..., None])
    return lit


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


def _outline(rng: np.random.Generator) -> NDArray[Any]:
    """Draw the outline [T, 2] of a shape about the origin, about 1 wide."""
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
    stretched: NDArray[Any] = outline * np.array([1.0, rng.uniform(0.35, 1.0)])
    return stretched


def _shape(
    size: int,
    radius: float,
    rng: np.random.Generator,
    *,
    center: tuple[float, float] | None = None,
    outline: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Draw one shape's coverage [size, size], float32 in 0..1."""
    x, y = rng.uniform(0.02 * size, 0.98 * size, 2) if center is None else center
    big = size * _OVERSAMPLE
    canvas = np.zeros((big, big), np.uint8)
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    drawn = _outline(rng) if outline is None else outline
    points = drawn * radius @ rotation.T + [x, y]
    fixed = np.round(points * _OVERSAMPLE * 2**_SHIFT).astype(np.int32)
    cv2.fillPoly(canvas, [fixed], 255, lineType=cv2.LINE_AA, shift=_SHIFT)
    if rng.random() < 0.1 and radius > 0.08 * size:  # a hole
        hole = np.round(np.array([x, y]) * _OVERSAMPLE).astype(int)
        hole_radius = int(radius * rng.uniform(0.2, 0.45) * _OVERSAMPLE)
        cv2.circle(canvas, (int(hole[0]), int(hole[1])), hole_radius, 0, -1, cv2.LINE_AA)
    return _coverage(canvas, size)


def _paste(
    size: int,
    radius: float,
    rng: np.random.Generator,
    pixels: NDArray[Any],
    mask: NDArray[Any],
    *,
    center: tuple[float, float] | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Place a cut-out object: its texture [size, size, 3] and coverage [size, size]."""
    height, width = mask.shape
    scale = 2 * radius / max(height, width)
    turn = rng.normal(0, 15)
    x, y = rng.uniform(0.02 * size, 0.98 * size, 2) if center is None else center
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
