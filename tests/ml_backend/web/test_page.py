from __future__ import annotations

import base64
import json
import re
import sqlite3
from html import unescape

import pytest

import ml_backend.web.page as page_module
from ml_backend.app import create_app
from ml_backend.doctor import Finding
from ml_backend.settings import Settings
from ml_backend.web.checks import Checked, ProjectFinding
from sam_ext.predictor import Predictor
from tests.conftest import build_small_sam
from tests.ml_backend.backend import payload, serve_images
from tests.ml_backend.servers import LEGACY_TOKEN, FakeLabelStudio
from tests.ml_backend.web.content import OTHER_PROJECT, PROJECT, add_version, start_job

HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
SAME_ORIGIN = HTML | {"Sec-Fetch-Site": "same-origin", "Origin": "http://localhost"}
MEANS = {"candidate": 0.871, "active": 0.821, "base": 0.744}
EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(build_small_sam())


@pytest.fixture
def checked(monkeypatch):
    """What Label Studio was found to be; nobody asks it."""
    known = {"now": None}

    class KnownChecker:
        def __init__(self, _look) -> None:
            pass

        def latest(self):
            return known["now"]

    monkeypatch.setattr(page_module, "Checker", KnownChecker)
    return known


@pytest.fixture
def make_app(tmp_path, predictor, checked):
    apps = []

    def make(**settings):
        apps.append(create_app(Settings(data_dir=tmp_path / "data", **settings), predictor))
        return apps[-1]

    yield make
    for app in apps:
        app.extensions["ml_backend"].service.close()


@pytest.fixture
def app(make_app):
    return make_app()


@pytest.fixture
def service(app):
    return app.extensions["ml_backend"].service


@pytest.fixture
def client(app):
    return app.test_client()


@pytest.fixture
def versions(service, tmp_path):
    """Two versions, the second one active."""
    versions = service.registry.project(PROJECT)
    for number in (1, 2):
        add_version(versions, tmp_path, means=MEANS, sentence=f"Promoted: sentence {number}.")
        versions.activate(number)
    return versions


def shown(client) -> str:
    """The page's HTML."""
    response = client.get("/", headers=HTML)
    assert response.status_code == 200
    assert response.content_type == "text/html; charset=utf-8"
    return response.text


