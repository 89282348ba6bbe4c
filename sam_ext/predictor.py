"""From an image to its embedding, and from prompts to masks, without any state in between."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sam_ext.ba_sam import BaSamConfig
from sam_ext.colours import ColourConfig, outline_contrast, refine_by_colours
from sam_ext.errors import PromptError
from sam_ext.image_encoder import Precision, encode_image, prepare_encoder, resolve_precision
from sam_ext.mask_decoder import Decoded, decode_masks
from sam_ext.prompt_encoder import (
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    NOT_A_POINT,
    dense_position_encoding,
    embed_dense,
    embed_tokens,
)
from sam_ext.resolution import ResolutionPolicy
from sam_ext.sam import Sam, weights_fingerprint
from sam_ext.sam_adapter import read_task_inputs
from sam_ext.stable_sam import StableSam, plugin_for, prepare_stable_sam
from sam_ext.state_dicts import state_fingerprint

__all__ = [
    "Crop",
    "Embedding",
    "ObjectMasks",
    "ObjectPrompt",
    "Predictor",
    "prompt_tokens",
]

# Objects that go through the decoder together, and image tokens that all of them see: bounds its
# memory (6 KB a token), and more are not faster. A CPU is faster with fewer, kept in its cache.
_OBJECTS_AT_ONCE = 64
_TOKENS_AT_ONCE, _TOKENS_AT_ONCE_ON_CPU = 2**18, 2**13

# Which of a point's three masks is best. Chosen with `tiny` on train splits, by the mean over seven
# sets of the IoU of what is chosen, for centres / points drawn from the object: 0.508 / 0.465 by
# the predicted IoU alone, 0.529 / 0.480 with these.
_STABILITY_WEIGHT, _CONTRAST_WEIGHT = 0.2, 0.2

_Pixel = TypeVar("_Pixel", bound=np.generic)


class Crop(NamedTuple):
    """A part of an image, in its pixels; right and bottom are the first outside it."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the part."""
        return self.y1 - self.y0, self.x1 - self.x0


@dataclass(frozen=True, kw_only=True, eq=False)
class ObjectPrompt:
    """What says which one object is meant: points, a box, an earlier mask, or several of them.

    Coordinates are (x, y) in pixels of the original image, as segment-anything's `SamPredictor`
    takes them; they stay sub-pixel.
    """

    point_coords: NDArray[np.floating[Any]]
    """[T, 2]; [0, 2] without points."""
    point_labels: NDArray[np.integer[Any]]
    """[T], 1 for the object and 0 for what is not it."""
    box_xyxy: NDArray[np.floating[Any]] | None = None
    """[4]: left, top, right, bottom."""
    mask_input: NDArray[np.floating[Any]] | None = None
    """[h, w], one of the `low_res_logits` of an earlier answer on the same embedding."""

    def __post_init__(self) -> None:
        coords, labels, box = self.point_coords, self.point_labels, self.box_xyxy
        if coords.ndim != 2 or coords.shape[1] != 2 or labels.shape != coords.shape[:1]:
            raise PromptError(
                "point_coords and point_labels must be [T, 2] and [T], "
                f"got {list(coords.shape)} and {list(labels.shape)}"
            )
        if not np.isin(labels, (0, 1)).all():
            raise PromptError(f"point_labels must be 0 or 1, got {labels.tolist()}")
        if not np.isfinite(coords).all():
            raise PromptError(f"point_coords must be finite, got {coords.tolist()}")
        if box is not None and not (
            box.shape == (4,) and np.isfinite(box).all() and (box[:2] <= box[2:]).all()
        ):
            raise PromptError(
                f"box_xyxy must be finite [left, top, right, bottom], got {box.tolist()}"
            )
        if self.mask_input is not None and not np.isfinite(self.mask_input).all():
            raise PromptError("mask_input must be finite, got NaN or infinity")
        if not len(coords) and box is None and self.mask_input is None:
            raise PromptError("an object must have a point, a box or a mask, got none of them")

    @property
    def is_single_point(self) -> bool:
        """Whether there is one point and nothing else, so that it may mean several objects."""
        return len(self.point_coords) == 1 and self.box_xyxy is None and self.mask_input is None

    @property
    def is_several_points(self) -> bool:
        """Whether there are several points, and no box."""
        return len(self.point_coords) > 1 and self.box_xyxy is None


