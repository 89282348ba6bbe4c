from __future__ import annotations

import copy
import io
import itertools
import json
import logging
import re
import stat
import threading
import time
from pathlib import Path

import label_studio_ml.api
import numpy as np
import pytest
import torch
from PIL import Image

import ml_backend
from ml_backend.app import create_app
from ml_backend.engine import Engine
from ml_backend.errors import BadRequestError, SettingsError
from ml_backend.jobs import JobStore
from ml_backend.label_studio import project_name
from ml_backend.model import SamBackend
from ml_backend.settings import Settings
from sam_ext.interactive import answer_prompts, default_crops
from sam_ext.predictor import ObjectPrompt, Predictor
from sam_ext.stable_sam import StableSam
from tests.conftest import build_small_sam
from tests.ml_backend.backend import (
    encoded,
    make_sure_of_itself,
    mask_of,
    payload,
    random_image,
    serve_images,
    setup_body,
)
from tests.ml_backend.servers import LEGACY_TOKEN, Answer, FakeLabelStudio, Server

SIZE_HW = (480, 640)
BROWSER = {"Accept": "text/html"}
NO_POINTS = {"point_coords": np.empty((0, 2)), "point_labels": np.empty(0, np.int64)}


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(build_small_sam())


@pytest.fixture
def label_studio():
    with FakeLabelStudio() as server:
        yield server


@pytest.fixture
def make_client(tmp_path, predictor, label_studio):
    """A client of the app; with no settings, nobody has told it where Label Studio is."""
    apps = []

    def make(predictor=predictor, **settings):
        apps.append(create_app(Settings(data_dir=tmp_path, **settings), predictor))
        return apps[-1].test_client()

    yield make
    for app in apps:
        app.extensions["ml_backend"].service.close()


@pytest.fixture
def client(make_client, label_studio):
    label_studio.legacy_tokens_enabled = True
    return make_client(label_studio_url=label_studio.url, label_studio_api_key=LEGACY_TOKEN)


def predicted(client, request: dict) -> list:
    response = client.post("/predict", json=request)
    assert response.status_code == 200, response.json
    assert response.json.keys() == {"results", "model_version"}
    return response.json["results"]


def prompts_of(request: dict) -> list[ObjectPrompt]:
    """The prompts of a recorded request on its image as the annotator sees it, by hand."""
    height, width = 480, 640
    regions = request["params"]["context"]["result"]
    if regions[0]["original_height"] == 640:
        height, width = width, height
    scale = np.array([width, height]) / 100
    if regions[0]["type"] == "rectanglelabels":
        return [
            ObjectPrompt(
                **NO_POINTS,
                box_xyxy=np.concatenate(
                    [
                        np.array([v["x"], v["y"]]) * scale,
                        np.array([v["x"] + v["width"], v["y"] + v["height"]]) * scale,
                    ]
                ),
            )
            for v in (region["value"] for region in regions)
        ]
    return [
        ObjectPrompt(
            point_coords=np.array([[r["value"]["x"], r["value"]["y"]] for r in regions]) * scale,
            point_labels=np.array([int(r.get("is_positive", True)) for r in regions]),
        )
    ]


def shown(path: str) -> np.ndarray:
    """The pixels of the image that `serve_images` serves, as the annotator sees them."""
    image = random_image(0, size_hw=SIZE_HW)
    if path.endswith(".jpg"):
        image = Image.open(io.BytesIO(encoded(image, "JPEG")))
    if "exif6" in path:
        image = image.transpose(Image.Transpose.ROTATE_270)
    return np.asarray(image)


@pytest.mark.parametrize(
    ("number", "label"),
    [
        pytest.param("10", "Cat", id="keypoint"),
        pytest.param("11", "Cat", id="positive-and-negative"),
        pytest.param("12", "Dog", id="rectangle"),
        pytest.param("13", "Cat", id="three-rectangles"),
        pytest.param("15", "Cat", id="no-is_positive-after-a-reload"),
        pytest.param("16", "Cat", id="exif-rotated"),
    ],
)
def test_a_recorded_drawing_is_answered_with_the_masks_of_its_prompts(
    client, predictor, label_studio, number, label
):
    request = payload(number)
    serve_images(label_studio, request)
    (prediction,) = predicted(client, request)

    prompts = prompts_of(request)
    pixels = shown(request["tasks"][0]["data"]["image"])
    height, width = pixels.shape[:2]
    answers = answer_prompts(
        predictor,
        prompts,
        image_hw=(height, width),
        embed=lambda crop: predictor.embed(pixels, crop=crop),
        crops=default_crops(predictor.image_size),
    )

    assert len(prediction["result"]) == len(prompts)
    for region, answer in zip(prediction["result"], answers, strict=True):
        np.testing.assert_array_equal(mask_of(region), answer.mask)
        assert {k: v for k, v in region.items() if k not in ("id", "value")} == {
            "from_name": mask_tag(request),
            "to_name": "image",
            "type": "brushlabels",
            "origin": "prediction",
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "score": pytest.approx(np.clip(answer.iou_prediction, 0, 1), abs=6e-5),
        }
        assert region["value"]["brushlabels"] == [label]
    assert len({region["id"] for region in prediction["result"]}) == len(prompts)
    assert prediction["score"] == pytest.approx(
        np.mean([region["score"] for region in prediction["result"]])
    )


def mask_tag(request: dict) -> str:
    return "mask" if 'name="mask"' in request["label_config"] else "brush"


def test_a_polygon_project_is_answered_with_polygons(client, label_studio):
    request = payload("17")
    serve_images(label_studio, request)
    (prediction,) = predicted(client, request)
    assert {region["type"] for region in prediction["result"]} == {"polygonlabels"}
    assert {region["from_name"] for region in prediction["result"]} == {"mask"}


