"""The Flask app: label-studio-ml's routes over a manager of ours, auth, errors as one sentence.

`label_studio_ml.api` keeps its app and its manager in module globals, answers errors with
tracebacks and logs whole bodies. So its routes are put on an app of our own, and its views run
bare: without its error handler and its logging, and with `Manager` in place of its manager.
"""

from __future__ import annotations

import hmac
import inspect
import json
import logging
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import label_studio_ml.api
import prometheus_client
from flask import Flask, Response, current_app, g, jsonify, request
from label_studio_ml.model import LabelStudioMLManager
from prometheus_client import CollectorRegistry, Gauge, Histogram
from werkzeug.exceptions import BadRequest, HTTPException
from werkzeug.local import LocalProxy

from ml_backend.engine import Engine
from ml_backend.errors import (
    BackendError,
    BadRequestError,
    OverloadedError,
    SettingsError,
    UnauthorizedError,
)
from ml_backend.images import ImageLoader
from ml_backend.label_studio import LabelStudioClient
from ml_backend.loading import load_predictor, open_store
from ml_backend.model import SamBackend, Service, TrainingUnavailableError
from ml_backend.prefetch import Prefetcher
from ml_backend.settings import Settings
from sam_ext.interactive import default_crops
from sam_ext.predictor import Predictor

__all__ = ["Connections", "Manager", "create_app"]

_log = logging.getLogger(__name__)

_EXTENSION = "ml_backend"
_OPEN_PATHS = ("/health", "/webhook")
_POLLED_PATHS = ("/", "/health", "/metrics")
# A batch carries the finished masks of every selected task.
_MAX_BODY_BYTES = 512 * 2**20
_MAX_REASON = 300
# SAM's own thresholds were chosen with ViT-H; `tiny` is hardly ever as sure of a mask as that.
_AUTOMATIC_OPTIONS = {
    "tiny": {"points_per_side": 16, "pred_iou_threshold": 0.6, "stability_threshold": 0.8}
}
_PROJECT = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,99}")


def create_app(settings: Settings, predictor: Predictor | None = None) -> Flask:
    """Build the service; the model is loaded here, so that no request waits for it.

    Args:
        settings: How it is set up.
        predictor: The model to answer with, instead of the one that the settings name.

    Raises:
        SettingsError: If `DATA_DIR` cannot be written to.
        CheckpointError: If the model's weights are missing, damaged or do not fit.
        ConfigError: If the device is none, or is not there.
    """
    try:
        settings.connections_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"DATA_DIR must be a folder that can be written to, got {settings.data_dir} "
            f"({error.strerror}); create it for this user, or set another one"
        ) from error
    if predictor is None:
        predictor = load_predictor(settings)
    connections = Connections(settings)
    engine = Engine(
        predictor,
        cache_bytes=settings.embedding_cache_bytes,
        max_waiting=settings.max_waiting,
        store=open_store(settings),
        crops=default_crops(predictor.image_size) if settings.sam_crops else None,
        automatic_options=_AUTOMATIC_OPTIONS.get(settings.sam_model),
    )
    service = Service(
        settings=settings,
        engine=engine,
        images=ImageLoader(settings, connections.client_for, known_size=engine.known_size),
        client_for=connections.client_for,
        prefetcher=Prefetcher(engine) if settings.sam_prefetch else None,
    )

    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = _MAX_BODY_BYTES
    app.extensions[_EXTENSION] = Manager(service, connections)
    # Its views look the manager up when they are called; each app has its own.
    label_studio_ml.api._manager = LocalProxy(lambda: current_app.extensions[_EXTENSION])
    # On level debug it would write the token of /setup into the log.
    logging.getLogger("label_studio_ml").setLevel(logging.INFO)
    _add_routes(app, service)
    _add_metrics(app, service)
    _add_guards(app, settings)
    return app


