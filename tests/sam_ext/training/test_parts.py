from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sam_ext.errors import DataError
from sam_ext.interactive import CropPolicy, answer_prompts
from sam_ext.labels import LabelledImage, LabelledObject
from sam_ext.predictor import Crop, ObjectPrompt, Predictor
from sam_ext.resolution import ResolutionPolicy
from sam_ext.training import parts as module
from sam_ext.training.parts import Kept, PartSource, View, prompt_of, with_box_of_points
from sam_ext.training.views import FLIPS, Flip

CROPS = CropPolicy(min_object_px=24, context=2, min_side=32)
NO_POINTS = {"point_coords": np.zeros((0, 2)), "point_labels": np.zeros(0, int)}


def weak(*, box=None, mask=None, **points):
    box = None if box is None else np.array(box, float)
    return LabelledObject(label="object", box_xyxy=box, mask=mask, **(points or NO_POINTS))


def image_of(objects, *, name="a", size_hw=(60, 100), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), np.uint8)
    return LabelledImage(name=name, read=lambda: pixels, objects=tuple(objects))


@pytest.fixture
def anchor(small_sam):
    policy = ResolutionPolicy(mode="native", min_side=96, max_side=96)
    return Predictor(small_sam, policy=policy)


def source(anchor, images, **changes):
    values = {"kind": "auto", "crops": CROPS, "crop_chance": 1.0, "max_objects": 3, "seed": 0}
    values["box_of_points"] = True
    return PartSource(images, anchor=anchor, **(values | changes))


BOX = (10.0, 20.0, 30.0, 28.0)
POINTS = {"point_coords": np.array([[12.0, 22.0]]), "point_labels": np.array([1])}
MASK = np.zeros((60, 100), bool)
MASK[20:28, 10:30] = True


@pytest.mark.parametrize(
    ("kind", "one", "expected"),
    [
        pytest.param("auto", weak(box=BOX, mask=MASK, **POINTS), "box", id="auto: the box first"),
        pytest.param("auto", weak(mask=MASK, **POINTS), "point", id="auto: then points"),
        pytest.param("auto", weak(mask=MASK), "box", id="auto: then the mask's box"),
        pytest.param("box", weak(mask=MASK, **POINTS), "box", id="box: the mask's"),
        pytest.param("point", weak(box=BOX, **POINTS), "point", id="point: the annotator's"),
        pytest.param("point", weak(mask=MASK), "drawn", id="point: drawn from the mask"),
        pytest.param("coarse", weak(box=(0, 0, 9, 9), mask=MASK), "box", id="coarse: the mask's"),
        pytest.param("coarse", weak(box=BOX), None, id="coarse: no mask"),
        pytest.param("point", weak(box=BOX), None, id="point: no point"),
        pytest.param("box", weak(**POINTS), None, id="box: no box"),
        pytest.param("box", weak(box=(100, 5, 120, 9)), None, id="box: beside the image"),
    ],
)
def test_how_an_object_is_asked_for(kind, one, expected):
    got = prompt_of(one, kind=kind, image_hw=(60, 100), rng=np.random.default_rng(0))
    if expected is None:
        assert got is None
    elif expected == "box":
        assert got.box_xyxy.tolist() == list(BOX)
        assert not len(got.point_coords)
    elif expected == "point":
        assert got.point_coords.tolist() == [[12.0, 22.0]]
        assert got.box_xyxy is None
    else:
        columns, rows = got.point_coords.astype(int).T
        assert MASK[rows, columns].tolist() == [True] * 5 + [False] * 5
        assert got.point_labels.tolist() == [1] * 5 + [0] * 5