@pytest.mark.parametrize(
    ("settings", "types"),
    [
        pytest.param({}, {"brushlabels"}, id="all-but-the-smart-rectangle"),
        pytest.param(
            {"sam_output": ("rectangle", "brush")},
            {"brushlabels", "rectanglelabels"},
            id="as-sam-output-says",
        ),
    ],
)
def test_the_outputs_are_those_of_the_config_or_of_the_setting(
    make_client, label_studio, settings, types
):
    request = payload("10")
    serve_images(label_studio, request)
    client = make_client(
        label_studio_url=label_studio.url, label_studio_api_key=LEGACY_TOKEN, **settings
    )
    (prediction,) = predicted(client, request)
    assert {region["type"] for region in prediction["result"]} == types


def test_the_context_that_is_empty_after_submit_clears_the_suggestions(client, label_studio):
    assert predicted(client, payload("14")) == [{"result": []}]
    assert label_studio.requests == []


def test_negative_keypoints_alone_ask_for_nothing(client, label_studio):
    request = payload("10")
    request["params"]["context"]["result"][0]["is_positive"] = False
    assert predicted(client, request) == [{"result": []}]
    assert label_studio.requests == []


def test_opening_tasks_without_prompts_stores_nothing_and_loads_no_image(client, label_studio):
    assert predicted(client, payload("20")) == [[], []]
    assert predicted(client, payload("21")) == [[]] * len(payload("21")["tasks"])
    assert label_studio.requests == []


class EncodeCounter(Predictor):
    """Says the size of every image that it encodes."""

    def __init__(self) -> None:
        super().__init__(build_small_sam())
        self.sizes: list[tuple[int, int]] = []

    def embed(self, image, *, crop=None, pause=None):
        self.sizes.append(image.shape[:2])
        return super().embed(image, crop=crop, pause=pause)


@pytest.fixture
def opened(label_studio):
    """The request with which the page opens a task, and five more tasks of that project."""
    label_studio.legacy_tokens_enabled = True
    request = payload("20")
    (task, *_) = request["tasks"]
    label_studio.tasks = [
        {"id": task["id"] + i, "project": task["project"], "data": {"image": f"/data/{i}.png"}}
        for i in range(6)
    ]
    for i in range(6):
        body = encoded(random_image(i, size_hw=(40 + i, 56)))
        label_studio.routes[f"/data/{i}.png"] = Answer(body)
    return request | {"tasks": [task | {"data": {"image": "/data/0.png"}}]}


def images_asked(label_studio) -> list[str]:
    return [request.path for request in label_studio.requests if "/data/" in request.path]


def test_opening_a_task_embeds_its_image_and_the_next_two_in_the_background(
    make_client, label_studio, opened
):
    predictor = EncodeCounter()
    client = make_client(
        predictor, label_studio_url=label_studio.url, label_studio_api_key=LEGACY_TOKEN
    )
    assert predicted(client, opened) == [[]]
    until(lambda: len(predictor.sizes) == 3)
    assert predictor.sizes == [(40, 56), (41, 56), (42, 56)]

    # A drawing on one of them encodes nothing any more.
    drawing = payload("12")
    drawing["project"] = opened["project"]
    drawing["tasks"][0]["data"]["image"] = "/data/2.png"
    (region,) = drawing["params"]["context"]["result"]
    region["value"] |= {"x": 1.0, "y": 1.0, "width": 97.0, "height": 97.0}
    assert predicted(client, drawing)[0]["result"]
    assert len(predictor.sizes) == 3


def test_after_a_restart_a_known_image_is_neither_decoded_nor_encoded(
    make_client, label_studio, monkeypatch, tmp_path
):
    request = payload("10")
    serve_images(label_studio, request)
    settings = {"label_studio_url": label_studio.url, "label_studio_api_key": LEGACY_TOKEN}
    before = predicted(make_client(sam_crops=False, **settings), request)
    until(lambda: not all(p.name.startswith("new-") for p in (tmp_path / "embeddings").iterdir()))
    predictor = EncodeCounter()
    client = make_client(predictor, sam_crops=False, **settings)

    def fail(*_arguments, **_options):
        raise AssertionError("it was decoded")

    monkeypatch.setattr("ml_backend.images.decode_image", fail)
    (after,) = predicted(client, request)
    assert after["result"][0]["value"] == before[0]["result"][0]["value"]
    assert predictor.sizes == []


@pytest.mark.parametrize(("next_tasks", "images"), [(0, 0), (1, 2), (4, 5)])
def test_how_many_next_tasks_is_a_setting_and_none_is_off(
    make_client, label_studio, opened, next_tasks, images
):
    predictor = EncodeCounter()
    client = make_client(
        predictor,
        label_studio_url=label_studio.url,
        label_studio_api_key=LEGACY_TOKEN,
        sam_prefetch=next_tasks,
    )
    assert predicted(client, opened) == [[]]
    until(lambda: len(predictor.sizes) == images)
    time.sleep(0.2)  # for more than that
    assert len(predictor.sizes) == len(images_asked(label_studio)) == images


def test_opening_a_task_answers_before_its_image_is_there(client, label_studio, opened):
    go_on = threading.Event()

    def slow(_request) -> Answer:
        go_on.wait(20)
        return Answer(status=404)

    label_studio.routes["/data/0.png"] = slow
    assert predicted(client, opened) == [[]]
    go_on.set()


def test_a_failing_prefetch_is_logged_and_never_shown(client, label_studio, opened, caplog):
    label_studio.routes["/data/0.png"] = Answer(b"no picture")
    label_studio.routes["/api/tasks/"] = Answer(status=500)
    assert predicted(client, opened) == [[]]
    until(lambda: caplog.text.count("prefetch: ") == 2)
    assert "prefetch: decode: '/data/0.png' must be" in caplog.text
    assert "/api/tasks/ must answer 2xx, got status 500" in caplog.text


