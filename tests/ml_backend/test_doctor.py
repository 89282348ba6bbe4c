from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest
from pydantic import SecretStr
from werkzeug.serving import make_server

from ml_backend.app import create_app
from ml_backend.connect import ProjectClient, connect
from ml_backend.convert.prompts import objects_from_regions
from ml_backend.demo import demo_label_config
from ml_backend.doctor import (
    _drawing,
    check_backend,
    check_drawing,
    check_label_config,
    check_label_studio,
    check_model,
    check_project,
    diagnose,
)
from ml_backend.label_config import parse_label_config
from ml_backend.settings import Settings
from sam_ext.checkpoints import save_checkpoint
from sam_ext.predictor import Predictor
from tests.conftest import build_small_sam
from tests.ml_backend.backend import encoded, random_image
from tests.ml_backend.connected import ConnectedLabelStudio
from tests.ml_backend.servers import LEGACY_TOKEN, Answer, Server, json_answer

URL = "http://10.0.0.7:9090"
CONFIG = demo_label_config("brush")


@pytest.fixture
def label_studio():
    with ConnectedLabelStudio() as server:
        server.projects = [{"id": 1, "title": "cats", "label_config": CONFIG}]
        yield server


@pytest.fixture
def client(label_studio):
    return ProjectClient(label_studio.url, label_studio.personal_access_token)


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / "small.safetensors"
    save_checkpoint(build_small_sam(), path, metadata={})
    return Settings(data_dir=tmp_path, sam_model=str(path), sam_device="cpu")


def summary(findings):
    return [(finding.check, finding.state) for finding in findings]


def only(findings):
    (finding,) = findings
    return finding


@pytest.mark.parametrize("output", ["brush", "polygon"])
def test_the_demos_labelling_configs_are_right(settings, output):
    finding = only(check_label_config(demo_label_config(output), settings=settings))
    assert (finding.state, finding.detail) == ("ok", "prompts: kp, box; answers: mask")


@pytest.mark.parametrize(
    ("xml", "state", "said"),
    [
        pytest.param("<View>", "failure", "must be XML", id="broken"),
        pytest.param("<View><Text name='t'/></View>", "failure", "<Image>", id="no image"),
        pytest.param(
            '<View><Image name="image" value="$image"/>'
            '<KeyPointLabels name="kp" toName="image" smart="true"><Label value="Cat"/>'
            "</KeyPointLabels></View>",
            "failure",
            "to answer into",
            id="nothing to answer into",
        ),
        pytest.param(
            '<View><Image name="image" value="$image"/>'
            '<BrushLabels name="mask" toName="image" smart="false"><Label value="Cat"/>'
            "</BrushLabels></View>",
            "failure",
            "nothing to prompt with; add <KeyPointLabels>",
            id="nothing to prompt with",
        ),
        pytest.param(
            CONFIG.replace('smart="true" smartOnly="true"', 'smart="false"'),
            "failure",
            "nothing to prompt with",
            id="prompts that are switched off",
        ),
        pytest.param(
            CONFIG.replace(
                'name="mask" toName="image" smart="false"', 'name="mask" toName="image"'
            ),
            "warning",
            'mask must have smart="false"',
            id="the trap: a brush is smart unless it says that it is not",
        ),
        pytest.param(
            CONFIG.replace("BrushLabels", "BitmaskLabels").replace(
                'name="mask" toName="image" smart="false"', 'name="mask" toName="image"'
            ),
            "warning",
            'mask must have smart="false"',
            id="and so is a bitmask",
        ),
        pytest.param(
            '<View><Image name="image" value="$image"/><RectangleLabels name="box" toName="image" '
            'smart="true"><Label value="Cat"/></RectangleLabels></View>',
            "ok",
            "prompts: box; answers: box",
            id="loose boxes to tight ones",
        ),
        pytest.param(
            CONFIG.replace('<Label value="Nucleus" background="#1971c2"/></Brush', "</Brush"),
            "warning",
            "mask lacks the labels Nucleus of kp",
            id="a label that the mask tag lacks",
        ),
    ],
)
def test_a_wrong_labelling_config_is_explained(settings, xml, state, said):
    finding = only(check_label_config(xml, settings=settings))
    assert finding.state == state
    assert said in finding.detail


def test_an_output_that_the_config_lacks_is_a_failure(tmp_path):
    settings = Settings(data_dir=tmp_path, sam_output=("polygon",))
    finding = only(check_label_config(CONFIG, settings=settings))
    assert finding.state == "failure"
    assert "SAM_OUTPUT" in finding.detail


def test_weights_that_load_and_a_device_that_is_there_are_ok(settings):
    findings = list(check_model(settings))
    assert summary(findings) == [("weights", "ok"), ("device", "ok")]
    assert settings.sam_model in findings[0].detail


def test_weights_that_are_still_to_be_downloaded_are_a_warning(tmp_path):
    finding = next(check_model(Settings(data_dir=tmp_path, sam_model="vit_b")))
    assert finding.state == "warning"
    assert finding.detail.startswith("vit_b is downloaded at the first start (375 MB from http")


