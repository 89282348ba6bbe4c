import json
from dataclasses import asdict

import cv2
import numpy as np
import pytest
import torch

from sam_ext.checkpoints import load_sam, save_checkpoint
from sam_ext.errors import ConfigError
from sam_ext.evaluate import adaptation
from sam_ext.evaluate.__main__ import main
from sam_ext.evaluate.adaptation import VARIANTS, evaluate_adaptation, measure, weak_images
from sam_ext.evaluate.common import box_prompt
from sam_ext.interactive import answer_prompts, default_crops
from sam_ext.lora import merge_lora
from sam_ext.metrics import boundary_iou, iou, tight_box
from sam_ext.predictor import Predictor
from sam_ext.resolution import default_policy
from sam_ext.training.data import CocoFolder
from sam_ext.training.wesam import WesamConfig, adapt
from tests.sam_ext.evaluate.folders import OBJECT, write_folder


@pytest.fixture
def root(tmp_path):
    moved = np.roll(OBJECT, 5, axis=1)
    return write_folder(tmp_path / "set", [OBJECT, moved, OBJECT], ("train", "train", "test"))


@pytest.fixture
def train(root):
    return CocoFolder(root, splits=("train",))


@pytest.fixture
def test(root):
    return CocoFolder(root, splits=("test",))


def config(**changes):
    return WesamConfig(**({"steps": 2, "precision": "fp32"} | changes))


def test_boxes_are_tight(train):
    first, second = weak_images(train, [0, 1], "box", seed=0)
    assert first.objects[0].box_xyxy.tolist() == [10, 8, 60, 40]
    assert second.objects[0].box_xyxy.tolist() == [15, 8, 65, 40]
    assert first.objects[0].mask is None
    assert np.array_equal(first.read(), train.scene(0).image)


def test_points_are_five_inside_and_five_outside_drawn_once(train):
    [image] = weak_images(train, [0], "point", seed=0)
    [one] = image.objects
    columns, rows = one.point_coords.astype(int).T
    assert OBJECT[rows, columns].tolist() == [True] * 5 + [False] * 5
    assert one.point_labels.tolist() == [1] * 5 + [0] * 5
    assert one.box_xyxy is None
    [again], [other] = (weak_images(train, [0], "point", seed=seed) for seed in (0, 1))
    assert np.array_equal(again.objects[0].point_coords, one.point_coords)
    assert not np.array_equal(other.objects[0].point_coords, one.point_coords)


def test_rough_masks_are_polygons_of_few_corners(train):
    [image] = weak_images(train, [0], "coarse", seed=0)
    rough = image.objects[0].mask
    assert 0.5 < iou(rough, OBJECT) < 1
    [full] = weak_images(train, [0], "masks", seed=0)
    assert np.array_equal(full.objects[0].mask, OBJECT)
    [nothing] = weak_images(train, [0], "none", seed=0)
    assert nothing.objects == ()


def test_a_model_is_measured_as_it_is_served(small_sam, test):
    scores = measure(small_sam, test, [0], seed=0)
    assert set(scores) == {"box", "point", "5+5 points"}
    predictor = Predictor(small_sam, policy=default_policy(64), precision="auto")
    image = test.scene(0).image
    [answer] = answer_prompts(
        predictor,
        [box_prompt(tight_box(OBJECT))],
        image_hw=(48, 72),
        embed=lambda crop: predictor.embed(image, crop=crop),
        crops=default_crops(64),
    )
    wanted = (iou(answer.mask, OBJECT), boundary_iou(answer.mask, OBJECT))
    assert scores["box"] == [pytest.approx(wanted)]


