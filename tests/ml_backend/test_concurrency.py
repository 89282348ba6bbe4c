"""The backend as it is deployed: real gunicorn, several workers, many requests at once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch

from ml_backend.cli import gunicorn_command
from ml_backend.loading import load_predictor
from ml_backend.settings import load_settings
from ml_backend.wsgi import application
from sam_ext.checkpoints import save_checkpoint
from sam_ext.config import MODELS
from sam_ext.interactive import answer_prompts, default_crops
from sam_ext.predictor import ObjectPrompt
from sam_ext.sam import build_sam
from tests.conftest import build_small_sam
from tests.ml_backend.backend import encoded, mask_of, payload, random_image, setup_body
from tests.ml_backend.servers import LEGACY_TOKEN, Answer, FakeLabelStudio, Request

ROOT = Path(__file__).parents[2]
WAIT_S = 120  # for what takes seconds when nothing else runs on the machine
SIZES_HW = ((60, 90), (90, 60), (75, 80), (64, 120))
CLICKS = ((25.0, 30.0), (50.0, 50.0), (81.5, 20.25), (10.0, 77.0), (66.6, 66.6))


def image_path(index: int) -> str:
    return f"/data/upload/1/image-{index}.png"


@dataclass
class Gunicorn:
    """A started backend; its log is read all the time, so that it never blocks on it."""

    url: str
    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)
    listening: threading.Event = field(default_factory=threading.Event)

    def read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if "Listening at" in line:
                self.listening.set()
        self.listening.set()  # or it never will

    def post(self, path: str, body: dict[str, Any]) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=WAIT_S)


@contextmanager
def gunicorn(data_dir: Path, model: Path, **variables: str) -> Iterator[Gunicorn]:
    """Start the backend as `serve` does, and wait for its port, not for its workers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {
        "DATA_DIR": str(data_dir),
        "SAM_MODEL": str(model),
        "SAM_DEVICE": "cpu",
        "HOST": "127.0.0.1",
        "PORT": str(port),
    } | variables
    process = subprocess.Popen(
        gunicorn_command(load_settings(environ)),
        env=os.environ | environ,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    server = Gunicorn(f"http://127.0.0.1:{port}", process)
    reader = threading.Thread(target=server.read_log)
    reader.start()
    try:
        assert server.listening.wait(WAIT_S)
        assert process.poll() is None, "".join(server.log)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(WAIT_S)
        reader.join()
        assert process.stderr is not None
        process.stderr.close()


@pytest.fixture(scope="module")
def small_model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save_checkpoint(build_small_sam(), path, metadata={})
    return path


@pytest.fixture(scope="module")
def label_studio() -> Iterator[FakeLabelStudio]:
    with FakeLabelStudio() as server:
        server.legacy_tokens_enabled = True
        for index, size_hw in enumerate(SIZES_HW):
            body = encoded(random_image(index, size_hw=size_hw))
            server.routes[image_path(index)] = Answer(body)
        yield server


def request_for(number: str, *, image: int, click: tuple[float, float]) -> dict[str, Any]:
    """A recorded request of a project, with another image and another click."""
    body = payload(number)
    body["tasks"][0]["data"]["image"] = image_path(image)
    (region,) = body["params"]["context"]["result"]
    region["value"] |= {"x": click[0], "y": click[1]}
    return body


EXACT = {"SAM_PRECISION": "fp32", "SAM_DEVICE": "cpu"}
PROJECTS = {"10": "brushlabels", "17": "polygonlabels"}
RESTARTED = [(number, i % 4, CLICKS[i % 5]) for i in range(12) for number in PROJECTS]


@dataclass(frozen=True)
class Restarted:
    server: Gunicorn
    answers: list[requests.Response]
    """To the requests `RESTARTED`, which were sent as soon as the port was open again."""


@pytest.fixture(scope="module")
def restarted(tmp_path_factory, small_model, label_studio) -> Iterator[Restarted]:
    """Two workers that no /setup has reached: both projects were set up with a process before."""
    data_dir = tmp_path_factory.mktemp("data")
    with gunicorn(data_dir, small_model, **EXACT) as server:
        for number in PROJECTS:
            body = setup_body(payload(number), label_studio.url)
            assert server.post("/setup", body).status_code == 200
    with (
        gunicorn(data_dir, small_model, WORKERS="2", **EXACT) as server,
        ThreadPoolExecutor(6) as pool,
    ):
        bodies = [request_for(one, image=image, click=click) for one, image, click in RESTARTED]
        yield Restarted(server, list(pool.map(lambda body: server.post("/predict", body), bodies)))


def test_every_drawing_is_answered_right_after_a_restart_with_two_workers_and_two_projects(
    restarted,
):
    assert [answer.status_code for answer in restarted.answers] == [200] * 24
    for (number, image, _), answer in zip(RESTARTED, restarted.answers, strict=True):
        (prediction,) = answer.json()["results"]
        assert {region["type"] for region in prediction["result"]} == {PROJECTS[number]}
        sizes = {(r["original_height"], r["original_width"]) for r in prediction["result"]}
        assert sizes == {SIZES_HW[image]}
    assert LEGACY_TOKEN not in "".join(restarted.server.log)


def test_200_drawings_at_once_on_four_images_are_all_answered_for_their_own_image(
    restarted, small_model
):
    asked = [(index % 4, CLICKS[index % 5]) for index in range(200)]
    bodies = [request_for("10", image=image, click=click) for image, click in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda body: restarted.server.post("/predict", body), bodies))

    assert [answer.status_code for answer in answers] == [200] * 200
    expected = expected_masks(small_model)
    for (image, click), answer in zip(asked, answers, strict=True):
        (region,) = answer.json()["results"][0]["result"]
        mask = mask_of(region)
        assert mask.shape == SIZES_HW[image]
        # Not to the pixel: how many threads torch has decides on the last bit of a logit.
        assert np.mean(mask != expected[image, click]) < 0.005