def test_a_task_of_a_label_studio_that_nobody_named_is_opened_too(make_client, caplog):
    request = payload("20")
    request["tasks"] = request["tasks"][:1]
    client = make_client()
    assert predicted(client, request) == [[]]
    until(lambda: "prefetch: address: " in caplog.text)


def until(holds) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def boxed(number: str = "12") -> list[dict]:
    """The regions of an annotation with one rectangle, as Label Studio stores it."""
    return payload(number)["params"]["context"]["result"]


@pytest.mark.parametrize(
    ("fields", "counts"),
    [
        pytest.param({"annotations": [{"id": 1, "result": boxed()}]}, [1, 0], id="annotation"),
        pytest.param(
            {"annotations": [{"id": 1, "result": boxed("13")}, {"id": 2, "result": boxed()}]},
            [1, 0],
            id="the-newest-annotation-counts",
        ),
        pytest.param(
            {"predictions": [{"id": 1, "model_version": "yolo-7", "result": boxed("13")}]},
            [3, 0],
            id="another-models-prediction",
        ),
        pytest.param(
            {"predictions": [{"id": 1, "model_version": "sam-tiny-00000000", "result": boxed()}]},
            [0, 0],
            id="its-own-rectangles-are-no-prompts",
        ),
        pytest.param(
            {"annotations": [{"id": 1, "was_cancelled": True, "result": boxed()}]},
            [0, 0],
            id="skipped",
        ),
    ],
)
def test_what_a_task_already_has_becomes_masks_in_a_batch(client, label_studio, fields, counts):
    request = payload("20")
    request["label_config"] = payload("13")["label_config"]
    serve_images(label_studio, request)
    request["tasks"][0] |= fields
    results = predicted(client, request)
    assert [len(one["result"]) if one else 0 for one in results] == counts
    assert [one == [] for one in results] == [not count for count in counts]


def test_one_bad_task_does_not_cost_the_others_their_predictions(client, label_studio, caplog):
    request = payload("20")
    request["label_config"] = payload("13")["label_config"]
    serve_images(label_studio, request)
    for task in request["tasks"]:
        task["annotations"] = [{"id": 1, "result": boxed()}]
    del label_studio.routes[request["tasks"][0]["data"]["image"]]

    first, second = predicted(client, request)

    assert first == []
    assert len(second["result"]) == 1
    (record,) = [r for r in caplog.records if "task 1: left out" in r.message]
    assert record.message.startswith("POST /predict: task 1: left out: fetch:")
    assert "left out: fetch:" in client.get("/", headers=BROWSER).text


def test_what_nobody_foresaw_of_one_task_does_not_cost_the_others_theirs(
    client, label_studio, caplog, monkeypatch
):
    request = payload("20")
    request["label_config"] = payload("13")["label_config"]
    serve_images(label_studio, request)
    for task in request["tasks"]:
        task["annotations"] = [{"id": 1, "result": boxed()}]
    answer = Engine.answer
    calls = itertools.count()

    def fails_once(*args, **kwargs):
        if next(calls) == 0:
            raise RuntimeError("CUDA out of memory")
        return answer(*args, **kwargs)

    monkeypatch.setattr(Engine, "answer", fails_once)

    first, second = predicted(client, request)

    assert first == []
    assert len(second["result"]) == 1
    assert "CUDA out of memory" in caplog.text
    page = client.get("/", headers=BROWSER).text
    assert "left out: the backend failed in a way it does not know" in page


def test_a_damaged_region_costs_a_task_no_other_mask(client, label_studio):
    request = payload("20")
    request["label_config"] = payload("13")["label_config"]
    serve_images(label_studio, request)
    outside = copy.deepcopy(boxed()[0])
    outside["value"] |= {"x": 100, "width": 5}
    request["tasks"][0]["predictions"] = [
        {"id": 1, "model_version": "yolo-7", "result": [outside, *boxed()]}
    ]

    first, _ = predicted(client, request)

    assert len(first["result"]) == 1
    page = client.get("/", headers=BROWSER).text
    assert "predictions[0] of task 1.result[0].value must be a box with an area" in page


def test_a_drawing_in_which_nothing_is_found_is_told_of(client, label_studio, monkeypatch):
    request = payload("12")
    serve_images(label_studio, request)
    answer = Engine.answer

    def nothing(*args, **kwargs):
        answers = answer(*args, **kwargs)
        for one in answers:
            one.candidates.masks[:] = False
        return answers

    monkeypatch.setattr(Engine, "answer", nothing)
    for number in (1, 2):  # one line on the page, however many tasks
        request["tasks"][0]["id"] = number
        assert predicted(client, request) == [{"result": []}]
    page = client.get("/", headers=BROWSER).text
    assert page.count("the model found nothing by a box; draw a larger box, or add points") == 1
    assert "2 times" in page


def test_a_batch_of_which_nothing_can_be_answered_says_why(client, label_studio):
    request = payload("20")
    request["label_config"] = payload("13")["label_config"]
    for task in request["tasks"]:
        task["annotations"] = [{"id": 1, "result": boxed()}]
    response = client.post("/predict", json=request)
    assert response.status_code == 502
    assert response.json["error"].startswith("fetch:")


def test_automatic_masks_answer_a_batch_without_prompts_when_they_are_on(make_client, label_studio):
    request = payload("20")
    serve_images(label_studio, request)
    client = make_client(
        Predictor(make_sure_of_itself(build_small_sam())),
        sam_automatic=True,
        label_studio_url=label_studio.url,
        label_studio_api_key=LEGACY_TOKEN,
    )
    results = predicted(client, request)
    assert len(results) == 2
    for prediction in results:
        assert {region["type"] for region in prediction["result"]} == {"brushlabels"}
        assert all("brushlabels" not in region["value"] for region in prediction["result"])


