import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from sam_ext.checkpoints import load_sam, save_checkpoint
from sam_ext.colours import default_colours
from sam_ext.errors import ConfigError
from sam_ext.evaluate import adaptation
from sam_ext.evaluate.__main__ import main
from sam_ext.evaluate.adaptation import (
    WESAM_VARIANTS,
    AdaptationRow,
    AnswerScore,
    evaluate_adaptation,
    measure,
    measure_without_prompts,
    plot_adaptation,
    weak_images,
)
from sam_ext.evaluate.common import box_prompt, new_figure
from sam_ext.evaluate.records import RowFile
from sam_ext.evaluate.saliency import map_scores
from sam_ext.interactive import answer_prompts, default_crops
from sam_ext.lora import merge_lora
from sam_ext.metrics import boundary_iou, iou, tight_box
from sam_ext.predictor import Predictor
from sam_ext.resolution import default_policy
from sam_ext.stable_sam import StableSam
from sam_ext.training.data import CocoFolder
from sam_ext.training.finetune import FinetuneConfig, finetune
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


def wesam(**changes):
    return WesamConfig(**({"steps": 2, "precision": "fp32"} | changes))


def finetuning(**changes):
    known = {"steps": 2, "precision": "fp32", "prompt_free_chance": 0.5}
    return FinetuneConfig(**(known | changes))


SCORE = AnswerScore(iou=0.5, boundary_iou=0.5)


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
    predictor = Predictor(
        small_sam, policy=default_policy(64), precision="auto", colours=default_colours(64)
    )
    image = test.scene(0).image
    [answer] = answer_prompts(
        predictor,
        [box_prompt(tight_box(OBJECT))],
        image_hw=(48, 72),
        embed=lambda crop: predictor.embed(image, crop=crop),
        crops=default_crops(64),
    )
    [score] = scores["box"]
    assert score.iou == pytest.approx(iou(answer.mask, OBJECT))
    assert score.boundary_iou == pytest.approx(boundary_iou(answer.mask, OBJECT))
    assert score.maps is None


def test_several_points_are_asked_click_upon_click_where_the_model_is_served_so(
    small_sam, test, monkeypatch
):
    plain = measure(small_sam, test, [0], seed=0)
    monkeypatch.setattr(adaptation, "default_refine", lambda side: side == 64)
    refined = measure(small_sam, test, [0], seed=0)
    assert refined["box"] == plain["box"]
    assert refined["5+5 points"] != plain["5+5 points"]


def rows_of(sam, train, test, **options):
    settings = {
        "wesam": wesam(),
        "finetuning": finetuning(),
        "dataset": "set",
        "split": "test",
        "supervision": "box",
    }
    return evaluate_adaptation(sam, train, test, **(settings | options))


def test_rows_hold_what_each_method_reaches(small_sam, train, test):
    methods = ("direct", "wesam", "lora", "sam-adapter")
    rows = rows_of(small_sam, train, test, methods=methods, seeds=(3,))
    table = {(row.method, row.seed, row.prompt): row for row in rows}
    asked = ("box", "point", "5+5 points")
    assert len(table) == len(rows) == 4 * 3 + 3
    boxes = weak_images(train, [0, 1], "box", seed=3)
    masks = weak_images(train, [0, 1], "masks", seed=3)
    models = {
        "direct": small_sam,
        "wesam": merge_lora(adapt(small_sam, boxes, wesam(seed=3, prompts="box"))),
        **{
            name: merge_lora(finetune(small_sam, masks, finetuning(method=name, seed=3)))
            for name in ("lora", "sam-adapter")
        },
    }
    for method, model in models.items():
        scores = measure(model, test, [0], seed=3)
        for prompt in asked:
            row, [score] = table[method, 3, prompt], scores[prompt]
            reached = (score.iou, score.boundary_iou)
            assert (row.miou, row.mbiou) == pytest.approx(reached, abs=1e-4)
            assert (row.dataset, row.split, row.objects, row.mae) == ("set", "test", 1, None)
    labels = {method: table[method, 3, "box"].labels for method in methods}
    assert labels == {"direct": None, "wesam": "box", "lora": "masks", "sam-adapter": "masks"}
    assert [table[m, 3, "box"].trained for m in methods] == [None, *methods[1:]]
    assert [table[m, 3, "box"].images for m in methods] == [0, 2, 2, 2]
    for method in ("lora", "sam-adapter"):
        [score] = measure_without_prompts(models[method], test, [0], has_mode=True)["nothing"]
        row = table[method, 3, "nothing"]
        assert (row.miou, row.s_measure) == pytest.approx(
            (score.iou, score.maps.s_measure), abs=1e-4
        )
        assert row.objects == 1
    assert ("wesam", 3, "nothing") not in table
    [score] = measure_without_prompts(small_sam, test, [0], has_mode=False)["grid"]
    assert table["direct", 3, "grid"].mae == pytest.approx(score.maps.mae, abs=1e-4)