def text_of(html: str) -> str:
    """What a person reads."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def token_of(client) -> str:
    return re.search(r'name="token" value="([0-9a-f]{64})"', shown(client))[1]


def press(client, url: str, headers=SAME_ORIGIN, **fields: object):
    """Send a form as the page does."""
    return client.post(url, data={"token": token_of(client)} | fields, headers=headers)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({}, id="nothing-said"),
        pytest.param({"Accept": "*/*"}, id="label-studio"),
        pytest.param({"Accept": "application/json, text/plain"}, id="script"),
        pytest.param({"Accept": "text/html;q=0, */*"}, id="no-html-please"),
    ],
)
def test_the_address_answers_scripts_as_before(client, headers):
    response = client.get("/", headers=headers)
    assert response.json == client.get("/health").json
    assert response.json["status"] == "UP"
    assert "Accept" in response.headers["Vary"]


def test_a_browser_gets_the_page(client, service):
    text = text_of(shown(client))
    assert service.models.base.model_version in text
    assert "CPU" in text


def test_everything_is_behind_the_same_auth(make_app):
    client = make_app(basic_auth_user="sam", basic_auth_pass="secret").test_client()
    asked = [
        client.get("/", headers=HTML),
        client.get("/page/static/page.css"),
        client.get(f"/page/projects/{PROJECT}/1/after-1.jpg"),
        client.post("/page/jobs/1/cancel", headers=SAME_ORIGIN),
        client.post(f"/page/projects/{PROJECT}/rollback", headers=SAME_ORIGIN),
    ]
    assert [one.status_code for one in asked] == [401] * len(asked)
    assert all(one.headers["WWW-Authenticate"].startswith("Basic") for one in asked)
    pair = base64.b64encode(b"sam:secret").decode()
    right = client.get("/", headers=HTML | {"Authorization": f"Basic {pair}"})
    assert right.status_code == 200
    assert "secret" not in right.text


def test_security_headers_are_on_all_of_it(client, versions):
    paths = [
        "/",
        f"/page/projects/{PROJECT}/1/after-1.jpg",
        "/page/projects/a/1/b",
        "/page/static/page.js",
    ]
    for path in paths:
        response = client.get(path, headers=HTML)
        policy = response.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'self';"), path
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert response.headers["X-Frame-Options"] == "DENY"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        expected = "no-cache" if "static" in path else "no-store"
        assert response.headers["Cache-Control"] == expected, path
        response.close()


def test_nothing_is_inline_and_nothing_comes_from_elsewhere(client, versions, service):
    start_job(service.jobs)
    html = shown(client)
    assert not re.search(r"<script(?![^>]*\ssrc=)|\sstyle=|\son[a-z]+=", html)
    assert set(re.findall(r'(?:src|href|action)="([^"#]+)', html)) <= {
        "/page/static/icon.svg",
        "/page/static/page.css",
        "/page/static/page.js",
        "/page/jobs/1/cancel",
        *(f"/page/projects/{PROJECT}/{what}" for what in ("rollback", "activate")),
        *(
            f"/page/projects/{PROJECT}/{number}/{when}-1.jpg"
            for number in (1, 2)
            for when in ("before", "after")
        ),
    }


def test_empty_states_say_what_to_do(client, service, checked):
    text = text_of(shown(client))
    assert "No project yet. Connect one" in text
    assert "Label Studio is being asked" in text
    assert "None since this process was started." in text
    (service.settings.connections_dir / f"{PROJECT}.json").write_text("{}")
    checked["now"] = Checked(at=0.0)
    text = text_of(shown(client))
    assert (
        "No training yet. Label some tasks, then press Start Training on the project's Model page "
        "in Label Studio." in text
    )
    assert "Nothing to check yet. Set LABEL_STUDIO_URL" in text


def test_a_project_with_its_versions(client, versions, checked):
    add_version(
        versions, versions.find(2).folder.parent, means=MEANS, promoted=False, sentence="Kept."
    )
    checked["now"] = Checked(titles={PROJECT: "Nuclei & co"}, at=0.0)
    html = shown(client)
    text = text_of(html)
    assert "Nuclei & co 1.1795194739" in text
    assert f"Served by v2 {versions.find(2).model_version} since " in text
    assert "v3 not promoted" in text
    assert "v2 serving" in text
    assert "v1 promoted" in text
    assert "learnt from 12 tasks with 148 objects, judged on 4 others Promoted: sentence 1." in text
    assert "this version 0.871 served before 0.821 base model 0.744" in text
    assert "sloppy box Debris overlap with the true mask 9 0.831 0.781 0.704" in text
    assert "Left out of the training: 1 task 7: a region's label Mitosis" in text
    assert "Roll back to v1" in text
    # One curve over all versions, and the losses and the IoU of each one's training.
    assert html.count("<svg viewBox") == 7
    assert html.count('aria-label="How well masks fit what the training learns from') == 3
    assert html.count('alt="Task 21 before the training"') == 3


def test_jobs_as_they_are(client, service):
    start_job(service.jobs, step=40, steps=200)
    service.jobs.create(OTHER_PROJECT, "start_training")
    html = shown(client)
    text = text_of(html)
    assert '<progress aria-label="progress" value="0.2000">' in html
    assert "Training 1 training Cancel learning · step 40 of 200 · about 5 min left" in text
    assert "Start Training was pressed" in text
    assert "sum 0." in text
    assert "Training 2 waiting Cancel It waits for job 1: one training runs at a time." in text
    service.jobs.report(1, {"phase": "judging", "judged": 3, "to_judge": 4}, state="judging")
    text = text_of(shown(client))
    assert "Training 1 judging Cancel judging · 3 of 4 held-out images" in text
    service.jobs.finish(1, "failed", "the disk is full")
    text = text_of(shown(client))
    assert "Trainings that ended failed the disk is full Training 1" in text
    assert "It begins in a moment." in text


def test_how_a_job_and_a_version_were_done_is_said(client, service, versions):
    job = service.jobs.create(PROJECT, "command", "lora")
    assert "Asked for just now: the command line. Method: LoRA." in text_of(shown(client))
    service.jobs.start(job.id)
    chosen = {"method": "sam-adapter", "method_reason": "12 images have full masks"}
    service.jobs.report(job.id, chosen)
    text = text_of(shown(client))
    assert "Method: SAM-Adapter: 12 images have full masks." in text
    service.jobs.finish(job.id, "failed", "the disk is full")
    text = text_of(shown(client))
    assert "took 0 s · SAM-Adapter: 12 images have full masks" in text
    assert "without a prompt" not in text

    folder = versions.find(2).folder.parent
    add_version(versions, folder, means=MEANS, prompt_free={"label": "Nucleus"}, **chosen)
    add_version(versions, folder, means=MEANS, prompt_free={"label": ""}, method="of-the-future")
    text = text_of(shown(client))
    assert (
        "Method: SAM-Adapter: 12 images have full masks. It finds Nucleus without a prompt." in text
    )
    assert "Method: of-the-future. It finds what was labelled without a prompt." in text


def test_a_job_that_nobody_takes_says_so(client, service, tmp_path):
    service.jobs.create(PROJECT, "start_training")
    with sqlite3.connect(tmp_path / "data" / "jobs.db") as database:
        database.execute("UPDATE jobs SET created_at = created_at - 60")
    database.close()
    assert "No worker has taken it yet." in text_of(shown(client))


def test_what_users_wrote_stays_text(client, service, checked, tmp_path):
    """Titles, labels, reasons: whatever is in them is shown, and nothing else."""
    versions = service.registry.project(PROJECT)
    add_version(
        versions,
        tmp_path,
        means=MEANS,
        sentence=f"fell on the label {EVIL}.",
        labels=(EVIL, '"><img src=x>'),
        left_out=[EVIL],
        objects=EVIL,
    )
    job = start_job(service.jobs)
    service.jobs.report(
        job.id,
        {"phase": EVIL, "step": 1, "steps": 2, "losses": {EVIL: 1.0}, "curve": [{"step": EVIL}]},
    )
    service.jobs.finish(service.jobs.create(OTHER_PROJECT, "command").id, "failed", EVIL)
    finding = Finding(check=EVIL, state="failure", detail=EVIL)
    checked["now"] = Checked(
        titles={PROJECT: EVIL, OTHER_PROJECT: EVIL},
        findings=(ProjectFinding(project=EVIL, finding=finding),),
        at=0.0,
    )
    client.post("/predict", json={"tasks": [], "label_config": EVIL, "project": EVIL})
    html = shown(client)
    assert "<script>alert" not in html
    assert "<img src=x" not in html
    assert html.count(EVIL.replace("<", "&lt;").replace(">", "&gt;")) >= 12


def test_hosts_are_shown_without_what_opens_them(client, service):
    known = {"hostname": "http://admin:hunter2@studio.example:8080/", "access_token": LEGACY_TOKEN}
    (service.settings.connections_dir / f"{PROJECT}.json").write_text(json.dumps(known))
    html = shown(client)
    assert 'href="http://studio.example:8080/projects/1"' in html
    assert "hunter2" not in html
    assert LEGACY_TOKEN not in html


@pytest.mark.parametrize("hostname", ["javascript:alert(1)", "", None, "http://", "//evil"])
def test_a_host_that_is_none_is_no_link(client, service, hostname):
    path = service.settings.connections_dir / f"{PROJECT}.json"
    path.write_text(json.dumps({"hostname": hostname, "access_token": ""}))
    assert "Open in Label Studio" not in shown(client)


def test_pictures_come_from_the_version(client, versions):
    response = client.get(f"/page/projects/{PROJECT}/2/after-1.jpg")
    assert response.content_type == "image/jpeg"
    assert response.data == (versions.find(2).folder / "after-1.jpg").read_bytes()


@pytest.mark.parametrize(
    "path",
    [
        f"{PROJECT}/2/manifest.json",
        f"{PROJECT}/2/adapter.safetensors",
        f"{PROJECT}/2/after-9.jpg",
        f"{PROJECT}/9/after-1.jpg",
        f"{PROJECT}/-1/after-1.jpg",
        "9.9/2/after-1.jpg",
        "../2/after-1.jpg",
        "..%2f..%2fdata/2/after-1.jpg",
        "%2fetc/2/passwd",
        f"{PROJECT}/2/..%2f1%2fafter-1.jpg",
        f"{PROJECT}/2/../1/after-1.jpg",
        f"{PROJECT}/2/%2e%2e%2fmanifest.json",
        f"{PROJECT}/2/%2fetc%2fpasswd",
        f"{PROJECT}/2//etc/passwd",
        f"{PROJECT}/2/after-1.jpg%00.png",
        f"{PROJECT}/2/after-1.jpg%0a",
    ],
)
def test_no_other_file_is_served(client, versions, path):
    response = client.get(f"/page/projects/{path}", headers=HTML)
    assert response.status_code in (404, 308), path
    assert response.content_type.startswith(("text/html", "application/json"))


def test_a_manifest_cannot_name_other_files(client, service, tmp_path):
    """Not even one that somebody else wrote."""
    versions = service.registry.project(PROJECT)
    pictures = {
        "../1/before-2.jpg": 1,
        "/etc/passwd": 2,
        "before-1.jpg": 3,
        "adapter.safetensors": 4,
    }
    version = add_version(versions, tmp_path, means=MEANS, pictures={"before-1.jpg": b"x"})
    (version.folder / "manifest.json").write_text(
        json.dumps(dict(version.manifest) | {"pictures": pictures})
    )
    for name in ("before-2.jpg", "after-7.jpg"):
        (version.folder / name).write_bytes(b"in the folder, and not in the manifest")
    html = shown(client)
    assert html.count("<img loading") == 1
    names = ("%2e%2e%2f1%2fbefore-2.jpg", "%2fetc%2fpasswd", "adapter.safetensors", "after-7.jpg")
    for name in names:
        assert client.get(f"/page/projects/{PROJECT}/1/{name}").status_code == 404
    (version.folder / "before-1.jpg").unlink()
    assert client.get(f"/page/projects/{PROJECT}/1/before-1.jpg").status_code == 404


def test_cancel(client, service):
    job = start_job(service.jobs)
    response = press(client, f"/page/jobs/{job.id}/cancel")
    assert (response.status_code, response.location) == (303, f"/#project-{PROJECT}")
    assert service.jobs.get(job.id).cancel_requested
    text = text_of(shown(client))
    assert "Training 1 cancelling" in text
    assert "It ends after the step it is at." in text
    assert "Cancel training" not in shown(client)


def test_roll_back_and_activate(client, versions):
    response = press(client, f"/page/projects/{PROJECT}/rollback", active="2")
    assert (response.status_code, response.location) == (303, f"/#project-{PROJECT}")
    assert versions.active().number == 1
    assert "Roll back to the base model" in text_of(shown(client))
    press(client, f"/page/projects/{PROJECT}/activate", version="2")
    assert versions.active().number == 2
    press(client, f"/page/projects/{PROJECT}/activate", version="base")
    assert versions.active() is None
    text = text_of(shown(client))
    assert "Served by the base model" in text
    assert "Roll back to v2" in text


def test_a_roll_back_that_is_pressed_twice_happens_once(client, versions):
    press(client, f"/page/projects/{PROJECT}/rollback", active="2")
    response = press(client, f"/page/projects/{PROJECT}/rollback", active="2")
    assert response.status_code == 409
    assert "must be served by what the page showed" in text_of(response.text)
    assert versions.active().number == 1


@pytest.mark.parametrize(
    ("url", "fields", "status", "sentence"),
    [
        ("/page/jobs/7/cancel", {}, 404, "job must be the number of a job, got 7"),
        (f"/page/projects/{PROJECT}/activate", {"version": "9"}, 409, "must be one of project"),
        (f"/page/projects/{PROJECT}/activate", {"version": "²"}, 400, "version must be the number"),
        (f"/page/projects/{PROJECT}/activate", {}, 400, "version must be the number"),
        ("/page/projects/9.9/rollback", {"active": ""}, 409, "there is nothing to roll back"),
        ("/page/projects/..x/rollback", {}, 409, "project must be a project's name"),
    ],
)
def test_what_cannot_be_done_is_a_page_that_says_why(
    client, versions, url, fields, status, sentence
):
    response = press(client, url, **fields)
    assert response.status_code == status
    assert response.content_type == "text/html; charset=utf-8"
    text = text_of(response.text)
    assert sentence in text
    error_id = re.search("it has the id ([0-9a-f]{12})", text)[1]
    assert error_id in shown(client)  # among the last errors
    assert versions.active().number == 2


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"Sec-Fetch-Site": "cross-site"}, id="another-site"),
        pytest.param({"Sec-Fetch-Site": "same-site"}, id="another-port"),
        pytest.param({"Sec-Fetch-Site": "none"}, id="address-bar"),
        pytest.param({"Sec-Fetch-Site": ""}, id="empty"),
        pytest.param({"Origin": "http://evil.example"}, id="another-origin"),
        pytest.param({"Origin": "http://localhost.evil.example"}, id="begins-alike"),
        pytest.param({"Origin": "http://localhost:8080"}, id="another-port-without-fetch-metadata"),
        pytest.param({"Origin": "null"}, id="sandboxed"),
        pytest.param({}, id="says-nothing"),
        pytest.param(
            {"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost"}, id="contradicts-itself"
        ),
    ],
)
def test_a_form_of_another_site_is_refused(client, service, versions, headers):
    """With the right cookie and the right token even."""
    job = start_job(service.jobs)
    actions = [
        (f"/page/jobs/{job.id}/cancel", {}),
        (f"/page/projects/{PROJECT}/rollback", {"active": "2"}),
        (f"/page/projects/{PROJECT}/activate", {"version": "1"}),
    ]
    for url, fields in actions:
        response = press(client, url, headers=HTML | headers, **fields)
        assert response.status_code == 403
        assert "a form of another site" in text_of(response.text)
    assert not service.jobs.get(job.id).cancel_requested
    assert versions.active().number == 2


def test_a_form_needs_the_token_that_fits_the_cookie(app, service):
    job = start_job(service.jobs)
    mine, theirs = app.test_client(), app.test_client()
    token = token_of(mine)
    tries = [
        (mine, {}),
        (mine, {"token": ""}),
        (mine, {"token": "ü"}),
        (mine, {"token": token[:-1] + ("0" if token[-1] != "0" else "1")}),
        (mine, {"token": token_of(theirs)}),
        (app.test_client(), {"token": token}),  # without a cookie
    ]
    for client, data in tries:
        response = client.post(f"/page/jobs/{job.id}/cancel", data=data, headers=SAME_ORIGIN)
        assert response.status_code == 403, data
        assert "must carry the token of its page" in text_of(response.text)
    forged = app.test_client()
    visitor = mine.get_cookie("sam-status-page").value.partition(".")[0]
    forged.set_cookie("sam-status-page", f"{visitor}.{'0' * 64}")
    data = {"token": token}
    response = forged.post(f"/page/jobs/{job.id}/cancel", data=data, headers=SAME_ORIGIN)
    assert response.status_code == 403
    assert not service.jobs.get(job.id).cancel_requested
    # Plain http on another machine: browsers send the origin alone.
    plain = {"Origin": "http://localhost"}
    response = mine.post(f"/page/jobs/{job.id}/cancel", data={"token": token}, headers=plain)
    assert response.status_code == 303
    assert service.jobs.get(job.id).cancel_requested


def test_a_button_is_no_link(client, versions):
    for url in ("/page/jobs/1/cancel", f"/page/projects/{PROJECT}/rollback"):
        assert client.get(url, headers=HTML).status_code == 405
    assert versions.active().number == 2


def test_a_large_form_is_refused(client, versions):
    assert press(client, "/page/jobs/1/cancel", more="x" * 20_000).status_code == 413


def test_the_cookie_is_kept_and_shared_by_processes(make_app, service):
    first, second = make_app().test_client(), make_app().test_client()
    response = first.get("/", headers=HTML)
    cookie = response.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert "Secure" not in cookie
    assert "Set-Cookie" not in first.get("/", headers=HTML).headers
    job = start_job(service.jobs)
    assert token_of(first) == token_of(first)
    second.set_cookie("sam-status-page", first.get_cookie("sam-status-page").value)
    data = {"token": token_of(first)}
    response = second.post(f"/page/jobs/{job.id}/cancel", data=data, headers=SAME_ORIGIN)
    assert response.status_code == 303
    https = make_app().test_client().get("/", headers=HTML, base_url="https://localhost")
    assert "Secure" in https.headers["Set-Cookie"]


def test_the_last_errors_have_their_id_and_reason(client):
    for _ in range(2):
        answer = client.post("/predict", json={"tasks": 3})
    client.get("/nothing-here")  # any crawler asks for such
    text = text_of(shown(client))
    assert f", 2 times · POST /predict · 400 · {answer.json['id']} tasks must be a list" in text
    assert "nothing-here" not in text


def test_an_unexpected_failure_is_among_the_last_errors(client, service, monkeypatch):
    def fail(*_args: object) -> None:
        raise RuntimeError("an inner detail")

    monkeypatch.setattr(type(service.jobs), "get", fail)
    answer = client.post("/job_status", json={"job": 1})
    assert answer.status_code == 500
    text = text_of(shown(client))
    assert f"500 · {answer.json['id']} the backend failed in a way it does not know" in text
    assert "an inner detail" not in text


def test_a_version_that_cannot_be_loaded_is_shown(tmp_path, make_app):
    request = payload("10")
    with FakeLabelStudio() as label_studio:
        serve_images(label_studio, request)
        app = make_app(label_studio_url=label_studio.url, label_studio_api_key=LEGACY_TOKEN)
        client, service = app.test_client(), app.extensions["ml_backend"].service
        versions = service.registry.project(request["project"])
        version = add_version(versions, tmp_path, means=MEANS)
        version.adapter.write_bytes(b"poison")
        versions.activate(1)
        client.post("/predict", json=request)
        text = text_of(shown(client))
    assert f"project {request['project']} is served by sam-tiny-" in text
    assert "it was changed: roll back, or train again" in text


def test_what_is_damaged_does_not_take_the_page_down(client, service, versions, monkeypatch):
    folder = versions.find(2).folder
    for name, content in {"judgement.json": b"[", "curves.json": b'{"a": 1}'}.items():
        (folder / name).write_bytes(content)
    (folder.parent / "1" / "judgement.json").write_bytes(b'{"means": 3, "rows": [1, {}, null]}')
    assert "v2 serving" in text_of(shown(client))
    (folder / "manifest.json").write_bytes(b"{")
    assert "must be the manifest of version 2" in text_of(shown(client))
    (folder.parents[1] / "active.json").write_bytes(b"{")
    assert "must be what the backend wrote" in text_of(shown(client))
    service.jobs._database.close()
    assert "must be a database that can be read and written" in text_of(shown(client))
