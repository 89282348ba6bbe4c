"""How long a click takes in a running demo, through Label Studio's own API.

    python -m tests.e2e.latency [--folder .demo] [--port 8080] [--backend-port 9090]

The images are the samples with a little noise, so that the backend has never seen them: the first
click pays for fetching and encoding, the next clicks do not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ml_backend.connect import ProjectClient, connect
from ml_backend.demo import demo_label_config, sample_images
from tests.e2e.support import CAT, NUCLEI, OUTPUTS, Demo, Thing, ask, keypoint, rectangle

_NEXT_CLICKS = 8


def measure(demo: Demo) -> str:
    """Time clicks and rectangles in projects made for it; returns a table, and leaves nothing."""
    lines = [f"{'project':<10}{'prompt':<12}{'first':>8}{'next (median)':>15}{'next (worst)':>14}"]
    for output in OUTPUTS:
        project_id = demo.client.create_project("latency", demo_label_config(output))["id"]
        try:
            backend = connect(demo.client, project_id, demo.backend_url, title="SAM")
            for kind, draw in (("keypoint", keypoint), ("rectangle", rectangle)):
                first, following = [], []
                for thing, task_id in _unseen(demo, project_id):
                    times = []
                    for _ in range(1 + _NEXT_CLICKS):
                        started = time.perf_counter()
                        ask(demo, backend["id"], task_id, [draw(thing)])
                        times.append(time.perf_counter() - started)
                    first.append(times[0])
                    following += times[1:]
                lines.append(
                    f"{output:<10}{kind:<12}{max(first):>7.2f}s"
                    f"{statistics.median(following):>14.2f}s{max(following):>13.2f}s"
                )
        finally:
            demo.api("DELETE", f"/api/projects/{project_id}/")
    return "\n".join(lines)


def _unseen(demo: Demo, project_id: int) -> list[tuple[Thing, int]]:
    things = [CAT, NUCLEI[0]]
    rng = np.random.default_rng()
    last = max((task["id"] for task in demo.tasks(project_id).values()), default=0)
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for path in sample_images():
            if path.name in {thing.image for thing in things}:
                pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
                noisy = np.clip(pixels + rng.integers(-2, 3, pixels.shape), 0, 255)
                paths.append(Path(folder) / path.name)
                Image.fromarray(noisy.astype(np.uint8)).save(paths[-1], quality=95)
        demo.client.import_files(project_id, paths)
    tasks = demo.tasks(project_id, after=last)
    return [(thing, tasks[thing.image]["id"]) for thing in things]


def main() -> None:
    """Measure the demo that runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".demo"))
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--backend-port", type=int, default=9090)
    arguments = parser.parse_args()
    demo = Demo(arguments.folder)
    demo.url = f"http://localhost:{arguments.port}"
    demo.backend_url = f"http://127.0.0.1:{arguments.backend_port}"
    demo.state = json.loads((arguments.folder / "demo.json").read_text())
    demo.client = ProjectClient(demo.url, demo.state["token"])
    print(measure(demo))  # noqa: T201


if __name__ == "__main__":
    main()
