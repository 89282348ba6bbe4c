"""One training job against a small Label Studio, with everything that can go wrong on the way."""

from __future__ import annotations

import errno
import json
import shutil
import sqlite3
from collections import Counter
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ml_backend import fit as module
from ml_backend import jobs as jobs_module
from ml_backend.connections import Connections
from ml_backend.errors import JobsUnavailableError
from ml_backend.fit import Methods, is_held_out, run_job, split_tasks
from ml_backend.images import ImageLoader
from ml_backend.jobs import JobStore
from ml_backend.loading import load_base, open_registry
from sam_ext.adapters import read_adapter
from sam_ext.errors import CheckpointError, ConfigError
from sam_ext.sam import weights_fingerprint
from sam_ext.stable_sam import StableSam
from sam_ext.training.finetune import PROMPT_FREE_CHANCE
from tests.ml_backend.backend import encoded, random_image
from tests.ml_backend.servers import Answer, FakeLabelStudio
from tests.ml_backend.training import (
    CONFIG,
    PROJECT,
    SIZE,
    add_task,
    fake_adapt,
    fake_finetune,
    fake_judge,
    fill_project,
    judgement,
    outline,
    small_settings,
)
from tests.ml_backend.versions import add_version

METHODS = Methods(adapt=fake_adapt, finetune=fake_finetune, judge=fake_judge, sleep=lambda _: None)


@pytest.fixture
def label_studio():
    with FakeLabelStudio() as server:
        fill_project(server)
        yield server


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(module, "_RETRIES_S", (0.0, 0.0))


class Workplace:
    """All that a job needs, and the job."""

    def __init__(self, folder, server, *, method="auto", **settings):
        self.settings = small_settings(folder, server, **settings)
        self.jobs = JobStore(self.settings.data_dir)
        self.registry = open_registry(self.settings)
        self.versions = self.registry.project(PROJECT)
        self.job_id = self.jobs.create(PROJECT, "start_training", method).id
        self.run_dir = self.settings.runs_dir / str(self.job_id)

    def run(self, **options):
        client_for = Connections(self.settings).client_for
        return run_job(
            self.job_id,
            **{
                "settings": self.settings,
                "jobs": self.jobs,
                "registry": self.registry,
                "images": ImageLoader(self.settings, client_for),
                "client_for": client_for,
                "methods": METHODS,
            }
            | options,
        )

    def again(self, method="auto"):
        """Another job of the same project."""
        self.job_id = self.jobs.create(PROJECT, "start_training", method).id
        self.run_dir = self.settings.runs_dir / str(self.job_id)


@pytest.fixture
def place(tmp_path, label_studio):
    return Workplace(tmp_path, label_studio)


def test_a_job_ends_as_a_version_that_is_served(place, label_studio):
    place.jobs.note_annotation(PROJECT, 101)
    job = place.run()

    assert (job.state, job.reason, job.version) == ("promoted", "It is better.", 1)
    active = place.versions.active()
    assert active.number == 1
    active.check()
    manifest = active.manifest
    assert active.model_version.startswith("sam-small-v1-")
    assert manifest["base"] == weights_fingerprint(load_base(place.settings))
    assert manifest["job"] == {"id": job.id, "created_at": job.created_at}
    assert (manifest["promoted"], manifest["sentence"]) == (True, "It is better.")
    assert sorted(manifest["learnt_from"] + manifest["judged_by"]) == list(range(1, 9))
    assert len(manifest["judged_by"]) == 2
    assert manifest["objects"] == 6
    assert manifest["left_out"] == []
    assert (manifest["method"], manifest["method_asked"]) == ("wesam", "auto")
    assert manifest["method_reason"] == job.progress["method_reason"] != ""
    assert job.progress["method"] == "wesam"
    assert manifest["prompt_free"] is None
    assert manifest["config"]["steps"] == 3
    curve = json.loads((active.folder / "curves.json").read_text())
    assert curve == [
        {"step": 1, "dice": 1.0, "mean_iou": pytest.approx(0.6)},
        {"step": 2, "dice": 1 / 2, "mean_iou": pytest.approx(0.61)},  # a tenth of the way to 0.7
        {"step": 3, "dice": 1 / 3, "mean_iou": pytest.approx(0.629)},
    ]
    assert json.loads((active.folder / "judgement.json").read_text())["rows"][0]["value"] == 0.5
    assert set(manifest["pictures"]) == {
        f"{when}-{index}.jpg" for when in ("before", "after") for index in (1, 2)
    }
    for name, task_id in manifest["pictures"].items():
        assert task_id in manifest["judged_by"]
        with Image.open(active.folder / name) as picture:
            assert picture.size == SIZE[::-1]
    assert place.jobs.last_annotation_at(PROJECT) is None
    assert not place.run_dir.exists()
    progress = job.progress
    assert (progress["step"], progress["steps"], progress["to_judge"]) == (3, 3, 2)


