"""Trained versions as the whole service serves them: real adapters, real requests."""

from __future__ import annotations

import copy
import itertools
import json
import threading
from collections import defaultdict

import pytest
import torch
from pydantic import SecretStr

from ml_backend.app import create_app
from ml_backend.loading import open_registry
from ml_backend.settings import Settings
from sam_ext.adapters import apply_adapter
from sam_ext.checkpoints import load_sam, save_checkpoint
from sam_ext.colours import ColourConfig
from sam_ext.predictor import Predictor
from sam_ext.sam import weights_fingerprint
from sam_ext.stable_sam import StableSam, save_stable_sam
from tests.conftest import build_small_sam
from tests.ml_backend.backend import payload, serve_images, setup_body
from tests.ml_backend.servers import LEGACY_TOKEN, FakeLabelStudio
from tests.ml_backend.test_prefetch import until
from tests.ml_backend.versions import add_version

CLICK = payload("10")
PROJECT = CLICK["project"]


@pytest.fixture
def label_studio():
    with FakeLabelStudio() as server:
        serve_images(server, CLICK)
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
    )


@pytest.fixture
def registry(settings):
    return open_registry(settings)


@pytest.fixture
def versions(registry, settings, tmp_path):
    """Two versions of the project; none is active."""
    sam = load_sam(settings.sam_model, weights_dir=settings.weights_dir)
    for seed in (1, 2):
        add_version(registry, PROJECT, sam, tmp_path / "adapter", seed=seed)
    return registry.project(PROJECT)


@pytest.fixture
def make_app(settings):
    apps = []

    def make(**changes):
        apps.append(create_app(settings.model_copy(update=changes)))
        return apps[-1]

    yield make
    for app in apps:
        app.extensions["ml_backend"].service.close()


def answer(client, request=CLICK) -> tuple[str, str]:
    """Ask for a prediction; gives the version that it carries, and its regions without ids."""
    response = client.post("/predict", json=request)
    assert response.status_code == 200, response.json
    (prediction,) = response.json["results"]
    assert prediction["model_version"] == response.json["model_version"]
    for region in prediction["result"]:
        del region["id"]
    return prediction["model_version"], json.dumps(prediction["result"])


def test_every_version_has_its_own_answers_and_rollback_gives_the_old_ones_exactly(
    make_app, versions
):
    client = make_app().test_client()
    names = [version.model_version for version in versions.versions()]
    base, regions = answer(client)
    answers = {base: regions}
    for number, name in enumerate(names, start=1):
        versions.activate(number)
        until(lambda name=name: answer(client)[0] == name)
        answers[name] = answer(client)[1]
    assert len(set(answers.values())) == 3
    for name in (names[0], base):
        versions.rollback()
        assert answer(client) == (name, answers[name])
    # So does a process that knows nothing of what was before.
    versions.activate(2)
    assert answer(make_app().test_client()) == (names[1], answers[names[1]])


def test_no_request_fails_while_versions_come_and_go(make_app, versions, registry):
    """Each answer is whole: of the version that it carries, whatever happens meanwhile."""
    app = make_app(models_loaded=1)
    names = [version.model_version for version in versions.versions()]
    base, _ = answer(app.test_client())
    seen: defaultdict[str, set[str]] = defaultdict(set)
    failures: list[BaseException] = []
    counts = itertools.count()
    stop = threading.Event()

    def draw() -> None:
        client, request = app.test_client(), copy.deepcopy(CLICK)
        while not stop.is_set():
            try:
                version, regions = answer(client, request)
            except BaseException as error:  # noqa: BLE001  # of a thread, for the main one
                failures.append(error)
                return
            seen[version].add(regions)
            next(counts)

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    client = app.test_client()
    try:
        for change, name in [
            (lambda: versions.activate(1), names[0]),
            (lambda: versions.activate(2), names[1]),
            (versions.rollback, names[0]),
            (lambda: versions.activate(None), base),
            (versions.rollback, names[0]),
            (versions.rollback, base),
        ] * 2:
            change()
            until(lambda name=name: answer(client)[0] == name)
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    assert failures == []
    assert {version: len(answers) for version, answers in seen.items()} == dict.fromkeys(
        [base, *names], 1
    )
    assert next(counts) > 12