def test_the_bundled_model_finds_nuclei_without_prompts(make_client, label_studio):
    """With SAM's own thresholds it would be sure of nothing."""
    request = payload("20")
    label_studio.legacy_tokens_enabled = True
    for task in request["tasks"]:
        sample = Path(ml_backend.__file__).parent / "samples" / "images" / "nuclei.jpg"
        label_studio.routes[task["data"]["image"]] = Answer(sample.read_bytes())
    client = make_client(
        None,
        sam_automatic=True,
        label_studio_url=label_studio.url,
        label_studio_api_key=LEGACY_TOKEN,
    )
    for prediction in predicted(client, request):
        assert len(prediction["result"]) >= 3


def test_every_image_of_a_config_is_answered_in_its_own_size(client, label_studio):
    request = payload("12")
    request["label_config"] = """
        <View><Image name="left" value="$a"/><Image name="right" value="$b"/>
        <BrushLabels name="mask" toName="left,right"><Label value="Dog"/></BrushLabels>
        <RectangleLabels name="box" toName="left,right" smart="true"><Label value="Dog"/>
        </RectangleLabels></View>"""
    request["tasks"][0]["data"] = {"a": "/data/a.png", "b": "/data/b.png"}
    (region,) = request["params"]["context"]["result"]
    request["params"]["context"]["result"] = [
        region | {"id": "1", "to_name": "right"},
        region | {"id": "2", "to_name": "left"},
    ]
    label_studio.routes["/data/a.png"] = Answer(encoded(random_image(1, size_hw=(40, 60))))
    label_studio.routes["/data/b.png"] = Answer(encoded(random_image(2, size_hw=(90, 50))))

    (prediction,) = predicted(client, request)

    sizes = {
        region["to_name"]: (region["original_height"], region["original_width"])
        for region in prediction["result"]
    }
    assert sizes == {"left": (40, 60), "right": (90, 50)}


def test_the_image_of_a_list_is_the_one_that_was_drawn_on(client, label_studio):
    request = payload("12")
    request["label_config"] = request["label_config"].replace('value="$image"', 'valueList="$all"')
    request["tasks"][0]["data"] = {"all": ["/data/a.png", "/data/b.png"]}
    request["params"]["context"]["result"][0]["item_index"] = 1
    label_studio.routes["/data/b.png"] = Answer(encoded(random_image(2, size_hw=(90, 50))))

    (prediction,) = predicted(client, request)
    (region,) = prediction["result"]
    assert (region["item_index"], region["original_height"]) == (1, 90)

    request["params"]["context"]["result"][0]["item_index"] = 2
    response = client.post("/predict", json=request)
    assert (response.status_code, response.json["error"]) == (
        400,
        "address: data.all of task 11 must be a list with an entry 2, got list",
    )


def test_the_file_counts_where_the_page_has_another_size(client, label_studio, caplog):
    caplog.set_level(logging.INFO)
    request = payload("12")
    request["params"]["context"]["result"][0] |= {"original_width": 320, "original_height": 200}
    serve_images(label_studio, request)
    (prediction,) = predicted(client, request)
    assert prediction["result"][0]["original_width"] == 640
    (record,) = [r for r in caplog.records if "the page has an image" in r.message]
    assert record.message == (
        "task 11: the page has an image of (200, 320) (H, W), the file has (480, 640), which counts"
    )


def changed(number: str, *path_and_value) -> dict:
    """A recorded request with one field changed, or taken out by giving no value."""
    *path, last, value = path_and_value
    body = payload(number)
    inner = body
    for step in path:
        inner = inner[step]
    if value is KeyError:
        del inner[last]
    else:
        inner[last] = value
    return body


REGION = ("params", "context", "result", 0)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        pytest.param(b"", "the body of /predict must be JSON, got something else", id="empty"),
        pytest.param(
            b'{"tasks": [', "the body of /predict must be JSON, got something else", id="cut-off"
        ),
        pytest.param(
            b"[" * 100_000, "the body of /predict must be JSON, got something else", id="too-deep"
        ),
        pytest.param(
            b'"\xff"', "the body of /predict must be JSON, got something else", id="not-utf-8"
        ),
        pytest.param(b"[1]", "the body of /predict must be a JSON object, got a list", id="list"),
        pytest.param({}, "tasks must be a list, got null", id="nothing"),
        pytest.param(
            changed("10", "tasks", {"id": 1}), "tasks must be a list, got an object", id="tasks"
        ),
        pytest.param(
            changed("10", "tasks", [7]), "tasks[0] must be an object, got a number", id="task"
        ),
        pytest.param(
            changed("10", "tasks", []),
            "tasks must be the one task that was drawn on, got 0; send params.context as null for "
            "several",
            id="no-task",
        ),
        pytest.param(
            changed("10", "label_config", KeyError),
            "label_config must be a string, got null",
            id="label_config-missing",
        ),
        pytest.param(
            changed("10", "project", 5), "project must be a string, got a number", id="project"
        ),
        pytest.param(
            changed("10", "project", "../../etc/passwd"),
            "project must be a project's name such as 1.1795194739, got '../../etc/passwd'",
            id="project-that-leads-elsewhere",
        ),
        pytest.param(
            changed("10", "params", "x"), "params must be an object, got a string", id="params"
        ),
        pytest.param(
            changed("10", "params", "context", [1]),
            "params.context must be an object or null, got a list",
            id="context",
        ),
        pytest.param(
            changed("10", "params", "context", "result", {"a": 1}),
            "context.result must be a list of regions, got ",
            id="result",
        ),
        pytest.param(
            changed("10", *REGION, "from_name", "nobody"), "context.result[0].from_name", id="tag"
        ),
        pytest.param(
            changed("10", *REGION, "value", "keypointlabels", ["Horse"]),
            "context.result[0].value.keypointlabels",
            id="label",
        ),
        pytest.param(
            changed("10", *REGION, "value", "x", "7"), "context.result[0].value.x", id="x"
        ),
        pytest.param(
            changed("10", *REGION, "value", "y", float("nan")),
            "context.result[0].value.y",
            id="nan",
        ),
        pytest.param(
            changed("10", "tasks", 0, "data", {}),
            "address: data.image of task 11 must be one address, got nothing",
            id="no-image-in-the-task",
        ),
        pytest.param(
            changed("10", "tasks", 0, "data", 3),
            "address: data.image of task 11 must be one address, got nothing",
            id="no-data-in-the-task",
        ),
        pytest.param(
            changed("20", "tasks", 0, "annotations", 3) | {"tasks": [{"annotations": 3}]},
            "annotations of task None must be a list, got int",
            id="annotations",
        ),
        pytest.param(
            changed("20", "tasks", [{"id": 1, "annotations": [3]}]),
            "annotations[0] of task 1 must be an object, got int",
            id="annotation",
        ),
    ],
)
def test_a_wrong_predict_body_is_named_in_one_sentence(client, body, sentence):
    data = body if isinstance(body, bytes) else json.dumps(body)
    response = client.post("/predict", data=data, content_type="application/json")
    assert response.status_code == 400
    assert response.json.keys() == {"error", "id"}
    assert response.json["error"].startswith(sentence)