def test_the_box_of_points_is_as_large_as_what_they_were_drawn_from():
    """On average, and the points that are not on the object are left out."""
    rng = np.random.default_rng(0)
    boxes = []
    for _ in range(4000):
        on_it = rng.uniform([20, 10], [60, 25], (5, 2))
        asked = ObjectPrompt(
            point_coords=np.concatenate([on_it, [[90, 50]]]), point_labels=np.array([1] * 5 + [0])
        )
        got = with_box_of_points(asked, image_hw=(60, 100))
        assert np.array_equal(got.point_coords, on_it)
        assert got.point_labels.tolist() == [1] * 5
        boxes.append(got.box_xyxy)
    # Half a pixel for the pixel that a point stands for, times 6 / 4.
    np.testing.assert_allclose(np.mean(boxes, axis=0), [19.75, 9.75, 61.25, 26.25], atol=0.5)


def test_a_box_of_points_stays_in_the_image_and_needs_three():
    coords = np.array([[1.0, 2], [90, 50], [40, 30]])
    asked = ObjectPrompt(point_coords=coords, point_labels=np.ones(3, int))
    assert with_box_of_points(asked, image_hw=(60, 100)).box_xyxy.tolist() == [0, 0, 100, 60]
    two = ObjectPrompt(point_coords=coords, point_labels=np.array([1, 1, 0]))
    assert with_box_of_points(two, image_hw=(60, 100)) is two
    boxed = ObjectPrompt(point_coords=coords, point_labels=np.ones(3, int), box_xyxy=np.array(BOX))
    assert with_box_of_points(boxed, image_hw=(60, 100)) is boxed


def test_teacher_and_anchor_are_asked_by_the_box_of_points(anchor):
    coords = np.array([[40.0, 20], [52, 32], [44, 28], [80, 8]])
    image = image_of([weak(point_coords=coords, point_labels=np.array([1, 1, 1, 0]))])
    view = source(anchor, [image], crop_chance=0.0).part(0).view
    [asked], [teacher] = view.prompts, view.teacher_prompts
    np.testing.assert_allclose(asked.point_coords, coords * [0.96, 58 / 60])
    assert asked.box_xyxy is None
    np.testing.assert_allclose(
        teacher.box_xyxy, np.array([33.5, 13.5, 59.5, 39.5]) * ([0.96, 58 / 60] * 2), rtol=1e-6
    )
    plain = source(anchor, [image], crop_chance=0.0, box_of_points=False).part(0).view
    assert plain.teacher_prompts[0].box_xyxy is None


def test_boxes_are_cut_off_at_the_image():
    got = prompt_of(
        weak(box=(-5, 10, 20, 70)), kind="box", image_hw=(60, 100), rng=np.random.default_rng(0)
    )
    assert got.box_xyxy.tolist() == [0, 10, 20, 60]


def test_small_boxes_are_seen_in_the_crop_they_are_served_in(anchor):
    image = image_of([weak(box=BOX), weak(box=(5, 5, 90, 50))])
    parts = {part.key[1]: part for part in (source(anchor, [image]).part(s) for s in range(20))}
    assert set(parts) == {None, Crop(0, 0, 64, 60)} or len(parts) == 2
    [answer] = answer_prompts(
        anchor,
        [prompt_of(weak(box=BOX), kind="box", image_hw=(60, 100), rng=np.random.default_rng())],
        image_hw=(60, 100),
        embed=lambda crop: anchor.embed(image.read(), crop=crop),
        crops=CROPS,
    )
    [crop] = [crop for crop in parts if crop is not None]
    assert crop == answer.crop
    view = parts[crop].view
    x0, y0, x1, y1 = crop
    assert max(view.image.shape) == 96
    scale = 96 / max(crop.size)
    [prompt] = view.prompts
    np.testing.assert_allclose(
        prompt.box_xyxy, (np.array(BOX) - [x0, y0, x0, y0]) * scale, atol=0.6
    )
    np.testing.assert_array_equal(
        view.image, anchor_input(image.read()[y0:y1, x0:x1], view.image.shape[:2])
    )
    assert len(parts[None].view.prompts) == 2
    whole = [source(anchor, [image]).part(step, whole=True) for step in range(20)]
    assert {part.key[1] for part in whole} == {None}


def anchor_input(pixels, size_hw):
    return np.asarray(Image.fromarray(pixels).resize(size_hw[::-1], Image.Resampling.BILINEAR))


