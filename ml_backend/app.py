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
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_args

import label_studio_ml.api
import prometheus_client
from flask import Flask, Response, current_app, g, jsonify, request
from label_studio_ml.model import LabelStudioMLManager
from prometheus_client import CollectorRegistry, Gauge, Histogram
from werkzeug.exceptions import BadRequest, HTTPException
from werkzeug.local import LocalProxy

from ml_backend.connections import Connections
from ml_backend.engine import Engine
from ml_backend.errors import (
    BackendError,
    BadRequestError,
    ForbiddenError,
    JobExistsError,
    JobNotFoundError,
    OverloadedError,
    SettingsError,
    UnauthorizedError,
)
from ml_backend.images import ImageLoader
from ml_backend.jobs import Job, JobQueue, JobState, JobStore
from ml_backend.loading import load_models, open_registry, open_store
from ml_backend.model import SamBackend, Service
from ml_backend.models import ServedModel
from ml_backend.prefetch import Prefetcher
from ml_backend.registry import is_project_name
from ml_backend.settings import Settings, TrainMethod
from ml_backend.triggers import handle_event, start_job
from ml_backend.web.forms import has_own_origin
from ml_backend.web.page import PAGE, add_status_page
from ml_backend.web.recent_errors import RecentErrors
from sam_ext.automatic import default_grid
from sam_ext.interactive import default_crops
from sam_ext.predictor import Predictor

__all__ = ["Manager", "create_app"]

_log = logging.getLogger(__name__)