class Connections:
    """Which Label Studio a project is on, and with which token; shared by all workers.

    LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY come first. What is not set is taken from the
    project's last /setup, which is kept in a file that only this user may read: that call reaches
    one worker, once, and the next prediction may reach another one, or the same after a restart.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = settings.connections_dir
        # Kept, because a client remembers the access token that it was given.
        self._client = lru_cache(maxsize=64)(LabelStudioClient)

    def announce(self, project: str, *, hostname: str, access_token: str) -> None:
        """Keep what /setup said about a project."""
        known = {"hostname": hostname, "access_token": access_token}
        if self._announced(project) == known:
            return
        with tempfile.NamedTemporaryFile(  # which only this user may read
            "w", dir=self._folder, prefix=".", delete=False
        ) as file:
            json.dump(known, file)
        Path(file.name).replace(self._path(project))

    def client_for(self, task: Mapping[str, Any]) -> LabelStudioClient | None:
        """Give the Label Studio that a task came from; None if nobody has said where it is.

        Args:
            task: A task; `project` is its project's full name, as /setup gave it.

        Raises:
            LabelStudioError: If what /setup announced is no address.
        """
        announced = self._announced(str(task.get("project")))
        hostname = announced.get("hostname") or None
        base_url = self._settings.label_studio_url or hostname
        if base_url is None:
            return None
        key = self._settings.label_studio_api_key
        token = key.get_secret_value() if key is not None else announced.get("access_token")
        return self._client(base_url, token, announced_url=hostname)

    def _announced(self, project: str) -> dict[str, str]:
        if not _PROJECT.fullmatch(project):
            return {}
        try:
            known: dict[str, str] = json.loads(self._path(project).read_text())
        except FileNotFoundError:
            return {}
        return known

    def _path(self, project: str) -> Path:
        return self._folder / f"{project}.json"


class Manager(LabelStudioMLManager):  # type: ignore[misc]  # label-studio-ml has no types
    """What label-studio-ml's views call; holds nothing about any project.

    Its own keeps one model for all projects, which only exists once /setup has reached the very
    process, and trains in the webhook's name.
    """

    def __init__(self, service: Service, connections: Connections) -> None:
        self.service = service
        self._connections = connections

    def fetch(
        self,
        project: object,
        label_config: object,
        force_reload: object,
        *,
        hostname: object,
        access_token: object,
        model_version: object,
    ) -> SamBackend:
        """Take note of where a project's Label Studio is, and check its labelling config.

        Raises:
            BackendError: If the request is not what Label Studio sends, or the labelling config
                cannot be used; Label Studio shows the sentence on the project's Model page.
        """
        name = _project_in(project)
        if name is None:
            raise BadRequestError("project must be a project's name such as 1.1795194739, got null")
        extra_params = _extra_params_in(request.get_json().get("extra_params"))
        if extra_params:
            _log.warning("/setup: extra_params have no effect: %s", ", ".join(extra_params))
        backend = SamBackend(_text_in("schema", label_config), service=self.service, project=name)
        address = _text_in("hostname", "" if hostname is None else hostname)
        if address and not address.startswith(("http://", "https://")):
            raise BadRequestError(
                f"hostname must be an http or https address or empty, got {address[:100]!r}; set "
                "LABEL_STUDIO_HOST"
            )
        self._connections.announce(
            name,
            hostname=address,
            access_token=_text_in("access_token", "" if access_token is None else access_token),
        )
        return backend

    def predict(
        self,
        tasks: object,
        project: object,
        label_config: object,
        force_reload: object,
        try_fetch: object,
        /,
        **params: object,
    ) -> tuple[list[Any], SamBackend]:
        """Answer a predict request from nothing but itself.

        Raises:
            BackendError: If the request is not what Label Studio sends, or cannot be answered.
        """
        if not isinstance(tasks, list):
            raise BadRequestError(f"tasks must be a list, got {_kind_of(tasks)}")
        for index, task in enumerate(tasks):
            if not isinstance(task, dict):
                raise BadRequestError(f"tasks[{index}] must be an object, got {_kind_of(task)}")
        context = params.get("context")
        if not isinstance(context, dict | None):
            raise BadRequestError(
                f"params.context must be an object or null, got {_kind_of(context)}"
            )
        backend = SamBackend(
            _text_in("label_config", label_config),
            service=self.service,
            project=_project_in(project),
        )
        return backend.predict(tasks, context=context), backend

    def webhook(self, event: object, data: Mapping[str, Any]) -> dict[str, Any]:
        """Take note of an event; the body holds secrets and masks, so nothing of it is logged.

        Raises:
            TrainingUnavailableError: If the event asks for training. Any 2xx would make Label
                Studio say "Training" on the Model page; a refusal is shown there as what it is.
        """
        if event == "START_TRAINING":
            self.train()
        _log.info("/webhook: %.60r", event)
        return {}

    def train(self, *_arguments: object, **_params: object) -> NoReturn:
        """Refuse, as START_TRAINING is refused.

        Raises:
            TrainingUnavailableError: Always.
        """
        raise TrainingUnavailableError(self.service.model_version)

    def is_training(self, project: object) -> dict[str, Any]:
        """Say that nothing is trained."""
        version = self.service.model_version
        return {"is_training": False, "backend": "none", "model_version": version}


def _add_routes(app: Flask, service: Service) -> None:
    def health() -> Response:
        return jsonify(
            status="UP",
            model=service.settings.sam_model,
            model_version=service.model_version,
            device=str(service.engine.predictor.device),
        )

    def versions() -> Response:
        return jsonify(versions=[service.model_version])

    def train() -> NoReturn:
        raise TrainingUnavailableError(service.model_version)

    own: dict[str, Callable[..., Any]] = {
        "health": health,
        "get_version": versions,
        "_train": train,
    }
    theirs = label_studio_ml.api._server
    for rule in theirs.url_map.iter_rules():
        if rule.endpoint not in ("static", "metrics"):
            view = own.get(rule.endpoint) or _bare(theirs.view_functions[rule.endpoint])
            app.add_url_rule(rule.rule, rule.endpoint, view, methods=rule.methods)
    app.add_url_rule("/versions", "versions", versions)  # which Label Studio asks with GET


def _bare(view: Callable[..., Any]) -> Callable[..., Any]:
    """Take a view of label-studio-ml out of its error handler, which has it in a closure."""
    bare: Callable[..., Any] = inspect.getclosurevars(view).nonlocals.get("f", view)
    return bare


def _add_guards(app: Flask, settings: Settings) -> None:
    """Who may ask, what a body is, and how a failure is answered."""

    @app.before_request
    def check() -> None:
        if settings.basic_auth_user is not None and request.path not in _OPEN_PATHS:
            _check_credentials(settings)
        if request.method == "POST":
            _check_body()

    @app.errorhandler(BackendError)
    def backend_error(error: BackendError) -> Response:
        level = logging.ERROR if error.status >= 500 else logging.WARNING
        _log.log(level, "%s %s: %s [%s]", request.method, request.path, error, g.id)
        response = _error_response(str(error), error.status)
        if isinstance(error, TrainingUnavailableError):
            response.set_data(json.dumps({**response.get_json(), "job": None}))
        if isinstance(error, OverloadedError):
            response.headers["Retry-After"] = str(error.retry_after_s)
        if isinstance(error, UnauthorizedError):
            response.headers["WWW-Authenticate"] = 'Basic realm="SAM", charset="UTF-8"'
        return response

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        _log.warning("%s %s: %s [%s]", request.method, request.path, error, g.id)
        return _error_response(f"{request.method} {request.path}: {error.name}", error.code or 500)

    @app.errorhandler(Exception)
    def unexpected_error(error: Exception) -> Response:
        _log.exception("%s %s failed [%s]", request.method, request.path, g.id)
        return _error_response(
            "the backend failed in a way it does not know; look for the id in its log", 500
        )


def _check_credentials(settings: Settings) -> None:
    assert settings.basic_auth_user is not None
    assert settings.basic_auth_pass is not None
    given = request.authorization
    user = (given.username if given else None) or ""
    password = (given.password if given else None) or ""
    is_user = hmac.compare_digest(user.encode(), settings.basic_auth_user.encode())
    is_password = hmac.compare_digest(
        password.encode(), settings.basic_auth_pass.get_secret_value().encode()
    )
    if not (is_user and is_password):
        raise UnauthorizedError(
            "basic auth must be BASIC_AUTH_USER and BASIC_AUTH_PASS, got others or none; set them "
            "in the project's Model page in Label Studio"
        )


def _check_body() -> None:
    try:
        body = request.get_json(force=True)  # which keeps it for the view
    except (BadRequest, RecursionError) as error:
        raise BadRequestError(
            f"the body of {request.path} must be JSON, got something else"
        ) from error
    if not isinstance(body, dict):
        raise BadRequestError(
            f"the body of {request.path} must be a JSON object, got {_kind_of(body)}"
        )
    if request.path == "/webhook":
        _text_in("action", body.get("action"))
    if request.path == "/predict" and not isinstance(body.get("params") or {}, dict):
        raise BadRequestError(f"params must be an object, got {_kind_of(body['params'])}")


def _error_response(sentence: str, status: int) -> Response:
    response = jsonify(error=sentence, id=g.id)
    # Label Studio shows the status line and nothing of the body.
    reason = " ".join(sentence.encode("ascii", "replace").decode().split())
    response.status = f"{status} {reason[:_MAX_REASON]}"
    return response


def _add_metrics(app: Flask, service: Service) -> None:
    """Log each request, and count it for /metrics, where each worker tells of itself."""
    registry = CollectorRegistry()
    worker = str(os.getpid())
    seconds = Histogram(
        "sam_request_seconds",
        "Time to answer a request",
        ["worker", "path", "status"],
        buckets=(0.01, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50, 100),
        registry=registry,
    )
    gauges: dict[str, tuple[str, Callable[[], float]]] = {
        "sam_predictions_waiting": (
            "Predictions under way, running or waiting",
            lambda: service.engine.waiting,
        ),
        "sam_embedding_cache_bytes": (
            "Embeddings kept in memory",
            lambda: service.engine.embeddings.nbytes,
        ),
    }
    for name, (text, read) in gauges.items():
        Gauge(name, text, ["worker"], registry=registry).labels(worker).set_function(read)

    @app.before_request
    def start() -> None:
        g.id = uuid.uuid4().hex[:12]
        g.started = time.perf_counter()

    @app.after_request
    def observe(response: Response) -> Response:
        path = str(request.url_rule) if request.url_rule else "unknown"
        elapsed = time.perf_counter() - g.started
        seconds.labels(worker, path, str(response.status_code)).observe(elapsed)
        level = logging.DEBUG if path in _POLLED_PATHS else logging.INFO
        _log.log(
            level,
            "%s %s: %d in %.3f s [%s]",
            request.method,
            path,
            response.status_code,
            elapsed,
            g.id,
        )
        return response

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(
            prometheus_client.generate_latest(registry),
            content_type=prometheus_client.CONTENT_TYPE_LATEST,
        )


def _text_in(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise BadRequestError(f"{name} must be a string, got {_kind_of(value)}")
    return value


def _project_in(value: object) -> str | None:
    """A project as Label Studio names it; it becomes a file's name."""
    if value is None:
        return None
    name = _text_in("project", value)
    if not _PROJECT.fullmatch(name):
        raise BadRequestError(
            f"project must be a project's name such as 1.1795194739, got {name[:100]!r}"
        )
    return name


def _extra_params_in(value: object) -> dict[str, Any]:
    """Read extra_params: an object from the API, its JSON from the page, or nothing."""
    if value in (None, ""):
        return {}
    params = value
    if isinstance(value, str):
        try:
            params = json.loads(value)
        except ValueError:
            params = None
    if not isinstance(params, dict):
        raise BadRequestError(
            f"extra_params must be a JSON object or empty, got {str(value)[:100]!r}; change it on "
            "the project's Model page"
        )
    return params


def _kind_of(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number"}
    return "null" if value is None else kinds.get(type(value), "a number")