def test_only_annotated_tasks_are_asked_for_and_no_token_goes_elsewhere(place, label_studio):
    place.run()
    (lists,) = [r for r in label_studio.requests if r.path.startswith("/api/tasks/")][:1]
    assert lists.query["fields"] == ["all"]
    assert set(label_studio.sent("authorization")) - {None} == {
        f"Bearer {label_studio.access_token}"
    }


def test_what_is_no_better_is_kept_and_not_served(place):
    job = place.run(methods=replace(METHODS, judge=lambda *_, **__: judgement(promoted=False)))
    assert (job.state, job.reason, job.version) == ("rejected", "It is no better.", 1)
    assert place.versions.active() is None
    assert [version.number for version in place.versions.versions()] == [1]


def test_the_candidate_is_judged_against_what_is_served(place, tmp_path):
    sam = load_base(place.settings)
    add_version(place.registry, PROJECT, sam, tmp_path / "a", seed=3)
    place.versions.activate(1)
    seen = {}

    def judge(models, *args, **options):
        seen.update({name: model.fingerprint for name, model in models.items()})
        return fake_judge(models, *args, **options)

    assert place.run(methods=replace(METHODS, judge=judge)).version == 2
    assert len(set(seen.values())) == 3
    assert place.versions.active().number == 2


def test_a_served_version_that_is_poisoned_is_judged_as_the_base_model(place, tmp_path, caplog):
    sam = load_base(place.settings)
    version = add_version(place.registry, PROJECT, sam, tmp_path / "a")
    place.versions.activate(1)
    version.adapter.write_bytes(b"poison")
    seen = {}

    def judge(models, *args, **options):
        seen.update({name: model.fingerprint for name, model in models.items()})
        return fake_judge(models, *args, **options)

    assert place.run(methods=replace(METHODS, judge=judge)).state == "promoted"
    assert seen["active"] == seen["base"] != seen["candidate"]
    assert "judges against the base model alone" in caplog.text


def test_too_few_labels_say_how_many_are_missing(place, label_studio):
    label_studio.tasks = label_studio.tasks[:5]
    add_task(label_studio, 9, was_cancelled=True)
    add_task(label_studio, 10, result=[])
    label_studio.tasks.append({"id": 11, "project": 1, "data": {}, "annotations": []})
    job = place.run()
    assert job.state == "rejected"
    assert job.reason == ("a training must have at least 8 tasks with labels, got 5: 3 are missing")
    assert place.versions.versions() == []


def test_images_that_are_gone_are_left_out(place, label_studio):
    add_task(label_studio, 9)
    label_studio.routes["/data/upload/1/3.png"] = Answer(b"gone", 404)
    assert place.run().state == "promoted"
    manifest = place.versions.active().manifest
    assert 3 not in manifest["learnt_from"] + manifest["judged_by"]
    (reason,) = manifest["left_out"]
    assert reason.startswith("task 3: fetch: '/data/upload/1/3.png' must be")


def test_too_many_images_that_are_gone_are_the_reason(place, label_studio):
    label_studio.routes["/data/upload/1/3.png"] = Answer(b"gone", 404)
    job = place.run()
    assert job.state == "rejected"
    assert "got 7: 1 are missing; 1 things were left out, first: task 3: fetch:" in job.reason


