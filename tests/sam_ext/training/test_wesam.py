import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sam_ext.errors import CheckpointError, ConfigError, DataError
from sam_ext.labels import LabelledImage, LabelledObject
from sam_ext.lora import LoraLinear, lora_parameters, lora_state, merge_lora
from sam_ext.predictor import ObjectPrompt, Predictor
from sam_ext.resolution import ResolutionPolicy
from sam_ext.sam import weights_fingerprint
from sam_ext.stable_sam import StableSam
from sam_ext.state_dicts import state_fingerprint
from sam_ext.training import parts, steps, wesam
from sam_ext.training.branch import Branch, Seen
from sam_ext.training.losses import dice_loss
from sam_ext.training.views import FLIPS
from sam_ext.training.wesam import WesamConfig, adapt, default_steps
from sam_ext.training.wesam_losses import pooled_features
from tests.conftest import build_small_sam

POLICY = ResolutionPolicy(mode="native", min_side=80, max_side=80)
SELF_TRAINING = ("focal", "dice", "iou")


def config(**changes):
    values = {"steps": 3, "policy": POLICY, "precision": "fp32", "warmup_steps": 0}
    return WesamConfig(**(values | changes))


def image_of(number, **of_object):
    """A bright rectangle on noise, 48 x 80."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 90, (48, 80, 3)).astype(np.uint8)
    x, y = 10 + 4 * number, 8 + 2 * number
    pixels[y : y + 24, x : x + 30] = 200
    mask = np.zeros((48, 80), bool)
    mask[y : y + 24, x : x + 30] = True
    known = {
        "box_xyxy": np.array([x, y, x + 30, y + 24], float),
        "point_coords": np.array([[x + 5.0, y + 6], [x + 20, y + 9], [x + 2, 2.0]]),
        "point_labels": np.array([1, 1, 0]),
        "mask": mask,
    }
    nothing = {
        "box_xyxy": None,
        "point_coords": np.zeros((0, 2)),
        "point_labels": np.zeros(0, int),
        "mask": None,
    }
    kept = {key: known[key] for key in known if of_object.get(key.split("_")[0], False)}
    objects = (LabelledObject(label="a", **(nothing | kept)),) if kept else ()
    return LabelledImage(name=str(number), read=lambda: pixels, objects=objects)


def images(count=3, **of_object):
    return [image_of(number, **(of_object or {"box": True})) for number in range(count)]


def curve(sam, given, settings, **options):
    steps = []
    adapted = adapt(sam, given, settings, on_step=steps.append, **options)
    return adapted, steps


def test_only_lora_is_trained_and_the_given_sam_is_not_touched(small_sam):
    before = {key: value.clone() for key, value in small_sam.state_dict().items()}
    adapted = adapt(small_sam, images(), config())
    assert all(torch.equal(small_sam.state_dict()[key], value) for key, value in before.items())
    assert all(parameter.requires_grad for parameter in small_sam.parameters())
    assert all(torch.equal(adapted.state_dict()[key], value) for key, value in before.items())
    assert {type(block.attn.qkv) for block in adapted.image_encoder.blocks} == {LoraLinear}
    assert all(parameter.any() for parameter in lora_parameters(adapted))
    assert not adapted.training
    assert weights_fingerprint(merge_lora(adapted)) != weights_fingerprint(small_sam)


@pytest.mark.parametrize(
    ("settings", "of_object"),
    [
        pytest.param({}, {"box": True}, id="boxes"),
        pytest.param({"projection_weight": 0.0}, {"box": True}, id="boxes, without their loss"),
        pytest.param({"sharpness": math.inf}, {"box": True}, id="boxes, with hard targets"),
        pytest.param({"loose_prompts": 1.0}, {"box": True}, id="jittered boxes"),
        pytest.param({"prompts": "point"}, {"point": True}, id="points"),
        pytest.param({"loose_prompts": 1.0}, {"point": True}, id="some of the points"),
        pytest.param({"prompts": "point"}, {"mask": True}, id="points of masks"),
        pytest.param({"prompts": "coarse"}, {"mask": True}, id="rough masks"),
        pytest.param({"targets": "masks"}, {"box": True, "mask": True}, id="full masks"),
        pytest.param({"prompts": "none"}, {"box": True}, id="nothing"),
        pytest.param({"prompts": "auto"}, {}, id="no objects"),
    ],
)
def test_every_kind_of_label_trains(small_sam, monkeypatch, settings, of_object):
    monkeypatch.setattr(parts, "_LEAST_IOU", -100.0)
    monkeypatch.setattr(parts, "_LEAST_STABILITY", 0.0)
    given = [image_of(number, **of_object) for number in range(2)]
    adapted, steps = curve(small_sam, given, config(**settings))
    assert all(math.isfinite(value) for step in steps for value in step.losses.values())
    assert all(parameter.any() for parameter in lora_parameters(adapted))
    names = {*SELF_TRAINING, "total"}
    if settings.get("targets") != "masks":
        names |= {"anchor", "contrastive", "pairwise"}
    if "projection_weight" not in settings:
        names.add("projection")
    assert set(steps[0].losses) == names


SAME_VIEW = {"strong_chance": 0.0, "correct_pseudo_masks": False, "loose_prompts": 0.0}


def test_at_the_start_there_is_nothing_to_learn_from_an_unchanged_view(small_sam):
    """Teacher, student and anchor say the same, and that is what is wanted of them."""
    _, [step] = curve(small_sam, images(1), config(steps=1, sharpness=1.0, **SAME_VIEW))
    assert step.losses["focal"] == pytest.approx(0, abs=1e-6)
    assert step.losses["dice"] == pytest.approx(0, abs=1e-4)
    assert step.losses["anchor"] == pytest.approx(0, abs=1e-3)  # its logits are kept as halves


def test_at_the_start_the_teacher_is_the_anchor_and_an_unchanged_view_the_teachers(small_sam):
    """Then the source's anchor loss is Dice of the anchor's logits and its mask, twice a half."""
    settings = config(steps=1, sharpness=math.inf, trust=1.0, **SAME_VIEW)
    _, [step] = curve(small_sam, images(1), settings)
    anchor = Predictor(small_sam, policy=POLICY)
    found = []
    for flip in FLIPS:
        view = first_view(anchor).flipped(flip)
        [(low_res, ious, _)] = anchor.decode_low_res(anchor.embed(view.image), view.prompts)
        logits = low_res[:1, :12, :20]
        wanted = (logits > 0).float()
        dice = dice_loss(logits, wanted).item()
        found.append((dice, (ious[0] - 1).square().item() if wanted.any() else None))
    assert any(
        step.losses["anchor"] == pytest.approx(dice, abs=1e-4)
        and step.losses["dice"] == pytest.approx(dice if error is not None else 0, abs=1e-4)
        for dice, error in found
    )


def first_view(anchor):
    source = parts.PartSource(
        images(1),
        anchor=anchor,
        kind="auto",
        box_of_points=True,
        crops=None,
        crop_chance=0.0,
        max_objects=20,
        seed=0,
    )
    return source.part(0).view


@pytest.mark.parametrize(
    ("off", "left"),
    [
        ("anchor", {"focal", "dice", "iou", "contrastive", "projection", "pairwise"}),
        ("contrastive", {"focal", "dice", "iou", "anchor", "projection", "pairwise"}),
        ("projection", {"focal", "dice", "iou", "anchor", "contrastive", "pairwise"}),
        ("pairwise", {"focal", "dice", "iou", "anchor", "contrastive", "projection"}),
    ],
)
def test_a_loss_that_is_switched_off_is_not_there(small_sam, off, left):
    _, steps = curve(small_sam, images(), config(**{f"{off}_weight": 0.0}))
    assert set(steps[0].losses) == {*left, "total"}


def test_losses_are_told_as_they_are_weighed_and_the_total_is_their_sum(small_sam):
    weights = {"focal": 3.0, "dice": 0.5, "iou": 2.0, "anchor": 0.25, "contrastive": 1.5}
    weights |= {"projection": 0.75, "pairwise": 1.25}
    heavy = config(steps=1, **{f"{name}_weight": weight for name, weight in weights.items()})
    light = config(steps=1, **{f"{name}_weight": 1.0 for name in weights})
    (_, [weighed]), (_, [plain]) = (curve(small_sam, images(), one) for one in (heavy, light))
    for name, weight in weights.items():  # of the first step, before anything was learnt
        assert weighed.losses[name] == pytest.approx(weight * plain.losses[name], rel=1e-4), name
    assert any(value > 0 for value in plain.losses.values())
    for step in (weighed, plain):
        parts = sum(value for name, value in step.losses.items() if name != "total")
        assert step.losses["total"] == pytest.approx(parts, rel=1e-5)


def test_the_teacher_alone_is_held_to_the_anchor_and_learns_from_it(small_sam):
    """With every loss of the student switched off, gradients still come through the teacher."""
    off = {f"{name}_weight": 0.0 for name in (*SELF_TRAINING, "projection", "pairwise")}
    settings = config(steps=2, anchor_weight=0.0, learning_rate=0.01, weight_decay=0.0, **off)
    assert settings.contrastive_weight > 0
    adapted = adapt(small_sam, images(), settings)
    assert all(parameter.any() for parameter in lora_parameters(adapted)[1::2])
    nothing = adapt(small_sam, images(), replace(settings, contrastive_weight=0.0))
    assert not any(parameter.any() for parameter in lora_parameters(nothing)[1::2])


def test_correction_keeps_pseudo_masks_to_what_annotators_asserted():
    view = parts.View(
        covered=torch.zeros(1, 1),
        image=np.zeros((16, 16, 3), np.uint8),
        prompts=(),
        teacher_prompts=(),
        allowed=torch.tensor([[[1, 1, 0, 0]], [[0, 0, 0, 1]], [[1, 1, 1, 1]]]).bool(),
        required=torch.tensor([[[0, 1, 0, 0]], [[0, 0, 0, 0]], [[0, 0, 0, 1]]]).bool(),
        boxes=torch.zeros(3, 1, 4).bool(),
        masks=torch.zeros(3, 1, 4),
    )
    teacher = torch.tensor([[[1, 0, 1, 1]], [[1, 1, 0, 0]], [[0, 0, 0, 0]]]) * 4.0 - 2
    anchors = torch.tensor([[[0, 0, 0, 0]], [[1, 1, 1, 1]], [[1, 0, 0, 0]]]) * 2.0 - 1
    target = target_of(anchors)
    wanted = [
        [[1, 1, 0, 0]],  # what is not allowed goes, what is required comes
        [[0, 0, 0, 1]],  # nothing is left: the anchor's
        [[1, 0, 0, 1]],
    ]
    hard, soft = config(sharpness=math.inf), config(sharpness=2.0)
    assert wesam._pseudo_masks(teacher, view, target, hard).tolist() == wanted
    high, of_anchor = 1 / (1 + math.exp(-4)), 1 / (1 + math.exp(-2))
    no = 1 - of_anchor
    expected = [[[high, 1, 0, 0]], [[0, 0, 0, of_anchor]], [[of_anchor, no, no, 1]]]
    torch.testing.assert_close(
        wesam._pseudo_masks(teacher, view, target, soft), torch.tensor(expected)
    )
    held = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))
    torch.testing.assert_close(
        wesam._anchor_shares(view, target, soft),
        torch.tensor([[[held[1], 1, 0, 0]], [[0, 0, 0, held[0]]], [[held[0], *[held[1]] * 2, 1]]]),
    )
    plain = replace(hard, correct_pseudo_masks=False)
    assert torch.equal(wesam._pseudo_masks(teacher, view, target, plain), (teacher > 0).float())


def target_of(logits, trust=0.0):
    return wesam._Target(
        logits=logits.half(),
        token=torch.zeros(len(logits)).long(),
        features=torch.zeros(len(logits) + 1, 2),
        is_ambiguous=True,
        trust=torch.full((len(logits),), trust),
    )


def test_the_teacher_is_held_harder_to_an_anchor_that_the_labels_trust(small_sam):
    anchor = Predictor(small_sam, policy=POLICY)
    view = first_view(anchor)
    logits = torch.randn(1, 12, 20)
    teacher = torch.randn(1, 12, 20)
    seen = Seen(torch.zeros(256, 3, 5), torch.zeros(1, 4, 12, 20), torch.zeros(1, 4))
    held = [
        wesam._teacher_losses(
            seen, teacher, view, target_of(logits, trust), config(trust=5.0, contrastive_weight=0.0)
        )["anchor"].item()
        for trust in (0.0, 0.5, 1.0)
    ]
    assert held == pytest.approx([held[0], 3 * held[0], 5 * held[0]])
    assert held[0] > 0


def test_colours_are_asked_where_the_anchor_misses_a_drawn_box(small_sam):
    view = first_view(Predictor(small_sam, policy=POLICY))
    seen = Seen(torch.zeros(256, 3, 5), torch.randn(1, 4, 12, 20), torch.zeros(1, 4))
    pseudo, logits = torch.ones(1, 12, 20), torch.randn(1, 12, 20)

    def pairwise(view, trust):
        target = target_of(logits, trust)
        losses, _ = wesam._student_losses(seen, pseudo, view.prompts, view, target, config())
        return losses["pairwise"].item()

    doubted = pairwise(view, 0.0)
    assert doubted > 0
    assert pairwise(view, 0.75) == pytest.approx(doubted / 4)
    assert pairwise(replace(view, boxes=torch.zeros_like(view.boxes)), 0.0) == 0


@pytest.mark.parametrize(("sides", "trust"), [((10, 8), 1.0), ((12, 8), 0.5), ((20, 12), 0.0)])
def test_an_anchor_is_trusted_as_far_as_its_box_is_the_drawn_one(
    small_sam, monkeypatch, sides, trust
):
    boxes = torch.zeros(1, 16, 24, dtype=torch.bool)
    boxes[0, 2:10, 3:13] = True
    if trust == 0.5:
        boxes[0, 2:10, 3:14] = True  # 10 of 11 columns of the mask below: 0.909
        sides = (10, 8)
    mask = torch.full((1, 1, 16, 24), -5.0)
    mask[0, 0, 2 : 2 + sides[1], 3 : 3 + sides[0]] = 5.0
    anchor = Predictor(small_sam, policy=POLICY)
    prompt = ObjectPrompt(
        point_coords=np.zeros((0, 2)),
        point_labels=np.zeros(0, int),
        box_xyxy=np.array([12.0, 8, 52, 40]),
    )
    view = parts.View(
        covered=torch.zeros(16, 24),
        image=np.zeros((64, 96, 3), np.uint8),
        prompts=(prompt,),
        teacher_prompts=(prompt,),
        allowed=boxes,
        required=torch.zeros_like(boxes),
        boxes=boxes,
        masks=torch.zeros(1, 16, 24),
    )
    answer = (mask[0].expand(4, -1, -1), torch.zeros(4), None)
    monkeypatch.setattr(anchor, "decode_low_res", lambda *_: [answer])
    got = wesam._anchor_target(anchor, view, is_ambiguous=True).trust.item()
    assert got == pytest.approx({1.0: 1.0, 0.5: (10 / 11 - 0.85) / 0.1, 0.0: 0.0}[trust], abs=1e-5)


def test_full_supervision_learns_the_masks(small_sam):
    settings = config(
        steps=60,
        targets="masks",
        learning_rate=0.02,
        focal_weight=20.0,
        projection_weight=0.0,
        loose_prompts=0.0,
        strong_chance=0.0,
    )
    _, steps = curve(small_sam, images(box=True, mask=True), settings)
    focal = [step.losses["focal"] for step in steps]
    assert np.mean(focal[-6:]) < 0.96 * np.mean(focal[:6])  # a random decoder hardly lets it


def test_a_run_that_was_ended_goes_on_to_the_same_end(small_sam, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "_SAVE_STEPS", 2)
    settings = config(steps=7, loose_prompts=0.5)
    wanted, whole = curve(small_sam, images(), settings)

    class Cancelled(Exception):  # noqa: N818
        pass

    def cancel(step):
        if step.step == 5:
            raise Cancelled

    with pytest.raises(Cancelled):
        adapt(small_sam, images(), settings, run_dir=tmp_path, on_step=cancel)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    got, rest = curve(small_sam, images(), settings, run_dir=tmp_path)
    assert [step.step for step in rest] == [5, 6, 7]
    assert [step.losses for step in rest] == [step.losses for step in whole[4:]]
    states = lora_state(got), lora_state(wanted)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])
    again, none = curve(small_sam, images(), settings, run_dir=tmp_path)
    assert none == []
    assert torch.equal(*(lora_parameters(sam)[1] for sam in (again, wanted)))


def test_another_runs_rest_is_refused(small_sam, tmp_path):
    adapt(small_sam, images(), config(steps=1), run_dir=tmp_path)
    for given, settings in (
        ((small_sam, images()), config(steps=2)),
        ((small_sam, images(2)), config(steps=1)),
        ((small_sam, images(point=True)), config(steps=1)),
        ((build_small_sam(seed=1), images()), config(steps=1)),
    ):
        with pytest.raises(CheckpointError, match="of the same model, images, labels and settings"):
            adapt(*given, settings, run_dir=tmp_path)
    (tmp_path / "last.pt").write_bytes(b"PK damaged")
    with pytest.raises(CheckpointError, match="it is damaged"):
        adapt(small_sam, images(), config(steps=1), run_dir=tmp_path)


def test_the_seed_decides_everything(small_sam):
    first, again, other = (
        lora_state(adapt(small_sam, images(), config(seed=seed, loose_prompts=0.5)))
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    adapt(small_sam, images(), config(steps=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_checkpointing_computes_the_same(small_sam):
    plain, wanted = curve(small_sam, images(), config())
    settings = config(gradient_checkpointing=True)
    checkpointed, steps = curve(small_sam, images(), settings)
    for one, other in zip(wanted, steps, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-5, abs=1e-6)
    for one, other in zip(lora_parameters(plain), lora_parameters(checkpointed), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)  # Adam divides small numbers


def test_what_the_anchor_says_is_computed_once_for_each_view(small_sam, monkeypatch):
    calls = []
    original = wesam._anchor_target
    monkeypatch.setattr(
        wesam, "_anchor_target", lambda *args, **how: calls.append(1) or original(*args, **how)
    )
    adapt(small_sam, images(1), config(steps=12))
    assert 2 <= len(calls) <= 4


def test_steps_are_told_with_the_time_that_is_left(small_sam):
    _, steps = curve(small_sam, images(), config(steps=4))
    assert [(step.step, step.steps) for step in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert steps[0].eta_s > 0
    assert steps[-1].eta_s == 0


def test_the_number_of_steps_follows_the_number_of_images(small_sam):
    assert [default_steps(count) for count in (1, 10, 16, 1000)] == sorted(
        default_steps(count) for count in (1, 10, 16, 1000)
    )
    stop = []

    def first(step):
        stop.append(step.steps)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt(small_sam, images(2), config(steps=None), on_step=first)
    assert stop == [default_steps(2)]


def test_a_diverging_run_ends_with_its_reason(small_sam):
    sam = copy.deepcopy(small_sam)
    with torch.no_grad():
        sam.mask_decoder.iou_token.weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match=r"must be finite, got nan at step 0"):
        adapt(sam, images(), config())


def test_no_image_is_refused(small_sam):
    with pytest.raises(DataError, match="got 0 images"):
        adapt(small_sam, [], config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"anchor_weight": -1.0}, "at least 0 and finite, got {'anchor_weight': -1.0}"),
        ({"learning_rate": math.inf}, "'learning_rate': inf"),
        ({"crop_chance": 1.5}, r"crop_chance must be in 0\.\.1, got 1\.5"),
        ({"sharpness": 0.0}, "sharpness must be above 0 and WesamConfig.trust at least 1, got 0.0"),
        ({"trust": 0.5}, "trust at least 1, got 2.0 and 0.5"),
        ({"rank": 0}, "rank and WesamConfig.max_objects must be at least 1, got 0 and 20"),
    ],
)
def test_an_impossible_run_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        WesamConfig(**changes)


def test_the_student_is_asked_more_loosely_but_for_the_same_objects():
    pseudo = torch.zeros(2, 12, 20)
    pseudo[0, 3:9, 5:15] = 1
    box = ObjectPrompt(
        point_coords=np.zeros((0, 2)),
        point_labels=np.zeros(0, int),
        box_xyxy=np.array([20.0, 12, 60, 36]),
    )
    points = ObjectPrompt(
        point_coords=np.arange(12.0).reshape(6, 2), point_labels=np.array([1, 0, 1, 0, 1, 0])
    )
    boxes, drawn, kept = 0, set(), set()
    for seed in range(80):
        generator = torch.Generator().manual_seed(seed)
        first, second = wesam._loosened([box, points], pseudo, generator)
        if first.box_xyxy is None:
            drawn.add(len(first.point_coords))
            columns, rows = ((first.point_coords + 0.5) // 4).astype(int).T
            assert pseudo[0, rows, columns].all()
            assert first.point_labels.all()
        else:
            boxes += 1
            assert first.box_xyxy.tolist() != box.box_xyxy.tolist()
            np.testing.assert_allclose(first.box_xyxy, box.box_xyxy, atol=40 * 0.2 * 1.01)
        kept.add((int((second.point_labels == 1).sum()), int((second.point_labels == 0).sum())))
        held = dict(zip(map(tuple, points.point_coords), points.point_labels, strict=True))
        assert all(
            held[tuple(xy)] == label
            for xy, label in zip(second.point_coords, second.point_labels, strict=True)
        )
    assert 20 < boxes < 60
    assert drawn == {1, 2, 3}
    assert {positive for positive, _ in kept} == {1, 2, 3}
    assert {negative for _, negative in kept} == {0, 1, 2, 3}


def test_an_object_without_a_mask_keeps_its_box():
    box = ObjectPrompt(
        point_coords=np.zeros((0, 2)),
        point_labels=np.zeros(0, int),
        box_xyxy=np.array([20.0, 12, 60, 36]),
    )
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        [got] = wesam._loosened([box], torch.zeros(1, 12, 20), generator)
        assert got.box_xyxy is not None


@pytest.mark.parametrize("single", [True, False])
def test_a_single_point_is_answered_by_the_best_of_three_and_others_by_the_single_mask(single):
    logits = torch.full((1, 4, 8, 8), -4.0)
    wanted = torch.zeros(1, 8, 8)
    wanted[0, 2:6, 2:6] = 1
    logits[0, 2] = 8 * wanted[0] - 4
    logits[0, 0, 2:6, 2:4] = 4.0  # the single mask holds a half
    seen = Seen(torch.zeros(2, 1, 1), logits, torch.tensor([[0.5, 0.1, 0.9, 0.2]]))
    prompt = ObjectPrompt(
        point_coords=np.zeros((1 if single else 2, 2)),
        point_labels=np.ones(1 if single else 2, int),
    )
    view = parts.View(
        covered=torch.zeros(1, 1),
        image=np.zeros((32, 32, 3), np.uint8),
        prompts=(prompt,),
        teacher_prompts=(prompt,),
        allowed=torch.ones(1, 8, 8).bool(),
        required=torch.zeros(1, 8, 8).bool(),
        boxes=torch.zeros(1, 8, 8).bool(),
        masks=torch.zeros(1, 8, 8),
    )
    target = target_of(20 * wanted - 10)
    settings = config(sharpness=math.inf)
    losses, mean_iou = wesam._student_losses(seen, wanted, [prompt], view, target, settings)
    chosen = logits[:, 2 if single else 0]
    assert losses["dice"].item() == pytest.approx(dice_loss(chosen, wanted).item())
    assert losses["anchor"].item() == pytest.approx(0.5 * dice_loss(chosen, wanted).item())
    error = (0.9 - 1.0) ** 2 if single else (0.5 - 0.5) ** 2
    assert losses["iou"].item() == pytest.approx(error, abs=1e-6)
    assert mean_iou.item() == (1.0 if single else 0.5)


def test_a_plugin_takes_part_and_is_not_trained(small_sam):
    """Its single point is answered by the single mask; another plugin trains another model."""
    torch.manual_seed(0)
    plugins = [StableSam(), StableSam()]
    for plugin in plugins:
        for parameter in plugin.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    before = [state_fingerprint(plugin) for plugin in plugins]
    given = images(point=True)
    settings = config(prompts="point", box_of_points=False)
    adapted = [adapt(small_sam, given, settings, stable_sam=one) for one in (None, *plugins)]
    assert [state_fingerprint(plugin) for plugin in plugins] == before
    assert all(parameter.requires_grad for one in plugins for parameter in one.parameters())
    assert all(parameter.grad is None for one in plugins for parameter in one.parameters())
    states = [lora_state(one) for one in adapted]
    for first, second in ((0, 1), (1, 2)):
        assert not any(torch.equal(states[first][key], states[second][key]) for key in states[0])
    anchor = Predictor(small_sam, policy=POLICY, stable_sam=plugins[0])
    assert not any(parameter.requires_grad for parameter in branch_of(small_sam, plugins[0]))
    point = ObjectPrompt(point_coords=np.array([[20.0, 20.0]]), point_labels=np.ones(1, int))
    view = replace(first_view(anchor), teacher_prompts=(point,))
    assert wesam._anchor_target(anchor, view, is_ambiguous=False).token.tolist() == [0]
    assert wesam._anchor_target(anchor, view, is_ambiguous=True).token.item() > 0


def branch_of(sam, plugin):
    adapted = wesam._with_lora(sam, config())
    return Branch(adapted, plugin, ba_sam=None, checkpointing=False).stable_sam.parameters()


def test_features_are_those_of_the_objects_and_of_the_background():
    embeddings = torch.randn(5, 3, 4)
    masks = torch.zeros(2, 12, 16).bool()
    masks[0, :4, :8] = True
    masks[1, 4:, 8:] = True
    wanted = [masks[:, ::4, ::4][0], masks[:, ::4, ::4][1]]
    wanted.append(~(wanted[0] | wanted[1]))
    got = wesam._features(embeddings, masks)
    torch.testing.assert_close(got, pooled_features(embeddings, torch.stack(wanted)))