def test_a_parameter_may_have_any_name(client):
    request = payload("14")
    request["params"] |= {"tasks": 1, "self": 2, "project": 3, "label_config": 4}
    assert predicted(client, request) == [{"result": []}]


@pytest.mark.parametrize(
    ("label_config", "sentence"),
    [
        pytest.param("<View>", "the labelling config must be XML", id="not-xml"),
        pytest.param("<View/>", "the labelling config must have an <Image> tag", id="no-image"),
    ],
)
def test_a_config_that_cannot_work_is_refused_by_setup_where_label_studio_shows_it(
    client, label_config, sentence
):
    body = setup_body(payload("10"), "http://ls") | {"schema": label_config}
    response = client.post("/setup", json=body)
    assert response.status_code == 400
    assert response.json["error"].startswith(sentence)
    # Label Studio shows "400 Client Error: <reason> for url: …", and nothing of the body.
    assert response.status.startswith(f"400 {sentence}")


@pytest.mark.parametrize(
    "extra_params",
    [
        pytest.param({"model_size": "vit_b"}, id="object-from-the-api"),
        pytest.param('{"vit": "b"}', id="text-from-the-page"),
        pytest.param("", id="empty-from-an-untouched-page"),
        pytest.param(None, id="null"),
    ],
)
def test_setup_answers_the_version_that_predictions_carry(client, label_studio, extra_params):
    request = payload("12")
    serve_images(label_studio, request)
    body = setup_body(request, label_studio.url, extra_params=extra_params)
    response = client.post("/setup", json=body)
    assert response.status_code == 200
    version = response.json["model_version"]
    assert response.json == {"model_version": version}

    answer = client.post("/predict", json=request).json
    assert answer["model_version"] == answer["results"][0]["model_version"] == version


@pytest.mark.parametrize("number", ["02", "02b"])
def test_a_recorded_setup_is_accepted(client, number):
    assert client.post("/setup", json=payload(number)).status_code == 200


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        pytest.param(
            {"extra_params": "{"},
            "extra_params must be a JSON object or empty, got '{'; change it on the project's "
            "Model page",
            id="extra_params-no-json",
        ),
        pytest.param(
            {"extra_params": [1]},
            "extra_params must be a JSON object or empty, got '[1]'; change it on the project's "
            "Model page",
            id="extra_params-no-object",
        ),
        pytest.param(
            {"extra_params": '{"train_method": "dora"}'},
            "extra_params.train_method must be one of auto, wesam, sam-adapter, lora, got 'dora'; "
            "change it on the project's Model page",
            id="train_method-unknown",
        ),
        pytest.param(
            {"extra_params": {"train_method": ["lora"]}},
            "extra_params.train_method must be one of auto, wesam, sam-adapter, lora, got "
            "\"['lora']\"; change it on the project's Model page",
            id="train_method-no-text",
        ),
        pytest.param(
            {"project": None},
            "project must be a project's name such as 1.1795194739, got null",
            id="no-project",
        ),
        pytest.param({"schema": 1}, "schema must be a string, got a number", id="schema"),
        pytest.param({"hostname": 1}, "hostname must be a string, got a number", id="hostname"),
        pytest.param(
            {"hostname": "file:///etc"},
            "hostname must be an http or https address or empty, got 'file:///etc'; "
            "set LABEL_STUDIO_HOST",
            id="hostname-no-address",
        ),
        pytest.param(
            {"access_token": {}}, "access_token must be a string, got an object", id="token"
        ),
    ],
)
def test_a_wrong_setup_body_is_named_in_one_sentence(client, fields, sentence):
    response = client.post("/setup", json=setup_body(payload("10"), "http://ls") | fields)
    assert (response.status_code, response.json["error"]) == (400, sentence)


