import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sam_ext.errors import ConfigError, DataError
from sam_ext.training.data import (
    CocoFolder,
    MixedSamples,
    PhotographsOf,
    Scene,
    SyntheticSource,
    make_sample,
)
from sam_ext.training.synthetic import SyntheticConfig

SIZE_HW = (60, 90)


def rle(mask):
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def rectangle(x0, y0, x1, y1):
    mask = np.zeros(SIZE_HW, bool)
    mask[y0:y1, x0:x1] = True
    return mask


FIRST, SECOND = rectangle(10, 20, 40, 50), rectangle(60, 5, 80, 25)


@pytest.fixture
def folder(tmp_path):
    """Two images of 60 x 90: a bright square each; all forms of segmentation that COCO has."""
    (tmp_path / "images").mkdir()
    image = np.full((*SIZE_HW, 3), 30, np.uint8)
    image[FIRST] = (200, 10, 60)
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(tmp_path / "images" / name), image[..., ::-1])
    counts = coco_mask.frPyObjects({"size": list(SIZE_HW), "counts": [0, 5, 5395]}, *SIZE_HW)
    assert coco_mask.area(counts) == 5
    annotations = [
        {"image_id": 1, "segmentation": rle(FIRST), "primary": 1},
        {"image_id": 1, "segmentation": [[60, 5, 80, 5, 80, 25, 60, 25]], "primary": 0},
        {"image_id": 1, "segmentation": rle(SECOND), "iscrowd": 1},
        {"image_id": 2, "segmentation": {"size": list(SIZE_HW), "counts": [0, 5, 5395]}},
    ]
    size = {"height": SIZE_HW[0], "width": SIZE_HW[1]}
    images = [
        {"id": 1, "file_name": "a.png", "split": "train", **size},
        {"id": 2, "file_name": "b.png", "split": "val", **size},
        {"id": 3, "file_name": "absent.png", "split": "train", **size},
    ]
    content = {"images": images, "annotations": annotations}
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    return tmp_path


def test_images_come_by_split_in_rgb_with_all_forms_of_segmentation(folder):
    train = CocoFolder(folder)
    assert len(train) == 1  # image 3 has no annotation
    scene = train.scene(0)
    assert scene.image[30, 20].tolist() == [200, 10, 60]
    np.testing.assert_array_equal(scene.mask(0), FIRST)
    np.testing.assert_array_equal(scene.mask(1), SECOND)
    assert scene.boxes_xyxy.tolist() == [[10, 20, 40, 50], [60, 5, 80, 25]]
    both = CocoFolder(folder, splits=None)
    assert [both.file(i).name for i in range(len(both))] == ["a.png", "b.png"]
    assert both.scene(1).mask(0).sum() == 5


def test_only_primary_annotations_where_asked(folder):
    scene = CocoFolder(folder, primary_only=True).scene(0)
    assert len(scene.rles) == 1
    np.testing.assert_array_equal(scene.mask(0), FIRST)