def expected_masks(model: Path) -> dict[tuple[int, tuple[float, float]], np.ndarray]:
    """The right answer for each image and click, by the model alone."""
    predictor = load_predictor(load_settings({"SAM_MODEL": str(model), **EXACT}))
    masks = {}
    for image, (height, width) in enumerate(SIZES_HW):
        pixels = np.asarray(random_image(image, size_hw=(height, width)))
        for click in CLICKS:
            xy = np.array(click) / 100 * (width, height)
            prompt = ObjectPrompt(point_coords=xy[None], point_labels=np.array([1]))
            (answer,) = answer_prompts(
                predictor,
                [prompt],
                image_hw=(height, width),
                embed=lambda crop, pixels=pixels: predictor.embed(pixels, crop=crop),
                crops=default_crops(predictor.image_size),
            )
            masks[image, click] = answer.mask
    return masks


@dataclass
class Gate:
    """Lets image requests through when all that are expected have come."""

    count: int
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.count)

    def image(self, request: Request) -> Answer:
        seed = int(request.path.rpartition("-")[2].partition(".")[0])
        body = encoded(random_image(seed, size_hw=(768, 1024)))
        self.barrier.wait(WAIT_S)
        return Answer(body)


def test_health_setup_and_webhook_keep_label_studios_clock_while_eight_predictions_run(
    tmp_path, label_studio
):
    model = tmp_path / "model.safetensors"
    # Four times the work of the bundled model, so that it really is under way.
    config = replace(MODELS["tiny"], name="slow", image_size=2 * MODELS["tiny"].image_size)
    save_checkpoint(build_sam(config), model, metadata={})
    gate = Gate(8)
    for index in range(8):
        label_studio.routes[image_path(100 + index)] = gate.image
    setup, webhook = setup_body(payload("10"), label_studio.url), payload("30")
    calls = {
        "/health": (1.0, lambda: requests.get(f"{server.url}/health", timeout=WAIT_S)),
        "/setup": (3.0, lambda: server.post("/setup", setup)),
        "/webhook": (1.0, lambda: server.post("/webhook", webhook)),
    }
    seconds: dict[str, list[float]] = {path: [] for path in calls}
    with (
        gunicorn(
            tmp_path,
            model,
            LABEL_STUDIO_URL=label_studio.url,
            LABEL_STUDIO_API_KEY=LEGACY_TOKEN,
        ) as server,
        ThreadPoolExecutor(8) as pool,
    ):
        assert server.post("/setup", setup).status_code == 200  # it is up
        running = [
            pool.submit(
                server.post, "/predict", request_for("10", image=100 + index, click=CLICKS[0])
            )
            for index in range(8)
        ]
        while not any(one.done() for one in running):
            for path, (_, call) in calls.items():
                started = time.perf_counter()
                assert call().ok
                seconds[path].append(time.perf_counter() - started)
        assert [one.result().status_code for one in running] == [200] * 8

    for path, (limit_s, _) in calls.items():
        assert seconds[path]
        assert max(seconds[path]) < limit_s, path


