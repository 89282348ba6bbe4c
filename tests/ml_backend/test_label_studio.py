import json
import threading

import pytest

from ml_backend.errors import BadRequestError, LabelStudioError
from ml_backend.label_studio import (
    LabelStudioClient,
    LabelStudioUnreachableError,
    Origin,
    origin_of,
    project_name,
    project_number,
)
from tests.ml_backend.backend import payload
from tests.ml_backend.servers import (
    LEGACY_TOKEN,
    Answer,
    FakeLabelStudio,
    Server,
    json_answer,
    jwt,
    redirect,
)

BACKEND_URL = "http://127.0.0.1:9090"


@pytest.fixture
def label_studio():
    with FakeLabelStudio() as server:
        yield server


@pytest.fixture
def client(label_studio):
    return LabelStudioClient(label_studio.url, label_studio.personal_access_token)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        pytest.param("http://ls/a", Origin("http", "ls", 80), id="port of http"),
        pytest.param("https://ls/a", Origin("https", "ls", 443), id="port of https"),
        pytest.param("http://LS.Example:8080", Origin("http", "ls.example", 8080), id="case"),
        pytest.param("http://[::1]:8080/a", Origin("http", "::1", 8080), id="IPv6"),
        pytest.param("http://ls:80@evil/a", Origin("http", "evil", 80), id="host after user"),
        pytest.param("http://bücher/a", Origin("http", "xn--bcher-kva", 80), id="IDNA"),
    ],
)
def test_an_origin_is_scheme_host_and_port(url, expected):
    assert origin_of(url) == expected


@pytest.mark.parametrize("url", ["ftp://ls/a", "/data/a", "http:///a", "http://ls:x/a", ""])
def test_what_has_no_http_origin_is_refused(url):
    with pytest.raises(ValueError):
        origin_of(url)


@pytest.mark.parametrize(
    ("base_url", "address", "expected"),
    [
        pytest.param("http://ls:8080", "/data/a.png", "http://ls:8080/data/a.png", id="path"),
        pytest.param("http://ls:8080/", "/data/a.png", "http://ls:8080/data/a.png", id="slash"),
        pytest.param("http://ls/sub", "/data/a.png", "http://ls/sub/data/a.png", id="sub-path"),
        pytest.param("http://ls/sub", "/sub/data/a.png", "http://ls/sub/data/a.png", id="said"),
        pytest.param("http://ls:80", "http://LS/a.png?b=c", "http://LS/a.png?b=c", id="own URL"),
        pytest.param(
            "http://ls:8080",
            "http://localhost:8180/data/local-files/?d=sub/local%20one.png",
            "http://ls:8080/data/local-files/?d=sub/local%20one.png",
            id="host name that /setup announced",
        ),
        pytest.param("http://ls:8080", "http://ls:8081/a.png", None, id="other port"),
        pytest.param("http://ls:8080", "https://ls:8080/a.png", None, id="other scheme"),
        pytest.param("http://ls:8080", "//evil/a.png", None, id="host without a scheme"),
        pytest.param("http://ls:8080", "http://ls:8080@evil/a.png", None, id="host as user"),
        pytest.param("http://ls:8080", "s3://bucket/a.png", None, id="cloud"),
    ],
)
def test_an_address_is_label_studios_own_or_not(base_url, address, expected):
    client = LabelStudioClient(base_url, None, announced_url="http://localhost:8180")
    assert client.url_of(address) == expected


def test_an_address_that_is_no_url_is_refused_at_once():
    with pytest.raises(LabelStudioError) as raised:
        LabelStudioClient("label-studio:8080", None)
    assert str(raised.value) == (
        "Label Studio's address must be like http://host:8080, got 'label-studio:8080' (scheme "
        "must be http or https, got 'label-studio'); set LABEL_STUDIO_URL"
    )


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        pytest.param(LEGACY_TOKEN, f"Token {LEGACY_TOKEN}", id="legacy"),
        pytest.param(jwt("access"), f"Bearer {jwt('access')}", id="access"),
        pytest.param("a.b.c", "Token a.b.c", id="three parts but no JWT"),
        pytest.param(None, None, id="none"),
        pytest.param("", None, id="empty"),
    ],
)
def test_a_token_is_sent_as_its_kind_wants_it(token, expected):
    client = LabelStudioClient("http://ls:8080", token)
    assert client.authorization("http://ls:8080/data/a.png") == expected


@pytest.mark.parametrize(
    "url",
    ["http://ls:8081/a", "https://ls:8080/a", "http://ls.evil:8080/a", "http://ls:8080@evil/"],
)
def test_no_authorization_for_another_origin(url):
    assert LabelStudioClient("http://ls:8080", LEGACY_TOKEN).authorization(url) is None


def test_a_personal_access_token_is_exchanged_once_by_many_threads(label_studio, client):
    headers = []

    def ask():
        headers.append(client.authorization(label_studio.url))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert headers == [f"Bearer {jwt('access', 1)}"] * 8
    assert label_studio.exchanged == 1
    assert label_studio.sent("authorization") == [None]


