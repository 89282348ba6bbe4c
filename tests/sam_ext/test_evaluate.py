import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sam_ext.checkpoints import save_checkpoint
from sam_ext.evaluate import center_point, evaluate_prompts, main, tight_box
from sam_ext.metrics import boundary_iou, iou, rectangle_mask
from sam_ext.predictor import ObjectPrompt, Predictor
from sam_ext.training.data import CocoFolder

OBJECT = np.zeros((48, 72), bool)
OBJECT[8:40, 10:30] = True
OBJECT[30:40, 30:60] = True  # an L: its box is not its mask


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "set"
    (root / "images").mkdir(parents=True)
    image = np.where(OBJECT[..., None], 220, 40).astype(np.uint8).repeat(3, axis=2)
    annotations, images = [], []
    encoded = coco_mask.encode(np.asfortranarray(OBJECT.astype(np.uint8)))
    rle = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    for number, split in enumerate(("test", "test", "val")):
        name = f"{number}.png"
        cv2.imwrite(str(root / "images" / name), image)
        images.append({"id": number, "file_name": name, "height": 48, "width": 72, "split": split})
        annotations.append({"image_id": number, "segmentation": rle, "primary": number})
    content = {"images": images, "annotations": annotations}
    (root / "annotations.json").write_text(json.dumps(content))
    return root


def test_the_tight_box_is_in_pixel_edges():
    assert tight_box(OBJECT).tolist() == [10, 8, 60, 40]


def test_the_centre_lies_farthest_from_the_outline_and_the_image_border():
    x, y = center_point(OBJECT)
    assert OBJECT[int(y), int(x)]
    assert 18 <= x <= 21
    assert 17 <= y <= 31
    full = np.ones((21, 31), bool)
    assert center_point(full)[1] == 10


def test_rows_hold_the_means_of_what_the_predictor_answers(small_sam, folder):
    predictor = Predictor(small_sam)
    rows = evaluate_prompts(
        predictor, CocoFolder(folder, splits=("test",)), dataset="set", split="test", variant="s"
    )
    table = {(row.variant, row.prompt): row for row in rows}
    assert set(table) == {
        ("rectangle", "box"),
        ("ellipse", "box"),
        ("s", "box"),
        ("s", "point"),
        ("s", "point oracle"),
    }
    box = tight_box(OBJECT)
    rectangle = rectangle_mask(box, (48, 72))
    assert table["rectangle", "box"].miou == pytest.approx(iou(rectangle, OBJECT), abs=1e-4)
    assert table["rectangle", "box"].iou_error is None
    embedding = predictor.embed(CocoFolder(folder, splits=("test",)).scene(0).image)
    prompt = ObjectPrompt(
        point_coords=np.zeros((0, 2)), point_labels=np.zeros(0, int), box_xyxy=box
    )
    [answer] = predictor.decode(embedding, [prompt])
    row = table["s", "box"]
    assert (row.objects, row.dataset, row.split) == (2, "set", "test")
    assert row.miou == pytest.approx(iou(answer.masks[0], OBJECT), abs=1e-4)
    assert row.mbiou == pytest.approx(boundary_iou(answer.masks[0], OBJECT), abs=1e-4)
    error = abs(float(answer.iou_predictions[0]) - iou(answer.masks[0], OBJECT))
    assert row.iou_error == pytest.approx(error, abs=1e-4)
    assert table["s", "point oracle"].miou >= table["s", "point"].miou


def test_the_command_measures_a_checkpoint_and_writes_its_rows(small_sam, folder, tmp_path, capsys):
    checkpoint, out = tmp_path / "small.safetensors", tmp_path / "rows.json"
    save_checkpoint(small_sam, checkpoint)
    command = f"prompts --data {folder} --model {checkpoint} --split test --limit 1 --primary"
    main([*command.split(), "--device", "cpu", "--json", str(out)])
    rows = json.loads(out.read_text())
    assert {row["prompt"] for row in rows} == {"box", "point", "point oracle"}
    assert {row["objects"] for row in rows} == {1}
    assert "rectangle" in capsys.readouterr().out
