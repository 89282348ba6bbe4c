import json
from dataclasses import asdict

import cv2
import numpy as np
import pytest
import torch

from sam_ext.checkpoints import load_sam, save_checkpoint
from sam_ext.errors import ConfigError
from sam_ext.evaluate import prompts
from sam_ext.evaluate.__main__ import main
from sam_ext.evaluate.common import box_prompt, center_point, points_prompt
from sam_ext.evaluate.prompts import PROMPTS, ContactSheet, Variant, evaluate_prompts
from sam_ext.interactive import CropPolicy, answer_prompts
from sam_ext.metrics import boundary_iou, ellipse_in_box, iou, rectangle_mask, stability, tight_box
from sam_ext.predictor import Predictor
from sam_ext.sam import weights_fingerprint
from sam_ext.stable_sam import StableSam, save_stable_sam
from sam_ext.training.data import CocoFolder
from sam_ext.training.robust import noisy_boxes
from tests.sam_ext.evaluate.folders import OBJECT, image_of, write_folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "set", [OBJECT] * 3, ("test", "test", "val"))


def rows_of(variants, folder, **options):
    rows = evaluate_prompts(
        variants, CocoFolder(folder, splits=("test",)), dataset="set", split="test", **options
    )
    return {(row.variant, row.prompt): row for row in rows}


def moved_plugin(seed=0, **options):
    """A plugin whose answers are not SAM's."""
    torch.manual_seed(seed)
    plugin = StableSam(**options)
    for parameter in plugin.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return plugin.eval()


def test_rows_hold_the_means_of_what_the_predictor_answers(small_sam, folder):
    predictor = Predictor(small_sam)
    table = rows_of({"s": Variant(predictor=predictor)}, folder)
    boxes = [kind for kind in PROMPTS if "box" in kind]
    assert set(table) == {
        *(("s", kind) for kind in PROMPTS),
        ("s", "center point, best candidate"),
        *(("rectangle", kind) for kind in boxes),
        ("ellipse", "tight box"),
    }
    box = tight_box(OBJECT)
    baselines = {
        "rectangle": rectangle_mask(box, (48, 72)),
        "ellipse": ellipse_in_box(box, (48, 72)),
    }
    for name, mask in baselines.items():
        row = table[name, "tight box"]
        assert row.miou == pytest.approx(iou(mask, OBJECT), abs=1e-4)
        assert (row.iou_error, row.calibration_error) == (None, None)
        assert (row.routing, row.stability) == (None, None)
    embedding = predictor.embed(image_of(OBJECT))
    [answer] = predictor.decode(embedding, [box_prompt(box)])
    row = table["s", "tight box"]
    assert (row.objects, row.dataset, row.split) == (2, "set", "test")
    assert row.miou == pytest.approx(iou(answer.masks[0], OBJECT), abs=1e-4)
    assert row.mbiou == pytest.approx(boundary_iou(answer.masks[0], OBJECT), abs=1e-4)
    error = abs(float(answer.iou_predictions[0]) - iou(answer.masks[0], OBJECT))
    assert row.iou_error == pytest.approx(error, abs=1e-4)
    assert row.calibration_error == pytest.approx(error, abs=1e-4)
    [three] = predictor.decode(embedding, [points_prompt(center_point(OBJECT)[None])])
    reached = [iou(mask, OBJECT) for mask in three.masks]
    assert table["s", "center point, best candidate"].miou == pytest.approx(max(reached), abs=1e-4)
    chosen = reached[int(three.iou_predictions.argmax())]
    assert table["s", "center point"].miou == pytest.approx(chosen, abs=1e-4)


