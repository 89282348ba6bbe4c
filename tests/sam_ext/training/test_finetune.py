import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sam_ext.adapters import apply_adapter, read_adapter, save_adapter
from sam_ext.ba_sam import BaSamConfig
from sam_ext.errors import CheckpointError, ConfigError, DataError
from sam_ext.interactive import CropPolicy
from sam_ext.labels import LabelledImage, LabelledObject
from sam_ext.lora import lora_parameters, merge_lora
from sam_ext.predictor import ObjectPrompt, Predictor
from sam_ext.prompt_free import answer_prompt_free
from sam_ext.resolution import ResolutionPolicy
from sam_ext.sam import weights_fingerprint
from sam_ext.sam_adapter import SamAdapterConfig, sam_adapter_parameters
from sam_ext.stable_sam import StableSam
from sam_ext.state_dicts import state_fingerprint
from sam_ext.training import finetune as module
from sam_ext.training import steps as steps_module
from sam_ext.training.branch import Seen
from sam_ext.training.finetune import (
    FinetuneConfig,
    default_finetune_steps,
    default_sam_adapter,
    finetune,
)
from sam_ext.training.parts import View
from sam_ext.training.robust import random_points
from tests.conftest import build_small_sam

METHODS = ("sam-adapter", "lora")
SIDE = 80
BA_SAM = BaSamConfig(bias="full", beta=1.0)


def policies(*sides):
    return tuple(ResolutionPolicy(mode="native", min_side=s, max_side=s) for s in sides)


def config(**changes):
    values = {
        "steps": 3,
        "policies": policies(SIDE),
        "precision": "fp32",
        "warmup_steps": 0,
        "sam_adapter": SamAdapterConfig(reduction=8),
    }
    return FinetuneConfig(**(values | changes))


def known(*, mask=None, box=None):
    return LabelledObject(
        label="a",
        box_xyxy=box,
        point_coords=np.zeros((0, 2)),
        point_labels=np.zeros(0, int),
        mask=mask,
    )