def test_more_images_hold_the_fewer_and_nothing_is_measured_twice(
    monkeypatch, small_sam, train, test
):
    learnt = []

    def remember(sam, images, settings, *, stable_sam):
        learnt.append((settings.method, settings.seed, {image.name for image in images}))
        return sam

    monkeypatch.setattr(adaptation, "finetune", remember)
    options = {"images": (1, 2, None), "seeds": (0, 1), "methods": ("direct", "lora")}
    rows = rows_of(small_sam, train, test, **options)
    assert [(seed, len(names)) for _, seed, names in learnt] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert all(few[2] < many[2] for few, many in (learnt[:2], learnt[2:]))
    assert len(rows) == len(set(rows)) == 2 * 4 + 4 * 4


def test_auto_has_the_rows_of_what_it_chose(monkeypatch, small_sam, train, test):
    asked, trained = [], []

    def choose(**counts):
        asked.append(counts)
        return "sam-adapter", "for a reason"

    def remember(sam, images, settings, *, stable_sam):
        trained.append(settings.method)
        return sam

    monkeypatch.setattr(adaptation, "choose_method", choose)
    monkeypatch.setattr(adaptation, "finetune", remember)
    rows = rows_of(small_sam, train, test, methods=("lora", "sam-adapter", "auto"))
    assert trained == ["lora", "sam-adapter"]
    own = [row for row in rows if row.method == "sam-adapter"]
    auto = [row for row in rows if row.method == "auto"]
    assert auto == [replace(row, method="auto") for row in own]
    assert len(auto) == 4
    assert asked == [{"images": 2, "objects": 2, "masks": 2}]
    assert {row.trained for row in auto} == {"sam-adapter"}


def test_rows_in_a_file_are_not_trained_again(monkeypatch, small_sam, train, test, tmp_path):
    trained = []

    def remember(sam, images, settings, *, stable_sam):
        trained.append(settings.seed)
        if settings.seed == 7:
            raise KeyboardInterrupt
        return sam

    monkeypatch.setattr(adaptation, "choose_method", lambda **counts: ("lora", ""))
    monkeypatch.setattr(adaptation, "finetune", remember)

    def run(train=train, test=test, **options):
        file = RowFile(tmp_path / "rows.jsonl", AdaptationRow)
        return rows_of(small_sam, train, test, file=file, methods=("lora", "auto"), **options)

    moved = [np.roll(OBJECT, 3, axis=0)] * 4
    relabelled = write_folder(tmp_path / "relabelled", moved, ["train", "train", "test", "test"])
    with pytest.raises(KeyboardInterrupt):
        run(seeds=(6, 7))
    assert trained == [6, 7]
    rows = run(seeds=(6,))
    assert trained == [6, 7]
    assert {row.method for row in rows} == {"lora", "auto"}
    for changed in (
        {"limit": 5},
        {"finetuning": finetuning(learning_rate=0.5)},
        {"split": "other"},
        {"images": (1,)},
        {"test": CocoFolder(relabelled, splits=("test",))},
        {"train": CocoFolder(relabelled, splits=("train",))},
    ):
        before = len(trained)
        run(seeds=(6,), **changed)
        assert len(trained) > before, changed


def test_without_prompts_the_union_of_all_objects_is_wanted(monkeypatch, small_sam, tmp_path):
    root = write_folder(tmp_path / "more", [OBJECT, OBJECT, OBJECT & False], ["test"] * 3)
    annotations = json.loads((root / "annotations.json").read_text())
    other = np.roll(OBJECT, 8, axis=0)
    encoded = coco_mask.encode(np.asfortranarray(other.astype(np.uint8)))
    rle = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    annotations["annotations"][1] |= {"image_id": 0, "segmentation": rle}
    (root / "annotations.json").write_text(json.dumps(annotations))
    union = OBJECT | other
    found = SimpleNamespace(mask=OBJECT, probabilities=np.where(OBJECT, 0.9, 0.2))
    monkeypatch.setattr(adaptation, "answer_prompt_free", lambda predictor, embedding: found)
    folder = CocoFolder(root, splits=("test",))
    [score] = measure_without_prompts(small_sam, folder, [0, 1], has_mode=True)["nothing"]
    assert score.iou == pytest.approx(iou(OBJECT, union))
    assert score.boundary_iou == pytest.approx(boundary_iou(OBJECT, union))
    assert score.maps == map_scores(found.probabilities, union)
    things = [SimpleNamespace(mask=OBJECT), SimpleNamespace(mask=other)]
    for masks, wanted in ((things, 1.0), ([], 0.0)):
        monkeypatch.setattr(adaptation, "generate_masks", lambda *_, found=masks, **__: found)
        [score] = measure_without_prompts(small_sam, folder, [0], has_mode=False)["grid"]
        assert score.iou == wanted


