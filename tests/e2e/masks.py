"""From full masks to predictions without any prompt, through Label Studio's own API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import requests
from label_studio_sdk.converter.brush import mask2rle
from numpy.typing import NDArray

from ml_backend.connect import connect
from ml_backend.label_studio import project_name
from tests.e2e.support import Demo, union_of

Masks = Sequence[NDArray[np.bool_]]
_JOB_TIMEOUT_S = 1800
_POLL_S = 1.0
_FILES_AT_ONCE = 50  # of which Label Studio takes 100 in a request
_TASKS_AT_ONCE = 20  # Label Studio waits 100 s for all tasks of one request


def label_config(label: str, *tags: str) -> str:
    """A labelling config with one label for the tags, and a smart rectangle."""
    one = f'<Label value="{label}"/>'
    outputs = "".join(
        f'<{tag} name="{tag.lower()}" toName="image" smart="false">{one}</{tag}>' for tag in tags
    )
    return f"""<View>
      <Image name="image" value="$image"/>
      {outputs}
      <RectangleLabels name="box" toName="image" smart="true" smartOnly="true">
        {one}
      </RectangleLabels>
    </View>"""


def brush(mask: NDArray[np.bool_], label: str) -> dict[str, Any]:
    """A painted region, encoded by Label Studio's own SDK."""
    value = {"format": "rle", "rle": mask2rle(mask.astype(np.uint8) * 255)}
    return _region(mask, "brushlabels", label, value)


def polygon(mask: NDArray[np.bool_], label: str) -> dict[str, Any]:
    """An outlined region: the largest piece's outline, without its holes."""
    outlines, _ = cv2.findContours(
        mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
    )
    ring = max(outlines, key=len)[:, 0] + 0.5  # [T, 2], through the pixels' middles
    height, width = mask.shape
    points = (ring / (width, height) * 100).tolist()
    return _region(mask, "polygonlabels", label, {"points": points, "closed": True})


def _region(
    mask: NDArray[np.bool_], kind: str, label: str, value: dict[str, Any]
) -> dict[str, Any]:
    height, width = mask.shape
    return {
        "id": uuid.uuid4().hex[:10],
        "type": kind,
        "from_name": kind,
        "to_name": "image",
        "origin": "manual",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "value": value | {kind: [label]},
    }


@dataclass
class MaskProject:
    """A project of one label in the running demo, connected to a backend."""

    demo: Demo
    backend_url: str
    id: int
    name: str
    """As the backend calls it: `1.1795194739`."""
    backend_id: int
    tasks: dict[str, int]
    """Task ids by the images' names."""

    @classmethod
    def create(
        cls,
        demo: Demo,
        title: str,
        config: str,
        images: Sequence[Path],
        *,
        method: str,
        backend_url: str,
    ) -> MaskProject:
        """Make it, upload the images, and say in the extra params how it is to be trained."""
        project = demo.client.create_project(title, config)
        for start in range(0, len(images), _FILES_AT_ONCE):
            demo.client.import_files(project["id"], images[start : start + _FILES_AT_ONCE])
        backend = connect(demo.client, project["id"], backend_url, title="SAM")
        body = {"url": backend_url, "project": project["id"]}
        body |= {"extra_params": {"train_method": method}}
        demo.api("PATCH", f"/api/ml/{backend['id']}", json=body)
        found = demo.client.list_tasks(project["id"], limit=len(images))
        tasks = {Path(task["data"]["image"]).name[9:]: task["id"] for task in found}
        return cls(
            demo=demo,
            backend_url=backend_url,
            id=project["id"],
            name=project_name(project),
            backend_id=backend["id"],
            tasks=tasks,
        )

    @property
    def model_version(self) -> str:
        """The version that Label Studio shows: what /setup answered."""
        (backend,) = self.demo.client.list_backends(self.id)
        return str(backend["model_version"])

    def annotate(self, name: str, regions: list[dict[str, Any]]) -> None:
        """Submit what an annotator drew."""
        body = {"result": regions, "was_cancelled": False}
        self.demo.api("POST", f"/api/tasks/{self.tasks[name]}/annotations/", json=body)

    def train(self) -> dict[str, Any]:
        """Ask for a training as the button does, and wait for its end; returns the job."""
        self.demo.api("POST", f"/api/ml/{self.backend_id}/train", json={})
        asked = {"project": self.name}
        answer = requests.get(f"{self.backend_url}/is_training", params=asked, timeout=60)
        job = answer.json()["job"]
        assert job is not None, "no job was queued"
        give_up = time.monotonic() + _JOB_TIMEOUT_S
        while time.monotonic() < give_up:
            status: dict[str, Any] = requests.post(
                f"{self.backend_url}/job_status", json={"job": job}, timeout=60
            ).json()
            if status["finished_at"] is not None:
                return status
            time.sleep(_POLL_S)
        raise AssertionError(f"job {job} took more than {_JOB_TIMEOUT_S} s")

    def retrieve(self, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """Press "Retrieve Predictions" for some tasks; returns what each has then."""
        action = f"/api/dm/actions?id=retrieve_tasks_predictions&project={self.id}"
        for start in range(0, len(names), _TASKS_AT_ONCE):
            chosen = [self.tasks[name] for name in names[start : start + _TASKS_AT_ONCE]]
            selected = {"selectedItems": {"all": False, "included": chosen}}
            self.demo.api("POST", action, json=selected)
        # Asking for a task would have it predicted, too.
        return {
            name: self.demo.api("GET", f"/api/predictions/?task={self.tasks[name]}")
            for name in names
        }


def union_iou(regions: list[dict[str, Any]], truth: Masks) -> float:
    """How well all regions of an image together fit all of its objects together."""
    wanted = np.any(list(truth), axis=0)
    got = union_of(regions) if regions else np.zeros_like(wanted)
    return float((got & wanted).sum() / (got | wanted).sum())