def image_of(number, *, others=()):
    """A bright ellipse on noise, 48 x 80."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 90, (48, 80, 3)).astype(np.uint8)
    ys, xs = np.mgrid[:48, :80]
    mask = ((xs - 30 - 6 * number) / 16) ** 2 + ((ys - 24) / 13) ** 2 < 1
    pixels[mask] = 200
    return LabelledImage(name=str(number), read=lambda: pixels, objects=(known(mask=mask), *others))


def images(count=3):
    return [image_of(number) for number in range(count)]


def curve(sam, given, settings, **options):
    steps = []
    adapted = finetune(sam, given, settings, on_step=steps.append, **options)
    return adapted, steps


def trained(sam):
    return {name: one.detach() for name, one in sam.named_parameters() if one.requires_grad}


def is_decoder(name):
    return name.startswith("mask_decoder.") or name == "prompt_encoder.no_mask_embed.weight"


@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_and_the_decoder_are_trained_and_nothing_else(small_sam, method):
    before = {key: value.clone() for key, value in small_sam.state_dict().items()}
    adapted = finetune(small_sam, images(), config(method=method, prompt_free_chance=1.0))
    assert all(torch.equal(small_sam.state_dict()[key], value) for key, value in before.items())
    assert all(parameter.requires_grad for parameter in small_sam.parameters())
    attached = sam_adapter_parameters if method == "sam-adapter" else lora_parameters
    assert attached(adapted)
    assert all(parameter.any() for parameter in attached(adapted))
    after = adapted.state_dict()
    changed = {key for key in before if not torch.equal(after[key], before[key])}
    assert changed
    assert all(is_decoder(key) for key in changed)
    assert "prompt_encoder.no_mask_embed.weight" in changed
    wanted = {id(one) for one in attached(adapted)}
    assert {
        n for n, p in adapted.named_parameters() if p.requires_grad and id(p) not in wanted
    } == {name for name, _ in small_sam.named_parameters() if is_decoder(name)}
    assert not adapted.training


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"prompt_free_chance": 1.0}, id="prompt-free"),
        pytest.param({"loss": "balanced bce"}, id="balanced"),
        pytest.param({"policies": policies(64, 112), "ba_sam": BA_SAM}, id="mixed"),
        pytest.param({"precision": "bf16"}, id="bf16"),
        pytest.param({"gradient_checkpointing": True}, id="checkpointing"),
        pytest.param({"crops": CropPolicy(min_object_px=60, min_side=32, context=2)}, id="crops"),
    ],
)
def test_every_setting_trains(small_sam, method, settings):
    adapted, steps = curve(small_sam, images(), config(method=method, **settings))
    assert all(math.isfinite(value) for step in steps for value in step.losses.values())
    names = {"bce", "soft_iou", "iou", "total"}
    if "prompt_free_chance" in settings:
        names |= {"free_bce", "free_soft_iou", "free_iou"}
    assert set(steps[0].losses) == names
    assert all(one.isfinite().all() for one in trained(adapted).values())


def test_every_side_is_seen_and_served_as_its_size(small_sam, monkeypatch):
    sizes = set()
    original = module.pixels_of

    def seen(image, device):
        sizes.add(image.shape[:2])
        return original(image, device)

    monkeypatch.setattr(module, "pixels_of", seen)
    finetune(small_sam, images(), config(policies=policies(64, 80), steps=12, crop_chance=0.0))
    assert sizes == {(38, 64), (48, 80)}


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_the_masks_with_and_without_a_prompt(small_sam, method):
    settings = config(
        method=method,
        steps=30,
        prompt_free_chance=1.0,
        strong_chance=0.0,
        crop_chance=0.0,
        decoder_learning_rate=1e-3,
    )
    given = images(2)
    adapted, steps = curve(small_sam, given, settings)
    for name in ("soft_iou", "free_soft_iou", "bce", "free_bce"):
        losses = [step.losses[name] for step in steps]
        assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])
    predictor = Predictor(merge_lora(adapted), policy=policies(SIDE)[0])
    for image in given:
        got = answer_prompt_free(predictor, predictor.embed(image.read())).mask
        wanted = image.objects[0].mask
        assert (got & wanted).sum() / (got | wanted).sum() > 0.6


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_ended_goes_on_to_the_same_end(small_sam, tmp_path, monkeypatch, method):
    monkeypatch.setattr(steps_module, "_SAVE_STEPS", 2)
    settings = config(method=method, steps=7, prompt_free_chance=0.5, policies=policies(64, 80))
    wanted, whole = curve(small_sam, images(), settings)

    class EndError(Exception):
        pass

    def end(step):
        if step.step == 5:
            raise EndError

    with pytest.raises(EndError):
        finetune(small_sam, images(), settings, run_dir=tmp_path, on_step=end)
    got, rest = curve(small_sam, images(), settings, run_dir=tmp_path)
    assert [step.step for step in rest] == [5, 6, 7]
    assert [step.losses for step in rest] == [step.losses for step in whole[4:]]
    assert weights_fingerprint(got) == weights_fingerprint(wanted)
    done, none = curve(small_sam, images(), settings, run_dir=tmp_path)
    assert none == []
    assert weights_fingerprint(done) == weights_fingerprint(wanted)


def test_another_run_is_not_gone_on_with(small_sam, tmp_path):
    finetune(small_sam, images(), config(steps=1), run_dir=tmp_path)
    plugin = StableSam()
    for arguments, options in [
        ((small_sam, images(), config(steps=2)), {}),
        ((small_sam, images(2), config(steps=1)), {}),
        ((build_small_sam(seed=1), images(), config(steps=1)), {}),
        ((small_sam, images(), config(steps=1)), {"stable_sam": plugin}),
    ]:
        with pytest.raises(CheckpointError, match="name an empty run_dir"):
            finetune(*arguments, run_dir=tmp_path, **options)


def test_the_seed_decides_everything(small_sam):
    first, again, other = (
        weights_fingerprint(finetune(small_sam, images(), config(seed=seed))) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_what_was_trained_is_saved_and_read(small_sam, tmp_path):
    for method in METHODS:
        adapted = finetune(small_sam, images(), config(method=method))
        path = tmp_path / method
        save_adapter(adapted, path, base=small_sam, method=method)
        got = weights_fingerprint(apply_adapter(small_sam, path))
        assert got == weights_fingerprint(merge_lora(adapted))
        first = "lora" if method == "lora" else "sam-adapter"
        assert read_adapter(path).parts == (first, "decoder")


def test_objects_without_a_mask_are_left_out(small_sam, monkeypatch):
    asked = []
    original = module.token_groups

    def seen(prompts, device):
        asked.append(prompts)
        return original(prompts, device)

    monkeypatch.setattr(module, "token_groups", seen)
    box = known(box=np.array([2.0, 3, 20, 20]))
    only_box = replace(image_of(0), objects=(box,))
    half = image_of(1, others=(box,))
    whole = image_of(2)
    settings = config(steps=8, prompt_free_chance=1.0, crop_chance=0.0)
    finetune(small_sam, [only_box, half], settings)
    assert {len(prompts) for prompts in asked} == {8}  # one object, whose image's union is unknown
    assert None not in [prompt for prompts in asked for prompt in prompts]
    asked.clear()
    finetune(small_sam, [only_box, half, whole], settings)
    assert sorted(len(prompts) for prompts in asked) == [8] * 4 + [9] * 4
    assert all((prompts[-1] is None) == (len(prompts) == 9) for prompts in asked)


@pytest.mark.parametrize(("height", "iou"), [(5.0, 0.0), (-5.0, 1.0)])
def test_where_nothing_is_anything_found_is_wrong(height, iou):
    logits = torch.full((1, 4, 12, 20), -5.0)
    logits[0, 0, 3:5, 4:6] = height
    view = a_view([], torch.zeros(0, 12, 20))
    seen = Seen(torch.zeros(2, 1, 1), logits, torch.full((1, 4), 0.5))
    losses, mean_iou = module._losses(seen, view, [None], config(), is_ambiguous=True)
    assert set(losses) == {"free_bce", "free_soft_iou", "free_iou"}
    wrong = math.log1p(math.exp(height)) * 4 + math.log1p(math.exp(-5)) * (12 * 20 - 4)
    assert losses["free_bce"].item() == pytest.approx(wrong / (12 * 20), rel=1e-4)
    assert losses["free_iou"].item() == pytest.approx(0.25)
    assert mean_iou.item() == iou


@pytest.mark.parametrize("method", METHODS)
def test_images_without_objects_teach_that_nothing_is_there(small_sam, method):
    """Bright images hold an ellipse each, dark ones nothing."""
    dark = [replace(image_of(n), read=lambda: np.full((48, 80, 3), 20, np.uint8)) for n in range(3)]
    empty = [replace(one, name=f"empty {one.name}", objects=()) for one in dark]
    settings = config(
        method=method,
        steps=60,
        prompt_free_chance=1.0,
        decoder_learning_rate=1e-3,
    )
    adapted, steps = curve(small_sam, [*images(), *empty], settings)
    kinds = {frozenset(step.losses) for step in steps}
    free = {"free_bce", "free_soft_iou", "free_iou", "total"}
    assert kinds == {frozenset(free), frozenset({"bce", "soft_iou", "iou", *free})}
    found = {
        one.name: answer_prompt_free(predictor, predictor.embed(one.read())).mask.mean()
        for predictor in [Predictor(merge_lora(adapted), policy=policies(SIDE)[0])]
        for one in (images()[0], empty[0])
    }
    assert found["empty 0"] < 0.01 < found["0"]
    without = config(method=method, steps=4)
    _, steps = curve(small_sam, [*images(), *empty], without)
    assert {frozenset(step.losses) for step in steps} == {
        frozenset({"bce", "soft_iou", "iou", "total"})
    }


def test_without_prompt_whole_images_are_seen_as_they_are_served(small_sam, monkeypatch):
    asked, seen = [], []
    token_groups, part = module.token_groups, module.PartSource.part
    monkeypatch.setattr(
        module, "token_groups", lambda *given: asked.append(given[0]) or token_groups(*given)
    )
    monkeypatch.setattr(
        module.PartSource,
        "part",
        lambda *given, **how: seen.append(part(*given, **how)) or seen[-1],
    )
    settings = config(
        steps=12,
        prompt_free_chance=0.5,
        crop_chance=1.0,
        crops=CropPolicy(min_object_px=60, context=2, min_side=32),
    )
    small = np.zeros((48, 80), bool)
    small[20:28, 30:40] = True
    finetune(small_sam, [replace(image_of(0), objects=(known(mask=small),))], settings)
    kinds = {
        (prompts[-1] is None, one.key[1] is None) for prompts, one in zip(asked, seen, strict=True)
    }
    assert kinds == {(True, True), (False, False)}


@pytest.mark.parametrize("given", [[], [replace(image_of(0), objects=())], "boxes"])
def test_no_mask_at_all_is_refused(small_sam, given):
    if given == "boxes":
        given = [replace(image_of(0), objects=(known(box=np.array([2.0, 3, 20, 20])),))]
    with pytest.raises(ConfigError, match=rf"got {len(given)} images and no mask; draw some"):
        finetune(small_sam, given, config())


def test_a_mask_of_another_size_is_refused(small_sam):
    given = replace(image_of(0), objects=(known(mask=np.ones((5, 5), bool)),))
    with pytest.raises(DataError, match="must have the image's size"):
        finetune(small_sam, [given], config())


def test_a_plugin_is_used_and_not_changed(small_sam):
    plugin = StableSam()
    with torch.no_grad():
        plugin.transform.weight.add_(0.1 * torch.randn(256, 256))
    before = state_fingerprint(plugin)
    with_plugin = finetune(small_sam, images(), config(), stable_sam=plugin)
    without = finetune(small_sam, images(), config())
    assert state_fingerprint(plugin) == before
    assert all(parameter.requires_grad for parameter in plugin.parameters())
    assert weights_fingerprint(with_plugin) != weights_fingerprint(without)


def a_view(prompts, masks):
    nothing = torch.zeros_like(masks, dtype=torch.bool)
    return View(
        image=np.zeros((48, 80, 3), np.uint8),
        prompts=tuple(prompts),
        teacher_prompts=tuple(prompts),
        allowed=nothing,
        required=nothing,
        boxes=nothing,
        masks=masks,
        covered=masks.sum(0).clamp(max=1),
    )


BOX = ObjectPrompt(
    point_coords=np.zeros((0, 2)),
    point_labels=np.zeros(0, int),
    box_xyxy=np.array([8.0, 8, 40, 32]),
)
POINT = ObjectPrompt(point_coords=np.array([[20.0, 20]]), point_labels=np.ones(1, int))


def masks_of_two():
    masks = torch.zeros(2, 12, 20)
    masks[0, 2:8, 2:10] = 1
    masks[1, 1:4, 12:19] = 1
    return masks


def test_a_box_is_measured_by_the_single_mask_and_a_point_by_the_best_of_three():
    masks = masks_of_two()
    logits = torch.full((3, 4, 12, 20), -5.0)
    logits[0, 0] = 10 * masks[0] - 5
    logits[1, 2] = 10 * masks[1] - 5
    logits[2, 0] = 10 * masks.amax(0) - 5
    logits.requires_grad_()
    ious = torch.zeros(3, 4, requires_grad=True)
    seen = Seen(torch.zeros(2, 1, 1), logits, ious)
    view = a_view([BOX, BOX], masks)
    losses, mean_iou = module._losses(seen, view, [BOX, POINT, None], config(), is_ambiguous=True)
    assert mean_iou.item() == 1.0
    small = math.log1p(math.exp(-5))
    assert losses["bce"].item() == pytest.approx(small, rel=1e-4)
    share = masks.amax(0).mean().item()  # balanced: each side weighs what the other one covers
    assert losses["free_bce"].item() == pytest.approx(2 * share * (1 - share) * small, rel=1e-4)
    settings = config(prompt_free_loss="bce")
    plain, _ = module._losses(seen, view, [BOX, POINT, None], settings, is_ambiguous=True)
    assert plain["free_bce"].item() == pytest.approx(small, rel=1e-4)
    assert losses["iou"].item() == pytest.approx(2 / 4)  # 1 of the box's one, 1 of three
    assert losses["free_iou"].item() == pytest.approx(1.0)
    sum(losses.values()).backward()
    reached = logits.grad.flatten(2).any(2)
    assert reached.tolist() == [
        [True, False, False, False],
        [False, False, True, False],
        [True, False, False, False],
    ]
    assert (ious.grad != 0).tolist() == [
        [True, False, False, False],
        [False, False, True, False],
        [True, False, False, False],
    ]
    plain, _ = module._losses(seen, view, [BOX, POINT], config(), is_ambiguous=False)
    assert plain["bce"].item() > 10 * small  # the plugin's single mask says nothing of the second
    assert set(plain) == {"bce", "soft_iou", "iou"}


def test_prompts_are_boxes_tight_and_loose_and_points_on_the_object():
    masks = masks_of_two()
    view = a_view([BOX, BOX], masks)
    generator = torch.Generator().manual_seed(0)
    drawn = [p for _ in range(200) for p in module._prompts(view, generator)[:1]]
    boxes = [p.box_xyxy for p in drawn if p.box_xyxy is not None]
    tight = [box for box in boxes if np.array_equal(box, BOX.box_xyxy)]
    single = [p for p in drawn if p.is_single_point]
    several = [p for p in drawn if len(p.point_labels) > 1]
    assert len(drawn) == len(boxes) + len(single) + len(several)
    assert abs(len(tight) / 200 - 0.25) < 0.1
    assert abs(len(boxes) / 200 - 0.5) < 0.1
    assert abs(len(single) / 200 - 0.25) < 0.1
    assert all(np.abs(box - BOX.box_xyxy).max() <= 0.2 * 32 for box in boxes)
    for prompt in single + several:
        for (x, y), label in zip(prompt.point_coords, prompt.point_labels, strict=True):
            cell = masks[0, round((y - 1.5) / 4), round((x - 1.5) / 4)]
            assert cell == label
        assert 1 <= (prompt.point_labels == 1).sum() <= 5
    assert any((prompt.point_labels == 0).any() for prompt in several)


def test_points_are_drawn_beside_an_object_that_fills_its_view():
    view = a_view([BOX], torch.ones(1, 12, 20))
    for seed in range(20):
        module._prompts(view, torch.Generator().manual_seed(seed))
    assert random_points(view.masks, 1, stride=4, generator=torch.Generator()).isfinite().all()


def test_an_object_that_fills_its_view_gets_no_points_beside_it():
    view = a_view([BOX, BOX], torch.stack([torch.ones(12, 20), masks_of_two()[0]]))
    drawn = [module._prompts(view, torch.Generator().manual_seed(seed)) for seed in range(60)]
    assert all((one.point_labels == 1).all() for one, _ in drawn)
    assert any((other.point_labels == 0).any() for _, other in drawn)


def test_the_score_of_what_is_too_thin_to_be_measured_is_not_learnt():
    masks = torch.stack([masks_of_two()[0], 0.3 * masks_of_two()[1]])
    ious = torch.full((2, 4), 0.5, requires_grad=True)
    seen = Seen(torch.zeros(2, 1, 1), torch.cat([10 * masks[:, None] - 5] * 4, 1), ious)
    losses, _ = module._losses(
        seen, a_view([BOX, BOX], masks), [BOX, BOX], config(), is_ambiguous=True
    )
    assert losses["iou"].item() == pytest.approx(0.25)
    losses["iou"].backward()
    assert (ious.grad != 0).tolist() == [[True, False, False, False], [False] * 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"method": "magic"}, "method must be one of sam-adapter, lora", id="method"),
        pytest.param({"loss": "mse"}, "loss must be one of bce, balanced bce", id="loss"),
        pytest.param({"learning_rate": -1.0}, "at least 0 and finite", id="rate"),
        pytest.param({"iou_weight": math.nan}, "at least 0 and finite", id="weight"),
        pytest.param(
            {"prompt_free_chance": 1.1}, r"prompt_free_chance must be in 0\.\.1", id="chance"
        ),
        pytest.param({"steps": 0}, "at least 1, got {'steps': 0}", id="steps"),
        pytest.param({"policies": ()}, "'policies': 0", id="no size"),
        pytest.param({"rank": 0}, "'rank': 0", id="rank"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_a_loss_that_is_not_finite_ends_the_run(small_sam):
    with pytest.raises(ConfigError, match="the loss must be finite"):
        finetune(small_sam, images(), config(learning_rate=1e30, steps=20, gradient_clip=1e30))


def test_the_number_of_steps_follows_the_number_of_images():
    counts = [default_finetune_steps(count) for count in (1, 10, 30, 1000)]
    assert counts == sorted(counts)
    assert len(set(counts)) > 1


@pytest.mark.parametrize(("channels", "kept"), [(192, 24), (768, 24), (1280, 40), (32, 32)])
def test_the_adapter_has_as_many_channels_as_vit_b_at_least(channels, kept):
    assert channels // default_sam_adapter(channels).reduction == kept