@pytest.mark.parametrize("scope", ["all", "points"])
def test_versions_are_served_with_the_plugin_and_trained_with_one_for_all_prompts(
    place, monkeypatch, scope
):
    plugin, used = StableSam(scope=scope).eval(), []
    monkeypatch.setattr(module, "load_plugin", lambda *_: plugin)

    def adapt(*args, stable_sam, **options):
        used.append(stable_sam)
        return fake_adapt(*args, **options)

    def judge(predictors, *args, **options):
        used.append(predictors["candidate"].stable_sam)
        assert predictors["active"].stable_sam is not None
        assert predictors["base"].stable_sam is not None
        return fake_judge(predictors, *args, **options)

    assert place.run(methods=Methods(adapt=adapt, judge=judge)).state == "promoted"
    trained_with, served_with = used
    assert trained_with is (plugin if scope == "all" else None)
    assert served_with is not None


def test_an_image_that_changes_meanwhile_ends_the_job(place, label_studio):
    def adapt(sam, images, config, **options):
        shutil.rmtree(place.settings.images_dir)
        for number in range(1, 9):
            path = f"/data/upload/1/{number}.png"
            label_studio.routes[path] = Answer(encoded(random_image(number, size_hw=SIZE)))
        return fake_adapt(sam, images, config, **options)

    job = place.run(methods=replace(METHODS, adapt=adapt))
    assert job.state == "rejected"
    assert "must stay as it is while a job runs" in job.reason


@pytest.mark.parametrize("when", ["learning", "judging"])
def test_a_label_config_that_changes_meanwhile_rejects_the_job(place, label_studio, when):
    def change():
        label_studio.projects[0]["label_config"] = CONFIG.replace("Cell", "Nucleus")

    def adapt(*args, **options):
        if when == "learning":
            change()
        return fake_adapt(*args, **options)

    def judge(*args, **options):
        if when == "judging":
            change()
        else:
            pytest.fail("it is too late to judge")
        return fake_judge(*args, **options)

    job = place.run(methods=Methods(adapt=adapt, judge=judge))
    assert job.state == "rejected"
    assert job.reason == (
        "the labelling config must stay as it is while a job runs, but was changed; start the "
        "training again"
    )
    assert place.versions.versions() == []


def test_another_colour_is_no_change_of_the_config(place, label_studio):
    def adapt(*args, **options):
        config = CONFIG.replace('"Cell"', '"Cell" background="red"')
        label_studio.projects[0]["label_config"] = config
        return fake_adapt(*args, **options)

    assert place.run(methods=replace(METHODS, adapt=adapt)).state == "promoted"


class Interrupted(FakeLabelStudio):
    """Hangs up on so many requests after a moment that tests choose."""

    def __init__(self):
        super().__init__()
        self.hang_ups = 0

    def answer(self, request):
        if self.hang_ups:
            self.hang_ups -= 1
            raise ConnectionError  # the connection is closed without a word
        return super().answer(request)


@pytest.fixture
def interrupted():
    with Interrupted() as server:
        fill_project(server)
        yield server


@pytest.mark.parametrize("when", ["before", "learning"])
def test_a_label_studio_that_comes_back_costs_nothing(tmp_path, interrupted, when):
    place = Workplace(tmp_path, interrupted)
    interrupted.hang_ups = 2 * (when == "before")

    def adapt(*args, **options):
        interrupted.hang_ups = 2 * (when == "learning")
        return fake_adapt(*args, **options)

    assert place.run(methods=replace(METHODS, adapt=adapt)).state == "promoted"
    assert interrupted.hang_ups == 0


@pytest.mark.parametrize("when", ["before", "images", "learning", "judging"])
def test_a_label_studio_that_stays_away_costs_nothing_that_was_learnt(tmp_path, interrupted, when):
    """Before there is anything to learn from, it fails the job, and nothing else."""
    place = Workplace(tmp_path, interrupted)
    add_version(place.registry, PROJECT, load_base(place.settings), tmp_path / "a")
    place.versions.activate(1)

    def leave(at):
        if at == when:
            interrupted.hang_ups = 10**6

    def adapt(*args, **options):
        leave("learning")
        return fake_adapt(*args, **options)

    def judge(*args, **options):
        leave("judging")
        return fake_judge(*args, **options)

    class Loader(ImageLoader):
        def load(self, *args):
            leave("images")
            return super().load(*args)

    leave("before")
    client_for = Connections(place.settings).client_for
    job = place.run(
        methods=replace(METHODS, adapt=adapt, judge=judge),
        images=Loader(place.settings, client_for),
    )
    if when in ("learning", "judging"):
        assert job.state == "promoted"
        assert place.versions.active().number == 2
        return
    assert job.state == "failed"
    assert "must answer" in job.reason or "must be an address that answers" in job.reason
    assert place.versions.active().number == 1
    assert len(place.versions.versions()) == 1
    assert not place.run_dir.exists()


