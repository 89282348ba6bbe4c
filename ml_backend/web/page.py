"""The status page's routes: the page, its pictures, and what its buttons do."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from flask import (
    Blueprint,
    Flask,
    Response,
    abort,
    current_app,
    redirect,
    render_template,
    request,
    url_for,
)
from werkzeug.wrappers import Response as AnyResponse

from ml_backend.errors import BadRequestError, RegistryError
from ml_backend.model import Service
from ml_backend.web.checks import Checker, check
from ml_backend.web.forms import FormGuard
from ml_backend.web.recent_errors import RecentErrors
from ml_backend.web.view import ago, duration, find_picture, overview

__all__ = ["PAGE", "add_status_page"]

_log = logging.getLogger(__name__)

PAGE = "status_page"
"""The blueprint's name: requests to it carry forms, not JSON."""

_MAX_FORM_BYTES = 10_000
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    # `no-referrer` would make browsers hide the origin of the page's own forms.
    "Referrer-Policy": "same-origin",
}


def add_status_page(
    app: Flask, service: Service, errors: RecentErrors, *, checker: Checker | None = None
) -> None:
    """Put the page at `/` for those who ask for HTML; all others get /health's answer there.

    Args:
        app: The app, whose error handlers and guards count here, too.
        service: What is shown.
        errors: What the app's error handlers note.
        checker: Asks Label Studio, if not once a minute in a thread.

    Raises:
        SettingsError: If `DATA_DIR` cannot be written to.
    """
    page = Blueprint(
        PAGE,
        __name__,
        static_folder="static",
        static_url_path="/page/static",
        template_folder="templates",
    )
    guard = FormGuard(service.settings.data_dir)
    checks = checker or Checker(lambda: check(service))
    changing = threading.Lock()

    @page.get("/")
    def index() -> Any:
        if not _wants_html():
            return current_app.view_functions["health"]()
        visitor = guard.visitor_of(request) or guard.new_visitor()
        shown = overview(service, checked=checks.latest(), errors=errors.latest())
        response = current_app.make_response(
            render_template("page.html", shown=shown, token=guard.token(visitor))
        )
        if guard.visitor_of(request) is None:
            guard.keep(visitor, response, request)
        return response

    @page.get("/page/projects/<project>/<int:number>/<name>")
    def picture(project: str, number: int, name: str) -> Response:
        found = find_picture(service, project, number, name)
        if found is None:
            abort(404)
        path, kind = found
        try:
            return Response(path.read_bytes(), content_type=kind)
        except FileNotFoundError:
            abort(404)

    @page.post("/page/jobs/<int:number>/cancel")
    def cancel(number: int) -> AnyResponse:
        job = service.jobs.cancel(number)
        _log.info("job %d is to be cancelled, from the status page", number)
        return _back_to(job.project)

    @page.post("/page/projects/<project>/rollback")
    def rollback(project: str) -> AnyResponse:
        versions = service.registry.project(project)
        with changing:
            active = versions.active()
            served = "" if active is None else str(active.number)
            if request.form.get("active") != served:  # pressed twice, or on an old page
                raise RegistryError(
                    f"project {project} must be served by what the page showed, got another "
                    "version meanwhile; look at the page again, and press once more if need be"
                )
            version = versions.rollback()
        name = "the base model" if version is None else version.model_version
        _log.info("project %s goes back to %s, from the status page", project, name)
        return _back_to(project)

    @page.post("/page/projects/<project>/activate")
    def activate(project: str) -> AnyResponse:
        text = request.form.get("version", "")
        if text != "base" and not (text.isascii() and text.isdecimal()):
            raise BadRequestError(
                f"version must be the number of a version, or base, got {text[:60]!r}; press a "
                "button of the status page"
            )
        service.registry.project(project).activate(None if text == "base" else int(text))
        _log.info("project %s: version %s is activated, from the status page", project, text)
        return _back_to(project)

    @page.before_request
    def check_form() -> None:
        if request.method == "POST":
            request.max_content_length = _MAX_FORM_BYTES
            guard.check(request)

    @page.after_request
    def finish(response: Response) -> Response:
        if response.status_code >= 400 and response.is_json and _wants_html():
            body = response.get_json()
            response.set_data(render_template("error.html", error=body["error"], id=body["id"]))
            response.content_type = "text/html; charset=utf-8"
        response.headers.update(_HEADERS)
        if request.endpoint != f"{PAGE}.static":
            response.headers["Cache-Control"] = "no-store"
        response.vary.add("Accept")
        return response

    page.add_app_template_filter(duration)
    page.add_app_template_filter(ago)
    page.add_app_template_filter(_iso, "iso")
    page.add_app_template_filter(_utc, "utc")
    app.register_blueprint(page)


def _wants_html() -> bool:
    """Whether a browser asks: scripts and Label Studio take anything, and get JSON."""
    return any(kind == "text/html" and quality for kind, quality in request.accept_mimetypes)


def _back_to(project: str) -> AnyResponse:
    return redirect(url_for(f"{PAGE}.index", _anchor=f"project-{project}"), code=303)


def _iso(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def _utc(at: float) -> str:
    return time.strftime("%-d %b %Y, %H:%M UTC", time.gmtime(at))