def test_a_noisy_box_is_drawn_anew_each_time_and_its_answers_are_held_against_each_other(
    small_sam, tmp_path
):
    root = write_folder(tmp_path / "one", [OBJECT], ("test",))
    predictor = Predictor(small_sam)
    table = rows_of({"s": Variant(predictor=predictor)}, root, draws=2)
    embedding = predictor.embed(image_of(OBJECT))
    masks, rectangles = [], []
    for draw in range(2):
        [drawn] = noisy_boxes(
            torch.from_numpy(tight_box(OBJECT)[None]),
            image_hw=(48, 72),
            scale=0.4,
            generator=torch.Generator().manual_seed(draw),
        ).numpy()
        rectangles.append(rectangle_mask(drawn, (48, 72)))
        masks.append(predictor.decode(embedding, [box_prompt(drawn)])[0].masks[0])
    row = table["s", "box, noise 0.4"]
    assert row.objects == 1
    assert row.miou == pytest.approx(np.mean([iou(m, OBJECT) for m in masks]), abs=1e-4)
    assert row.stability == pytest.approx(stability(masks), abs=1e-4)
    assert row.stability < 1
    rectangle = table["rectangle", "box, noise 0.4"]
    assert rectangle.miou == pytest.approx(np.mean([iou(m, OBJECT) for m in rectangles]), abs=1e-4)


@pytest.mark.parametrize(("kind", "count"), [("1 point", 1), ("3 points", 3), ("5 points", 5)])
def test_points_lie_on_the_object(small_sam, tmp_path, kind, count):
    class Watching(Predictor):
        seen = []  # noqa: RUF012

        def decode(self, embedding, prompts, **options):
            self.seen.extend(prompts)
            return super().decode(embedding, prompts, **options)

    root = write_folder(tmp_path / "one", [OBJECT], ("test",))
    predictor = Watching(small_sam)
    rows_of({"s": Variant(predictor=predictor)}, root, prompts=[kind], draws=4)
    drawn = {prompt.point_coords.tobytes(): prompt.point_coords for prompt in predictor.seen}
    predictor.seen.clear()
    assert len(drawn) == 4
    for points in drawn.values():
        assert points.shape == (count, 2)
        assert all(OBJECT[int(y), int(x)] for x, y in points)


def test_a_plugin_gets_the_same_embeddings_and_prompts_and_says_how_it_routed(small_sam, folder):
    class Counting(Predictor):
        embedded = 0

        def embed(self, image, **options):
            Counting.embedded += 1
            return super().embed(image, **options)

    plain = Counting(small_sam)
    routed = Counting(small_sam, stable_sam=moved_plugin())
    shifted = Counting(small_sam, stable_sam=moved_plugin(is_routed=False))
    variants = {"s": plain, "s+dsp": shifted, "s+dsp+drp": routed}
    table = rows_of({n: Variant(predictor=p) for n, p in variants.items()}, folder)
    assert Counting.embedded == 2  # images
    assert table["s", "tight box"].routing is None
    assert table["s+dsp", "tight box"].routing == 1
    embedding = plain.embed(image_of(OBJECT))
    [answer] = routed.decode(embedding, [box_prompt(tight_box(OBJECT))])
    row = table["s+dsp+drp", "tight box"]
    assert row.routing == pytest.approx(answer.routing, abs=1e-4)
    assert row.miou == pytest.approx(iou(answer.masks[0], OBJECT), abs=1e-4)
    assert len({table[name, "tight box"].miou for name in variants}) == 3


def test_a_model_that_looks_at_crops_is_measured_as_it_answers(small_sam, tmp_path):
    small = np.zeros((60, 200), bool)
    small[20:34, 90:110] = True
    folder = write_folder(tmp_path / "wide", [small], ("test",))
    predictor = Predictor(small_sam)
    crops = CropPolicy(min_object_px=30, context=2, min_side=32)
    table = rows_of(
        {
            "s": Variant(predictor=predictor),
            "cropped": Variant(predictor=predictor, crops=crops),
        },
        folder,
        prompts=["tight box"],
    )
    [cropped] = answer_prompts(
        predictor,
        [box_prompt(tight_box(small))],
        image_hw=(60, 200),
        embed=lambda crop: predictor.embed(image_of(small), crop=crop),
        crops=crops,
    )
    assert cropped.crop is not None
    assert table["cropped", "tight box"].miou == pytest.approx(iou(cropped.mask, small), abs=1e-4)
    assert table["cropped", "tight box"].miou != table["s", "tight box"].miou