def test_a_label_studio_that_nobody_named_is_one_sentence(place):
    job = place.run(client_for=lambda _: None)
    assert job.state == "failed"
    assert job.reason == (
        "the Label Studio of project 1.1795194739 must be known, got no address; set "
        "LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY, or save the model's connection in Label "
        "Studio again"
    )


def test_the_same_number_in_another_label_studio_is_refused(place, label_studio):
    label_studio.projects[0]["created_at"] = "2026-11-21T00:00:00Z"
    job = place.run()
    assert job.state == "failed"
    assert job.reason.startswith(f"project 1 of {label_studio.url} must be 1.1795194739, got 1.17")


def test_a_job_is_cancelled_within_a_step(place):
    told = []

    def adapt(sam, images, config, *, run_dir, on_step, stable_sam):
        def cancel(step):
            told.append(step.step)
            if step.step == 2:
                place.jobs.cancel(place.job_id)
            on_step(step)

        return fake_adapt(sam, images, config, run_dir=run_dir, on_step=cancel)

    job = place.run(methods=replace(METHODS, adapt=adapt))
    assert (job.state, job.reason) == ("cancelled", "cancelled by a person")
    assert told == [1, 2]
    assert place.versions.versions() == []
    assert not place.run_dir.exists()


def test_a_job_is_cancelled_within_an_image_of_judging(place):
    def judge(models, images, *, on_progress, **options):
        place.jobs.cancel(place.job_id)
        return fake_judge(models, images, on_progress=on_progress, **options)

    assert place.run(methods=replace(METHODS, judge=judge)).state == "cancelled"
    assert place.versions.versions() == []


def test_a_stopped_worker_leaves_the_job_to_go_on_with_the_same_labels(place, label_studio):
    steps = []

    def adapt(sam, images, config, *, run_dir, on_step, stable_sam):
        def note(step):
            steps.append(step.step)
            on_step(step)

        return fake_adapt(sam, images, config, run_dir=run_dir, on_step=note)

    methods = replace(METHODS, adapt=adapt)
    job = place.run(methods=methods, should_stop=lambda: len(steps) == 2)
    assert (job.state, steps) == ("queued", [1, 2])
    assert (place.run_dir / "adapt").is_dir()

    add_task(label_studio, 9)
    label_studio.tasks[0]["annotations"] = []
    assert place.run(methods=methods).state == "promoted"
    manifest = place.versions.active().manifest
    assert sorted(manifest["learnt_from"] + manifest["judged_by"]) == list(range(1, 9))
    assert [point["step"] for point in place.jobs.get(job.id).progress["curve"]] == [1, 2, 3]


def test_a_run_that_does_not_fit_any_more_begins_anew(place):
    place.run(should_stop=lambda: (place.run_dir / "adapt").exists())
    assert (place.run_dir / "adapt").exists()

    def adapt(sam, images, config, *, run_dir, on_step, stable_sam):
        if run_dir.exists():
            raise CheckpointError("of another run")
        return fake_adapt(sam, images, config, run_dir=run_dir, on_step=on_step)

    assert place.run(methods=replace(METHODS, adapt=adapt)).state == "promoted"


def test_a_worker_that_dies_after_the_version_was_made_makes_no_second_one(place, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(place.versions), "activate", die)
    with pytest.raises(KeyboardInterrupt):
        place.run()
    monkeypatch.undo()
    assert place.versions.active() is None
    (left,) = place.jobs.recover()
    assert left.state == "queued"
    job = place.run(methods=Methods(adapt=None, judge=None))
    assert (job.state, job.version) == ("promoted", 1)
    assert [version.number for version in place.versions.versions()] == [1]
    assert place.versions.active().number == 1


