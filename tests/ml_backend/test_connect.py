from __future__ import annotations

import pytest
from pydantic import SecretStr

from ml_backend.connect import ProjectClient, basic_auth_of, connect
from ml_backend.errors import LabelStudioError
from ml_backend.settings import Settings
from tests.ml_backend.connected import ConnectedLabelStudio

URL = "http://10.0.0.7:9090"


@pytest.fixture
def label_studio():
    with ConnectedLabelStudio() as server:
        server.projects = [{"id": 1, "title": "cats", "label_config": "<View/>"}]
        yield server


@pytest.fixture
def client(label_studio):
    return ProjectClient(label_studio.url, label_studio.personal_access_token)


def test_a_backend_is_connected_as_interactive(client, label_studio):
    backend = connect(client, 1, URL, title="SAM")
    assert label_studio.backends == [backend]
    assert {name: backend[name] for name in ("project", "url", "title", "is_interactive")} == {
        "project": 1,
        "url": URL,
        "title": "SAM",
        "is_interactive": True,
    }


def test_connecting_twice_leaves_one_backend(client, label_studio):
    connect(client, 1, URL, title="SAM")
    connect(client, 1, URL + "/", title="SAM")
    assert [row["url"] for row in label_studio.backends] == [URL + "/"]


def test_a_backend_of_the_same_title_is_moved_with_its_webhook(client, label_studio):
    connect(client, 1, URL, title="SAM")
    connect(client, 1, "http://10.0.0.8:9191", title="SAM")
    assert [row["url"] for row in label_studio.backends] == ["http://10.0.0.8:9191"]
    assert [hook["url"] for hook in label_studio.webhooks] == ["http://10.0.0.8:9191/webhook"]


def test_a_backend_of_another_title_stays(client, label_studio):
    connect(client, 1, "http://10.0.0.9:9090", title="YOLO")
    connect(client, 1, URL, title="SAM")
    assert [row["url"] for row in label_studio.backends] == ["http://10.0.0.9:9090", URL]
    assert label_studio.webhooks[0]["url"] == "http://10.0.0.9:9090/webhook"


def test_a_backend_that_is_there_already_moves_no_other_one(client, label_studio):
    connect(client, 1, "http://10.0.0.9:9090", title="SAM")
    connect(client, 1, URL, title="SAM, large")
    connect(client, 1, URL, title="SAM")
    assert [row["url"] for row in label_studio.backends] == ["http://10.0.0.9:9090", URL]


def test_the_webhook_gets_the_credentials_that_label_studio_does_not_send(client, label_studio):
    connect(client, 1, URL, title="SAM", basic_auth=("sam", "secret"))
    (hook,) = label_studio.webhooks
    assert hook["headers"] == {"Authorization": "Basic c2FtOnNlY3JldA=="}


def test_a_backend_that_label_studio_does_not_reach_is_an_error(client, label_studio):
    label_studio.state = {
        "state": "DI",
        "readable_state": "Disconnected",
        "error_message": "no route",
    }
    with pytest.raises(LabelStudioError) as caught:
        connect(client, 1, URL, title="SAM")
    assert str(caught.value) == (
        f"Label Studio must reach the backend at {URL}, got state 'Disconnected' (no route); give "
        "the address at which Label Studio's machine or container reaches this one"
    )


def test_basic_auth_is_what_the_settings_say(tmp_path):
    both = Settings(data_dir=tmp_path, basic_auth_user="sam", basic_auth_pass=SecretStr("secret"))
    assert basic_auth_of(both) == ("sam", "secret")
    assert basic_auth_of(Settings(data_dir=tmp_path)) is None