def test_points_are_seen_where_the_anchors_answer_is_looked_at(anchor, monkeypatch):
    """The random model's masks are large and want no crop; another answer does."""
    image = image_of([weak(**POINTS)])
    assert source(anchor, [image]).part(0).key[1] is None
    crop, asked = Crop(0, 0, 64, 60), []

    def answer(predictor, prompts, *, image_hw, embed, crops):
        [prompt] = prompts
        asked.append((predictor, prompt.point_coords.tolist(), image_hw, crops))
        [whole] = answer_prompts(predictor, prompts, image_hw=image_hw, embed=embed)
        return [replace(whole, crop=crop)]

    monkeypatch.setattr(module, "answer_prompts", answer)
    assert source(anchor, [image]).part(0).key[1] == crop
    assert asked == [(anchor, [[12.0, 22.0]], (60, 100), CROPS)]


def test_crops_can_be_switched_off_and_large_numbers_are_split(anchor):
    image = image_of([weak(box=(5 + 10 * i, 20, 12 + 10 * i, 28)) for i in range(7)])
    whole = source(anchor, [image], crop_chance=0.0)
    parts = {part.key: part for part in (whole.part(step) for step in range(40))}
    assert {key[1] for key in parts} == {None}
    assert sorted(len(part.view.prompts) for part in parts.values()) == [1, 3, 3]
    boxes = np.concatenate([[p.box_xyxy for p in part.view.prompts] for part in parts.values()])
    assert len(np.unique(boxes, axis=0)) == 7


def test_images_take_turns_and_steps_are_repeatable(anchor):
    images = [image_of([weak(box=BOX)], name=str(i), seed=i) for i in range(3)]
    first = source(anchor, images)
    keys = [first.part(step).key for step in range(9)]
    for start in (0, 3, 6):
        assert sorted(key[0] for key in keys[start : start + 3]) == [0, 1, 2]
    again = source(anchor, images)
    assert [again.part(step).key for step in reversed(range(9))] == keys[::-1]
    other = source(anchor, images, seed=1)
    assert [other.part(step).key[0] for step in range(9)] != [key[0] for key in keys]