def test_a_job_that_is_not_queued_is_left_alone(place):
    assert place.run().state == "promoted"
    assert place.run(methods=Methods(adapt=None)).state == "promoted"
    assert len(place.versions.versions()) == 1


def raising(error):
    def adapt(*_args, **_options):
        raise error

    return adapt


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        pytest.param(ConfigError("the loss must be finite"), "the loss must be finite", id="ours"),
        pytest.param(
            torch.cuda.OutOfMemoryError("CUDA out of memory"),
            "a training must fit into the memory, but there was too little; choose a smaller model "
            "or SAM_RESOLUTION, or another SAM_DEVICE",
            id="gpu-memory",
        ),
        pytest.param(
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "a training must fit into the memory, but there was too little; choose a smaller model "
            "or SAM_RESOLUTION, or another SAM_DEVICE",
            id="memory",
        ),
        pytest.param(
            ValueError("oh"),
            "the training failed in a way it does not know (ValueError: oh); look for it in the "
            "worker's log",
            id="unknown",
        ),
    ],
)
def test_a_failure_is_one_sentence_and_the_next_job_may_come(place, error, reason):
    job = place.run(methods=replace(METHODS, adapt=raising(error)))
    assert (job.state, job.reason) == ("failed", reason)
    assert not place.run_dir.exists()
    place.again()
    assert place.run().state == "promoted"


def test_weights_that_are_gone_are_the_reason(place):
    Path(place.settings.sam_model).unlink()
    job = place.run()
    assert job.state == "failed"
    assert "small.safetensors" in job.reason


FULL = "DATA_DIR must have room for a training, but {} is full; free the disk, and start again"


@pytest.mark.parametrize("where", ["snapshot", "run", "version"])
def test_a_full_disk_is_the_reason_and_the_served_version_stays(
    place, tmp_path, monkeypatch, where
):
    add_version(place.registry, PROJECT, load_base(place.settings), tmp_path / "a")
    place.versions.activate(1)
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuse(*_args, **_options):
        raise full

    methods = METHODS
    if where == "snapshot":
        monkeypatch.setattr(Path, "write_text", refuse)
    elif where == "run":
        methods = replace(METHODS, adapt=raising(full))
    else:
        monkeypatch.setattr("ml_backend.registry.os.fsync", refuse)
    job = place.run(methods=methods)
    assert job.state == "failed"
    if where == "version":
        assert "No space left on device" in job.reason
    else:
        assert job.reason == FULL.format(place.settings.data_dir)
    assert place.versions.active().number == 1
    assert [version.number for version in place.versions.versions()] == [1]
    assert not place.run_dir.exists()


def test_a_writer_that_hides_the_full_disk_is_seen_through(place, monkeypatch):
    monkeypatch.setattr(module, "_LITTLE_DISK_BYTES", 2**62)
    error = RuntimeError("PytorchStreamWriter failed writing file data/3")
    job = place.run(methods=replace(METHODS, adapt=raising(error)))
    assert job.reason == FULL.format(place.settings.data_dir)


def test_jobs_that_cannot_be_written_down_end_the_worker(place, monkeypatch):
    def refuse(*_args, **_options):
        raise JobsUnavailableError("jobs.db")

    monkeypatch.setattr(JobStore, "finish", refuse)
    with pytest.raises(JobsUnavailableError):
        place.run()


def test_a_database_that_somebody_holds_costs_nothing_that_was_learnt(place, monkeypatch):
    """A backup, say; the next worker goes on with the job."""
    monkeypatch.setattr(jobs_module, "_BUSY_S", 0.05)
    place.jobs = JobStore(place.settings.data_dir)
    other = sqlite3.connect(place.settings.data_dir / "jobs.db", isolation_level=None)

    def adapt(*args, on_step, **options):
        other.execute("BEGIN EXCLUSIVE")
        fake_adapt(*args, on_step=on_step, **options)
        raise AssertionError

    with pytest.raises(JobsUnavailableError, match="database is locked"):
        place.run(methods=replace(METHODS, adapt=adapt))
    other.execute("ROLLBACK")
    [job] = place.jobs.jobs()
    assert job.state == "running"
    assert (place.run_dir / "snapshot.json").exists()
    [job] = place.jobs.recover()
    assert job.state == "queued"
    assert place.run().state == "promoted"


