"""Which Label Studio each project is on, as /setup announced it; for serving and for jobs."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from ml_backend.label_studio import LabelStudioClient
from ml_backend.registry import is_project_name
from ml_backend.settings import Settings, TrainMethod

__all__ = ["Connections"]

_log = logging.getLogger(__name__)


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

    def announce(
        self,
        project: str,
        *,
        hostname: str,
        access_token: str,
        train_method: TrainMethod | None = None,
    ) -> None:
        """Keep what /setup said about a project."""
        known = {"hostname": hostname, "access_token": access_token}
        if train_method is not None:
            known["train_method"] = train_method
        if self._announced(project) == known:
            return
        with tempfile.NamedTemporaryFile(  # which only this user may read
            "w", dir=self._folder, prefix=".", delete=False
        ) as file:
            json.dump(known, file)
            file.flush()
            os.fsync(file.fileno())
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

    def method_for(self, project: str) -> TrainMethod:
        """Say how a project is to be trained: as its own extra params say, or else the settings."""
        announced = self._announced(project).get("train_method")
        known: tuple[TrainMethod, ...] = get_args(TrainMethod)
        return next((one for one in known if one == announced), self._settings.train_method)

    def _announced(self, project: str) -> dict[str, str]:
        if not is_project_name(project):
            return {}
        path = self._path(project)
        try:
            known = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError:
            known = None
        if not isinstance(known, dict):  # the disk lost it; the next /setup writes it anew
            _log.warning("%s is damaged; save the model's connection in Label Studio again", path)
            return {}
        return known

    def _path(self, project: str) -> Path:
        return self._folder / f"{project}.json"
