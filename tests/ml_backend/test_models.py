from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ml_backend.models import Models, ServedModel
from ml_backend.registry import Registry, Version
from sam_ext.errors import CheckpointError
from sam_ext.predictor import Predictor
from tests.ml_backend.test_prefetch import until

WAIT_S = 20
PROJECT = "1.5"


class Loader:
    """Loads versions as slowly as a test wants, and those in `broken` not at all."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self.go_on = threading.Event()
        self.go_on.set()
        self.broken: dict[str, Exception] = {}
        self.loaded: list[str] = []

    def __call__(self, version: Version) -> Predictor:
        self.loaded.append(version.model_version)
        assert self.go_on.wait(WAIT_S)
        if version.model_version in self.broken:
            raise self.broken[version.model_version]
        return self._predictor


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "projects", keep=10)


@pytest.fixture
def loader(small_sam):
    return Loader(Predictor(small_sam))


@pytest.fixture
def make(registry, loader, small_sam):
    made = []

    def call(*, max_loaded: int = 4) -> Models:
        base = ServedModel(predictor=Predictor(small_sam), model_version="base")
        made.append(Models(base, registry=registry, load=loader, max_loaded=max_loaded))
        return made[-1]

    yield call
    loader.go_on.set()
    for models in made:
        models.close()


@pytest.fixture
def add(registry, tmp_path):
    """Adds versions to a project, and gives their names."""

    def call(
        count: int = 1, *, project: str = PROJECT, active: bool = True, **manifest: object
    ) -> list[str]:
        names = []
        for _ in range(count):
            (tmp_path / "adapter").write_bytes(f"{project} {len(names)}".encode())
            whole = {"model": "tiny"} | manifest
            version = registry.project(project).add(tmp_path / "adapter", whole)
            names.append(version.model_version)
            if active:
                registry.project(project).activate(version.number)
        return names

    return call


def served(models: Models, project: str | None = PROJECT) -> str:
    return models.for_project(project).model_version


def test_without_a_version_it_is_the_base_model_and_nothing_is_loaded(make, add, loader):
    add(project="2.5")
    add(active=False)
    models = make()
    assert [served(models, project) for project in (None, PROJECT, "9.9")] == ["base"] * 3
    assert models.for_project(PROJECT) is models.base
    assert models.version_of(None) == models.version_of(PROJECT) == "base"
    assert loader.loaded == []


def test_a_fresh_process_loads_the_active_version_once_for_all_who_ask(make, add, loader):
    (name,) = add()
    models = make()
    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(lambda _: served(models), range(32))) == {name}
    assert loader.loaded == [name]
    assert models.version_of(PROJECT) == name
    assert served(models, "2.5") == "base"


def test_the_name_is_known_before_anything_is_loaded(make, add, loader):
    (name,) = add()
    assert make().version_of(PROJECT) == name
    assert loader.loaded == []


def test_what_it_finds_without_prompts_is_known_before_anything_is_loaded(
    make, add, loader, registry
):
    models = make()
    assert models.prompt_free_label_of(None) is models.prompt_free_label_of(PROJECT) is None
    add(prompt_free={"label": "Cell"})
    assert models.prompt_free_label_of(PROJECT) == "Cell"
    assert loader.loaded == []
    until(lambda: models.for_project(PROJECT).prompt_free_label == "Cell")
    assert models.prompt_free_label_of(PROJECT) == "Cell"  # as it was chosen
    assert models.prompt_free_label_of("9.9") is models.base.prompt_free_label is None
    add(prompt_free={"label": ""})
    assert models.prompt_free_label_of(PROJECT) == ""
    registry.project(PROJECT).rollback()
    registry.project(PROJECT).rollback()
    assert models.prompt_free_label_of(PROJECT) is None


@pytest.mark.parametrize("mode", [None, True, "Cell", {}, {"label": None}, {"label": 3}])
def test_a_manifest_that_names_no_label_finds_nothing_without_prompts(make, add, mode):
    add(prompt_free=mode)
    assert make().prompt_free_label_of(PROJECT) is None


def test_a_version_that_cannot_be_loaded_finds_nothing_without_prompts(make, add, loader):
    (name,) = add(prompt_free={"label": "Cell"})
    loader.broken[name] = CheckpointError("of another model")
    models = make()
    assert models.for_project(PROJECT) is models.base
    assert models.prompt_free_label_of(PROJECT) is None


def test_who_waits_gets_the_new_version(make, add, loader):
    models = make()
    assert served(models) == "base"
    loader.go_on.clear()
    (name,) = add()
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(models.for_project, PROJECT, wait=True)
        assert served(models) == "base"
        assert not waiting.done()
        loader.go_on.set()
        assert waiting.result(WAIT_S).model_version == name


def test_a_new_version_is_loaded_in_the_background_and_then_served(make, add, loader):
    models = make()
    assert served(models) == "base"
    loader.go_on.clear()
    (first,) = add()
    for _ in range(3):
        assert served(models) == "base"  # and nobody waits
    assert models.version_of(PROJECT) == first
    loader.go_on.set()
    until(lambda: served(models) == first)

    loader.go_on.clear()
    (second,) = add()
    assert served(models) == first
    loader.go_on.set()
    until(lambda: served(models) == second)
    assert loader.loaded == [first, second]


def test_a_version_that_is_in_memory_is_served_at_once(make, add, registry, loader):
    models = make()
    first, second = add(2)
    assert served(models) == second
    project = registry.project(PROJECT)
    project.activate(1)
    until(lambda: served(models) == first)
    loader.go_on.clear()
    project.rollback()
    assert served(models) == second
    project.activate(None)
    assert served(models) == "base"
    project.activate(1)
    assert served(models) == first
    assert loader.loaded == [second, first]


def test_rolling_back_to_the_base_model_gives_the_very_same_one(make, add, registry):
    models = make()
    before = models.for_project(PROJECT)
    (name,) = add()
    until(lambda: served(models) == name)
    registry.project(PROJECT).rollback()
    assert models.for_project(PROJECT) is before


def test_only_so_many_are_kept_and_the_one_used_longest_ago_goes(make, add, loader):
    names = {project: add(project=project)[0] for project in ("1.5", "2.5", "3.5")}
    models = make(max_loaded=2)
    for project in ("1.5", "2.5", "1.5", "3.5", "1.5"):
        assert served(models, project) == names[project]
    assert loader.loaded == [names[project] for project in ("1.5", "2.5", "3.5")]
    assert len(models.predictors) == 3
    assert served(models, "2.5") == names["2.5"]  # again, and it waits for it
    assert loader.loaded[-1] == names["2.5"]


def test_only_so_many_projects_are_remembered(make):
    models = make()
    for number in range(400):
        assert served(models, str(number)) == "base"
    assert len(models._choices) <= 256


ERROR = CheckpointError("the adapter must be of this model")


def test_a_version_that_cannot_be_loaded_leaves_what_was_served(make, add, loader, caplog):
    models = make()
    (good,) = add()
    assert served(models) == "base" or served(models) == good
    until(lambda: served(models) == good)
    (bad,) = add()
    loader.broken[bad] = ERROR
    assert served(models) == good
    until(lambda: models.errors)
    for _ in range(5):
        assert served(models) == models.version_of(PROJECT) == good
    sentence = f"project 1.5 is served by {good} instead: the adapter must be of this model"
    assert models.errors == {"1.5": sentence}
    assert [record.message for record in caplog.records if record.levelno == logging.ERROR] == [
        sentence
    ]
    assert caplog.records[-1].exc_info is None
    assert loader.loaded == [good, bad]


@pytest.mark.parametrize(
    ("broken", "expected"), [([2], 0), ([1, 2], None)], ids=["the-one-before", "the-base-model"]
)
def test_a_fresh_process_serves_what_was_active_before_what_cannot_be_loaded(
    make, add, loader, broken, expected
):
    names = add(2)
    for number in broken:
        loader.broken[names[number - 1]] = RuntimeError("out of memory")
    models = make()
    wanted = "base" if expected is None else names[expected]
    assert models.version_of(PROJECT) == names[1]
    assert served(models) == wanted
    assert models.version_of(PROJECT) == wanted
    assert models.errors == {
        "1.5": f"project 1.5 is served by {wanted} instead: RuntimeError (out of memory)"
    }


def test_a_changed_adapter_is_not_loaded_at_all(make, add, loader, registry):
    add()
    registry.project(PROJECT).find(1).adapter.write_bytes(b"poison")
    models = make()
    assert served(models) == "base"
    assert loader.loaded == []
    assert "must have the SHA-256" in models.errors["1.5"]


@pytest.mark.parametrize("name", ["versions/2/manifest.json", "active.json"])
def test_a_damaged_registry_costs_no_answer_and_is_told(make, add, tmp_path, name):
    first, _ = add(2)
    path = tmp_path / "projects" / PROJECT / name
    path.write_bytes(b"{")
    models = make()
    assert models.version_of(PROJECT) == "base"
    assert served(models) == ("base" if name == "active.json" else first)
    assert f"{name} must be" in models.errors["1.5"]


def test_a_disk_that_does_not_answer_leaves_what_was_served(make, add, registry, tmp_path, caplog):
    models = make()
    (name,) = add()
    until(lambda: served(models) == name)
    path = tmp_path / "projects" / PROJECT / "active.json"
    path.unlink()
    path.mkdir()
    for _ in range(3):
        assert served(models) == name
    assert caplog.text.count("active.json must be") == 1
    assert served(make()) == "base"
    assert "active.json must be a file that can be read" in models.errors["1.5"]
    path.rmdir()
    assert served(models) == "base"
    assert models.errors == {}


def test_what_went_wrong_is_forgotten_once_it_is_mended(make, add, loader, registry, caplog):
    (bad,) = add()
    loader.broken[bad] = ERROR
    models = make()
    assert served(models) == "base"
    assert models.errors
    registry.project(PROJECT).rollback()
    assert models.errors == {}
    assert served(models) == "base"
    loader.broken.clear()
    registry.project(PROJECT).activate(1)
    until(lambda: served(models) == bad)
    assert models.errors == {}