def test_masks_beyond_the_memory_are_learnt_from_as_boxes(place, label_studio, monkeypatch):
    outline(label_studio)
    for task in label_studio.tasks:
        (region,) = task["annotations"][0]["result"]
        region["value"]["points"] = [[10, 10], [50, 10], [50, 50], [10, 50]]
    monkeypatch.setattr(module, "_MASK_BYTES", 3 * SIZE[0] * SIZE[1])
    objects = []

    def adapt(sam, images, *args, **options):
        objects.extend(one for image in images for one in image.objects)
        return fake_adapt(sam, images, *args, **options)

    def judge(models, images, **options):
        objects.extend(one for image in images for one in image.objects)
        return fake_judge(models, images, **options)

    methods = replace(METHODS, adapt=adapt, finetune=adapt, judge=judge)
    assert place.run(methods=methods).state == "promoted"
    assert Counter(one.mask is None for one in objects) == {True: 5, False: 3}
    for one in objects:
        if one.mask is None:
            np.testing.assert_allclose(one.box_xyxy, (6, 5, 32, 24), atol=1)


@pytest.mark.parametrize("method", ["sam-adapter", "lora"])
def test_full_masks_of_one_label_are_learnt_to_be_found_without_prompts(
    tmp_path, label_studio, method
):
    outline(label_studio)
    place = Workplace(tmp_path, label_studio, method=method, sam_crops=False)
    configs = []

    def finetune(sam, images, config, **options):
        configs.append(config)
        return fake_finetune(sam, images, config, **options)

    assert place.run(methods=replace(METHODS, adapt=None, finetune=finetune)).state == "promoted"
    (config,) = configs
    assert (config.method, config.steps, config.crop_chance) == (method, 3, 0.0)
    assert config.prompt_free_chance > 0
    active = place.versions.active()
    assert active.prompt_free_label == "Cell"
    assert active.manifest["config"]["method"] == active.manifest["method"] == method
    assert active.manifest["method_reason"] == ("it was asked for; 6 of 6 objects have a full mask")
    info = read_adapter(active.adapter)
    assert (info.method, info.prompt_free) == (method, True)


@pytest.mark.parametrize("labels", [("Cell", "Debris"), ("Debris",)])
def test_what_is_found_without_prompts_is_the_one_label_in_use(tmp_path, label_studio, labels):
    outline(label_studio, labels=labels)
    config = label_studio.projects[0]["label_config"]
    more = config.replace("</Poly", '<Label value="Unused"/></Poly')
    label_studio.projects[0]["label_config"] = more
    place = Workplace(tmp_path, label_studio, method="lora")
    assert place.run().state == "promoted"
    active = place.versions.active()
    wanted = "Debris" if len(labels) == 1 else None
    assert active.prompt_free_label == wanted
    assert active.manifest["config"]["prompt_free_chance"] == (
        0 if wanted is None else PROMPT_FREE_CHANCE
    )
    assert read_adapter(active.adapter).prompt_free is (wanted is not None)


def test_the_judge_knows_who_finds_what_without_prompts(tmp_path, label_studio):
    outline(label_studio)
    told = []

    def judge(models, images, *, most_objects, prompt_free, **options):
        told.append(prompt_free)
        assert most_objects == 20
        shared = {"most_objects": most_objects, "prompt_free": prompt_free}
        return fake_judge(models, images, **shared, **options)

    methods = replace(METHODS, judge=judge)
    place = Workplace(tmp_path, label_studio, method="lora")
    assert place.run(methods=methods).state == "promoted"
    for task in label_studio.tasks:
        task["annotations"][0]["result"][0]["value"]["polygonlabels"] = ["Nucleus"]
    config = label_studio.projects[0]["label_config"].replace("Cell", "Nucleus")
    label_studio.projects[0]["label_config"] = config
    place.again()
    assert place.run(methods=methods).state == "promoted"
    place.again(method="wesam")
    assert place.run(methods=methods).state == "promoted"
    place.again()
    assert place.run(methods=methods).state == "promoted"
    assert told == [
        {"candidate": "Cell"},
        {"candidate": "Nucleus", "active": "Cell"},
        {"active": "Nucleus"},
        {"candidate": "Nucleus"},
    ]