@pytest.mark.parametrize(
    ("values", "check", "said"),
    [
        pytest.param(
            {"sam_model": "vit_b", "sam_offline": True}, "weights", "offline", id="offline"
        ),
        pytest.param({"sam_model": "no.pth"}, "weights", "SAM_MODEL: model must be", id="path"),
        pytest.param({"sam_device": "cuda:99"}, "device", "SAM_DEVICE: device", id="device"),
    ],
)
def test_a_model_that_cannot_be_served_is_a_failure(settings, tmp_path, values, check, said):
    chosen = settings.model_copy(update={**values, "data_dir": tmp_path / "empty"})
    finding = next(f for f in check_model(chosen) if f.check == check)
    assert finding.state == "failure"
    assert said in finding.detail


def test_a_backend_that_answers_says_its_version():
    with Server() as server:
        server.routes["/health"] = json_answer({"status": "UP", "model_version": "sam-tiny-1"})
        finding = only(check_backend(server.url))
    assert (finding.state, finding.detail) == ("ok", f"{server.url}: sam-tiny-1")


def test_something_else_at_the_backends_address_is_a_failure():
    with Server() as server:
        server.routes["/health"] = json_answer({"detail": "who?"}, 404)
        assert only(check_backend(server.url)).state == "failure"


def test_a_backend_that_is_not_running_is_a_warning():
    with Server() as server:
        url = server.url
    finding = only(check_backend(url))
    assert finding.state == "warning"
    assert "sam-ml-backend serve" in finding.detail


def test_a_personal_access_token_is_recognised(client):
    findings = list(check_label_studio(client))
    assert summary(findings) == [("Label Studio", "ok"), ("token", "ok")]
    assert findings[1].detail == "a personal access token of admin@example.com"


def test_a_legacy_token_is_recognised(label_studio):
    label_studio.legacy_tokens_enabled = True
    client = ProjectClient(label_studio.url, LEGACY_TOKEN)
    assert list(check_label_studio(client))[1].detail == "a legacy token of admin@example.com"


def test_an_access_token_is_a_warning_because_it_ends_soon(client, label_studio):
    client.whoami()
    short_lived = ProjectClient(label_studio.url, label_studio.access_token)
    finding = list(check_label_studio(short_lived))[1]
    assert finding.state == "warning"
    assert "good for minutes only" in finding.detail


@pytest.mark.parametrize(
    ("token", "said"),
    [
        pytest.param(LEGACY_TOKEN, "legacy tokens are off by default", id="legacy, switched off"),
        pytest.param(None, "Label Studio announces only a legacy token", id="none"),
    ],
)
def test_a_token_that_opens_nothing_is_a_failure(label_studio, token, said):
    findings = list(check_label_studio(ProjectClient(label_studio.url, token)))
    assert summary(findings) == [("Label Studio", "ok"), ("token", "failure")]
    assert said in findings[1].detail


def test_a_connected_project_is_ok(client, settings):
    connect(client, 1, URL, title="SAM")
    findings = list(check_project(client, 1, settings=settings, backend_url=URL))
    assert summary(findings) == [("labelling config", "ok"), ("connection", "ok")]
    assert findings[1].detail == f"SAM at {URL}, interactive, sam-tiny-12345678"


def never_connect(label_studio):
    label_studio.backends.clear()


def disconnect(label_studio):
    label_studio.state |= {"state": "DI", "readable_state": "Disconnected", "error_message": "gone"}


def switch_off(label_studio):
    label_studio.backends[0]["is_interactive"] = False


def lose_webhook(label_studio):
    label_studio.webhooks.clear()


@pytest.mark.parametrize(
    ("change", "state", "said"),
    [
        pytest.param(never_connect, "failure", "sam-ml-backend connect --project 1", id="none"),
        pytest.param(disconnect, "failure", "does not reach", id="disconnected"),
        pytest.param(switch_off, "failure", "interactive preannotations", id="not interactive"),
        pytest.param(lose_webhook, "warning", "BANNED_SUBNETS=false", id="no webhook"),
    ],
)
def test_a_broken_connection_is_explained(client, label_studio, settings, change, state, said):
    connect(client, 1, URL, title="SAM")
    change(label_studio)
    finding = list(check_project(client, 1, settings=settings, backend_url=URL))[-1]
    assert (finding.check, finding.state) == ("connection", state)
    assert said in finding.detail


def test_everything_is_checked_that_the_arguments_allow(label_studio, settings):
    with Server() as backend:
        backend.routes["/health"] = json_answer({"status": "UP", "model_version": "v"})
        token = label_studio.personal_access_token
        found = diagnose(
            settings,
            label_studio_url=label_studio.url,
            token=token,
            project_id=None,
            backend_url=backend.url,
        )
        assert summary(found) == [
            ("weights", "ok"),
            ("device", "ok"),
            ("backend", "ok"),
            ("Label Studio", "ok"),
            ("token", "ok"),
            ("project", "warning"),
        ]