def test_what_cannot_be_measured_is_refused(small_sam, folder, tmp_path):
    variants = {"s": Variant(predictor=Predictor(small_sam))}
    with pytest.raises(ConfigError, match="got wish"):
        rows_of(variants, folder, prompts=["tight box", "wish"])
    empty = write_folder(tmp_path / "empty", [np.zeros((8, 8), bool)], ("test",))
    with pytest.raises(ConfigError, match="must have an object in its split test"):
        rows_of(variants, empty)
    with pytest.raises(ConfigError, match="got none"):
        ContactSheet("a", "b").save(tmp_path / "sheet.png")


def test_a_contact_sheet_keeps_what_gained_and_lost_most(tmp_path):
    class Answered:
        def __init__(self, mask):
            self.mask = mask

    sheet = ContactSheet("before", "after", prompts=("tight box",), cases=1)
    wanted = np.zeros((40, 40), bool)
    wanted[10:30, 10:30] = True
    halves = [wanted & (np.arange(40)[:, None] < row) for row in (12, 16, 20, 25, 30)]
    prompt = [box_prompt(tight_box(wanted))]
    image = image_of(wanted)
    for before, after in ((0, 4), (1, 2), (4, 3), (4, 0), (2, 2)):
        for name, one in (("before", halves[before]), ("after", halves[after])):
            sheet.see("tight box", name, image, prompt, [wanted], [Answered(one)])
    [gain], [loss] = sheet._gains["tight box"], sheet._losses["tight box"]
    assert gain.gain == pytest.approx(1 - 0.1)
    assert loss.gain == pytest.approx(1 - 0.1)
    _, before, after = np.split(gain.pixels, 3, axis=1)
    assert (before != after).any()
    assert (gain.pixels != loss.pixels).any()
    sheet.save(tmp_path / "sheet.png")
    drawn = cv2.imread(str(tmp_path / "sheet.png"))
    assert min(drawn.shape[:2]) > 100
    assert drawn.std() > 5


def test_the_command_measures_a_checkpoint_and_the_plugin_beside_it(
    small_sam, folder, tmp_path, capsys
):
    checkpoint, out, plot, sheet = (
        tmp_path / name for name in ("small.safetensors", "rows.json", "p.png", "s.png")
    )
    save_checkpoint(small_sam, checkpoint)
    command = f"prompts --data {folder} --model {checkpoint} --split test --limit 1 --primary"
    command += " --device cpu --draws 2 --json"
    main([*command.split(), str(out)])
    assert {row["variant"] for row in json.loads(out.read_text())} == {
        *("rectangle", "ellipse", "small", "small as served")
    }
    plugin, stored = moved_plugin(), load_sam(str(checkpoint), weights_dir=tmp_path)
    base = weights_fingerprint(stored)
    save_stable_sam(plugin, tmp_path / "small.stable.safetensors", base=base)
    main([*command.split(), str(out), "--plot", str(plot), "--sheet", str(sheet)])
    rows = json.loads(out.read_text())
    assert {row["objects"] for row in rows} == {1}
    names = {row["variant"] for row in rows if row["routing"] is not None}
    assert names == {"small+dsp+drp", "small as served"}
    expected = rows_of(
        {"small+dsp+drp": Variant(predictor=Predictor(stored, stable_sam=plugin))},
        folder,
        draws=2,
        limit=1,
    )
    for row in rows:
        if row["variant"] == "small+dsp+drp":
            assert row == asdict(expected[row["variant"], row["prompt"]])
    for path in (plot, sheet):
        assert min(cv2.imread(str(path)).shape[:2]) > 100
    assert "box, noise 0.4" in capsys.readouterr().out


def test_plugins_that_are_compared_are_told_apart(small_sam, folder, tmp_path):
    checkpoint, out = tmp_path / "s.safetensors", tmp_path / "r.json"
    save_checkpoint(small_sam, checkpoint)
    base = weights_fingerprint(load_sam(str(checkpoint), weights_dir=tmp_path))
    command = f"prompts --data {folder} --model {checkpoint} --device cpu --draws 1 --json {out}"
    for seed, name in enumerate(("one", "two")):
        save_stable_sam(moved_plugin(seed), tmp_path / f"{name}.safetensors", base=base)
        command += f" --stable-sam {tmp_path / name}.safetensors"
    main([*command.split(), "--prompts", "5 points"])
    rows = {row["variant"]: row["miou"] for row in json.loads(out.read_text())}
    one, two = (f"s+dsp+drp {tmp_path / name}.safetensors" for name in ("one", "two"))
    assert rows[one] != rows[two]