def test_rows_hold_what_each_variant_reaches(small_sam, train, test):
    rows = evaluate_adaptation(
        small_sam,
        train,
        test,
        config(),
        dataset="set",
        split="test",
        supervision="box",
        variants=("direct", "adapted"),
        seeds=(3, 4),
    )
    table = {(row.variant, row.seed, row.prompt): row for row in rows}
    assert len(table) == len(rows) == 2 * 2 * 3
    direct = measure(small_sam, test, [0], seed=3)
    labels = weak_images(train, [0, 1], "box", seed=3)
    adapted = adapt(small_sam, labels, config(seed=3, prompts="box"))
    after = measure(merge_lora(adapted), test, [0], seed=3)
    for prompt in direct:
        for variant, scores in (("direct", direct), ("adapted", after)):
            row = table[variant, 3, prompt]
            assert (row.miou, row.mbiou) == pytest.approx(scores[prompt][0], abs=1e-4)
            assert (row.dataset, row.split, row.supervision) == ("set", "test", "box")
            assert row.objects == 1


@pytest.mark.parametrize("supervision", ["box", "point", "coarse", "none"])
def test_every_variant_changes_what_its_name_says(monkeypatch, train, test, supervision):
    seen = {}

    def remember(sam, images, settings, *, stable_sam):
        seen[len(seen)] = (images, settings)
        return sam

    monkeypatch.setattr(adaptation, "adapt", remember)
    monkeypatch.setattr(adaptation, "merge_lora", lambda sam: sam)
    monkeypatch.setattr(adaptation, "measure", lambda *_, **__: {"box": [(0.5, 0.5)]})
    full = config()
    evaluate_adaptation(
        torch.nn.Module(),
        train,
        test,
        full,
        dataset="set",
        split="test",
        supervision=supervision,
        variants=tuple(VARIANTS),
    )
    changed = [
        {key for key, value in asdict(one).items() if value != asdict(full)[key]} - {"prompts"}
        for _, one in seen.values()
    ]
    assert changed == [
        set(),
        {"targets"},
        {"focal_weight", "dice_weight", "iou_weight"},
        {"anchor_weight"},
        {"contrastive_weight"},
        {"projection_weight"},
        {"correct_pseudo_masks"},
        {"loose_prompts"},
        {"box_of_points"},
        {
            *("focal_weight", "contrastive_weight", "strong_chance"),
            *("projection_weight", "correct_pseudo_masks", "loose_prompts", "box_of_points"),
        },
    ]
    for images, settings in seen.values():
        has_mask = [one.mask is not None for image in images for one in image.objects]
        if settings.targets == "masks":
            assert has_mask == [True, True]
            assert settings.prompts == ("point" if supervision == "point" else "box")
        else:
            assert settings.prompts == supervision
            assert has_mask == {"coarse": [True, True], "none": []}.get(supervision, [False] * 2)


def test_unknown_variants_are_refused(small_sam, train, test):
    with pytest.raises(ConfigError, match=r"among direct, adapted, .*, got 'magic'"):
        evaluate_adaptation(
            small_sam,
            train,
            test,
            config(),
            dataset="set",
            split="test",
            supervision="box",
            variants=("magic",),
        )


def test_the_command_prints_writes_and_draws_the_table(small_sam, root, tmp_path, capsys):
    checkpoint, out, plot = (tmp_path / name for name in ("s.safetensors", "r.json", "p.png"))
    save_checkpoint(small_sam, checkpoint, dtype=torch.float32)
    command = f"adaptation --train {root} --test {root} --model {checkpoint} --device cpu"
    command += " --supervision point --variants direct,supervised --seeds 1 --steps 1 --limit 1"
    main([*command.split(), "--train-limit", "1", "--json", str(out), "--plot", str(plot)])
    rows = json.loads(out.read_text())
    assert [(row["variant"], row["prompt"]) for row in rows] == [
        (variant, prompt)
        for variant in ("direct", "supervised")
        for prompt in ("box", "point", "5+5 points")
    ]
    expected = measure(
        load_sam(str(checkpoint), weights_dir=tmp_path),
        CocoFolder(root, splits=("test",)),
        [0],
        seed=1,
    )
    assert rows[0]["miou"] == pytest.approx(expected["box"][0][0], abs=1e-4)
    height, width, _ = cv2.imread(str(plot)).shape
    assert width > 300
    assert height > 300
    printed = capsys.readouterr()
    assert "supervised" in printed.out
    assert "set point, supervised, seed 1: box" in printed.err