def test_an_access_token_is_exchanged_again_after_four_minutes(label_studio, client, monkeypatch):
    first = client.authorization(label_studio.url)
    now = client._access[1]  # stale from here on
    monkeypatch.setattr("ml_backend.label_studio.time.monotonic", lambda: now)
    assert client.authorization(label_studio.url) != first


def test_a_refused_header_is_renewed_but_not_one_that_others_renewed_already(label_studio, client):
    old = client.authorization(label_studio.url)
    new = client.authorization(label_studio.url, refused=old)
    assert new != old
    assert client.authorization(label_studio.url, refused=old) == new
    assert label_studio.exchanged == 2


def test_an_api_call_outlives_its_access_token(label_studio, client):
    assert client.version() == "1.23.2"
    label_studio.expire_access_token()
    assert client.whoami() == {"id": 1, "email": "admin@example.com"}


def test_a_refused_personal_access_token_says_where_to_get_another(label_studio):
    client = LabelStudioClient(label_studio.url, jwt("refresh", 7))
    with pytest.raises(LabelStudioError) as raised:
        client.version()
    assert str(raised.value) == (
        f"token: {label_studio.url} must exchange the personal access token, got status 401 (Token "
        "is invalid); make a new one (Account & Settings > Personal Access Token) and set "
        "LABEL_STUDIO_API_KEY to it"
    )


def test_a_refused_legacy_token_says_what_to_set(label_studio):
    client = LabelStudioClient(label_studio.url, LEGACY_TOKEN)
    with pytest.raises(LabelStudioError) as raised:
        client.version()
    assert str(raised.value) == (
        f"token: GET {label_studio.url}/api/version/ must accept the token, got status 401 "
        "(Authentication credentials were not provided.); set LABEL_STUDIO_API_KEY to a personal "
        "access token (Account & Settings), legacy tokens are off by default"
    )
    assert len(label_studio.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_neither_a_token_nor_a_refresh_follows_a_redirect(label_studio, status):
    with Server() as other:
        label_studio.legacy_tokens_enabled = True
        label_studio.routes["/api/version/"] = redirect(f"{other.url}/api/version/?s=1", status)
        with pytest.raises(LabelStudioError) as raised:
            LabelStudioClient(label_studio.url, LEGACY_TOKEN).version()
        with Server() as moved:
            moved.routes["/api/token/refresh"] = redirect(f"{other.url}/token", status)
            with pytest.raises(LabelStudioError):
                LabelStudioClient(moved.url, jwt("refresh")).version()
        assert other.requests == []
    assert str(raised.value) == (
        f"GET {label_studio.url}/api/version/ must answer itself, got a redirect to "
        f"{other.url}/api/version/; set LABEL_STUDIO_URL to where Label Studio really is"
    )


def test_a_netrc_entry_does_not_replace_the_token(label_studio, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    label_studio.legacy_tokens_enabled = True
    assert LabelStudioClient(label_studio.url, LEGACY_TOKEN).version() == "1.23.2"


def test_label_studio_that_is_away_is_named_with_its_address():
    with Server() as server:
        pass
    with pytest.raises(LabelStudioUnreachableError) as raised:
        LabelStudioClient(server.url, LEGACY_TOKEN).version()
    assert str(raised.value) == (
        f"Label Studio must answer at {server.url}/api/version/, got no connection; check that it "
        "runs and that LABEL_STUDIO_URL is its address from here"
    )


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        pytest.param(Answer(b"<html>"), "must answer with JSON, got '<html>'", id="a web page"),
        pytest.param(json_answer([1]), "must answer with a JSON object, got list", id="a list"),
        pytest.param(Answer(status=500), "must answer 2xx, got status 500", id="an error"),
    ],
)
def test_an_answer_that_is_not_label_studios_is_refused(label_studio, client, answer, message):
    label_studio.routes["/api/version/"] = answer
    with pytest.raises(LabelStudioError, match=message):
        client.version()


@pytest.mark.parametrize(
    ("status", "is_away"), [(502, True), (503, True), (504, True), (500, False)]
)
def test_a_proxy_before_a_label_studio_that_is_away_says_no_more_than_none(
    label_studio, client, status, is_away
):
    label_studio.routes["/api/projects/"] = Answer(status=status)
    with pytest.raises(LabelStudioError, match=f"got status {status}") as error:
        client.list_projects()
    assert isinstance(error.value, LabelStudioUnreachableError) == is_away


def test_projects_are_listed_over_all_pages(label_studio, client):
    label_studio.projects = [{"id": number, "title": "…"} for number in range(1, 202)]
    assert client.list_projects() == label_studio.projects


def test_a_project_is_created_and_filled(label_studio, client, tmp_path):
    paths = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for path in paths:
        path.write_bytes(b"pixels")
    project = client.create_project("Cats", "<View/>")
    assert project == {"id": 1, "title": "Cats", "label_config": "<View/>"}
    assert client.get_project(1) == project
    assert client.import_files(1, paths) == {"task_count": 3}


