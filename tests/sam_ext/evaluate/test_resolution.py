import json
from dataclasses import asdict

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from sam_ext.ba_sam import BaSamConfig
from sam_ext.checkpoints import load_sam, save_checkpoint
from sam_ext.evaluate import resolution
from sam_ext.evaluate.__main__ import main
from sam_ext.evaluate.resolution import ba_sam_variants, evaluate_resolution
from sam_ext.image_encoder import encode_image
from sam_ext.metrics import boundary_iou, iou, tight_box
from sam_ext.predictor import Embedding, ObjectPrompt, Predictor
from sam_ext.training.data import CocoFolder
from tests.sam_ext.evaluate.folders import OBJECT, image_of, write_folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "set", [OBJECT] * 3, ("test", "test", "val"))


BA_SAM = BaSamConfig(scaling_factor=True, bias="extrapolation", beta=50.0)


def resolution_rows(sam, folder, **changes):
    values = {
        "dataset": "set",
        "split": "test",
        "variants": ba_sam_variants("s", BA_SAM),
        "factors": (1.0, 2.0),
    }
    return evaluate_resolution(sam, CocoFolder(folder, splits=("test",)), **(values | changes))


def masks_at(sam, image, *, input_size, padded_size, ba_sam, box):
    """The mask that the encoder gives for a box at a size, resized and padded here."""
    resized = Image.fromarray(image).resize(input_size[::-1], Image.Resampling.BILINEAR)
    pixels = torch.tensor(np.asarray(resized)).permute(2, 0, 1)
    normalised = torch.zeros(1, 3, *padded_size)
    normalised[0, :, : input_size[0], : input_size[1]] = (pixels - sam.pixel_mean) / sam.pixel_std
    with torch.inference_mode():
        embedding = Embedding(
            image_embeddings=encode_image(sam.image_encoder, normalised, ba_sam=ba_sam),
            original_size=image.shape[:2],
            input_size=input_size,
            padded_size=padded_size,
        )
    prompt = ObjectPrompt(
        point_coords=np.zeros((0, 2)), point_labels=np.zeros(0, int), box_xyxy=box
    )
    return Predictor(sam).decode(embedding, [prompt])[0].masks[0]


def test_an_image_is_encoded_at_each_size_without_a_square_and_by_each_variant(small_sam, tmp_path):
    wanted = OBJECT[4:]  # 44 x 72 px
    root = write_folder(tmp_path / "set", [wanted], ["test"])
    rows = resolution_rows(small_sam, root, factors=(1.5,))
    assert [row.variant for row in rows] == ["s", "s+factor", "s+bias", "s+factor+bias"]
    expected = []
    for row, ba_sam in zip(
        rows,
        (
            None,
            BaSamConfig(scaling_factor=True),
            BaSamConfig(bias="extrapolation", beta=50.0),
            BA_SAM,
        ),
        strict=True,
    ):
        mask = masks_at(
            small_sam,
            image_of(wanted),
            input_size=(59, 96),  # 64 px x 1.5, aspect kept
            padded_size=(64, 96),
            ba_sam=ba_sam,
            box=tight_box(wanted),
        )
        expected.append(round(iou(mask, wanted), 4))
        assert (row.size, row.factor, row.objects) == (96, 1.5, 1)
        assert row.miou == expected[-1]
        assert row.mbiou == pytest.approx(boundary_iou(mask, wanted), abs=1e-4)
        assert row.encode_ms > 0
    assert len(set(expected)) == 4  # or the row of one variant might be another one's


def test_at_the_training_size_every_variant_of_a_square_image_is_plain_sam(small_sam, tmp_path):
    square = OBJECT[:, 8:56]
    rows = resolution_rows(small_sam, write_folder(tmp_path / "set", [square], ["test"]))
    by_factor = {
        factor: [(row.miou, row.mbiou) for row in rows if row.factor == factor]
        for factor in (1.0, 2.0)
    }
    assert len(by_factor[1.0]) == 4
    assert len(set(by_factor[1.0])) == 1
    assert len(set(by_factor[2.0])) > 1


def test_a_seed_draws_the_images_that_a_limit_leaves(small_sam, tmp_path):
    masks = [np.roll(OBJECT, (shift % 3 - 1, shift), (0, 1)) for shift in range(-6, 6, 2)]
    root = write_folder(tmp_path / "set", masks, ["test"] * 6)
    options = {"variants": {"s": None}, "factors": (1.0,)}

    def means(**changes):
        [row] = resolution_rows(small_sam, root, **(options | changes))
        return row.objects, row.miou, row.mbiou

    first = write_folder(tmp_path / "first", masks[:3], ["test"] * 3)
    [row] = resolution_rows(small_sam, first, **options)
    assert means(limit=3) == (3, row.miou, row.mbiou)
    assert len({means(limit=3, seed=seed) for seed in (0, 1, 1)}) == 2
    assert means(limit=99, seed=2) == means()


def test_the_resolution_command_writes_its_rows_and_draws_them(small_sam, folder, tmp_path, capsys):
    checkpoint, out, plot = (
        tmp_path / name for name in ("small.safetensors", "rows.json", "p.png")
    )
    save_checkpoint(small_sam, checkpoint)
    command = f"resolution --data {folder} --model {checkpoint} --sizes 1,1.5 --bias full --beta 9"
    command += " --device cpu --precision fp32"
    main([*command.split(), "--json", str(out), "--plot", str(plot)])
    rows = json.loads(out.read_text())
    expected = resolution_rows(
        load_sam(str(checkpoint), weights_dir=tmp_path),
        folder,
        variants=ba_sam_variants("small", BaSamConfig(bias="full", beta=9.0)),
        factors=(1.0, 1.5),
    )
    for row, wanted in zip(rows, expected, strict=True):
        assert row | {"encode_ms": 0} == asdict(wanted) | {"encode_ms": 0}
    assert len({row["miou"] for row in rows}) > 4
    height, width, _ = cv2.imread(str(plot)).shape
    assert width > height > 100
    assert "small+factor+bias" in capsys.readouterr().out


def test_rows_in_a_file_are_not_measured_again(small_sam, folder, tmp_path, monkeypatch):
    checkpoint, kept, table = (tmp_path / name for name in ("s.safetensors", "r.jsonl", "t.md"))
    save_checkpoint(small_sam, checkpoint)
    measured = []

    def counting(*arguments, **options):
        measured.append((*options["factors"], *options["variants"]))
        return evaluate_resolution(*arguments, **options)

    monkeypatch.setattr(resolution, "evaluate_resolution", counting)
    command = f"resolution --data {folder} --model {checkpoint} --device cpu --rows {kept}"
    main([*command.split(), "--sizes", "1"])
    assert len(measured) == len(set(measured)) == 4
    main([*command.split(), "--sizes", "1,2", "--markdown", str(table)])
    assert {factor for factor, _ in measured[4:]} == {2.0}
    assert len(measured) == 8
    for changed in ("--limit 1", "--beta 5", "--precision fp32"):
        before = len(measured)
        main([*command.split(), "--sizes", "1", *changed.split()])
        assert len(measured) > before, changed
    lines = table.read_text().splitlines()
    assert lines[0].startswith("| dataset | split | variant | size | factor |")
    assert len(lines) == 2 + 8


@pytest.mark.parametrize("sizes", ["1,two", "0,1", ""])
def test_sizes_that_are_none_are_refused(sizes, capsys):
    with pytest.raises(SystemExit):
        main(["resolution", "--data", ".", "--sizes", sizes])
    assert "--sizes" in capsys.readouterr().err
