"""Registering the backend with a Label Studio project, and what that takes beyond serving."""

from __future__ import annotations

from typing import Any

from ml_backend.errors import LabelStudioError
from ml_backend.label_studio import LabelStudioClient
from ml_backend.settings import Settings

__all__ = ["ProjectClient", "basic_auth_of", "connect"]


class ProjectClient(LabelStudioClient):
    """What setting up and checking a project asks of Label Studio beyond serving it."""

    def list_backends(self, project_id: int) -> list[dict[str, Any]]:
        """The project's ML backends, each asked by Label Studio for its state just now."""
        return self._call_list("GET", "/api/ml/", params={"project": project_id})

    def list_webhooks(self, project_id: int) -> list[dict[str, Any]]:
        """The project's webhooks with `id`, `url`, `headers`."""
        return self._call_list("GET", "/api/webhooks/", params={"project": project_id})

    def move_backend(self, project_id: int, backend_id: int, *, old_url: str, url: str) -> None:
        """Give a backend another address, and its webhook with it.

        Label Studio makes the webhook when a backend is added, and leaves it alone afterwards.
        """
        self._call("PATCH", f"/api/ml/{backend_id}", json={"project": project_id, "url": url})
        for webhook in self.list_webhooks(project_id):
            if _same_url(webhook["url"], f"{old_url.rstrip('/')}/webhook"):
                body = {"url": f"{url.rstrip('/')}/webhook"}
                self._call("PATCH", f"/api/webhooks/{webhook['id']}/", json=body)


def basic_auth_of(settings: Settings) -> tuple[str, str] | None:
    """The user and password that the backend asks for, or None if it asks for none."""
    if settings.basic_auth_user is None or settings.basic_auth_pass is None:
        return None
    return settings.basic_auth_user, settings.basic_auth_pass.get_secret_value()


def connect(
    client: ProjectClient,
    project_id: int,
    backend_url: str,
    *,
    title: str,
    basic_auth: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """Connect the backend to a project as interactive; doing it again changes nothing.

    A backend that the project already has under this title and another address is moved.

    Args:
        client: Label Studio, with a token that may change the project.
        project_id: The project.
        backend_url: The backend as Label Studio reaches it.
        title: Its name on the project's Model page.
        basic_auth: User and password, when the backend asks for them.

    Returns:
        The backend as Label Studio describes it.

    Raises:
        LabelStudioError: If Label Studio does not answer, refuses the token, has no such project,
            refuses local addresses, or does not reach the backend.
    """
    backends = client.list_backends(project_id)
    if not any(_same_url(row["url"], backend_url) for row in backends):
        for row in backends:
            if row["title"] == title:
                client.move_backend(project_id, row["id"], old_url=row["url"], url=backend_url)
                break
    backend = client.connect_backend(project_id, backend_url, title, basic_auth=basic_auth)
    if backend.get("state") != "CO":
        raise LabelStudioError(
            f"Label Studio must reach the backend at {backend_url}, got state "
            f"{backend.get('readable_state')!r} ({backend.get('error_message')}); give the address "
            "at which Label Studio's machine or container reaches this one"
        )
    return backend


def _same_url(one: object, other: str) -> bool:
    return str(one).rstrip("/") == other.rstrip("/")
