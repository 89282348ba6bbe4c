"""The running demo through Label Studio's own API."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ml_backend.connect import connect
from ml_backend.demo import backend_child, demo_label_config, sample_images, wait_until_healthy
from ml_backend.doctor import diagnose
from ml_backend.settings import load_settings
from tests.e2e.latency import measure
from tests.e2e.support import (
    CAT,
    MASK_TYPE,
    NUCLEI,
    OUTPUTS,
    ask,
    free_port,
    keypoint,
    mask_of,
    rectangle,
    share_inside,
    union_of,
)

pytestmark = pytest.mark.e2e


def test_the_demo_has_label_studios_default_token_settings(demo):
    """Legacy tokens are off, so every image below was read with the personal access token."""
    settings = demo.api("GET", "/api/jwt/settings")
    assert settings["legacy_api_tokens_enabled"] is False


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_keypoint_gives_the_mask_under_it(demo, output):
    project_id = demo.projects[output]
    regions = demo.ask(project_id, demo.tasks(project_id)[CAT.image], [keypoint(CAT)])
    assert {region["type"] for region in regions} == {MASK_TYPE[output]}
    assert {region["from_name"] for region in regions} == {"mask"}
    assert all(region["value"][MASK_TYPE[output]] == ["Cat"] for region in regions)
    x, y = CAT.inside_xy
    assert union_of(regions)[y, x]
    assert share_inside(union_of(regions), CAT.box_xyxy) > 0.8


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_rectangle_gives_the_object_in_it(demo, output):
    project_id = demo.projects[output]
    regions = demo.ask(project_id, demo.tasks(project_id)[CAT.image], [rectangle(CAT)])
    mask = union_of(regions)
    x, y = CAT.inside_xy
    assert mask[y, x]
    assert share_inside(mask, CAT.box_xyxy) > 0.95
    left, top, right, bottom = CAT.box_xyxy
    assert mask.sum() < 0.9 * (right - left) * (bottom - top)  # it is no rectangle


@pytest.mark.parametrize("output", OUTPUTS)
def test_two_rectangles_give_two_objects(demo, output):
    project_id = demo.projects[output]
    task = demo.tasks(project_id)["nuclei.jpg"]
    regions = demo.ask(project_id, task, [rectangle(nucleus) for nucleus in NUCLEI])
    assert len({region["id"] for region in regions}) == len(regions) >= 2
    for nucleus in NUCLEI:
        of_this = [r for r in regions if share_inside(mask_of(r), nucleus.box_xyxy) > 0.9]
        assert of_this
        x, y = nucleus.inside_xy
        assert union_of(of_this)[y, x]
        assert all(region["value"][MASK_TYPE[output]] == ["Nucleus"] for region in of_this)


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_negative_keypoint_takes_something_away(demo, output):
    project_id = demo.projects[output]
    task = demo.tasks(project_id)[CAT.image]
    tail_xy = (340, 120)
    one = union_of(demo.ask(project_id, task, [keypoint(CAT)]))
    both = union_of(
        demo.ask(project_id, task, [keypoint(CAT), keypoint(CAT, tail_xy, positive=False)])
    )
    assert not np.array_equal(one, both)
    assert both[CAT.inside_xy[1], CAT.inside_xy[0]]
    assert not both[tail_xy[1], tail_xy[0]]


def test_an_empty_drawing_is_answered_with_nothing(demo):
    project_id = demo.projects["brush"]
    assert demo.ask(project_id, demo.tasks(project_id)[CAT.image], []) == []


def test_retrieve_predictions_turns_rectangles_into_masks_once(demo):
    project = demo.client.create_project("batch", demo_label_config("brush"))
    project_id = project["id"]
    demo.client.import_files(project_id, [p for p in sample_images() if p.name != "nuclei.jpg"])
    backend = connect(demo.client, project_id, demo.backend_url, title="SAM")
    tasks = demo.tasks(project_id)
    body = {"task": tasks[CAT.image]["id"], "result": [rectangle(CAT)], "model_version": "boxes"}
    demo.api("POST", "/api/predictions/", json=body)

    selected = {"selectedItems": {"all": True, "excluded": []}}
    action = f"/api/dm/actions?id=retrieve_tasks_predictions&project={project_id}"
    for _ in range(2):
        demo.api("POST", action, json=selected)

    stored = {
        name: demo.api("GET", f"/api/tasks/{task['id']}")["predictions"]
        for name, task in tasks.items()
    }
    ours = [p for p in stored.pop(CAT.image) if p["model_version"] != "boxes"]
    assert [p["model_version"] for p in ours] == [backend["model_version"]]
    assert share_inside(union_of(ours[0]["result"]), CAT.box_xyxy) > 0.95
    assert not any(stored.values())


def test_an_annotation_is_saved_while_its_webhook_is_answered(demo):
    project_id = demo.projects["brush"]
    task = demo.tasks(project_id)["cat_grey.jpg"]
    before = (demo.folder / "logs" / "backend.log").read_text().count("'ANNOTATION_CREATED'")
    demo.api("POST", f"/api/tasks/{task['id']}/annotations/", json={"result": [rectangle(CAT)]})
    after = (demo.folder / "logs" / "backend.log").read_text().count("'ANNOTATION_CREATED'")
    assert after == before + 1


def test_every_request_is_right_directly_after_a_restart_of_two_workers(demo, tmp_path):
    """24 of 24, two projects; label-studio-ml 1.0.9 by itself answered 8 of them."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environ = {**os.environ, "WORKERS": "2"}

    def start():
        child = backend_child(
            tmp_path,
            port=port,
            label_studio_url=demo.url,
            token=demo.state["token"],
            environ=environ,
        )
        wait_until_healthy([child], stop=threading.Event())
        return child

    child = start()
    try:
        projects = {}
        for output in OUTPUTS:
            project = demo.client.create_project(f"restart {output}", demo_label_config(output))
            demo.client.import_files(project["id"], sample_images())
            backend = connect(demo.client, project["id"], url, title="restarted")
            task = demo.tasks(project["id"])[CAT.image]
            projects[output] = (backend["id"], task["id"])
        child.terminate()
        child.wait()
        child = start()

        def one(number: int) -> tuple[str, set[str]]:
            output = OUTPUTS[number % 2]
            backend_id, task_id = projects[output]
            drawn = [rectangle(CAT)] if number % 3 else [keypoint(CAT)]
            answer = ask(demo, backend_id, task_id, drawn)
            return MASK_TYPE[output], {region["type"] for region in answer["result"]}

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(one, range(24)))
    finally:
        child.terminate()
        child.wait()
    assert [got for _, got in answers] == [{wanted} for wanted, _ in answers]