@pytest.mark.parametrize("method", ["lora", "wesam"])
def test_tasks_submitted_with_nothing_on_them_teach_that_nothing_is_there(
    tmp_path, label_studio, method
):
    outline(label_studio)
    for number in range(9, 21):
        add_task(label_studio, number, result=[])
    judged, learnt = [], []

    def learn(by, sam, images, config, **options):
        learnt.extend(images)
        return by(sam, images, config, **options)

    def judge(models, images, **options):
        judged.extend(images)
        return fake_judge(models, images, **options)

    methods = replace(
        METHODS,
        judge=judge,
        finetune=partial(learn, fake_finetune),
        adapt=partial(learn, fake_adapt),
    )
    place = Workplace(tmp_path, label_studio, method=method)
    assert place.run(methods=methods).state == "promoted"
    manifest = place.versions.active().manifest
    objects = [len(image.objects) for image in learnt], [len(image.objects) for image in judged]
    empty = {n for n in range(9, 21) if method == "lora"}
    held_out = {number for number in empty if is_held_out(PROJECT, number)}
    assert objects == (
        [1] * 6 + [0] * len(empty - held_out),
        [1] * 2 + [0] * min(len(held_out), 2),  # not more than of the others
    )
    assert set(manifest["learnt_from"]) == {*range(1, 9)} - {*manifest["judged_by"]} | (
        empty - held_out
    )
    assert {int(name.split()[1]) for name in (image.name for image in judged)} == {
        *manifest["judged_by"]
    }
    assert set(manifest["pictures"].values()) <= {*range(1, 9)}


def test_tasks_with_nothing_on_them_are_not_enough(tmp_path, label_studio):
    for task in label_studio.tasks[:3]:
        task["annotations"][0]["result"] = []
    job = Workplace(tmp_path, label_studio).run()
    assert job.state == "rejected"
    assert "must have at least 8 tasks with labels, got 5: 3 are missing" in job.reason


def test_where_masks_are_missing_all_over_nothing_is_found_without_prompts(tmp_path, label_studio):
    rectangles = [task["annotations"][0]["result"][0] for task in label_studio.tasks]
    rectangles = [dict(region, id="box") for region in rectangles]
    outline(label_studio)
    config = label_studio.projects[0]["label_config"]
    tag = '<RectangleLabels name="box2" toName="image"><Label value="Cell"/></RectangleLabels>'
    label_studio.projects[0]["label_config"] = config.replace("</View>", f"{tag}</View>")
    for task, region in zip(label_studio.tasks, rectangles, strict=True):
        elsewhere = region["value"] | {"x": 1.0, "y": 1.0, "width": 4.0, "height": 4.0}
        box = region | {"from_name": "box2", "type": "rectanglelabels", "value": elsewhere}
        task["annotations"][0]["result"].append(box)
    place = Workplace(tmp_path, label_studio, method="lora")
    assert place.run().state == "promoted"
    assert place.versions.active().prompt_free_label is None
    assert place.versions.active().manifest["method_reason"] == (
        "it was asked for; 6 of 12 objects have a full mask"
    )


def test_masks_that_were_asked_to_be_learnt_from_and_are_not_there_are_the_reason(
    tmp_path, label_studio
):
    job = Workplace(tmp_path, label_studio, method="sam-adapter").run()
    assert job.state == "rejected"
    assert job.reason == (
        "the method sam-adapter must have full masks to learn from, got none in 6 images: brush or "
        "outline some objects, or train with wesam"
    )


def test_wesam_learns_from_masks_too_if_it_is_asked_to(tmp_path, label_studio):
    outline(label_studio)
    place = Workplace(tmp_path, label_studio, method="wesam")
    assert place.run(methods=replace(METHODS, finetune=None)).state == "promoted"
    assert place.versions.active().manifest["method"] == "wesam"
    assert place.versions.active().prompt_free_label is None


def test_auto_learns_from_full_masks_where_there_are_only_such(tmp_path, label_studio):
    outline(label_studio)
    place = Workplace(tmp_path, label_studio)
    job = place.run(methods=replace(METHODS, adapt=None))
    assert job.state == "promoted"
    manifest = place.versions.active().manifest
    assert manifest["method_asked"] == "auto"
    assert manifest["method"] == job.progress["method"] != "wesam"
    assert manifest["method_reason"] == job.progress["method_reason"]
    assert "6" in manifest["method_reason"]  # images with full masks


