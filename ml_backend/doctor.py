"""What can be wrong between Label Studio, the backend and its weights, checked one by one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from xml.etree import ElementTree

import requests

from ml_backend.connect import ProjectClient, basic_auth_of
from ml_backend.errors import BackendError, LabelConfigError
from ml_backend.label_config import Control, LabelConfig, parse_label_config
from ml_backend.label_studio import project_name
from ml_backend.settings import Settings
from sam_ext.errors import SamExtError

__all__ = [
    "Finding",
    "State",
    "check_backend",
    "check_drawing",
    "check_label_config",
    "check_label_studio",
    "check_model",
    "check_project",
    "diagnose",
]

State = Literal["ok", "warning", "failure"]

_CONNECTED = "CO"
_TIMEOUT_S = 5.0
_PREDICT_TIMEOUT_S = 100.0  # so long Label Studio waits
_IN_THE_MIDDLE: dict[str, dict[str, float]] = {
    "keypoint": {"x": 50, "y": 50, "width": 1},
    "rectangle": {"x": 25, "y": 25, "width": 50, "height": 50, "rotation": 0},
    "ellipse": {"x": 50, "y": 50, "radiusX": 25, "radiusY": 25, "rotation": 0},
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    check: str
    state: State
    detail: str
    """What was found and, unless it is ok, what to do."""


def diagnose(
    settings: Settings,
    *,
    label_studio_url: str | None,
    token: str | None,
    project_id: int | None,
    backend_url: str,
) -> Iterator[Finding]:
    """Check everything that the arguments allow to check; a finding never raises.

    Args:
        settings: The backend's.
        label_studio_url: Label Studio as it is reached from here; None leaves its checks out.
        token: What opens it.
        project_id: The project whose labelling config and connection are checked as well.
        backend_url: The backend as Label Studio reaches it.
    """
    yield from check_model(settings)
    of_backend = list(check_backend(backend_url))
    yield from of_backend
    if label_studio_url is None:
        yield Finding(
            check="Label Studio",
            state="warning",
            detail="not checked; give --url or set LABEL_STUDIO_URL. Without it the backend uses "
            "the host name that /setup announces, which another container cannot reach",
        )
        return
    try:
        client = ProjectClient(label_studio_url, token)
        findings = list(check_label_studio(client))
        yield from findings
        if any(finding.state == "failure" for finding in findings):
            return
        if project_id is None:
            yield Finding(
                check="project",
                state="warning",
                detail="not checked; give --project with the number in the project's address",
            )
            return
        yield from check_project(client, project_id, settings=settings, backend_url=backend_url)
        if all(finding.state == "ok" for finding in of_backend):
            yield from check_drawing(client, project_id, settings=settings, backend_url=backend_url)
    except BackendError as error:
        yield Finding(check="Label Studio", state="failure", detail=str(error))


def check_model(settings: Settings) -> Iterator[Finding]:
    """Whether the weights are there and load, and whether the device is."""
    from sam_ext.checkpoints import PUBLISHED, find_checkpoint, load_sam, resolve_device

    name, weights_dir = settings.sam_model, settings.weights_dir
    published = PUBLISHED.get(name)
    if published and not settings.sam_offline and not (weights_dir / published.file_name).exists():
        yield Finding(
            check="weights",
            state="warning",
            detail=f"{name} is downloaded at the first start "
            f"({published.size / 1e6:.0f} MB from {settings.sam_weights_url or published.url})",
        )
    else:
        try:
            path = find_checkpoint(name, weights_dir=weights_dir, offline=True)
            sam = load_sam(name, weights_dir=weights_dir, offline=True)
            millions = sum(parameter.numel() for parameter in sam.parameters()) / 1e6
            detail = f"{name}: {path}, {millions:.1f} M parameters"
            yield Finding(check="weights", state="ok", detail=detail)
        except SamExtError as error:
            yield Finding(check="weights", state="failure", detail=f"SAM_MODEL: {error}")
    try:
        device = resolve_device(settings.sam_device)
        yield Finding(check="device", state="ok", detail=f"{settings.sam_device}: {device}")
    except SamExtError as error:
        yield Finding(check="device", state="failure", detail=f"SAM_DEVICE: {error}")


def check_backend(url: str) -> Iterator[Finding]:
    """Whether a backend answers at its address."""
    try:
        with requests.Session() as session:
            session.trust_env = False
            answer = session.get(f"{url.rstrip('/')}/health", timeout=_TIMEOUT_S)
        body = answer.json()
    except (requests.RequestException, ValueError):
        yield Finding(
            check="backend",
            state="warning",
            detail=f"{url}/health does not answer from here; start it with `sam-ml-backend serve`, "
            "or give --backend-url",
        )
        return
    ok = answer.ok and isinstance(body, dict) and body.get("status") == "UP"
    version = body.get("model_version") if isinstance(body, dict) else None
    yield Finding(
        check="backend",
        state="ok" if ok else "failure",
        detail=f"{url}: {version}"
        if ok
        else f"{url}/health must answer status UP, got {answer.status_code} {str(body)[:100]}; "
        "read the backend's log",
    )


def check_label_studio(client: ProjectClient) -> Iterator[Finding]:
    """Whether Label Studio answers, what kind of token this is, and whether it opens anything."""
    try:
        version = client.version()
        yield Finding(
            check="Label Studio", state="ok", detail=f"{client.base_url}, release {version}"
        )
    except BackendError as error:
        yield Finding(check="Label Studio", state="failure", detail=str(error))
        return
    if client.token is None:
        yield Finding(
            check="token",
            state="failure",
            detail="none; give --token or set LABEL_STUDIO_API_KEY to a personal access token "
            "(Account & Settings). Label Studio announces only a legacy token to backends, and "
            "refuses those by default",
        )
        return
    try:
        header = client.authorization(client.base_url) or ""
        user = client.whoami()
    except BackendError as error:
        yield Finding(check="token", state="failure", detail=str(error))
        return
    email = user.get("email")
    if header.startswith("Token "):
        yield Finding(check="token", state="ok", detail=f"a legacy token of {email}")
    elif client.token in header:
        yield Finding(
            check="token",
            state="warning",
            detail=f"an access token of {email}, good for minutes only; use a personal access "
            "token (Account & Settings)",
        )
    else:
        yield Finding(check="token", state="ok", detail=f"a personal access token of {email}")


def check_project(
    client: ProjectClient, project_id: int, *, settings: Settings, backend_url: str
) -> Iterator[Finding]:
    """The project's labelling config and its connection to the backend.

    Raises:
        LabelStudioError: If Label Studio does not answer, or has no such project.
    """
    project = client.get_project(project_id)
    yield from check_label_config(project["label_config"], settings=settings)
    yield from _check_connection(client, project_id, backend_url=backend_url)


def check_drawing(
    client: ProjectClient, project_id: int, *, settings: Settings, backend_url: str
) -> Iterator[Finding]:
    """Whether the backend answers a drawing on one of the project's tasks, image and all.

    It is asked as Label Studio asks it, so what it says of its own token, of the image's address
    and of the config is what annotators would never see.

    Raises:
        LabelStudioError: If Label Studio does not answer, or has no such project.
    """
    check = "drawing"
    project = client.get_project(project_id)
    tasks = client.list_tasks(project_id, limit=1)
    try:
        drawing = _drawing(parse_label_config(project["label_config"]))
    except LabelConfigError:
        drawing = None
    if drawing is None or not tasks:
        missing = "a task" if drawing else "a labelling config"
        yield Finding(
            check=check, state="warning", detail=f"not tried; the project has not {missing} for it"
        )
        return
    body = {
        "tasks": tasks,
        "project": project_name(project),
        "label_config": project["label_config"],
        "params": {"context": {"result": [drawing]}},
    }
    where, started = f"task {tasks[0]['id']}", time.monotonic()
    try:
        with requests.Session() as session:
            session.trust_env = False
            answer = session.post(
                f"{backend_url.rstrip('/')}/predict",
                json=body,
                auth=basic_auth_of(settings),
                timeout=_PREDICT_TIMEOUT_S,
            )
        content = answer.json()
        if not answer.ok:
            detail = f"{where}: {content['error']} (id {content['id']} in the backend's log)"
            yield Finding(check=check, state="failure", detail=detail)
            return
        regions = content["results"][0]["result"]
    except (requests.RequestException, ValueError, LookupError, TypeError) as error:
        detail = f"{where}: {backend_url}/predict must answer, got {type(error).__name__}"
        yield Finding(check=check, state="failure", detail=f"{detail}; read the backend's log")
        return
    kinds = ", ".join(sorted({region["type"] for region in regions})) or "nothing"
    yield Finding(
        check=check,
        state="ok",
        detail=f"{where}: a {drawing['type']} in the middle was answered with {kinds} in "
        f"{time.monotonic() - started:.1f} s",
    )


def _drawing(config: LabelConfig) -> dict[str, Any] | None:
    """Draw in the middle of an image, as the page would send it; None if nothing can be drawn."""
    for image in config.images:
        for control in config.prompts_for(image.name):
            value: dict[str, Any] = {**_IN_THE_MIDDLE[control.kind]}
            if control.value_key and control.labels:
                value[control.value_key] = [control.labels[0]]
            place = {"item_index": 0} if image.is_list else {}
            return {
                "id": "doctor",
                "from_name": control.name,
                "to_name": image.name,
                "type": control.result_type,
                "value": value,
                **place,
            }
    return None


def check_label_config(xml: str, *, settings: Settings) -> Iterator[Finding]:
    """Whether annotators can prompt with the config, and masks be answered into it."""
    check = "labelling config"
    try:
        config = parse_label_config(xml)
        outputs = [
            control.name
            for image in config.images
            for control in config.outputs_for(image.name, wanted=settings.sam_output)
        ]
    except LabelConfigError as error:
        yield Finding(check=check, state="failure", detail=str(error))
        return
    smart = _smart_attributes(xml)
    prompts = [
        control
        for image in config.images
        for control in config.prompts_for(image.name)
        if _is_prompt(control, smart, outputs)
    ]
    problems = []
    if not prompts:
        yield Finding(
            check=check,
            state="failure",
            detail="nothing to prompt with; add <KeyPointLabels> or <RectangleLabels> with "
            'smart="true" smartOnly="true", and the mask tag\'s labels in it',
        )
        return
    for name in outputs:
        kind = next(control.kind for control in config.controls if control.name == name)
        if kind in ("brush", "bitmask", "polygon") and smart.get(name) != "false":
            problems.append(
                f'{name} must have smart="false": otherwise it is offered as a smart tool, first '
                "in the list, that never asks the backend"
            )
    problems += _unanswered_labels(config, settings=settings)
    if problems:
        yield Finding(check=check, state="warning", detail="; ".join(problems))
    else:
        names = ", ".join(dict.fromkeys(control.name for control in prompts))
        detail = f"prompts: {names}; answers: {', '.join(dict.fromkeys(outputs))}"
        yield Finding(check=check, state="ok", detail=detail)


def _is_prompt(control: Control, smart: Mapping[str, str], outputs: list[str]) -> bool:
    """Say whether a tag asks the backend; one that takes answers does if it says so."""
    if control.name in outputs:
        return control.smart
    return smart.get(control.name) != "false"


def _smart_attributes(xml: str) -> dict[str, str]:
    """`smart` as it is written, by control tag; Label Studio takes a missing one as true."""
    written = {}
    for element in ElementTree.fromstring(xml).iter():
        attributes = {name.lower(): value for name, value in element.attrib.items()}
        if "name" in attributes:
            written[attributes["name"]] = attributes.get("smart", "").lower()
    return written


def _unanswered_labels(config: LabelConfig, *, settings: Settings) -> list[str]:
    """The labels that a prompt may carry and a mask may not."""
    problems = []
    for image in config.images:
        answers = config.outputs_for(image.name, wanted=settings.sam_output)
        for prompt in config.prompts_for(image.name):
            for answer in answers:
                if answer.value_key is None:
                    continue  # labelled by a <Labels> tag
                lost = [
                    label for label in prompt.labels if config.resolve_label(answer, label) is None
                ]
                if lost:
                    problems.append(
                        f"{answer.name} lacks the labels {', '.join(lost)} of {prompt.name}: "
                        "masks for them come without a label"
                    )
    return problems


def _check_connection(
    client: ProjectClient, project_id: int, *, backend_url: str
) -> Iterator[Finding]:
    check = "connection"
    rows = client.list_backends(project_id)
    backend = next((row for row in rows if row["url"].rstrip("/") == backend_url.rstrip("/")), None)
    if backend is None:
        others = ", ".join(str(row["url"]) for row in rows) or "none"
        yield Finding(
            check=check,
            state="failure",
            detail=f"the project must have {backend_url} as a model, got {others}; run "
            f"`sam-ml-backend connect --project {project_id} --backend-url {backend_url}`",
        )
        return
    if problem := _connection_problem(backend):
        yield Finding(check=check, state="failure", detail=problem)
        return
    hooks = [str(hook["url"]).rstrip("/") for hook in client.list_webhooks(project_id)]
    if f"{backend_url.rstrip('/')}/webhook" not in hooks:
        yield Finding(
            check=check,
            state="warning",
            detail="connected, but without its webhook: the backend hears of no annotation. Start "
            "Label Studio with LABEL_STUDIO_USE_DEFAULT_BANNED_SUBNETS=false, delete the model "
            "and connect it again",
        )
        return
    detail = f"{backend['title']} at {backend_url}, interactive, {backend['model_version']}"
    yield Finding(check=check, state="ok", detail=detail)


def _connection_problem(backend: dict[str, Any]) -> str | None:
    if backend["state"] != _CONNECTED:
        return (
            f"Label Studio does not reach {backend['url']}: {backend['readable_state']}, "
            f"{backend['error_message']}; the address must be good on Label Studio's machine"
        )
    if not backend["is_interactive"]:
        return (
            f"{backend['title']} must be used for interactive preannotations, but is not; "
            "switch it on in Settings > Model, or run `sam-ml-backend connect`"
        )
    return None