def test_a_full_worker_refuses_drawings_and_still_answers_the_rest(
    tmp_path, small_model, label_studio
):
    gate = Gate(5)  # THREADS=8 admits four; the test itself is the fifth
    for index in range(4):
        label_studio.routes[image_path(200 + index)] = gate.image
    with (
        gunicorn(
            tmp_path,
            small_model,
            THREADS="8",
            LABEL_STUDIO_URL=label_studio.url,
            LABEL_STUDIO_API_KEY=LEGACY_TOKEN,
        ) as server,
        ThreadPoolExecutor(4) as pool,
    ):
        running = [
            pool.submit(
                server.post, "/predict", request_for("10", image=200 + index, click=CLICKS[0])
            )
            for index in range(4)
        ]
        waiting = 'sam_predictions_waiting{worker="'
        while True:
            text = requests.get(f"{server.url}/metrics", timeout=WAIT_S).text
            (line,) = [line for line in text.splitlines() if line.startswith(waiting)]
            if line.endswith(" 4.0"):
                break
        refused = server.post("/predict", request_for("10", image=0, click=CLICKS[0]))
        assert requests.get(f"{server.url}/health", timeout=WAIT_S).ok
        gate.barrier.wait(WAIT_S)
        assert [one.result().status_code for one in running] == [200] * 4

    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")


def test_a_start_that_fails_says_why_in_one_line_and_ends(tmp_path):
    environ = {"DATA_DIR": str(tmp_path), "PORT": "1"}
    command = gunicorn_command(load_settings(environ))
    ended = subprocess.run(
        [*command, f"--bind=unix:{tmp_path}/socket"],
        env=os.environ | environ | {"SAM_OUTPUT": "blob"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert ended.returncode == 3
    assert "Traceback" not in ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if "the backend cannot start" in line]
    assert "SAM_OUTPUT must be" in line


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        pytest.param({"WORKERS": "0"}, "WORKERS must be", id="setting"),
        pytest.param({"SAM_MODEL": "missing.pth"}, "got 'missing.pth'", id="checkpoint"),
        pytest.param({"SAM_DEVICE": "abacus"}, "abacus", id="device"),
        pytest.param({"DATA_DIR": "/dev/null/data"}, "DATA_DIR must be", id="data-folder"),
    ],
)
def test_what_keeps_it_from_starting_is_said_in_one_sentence(
    tmp_path, small_model, monkeypatch, caplog, variables, sentence
):
    environ = {"DATA_DIR": str(tmp_path), "SAM_MODEL": str(small_model), "SAM_DEVICE": "cpu"}
    for name, value in (environ | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        application()
    assert caught.value.code == 3
    (record,) = [one for one in caplog.records if one.levelname == "CRITICAL"]
    assert record.message.startswith("the backend cannot start: ")
    assert sentence in record.message
    assert record.exc_info is None


def test_the_workers_share_torchs_threads(tmp_path, small_model, monkeypatch):
    for name, value in {
        "DATA_DIR": str(tmp_path),
        "SAM_MODEL": str(small_model),
        "SAM_DEVICE": "cpu",
        "WORKERS": "2",
    }.items():
        monkeypatch.setenv(name, value)
    torch.set_num_threads(5)
    application().extensions["ml_backend"].service.close()
    assert torch.get_num_threads() == 2