@pytest.mark.parametrize("scope", ["all", "points"])
def test_a_plugin_for_several_points_is_measured_with_and_not_trained_with(
    monkeypatch, train, test, small_sam, scope
):
    plugin, trained, measured = StableSam(scope=scope).eval(), [], []

    def remember(sam, images, settings, *, stable_sam):
        trained.append(stable_sam)
        return sam

    def score(*_, stable_sam, **__):
        measured.append(stable_sam)
        return {"box": [SCORE]}

    monkeypatch.setattr(adaptation, "adapt", remember)
    monkeypatch.setattr(adaptation, "finetune", remember)
    monkeypatch.setattr(adaptation, "measure", score)
    monkeypatch.setattr(adaptation, "measure_without_prompts", lambda *_, **__: {})
    rows_of(small_sam, train, test, methods=("direct", "wesam", "lora"), stable_sam=plugin)
    assert trained == 2 * [plugin if scope == "all" else None]
    assert measured == 3 * [plugin]


@pytest.mark.parametrize("supervision", ["box", "point", "coarse", "none"])
def test_every_variant_changes_what_its_name_says(monkeypatch, train, test, small_sam, supervision):
    seen = {}

    def remember(sam, images, settings, *, stable_sam):
        seen[len(seen)] = (images, settings)
        return sam

    monkeypatch.setattr(adaptation, "adapt", remember)
    monkeypatch.setattr(adaptation, "measure", lambda *_, **__: {"box": [SCORE]})
    full = wesam()
    rows = rows_of(
        small_sam, train, test, wesam=full, supervision=supervision, methods=tuple(WESAM_VARIANTS)
    )
    assert [row.method for row in rows] == list(WESAM_VARIANTS)
    changed = [
        {key for key, value in asdict(one).items() if value != asdict(full)[key]} - {"prompts"}
        for _, one in seen.values()
    ]
    published = {
        *("focal_weight", "contrastive_weight", "strong_chance", "sharpness", "trust"),
        *("projection_weight", "pairwise_weight", "correct_pseudo_masks", "loose_prompts"),
        "box_of_points",
    }
    assert changed == [
        set(),
        {"targets"},
        {"focal_weight", "dice_weight", "iou_weight"},
        {"anchor_weight"},
        {"contrastive_weight"},
        {"projection_weight"},
        {"pairwise_weight"},
        {"trust"},
        {"sharpness"},
        {"correct_pseudo_masks"},
        {"loose_prompts"},
        {"box_of_points"},
        published,
        published | {"anchor_weight"},
    ]
    for images, settings in seen.values():
        has_mask = [one.mask is not None for image in images for one in image.objects]
        if settings.targets == "masks":
            assert has_mask == [True, True]
            assert settings.prompts == ("point" if supervision == "point" else "box")
        else:
            assert settings.prompts == supervision
            assert has_mask == {"coarse": [True, True], "none": []}.get(supervision, [False] * 2)


def test_unknown_methods_are_refused(small_sam, train, test):
    with pytest.raises(ConfigError, match=r"among direct, wesam, .*, got 'magic'"):
        rows_of(small_sam, train, test, methods=("magic",))


def row(method, prompt="box", **changes):
    known = {
        "dataset": "set",
        "split": "test",
        "method": method,
        "trained": None if method == "direct" else method,
        "labels": {"direct": None, "wesam": "box"}.get(method, "masks"),
        "images": 0 if method == "direct" else 10,
        "seed": 0,
        "prompt": prompt,
        "objects": 4,
        "miou": 0.5,
        "mbiou": 0.25,
        **dict.fromkeys(("s_measure", "e_measure", "weighted_f", "mae")),
        "train_s": 1.0,
    }
    return AdaptationRow(**(known | changes))


MAPS = {"s_measure": 0.9, "e_measure": 0.8, "weighted_f": 0.7, "mae": 0.1}


def test_the_markdown_tables_are_means_over_seeds_by_method_and_number_of_images():
    rows = [
        row("direct", miou=0.4),
        row("wesam", miou=0.5),
        row("wesam", miou=0.6, seed=1),
        row("wesam", miou=0.7, images=30),
        row("auto", miou=0.8, trained="lora", images=30),
        row("direct", "grid", miou=0.1, **MAPS),
        row("lora", "nothing", miou=0.2, **MAPS),
        row("lora", "nothing", miou=0.3, seed=1, **MAPS),
    ]
    asked, unasked = adaptation.markdown(rows).split("\n\n")
    assert asked.splitlines() == [
        "| dataset | split | prompt | images | direct | wesam (box) | auto (masks) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| set | test | box | 10 | 0.400 | 0.550 |  |",
        "| set | test | box | 30 | 0.400 | 0.700 | 0.800 lora |",
    ]
    assert unasked.splitlines() == [
        "| dataset | split | images | method | prompt "
        "| miou | s_measure | e_measure | weighted_f | mae |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| set | test | 0 | direct | grid | 0.100 | 0.900 | 0.800 | 0.700 | 0.100 |",
        "| set | test | 10 | lora (masks) | nothing | 0.250 | 0.900 | 0.800 | 0.700 | 0.100 |",
    ]