_EXTENSION = "ml_backend"
_OPEN_PATHS = ("/health", "/webhook")
_POLLED_PATHS = ("/", "/health", "/metrics")
# A batch carries the finished masks of every selected task, an event those of one.
_MAX_BODY_BYTES = {"/predict": 512 * 2**20, "/webhook": 32 * 2**20}
_MAX_OTHER_BODY_BYTES = 4 * 2**20
_MAX_REASON = 300
# What extra params, as the Model page calls them, may say.
_TRAIN_METHOD = "train_method"
# What Label Studio understands of a job's state.
_JOB_STATUS: dict[JobState, str] = {
    "queued": "queued",
    "running": "started",
    "judging": "started",
    "promoted": "finished",
    "rejected": "finished",
    "failed": "failed",
    "cancelled": "canceled",
}


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
    registry, store = open_registry(settings), open_store(settings)
    models = load_models(settings, registry=registry, store=store, predictor=predictor)
    _log.info("%s", _what_is_on(models.base))
    if _is_open(settings):
        _log.warning(
            "whoever reaches %s:%d may say which Label Studio projects are on, and the backend "
            "fetches images from there; set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY, or "
            "BASIC_AUTH_USER and BASIC_AUTH_PASS, or HOST=127.0.0.1",
            settings.host,
            settings.port,
        )
    connections = Connections(settings)
    recent_errors = RecentErrors()
    engine = Engine(
        cache_bytes=settings.embedding_cache_bytes,
        max_waiting=settings.max_waiting,
        store=store,
        crops=default_crops(models.base.predictor.image_size) if settings.sam_crops else None,
        automatic_options=default_grid(models.base.predictor.image_size),
    )
    service = Service(
        settings=settings,
        registry=registry,
        models=models,
        engine=engine,
        images=ImageLoader(
            settings,
            connections.client_for,
            known_size=lambda digest: engine.known_size(digest, models.predictors),
        ),
        client_for=connections.client_for,
        method_for=connections.method_for,
        jobs=JobStore(settings.data_dir),
        queue=JobQueue(settings),
        prefetcher=Prefetcher(engine) if settings.sam_prefetch else None,
        report=partial(_report, recent_errors),
    )

    app = Flask(__name__, static_folder=None)
    app.extensions[_EXTENSION] = Manager(service, connections)
    # Its views look the manager up when they are called; each app has its own.
    label_studio_ml.api._manager = LocalProxy(lambda: current_app.extensions[_EXTENSION])
    # On level debug it would write the token of /setup into the log.
    logging.getLogger("label_studio_ml").setLevel(logging.INFO)
    _add_routes(app, service)
    _add_metrics(app, service)
    _add_guards(app, settings, recent_errors)
    add_status_page(app, service, recent_errors)
    return app


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
        name = _needed_project_in(project)
        extra_params = _extra_params_in(request.get_json().get("extra_params"))
        train_method = _train_method_in(extra_params)
        if unknown := [name for name in extra_params if name != _TRAIN_METHOD]:
            _log.warning("/setup: extra_params have no effect: %s", ", ".join(unknown))
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
            train_method=train_method,
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
            BackendError: If training was asked for, and is under way or cannot be queued. Any 2xx
                would make Label Studio say "Training" on the Model page; a refusal is shown there
                as what it is.
        """
        name = _text_in("action", event)
        _log.info("/webhook: %.60r", name)
        service = self.service
        return handle_event(
            name,
            data,
            jobs=service.jobs,
            queue=service.queue,
            settings=service.settings,
            method_for=service.method_for,
        )

    def train(
        self, annotations: object, project: object, label_config: object, **_params: object
    ) -> Job:
        """Queue a training, as START_TRAINING does.

        Raises:
            BackendError: If one is under way, or it cannot be queued.
        """
        name, service = _needed_project_in(project), self.service
        method = service.method_for(name)
        return start_job(name, "start_training", method, jobs=service.jobs, queue=service.queue)

    def is_training(self, project: object) -> dict[str, Any]:
        """Say whether a project, or without one any, has a training under way."""
        name, jobs = _project_in(project), self.service.jobs
        if name is not None:
            job = jobs.unfinished(name)
        else:
            job = next((job for job in jobs.jobs() if not job.is_finished), None)
        return {
            "is_training": job is not None,
            "job": None if job is None else job.id,
            "model_version": self.service.models.version_of(name),
        }


def _add_routes(app: Flask, service: Service) -> None:
    def health() -> Response:
        problems = list(service.models.errors.values())
        if problems and not _has_credentials(service.settings):  # they name folders
            problems = [
                f"{len(problems)} problems; with basic auth, this and the page at / say more"
            ]
        return jsonify(
            status="UP",
            model=service.settings.sam_model,
            model_version=base.model_version,
            device=str(base.predictor.device),
            stable_sam=base.predictor.stable_sam is not None,
            problems=problems,
        )

    def versions() -> Response:
        body = request.get_json() if request.method == "POST" else request.args
        name = _project_in(body.get("project"))
        names = service.registry.names() if name is None else [name]
        found = [
            version.model_version
            for one in names
            for version in service.registry.project(one).versions()
        ]
        return jsonify(versions=[base.model_version, *found])

    def job_status() -> Response:
        try:
            job = service.jobs.get(_job_in(request.get_json().get("job")))
        except JobNotFoundError as error:
            return _error_response(str(error), 410)  # which Label Studio takes for "removed"
        return jsonify(
            job=job.id,
            job_status=_JOB_STATUS[job.state],
            state=job.state,
            reason=job.reason,
            method=job.method,
            progress=job.progress,
            created_at=job.created_at,
            started_at=job.started_at,
            finished_at=job.finished_at,
        )

    base = service.models.base
    own: dict[str, Callable[..., Any]] = {"health": health, "get_version": versions}
    theirs = label_studio_ml.api._server
    for rule in theirs.url_map.iter_rules():
        if rule.endpoint not in ("static", "metrics") and rule.rule != "/":  # the status page's
            view = own.get(rule.endpoint) or _bare(theirs.view_functions[rule.endpoint])
            app.add_url_rule(rule.rule, rule.endpoint, view, methods=rule.methods)
    app.add_url_rule("/versions", "versions", versions)  # which Label Studio asks with GET
    app.add_url_rule("/job_status", "job_status", job_status, methods=["POST"])


def _is_open(settings: Settings) -> bool:
    """Say whether anybody elsewhere may announce a Label Studio that is then asked for images."""
    is_known = settings.label_studio_url is not None or settings.basic_auth_user is not None
    return not is_known and settings.host not in ("127.0.0.1", "localhost", "::1")


def _what_is_on(base: ServedModel) -> str:
    plugin = base.predictor.stable_sam
    if plugin is None:
        stable = "off: SAM_STABLE is false, or the model has no plugin"
    else:
        stable = "on" if plugin.scope == "all" else "on where several points are clicked"
    return f"{base.model_version} on {base.predictor.device}; Stable-SAM is {stable}"


def _bare(view: Callable[..., Any]) -> Callable[..., Any]:
    """Take a view of label-studio-ml out of its error handler, which has it in a closure."""
    bare: Callable[..., Any] = inspect.getclosurevars(view).nonlocals.get("f", view)
    return bare


def _add_guards(app: Flask, settings: Settings, recent_errors: RecentErrors) -> None:
    """Who may ask, what a body is, and how a failure is answered."""

    @app.before_request
    def check() -> None:
        request.max_content_length = _MAX_BODY_BYTES.get(request.path, _MAX_OTHER_BODY_BYTES)
        if settings.basic_auth_user is not None and request.path not in _OPEN_PATHS:
            _check_credentials(settings)
        if request.method == "POST" and request.blueprint != PAGE:
            _check_sender()
            _check_body()
        if settings.basic_auth_user is not None and _asks_for_training():
            _check_credentials(settings)  # which Label Studio sends with this event alone

    @app.errorhandler(BackendError)
    def backend_error(error: BackendError) -> Response:
        level = logging.ERROR if error.status >= 500 else logging.WARNING
        _log.log(level, "%s %s: %s [%s]", request.method, request.path, error, g.id)
        response = _error_response(str(error), error.status)
        if isinstance(error, JobExistsError):
            response.set_data(json.dumps({**response.get_json(), "job": error.job_id}))
        if isinstance(error, OverloadedError):
            response.headers["Retry-After"] = str(error.retry_after_s)
        if isinstance(error, UnauthorizedError):
            response.headers["WWW-Authenticate"] = 'Basic realm="SAM", charset="UTF-8"'
        else:
            _note(recent_errors, str(error), error.status)
        return response

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        _log.warning("%s %s: %s [%s]", request.method, request.path, error, g.id)
        return _error_response(f"{request.method} {request.path}: {error.name}", error.code or 500)

    @app.errorhandler(Exception)
    def unexpected_error(error: Exception) -> Response:
        _log.exception("%s %s failed [%s]", request.method, request.path, g.id)
        sentence = "the backend failed in a way it does not know; look for the id in its log"
        _note(recent_errors, sentence, 500)
        return _error_response(sentence, 500)


def _has_credentials(settings: Settings) -> bool:
    if settings.basic_auth_user is None:
        return True
    assert settings.basic_auth_pass is not None
    given = request.authorization
    user = (given.username if given else None) or ""
    password = (given.password if given else None) or ""
    is_user = hmac.compare_digest(user.encode(), settings.basic_auth_user.encode())
    is_password = hmac.compare_digest(
        password.encode(), settings.basic_auth_pass.get_secret_value().encode()
    )
    return is_user and is_password


def _check_credentials(settings: Settings) -> None:
    if not _has_credentials(settings):
        raise UnauthorizedError(
            "basic auth must be BASIC_AUTH_USER and BASIC_AUTH_PASS, got others or none; set them "
            "in the project's Model page in Label Studio"
        )


def _check_sender() -> None:
    """Refuse what another site makes a browser send, with the password that it remembers."""
    origin = request.headers.get("Origin")
    is_foreign = request.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none")
    if is_foreign or (origin is not None and not has_own_origin(request)):
        raise ForbiddenError(
            f"{request.path} must be asked by a program, got a page of "
            f"{(origin or 'another site')[:100]!r}; Label Studio's server asks it"
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


def _asks_for_training() -> bool:
    return request.path == "/webhook" and request.get_json()["action"] == "START_TRAINING"


def _error_response(sentence: str, status: int) -> Response:
    response = jsonify(error=sentence, id=g.id)
    # Label Studio shows the status line and nothing of the body.
    reason = " ".join(sentence.encode("ascii", "replace").decode().split())
    response.status = f"{status} {reason[:_MAX_REASON]}"
    return response


def _note(recent_errors: RecentErrors, reason: str, status: int) -> None:
    request_line = f"{request.method} {request.path}"
    recent_errors.note(reason, request=request_line, status=status, error_id=g.id)


def _report(recent_errors: RecentErrors, reason: str, where: str) -> None:
    """Tell of what a request goes on in spite of; where that was would push other errors out."""
    _log.warning("%s %s: %s: %s [%s]", request.method, request.path, where, reason, g.id)
    _note(recent_errors, reason, 200)


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
    if not is_project_name(name):
        raise BadRequestError(
            f"project must be a project's name such as 1.1795194739, got {name[:100]!r}"
        )
    return name


def _needed_project_in(value: object) -> str:
    name = _project_in(value)
    if name is None:
        raise BadRequestError("project must be a project's name such as 1.1795194739, got null")
    return name


def _job_in(value: object) -> int:
    """A job's number; Label Studio keeps it as a text."""
    if not str(value).isdecimal():
        raise BadRequestError(f"job must be the number of a job, got {str(value)[:60]!r}")
    return int(str(value))


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
    return {name.lower(): one for name, one in params.items()}


def _train_method_in(extra_params: Mapping[str, Any]) -> TrainMethod | None:
    """Read how a project is to be trained; None where nothing is said of it."""
    value = extra_params.get(_TRAIN_METHOD)
    known: tuple[TrainMethod, ...] = get_args(TrainMethod)
    method = next((one for one in known if one == value), None)
    if value is not None and method is None:
        raise BadRequestError(
            f"extra_params.{_TRAIN_METHOD} must be one of {', '.join(known)}, got "
            f"{str(value)[:60]!r}; change it on the project's Model page"
        )
    return method


def _kind_of(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number"}
    return "null" if value is None else kinds.get(type(value), "a number")