def test_a_validation_error_is_passed_on(client):
    with pytest.raises(LabelStudioError, match="at least 3 characters"):
        client.create_project("Ca", "<View/>")


def test_a_backend_is_connected_as_interactive_and_a_second_time_updated(label_studio, client):
    client.connect_backend(4, BACKEND_URL, "SAM")
    connected = client.connect_backend(4, BACKEND_URL + "/", "SAM 2")
    assert connected == {
        "id": 1,
        "project": 4,
        "url": BACKEND_URL + "/",
        "title": "SAM 2",
        "is_interactive": True,
        "auth_method": "NONE",
    }
    assert label_studio.backends == [connected]


def test_basic_auth_goes_to_the_backend_and_into_its_webhooks_headers(label_studio, client):
    label_studio.webhooks = [{"id": 1, "url": "http://elsewhere/webhook", "headers": {}}]
    backend = client.connect_backend(4, BACKEND_URL, "SAM", basic_auth=("user", "päss"))
    assert (backend["auth_method"], backend["basic_auth_user"]) == ("BASIC_AUTH", "user")
    assert label_studio.webhooks == [
        {"id": 1, "url": "http://elsewhere/webhook", "headers": {}},
        {
            "id": 2,
            "url": f"{BACKEND_URL}/webhook",
            "headers": {"Authorization": "Basic dXNlcjpww6Rzcw=="},
        },
    ]


def test_a_refused_local_address_says_how_to_start_label_studio(label_studio, client):
    label_studio.routes["/api/ml/"] = lambda request: (
        json_answer([])
        if request.method == "GET"
        else json_answer({"detail": "URL resolves to a reserved network address"}, 403)
    )
    with pytest.raises(LabelStudioError, match="LABEL_STUDIO_USE_DEFAULT_BANNED_SUBNETS=false"):
        client.connect_backend(4, BACKEND_URL, "SAM")
    assert json.loads(label_studio.requests[-1].body)["url"] == BACKEND_URL


def test_a_cloud_uri_is_presigned_by_its_task():
    url = LabelStudioClient("http://ls/sub", None).presign_url(5, "s3://bucket/dir/x y.png")
    assert url == "http://ls/sub/tasks/5/presign/?fileuri=czM6Ly9idWNrZXQvZGlyL3ggeS5wbmc="


def test_tasks_are_listed_by_their_ids(client, label_studio):
    label_studio.tasks = [
        {"id": number, "project": 3 if number != 7 else 4, "data": {"image": f"s3://b/{number}"}}
        for number in (9, 5, 7, 6, 8)
    ]
    assert [task["id"] for task in client.list_tasks(3)] == [5, 6, 8, 9]
    assert client.list_tasks(3, after=5, limit=2) == [
        {"id": 6, "project": 3, "data": {"image": "s3://b/6"}},
        {"id": 8, "project": 3, "data": {"image": "s3://b/8"}},
    ]
    assert client.list_tasks(3, after=9) == []


def test_annotated_tasks_are_listed_over_all_pages_with_their_annotations(client, label_studio):
    done, skipped = ({"id": 1, "was_cancelled": cancelled, "result": []} for cancelled in (0, 1))
    annotations = {5: [done], 6: [], 7: [skipped], 8: [skipped, done], 9: [done]}
    label_studio.tasks = [
        {"id": number, "project": 3, "data": {}, "annotations": ones}
        for number, ones in annotations.items()
    ]
    tasks = list(client.annotated_tasks(3, page_size=2))
    assert [task["id"] for task in tasks] == [5, 8, 9]
    assert tasks[1]["annotations"] == [skipped, done]
    assert len([r for r in label_studio.requests if r.path.startswith("/api/tasks/")]) == 3
    assert "annotations" not in client.list_tasks(3)[0]


@pytest.mark.parametrize("number", ["33", "36"])
def test_a_project_is_named_as_in_setup(number):
    assert project_name(payload(number)["project"]) == "1.1795194739"
    assert payload("02")["project"].partition(".")[2].isdecimal()


@pytest.mark.parametrize(
    ("project", "message"),
    [
        pytest.param({}, "project.id must be a number, got NoneType", id="empty"),
        pytest.param({"id": True}, "project.id must be a number, got bool", id="no-number"),
        pytest.param({"id": -1}, "project.id must be a number, got int", id="negative"),
        pytest.param({"id": 1}, "project.created_at must be a time such as", id="no-time"),
        pytest.param(
            {"id": 1, "created_at": "soon"}, "such as 2026-11-20T17:12:19Z, got 'soon'", id="text"
        ),
    ],
)
def test_what_is_no_project_is_not_named(project, message):
    with pytest.raises(BadRequestError) as caught:
        project_name(project)
    assert message in str(caught.value)


def test_the_number_in_a_name():
    assert project_number("35.1795197330") == 35
    assert project_number("35") == 35
    assert project_number("x.1") is None
