import copy
import threading
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segment_anything import SamPredictor

from sam_ext import predictor as predictor_module
from sam_ext.ba_sam import BaSamConfig
from sam_ext.colours import ColourConfig, outline_contrast, refine_by_colours
from sam_ext.config import MODELS
from sam_ext.errors import ConfigError, PromptError
from sam_ext.image_encoder import encode_image
from sam_ext.mask_decoder import decode_masks
from sam_ext.predictor import Crop, ObjectMasks, ObjectPrompt, Predictor
from sam_ext.resolution import ResolutionPolicy
from sam_ext.sam import build_sam
from sam_ext.stable_sam import StableSam
from tests.conftest import build_small_sam


@pytest.fixture(scope="module")
def tiny_sam():
    """Build the bundled size with weights that all matter: position tables start at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        sam = build_sam(MODELS["tiny"])
        for name, parameter in sam.named_parameters():
            if "pos" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    return sam


def draw(height, width, seed=0):
    """Draw soft blobs on noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    image = rng.integers(0, 60, (height, width, 3)).astype(np.float64)
    for _ in range(4):
        cy, cx, radius = rng.uniform(0.1, 0.6, 3)
        blob = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (0.1 * radius))
        image += blob[..., None] * rng.uniform(0, 120, 3)
    return image.clip(0, 255).astype(np.uint8)


def prompt(points=(), labels=(), box=None, mask=None):
    return ObjectPrompt(
        point_coords=np.array(points, np.float64).reshape(-1, 2),
        point_labels=np.array(labels, np.int64),
        box_xyxy=None if box is None else np.array(box, np.float64),
        mask_input=mask,
    )


def reference(sam, image):
    """Let segment-anything itself embed an image."""
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    return predictor


def assert_equals_reference(got, predictor, one, *, multimask_output):
    has_points = len(one.point_coords) > 0
    logits, iou_predictions, low_res_logits = predictor.predict(
        point_coords=one.point_coords if has_points else None,
        point_labels=one.point_labels if has_points else None,
        box=one.box_xyxy,
        mask_input=None if one.mask_input is None else one.mask_input[None],
        multimask_output=multimask_output,
        return_logits=True,
    )
    # Fused attention and batches add up in another order, so logits differ in the last digits; a
    # pixel whose logit is zero but for these may fall on either side.
    sure = np.abs(logits) > 1e-5
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(got.masks[sure], logits[sure] > 0)
    np.testing.assert_allclose(got.low_res_logits, low_res_logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got.iou_predictions, iou_predictions, rtol=0, atol=1e-5)
    assert 0 < got.masks.mean() < 1  # else equality proves little
    assert got.masks.dtype == np.bool_
    assert (got.iou_predictions.dtype, got.low_res_logits.dtype) == (np.float32, np.float32)


def assert_same(got, wanted):
    np.testing.assert_array_equal(got.masks, wanted.masks)
    np.testing.assert_array_equal(got.iou_predictions, wanted.iou_predictions)
    np.testing.assert_array_equal(got.low_res_logits, wanted.low_res_logits)


def prompts_of_every_kind(height, width, mask_side):
    mask = np.random.default_rng(3).normal(0, 4, (mask_side, mask_side)).astype(np.float32)
    box = [0.1 * width, 0.2 * height, 0.77 * width, 0.9 * height]
    points = [[0.25 * width, 0.5 * height + 0.3], [0.6 * width - 0.1, 0.4 * height]]
    return {
        "one point": prompt(points[:1], [1]),
        "one negative point": prompt(points[:1], [0]),
        "two points": prompt(points, [1, 0]),
        "two other points": prompt([[0, 0], [width - 1, height - 1]], [1, 1]),
        "a box": prompt(box=box),
        "the whole image": prompt(box=[0, 0, width, height]),
        "a box and a point": prompt(points[:1], [1], box),
        "a box and two points": prompt(points, [0, 1], box),
        "a box and a mask": prompt(box=box, mask=mask),
        "a point and a mask": prompt(points[:1], [1], mask=-mask),
        "another point and a mask": prompt(points[1:], [1], mask=mask),
        "a mask alone": prompt(mask=mask),
    }