def test_a_model_that_is_served_click_upon_click_is_measured_so(
    small_sam, folder, tmp_path, monkeypatch
):
    checkpoint, out = tmp_path / "s.safetensors", tmp_path / "r.json"
    save_checkpoint(small_sam, checkpoint)
    command = f"prompts --data {folder} --model {checkpoint} --device cpu --draws 1 --json {out}"
    found = {}
    for refined in (False, True):
        monkeypatch.setattr(prompts, "default_refine", lambda side, refined=refined: refined)
        main([*command.split(), "--prompts", "tight box;5 points"])
        for row in json.loads(out.read_text()):
            found[refined, row["variant"], row["prompt"]] = row["miou"], row["iou_error"]
    assert found[True, "s as served", "5 points"] != found[False, "s as served", "5 points"]
    assert found[True, "s as served", "tight box"] == found[False, "s as served", "tight box"]
    assert found[True, "s", "5 points"] == found[False, "s", "5 points"]


def test_the_sheet_of_a_plugin_for_several_points_shows_these(small_sam, folder, tmp_path):
    checkpoint, out, sheet = (tmp_path / name for name in ("s.safetensors", "r.json", "s.png"))
    save_checkpoint(small_sam, checkpoint)
    stored = load_sam(str(checkpoint), weights_dir=tmp_path)
    plugin = moved_plugin(scope="points")
    save_stable_sam(plugin, tmp_path / "s.stable.safetensors", base=weights_fingerprint(stored))
    command = f"prompts --data {folder} --model {checkpoint} --device cpu --draws 1 --json {out}"
    main([*command.split(), "--sheet", str(sheet)])
    rows = {(row["variant"], row["prompt"]): row for row in json.loads(out.read_text())}
    same = {
        prompt: rows["s", prompt]["miou"] == rows["s+dsp+drp", prompt]["miou"] for prompt in PROMPTS
    }
    assert same == {prompt: prompt not in ("3 points", "5 points") for prompt in PROMPTS}
    drawn = cv2.imread(str(sheet))
    assert min(drawn.shape[:2]) > 100
    assert drawn.std() > 5


def test_rows_in_a_file_are_not_measured_again(small_sam, folder, tmp_path, monkeypatch):
    checkpoint, kept, sheet = (tmp_path / name for name in ("s.safetensors", "r.jsonl", "s.png"))
    save_checkpoint(small_sam, checkpoint)
    measured = []

    def counting(*arguments, **options):
        measured.append(options["limit"])
        return evaluate_prompts(*arguments, **options)

    monkeypatch.setattr(prompts, "evaluate_prompts", counting)
    command = f"prompts --data {folder} --model {checkpoint} --device cpu --draws 1 --rows {kept}"
    table = tmp_path / "table.md"
    for limit, times in ((1, 1), (1, 1), (2, 2)):
        main([*command.split(), "--limit", str(limit), "--markdown", str(table)])
        assert len(measured) == times
    assert table.read_text().startswith("| dataset | split | variant | prompt |")
    stored = load_sam(str(checkpoint), weights_dir=tmp_path)
    plugin = tmp_path / "s.stable.safetensors"
    save_stable_sam(moved_plugin(), plugin, base=weights_fingerprint(stored))
    for _ in range(2):  # a sheet is drawn of answers, which no file of rows holds
        main([*command.split(), "--limit", "1", "--sheet", str(sheet)])
    assert measured[2:] == [1, 1]


def test_a_sheet_without_a_plugin_is_refused(small_sam, folder, tmp_path):
    checkpoint = tmp_path / "small.safetensors"
    save_checkpoint(small_sam, checkpoint)
    command = f"prompts --data {folder} --model {checkpoint} --split test --device cpu"
    with pytest.raises(ConfigError, match="--stable-sam"):
        main([*command.split(), "--sheet", str(tmp_path / "sheet.png")])
