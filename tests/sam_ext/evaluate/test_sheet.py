import cv2
import numpy as np
import pytest

from sam_ext.checkpoints import load_sam, save_checkpoint
from sam_ext.evaluate.__main__ import main
from sam_ext.evaluate.common import box_prompt, points_prompt, served_predictor
from sam_ext.evaluate.sheet import _painted, draw_sheet
from sam_ext.metrics import tight_box
from sam_ext.training.data import CocoFolder
from tests.sam_ext.evaluate.folders import OBJECT, write_folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "set", [OBJECT, ~OBJECT, OBJECT], ["test", "test", "train"])


def test_each_image_is_drawn_and_measured_by_box_and_by_click(small_sam, folder, tmp_path):
    predictor = served_predictor(small_sam, None)
    opened = CocoFolder(folder, splits=("test",))
    rows = draw_sheet(predictor, opened, (0, 1), tmp_path / "sheet.png")
    assert [(row.image, row.prompt, row.objects) for row in rows] == [
        (name, prompt, 1) for name in ("0.png", "1.png") for prompt in ("tight box", "center point")
    ]
    [one] = draw_sheet(predictor, opened, (1,), tmp_path / "other.png")[:1]
    assert one == rows[2]
    both, single = (cv2.imread(str(tmp_path / name)) for name in ("sheet.png", "other.png"))
    assert both.shape[0] > 1.5 * single.shape[0]


def test_masks_are_painted_in_colours_of_their_own_and_prompts_in_white():
    image = np.full((48, 72, 3), 100, np.uint8)
    x0, y0, x1, _ = tight_box(OBJECT)
    painted = _painted(image, [OBJECT, ~OBJECT], [])
    first, second = painted[20, 20], painted[5, 60]
    assert not np.array_equal(first, second)
    assert (painted != image).any(2).all()
    prompts = [box_prompt(tight_box(OBJECT)), points_prompt(np.array([[50.0, 35.0]]))]
    drawn = _painted(image, [], prompts)
    assert (drawn[35, 50] == 255).all()
    assert (drawn[int(y0), int(x0) : int(x1)] == 255).all()
    assert (drawn[5, 60] == 100).all()


def test_the_command_draws_what_the_model_by_name_answers(small_sam, folder, tmp_path, capsys):
    checkpoint, sheet = tmp_path / "small.safetensors", tmp_path / "sheet.png"
    save_checkpoint(small_sam, checkpoint)
    main(f"sheet --data {folder} --model {checkpoint} --device cpu --sheet {sheet}".split())
    stored = load_sam(str(checkpoint), weights_dir=tmp_path)
    expected = draw_sheet(
        served_predictor(stored, None),
        CocoFolder(folder, splits=("test",)),
        (0, 1),
        tmp_path / "expected.png",
    )
    np.testing.assert_array_equal(
        cv2.imread(str(sheet)), cv2.imread(str(tmp_path / "expected.png"))
    )
    assert str(expected[0].miou) in capsys.readouterr().out