def test_what_setup_announced_serves_a_later_process_and_only_its_own_project(
    make_client, label_studio
):
    request, other = payload("12"), payload("17")
    serve_images(label_studio, request)
    with FakeLabelStudio() as another:
        serve_images(another, other)
        first = make_client()
        first.post("/setup", json=setup_body(request, label_studio.url))
        first.post("/setup", json=setup_body(other, another.url))

        restarted = make_client()
        (brush,) = predicted(restarted, request)
        (polygon,) = predicted(restarted, other)

        assert brush["result"][0]["type"] == "brushlabels"
        assert polygon["result"][0]["type"] == "polygonlabels"
        (asked,) = label_studio.requests
        (asked_another,) = another.requests
    assert asked.path == request["tasks"][0]["data"]["image"]
    assert asked_another.path == other["tasks"][0]["data"]["image"]


def test_the_newest_announcement_counts(make_client, label_studio):
    request = payload("12")
    serve_images(label_studio, request)
    client = make_client()
    for hostname in ("http://127.0.0.1:9", label_studio.url):
        client.post("/setup", json=setup_body(request, hostname))
    assert len(predicted(client, request)[0]["result"]) == 1


def test_an_image_on_a_label_studio_that_nobody_named_is_refused(make_client):
    response = make_client().post("/predict", json=payload("12"))
    assert response.status_code == 400
    assert "set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY" in response.json["error"]


def test_the_environment_comes_before_what_setup_announced(make_client, label_studio):
    request = payload("12")
    serve_images(label_studio, request)
    label_studio.legacy_tokens_enabled = False
    with Server() as elsewhere:
        client = make_client(
            label_studio_url=label_studio.url,
            label_studio_api_key=label_studio.personal_access_token,
        )
        client.post("/setup", json=setup_body(request, elsewhere.url))
        assert len(predicted(client, request)[0]["result"]) == 1
        assert elsewhere.requests == []


def test_a_project_is_trained_as_its_own_extra_params_say(make_client, tmp_path, caplog):
    client = make_client(train_method="wesam")
    start = payload("33")
    project = project_name(start["project"])
    request = payload("10") | {"project": project}
    jobs = JobStore(tmp_path)
    for extra_params, method in [
        ('{"TRAIN_METHOD": "lora"}', "lora"),
        ({"train_method": "sam-adapter", "vit": "b"}, "sam-adapter"),
        ("", "wesam"),
        (None, "wesam"),
    ]:
        body = setup_body(request, "http://ls", extra_params=extra_params)
        assert client.post("/setup", json=body).status_code == 200
        number = client.post("/webhook", json=start).json["job"]
        assert jobs.get(number).method == method
        assert client.post("/job_status", json={"job": number}).json["method"] == method
        jobs.finish(number, "failed", "")
    assert [text for text in caplog.messages if "no effect" in text] == [
        "/setup: extra_params have no effect: vit"
    ]


def test_announced_tokens_are_kept_for_this_user_only(make_client, tmp_path):
    make_client().post("/setup", json=setup_body(payload("10"), "http://ls"))
    (path,) = (tmp_path / "connections").iterdir()
    assert path.name == "5.1795196074.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("number", ["30", "31", "32", "34", "35", "36"])
def test_a_recorded_webhook_is_accepted_and_nothing_of_it_is_logged(client, caplog, number):
    caplog.set_level(logging.DEBUG)
    body = payload(number)
    body["project"]["token"] = "s3cret-t0ken"
    assert client.post("/webhook", json=body).status_code == 201
    assert body["action"] in caplog.text
    assert "s3cret-t0ken" not in caplog.text
    assert "label_config" not in caplog.text


def test_a_webhook_of_an_unknown_kind_is_accepted(client):
    assert client.post("/webhook", json={"action": "SOMETHING_NEW"}).status_code == 201


@pytest.mark.parametrize(
    "body", [pytest.param({}, id="missing"), pytest.param({"action": 3}, id="no-text")]
)
def test_a_webhook_without_an_action_is_refused(client, body):
    response = client.post("/webhook", json=body)
    assert response.status_code == 400
    assert response.json["error"].startswith("action must be a string, got ")


def test_start_training_queues_a_job_and_a_second_one_is_refused_with_its_number(client):
    name = project_name(payload("33")["project"])
    quiet = {"is_training": False, "job": None, "model_version": version_of(client)}
    assert client.get(f"/is_training?project={name}").json == quiet

    response = client.post("/webhook", json=payload("33"))
    number = response.json["job"]
    assert (response.status_code, response.json) == (201, {"job": number})
    training = {"is_training": True, "job": number}
    for query in (f"?project={name}", ""):
        assert client.get(f"/is_training{query}").json == quiet | training
    assert client.get("/is_training?project=99.5").json == quiet

    response = client.post("/webhook", json=payload("33"))
    assert response.status_code == 409
    assert response.json["job"] == number
    assert f"got job {number}" in response.json["error"]
    assert response.status == f"409 {response.json['error']}"

    other = client.post("/train", json={"annotations": [{}], "project": "98.7", "params": {}})
    assert (other.status_code, other.json) == (201, {"job": number + 1})
    assert client.post("/train", json={"annotations": [{}]}).status_code == 400


def version_of(client) -> str:
    return client.get("/health").json["model_version"]


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("queued", "queued"),
        ("running", "started"),
        ("judging", "started"),
        ("promoted", "finished"),
        ("rejected", "finished"),
        ("failed", "failed"),
        ("cancelled", "canceled"),
    ],
)
def test_a_job_is_told_as_label_studio_asks(client, state, status):
    jobs = client.application.extensions["ml_backend"].service.jobs
    job = jobs.create("1.5", "start_training")
    if state in ("running", "judging"):
        jobs.start(job.id)
        jobs.report(job.id, {"step": 3}, state=state)
    elif state != "queued":
        jobs.finish(job.id, state, "because")
    for number in (job.id, str(job.id)):
        told = client.post("/job_status", json={"job": number}).json
        assert (told["job"], told["job_status"], told["state"]) == (job.id, status, state)