@pytest.mark.parametrize(
    "counts", [pytest.param((10, 30), id="lines"), pytest.param((10,), id="bars")]
)
def test_the_plot_has_a_panel_for_each_set_and_kind_of_prompt(monkeypatch, tmp_path, counts):
    figures = []

    def figure(width, height):
        figures.append(new_figure(width, height))
        return figures[-1]

    monkeypatch.setattr(adaptation, "new_figure", figure)
    rows = [row("direct"), row("direct", "grid", **MAPS)]
    rows += [row("lora", images=count, miou=count / 100) for count in counts]
    rows += [row("lora", "nothing", images=count, **MAPS) for count in counts]
    rows += [row("direct", dataset="other", miou=0.2), row("lora", dataset="other", miou=0.3)]
    plot_adaptation(rows, tmp_path / "p.png")
    assert cv2.imread(str(tmp_path / "p.png")).shape[1] > 300
    boxes, unasked, other, nothing = figures[0].axes
    assert [axes.get_title() for axes in figures[0].axes] == ["box", "without prompt", "", ""]
    assert [axes.get_ylabel() for axes in (boxes, other)] == ["set test\nIoU", "other test\nIoU"]
    assert [bar.get_height() for bar in other.patches] == [0.2, 0.3]
    assert not nothing.patches
    if len(counts) > 1:
        direct, lora = boxes.lines
        assert direct.get_ydata().tolist() == [0.5, 0.5]
        assert lora.get_xdata().tolist() == [10, 30]
        assert lora.get_ydata().tolist() == [0.1, 0.3]
        assert len(unasked.lines) == 2
    else:
        assert [bar.get_height() for bar in boxes.patches] == [0.5, 0.1]


def test_the_command_prints_writes_and_draws_the_table(small_sam, root, tmp_path, capsys):
    checkpoint, out, plot, kept, table = (
        tmp_path / name for name in ("s.safetensors", "r.json", "p.png", "r.jsonl", "t.md")
    )
    save_checkpoint(small_sam, checkpoint, dtype=torch.float32)
    command = f"adaptation --train {root} --test {root} --model {checkpoint} --device cpu"
    command += " --supervision point --methods direct,supervised,lora --seeds 1 --steps 1 --limit 1"
    command += f" --images 1,all --rows {kept} --markdown {table}"
    main([*command.split(), "--json", str(out), "--plot", str(plot)])
    rows = json.loads(out.read_text())
    asked = ["box", "point", "5+5 points"]
    assert [(row["method"], row["images"], row["prompt"]) for row in rows] == [
        *(("direct", 0, prompt) for prompt in (*asked, "grid")),
        *(("supervised", 1, prompt) for prompt in asked),
        *(("lora", 1, prompt) for prompt in (*asked, "nothing")),
        *(("supervised", 2, prompt) for prompt in asked),
        *(("lora", 2, prompt) for prompt in (*asked, "nothing")),
    ]
    expected = measure(
        load_sam(str(checkpoint), weights_dir=tmp_path),
        CocoFolder(root, splits=("test",)),
        [0],
        seed=1,
    )
    assert rows[0]["miou"] == pytest.approx(expected["box"][0].iou, abs=1e-4)
    height, width, _ = cv2.imread(str(plot)).shape
    assert width > 300
    assert height > 300
    assert len(kept.read_text().splitlines()) == 5
    assert "supervised (masks)" in table.read_text()
    printed = capsys.readouterr()
    assert "supervised" in printed.out
    assert "set, supervised from masks, images 1, seed 1: box" in printed.err


@pytest.mark.parametrize("given", ["--train", "--test"])
def test_both_sets_are_needed(root, given, capsys):
    missing = {"--train": "--test", "--test": "--train"}[given]
    with pytest.raises(SystemExit):
        main(["adaptation", given, str(root)])
    assert f"required: {missing}" in capsys.readouterr().err


@pytest.mark.parametrize("counts", ["0", "10,some", ""])
def test_numbers_of_images_that_are_none_are_refused(counts, capsys):
    with pytest.raises(SystemExit):
        main(["adaptation", "--images", counts])
    assert "--images" in capsys.readouterr().err
