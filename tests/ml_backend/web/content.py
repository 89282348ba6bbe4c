"""A project with versions and jobs as a training leaves them, for the page to show."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_backend.jobs import Job, JobStore
from ml_backend.registry import ProjectVersions, Version
from tests.ml_backend.backend import encoded, random_image

PROJECT = "1.1795194739"
OTHER_PROJECT = "2.1795194800"
LABELS = ("Nucleus", "Debris")


def curve(steps: int = 60, *, every: int = 1) -> list[dict[str, Any]]:
    """Losses that fall, with some noise, and an IoU that rises."""
    rows = []
    for step in range(1, steps + 1, every):
        noise = 0.03 * math.sin(step * 2.7)
        parts = {
            "focal": 0.02 * math.exp(-step / 30) + abs(noise) / 20,
            "dice": 0.2 + 0.4 * math.exp(-step / 20) + noise,
            "iou": 0.05 * math.exp(-step / 25) + 0.01,
            "anchor": 0.08 + 0.02 * math.sin(step / 9),
        }
        total = 20 * parts["focal"] + sum(parts.values())
        mean_iou = 0.85 - 0.2 * math.exp(-step / 25)
        rows.append({"step": step, "mean_iou": mean_iou, **parts, "total": total})
    return rows


def judgement(
    *, means: Mapping[str, float], promoted: bool, sentence: str, labels: tuple[str, ...] = LABELS
) -> dict[str, Any]:
    rows = [
        {
            "model": model,
            "prompt": prompt,
            "measure": "iou",
            "label": label,
            "objects": 18 if label == "all" else 9,
            "value": mean - 0.04 * index,
        }
        for model, mean in means.items()
        for index, prompt in enumerate(("tight box", "jittered box", "point"))
        for label in ("all", *labels)
    ]
    return {
        "rows": rows,
        "means": dict(means),
        "distance": 0.12,
        "promoted": promoted,
        "sentence": sentence,
    }


def add_version(
    versions: ProjectVersions,
    folder: Path,
    *,
    means: Mapping[str, float],
    promoted: bool = True,
    sentence: str = "Promoted: the candidate reached 0.871.",
    pictures: Mapping[str, bytes] | None = None,
    labels: tuple[str, ...] = LABELS,
    **manifest: Any,
) -> Version:
    """Add a version with its whole report; its adapter is no adapter."""
    if pictures is None:
        pictures = {
            f"{when}-1.jpg": encoded(random_image(seed, size_hw=(48, 64)), "JPEG")
            for seed, when in enumerate(("before", "after"))
        }
    adapter = folder / "adapter"
    adapter.write_bytes(sentence.encode())
    report = judgement(means=means, promoted=promoted, sentence=sentence, labels=labels)
    whole = {
        "model": "tiny",
        "promoted": promoted,
        "sentence": sentence,
        "learnt_from": list(range(1, 13)),
        "judged_by": [21, 22, 23, 24],
        "objects": 148,
        "left_out": ["task 7: a region's label Mitosis is not in the labelling config"],
        "pictures": {name: 20 + int(name.split("-")[1].split(".")[0]) for name in pictures},
    } | manifest
    files: dict[str, Path | bytes] = {
        "judgement.json": json.dumps(report).encode(),
        "curves.json": json.dumps(curve()).encode(),
        **pictures,
    }
    return versions.add(adapter, whole, files)


def start_job(jobs: JobStore, project: str = PROJECT, *, step: int = 40, steps: int = 200) -> Job:
    """A job in the middle of learning."""
    job = jobs.create(project, "start_training")
    jobs.start(job.id)
    report_step(jobs, job.id, step=step, steps=steps)
    return jobs.get(job.id)


def report_step(jobs: JobStore, job_id: int, *, step: int, steps: int = 200) -> None:
    seen = curve(step)
    losses = {name: value for name, value in seen[-1].items() if name != "step"}
    jobs.report(
        job_id,
        {
            "phase": "learning",
            "step": step,
            "steps": steps,
            "losses": losses,
            "eta_s": 1.7 * (steps - step),
            "curve": seen,
        },
    )
