from __future__ import annotations

import pytest

from ml_backend.embeddings import EmbeddingKey, EmbeddingStore
from ml_backend.errors import LabelConfigError, LabelStudioError, SettingsError
from ml_backend.images import ImageLoader
from ml_backend.label_studio import LabelStudioClient
from ml_backend.models import Models, ServedModel
from ml_backend.registry import Registry, Version
from ml_backend.settings import Settings
from ml_backend.warm import WarmReport, warm_project
from sam_ext.adapters import apply_adapter
from tests.ml_backend.backend import encoded, random_image
from tests.ml_backend.servers import Answer, FakeLabelStudio
from tests.ml_backend.test_engine import CountingPredictor
from tests.ml_backend.versions import add_version

CONFIG = '<View><Image name="image" value="$image"/></View>'


@pytest.fixture
def label_studio():
    with FakeLabelStudio() as server:
        server.projects = [
            {
                "id": 1,
                "label_config": CONFIG,
                "task_number": 3,
                "created_at": "1970-01-01T00:00:05Z",
            }
        ]
        for number in (1, 2, 3):
            path = f"/data/upload/1/{number}.png"
            body = encoded(random_image(number, size_hw=(40, 56)))
            server.routes[path] = Answer(body)
            server.tasks.append({"id": number, "project": 1, "data": {"image": path}})
        yield server


@pytest.fixture
def predictor(small_sam):
    return CountingPredictor(small_sam)


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "projects", keep=3)


@pytest.fixture
def models(predictor, registry, small_sam):
    def load(version: Version) -> CountingPredictor:
        return CountingPredictor(apply_adapter(small_sam, version.adapter))

    base = ServedModel(predictor=predictor, model_version="base")
    models = Models(base, registry=registry, load=load, max_loaded=1)
    yield models
    models.close()


@pytest.fixture
def warm(tmp_path, label_studio, models):
    client = LabelStudioClient(label_studio.url, label_studio.personal_access_token)
    settings = Settings(data_dir=tmp_path)
    store = EmbeddingStore(settings.embeddings_dir, max_bytes=10**7)

    def call(project=1, **options) -> WarmReport:
        options = {"settings": settings, "models": models, "store": store} | options
        return warm_project(client, project, **options)

    return call


def test_every_image_is_where_the_service_looks_for_it(warm, tmp_path, label_studio, predictor):
    told = []
    report = warm(progress=lambda *counts: told.append(counts))
    assert (report.embedded, report.already_there, report.failures) == (3, 0, [])
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    settings = Settings(data_dir=tmp_path)
    client = LabelStudioClient(label_studio.url, label_studio.personal_access_token)
    store = EmbeddingStore(settings.embeddings_dir, max_bytes=10**7)
    for task in label_studio.tasks:
        image = ImageLoader(settings, lambda _: client).load(task, "image")
        kept = store.read(EmbeddingKey(image.content_hash, predictor.embedding_fingerprint))
        assert kept.original_size == (40, 56)
    assert report.nbytes == 3 * kept.nbytes


def test_the_version_that_the_project_is_served_embeds(
    warm, registry, models, predictor, small_sam, tmp_path
):
    version = add_version(registry, "1.5", small_sam, tmp_path / "adapter")
    registry.project("1.5").activate(version.number)
    assert warm().embedded == 3
    assert predictor.crops == []
    assert len(models.for_project("1.5").predictor.crops) == 3
    registry.project("1.5").rollback()
    assert warm().embedded == 3
    assert len(predictor.crops) == 3


def test_it_resumes_where_it_was_stopped(warm, label_studio, predictor, tmp_path):
    class StoppedError(Exception):
        pass

    def stop(done: int, _total: int) -> None:
        if done == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        warm(progress=stop)
    report = warm()
    assert (report.embedded, report.already_there) == (1, 2)
    assert len(predictor.crops) == 3

    broken = next((tmp_path / "embeddings").iterdir())
    broken.write_bytes(broken.read_bytes()[:-1])
    report = warm()
    assert (report.embedded, report.already_there) == (1, 2)


def test_a_project_of_more_tasks_than_one_answer_holds_is_done_to_its_end(warm, label_studio):
    path = label_studio.tasks[0]["data"]["image"]
    for number in range(4, 251):
        label_studio.tasks.append({"id": number, "project": 1, "data": {"image": path}})
    report = warm()
    assert (report.embedded, report.already_there) == (3, 247)


def test_failures_are_listed_and_the_others_are_done(warm, label_studio):
    label_studio.routes["/data/upload/1/1.png"] = Answer(b"no picture")
    label_studio.tasks[1]["data"] = {}
    report = warm()
    assert report.embedded == 1
    assert [failure.partition(" must ")[0] for failure in report.failures] == [
        "task 1: decode: '/data/upload/1/1.png'",
        "task 2: address: data.image of task 2",
    ]


def test_lists_of_images_are_embedded_whole(warm, label_studio):
    label_studio.projects[0]["label_config"] = CONFIG.replace("value=", "valueList=")
    paths = [task["data"]["image"] for task in label_studio.tasks]
    label_studio.tasks = [{"id": 1, "project": 1, "data": {"image": paths}}]
    assert warm().embedded == 3


def test_a_project_without_images_or_that_is_not_there_is_refused(warm, label_studio):
    label_studio.projects[0]["label_config"] = "<View/>"
    with pytest.raises(LabelConfigError):
        warm()
    label_studio.routes["/api/projects/7/"] = Answer(status=404)
    with pytest.raises(LabelStudioError, match="status 404"):
        warm(7)


def test_without_a_disk_to_keep_them_on_it_stops_at_once(warm, tmp_path, predictor):
    with pytest.raises(SettingsError, match="EMBEDDING_DISK_BYTES must be above 0"):
        warm(store=None)
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="got no room for it"):
        warm(store=EmbeddingStore(tmp_path / "file", max_bytes=10**7))
    assert len(predictor.crops) == 1