def prompt_tokens(
    prompt: ObjectPrompt | None,
) -> tuple[NDArray[np.floating[Any]], NDArray[np.int64]]:
    """Write a prompt as SAM's labelled points.

    Args:
        prompt: None asks without any prompt.

    Returns:
        Points [T, 2] in the prompt's pixels, and labels [T] as `embed_tokens` takes them.
    """
    if prompt is None:
        return np.zeros((0, 2)), np.zeros(0, np.int64)
    coords, labels = [prompt.point_coords], [*prompt.point_labels.tolist()]
    if prompt.box_xyxy is not None:
        coords.append(prompt.box_xyxy.reshape(2, 2))
        labels += [BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]
    elif labels:
        coords.append(np.zeros((1, 2)))
        labels.append(NOT_A_POINT)
    return np.concatenate(coords), np.array(labels, np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class ObjectMasks:
    """The masks that one object's prompt may mean."""

    masks: NDArray[np.bool_]
    """[M, H, W], of the original image's size, also where a crop was embedded."""
    iou_predictions: NDArray[np.float32]
    """[M], how well the model expects each mask to overlap the object."""
    low_res_logits: NDArray[np.float32]
    """[M, h, w], what may be given back as `ObjectPrompt.mask_input`."""
    preferences: NDArray[np.float32] | None = None
    """[M], by which the best is chosen where several masks are corrected by colours: the predicted
    IoU, raised where the mask is stable and where its outline parts different colours."""
    routing: float | None = None
    """Stable-SAM's: how much was read from shifted places, in 0..1; None where no plugin took
    part."""

    def agreeing(self, prompt: ObjectPrompt) -> NDArray[np.intp]:
        """Count the points that each mask agrees with: [M].

        A mask agrees with a point that it holds, or that it leaves out if the point's label is 0.
        Points outside the image count as being on its border.
        """
        return _agreeing(self.masks, prompt)

    def best(self, prompt: ObjectPrompt) -> int:
        """Choose a mask among those that agree with most points.

        The one of highest predicted IoU, or where there are preferences the preferred one.
        """
        agreeing = self.agreeing(prompt)
        candidates = np.flatnonzero(agreeing == agreeing.max())
        scores = self.iou_predictions if self.preferences is None else self.preferences
        return int(candidates[scores[candidates].argmax()])


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding:
    """An image, or a crop of one, as the decoder sees it."""

    image_embeddings: Tensor
    """[1, 256, h, w], padding included, in the encoder's precision."""
    original_size: tuple[int, int]
    """(H, W) of the image."""
    input_size: tuple[int, int]
    """(H, W) to which it, or its crop, was resized for the encoder, padding left out."""
    padded_size: tuple[int, int]
    """(H, W) of the encoder's input, padding at the bottom and right included."""
    crop: Crop | None = None
    """The part of the image that was embedded; None for all of it."""
    guide: NDArray[np.uint8] | None = None
    """[h, w, 3] RGB: what was encoded, at the input size; None where colours do not count."""

    @property
    def region(self) -> Crop:
        """The part of the image that was embedded, also where that is all of it."""
        return self.crop or Crop(0, 0, self.original_size[1], self.original_size[0])

    @property
    def nbytes(self) -> int:
        """The memory that keeping this takes."""
        return self.image_embeddings.nbytes + (0 if self.guide is None else self.guide.nbytes)


class Predictor:
    """Answers prompts with one SAM.

    Nothing changes after construction, so threads may share it. Everything runs in inference mode.
    With the defaults, on the same weights and prompts, the answers are those of
    segment-anything's `SamPredictor`.
    """

    def __init__(
        self,
        sam: Sam,
        *,
        ba_sam: BaSamConfig | None = None,
        policy: ResolutionPolicy | None = None,
        precision: Precision = "fp32",
        stable_sam: StableSam | None = None,
        colours: ColourConfig | None = None,
        compiled: bool = False,
    ) -> None:
        """Take over a SAM, which must not be changed from here on.

        Args:
            sam: The model, in single precision.
            ba_sam: What the encoder does away from its training size; None is plain SAM.
            policy: At which size images are encoded; None is SAM's own square.
            precision: Of the encoder and of the plugin's largest product, as `resolve_precision`
                takes it; the decoder's is single.
            stable_sam: Plugin for sloppy prompts, trained with this SAM. One for all prompts
                answers a single point with the single mask, as it was trained to: with the whole
                object.
            colours: How masks are corrected by the image's colours; None leaves them alone.
            compiled: Compile the encoder, once for each shape of its input (minutes each on a CPU):
                for GPUs, with a policy whose `pad_to` leaves few shapes.

        Raises:
            ConfigError: If `precision` is none of those.
        """
        self._sam = sam
        self._ba_sam = ba_sam or BaSamConfig()
        self.policy: ResolutionPolicy = policy or ResolutionPolicy()
        """At which size images are encoded."""
        self.image_size: int = sam.image_encoder.img_size
        """The side in pixels of the training square."""
        self._patch_size: int = sam.image_encoder.patch_embed.proj.kernel_size[0]
        self.mask_threshold: float = sam.mask_threshold
        """Logits above it are of the mask."""
        self.device: torch.device = sam.device
        dtype = resolve_precision(self.device, precision)
        self._encoder = prepare_encoder(sam.image_encoder, dtype)
        self._compiled = (
            torch.compile(encode_image, fullgraph=True, dynamic=False) if compiled else None
        )
        self.stable_sam: StableSam | None = (
            None if stable_sam is None else prepare_stable_sam(stable_sam.to(self.device), dtype)
        )
        """The plugin for sloppy prompts, if there is one."""
        self.colours: ColourConfig | None = colours
        """How masks are corrected by the image's colours, if they are."""
        settings = (self._ba_sam, self.policy, dtype, *(["guide"] if colours else []))
        self.embedding_fingerprint: str = _digest(f"{weights_fingerprint(sam)} {settings}")
        """Hex digest of all that embeddings depend on: equal if every embedding is equal."""
        plugin = ""
        if stable_sam is not None:
            plugin = f"{state_fingerprint(stable_sam)} {stable_sam.scope}"
        corrected = "" if colours is None else f" {colours}"
        self.fingerprint: str = _digest(f"{self.embedding_fingerprint} {plugin}{corrected}")
        """Hex digest of the weights, sizes and settings: equal exactly if every answer is equal."""
        # Several milliseconds of each click otherwise; few grids occur.
        self._position_encoding = lru_cache(maxsize=16)(
            partial(dense_position_encoding, sam.prompt_encoder)
        )

    def input_size(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return the size (H, W) to which an image, or a crop, of a size is resized."""
        return self.policy.input_size(
            image_hw, train_side=self.image_size, patch_size=self._patch_size
        )

    def padded_size(self, input_size: tuple[int, int]) -> tuple[int, int]:
        """Return the size (H, W) of the encoder's input for what is resized to `input_size`."""
        return self.policy.padded_size(
            input_size, train_side=self.image_size, patch_size=self._patch_size
        )

    @torch.inference_mode()
    def embed(
        self,
        image: NDArray[np.uint8],
        *,
        crop: Crop | None = None,
        pause: Callable[[], None] | None = None,
    ) -> Embedding:
        """Encode an image, or a crop of it.

        Args:
            image: [H, W, 3] RGB in 0..255, of any size; it is resized as the policy says and
                padded at the bottom and right.
            crop: Encode this part only; prompts and masks stay those of the whole image.
            pause: As `encode_image` takes it; a compiled encoder does not pause.

        Raises:
            PromptError: If `image` has another shape or type, or `crop` is not a part of it.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise PromptError(
                f"image must be [H, W, 3] uint8, got {list(image.shape)} {image.dtype}"
            )
        height, width = image.shape[:2]
        if crop is not None:
            if not (0 <= crop.x0 < crop.x1 <= width and 0 <= crop.y0 < crop.y1 <= height):
                raise PromptError(
                    f"crop must lie in the image of {height} x {width} (H x W) and hold a pixel, "
                    f"got {crop}"
                )
            image = np.ascontiguousarray(image[crop.y0 : crop.y1, crop.x0 : crop.x1])
        input_size = self.input_size((image.shape[0], image.shape[1]))
        padded_size = self.padded_size(input_size)
        resized = Image.fromarray(image).resize(input_size[::-1], Image.Resampling.BILINEAR)
        pixels = torch.tensor(np.asarray(resized)).permute(2, 0, 1)  # [3, h, w]
        if self.device.type == "cuda":
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        images = (pixels.to(self.device) - self._sam.pixel_mean) / self._sam.pixel_std
        padding = (0, padded_size[1] - input_size[1], 0, padded_size[0] - input_size[0])
        padded = F.pad(images, padding)[None]
        # Read out here: what is compiled is the same for all sizes of one padded size.
        inputs = read_task_inputs(self._encoder, padded, input_size)
        if self._compiled is None:
            embeddings = encode_image(
                self._encoder, padded, ba_sam=self._ba_sam, pause=pause, task_inputs=inputs
            )
        else:
            embeddings = self._compiled(
                self._encoder, padded, ba_sam=self._ba_sam, task_inputs=inputs
            )
        return Embedding(
            image_embeddings=embeddings,
            original_size=(height, width),
            input_size=input_size,
            padded_size=padded_size,
            crop=crop,
            guide=None if self.colours is None else np.asarray(resized),
        )

    def decode(
        self,
        embedding: Embedding,
        prompts: Sequence[ObjectPrompt],
        *,
        multimask_output: bool | None = None,
    ) -> list[ObjectMasks]:
        """Predict the masks of each prompted object.

        Args:
            embedding: What `embed` gave for the image.
            prompts: The objects; each is answered as if it were alone.
            multimask_output: Three masks an object, or one; None gives three to an object with
                exactly one point and nothing else, which may mean a part or the whole, unless
                a plugin answers that.

        Returns:
            One answer a prompt, in their order. Colours do not correct a mask that would then
            be empty, or agree with fewer of the prompt's points.

        Raises:
            PromptError: If a `mask_input` has another size than this embedding's logits, or the
                embedding lacks the image that colours are taken from.
        """
        answers = []
        for prompt, (low_res, iou_predictions, routing) in zip(
            prompts, self.decode_low_res(embedding, prompts), strict=True
        ):
            ambiguous = prompt.is_single_point and self._plugin_for(prompt) is None
            several = ambiguous if multimask_output is None else multimask_output
            chosen = slice(1, None) if several else slice(0, 1)
            masks = np.stack([self._mask(embedding, one, prompt) for one in low_res[chosen]])
            # Copied: a view would keep the logits of the whole batch alive.
            predicted = iou_predictions[chosen].cpu().numpy().copy()
            logits = low_res[chosen].cpu().numpy().copy()
            answers.append(
                ObjectMasks(
                    masks=masks,
                    iou_predictions=predicted,
                    low_res_logits=logits,
                    preferences=_preferences(embedding, masks, predicted, logits)
                    if several and self.colours is not None
                    else None,
                    routing=None if routing is None else float(routing[0]),
                )
            )
        return answers

    @torch.inference_mode()
    def decode_low_res(
        self, embedding: Embedding, prompts: Sequence[ObjectPrompt | None]
    ) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Predict each object's four masks, the single one first, at the decoder's resolution.

        Args:
            embedding: What `embed` gave for the image.
            prompts: The objects; None asks without a prompt, see `answer_prompt_free`.

        Returns:
            For each prompt logits [4, h, w], padding included, IoU predictions [4], and where a
            plugin took part its routing [2].

        Raises:
            PromptError: If a `mask_input` has another size than this embedding's logits.
        """
        grid_h, grid_w = embedding.image_embeddings.shape[-2:]
        wanted = (4 * grid_h, 4 * grid_w)
        groups: defaultdict[tuple[int, bool, bool], list[int]] = defaultdict(list)
        tokens = [self._tokens(embedding, prompt) for prompt in prompts]
        for index, prompt in enumerate(prompts):
            mask = None if prompt is None else prompt.mask_input
            if mask is not None and mask.shape != wanted:
                raise PromptError(
                    f"prompts[{index}].mask_input must be {list(wanted)}, as this image's "
                    f"low_res_logits are, got {list(mask.shape)}"
                )
            # Padding to a common number of tokens would change the answers: no token is ignored.
            has_plugin = self._plugin_for(prompt) is not None
            groups[len(tokens[index][1]), mask is not None, has_plugin].append(index)

        most = _TOKENS_AT_ONCE_ON_CPU if self.device.type == "cpu" else _TOKENS_AT_ONCE
        at_once = min(_OBJECTS_AT_ONCE, max(1, most // (grid_h * grid_w)))
        answers: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
        for (_, _, has_plugin), group in groups.items():
            for start in range(0, len(group), at_once):
                part = group[start : start + at_once]
                asked = [prompt for index in part if (prompt := prompts[index]) is not None]
                masks = [prompt.mask_input for prompt in asked if prompt.mask_input is not None]
                decoded = self._decode_group(
                    embedding,
                    coords=np.stack([tokens[index][0] for index in part]),
                    labels=np.stack([tokens[index][1] for index in part]),
                    mask_input=np.stack(masks)[:, None] if masks else None,
                    stable_sam=self.stable_sam if has_plugin else None,
                )
                for row, index in enumerate(part):
                    routing = None if decoded.routing is None else decoded.routing[row]
                    answers[index] = (
                        decoded.low_res_logits[row],
                        decoded.iou_predictions[row],
                        routing,
                    )
        return [answers[index] for index in range(len(prompts))]

    def full_mask(self, embedding: Embedding, low_res: Tensor) -> NDArray[np.bool_]:
        """Bring one mask's logits [h, w] to the original image's size and threshold them.

        Colours correct it, if they are to. Outside an embedding's crop the mask is empty.

        Raises:
            PromptError: If the embedding lacks the image that colours are taken from.
        """
        if self.colours is None:
            return self._plain_mask(embedding, low_res)
        if embedding.guide is None:
            raise PromptError(
                "embedding must hold its image, for its colours, got one without; make it with "
                "this predictor, or one that has `colours` as well"
            )
        logits = _logits_at_input(embedding, low_res) - self.mask_threshold
        probabilities = refine_by_colours(logits, embedding.guide, self.colours)
        mask = cv2.resize(probabilities, embedding.region.size[::-1]) > 0.5
        return _pasted(embedding, mask, outside=False)

    def _plain_mask(self, embedding: Embedding, low_res: Tensor) -> NDArray[np.bool_]:
        mask: NDArray[np.bool_] = _resized_logits(embedding, low_res) > self.mask_threshold
        return _pasted(embedding, mask, outside=False)

    def _mask(
        self, embedding: Embedding, low_res: Tensor, prompt: ObjectPrompt
    ) -> NDArray[np.bool_]:
        """Do what `full_mask` does, unless the mask loses all or a point by its colours."""
        mask = self.full_mask(embedding, low_res)
        if self.colours is None or (mask.any() and not len(prompt.point_coords)):
            return mask
        plain = self._plain_mask(embedding, low_res)
        if not mask.any():
            return plain
        corrected, before = _agreeing(np.stack([mask, plain]), prompt)
        return mask if corrected >= before else plain

    def full_logits(self, embedding: Embedding, low_res: Tensor) -> NDArray[np.float32]:
        """Bring one mask's logits [h, w] to the original image's size.

        Outside an embedding's crop they are minus infinity.
        """
        return _pasted(embedding, _resized_logits(embedding, low_res), outside=-np.inf)

    def _plugin_for(self, prompt: ObjectPrompt | None) -> StableSam | None:
        is_several_points = prompt is not None and prompt.is_several_points
        return plugin_for(self.stable_sam, is_several_points=is_several_points)

    def _tokens(
        self, embedding: Embedding, prompt: ObjectPrompt | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Write a prompt as SAM's labelled points [T, 2], [T] in pixels of the encoder's input."""
        coords, labels = prompt_tokens(prompt)
        region = embedding.region
        (height, width), (input_h, input_w) = region.size, embedding.input_size
        scale = np.array([input_w / width, input_h / height])
        return ((coords - region[:2]) * scale).astype(np.float32), labels

    def _decode_group(
        self,
        embedding: Embedding,
        *,
        coords: NDArray[np.float32],
        labels: NDArray[np.int64],
        mask_input: NDArray[np.floating[Any]] | None,
        stable_sam: StableSam | None,
    ) -> Decoded:
        """Decode objects [P, T, 2], [P, T], [P, 1, 4h, 4w] that have equally many tokens."""
        encoder = self._sam.prompt_encoder
        grid_hw = (embedding.image_embeddings.shape[2], embedding.image_embeddings.shape[3])
        sparse = embed_tokens(
            encoder,
            torch.from_numpy(coords).to(self.device),
            torch.from_numpy(labels).to(self.device),
            input_size=embedding.padded_size,
        )
        mask = None
        if mask_input is not None:
            mask = torch.from_numpy(mask_input.astype(np.float32)).to(self.device)
        return decode_masks(
            self._sam.mask_decoder,
            embedding.image_embeddings.float(),
            image_pe=self._position_encoding(grid_hw),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=embed_dense(encoder, mask, grid_hw=grid_hw),
            stable_sam=stable_sam,
        )


def _logits_at_input(embedding: Embedding, low_res: Tensor) -> NDArray[np.float32]:
    """Bring logits [h, w] to the input size."""
    height, width = embedding.input_size
    # cv2 resizes as torch does, to 1e-7, ten times faster on a CPU.
    logits: NDArray[np.float32] = cv2.resize(low_res.cpu().numpy(), embedding.padded_size[::-1])
    return logits[:height, :width]


def _resized_logits(embedding: Embedding, low_res: Tensor) -> NDArray[np.float32]:
    """Bring logits [h, w] to the size of what was embedded."""
    resized: NDArray[np.float32] = cv2.resize(
        _logits_at_input(embedding, low_res), embedding.region.size[::-1]
    )
    return resized


def _preferences(
    embedding: Embedding,
    masks: NDArray[np.bool_],
    iou_predictions: NDArray[np.float32],
    low_res_logits: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Say how far each of the masks [M, H, W] of one prompt is to be preferred: [M]."""
    assert embedding.guide is not None
    x0, y0, x1, y1 = embedding.region
    preferences = iou_predictions.copy()
    for number, (mask, logits) in enumerate(zip(masks, low_res_logits, strict=True)):
        part = mask[y0:y1, x0:x1].astype(np.uint8)
        at_input = cv2.resize(part, embedding.input_size[::-1], interpolation=cv2.INTER_NEAREST)
        stability = np.count_nonzero(logits > 1) / max(np.count_nonzero(logits > -1), 1)
        contrast = outline_contrast(at_input > 0, embedding.guide)
        preferences[number] += _STABILITY_WEIGHT * stability + _CONTRAST_WEIGHT * contrast
    return preferences


def _agreeing(masks: NDArray[np.bool_], prompt: ObjectPrompt) -> NDArray[np.intp]:
    """Count the points that each of the masks [M, H, W] agrees with: [M]."""
    height, width = masks.shape[1:]
    columns = np.clip(np.floor(prompt.point_coords[:, 0]), 0, width - 1).astype(np.intp)
    rows = np.clip(np.floor(prompt.point_coords[:, 1]), 0, height - 1).astype(np.intp)
    counts: NDArray[np.intp] = (masks[:, rows, columns] == (prompt.point_labels == 1)).sum(axis=1)
    return counts


def _pasted(embedding: Embedding, part: NDArray[_Pixel], *, outside: float) -> NDArray[_Pixel]:
    """Put what was embedded where it is in the image."""
    if embedding.crop is None:
        return part
    region = embedding.region
    pasted = np.full(embedding.original_size, outside, part.dtype)
    pasted[region.y0 : region.y1, region.x0 : region.x1] = part
    return pasted


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