@pytest.mark.parametrize(("job", "status"), [(77, 410), ("x", 400), (None, 400), ([], 400)])
def test_a_job_that_is_not_there_is_gone(client, job, status):
    assert client.post("/job_status", json={"job": job}).status_code == status


def test_fit_queues_a_job(client):
    service = client.application.extensions["ml_backend"].service
    config = payload("10")["label_config"]
    answer = SamBackend(config, service=service, project="1.5").fit([])
    assert service.jobs.get(answer["job"]).project == "1.5"
    with pytest.raises(BadRequestError, match="to train it"):
        SamBackend(config, service=service).fit([])


def test_the_setups_token_is_not_logged_on_any_level(client, caplog):
    caplog.set_level(logging.DEBUG)
    client.post("/setup", json=setup_body(payload("10"), "http://ls"))
    assert LEGACY_TOKEN not in caplog.text


def test_health_says_what_runs(client, predictor):
    expected = {
        "status": "UP",
        "model": "tiny",
        "model_version": f"sam-tiny-{predictor.fingerprint[:8]}",
        "device": "cpu",
        "stable_sam": False,
        "problems": [],
    }
    assert client.get("/health").json == client.get("/").json == expected


def moved_plugin() -> StableSam:
    """A plugin whose answers are not SAM's."""
    plugin = StableSam()
    torch.nn.init.normal_(plugin.transform.weight, std=0.3)
    torch.nn.init.normal_(plugin.router[-1].bias)
    return plugin.eval()


def test_with_a_plugin_predictions_say_how_it_was_routed(make_client, label_studio, caplog):
    label_studio.legacy_tokens_enabled = True
    where = {"label_studio_url": label_studio.url, "label_studio_api_key": LEGACY_TOKEN}
    request = payload("12")
    serve_images(label_studio, request)
    [without] = predicted(make_client(**where), request)
    assert all("meta" not in region for region in without["result"])
    stable = Predictor(build_small_sam(), stable_sam=moved_plugin())
    with caplog.at_level("INFO", "ml_backend"):
        client = make_client(predictor=stable, **where)
    assert "Stable-SAM is on" in caplog.text
    assert client.get("/health").json["stable_sam"] is True
    [answer] = predicted(client, request)
    routing = {region["meta"]["routing"] for region in answer["result"]}
    assert len(routing) == 1
    assert 0 < routing.pop() < 1
    assert [r["value"] for r in answer["result"]] != [r["value"] for r in without["result"]]


def test_versions_are_answered_to_get_and_post(client):
    version = version_of(client)
    assert client.get("/versions").json == {"versions": [version]}
    assert client.post("/versions", json={"project": "1.2"}).json == {"versions": [version]}


def test_a_checkpoint_given_by_its_path_is_named_by_its_file(make_client):
    health = make_client(sam_model="/models/cells 2.safetensors").get("/health").json
    assert health["model_version"].startswith("sam-cells 2-")


def test_all_routes_of_label_studio_ml_are_served(client):
    def routes(app) -> set[tuple[str, str]]:
        rules = [rule for rule in app.url_map.iter_rules() if rule.endpoint != "static"]
        return {(rule.rule, method) for rule in rules for method in rule.methods}

    missing = routes(label_studio_ml.api._server) - routes(client.application)
    assert not missing


def test_metrics_count_the_answers(client):
    client.get("/health")
    client.post("/predict", json={})
    text = client.get("/metrics").text
    assert 'path="/health",status="200"' in text
    assert 'path="/predict",status="400"' in text
    assert "sam_embedding_cache_bytes" in text


class BrokenPredictor(Predictor):
    def embed(self, image, **_options):
        raise RuntimeError("CUDA error: s3cret detail")


def test_an_unexpected_failure_is_an_id_for_the_caller_and_a_traceback_in_the_log(
    make_client, label_studio, caplog, capfd
):
    request = payload("12")
    serve_images(label_studio, request)
    client = make_client(
        BrokenPredictor(build_small_sam()),
        label_studio_url=label_studio.url,
        label_studio_api_key=LEGACY_TOKEN,
    )
    response = client.post("/predict", json=request)
    assert response.status_code == 500
    assert response.json == {
        "error": "the backend failed in a way it does not know; look for the id in its log",
        "id": response.json["id"],
    }
    (record,) = [r for r in caplog.records if r.exc_info]
    assert response.json["id"] in record.message
    assert "s3cret detail" in caplog.text
    assert "Traceback" not in capfd.readouterr().out


def test_every_request_stands_in_the_log_with_its_time(client, caplog):
    caplog.set_level(logging.INFO)
    client.post("/predict", json=payload("14"))
    client.get("/health")
    (record,) = [r for r in caplog.records if r.name == "ml_backend.app"]
    assert re.fullmatch(r"POST /predict: 200 in \d+\.\d{3} s \[[0-9a-f]{12}\]", record.message)


def test_a_failure_that_has_a_name_stands_in_the_log_with_its_id(client, caplog):
    response = client.post("/predict", json={})
    assert f"{response.json['error']} [{response.json['id']}]" in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        pytest.param("GET", "/nothing", 404, id="unknown-route"),
        pytest.param("GET", "/predict", 405, id="wrong-method"),
    ],
)
def test_flasks_own_errors_are_json_too(client, method, path, status):
    response = client.open(path, method=method)
    assert response.status_code == status
    assert response.json.keys() == {"error", "id"}