@pytest.mark.parametrize(
    "size_hw",
    [
        pytest.param((75, 133), id="wide"),
        pytest.param((301, 140), id="tall"),
        pytest.param((40, 23), id="smaller than the training size"),
        pytest.param((64, 64), id="the small model's training size"),
    ],
)
@pytest.mark.parametrize("model", ["small_sam", "tiny_sam"])
def test_equals_segment_anything_for_every_kind_of_prompt(model, size_hw, request):
    sam = request.getfixturevalue(model)
    image = draw(*size_hw)
    predictor = Predictor(sam)
    embedding = predictor.embed(image)
    prompts = prompts_of_every_kind(*size_hw, mask_side=predictor.image_size // 4)

    wanted = reference(sam, image)
    for multimask_output in (True, False):
        got = predictor.decode(embedding, list(prompts.values()), multimask_output=multimask_output)
        for one, answer in zip(prompts.values(), got, strict=True):
            assert_equals_reference(answer, wanted, one, multimask_output=multimask_output)


def test_the_embedding_equals_segment_anythings(tiny_sam):
    image = draw(90, 201)
    wanted = reference(tiny_sam, image).features
    got = Predictor(tiny_sam).embed(image)
    torch.testing.assert_close(got.image_embeddings, wanted, rtol=0, atol=1e-5)
    assert (got.original_size, got.input_size, got.padded_size, got.crop) == (
        (90, 201),
        (115, 256),
        (256, 256),
        None,
    )
    assert got.nbytes == 4 * 256 * 16 * 16


NATIVE = ResolutionPolicy(mode="native", min_side=40, max_side=90)


def predict_with_segment_anythings_modules(sam, image, one, *, input_size, padded_size):
    """Run SAM's own prompt encoder and decoder on an encoder's input of any size."""
    resized = np.asarray(predictor_module.Image.fromarray(image).resize(input_size[::-1], 2))
    pixels = torch.tensor(resized).permute(2, 0, 1)
    padding = (0, padded_size[1] - input_size[1], 0, padded_size[0] - input_size[0])
    images = F.pad((pixels - sam.pixel_mean) / sam.pixel_std, padding)[None]
    encoder = copy.deepcopy(sam.prompt_encoder)
    encoder.input_image_size = padded_size
    encoder.image_embedding_size = tuple(side // 16 for side in padded_size)
    scale = torch.tensor([input_size[1] / image.shape[1], input_size[0] / image.shape[0]])
    points = box = None
    if len(one.point_coords):
        points = torch.tensor(one.point_coords) * scale
        points = (points.float()[None], torch.tensor(one.point_labels)[None])
    if one.box_xyxy is not None:
        box = (torch.tensor(one.box_xyxy).reshape(2, 2) * scale).float().reshape(1, 4)
    mask = None if one.mask_input is None else torch.tensor(one.mask_input)[None, None]
    sparse, dense = encoder(points=points, boxes=box, masks=mask)
    low_res, _ = sam.mask_decoder(
        image_embeddings=encode_image(sam.image_encoder, images),
        image_pe=encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=one.is_single_point,
    )
    logits = F.interpolate(low_res, padded_size, mode="bilinear")
    logits = logits[..., : input_size[0], : input_size[1]]
    return low_res[0].numpy(), F.interpolate(logits, image.shape[:2], mode="bilinear")[0].numpy()


@pytest.mark.parametrize(
    ("size_hw", "input_size", "padded_size"),
    [
        pytest.param((50, 75), (50, 75), (64, 80), id="as it is"),
        pytest.param((150, 133), (90, 80), (96, 80), id="reduced"),
        pytest.param((20, 31), (26, 40), (32, 48), id="enlarged"),
    ],
)
@torch.inference_mode()
def test_prompts_and_masks_follow_an_input_that_is_no_square(
    small_sam, size_hw, input_size, padded_size
):
    image = draw(*size_hw)
    predictor = Predictor(small_sam, policy=NATIVE)
    embedding = predictor.embed(image)
    assert (embedding.input_size, embedding.padded_size) == (input_size, padded_size)
    prompts = prompts_of_every_kind(*size_hw, mask_side=16)
    mask = np.random.default_rng(3).normal(0, 4, [side // 4 for side in padded_size])
    for one in prompts.values():
        if one.mask_input is not None:
            one = prompt(one.point_coords, one.point_labels, one.box_xyxy, mask.astype(np.float32))
        [got] = predictor.decode(embedding, [one])
        low_res, logits = predict_with_segment_anythings_modules(
            small_sam, image, one, input_size=input_size, padded_size=padded_size
        )
        np.testing.assert_allclose(got.low_res_logits, low_res, rtol=0, atol=1e-5)
        sure = np.abs(logits) > 1e-5
        assert sure.mean() > 0.99
        np.testing.assert_array_equal(got.masks[sure], logits[sure] > 0)


@pytest.mark.parametrize("policy", [None, NATIVE], ids=["square", "native"])
def test_a_crop_is_answered_as_an_image_of_its_own(small_sam, policy):
    image = draw(75, 133)
    crop = Crop(20, 11, 91, 60)
    part = np.ascontiguousarray(image[11:60, 20:91])
    predictor = Predictor(small_sam, policy=policy)
    embedding, alone = predictor.embed(image, crop=crop), predictor.embed(part)
    assert torch.equal(embedding.image_embeddings, alone.image_embeddings)
    assert (embedding.crop, embedding.original_size) == (crop, (75, 133))
    assert (embedding.input_size, embedding.padded_size) == (alone.input_size, alone.padded_size)

    for one in prompts_of_every_kind(49, 71, mask_side=16).values():
        if one.mask_input is not None and policy is not None:
            continue  # made for the square's grid
        moved = prompt(
            one.point_coords + np.array([20, 11]),
            one.point_labels,
            None if one.box_xyxy is None else one.box_xyxy + np.array([20, 11, 20, 11]),
            one.mask_input,
        )
        [got], [wanted] = predictor.decode(embedding, [moved]), predictor.decode(alone, [one])
        np.testing.assert_allclose(got.low_res_logits, wanted.low_res_logits, rtol=0, atol=1e-5)
        assert got.masks.shape == (len(wanted.masks), 75, 133)
        assert (got.masks[:, 11:60, 20:91] == wanted.masks).mean() > 0.999
        outside = np.ones((75, 133), np.bool_)
        outside[11:60, 20:91] = False
        assert not got.masks[:, outside].any()


@pytest.mark.parametrize(
    "crop", [Crop(-1, 0, 10, 10), Crop(0, 0, 51, 30), Crop(0, 20, 50, 31), Crop(10, 5, 10, 9)]
)
def test_a_crop_that_is_no_part_of_the_image_is_refused(small_sam, crop):
    with pytest.raises(PromptError) as raised:
        Predictor(small_sam).embed(draw(30, 50), crop=crop)
    assert str(raised.value) == (
        f"crop must lie in the image of 30 x 50 (H x W) and hold a pixel, got {crop}"
    )


def test_the_encoder_gets_the_ba_sam_settings(small_sam):
    ba_sam = BaSamConfig(scaling_factor=True, bias="full", beta=2.0)
    image = draw(90, 70)
    policy = ResolutionPolicy(mode="native", min_side=96, max_side=96)
    plain = Predictor(small_sam, policy=policy).embed(image).image_embeddings
    got = Predictor(small_sam, policy=policy, ba_sam=ba_sam).embed(image).image_embeddings
    assert (got - plain).abs().max() > 1e-3


def test_a_pause_may_abandon_an_encode(small_sam):
    class AbandonedError(Exception):
        pass

    calls = []

    def pause():
        calls.append(1)
        if len(calls) == 2:
            raise AbandonedError

    with pytest.raises(AbandonedError):
        Predictor(small_sam).embed(draw(30, 50), pause=pause)
    assert len(calls) == 2


def test_half_precision_is_the_encoders_alone(tiny_sam):
    image = draw(90, 201)
    exact, half = Predictor(tiny_sam), Predictor(tiny_sam, precision="bf16")
    wanted, got = exact.embed(image), half.embed(image)
    assert got.image_embeddings.dtype == torch.bfloat16
    assert got.nbytes == wanted.nbytes / 2
    error = (got.image_embeddings - wanted.image_embeddings).norm() / wanted.image_embeddings.norm()
    assert 0 < error < 0.02
    one = prompt([[50, 30]], [1])
    [a], [b] = half.decode(got, [one]), exact.decode(wanted, [one])
    assert b.low_res_logits.dtype == np.float32
    np.testing.assert_allclose(a.low_res_logits, b.low_res_logits, rtol=0, atol=0.1)
    assert next(tiny_sam.image_encoder.parameters()).dtype == torch.float32
    with pytest.raises(ConfigError, match="got 'fp8'"):
        Predictor(tiny_sam, precision="fp8")


def test_only_one_lone_point_gets_three_masks_unless_asked(small_sam):
    predictor = Predictor(small_sam)
    embedding = predictor.embed(draw(30, 50))
    prompts = prompts_of_every_kind(30, 50, mask_side=16)
    got = dict(zip(prompts, predictor.decode(embedding, list(prompts.values())), strict=True))
    assert {name: len(answer.masks) for name, answer in got.items()} == {
        name: 3 if name in ("one point", "one negative point") else 1 for name in prompts
    }
    assert got["a box"].masks.shape == (1, 30, 50)
    assert got["a box"].low_res_logits.shape == (1, 16, 16)


def test_an_earlier_answer_can_be_given_back(tiny_sam):
    image = draw(75, 133)
    predictor = Predictor(tiny_sam)
    embedding = predictor.embed(image)
    first = predictor.decode(embedding, [prompt([[50, 30]], [1])])[0]
    again = prompt([[50, 30], [70, 40]], [1, 0], mask=first.low_res_logits[1])
    assert_equals_reference(
        predictor.decode(embedding, [again])[0],
        reference(tiny_sam, image),
        again,
        multimask_output=False,
    )


def test_many_objects_keep_their_order(small_sam, monkeypatch):
    monkeypatch.setattr(predictor_module, "_OBJECTS_AT_ONCE", 2)
    predictor = Predictor(small_sam)
    image = draw(31, 47)
    embedding = predictor.embed(image)
    prompts = [prompt([[7 * i, 5 * i]], [1]) for i in range(5)]
    prompts[1:1] = [prompt(box=[1, 2, 30, 20]), prompt(box=[5, 2, 30, 20])]
    for one, answer in zip(prompts, predictor.decode(embedding, prompts), strict=True):
        assert_equals_reference(
            answer, reference(small_sam, image), one, multimask_output=one.is_single_point
        )
    assert predictor.decode(embedding, []) == []


@pytest.mark.parametrize(("tokens", "groups"), [(16, 5), (40, 3), (1000, 1)])
def test_a_cpu_decodes_as_many_objects_together_as_its_cache_holds(
    small_sam, monkeypatch, tokens, groups
):
    monkeypatch.setattr(predictor_module, "_TOKENS_AT_ONCE_ON_CPU", tokens)  # an image has 16
    decoded = []

    def counting(*args, **options):
        decoded.append(options["sparse_prompt_embeddings"].shape[0])
        return decode_masks(*args, **options)

    monkeypatch.setattr(predictor_module, "decode_masks", counting)
    predictor = Predictor(small_sam)
    embedding = predictor.embed(draw(64, 64))
    prompts = [prompt(box=[1 + i, 2, 30 + i, 20]) for i in range(5)]
    answers = predictor.decode(embedding, prompts)
    assert len(decoded) == groups
    assert sum(decoded) == 5
    for one, answer in zip(prompts, answers, strict=True):
        [alone] = predictor.decode(embedding, [one])
        np.testing.assert_allclose(answer.low_res_logits, alone.low_res_logits, atol=1e-4)


def test_a_compiled_encoder_answers_the_same_and_is_compiled_once_for_each_shape(
    small_sam, monkeypatch
):
    graphs = []

    def compiling(function, **options):
        def backend(graph, _inputs):
            graphs.append(graph)
            return graph

        return torch_compile(function, backend=backend, **options)

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compiling)  # all of it but the compiler, which is slow
    policy = ResolutionPolicy(mode="native", min_side=64, max_side=96, pad_to=32)
    plain, compiled = (Predictor(small_sam, policy=policy, compiled=one) for one in (False, True))
    box = prompt(box=[2, 3, 40, 30])
    shapes = []
    for size_hw in ((50, 90), (60, 91), (90, 60)):
        image = draw(*size_hw)
        embedding = compiled.embed(image)
        shapes.append(embedding.padded_size)
        wanted = plain.embed(image)
        torch.testing.assert_close(embedding.image_embeddings, wanted.image_embeddings)
        [got], [expected] = compiled.decode(embedding, [box]), plain.decode(wanted, [box])
        np.testing.assert_array_equal(got.masks, expected.masks)
    assert shapes == [(64, 96), (64, 96), (96, 64)]
    assert len(graphs) == 2


def test_a_very_thin_image_keeps_a_row(small_sam):
    predictor = Predictor(small_sam)
    embedding = predictor.embed(draw(1, 900))
    assert embedding.input_size == (1, 64)
    assert predictor.decode(embedding, [prompt([[450, 0]], [1])])[0].masks.shape == (3, 1, 900)


def test_threads_may_share_a_predictor(small_sam):
    predictor = Predictor(small_sam)
    images = [draw(40 + 7 * i, 60 - 5 * i, seed=i) for i in range(4)]
    prompts = [prompt([[20, 10]], [1]), prompt(box=[2, 3, 30, 20])]

    def answer(image):
        return predictor.decode(predictor.embed(image), prompts)

    wanted = [answer(image) for image in images]
    got = {}
    start = threading.Barrier(len(images))

    def work(index):
        start.wait()
        for turn in range(5):
            got[index, turn] = answer(images[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 20
    for (index, _), answers in got.items():
        for one, other in zip(answers, wanted[index], strict=True):
            assert_same(one, other)


def test_nothing_is_kept_for_gradients(small_sam):
    embedding = Predictor(small_sam).embed(draw(20, 30))
    assert embedding.image_embeddings.is_inference()


def test_the_fingerprint_tells_models_apart(small_sam):
    fingerprint = Predictor(small_sam).fingerprint
    assert len(fingerprint) == 64
    assert Predictor(build_small_sam()).fingerprint == fingerprint
    assert Predictor(build_small_sam(seed=1)).fingerprint != fingerprint

    weight = small_sam.mask_decoder.iou_token.weight.data
    weight[0, 5] = torch.nextafter(weight[0, 5], torch.tensor(2.0))
    assert Predictor(small_sam).fingerprint != fingerprint

    other_windows = build_small_sam()
    other_windows.image_encoder.blocks[0].window_size = 2
    assert Predictor(other_windows).fingerprint != fingerprint


def test_the_fingerprint_tells_settings_apart(small_sam):
    settings = [
        {},
        {"precision": "bf16"},
        {"policy": NATIVE},
        {"policy": ResolutionPolicy(mode="native", min_side=40, max_side=91)},
        {"ba_sam": BaSamConfig(scaling_factor=True)},
        {"ba_sam": BaSamConfig(bias="full", beta=1.0)},
        {"ba_sam": BaSamConfig(bias="full", beta=2.0)},
        {"colours": ColourConfig()},
        {"colours": ColourConfig(weight=1.0)},
    ]
    fingerprints = {Predictor(small_sam, **one).fingerprint for one in settings}
    assert len(fingerprints) == len(settings)
    plain = Predictor(small_sam, policy=ResolutionPolicy(), ba_sam=BaSamConfig())
    assert plain.fingerprint in fingerprints  # the defaults, spelt out


def test_embeddings_hold_the_image_where_colours_count(small_sam):
    image, crop = draw(50, 71), Crop(10, 5, 60, 45)
    plain, corrected, stronger = (
        Predictor(small_sam, policy=NATIVE, colours=one)
        for one in (None, ColourConfig(), ColourConfig(weight=1.0))
    )
    assert plain.embed(image).guide is None
    embedding = corrected.embed(image, crop=crop)
    assert embedding.guide.shape == (*embedding.input_size, 3)
    # The part, enlarged: its colours are those of the image.
    part = image[5:45, 10:60].reshape(-1, 3).mean(0)
    np.testing.assert_allclose(embedding.guide.reshape(-1, 3).mean(0), part, atol=1.5)
    assert embedding.nbytes == embedding.image_embeddings.nbytes + embedding.guide.nbytes
    assert corrected.embedding_fingerprint != plain.embedding_fingerprint
    assert corrected.embedding_fingerprint == stronger.embedding_fingerprint


@pytest.mark.parametrize("crop", [None, Crop(10, 5, 60, 45)])
def test_masks_are_corrected_by_the_colours_of_what_was_embedded(small_sam, crop):
    image = draw(50, 71)
    plain = Predictor(small_sam, policy=NATIVE)
    corrected = Predictor(small_sam, policy=NATIVE, colours=ColourConfig(weight=2.0))
    embedding = corrected.embed(image, crop=crop)
    asked = [prompt(box=(20, 12, 50, 40))]
    [before], [after] = plain.decode(embedding, asked), corrected.decode(embedding, asked)
    np.testing.assert_array_equal(before.low_res_logits, after.low_res_logits)
    assert (before.masks != after.masks).any()

    height, width = embedding.input_size
    logits = F.interpolate(
        torch.from_numpy(before.low_res_logits[None]), embedding.padded_size, mode="bilinear"
    )[0, 0, :height, :width]
    probabilities = refine_by_colours(logits.numpy(), embedding.guide, corrected.colours)
    size_hw = image.shape[:2] if crop is None else crop.size
    part = F.interpolate(torch.from_numpy(probabilities)[None, None], size_hw, mode="bilinear")
    wanted = np.zeros(image.shape[:2], np.bool_)
    x0, y0, x1, y1 = crop or (0, 0, 71, 50)
    wanted[y0:y1, x0:x1] = part[0, 0].numpy() > 0.5
    assert (after.masks[0] != wanted).mean() < 1e-3  # rounding, on the outline


@pytest.mark.parametrize("found", [False, True])
@pytest.mark.parametrize("label", [0, 1])
def test_colours_take_no_point_from_a_mask(small_sam, monkeypatch, found, label):
    """Nor do they give it one that is not to be in it; but they may mend what was wrong."""

    def refine(logits, *_):
        shares = np.full(logits.shape, found, np.float32)
        shares[-5:, -5:] = 1.0  # something is left in any case
        return shares

    monkeypatch.setattr(predictor_module, "refine_by_colours", refine)
    corrected = Predictor(small_sam, policy=NATIVE, colours=ColourConfig())
    embedding = corrected.embed(draw(50, 71))
    asked = [prompt([(5.0, 15.0)], [label])]
    [got] = corrected.decode(embedding, asked, multimask_output=True)
    [own] = Predictor(small_sam, policy=NATIVE).decode(embedding, asked, multimask_output=True)
    is_wrong = own.masks[:, 15, 5] != label
    assert 0 < is_wrong.sum() < 3  # so that both happens
    changed = corrected.full_mask(embedding, torch.from_numpy(got.low_res_logits[0]))
    for mask, plain, mends in zip(got.masks, own.masks, is_wrong | (found == label), strict=True):
        np.testing.assert_array_equal(mask, changed if mends else plain)


def test_colours_leave_something_of_a_mask(small_sam, monkeypatch):
    nothing = lambda logits, *_: np.zeros(logits.shape, np.float32)  # noqa: E731
    monkeypatch.setattr(predictor_module, "refine_by_colours", nothing)
    corrected = Predictor(small_sam, policy=NATIVE, colours=ColourConfig())
    embedding = corrected.embed(draw(50, 71))
    for asked in (prompt(box=(20, 12, 50, 40)), prompt([(35.0, 25.0)], [0])):
        [got] = corrected.decode(embedding, [asked], multimask_output=True)
        [own] = Predictor(small_sam, policy=NATIVE).decode(
            embedding, [asked], multimask_output=True
        )
        assert own.masks.any()
        np.testing.assert_array_equal(got.masks, own.masks)


def test_where_colours_count_the_choice_of_a_points_mask_weighs_more_than_the_prediction(small_sam):
    image, click = draw(50, 71), prompt([(35.0, 25.0)], [1])
    corrected = Predictor(small_sam, policy=NATIVE, colours=ColourConfig())
    embedding = corrected.embed(image)
    [answer] = corrected.decode(embedding, [click])
    for number, logits in enumerate(answer.low_res_logits):
        at_input = cv2.resize(
            answer.masks[number].astype(np.uint8),
            embedding.input_size[::-1],
            interpolation=cv2.INTER_NEAREST,
        )
        wanted = answer.iou_predictions[number] + 0.2 * (logits > 1).sum() / (logits > -1).sum()
        wanted += 0.2 * outline_contrast(at_input == 1, embedding.guide)
        assert answer.preferences[number] == pytest.approx(wanted, rel=1e-5)
    assert corrected.decode(embedding, [prompt(box=(20, 12, 50, 40))])[0].preferences is None
    [plain] = Predictor(small_sam, policy=NATIVE).decode(embedding, [click])
    assert plain.preferences is None


def test_the_preferred_mask_is_the_best_of_those_that_agree_with_most_points():
    masks = ObjectMasks(
        masks=np.stack([square(0, 0, 2), square(1, 1, 3), square(1, 1, 4)]),
        iou_predictions=np.array([0.9, 0.8, 0.7], np.float32),
        low_res_logits=np.zeros((3, 2, 2), np.float32),
        preferences=np.array([1.5, 1.0, 1.2], np.float32),
    )
    assert masks.best(prompt([(2, 2)], [1])) == 2
    assert replace(masks, preferences=None).best(prompt([(2, 2)], [1])) == 1


def test_colours_want_an_embedding_with_its_image(small_sam):
    embedding = Predictor(small_sam).embed(draw(50, 71))
    with pytest.raises(PromptError, match="embedding must hold its image, for its colours"):
        Predictor(small_sam, colours=ColourConfig()).decode(
            embedding, [prompt(box=(20, 12, 50, 40))]
        )


def square(top, left, side):
    mask = np.zeros((6, 9), np.bool_)
    mask[top : top + side, left : left + side] = True
    return mask


@pytest.mark.parametrize(
    ("iou_predictions", "one", "best"),
    [
        pytest.param([0.3, 0.9, 0.5], prompt([[3, 3]], [1]), 1, id="all agree: highest score"),
        pytest.param([0.3, 0.5, 0.9], prompt([[0.9, 0.2]], [1]), 2, id="only the largest agrees"),
        pytest.param([0.3, 0.2, 0.9], prompt([[0.9, 0.2]], [0]), 0, id="negative point"),
        pytest.param([0.3, 0.9, 0.8], prompt([[3, 3], [0, 0]], [1, 1]), 2, id="both count"),
        pytest.param([0.1, 0.9, 0.8], prompt([[3, 3], [0, 0]], [1, 0]), 1, id="both kinds count"),
        pytest.param([0.1, 0.9, 0.8], prompt([[-5, 9], [-1, 99]], [1, 1]), 2, id="outside"),
        pytest.param([0.1, 0.9, 0.8], prompt(box=[0, 0, 9, 6]), 1, id="no points: highest score"),
    ],
)
def test_the_best_mask_agrees_with_the_points(iou_predictions, one, best):
    masks = np.stack([square(3, 3, 1), square(2, 2, 3), square(0, 0, 6)])
    answer = ObjectMasks(
        masks=masks,
        iou_predictions=np.array(iou_predictions, np.float32),
        low_res_logits=np.zeros((3, 4, 4), np.float32),
    )
    assert answer.best(one) == best


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            {"points": [], "labels": []},
            "an object must have a point, a box or a mask, got none of them",
            id="nothing",
        ),
        pytest.param(
            {"points": [[1, 2]], "labels": [1, 0]},
            "point_coords and point_labels must be [T, 2] and [T], got [1, 2] and [2]",
            id="a label too many",
        ),
        pytest.param(
            {"points": [[1, 2]], "labels": [2]}, "point_labels must be 0 or 1, got [2]", id="label"
        ),
        pytest.param(
            {"points": [[1, np.nan]], "labels": [1]},
            "point_coords must be finite, got [[1.0, nan]]",
            id="NaN in a point",
        ),
        pytest.param(
            {"box": [5, 2, 3, 4]},
            "box_xyxy must be finite [left, top, right, bottom], got [5.0, 2.0, 3.0, 4.0]",
            id="box from right to left",
        ),
        pytest.param(
            {"box": [0, 0, 3, np.inf]},
            "box_xyxy must be finite [left, top, right, bottom], got [0.0, 0.0, 3.0, inf]",
            id="infinite box",
        ),
        pytest.param(
            {"box": [0, 0, 3]},
            "box_xyxy must be finite [left, top, right, bottom], got [0.0, 0.0, 3.0]",
            id="box of three",
        ),
        pytest.param(
            {"mask": np.full((16, 16), np.nan)},
            "mask_input must be finite, got NaN or infinity",
            id="NaN in a mask",
        ),
    ],
)
def test_a_prompt_that_describes_no_object_is_refused(arguments, message):
    with pytest.raises(PromptError) as raised:
        prompt(**arguments)
    assert str(raised.value) == message


def test_a_mask_of_another_size_is_refused(small_sam):
    predictor = Predictor(small_sam)
    prompts = [prompt([[1, 1]], [1]), prompt(mask=np.zeros((16, 17)))]
    with pytest.raises(PromptError) as raised:
        predictor.decode(predictor.embed(draw(20, 30)), prompts)
    assert str(raised.value) == (
        "prompts[1].mask_input must be [16, 16], as this image's low_res_logits are, got [16, 17]"
    )


@pytest.mark.parametrize(
    ("image", "found"),
    [
        pytest.param(np.zeros((4, 6), np.uint8), "[4, 6] uint8", id="grey"),
        pytest.param(np.zeros((4, 6, 4), np.uint8), "[4, 6, 4] uint8", id="alpha"),
        pytest.param(np.zeros((4, 6, 3)), "[4, 6, 3] float64", id="float"),
        pytest.param(np.zeros((0, 6, 3), np.uint8), "[0, 6, 3] uint8", id="empty"),
    ],
)
def test_an_image_of_another_form_is_refused(small_sam, image, found):
    with pytest.raises(PromptError) as raised:
        Predictor(small_sam).embed(image)
    assert str(raised.value) == f"image must be [H, W, 3] uint8, got {found}"


def moved_plugin(seed=0, **options):
    plugin = StableSam(**options)
    torch.manual_seed(seed)
    for parameter in plugin.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return plugin


def test_a_plugin_for_sloppy_prompts_answers_and_reports_its_routing(small_sam):
    image = np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)
    box = ObjectPrompt(
        point_coords=np.zeros((0, 2)),
        point_labels=np.zeros(0, np.int64),
        box_xyxy=np.array([4.0, 6.0, 50.0, 30.0]),
    )
    point = ObjectPrompt(point_coords=np.array([[20.0, 20.0]]), point_labels=np.array([1]))

    def answers(plugin):
        predictor = Predictor(small_sam, stable_sam=plugin)
        return predictor.fingerprint, predictor.decode(predictor.embed(image), [box, point])

    plain_print, plain = answers(None)
    start_print, start = answers(StableSam())
    moved_print, moved = answers(moved_plugin())
    assert len({plain_print, start_print, moved_print}) == 3
    assert [answer.routing for answer in plain] == [None, None]
    assert [answer.routing for answer in start] == [0.5, 0.5]
    assert all(0 < answer.routing < 1 for answer in moved)
    np.testing.assert_allclose(
        start[0].low_res_logits, plain[0].low_res_logits, rtol=1e-3, atol=1e-4
    )
    assert not np.allclose(moved[0].low_res_logits, plain[0].low_res_logits, atol=1e-3)
    # Without it a point may mean three things; the plugin is trained to answer with the whole one.
    assert [len(answer.masks) for answer in plain] == [1, 3]
    assert [len(answer.masks) for answer in start] == [1, 1]


def test_a_plugin_for_several_points_leaves_the_other_prompts_to_sam(small_sam):
    image = np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)
    box = np.array([4.0, 6.0, 50.0, 30.0])
    clicks = np.array([[20.0, 20.0], [30.0, 24.0], [8.0, 9.0]])

    def prompt(count, box_xyxy=None):
        labels = np.array([1, 1, 0][:count], np.int64)
        return ObjectPrompt(point_coords=clicks[:count], point_labels=labels, box_xyxy=box_xyxy)

    # Two points have as many tokens as a box and a point, and a box as many as a point.
    others = [prompt(0, box), prompt(1), prompt(1, box), prompt(2, box), None]
    clicked = [prompt(2), prompt(3)]
    prompts = [*others, *clicked]

    def answers(plugin):
        predictor = Predictor(small_sam, stable_sam=plugin)
        got = predictor.decode_low_res(predictor.embed(image), prompts)
        return predictor, got

    _, plain = answers(None)
    everywhere, shifted = answers(moved_plugin())
    predictor, got = answers(moved_plugin(scope="points"))
    for index in range(len(others)):
        torch.testing.assert_close(got[index][0], plain[index][0], rtol=1e-3, atol=1e-4)
        assert got[index][2] is None
    for index in range(len(others), len(prompts)):
        torch.testing.assert_close(got[index][0], shifted[index][0], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(got[index][0], plain[index][0], atol=1e-3)
        assert 0 < float(got[index][2][0]) < 1
    [point] = predictor.decode(predictor.embed(image), [prompt(1)])
    assert (len(point.masks), point.routing) == (3, None)
    assert predictor.fingerprint != everywhere.fingerprint
