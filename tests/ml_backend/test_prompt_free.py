"""Tasks without any prompt, in projects whose version finds its one label's things by itself."""

from __future__ import annotations

import threading
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from ml_backend.app import create_app
from ml_backend.loading import open_registry
from ml_backend.models import Models
from ml_backend.settings import Settings
from sam_ext.adapters import load_adapter
from sam_ext.checkpoints import load_sam, save_checkpoint
from sam_ext.prompt_free import answer_prompt_free
from tests.conftest import build_small_sam
from tests.ml_backend.backend import encoded, mask_of, payload, random_image, serve_images
from tests.ml_backend.servers import LEGACY_TOKEN, Answer, FakeLabelStudio
from tests.ml_backend.test_prefetch import until
from tests.ml_backend.versions import add_version

OPENED = payload("20")
PROJECT = OPENED["project"]
LABEL = "Cat"


@pytest.fixture
def label_studio():
    with FakeLabelStudio() as server:
        serve_images(server, OPENED)
        yield server


@pytest.fixture
def settings(tmp_path, label_studio):
    save_checkpoint(build_small_sam(), tmp_path / "small.safetensors", metadata={})
    return Settings(
        data_dir=tmp_path / "data",
        sam_model=str(tmp_path / "small.safetensors"),
        sam_precision="fp32",
        label_studio_url=label_studio.url,
        label_studio_api_key=LEGACY_TOKEN,
        sam_prefetch=0,
    )


@pytest.fixture
def sam(settings):
    return load_sam(settings.sam_model, weights_dir=settings.weights_dir)


@pytest.fixture
def versions(settings):
    return open_registry(settings).project(PROJECT)


@pytest.fixture
def activate(settings, sam, tmp_path):
    """Adds a version that finds a label by itself, and has it served."""

    def call(label: str | None = LABEL, *, sam=sam):
        registry = open_registry(settings)
        mode = None if label is None else {"label": label}
        path = tmp_path / "adapter"
        version = add_version(registry, PROJECT, sam, path, prompt_free=mode)
        registry.project(PROJECT).activate(version.number)
        return version

    return call


@pytest.fixture
def make_client(settings):
    apps = []

    def make(**changes):
        apps.append(create_app(settings.model_copy(update=changes)))
        return apps[-1].test_client()

    yield make
    for app in apps:
        app.extensions["ml_backend"].service.close()


def predicted(client, request=OPENED):
    response = client.post("/predict", json=request)
    assert response.status_code == 200, response.json
    return response.json["results"]


def asked(config: str, **data: object) -> dict:
    """The request for one task, with other tags or another task."""
    task = OPENED["tasks"][0]
    return OPENED | {"label_config": config, "tasks": [task | {"data": task["data"] | data}]}


def config_of(image: str, *tags: str) -> str:
    return f"<View>{image}{''.join(tags)}</View>"


IMAGE = '<Image name="image" value="$image"/>'
BRUSH = '<BrushLabels name="mask" toName="image"><Label value="Cat"/></BrushLabels>'


def test_each_piece_of_what_is_found_is_a_region_with_the_label(
    make_client, activate, label_studio
):
    version = activate()
    client = make_client()
    results = predicted(client)
    models = client.application.extensions["ml_backend"].service.models
    predictor = models.for_project(PROJECT).predictor
    assert len(results) == 2
    for task, prediction in zip(OPENED["tasks"], results, strict=True):
        assert prediction["model_version"] == version.model_version
        with Image.open(BytesIO(label_studio.routes[task["data"]["image"]].body)) as file:
            pixels = np.asarray(file)
        found = answer_prompt_free(predictor, predictor.embed(pixels)).instances
        assert len(prediction["result"]) == len(found) > 1
        for region, instance in zip(prediction["result"], found, strict=True):
            np.testing.assert_array_equal(mask_of(region), instance.mask)
            assert region["value"]["brushlabels"] == [LABEL]
            assert region["score"] == pytest.approx(instance.score, abs=6e-5)
            assert region["meta"] == {"prompt_free": True}
        assert len({region["id"] for region in prediction["result"]}) == len(found)
        scores = [region["score"] for region in prediction["result"]]
        assert prediction["score"] == pytest.approx(np.mean(scores))


def test_rolled_back_nothing_is_said_of_such_tasks(make_client, activate, versions, label_studio):
    client = make_client()
    assert predicted(client) == [[], []]
    name = activate().model_version
    until(lambda: predicted(client)[0] and predicted(client)[0]["model_version"] == name)
    versions.rollback()
    assert predicted(client) == [[], []]
    assert predicted(client, OPENED | {"project": "99.5"}) == [[], []]