def test_setup_and_versions_name_the_active_version_before_it_is_loaded(
    make_app, versions, label_studio, monkeypatch
):
    def fail(*_arguments: object) -> None:
        raise AssertionError("it was loaded")

    app = make_app()
    monkeypatch.setattr("ml_backend.loading.load_adapter", fail)
    client, body = app.test_client(), setup_body(CLICK, label_studio.url)
    base = client.post("/setup", json=body).json["model_version"]
    names = [version.model_version for version in versions.versions()]
    for number, name in enumerate(names, start=1):
        versions.activate(number)
        assert client.post("/setup", json=body).json == {"model_version": name}
    assert client.post("/setup", json=body | {"project": "99.5"}).json == {"model_version": base}
    opened = payload("20") | {"project": "99.5"}
    assert client.post("/predict", json=opened).json["model_version"] == base

    assert client.get("/versions").json == {"versions": [base, *names]}
    for project, found in ((PROJECT, names), ("99.5", [])):
        assert client.get(f"/versions?project={project}").json == {"versions": [base, *found]}
        asked = client.post("/versions", json={"project": project}).json
        assert asked == {"versions": [base, *found]}
    assert client.get("/versions?project=../x").status_code == 400


def test_health_tells_strangers_of_no_folder(make_app, versions):
    credentials = {"basic_auth_user": "user", "basic_auth_pass": SecretStr("pass")}
    client, auth = make_app(**credentials).test_client(), ("user", "pass")
    versions.find(2).adapter.write_bytes(b"poison")
    versions.activate(2)

    def told(**options):
        assert client.post("/predict", json=CLICK, auth=auth).status_code == 200
        return client.get("/health", **options).json["problems"]

    until(told)
    assert told() == ["1 problems; with basic auth, this and the page at / say more"]
    assert told(auth=auth)[0].startswith(f"project {PROJECT} is served by ")


@pytest.mark.parametrize("harm", ["changed", "of-another-model", "not-finite"])
def test_a_poisoned_adapter_costs_no_answer_and_is_told_in_one_sentence(
    make_app, versions, registry, settings, tmp_path, label_studio, caplog, harm
):
    client = make_app().test_client()
    base = answer(client)
    if harm == "changed":
        versions.find(2).adapter.write_bytes(b"poison")
    elif harm == "of-another-model":
        add_version(registry, PROJECT, build_small_sam(7), tmp_path / "other")
    else:
        sam = build_small_sam()
        path = add_version(registry, PROJECT, sam, tmp_path / "nan").adapter
        poisoned = path.read_bytes()[:-4] + b"\x00\x00\xc0\x7f"  # the last number is NaN
        (tmp_path / "nan").write_bytes(poisoned)
        versions.add(tmp_path / "nan", {"model": "small"})
    versions.activate(1)
    first = versions.find(1).model_version
    until(lambda: answer(client)[0] == first)
    good = answer(client)
    versions.activate(versions.versions()[-1].number)

    until(lambda: answer(client) == good and client.get("/health").json["problems"])
    (problem,) = client.get("/health").json["problems"]
    assert problem.startswith(f"project {PROJECT} is served by {first} instead: ")
    assert caplog.text.count(problem) == 1
    for app in (client, make_app().test_client()):
        assert answer(app) == good
        told = app.post("/setup", json=setup_body(CLICK, label_studio.url)).json
        assert told == {"model_version": first}
    assert [versions.rollback().number, versions.rollback()] == [1, None]
    assert answer(client) == base
    assert client.get("/health").json["problems"] == []


@pytest.mark.parametrize("scope", ["all", "points"])
def test_versions_have_the_options_of_the_base_model_and_its_plugin(
    make_app, versions, settings, tmp_path, scope
):
    sam = load_sam(settings.sam_model, weights_dir=settings.weights_dir)
    plugin = StableSam(scope=scope)
    torch.nn.init.normal_(plugin.transform.weight, std=0.1)
    path = tmp_path / "small.stable.safetensors"
    save_stable_sam(plugin, path, base=weights_fingerprint(sam))
    versions.activate(1)
    models = make_app(sam_resolution="square").extensions["ml_backend"].service.models
    predictor = models.for_project(PROJECT).predictor
    adapted = apply_adapter(sam, versions.find(1).adapter)
    expected = Predictor(adapted, precision="fp32", stable_sam=plugin, colours=ColourConfig())
    assert predictor.fingerprint == expected.fingerprint
    assert models.base.predictor.stable_sam is not None


def test_embeddings_of_a_version_go_with_it(make_app, versions, settings, registry, tmp_path):
    app = make_app()
    versions.activate(1)
    answer(app.test_client())
    folder = settings.embeddings_dir
    (note,) = folder.glob("of-*")
    assert (folder / note.read_text()).resolve() == versions.find(1).folder.resolve()
    until(lambda: list(folder.glob(f"{note.name.removeprefix('of-')}-*")))