def test_what_annotators_asserted_is_drawn(anchor):
    points = {
        "point_coords": np.array([[20.0, 24.0], [12.0, 21.0], [500.0, 3.0]]),
        "point_labels": np.array([1, 0, 0]),
    }
    objects = [weak(box=BOX, **points), weak(mask=MASK[:50]), weak(**POINTS)]
    image = image_of(objects, size_hw=(50, 100))
    view = source(anchor, [image], crop_chance=0.0).part(0).view
    scale = 96 / 100
    assert view.image.shape == (48, 96, 3)
    assert view.allowed.shape == (3, 12, 24)
    rows, columns = (np.arange(12) + 0.5) * 4, (np.arange(24) + 0.5) * 4
    of_box, of_mask, of_point = by_kind(view)
    in_box = np.outer(
        (rows > 20 * scale - 2) & (rows < 28 * scale + 2),
        (columns > 10 * scale - 2) & (columns < 30 * scale + 2),
    )
    cell = int(12 * scale // 4), int(21 * scale // 4)
    in_box[cell[1], cell[0]] = False  # the negative point
    np.testing.assert_array_equal(view.allowed[of_box].numpy(), in_box)
    assert view.required[of_box].nonzero().tolist() == [
        [int(24 * scale // 4), int(20 * scale // 4)]
    ]
    assert view.boxes[of_box].any()
    assert not view.masks[of_box].any()
    allowed, mask = view.allowed[of_mask], view.masks[of_mask]
    assert allowed[mask > 0].all()
    assert (mask > 0.5).sum() < allowed.sum() < 5 * (mask > 0.5).sum()
    assert mask.sum().item() * 16 == pytest.approx(MASK.sum() * scale**2, rel=0.1)
    assert view.allowed[of_point].all()
    assert view.required[of_point].sum() == 1


@pytest.mark.parametrize("corner", [(100, 60), (101, 63), (377, 211), (765, 509)])
def test_something_tiny_is_seen_where_it_is(anchor, corner):
    """In an image eight times as large as what the encoder sees, so that a step is 32 px of it."""
    (x, y), mask = corner, np.zeros((512, 768), bool)
    mask[y : y + 3, x : x + 3] = True
    view = source(anchor, [image_of([weak(mask=mask)], size_hw=(512, 768))], kind="box", crops=None)
    view = view.part(0).view
    row, column = divmod(int(view.masks[0].argmax()), view.masks.shape[2])
    middle = (np.array([x, y]) + 1.5) / 8
    assert np.abs((np.array([column, row]) + 0.5) * 4 - middle).max() < 4.2
    assert view.masks.sum().item() * 16 == pytest.approx(9 / 64, rel=1e-3)
    assert view.allowed[0, row, column]
    assert view.allowed.float().mean() < 0.1


def test_a_mask_is_reduced_without_being_moved(anchor):
    """Not by half a pixel: what a pixel covers is its share."""
    mask = np.random.default_rng(0).random((480, 768)) > 0.5
    mask[160:400, 96:288] = True
    image = image_of([weak(mask=mask)], size_hw=(480, 768))
    view = source(anchor, [image], kind="box", crops=None).part(0).view
    assert view.image.shape[:2] == (60, 96)
    wanted = mask.reshape(15, 32, 24, 32).mean((1, 3))
    np.testing.assert_allclose(view.masks[0].numpy(), wanted, atol=1e-5)
    np.testing.assert_allclose(view.covered.numpy(), wanted, atol=1e-5)


def by_kind(view):
    box = [bool(one.any()) for one in view.boxes].index(True)
    mask = [bool(one.any()) for one in view.masks].index(True)
    return box, mask, 3 - box - mask


@pytest.mark.parametrize("flip", FLIPS)
def test_a_flip_turns_image_prompts_and_assertions_alike(anchor, flip):
    """What is painted where it is asked for is still there after the flip."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[20:28, 12:32] = 255
    points = {"point_coords": np.array([[14.0, 22.0]]), "point_labels": np.array([1])}
    one = LabelledObject(label="a", box_xyxy=np.array([12.0, 20, 32, 28]), mask=None, **points)
    image = LabelledImage(name="a", read=lambda: pixels, objects=(one,))
    view = source(anchor, [image], crop_chance=0.0).part(0).view.flipped(flip)
    x0, y0, x1, y1 = view.prompts[0].box_xyxy.astype(int)
    drawn = np.zeros((64, 96), bool)
    drawn[y0:y1, x0:x1] = True
    np.testing.assert_array_equal(view.image[..., 0] == 255, drawn)
    np.testing.assert_array_equal(view.allowed[0].numpy(), drawn[2::4, 2::4])
    row, column = view.required[0].nonzero()[0].tolist()
    left, top = (31 - 14 if flip.horizontal else 14 - 12), (27 - 22 if flip.vertical else 2)
    assert (column, row) == ((x0 + left) // 4, (y0 + top) // 4)


def test_a_prompts_points_are_turned_with_the_image(anchor):
    image = image_of([weak(**POINTS)], size_hw=(64, 96))
    view = source(anchor, [image], crop_chance=0.0).part(0).view
    [prompt] = view.flipped(Flip(True, True)).prompts
    assert prompt.point_coords.tolist() == [[95 - 12, 63 - 22]]


def test_an_image_without_objects_is_asked_for_what_the_anchor_finds(anchor, monkeypatch):
    monkeypatch.setattr(module, "_LEAST_IOU", -100.0)
    monkeypatch.setattr(module, "_LEAST_STABILITY", 0.0)
    for kind, objects in (("auto", []), ("none", [weak(box=BOX)])):
        part = source(anchor, [image_of(objects)], kind=kind, crop_chance=0.0).part(0)
        assert all(prompt.box_xyxy is not None for prompt in part.view.prompts)
        assert part.view.allowed.all()
        assert not part.view.required.any()
        assert not part.view.boxes.any()


def test_nothing_to_ask_for_is_refused(anchor, monkeypatch):
    with pytest.raises(DataError, match="objects to ask for by box, got 1 images"):
        source(anchor, [image_of([])], kind="box")
    with pytest.raises(DataError, match="objects to ask for by auto, got 0 images"):
        source(anchor, [])
    with pytest.raises(DataError, match="none of 1 images has an object"):
        source(anchor, [image_of([weak(box=BOX)])], kind="coarse").part(0)
    monkeypatch.setattr(module, "_LEAST_IOU", 100.0)
    with pytest.raises(DataError, match="none of 1 images has an object"):
        source(anchor, [image_of([])], kind="none").part(0)


def test_a_mask_of_another_size_is_refused(anchor):
    image = image_of([weak(mask=MASK[:-1])])
    with pytest.raises(DataError, match=r"a: a mask must have the image's size \[60, 100\]"):
        source(anchor, [image]).part(0)


def test_what_was_used_last_is_kept():
    kept, made = Kept(max_entries=2), []

    def make(value):
        made.append(value)
        return value

    for key in "abacab":
        assert kept.get(key, lambda key=key: make(key)) == key
    assert made == ["a", "b", "c", "b"]
    assert torch.equal(kept.get("t", lambda: torch.ones(1)), torch.ones(1))


def test_what_any_mask_covers_is_known_of_every_view(anchor):
    """Also the objects that another part asks for, cut, resized and turned round as the masks."""
    one, other = np.zeros((60, 100), bool), np.zeros((60, 100), bool)
    one[10:20, 8:20] = True
    other[30:50, 70:90] = True
    given = image_of([weak(mask=one), weak(mask=other), weak(box=BOX)])
    both = one | other
    for crop_chance in (0.0, 1.0):
        parts = source(anchor, [given], kind="box", max_objects=1, crop_chance=crop_chance)
        for step in range(6):
            part = parts.part(step)
            crop = part.key[1] or Crop(0, 0, 100, 60)
            size = part.view.image.shape[:2]
            cut = both[crop.y0 : crop.y1, crop.x0 : crop.x1]
            wanted = np.array(Image.fromarray(cut).resize(size[::-1], Image.Resampling.BOX))
            share = torch.nn.functional.adaptive_avg_pool2d(
                torch.from_numpy(wanted).float()[None], part.view.covered.shape
            )[0]
            assert (part.view.covered - share).abs().mean() < 0.02
            assert part.view.covered.max() == 1
            turned = part.view.flipped(Flip(True, False)).covered
            assert torch.equal(turned, part.view.covered.flip(-1))


def test_how_far_masks_agree_with_what_was_drawn():
    """A drawn mask says more than a box, and points say nothing."""
    nothing = torch.zeros(3, 8, 10, dtype=torch.bool)
    boxes, drawn, required, forbidden = (nothing.clone() for _ in range(4))
    drawn[0, 2:4, 2:6] = True
    boxes[:2, 1:6, 2:8] = True
    required[:, 2, [3, 5]] = True
    forbidden[:, 7, 9] = True
    view = View(
        image=np.zeros((32, 40, 3), np.uint8),
        prompts=(),
        teacher_prompts=(),
        allowed=~forbidden,
        required=required,
        boxes=boxes,
        masks=drawn.float(),
        covered=torch.zeros(8, 10),
    )
    masks = nothing.clone()
    assert view.agreement(masks).tolist() == pytest.approx([0, 0, 0])
    masks[0, 2:4, 2:4] = True
    masks[1, 1:6, 4] = masks[1, 3, 2:8] = True  # a cross as wide and high as the box
    masks[2] = True
    assert view.agreement(masks).tolist() == pytest.approx([0.5, 1, 0])
    masks[1, 7, 1] = True  # the mask's box is now 7 by 7 pixels, the drawn one 5 by 6
    assert view.agreement(masks)[1].item() == pytest.approx(30 / 49)