def test_tasks_wait_for_a_new_version_that_finds_something(make_client, activate, monkeypatch):
    """With the version before it, all of them would be said to have nothing on them."""
    is_waited_for = threading.Event()

    def for_project(models, name, *, wait=False):
        if wait:
            is_waited_for.set()
        return choose(models, name, wait=wait)

    def load(*arguments):
        assert is_waited_for.wait(20)
        return load_adapter(*arguments)

    client = make_client()
    client.application.extensions["ml_backend"].service.models.for_project(PROJECT)  # the base one
    choose = Models.for_project
    monkeypatch.setattr(Models, "for_project", for_project)
    monkeypatch.setattr("ml_backend.loading.load_adapter", load)
    name = activate().model_version
    assert [prediction["model_version"] for prediction in predicted(client)] == [name] * 2


def test_a_version_that_needs_prompts_is_not_even_loaded_for_them(
    make_client, activate, monkeypatch, label_studio
):
    activate(None)

    loaded = []
    client = make_client()
    monkeypatch.setattr("ml_backend.loading.load_adapter", lambda *path: loaded.append(path))
    assert predicted(client) == [[], []]
    assert loaded == label_studio.requests == []


def test_prompts_come_first(make_client, activate):
    activate()
    request = asked(payload("13")["label_config"])
    drawn = payload("12")["params"]["context"]["result"]
    request["tasks"][0]["annotations"] = [{"id": 1, "result": drawn}]
    (prediction,) = predicted(make_client(), request)
    (region,) = prediction["result"]
    assert "meta" not in region


def test_it_comes_before_automatic_masks(make_client, activate):
    activate()
    for prediction in predicted(make_client(sam_automatic=True)):
        assert all(region["meta"] == {"prompt_free": True} for region in prediction["result"])


@pytest.mark.parametrize(
    ("tags", "label", "types", "labels"),
    [
        pytest.param(
            ['<PolygonLabels name="p" toName="image"><Label value="Cat"/></PolygonLabels>'],
            LABEL,
            {"polygonlabels"},
            {("Cat",)},
            id="polygons",
        ),
        pytest.param(
            [BRUSH.replace("<Label ", '<Label value="Dog"/><Label ')],
            LABEL,
            {"brushlabels"},
            {("Cat",)},
            id="more-labels-by-now",
        ),
        pytest.param([BRUSH], "", {"brushlabels"}, {None}, id="learnt-without-a-label"),
        pytest.param(
            [
                '<Brush name="mask" toName="image"/>',
                '<Labels name="l" toName="image"><Label value="Cat"/></Labels>',
            ],
            LABEL,
            {"brush", "labels"},
            {("Cat",), None},
            id="a-labels-tag",
        ),
    ],
)
def test_the_regions_are_what_the_config_has(make_client, activate, tags, label, types, labels):
    activate(label)
    (prediction,) = predicted(make_client(), asked(config_of(IMAGE, *tags)))
    regions = prediction["result"]
    assert {region["type"] for region in regions} == types
    found = {value if value is None else tuple(value) for value in map(label_of, regions)}
    assert found == labels


def label_of(region: dict) -> list[str] | None:
    return region["value"].get(region["type"])


def test_a_label_that_the_config_has_no_more_is_one_sentence(make_client, activate):
    name = activate().model_version
    renamed = asked(config_of(IMAGE, BRUSH.replace("Cat", "Feline")))
    response = make_client().post("/predict", json=renamed)
    assert response.status_code == 400
    assert response.json["error"] == (
        f"the labelling config must have a tag to answer 'Cat' into, which {name} finds without "
        "prompts, got none; train again, or roll back"
    )


def test_each_image_of_a_list_is_answered(make_client, activate, label_studio):
    activate()
    for name, size_hw in (("a", (40, 60)), ("b", (90, 50))):
        body = encoded(random_image(1, size_hw=size_hw))
        label_studio.routes[f"/data/{name}.png"] = Answer(body)
    config = config_of(IMAGE.replace('value="$image"', 'valueList="$all"'), BRUSH)
    request = asked(config, all=["/data/a.png", "/data/b.png"])
    (prediction,) = predicted(make_client(), request)
    sizes = {
        (region["item_index"], region["original_height"], region["original_width"])
        for region in prediction["result"]
    }
    assert sizes == {(0, 40, 60), (1, 90, 50)}


def test_an_image_that_no_tag_is_for_is_left_alone(make_client, activate, label_studio):
    activate()
    plan = '<Image name="plan" value="$plan"/>'
    (prediction,) = predicted(make_client(), asked(config_of(IMAGE, plan, BRUSH), plan="/gone.png"))
    assert {region["to_name"] for region in prediction["result"]} == {"image"}
    assert "/gone.png" not in [request.path for request in label_studio.requests]


def test_a_version_of_another_model_is_answered_as_the_base_model_is(make_client, activate):
    activate(sam=build_small_sam(7))
    client = make_client()
    assert predicted(client) == [[], []]
    assert predicted(client) == [[], []]
    (problem,) = client.get("/health").json["problems"]
    assert "must be an adapter of the model" in problem
