import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from sam_ext.checkpoints import find_stable_sam, load_sam, save_checkpoint
from sam_ext.errors import ConfigError
from sam_ext.predictor import Predictor
from sam_ext.sam import weights_fingerprint
from sam_ext.stable_sam import load_stable_sam
from sam_ext.training import __main__ as command
from sam_ext.training.data import CocoFolder, SyntheticSource
from sam_ext.training.recipes import TINY, TINY_MIX, Recipe, open_sources
from sam_ext.training.robust import train_stable
from tests.conftest import SMALL, build_small_sam

NOT_TO_BE_SHIPPED = {"bsds500", "coco200_panoptic", "wbc", "mt_defect", "cwfid", "carrot_weed_hr"}
DOMAIN_SHIFT = {"dsb2018_nuclei"}


@pytest.fixture
def data(tmp_path):
    """One set with an image of a bright square in each split."""
    root = tmp_path / "squares"
    (root / "images").mkdir(parents=True)
    square = np.full((64, 64, 3), 40, np.uint8)
    square[16:48, 16:48] = 220
    images, annotations = [], []
    for number, split in enumerate(("train", "val")):
        cv2.imwrite(str(root / "images" / f"{split}.png"), square)
        images.append({"id": number, "file_name": f"{split}.png", "height": 64, "width": 64})
        images[-1]["split"] = split
        corners = [16, 16, 48, 16, 48, 48, 16, 48]
        annotations.append({"image_id": number, "segmentation": [corners]})
    content = {"images": images, "annotations": annotations}
    (root / "annotations.json").write_text(json.dumps(content))
    return tmp_path


def test_the_bundled_weights_see_only_sets_that_may_be_shipped():
    assert not (NOT_TO_BE_SHIPPED | DOMAIN_SHIFT) & set(TINY_MIX)
    assert not (NOT_TO_BE_SHIPPED | DOMAIN_SHIFT) & set(TINY.held_out)


def test_a_mix_opens_its_folders_and_generates_the_rest(data):
    sources = open_sources(data, {"squares": 2.0, "synthetic": 0.5}, splits=("train",), seed=3)
    (folder, heavy), (synthetic, light) = sources
    assert isinstance(folder, CocoFolder)
    assert [folder.file(i).name for i in range(len(folder))] == ["train.png"]
    assert isinstance(synthetic, SyntheticSource)
    assert (heavy, light, synthetic.seed) == (2.0, 0.5, 3)
    assert synthetic.photographs.sources == [(folder, 2.0)]


def test_a_set_that_is_not_there_is_named(data):
    with pytest.raises(ConfigError, match="must hold the folder rounds"):
        open_sources(data, {"rounds": 1.0}, splits=("train",), seed=0)


def test_the_command_trains_and_writes_a_checkpoint_that_loads(data, tmp_path, monkeypatch):
    recipe = Recipe(
        model="small", mix={"squares": 1.0}, held_out={"squares": 1.0}, config=TINY.config
    )
    monkeypatch.setattr(command, "TINY", recipe)
    monkeypatch.setattr(command, "MODELS", {"small": SMALL})
    out = tmp_path / "run"
    arguments = ["x", "--data", str(data), "--out", str(out), "--workers", "0", "--warmup", "0"]
    arguments += ["--stage", "64:1:2:0", "--stage", "64:1:1:1", "--optimizer", "adamw"]
    monkeypatch.setattr(sys, "argv", arguments)
    command.main()
    curve = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    assert curve[-1]["step"] == 3
    assert "held_out_box_iou" in curve[-1]
    sam = load_sam(str(out / "small.safetensors"), weights_dir=tmp_path)
    assert Predictor(sam).image_size == 64

    again = tmp_path / "again"
    still = ["--stage", "64:1:0:0", "--workers", "0", "--init", str(out / "small.safetensors")]
    monkeypatch.setattr(sys, "argv", ["x", "--data", str(data), "--out", str(again), *still])
    command.main()
    same = load_sam(str(again / "small.safetensors"), weights_dir=tmp_path)
    assert Predictor(same).fingerprint == Predictor(sam).fingerprint


def test_the_command_trains_a_plugin_that_lies_beside_its_model(
    data, small_sam, tmp_path, monkeypatch
):
    recipe = Recipe(model="small", mix={"squares": 1.0}, held_out={}, config=TINY.config)
    monkeypatch.setattr(command, "TINY", recipe)
    weights = tmp_path / "run" / "my.weights.safetensors"
    save_checkpoint(small_sam, weights)
    seen = []
    monkeypatch.setattr(
        command, "train_stable", lambda *a, **o: seen.append(a[3]) or train_stable(*a, **o)
    )
    arguments = ["x", "stable", "--data", str(data), "--out", str(weights.parent), "--workers", "0"]
    arguments += ["--init", str(weights), "--steps", "2", "--size", "64+32"]
    monkeypatch.setattr(sys, "argv", arguments)
    command.main()
    assert seen[0].stage.sizes == (64, 32)
    path = find_stable_sam(str(weights), weights_dir=tmp_path)
    assert path == weights.parent / "my.weights.stable.safetensors"
    stored = load_sam(str(weights), weights_dir=tmp_path)
    plugin = load_stable_sam(path, base=weights_fingerprint(stored))
    assert not torch.equal(plugin.transform.weight, torch.eye(256))
    monkeypatch.setattr(sys, "argv", [*arguments[:-2], "--no-routing"])
    command.main()
    assert seen[1].stage.sizes == (64,)
    assert load_stable_sam(path, base=weights_fingerprint(stored)).router is None


def test_the_command_averages_checkpoints(tmp_path, monkeypatch, capsys):
    sams = [build_small_sam(seed) for seed in (0, 1, 2)]
    files = [str(tmp_path / f"{number}.safetensors") for number in range(3)]
    for sam, file in zip(sams, files, strict=True):
        save_checkpoint(sam, Path(file), dtype=torch.float32)
    arguments = ["x", "average", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--of", *files])
    command.main()
    averaged = load_sam(str(tmp_path / "out" / "tiny.safetensors"), weights_dir=tmp_path)
    states = [sam.state_dict() for sam in sams]
    for name, value in averaged.state_dict().items():
        wanted = sum(state[name] for state in states) / 3
        torch.testing.assert_close(value, wanted, atol=1e-3, rtol=1e-3)  # in half precision
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        command.main()
    assert "--of is required for average" in capsys.readouterr().err