def test_connecting_again_at_another_address_moves_backend_and_webhook(demo):
    project_id = demo.client.create_project("moved", demo_label_config("brush"))["id"]
    connect(demo.client, project_id, demo.backend_url, title="SAM")
    other_url = demo.backend_url.replace("127.0.0.1", "localhost")
    connect(demo.client, project_id, other_url, title="SAM")
    assert [row["url"] for row in demo.client.list_backends(project_id)] == [other_url]
    webhooks = demo.client.list_webhooks(project_id)
    assert [hook["url"] for hook in webhooks] == [f"{other_url}/webhook"]


def test_the_doctor_finds_the_demo_healthy(demo):
    findings = list(
        diagnose(
            load_settings(),
            label_studio_url=demo.url,
            token=demo.state["token"],
            project_id=demo.projects["polygon"],
            backend_url=demo.backend_url,
        )
    )
    assert [(f.check, f.state) for f in findings] == [
        ("weights", "ok"),
        ("device", "ok"),
        ("backend", "ok"),
        ("Label Studio", "ok"),
        ("token", "ok"),
        ("labelling config", "ok"),
        ("connection", "ok"),
        ("drawing", "ok"),
    ], findings
    assert "in the middle was answered with polygonlabels in " in findings[-1].detail


def test_first_and_next_clicks_are_timed(demo, capsys):
    """A report, not a bar: what else the machine does decides."""
    table = measure(demo)
    with capsys.disabled():
        print(f"\n{table}")  # noqa: T201
    assert table.count("\n") >= 4