def test_a_project_that_is_not_there_is_a_failure(label_studio, settings):
    found = diagnose(
        settings,
        label_studio_url=label_studio.url,
        token=label_studio.personal_access_token,
        project_id=7,
        backend_url="http://127.0.0.1:1",
    )
    *_, finding = found
    assert finding.state == "failure"
    assert "/api/projects/7/" in finding.detail


@pytest.fixture
def backend(label_studio, settings, predictor):
    """The service, with the token that it was given; gives its address."""
    label_studio.projects[0] |= {"created_at": "2026-11-30T10:00:00Z"}
    label_studio.tasks = [{"id": 5, "project": 1, "data": {"image": "/data/upload/1/a.png"}}]
    label_studio.routes["/data/upload/1/a.png"] = Answer(encoded(random_image(0, size_hw=(48, 64))))
    with ExitStack() as stack:

        def serve(**changes):
            app = create_app(settings.model_copy(update=changes), predictor)
            server = make_server("127.0.0.1", 0, app, threaded=True)
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            stack.callback(app.extensions["ml_backend"].service.close)
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.port}"

        yield serve


@pytest.fixture(scope="module")
def predictor():
    return Predictor(build_small_sam())


def drawn_on(client, settings, url):
    return only(check_drawing(client, 1, settings=settings, backend_url=url))


@pytest.mark.parametrize("password", [None, "secret"])
def test_a_drawing_on_a_task_of_the_project_is_tried(
    client, label_studio, settings, backend, password
):
    auth = {"basic_auth_user": "sam", "basic_auth_pass": SecretStr("secret")} if password else {}
    settings = settings.model_copy(update=auth)
    known = {
        "label_studio_url": label_studio.url,
        "label_studio_api_key": SecretStr(label_studio.personal_access_token),
    }
    finding = drawn_on(client, settings, backend(**known, **auth))
    assert (finding.check, finding.state) == ("drawing", "ok")
    assert finding.detail.startswith("task 5: a keypointlabels in the middle was answered with ")


def test_what_annotators_would_not_see_is_told(client, label_studio, settings, backend):
    """The command has a token that works, the service has none."""
    url = backend(label_studio_url=label_studio.url)
    finding = drawn_on(client, settings, url)
    assert finding.state == "failure"
    assert finding.detail.startswith("task 5: fetch: '/data/upload/1/a.png' must be answered")
    assert "LABEL_STUDIO_API_KEY" in finding.detail
    assert "in the backend's log)" in finding.detail
    found = diagnose(
        settings,
        label_studio_url=label_studio.url,
        token=label_studio.personal_access_token,
        project_id=1,
        backend_url=url,
    )
    assert [f.state for f in found if f.check == "drawing"] == ["failure"]


def test_something_else_at_predict_is_a_failure(client, label_studio, settings, backend):
    with Server() as server:
        server.routes["/predict"] = json_answer([])
        assert drawn_on(client, settings, server.url).state == "failure"
        url = server.url
    finding = drawn_on(client, settings, url)
    assert finding.state == "failure"
    assert "/predict must answer, got ConnectionError" in finding.detail


def test_without_a_task_no_drawing_is_tried(client, label_studio, settings, backend):
    label_studio.tasks = []
    finding = drawn_on(client, settings, "http://127.0.0.1:1")
    assert (finding.state, finding.detail) == (
        "warning",
        "not tried; the project has not a task for it",
    )


@pytest.mark.parametrize(
    ("tag", "images", "value"),
    [
        ("Rectangle", 'value="$image"', {"width": 50}),
        ("Ellipse", 'value="$image"', {"radiusX": 25}),
        ("KeyPoint", 'valueList="$images"', {"width": 1}),
    ],
)
def test_the_drawing_is_one_that_the_backend_understands(tag, images, value):
    config = parse_label_config(
        f'<View><Image name="i" {images}/><{tag}Labels name="p" toName="i" smart="true">'
        f'<Label value="Cat"/></{tag}Labels><Brush name="m" toName="i"/></View>'
    )
    drawing = _drawing(config)
    [one] = objects_from_regions([drawing], config, size_hw=(100, 200))
    assert value.items() <= drawing["value"].items()
    assert one.labels == ("Cat",)
    assert one.item_index == (0 if "List" in images else None)
    middle = one.point_coords[0] if tag == "KeyPoint" else one.box_xyxy.reshape(2, 2).mean(0)
    assert middle.tolist() == [100, 50]


def test_without_label_studios_address_its_checks_are_named_as_left_out(settings):
    *_, finding = diagnose(
        settings,
        label_studio_url=None,
        token=None,
        project_id=None,
        backend_url="http://127.0.0.1:1",
    )
    assert (finding.check, finding.state) == ("Label Studio", "warning")
    assert "LABEL_STUDIO_URL" in finding.detail
