from __future__ import annotations

import json

import pytest

from ml_backend.app import create_app
from ml_backend.demo import demo_label_config
from ml_backend.settings import Settings
from ml_backend.web.checks import Checked, Checker, check
from sam_ext.predictor import Predictor
from tests.conftest import build_small_sam
from tests.ml_backend.connected import ConnectedLabelStudio
from tests.ml_backend.servers import LEGACY_TOKEN
from tests.ml_backend.training import CREATED_AT
from tests.ml_backend.web.content import OTHER_PROJECT, PROJECT


@pytest.fixture
def label_studio():
    with ConnectedLabelStudio() as server:
        server.legacy_tokens_enabled = True
        server.projects = [
            {
                "id": 1,
                "title": "Nuclei",
                "created_at": CREATED_AT,
                "label_config": demo_label_config("brush"),
            },
            {"id": 2, "title": "Other", "created_at": CREATED_AT, "label_config": "<View/>"},
        ]
        yield server


@pytest.fixture
def make_service(tmp_path):
    services = []

    def make(*projects: str, hostname: str = "", **settings):
        app = create_app(Settings(data_dir=tmp_path, **settings), Predictor(build_small_sam()))
        services.append(app.extensions["ml_backend"].service)
        for name in projects:
            path = services[-1].settings.connections_dir / f"{name}.json"
            path.write_text(json.dumps({"hostname": hostname, "access_token": LEGACY_TOKEN}))
        return services[-1]

    yield make
    for service in services:
        service.close()


def found(checked: Checked) -> list[tuple[str | None, str, str]]:
    return [(one.project, one.finding.check, one.finding.state) for one in checked.findings]


def test_label_studio_is_asked_about_itself_and_its_projects(make_service, label_studio):
    service = make_service(PROJECT, OTHER_PROJECT, hostname=label_studio.url)
    checked = check(service)
    assert checked.titles == {PROJECT: "Nuclei"}
    assert found(checked) == [
        (None, "Label Studio", "ok"),
        (None, "token", "ok"),
        (PROJECT, "labelling config", "ok"),
        (OTHER_PROJECT, "project", "warning"),
    ]
    assert "project 2 of" in checked.findings[-1].finding.detail
    assert LEGACY_TOKEN not in str(checked)


def test_a_refused_token_is_a_finding(make_service, label_studio):
    label_studio.legacy_tokens_enabled = False
    checked = check(make_service(PROJECT, hostname=label_studio.url))
    assert found(checked)[-1] == (None, "token", "failure")
    assert checked.titles == {}
    assert LEGACY_TOKEN not in str(checked)


def test_a_label_studio_that_is_away_or_unknown_is_a_finding(make_service):
    assert found(check(make_service(PROJECT, hostname=""))) == [
        (PROJECT, "Label Studio", "failure")
    ]
    nobody = "http://127.0.0.1:1"
    checked = check(make_service(PROJECT, hostname=nobody))
    assert found(checked) == [(None, "Label Studio", "failure")]


def test_the_settings_label_studio_is_asked_without_any_project(make_service, label_studio):
    service = make_service(label_studio_url=label_studio.url, label_studio_api_key=LEGACY_TOKEN)
    assert found(check(service)) == [(None, "Label Studio", "ok"), (None, "token", "ok")]
    # And once, however many projects there are.
    service = make_service(
        PROJECT,
        OTHER_PROJECT,
        label_studio_url=label_studio.url + "/",
        label_studio_api_key=LEGACY_TOKEN,
    )
    assert found(check(service)).count((None, "token", "ok")) == 1


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_looking_is_left_to_the_background_and_done_once_a_minute():
    clock, started, looked = Clock(), [], []

    def look() -> Checked:
        looked.append(clock.now)
        return Checked(at=clock.now)

    checker = Checker(look, start=started.append, clock=clock)
    assert checker.latest() is None
    assert checker.latest() is None
    assert len(started) == 1  # it is under way
    assert looked == []
    started.pop()()
    assert checker.latest() == Checked(at=0.0)
    clock.now = 59.0
    checker.latest()
    assert not started
    clock.now = 60.0
    assert checker.latest() == Checked(at=0.0)  # until there is something newer
    started.pop()()
    assert checker.latest() == Checked(at=60.0)


def test_a_look_that_fails_is_done_again_a_minute_later(caplog):
    clock, started = Clock(), []

    def look() -> Checked:
        raise ZeroDivisionError

    checker = Checker(look, start=started.append, clock=clock)
    checker.latest()
    started.pop()()
    assert "the status page's checks" in caplog.text
    assert checker.latest() is None
    assert not started
    clock.now = 60.0
    checker.latest()
    assert len(started) == 1