def test_a_folder_that_is_no_data_set_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match=r"must hold annotations\.json"):
        CocoFolder(tmp_path / "images")
    with pytest.raises(DataError, match=r"splits \('test',\), found none"):
        CocoFolder(folder, splits=("test",))
    (folder / "images" / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a\.png must be an image"):
        CocoFolder(folder).scene(0)


def test_a_sample_without_augmentation_is_the_whole_image_padded_at_the_bottom(folder):
    scene = CocoFolder(folder).scene(0)
    sample = make_sample(scene, size=96, prompts=3, rng=np.random.default_rng(0), augment=False)
    scale = 96 / 90
    assert sample.image.shape == (96, 96, 3)
    assert (sample.image[64:] == (124, 116, 104)).all()
    assert sample.targets.shape == (3, 24, 24)
    wanted = {
        tuple(np.round(np.array(box) * scale)): (area * scale**2 / 16)
        for box, area in (((10, 20, 40, 50), 900), ((60, 5, 80, 25), 400))
    }
    for target, box, (x, y) in zip(sample.targets, sample.boxes_xyxy, sample.points, strict=True):
        nearest = min(wanted, key=lambda w: np.abs(np.array(w) - box).max())
        assert np.abs(np.array(nearest) - box).max() <= 1
        assert target.sum() / 255 == pytest.approx(wanted[nearest], rel=0.08)
        assert box[0] <= x < box[2]
        assert box[1] <= y < box[3]
    assert len({tuple(b) for b in sample.boxes_xyxy}) == 2  # two objects, one of them twice


def test_image_and_masks_keep_together_under_augmentation(folder):
    """The bright square is where its target says, whatever crop, stretch and flip were drawn."""
    folder_scene = CocoFolder(folder, primary_only=True).scene(0)
    seen = set()
    for seed in range(30):
        sample = make_sample(
            folder_scene, size=64, prompts=1, rng=np.random.default_rng(seed), augment=True
        )
        full = cv2.resize(sample.targets[0], (64, 64), interpolation=cv2.INTER_NEAREST)
        spread = sample.image.astype(int).max(2) - sample.image.astype(int).min(2)
        if spread.max() < 60:
            continue  # drawn grey
        coloured = spread > spread.max() / 2
        assert (coloured & (full > 127)).sum() / (coloured | (full > 127)).sum() > 0.75
        seen.add(tuple(sample.boxes_xyxy[0]))
    assert len(seen) > 10


def test_a_scene_without_a_large_enough_object_gives_no_sample():
    tiny = np.zeros(SIZE_HW, bool)
    tiny[3:5, 3:5] = True
    scene = Scene(
        image=np.zeros((*SIZE_HW, 3), np.uint8),
        boxes_xyxy=np.array([[3, 3, 5, 5]], np.float32),
        rles=[rle(tiny)],
    )
    rng = np.random.default_rng(0)
    assert make_sample(scene, size=64, prompts=1, rng=rng, augment=False) is None
    with pytest.raises(DataError, match="200 scenes in a row"):
        MixedSamples([(_Single(scene), 1.0)], size=64, prompts=1, seed=0, augment=False)[0]


class _Single:
    def __init__(self, scene):
        self._scene = scene

    def __len__(self):
        return 1

    def scene(self, index):
        return self._scene


def test_sample_i_depends_on_the_seed_and_on_i_alone():
    def mix(seed):
        source = SyntheticSource(SyntheticConfig(size=64, objects=(2, 4)), count=5)
        return MixedSamples([(source, 1.0)], size=64, prompts=2, seed=seed)

    late, fresh, other = mix(1), mix(1), mix(2)
    late[0], late[1]
    for name in ("image", "targets", "boxes_xyxy", "points"):
        np.testing.assert_array_equal(getattr(late[7], name), getattr(fresh[7], name))
    assert not np.array_equal(fresh[7].image, other[7].image)
    assert not np.array_equal(fresh[7].image, fresh[8].image)


def test_cutouts_are_objects_in_their_boxes_and_none_is_tiny(folder):
    photographs = PhotographsOf([(CocoFolder(folder), 1.0)])
    assert photographs.photograph(np.random.default_rng(0)).shape == (*SIZE_HW, 3)
    sizes = set()
    for seed in range(20):
        pixels, mask = photographs.cutout(np.random.default_rng(seed))
        assert pixels.shape == (*mask.shape, 3)
        assert mask.all()  # both objects are rectangles
        sizes.add(mask.shape)
    assert sizes == {(30, 30), (20, 20)}
    scene = CocoFolder(folder, splits=("val",))  # its only object is a column of 5 px
    with pytest.raises(DataError, match="narrower than 16 px"):
        PhotographsOf([(scene, 1.0)]).cutout(np.random.default_rng(0))


def test_a_mosaic_holds_four_samples_in_their_places():
    source = SyntheticSource(SyntheticConfig(size=64, objects=(2, 4)), count=3)
    mosaics = 0
    samples = MixedSamples([(source, 1.0)], size=64, prompts=4, seed=0)
    for index in range(40):
        sample = samples[index]
        middles = (sample.boxes_xyxy[:, :2] + sample.boxes_xyxy[:, 2:]) / 2 // 32
        for target, box, point in zip(
            sample.targets, sample.boxes_xyxy, sample.points, strict=True
        ):
            ys, xs = np.nonzero(target)
            assert np.all(4 * np.array([xs.min(), ys.min()]) <= box[:2] + 4)
            assert np.all(4 * np.array([xs.max() + 1, ys.max() + 1]) >= box[2:] - 4)
            assert np.all((box[:2] <= point) & (point < box[2:]))
        in_one_quarter = (sample.boxes_xyxy[:, 2:] - sample.boxes_xyxy[:, :2] <= 32).all()
        order = [(0, 0), (1, 0), (0, 1), (1, 1)]
        mosaics += in_one_quarter and [tuple(m) for m in middles] == order
    assert 6 <= mosaics <= 20


def test_sources_are_drawn_by_weight():
    first, second = (
        SyntheticSource(SyntheticConfig(size=64, objects=(2, 4)), count=1, seed=seed)
        for seed in (1, 2)
    )
    samples = MixedSamples([(first, 3.0), (second, 1.0)], size=64, prompts=1, seed=0, augment=False)
    wanted = make_sample(
        first.scene(0), size=64, prompts=1, rng=np.random.default_rng(0), augment=False
    ).image
    drawn = [np.array_equal(samples[i].image, wanted) for i in range(200)]
    assert 0.65 < np.mean(drawn) < 0.85


@pytest.mark.parametrize(
    ("weights", "size", "message"),
    [
        pytest.param([], 64, "weights >= 0", id="no source"),
        pytest.param([0.0], 64, "weights >= 0", id="no weight"),
        pytest.param([-1.0, 2.0], 64, "weights >= 0", id="negative"),
        pytest.param([1.0], 60, "multiple of 16, got 60", id="size"),
    ],
)
def test_an_impossible_mix_is_refused(weights, size, message):
    source = SyntheticSource(SyntheticConfig(), count=1)
    with pytest.raises(ConfigError, match=message):
        MixedSamples([(source, w) for w in weights], size=size, prompts=1, seed=0)