@pytest.mark.parametrize(
    ("path", "megabytes", "status"),
    [("/webhook", 31, 201), ("/webhook", 33, 413), ("/setup", 5, 413), ("/predict", 33, 200)],
)
def test_a_body_that_is_too_large_is_refused(client, path, megabytes, status):
    """Before it is parsed: /webhook is open to everybody. A batch carries finished masks."""
    body = {"action": "TASKS_CREATED", "tasks": [], "label_config": payload("10")["label_config"]}
    answer = client.post(path, json=body | {"more": "x" * (megabytes * 2**20)})
    assert answer.status_code == status


@pytest.mark.parametrize("path", ["/predict", "/setup", "/webhook", "/train", "/job_status"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
    ],
)
def test_no_other_sites_page_asks_with_the_browsers_password(make_client, path, headers):
    client = make_client(basic_auth_user="sam", basic_auth_pass="secret")
    body = setup_body(payload("10"), "http://evil.example")
    asked = {"data": json.dumps(body), "content_type": "text/plain", "auth": ("sam", "secret")}
    answer = client.post(path, headers=headers, **asked)
    assert answer.status_code == 403
    assert answer.json["error"].startswith(f"{path} must be asked by a program, got a page of ")


@pytest.mark.parametrize(
    "headers",
    [{}, {"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}],
    ids=["Label Studio", "its own page"],
)
def test_programs_and_its_own_pages_may_ask(client, headers):
    body = setup_body(payload("10"), "")
    assert client.post("/setup", json=body, headers=headers).status_code == 200


@pytest.mark.parametrize("content", [b"", b"[]", b'{"hostname": "http'])
def test_what_the_disk_lost_of_a_connection_is_announced_anew(
    make_client, label_studio, tmp_path, caplog, content
):
    request = payload("10")
    serve_images(label_studio, request)
    client = make_client()
    body = setup_body(request, label_studio.url)
    client.post("/setup", json=body)
    assert predicted(client, request)[0]["result"]
    kept = tmp_path / "connections" / f"{request['project']}.json"
    kept.write_bytes(content)
    refused = client.post("/predict", json=request)
    assert refused.status_code == 400
    assert "LABEL_STUDIO_URL" in refused.json["error"]
    assert f"{kept} is damaged" in caplog.text
    assert client.post("/setup", json=body).status_code == 200
    assert predicted(client, request)[0]["result"]


@pytest.mark.parametrize(
    ("settings", "is_told"),
    [
        ({}, True),
        ({"host": "127.0.0.1"}, False),
        ({"label_studio_url": "http://localhost:8080"}, False),
        ({"basic_auth_user": "sam", "basic_auth_pass": "secret"}, False),
    ],
)
def test_who_may_say_where_label_studio_is_is_told_at_the_start(
    make_client, caplog, settings, is_told
):
    make_client(**settings)
    assert ("may say which Label Studio" in caplog.text) == is_told


def test_a_full_queue_is_answered_503_with_retry_after(client, label_studio):
    request = payload("12")
    serve_images(label_studio, request)
    engine = client.application.extensions["ml_backend"].service.engine
    engine._max_waiting = 0
    response = client.post("/predict", json=request)
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "5"
    assert predicted(client, payload("20")) == [[], []]  # opening a task needs no place


OPEN = {"/health", "/webhook"}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/health"),
        ("POST", "/setup"),
        ("POST", "/predict"),
        ("POST", "/webhook"),
        ("POST", "/train"),
        ("GET", "/versions"),
        ("POST", "/versions"),
        ("GET", "/is_training"),
        ("GET", "/metrics"),
        ("GET", "/nothing"),
    ],
)
@pytest.mark.parametrize(
    "auth",
    [
        pytest.param(None, id="none"),
        pytest.param(("user", "wrong"), id="wrong-password"),
        pytest.param(("wrong", "pässword"), id="wrong-user"),
    ],
)
def test_with_basic_auth_on_only_health_and_webhook_are_open(make_client, method, path, auth):
    client = make_client(basic_auth_user="user", basic_auth_pass="pässword")
    response = client.open(path, method=method, auth=auth, json={})
    assert (response.status_code == 401) == (path not in OPEN)
    if response.status_code == 401:
        assert response.headers["WWW-Authenticate"].startswith("Basic ")
        assert response.json["error"].startswith("basic auth must be BASIC_AUTH_USER")


def test_the_right_credentials_open_everything(make_client):
    client = make_client(basic_auth_user="user", basic_auth_pass="pässword")
    body = setup_body(payload("10"), "http://ls")
    assert client.post("/setup", json=body, auth=("user", "pässword")).status_code == 200


def test_with_basic_auth_on_training_is_started_with_credentials_only(make_client):
    client = make_client(basic_auth_user="user", basic_auth_pass="pass")
    assert client.post("/webhook", json=payload("33")).status_code == 401
    assert client.post("/webhook", json=payload("30")).status_code == 201
    assert client.post("/webhook", json=payload("33"), auth=("user", "pass")).status_code == 201


def test_a_token_instead_of_a_password_is_refused(make_client):
    client = make_client(basic_auth_user="user", basic_auth_pass="pass")
    response = client.get("/versions", headers={"Authorization": "Bearer user:pass"})
    assert response.status_code == 401


def test_two_apps_in_one_process_keep_to_themselves(make_client, label_studio):
    small = make_client()
    other = make_client(Predictor(build_small_sam(1)))
    body = setup_body(payload("10"), label_studio.url)
    versions = {app.post("/setup", json=body).json["model_version"] for app in (small, other)}
    assert len(versions) == 2


def test_a_data_folder_that_cannot_be_written_is_a_start_up_error(tmp_path, predictor):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="DATA_DIR must be a folder"):
        create_app(Settings(data_dir=tmp_path / "file"), predictor)


def test_a_request_is_not_changed_by_being_answered(client, label_studio):
    request = payload("12")
    serve_images(label_studio, request)
    before = copy.deepcopy(request)
    predicted(client, request)
    assert request == before