def test_a_job_that_was_stopped_goes_on_by_the_same_method(tmp_path, label_studio):
    outline(label_studio)
    place = Workplace(tmp_path, label_studio, method="lora")
    steps = []

    def finetune(sam, images, config, *, on_step, **options):
        def note(step):
            steps.append((config.method, step.step))
            on_step(step)

        return fake_finetune(sam, images, config, on_step=note, **options)

    methods = replace(METHODS, adapt=None, finetune=finetune)
    assert place.run(methods=methods, should_stop=lambda: len(steps) == 2).state == "queued"
    place.settings = place.settings.model_copy(update={"train_method": "wesam"})
    assert place.run(methods=methods).state == "promoted"
    assert {method for method, _ in steps} == {"lora"}


def test_several_images_of_a_task_are_on_one_side(place, label_studio):
    label_studio.projects[0]["label_config"] = CONFIG.replace('value="$image"', 'valueList="$all"')
    for task in label_studio.tasks:
        task["data"] = {"all": [task["data"]["image"], "/data/upload/1/1.png"]}
        (region,) = task["annotations"][0]["result"]
        task["annotations"][0]["result"] = [
            region | {"item_index": 0},
            region | {"item_index": 1, "id": "other"},
        ]
    names = {}

    def adapt(sam, images, *args, **options):
        names["learnt"] = [image.name for image in images]
        return fake_adapt(sam, images, *args, **options)

    def judge(models, images, **options):
        names["judged"] = [image.name for image in images]
        return fake_judge(models, images, **options)

    assert place.run(methods=replace(METHODS, adapt=adapt, judge=judge)).state == "promoted"
    assert len(set(names["learnt"])) == 12
    assert len(set(names["judged"])) == 4
    tasks = {side: {name.split()[1] for name in names[side]} for side in names}
    assert not tasks["learnt"] & tasks["judged"]


def test_a_long_curve_keeps_some_points_and_the_last(place, monkeypatch):
    monkeypatch.setattr(module, "_CURVE_POINTS", 8)
    place.settings = place.settings.model_copy(update={"train_steps": 50})
    job = place.run()
    steps = [point["step"] for point in job.progress["curve"]]
    assert 4 <= len(steps) <= 9
    assert (steps[0], steps[-1]) == (1, 50)
    assert steps == sorted(steps)


def test_the_split_is_stable_when_tasks_come():
    few, many = list(range(100)), list(range(400))
    learnt, judged = split_tasks(PROJECT, few)
    learnt_later, judged_later = split_tasks(PROJECT, many)
    assert sorted(learnt + judged) == few
    assert set(learnt) <= set(learnt_later)
    assert 0.15 < len(judged_later) / 400 < 0.35
    assert set(judged_later) == {task for task in many if is_held_out(PROJECT, task)}
    assert split_tasks("2.1795194739", many) != (learnt_later, judged_later)


@pytest.mark.parametrize(("number", "least", "most"), [(16, 3, 5), (24, 4, 8), (100, 20, 33)])
def test_about_a_quarter_is_for_judging(number, least, most):
    sizes = {
        len(split_tasks(PROJECT, list(range(first, first + number)))[1])
        for first in range(0, 2000, 7)
    }
    assert least == min(sizes) < max(sizes) <= most


@pytest.mark.parametrize("number", range(4, 9))
def test_a_few_tasks_are_split_too(number):
    for first in range(0, 400, 7):
        learnt, judged = split_tasks(PROJECT, list(range(first, first + number)))
        assert len(judged) == 2
        assert len(learnt) + len(judged) == number
        held_out = {task for task in learnt + judged if is_held_out(PROJECT, task)}
        assert set(judged) <= held_out or held_out <= set(judged)


def test_the_after_picture_shows_another_model(place):
    place.run()
    folder = place.versions.active().folder
    before, after = (
        np.asarray(Image.open(BytesIO((folder / f"{name}-1.jpg").read_bytes())))
        for name in ("before", "after")
    )
    assert before.shape == (*SIZE, 3)
    assert (before != after).any()
