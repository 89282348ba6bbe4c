"""The running demo, Label Studio's API, and what is clicked on the sample images."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import requests
from PIL import Image

from ml_backend.connect import ProjectClient

ROOT = Path(__file__).parents[2]
LABEL_STUDIO = ROOT / ".venv-labelstudio" / "bin" / "label-studio"
OUTPUTS = ("brush", "polygon")
MASK_TYPE = {"brush": "brushlabels", "polygon": "polygonlabels", "bitmask": "bitmasklabels"}
_READY_TIMEOUT_S = 300


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def is_listening(port: int) -> bool:
    try:
        socket.create_connection(("localhost", port), timeout=1).close()
    except OSError:
        return False
    return True


class Demo:
    """`sam-ml-backend demo` in a folder and on ports of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.backend_port = free_port(), free_port()
        self.url = f"http://localhost:{self.port}"
        self.backend_url = f"http://127.0.0.1:{self.backend_port}"
        self.said: list[str] = []
        self.ready_after_s = float("nan")

    def start(self) -> None:
        """Start it and wait for the line that says that it is ready."""
        started = time.monotonic()
        command = [sys.executable, "-m", "ml_backend.cli", "demo"]
        command += ["--label-studio", str(LABEL_STUDIO), "--folder", str(self.folder)]
        command += ["--port", str(self.port), "--backend-port", str(self.backend_port)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert self.process.stdout is not None
        give_up = threading.Timer(_READY_TIMEOUT_S, self.process.terminate)
        give_up.start()
        self.said = []
        for line in self.process.stdout:
            self.said.append(line)
            if line.startswith("Ctrl-C"):  # the last line of what is said when all is ready
                break
        give_up.cancel()
        assert "Ready.\n" in self.said, "the demo did not start:\n" + "".join(self.said)
        self.ready_after_s = time.monotonic() - started
        self.state = json.loads((self.folder / "demo.json").read_text())
        self.client = ProjectClient(self.url, self.state["token"])
        self.projects: dict[str, int] = self.state["projects"]

    def stop(self, number: int = signal.SIGINT) -> int:
        """Send the signal, as Ctrl-C does; returns the exit code."""
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=60)
        self.said.append(rest)
        return self.process.returncode

    def api(self, method: str, path: str, **options: Any) -> Any:
        """Ask Label Studio's API with the demo's personal access token."""
        headers = {"Authorization": self.client.authorization(self.url) or ""}
        headers |= options.pop("headers", {})
        answer = requests.request(method, self.url + path, headers=headers, timeout=120, **options)
        assert answer.ok, f"{method} {path}: {answer.status_code} {answer.text[:500]}"
        return answer.json() if answer.content else None

    def tasks(self, project_id: int, *, after: int = 0) -> dict[str, dict[str, Any]]:
        """The project's tasks with an id above `after`, by the sample image's name."""
        found = self.api("GET", f"/api/tasks?project={project_id}&page_size=100")["tasks"]
        found = [task for task in found if task["id"] > after]
        # Label Studio puts eight characters and a dash before the name.
        return {Path(task["data"]["image"]).name[9:]: task for task in found}

    def ask(
        self, project_id: int, task: dict[str, Any], drawn: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Send prompts as the page does; returns the regions that are suggested."""
        (backend,) = self.client.list_backends(project_id)
        return ask(self, backend["id"], task["id"], drawn)["result"]


def ask(demo: Demo, backend_id: int, task_id: int, drawn: list[dict[str, Any]]) -> dict[str, Any]:
    """One interactive request to one backend; fails if Label Studio reports an error."""
    body = {"task": task_id, "context": {"result": drawn}}
    answer = demo.api("POST", f"/api/ml/{backend_id}/interactive-annotating", json=body)
    assert not answer.get("errors"), answer
    return answer["data"]


@dataclass(frozen=True)
class Thing:
    """An object on a sample image, from the data set's own annotations; pixels."""

    image: str
    size_hw: tuple[int, int]
    inside_xy: tuple[int, int]
    """A point on it."""
    box_xyxy: tuple[int, int, int, int]
    """The tight rectangle around it."""
    label: str = "Cat"


CAT = Thing("cat_black.jpg", (384, 384), (222, 127), (122, 49, 384, 357))
NUCLEI = [
    Thing("nuclei.jpg", (260, 348), (232, 43), (204, 11, 260, 75), "Nucleus"),
    Thing("nuclei.jpg", (260, 348), (84, 103), (56, 81, 113, 126), "Nucleus"),
]


def _region(thing: Thing, **fields: Any) -> dict[str, Any]:
    height, width = thing.size_hw
    common = {"original_width": width, "original_height": height, "image_rotation": 0}
    return {**common, "id": uuid.uuid4().hex[:10], "to_name": "image", "origin": "manual", **fields}


def keypoint(
    thing: Thing, xy: tuple[int, int] | None = None, *, positive: bool = True
) -> dict[str, Any]:
    """A smart keypoint as Label Studio's page sends it (recorded payload 10)."""
    x, y = xy or thing.inside_xy
    height, width = thing.size_hw
    return _region(
        thing,
        type="keypointlabels",
        from_name="kp",
        is_positive=positive,
        value={
            "x": 100 * x / width,
            "y": 100 * y / height,
            "width": 0.26,
            "labels": [thing.label],
            "keypointlabels": [thing.label],
        },
    )


def rectangle(thing: Thing) -> dict[str, Any]:
    """A smart rectangle as Label Studio's page sends it (recorded payload 12)."""
    height, width = thing.size_hw
    left, top, right, bottom = thing.box_xyxy
    return _region(
        thing,
        type="rectanglelabels",
        from_name="box",
        value={
            "x": 100 * left / width,
            "y": 100 * top / height,
            "width": 100 * (right - left) / width,
            "height": 100 * (bottom - top) / height,
            "rotation": 0,
            "rectanglelabels": [thing.label],
        },
    )


def mask_of(region: dict[str, Any]) -> np.ndarray:
    """The pixels of a brush, bitmask or polygon region, [H, W] bool, by code that is not ours."""
    height, width = region["original_height"], region["original_width"]
    if region["type"] == "brushlabels":
        from label_studio_sdk.converter.brush import decode_rle

        rgba = decode_rle(region["value"]["rle"]).reshape(height, width, 4)
        return rgba[..., 3] > 127
    if region["type"] == "bitmasklabels":
        with urllib.request.urlopen(region["value"]["imageDataURL"]) as file:
            return np.asarray(Image.open(file).convert("RGBA"))[..., 3] > 127
    points = np.array(region["value"]["points"]) * [width / 100, height / 100]
    canvas = np.zeros((height, width), np.uint8)
    cv2.fillPoly(canvas, [np.round(points).astype(np.int32)], 1)
    return canvas > 0


def union_of(regions: list[dict[str, Any]]) -> np.ndarray:
    """All pixels of several regions: a polygon project has one region for each island."""
    return np.any([mask_of(region) for region in regions], axis=0)


def share_inside(mask: np.ndarray, box_xyxy: tuple[int, int, int, int]) -> float:
    """How much of the mask lies within the rectangle."""
    left, top, right, bottom = box_xyxy
    return float(mask[top:bottom, left:right].sum() / max(1, mask.sum()))
