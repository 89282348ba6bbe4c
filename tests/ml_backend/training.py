"""A project with labelled images in a small Label Studio, and small stand-ins for the methods."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ml_backend.settings import Settings
from sam_ext.checkpoints import save_checkpoint
from sam_ext.judging import Judgement, JudgementRow
from sam_ext.lora import attach_lora, lora_parameters
from sam_ext.training.finetune import FinetuneConfig
from sam_ext.training.steps import TrainingStep
from tests.conftest import build_small_sam
from tests.ml_backend.backend import encoded
from tests.ml_backend.servers import Answer, FakeLabelStudio

PROJECT = "1.1795194739"
CREATED_AT = "2026-11-20T17:12:19.284185Z"
CONFIG = """<View>
  <Image name="image" value="$image"/>
  <RectangleLabels name="box" toName="image"><Label value="Cell"/></RectangleLabels>
</View>"""
SIZE = (48, 64)  # H, W


def fill_project(server: FakeLabelStudio, tasks: int = 8) -> None:
    """Give Label Studio a project with a box drawn in each image."""
    server.projects = [{"id": 1, "created_at": CREATED_AT, "label_config": CONFIG}]
    for number in range(1, tasks + 1):
        add_task(server, number)


def add_task(server: FakeLabelStudio, number: int, **annotation: object) -> None:
    rng = np.random.default_rng(number)
    height, width = SIZE
    x, y = rng.integers(4, 24, 2)
    w, h = rng.integers(12, 22, 2)
    pixels = rng.integers(20, 60, (height, width, 3), np.uint8)
    pixels[y : y + h, x : x + w] += 150
    path = f"/data/upload/1/{number}.png"
    server.routes[path] = Answer(encoded(Image.fromarray(pixels)))
    value = {
        "x": x / width * 100,
        "y": y / height * 100,
        "width": w / width * 100,
        "height": h / height * 100,
        "rotation": 0,
        "rectanglelabels": ["Cell"],
    }
    region = {"id": f"r{number}", "type": "rectanglelabels", "from_name": "box", "to_name": "image"}
    whole = {
        "id": 100 + number,
        "was_cancelled": False,
        "ground_truth": False,
        "updated_at": CREATED_AT,
        "result": [region | {"value": value, "image_rotation": 0}],
    } | annotation
    server.tasks.append(
        {"id": number, "project": 1, "data": {"image": path}, "annotations": [whole]}
    )


def outline(server: FakeLabelStudio, *, labels: tuple[str, ...] = ("Cell",)) -> None:
    """Let each task have outlines in place of its rectangles, of one label after the other."""
    tags = "".join(f'<Label value="{label}"/>' for label in labels)
    config = CONFIG.replace('<Label value="Cell"/>', tags).replace("Rectangle", "Polygon")
    server.projects[0]["label_config"] = config
    for task in server.tasks:
        for annotation in task["annotations"]:
            for region in annotation["result"]:
                value = region["value"]
                left, top = value["x"], value["y"]
                right, bottom = left + value["width"], top + value["height"]
                points = [[left, top], [right, top], [right, bottom], [left, bottom]]
                label = labels[task["id"] % len(labels)]
                region["type"] = "polygonlabels"
                region["value"] = {"points": points, "polygonlabels": [label]}


def small_settings(folder: Path, server: FakeLabelStudio, **settings: object) -> Settings:
    """Settings with the small SAM of the tests, which `folder` gets."""
    model = folder / "small.safetensors"
    if not model.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(build_small_sam(), model, metadata={})
    return Settings(
        **{
            "data_dir": folder / "data",
            "sam_model": str(model),
            "label_studio_url": server.url,
            "label_studio_api_key": server.personal_access_token,
            "train_steps": 3,
        }
        | settings
    )


def fake_adapt(sam, images, config, *, run_dir, on_step, stable_sam=None):
    """Train nothing: random LoRA, with steps that are told of."""
    for image in images:
        assert image.read().shape == (*SIZE, 3)
    adapted = copy.deepcopy(sam)
    attach_lora(adapted.image_encoder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lora_parameters(adapted.image_encoder):
            parameter.normal_(std=0.1, generator=generator)
    run_dir.mkdir(exist_ok=True)
    for step in range(1, config.steps + 1):
        on_step(
            TrainingStep(
                step=step,
                steps=config.steps,
                losses={"dice": 1 / step},
                mean_iou=0.5 + 0.1 * step,
                eta_s=0.0,
            )
        )
    return adapted


def fake_finetune(sam, images, config, **options):
    """The same for full masks."""
    assert isinstance(config, FinetuneConfig)
    assert any(one.mask is not None for image in images for one in image.objects)
    return fake_adapt(sam, images, config, **options)


def judgement(*, promoted: bool) -> Judgement:
    row = JudgementRow(
        model="candidate", prompt="tight box", measure="iou", label="all", objects=2, value=0.5
    )
    sentence = "It is better." if promoted else "It is no better."
    return Judgement(
        rows=(row,), means={"candidate": 0.5}, distance=0.1, promoted=promoted, sentence=sentence
    )


def fake_judge(models, images, *, crops, margin, seed, most_objects, prompt_free, on_progress):
    for index, image in enumerate(images):
        assert image.read().shape == (*SIZE, 3)
        on_progress(index + 1, len(images))
    return judgement(promoted=True)
