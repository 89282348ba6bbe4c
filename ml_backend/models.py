"""The models that a process serves: the base model, and the versions of projects that trained."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

from ml_backend.errors import BackendError, RegistryError
from ml_backend.registry import ProjectVersions, Registry, Version
from sam_ext.errors import SamExtError
from sam_ext.predictor import Predictor

__all__ = ["Models", "ServedModel"]

_log = logging.getLogger(__name__)

_PROJECTS_KEPT = 256

_Key: TypeAlias = "tuple[str, int, str] | None"
"""A project, a version's number and its adapter's digest; None for the base model."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedModel:
    """A model that answers, and the name that its predictions carry."""

    predictor: Predictor
    model_version: str
    prompt_free_label: str | None = None
    """What it finds without any prompt (`Version.prompt_free_label`)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Choice:
    """What a project is served as long as its pointer is this one.

    The model itself is not held: it may be dropped for those of other projects.
    """

    pointer: bytes
    key: _Key
    model_version: str
    prompt_free_label: str | None


class Models:
    """Gives each project the model that it is to be served; safe from several threads.

    What is active is looked up for each request. When that has changed, the new version is loaded
    in the background, and what was served before is served until it is ready. Only the first
    request of a project in a process waits for its model.

    A version that cannot be loaded costs nobody an answer: the one that was active before it is
    served, or the base model. That is logged once.
    """

    def __init__(
        self,
        base: ServedModel,
        *,
        registry: Registry,
        load: Callable[[Version], Predictor],
        max_loaded: int,
    ) -> None:
        """Begin with the base model alone.

        Args:
            base: The model of projects without a version.
            registry: The versions.
            load: Loads a version, whose adapter is known to be the one that was added.
            max_loaded: How many versions are kept in memory; what was not used for longest goes.
        """
        self.base = base
        self._registry = registry
        self._load_version = load
        self._max_loaded = max_loaded
        self._lock = threading.Lock()
        self._loaded: OrderedDict[_Key, ServedModel] = OrderedDict()  # used last at the end
        self._choices: OrderedDict[str, _Choice] = OrderedDict()
        self._choosing: dict[tuple[str, bytes], Future[ServedModel]] = {}
        self._errors: dict[str, tuple[bytes | None, str]] = {}
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load model")

    @property
    def errors(self) -> dict[str, str]:
        """Why a project is not served what is active: one sentence each, by the project's name."""
        with self._lock:
            errors = sorted(self._errors.items())
        return {
            name: sentence
            for name, (pointer, sentence) in errors
            if pointer == _pointer_of(self._registry.project(name))
        }

    @property
    def predictors(self) -> list[Predictor]:
        """Those in memory, the one used last first, the base model's at the end."""
        with self._lock:
            models = [*reversed(self._loaded.values()), self.base]
        return [model.predictor for model in models]

    def for_project(self, name: str | None, *, wait: bool = False) -> ServedModel:
        """Give the model that a project is served now.

        Args:
            name: The project's name; None gets the base model.
            wait: For a new version while it is loaded, rather than be given the one before it.
        """
        if name is None:
            return self.base
        project = self._registry.project(name)
        with self._lock:
            choice = self._choices.get(name)
            served = None if choice is None else self._in_memory(choice.key)
        try:
            pointer = project.pointer()
        except RegistryError as error:
            self._note(name, None, served or self.base, error)
            return served or self.base
        if choice is not None and served is not None and choice.pointer == pointer:
            return served
        chosen = self._choose_at_once(project, pointer)
        if chosen is None:
            choosing = self._choose_in_the_background(project, pointer)
            chosen = choosing.result() if served is None or wait else served
        return chosen

    def version_of(self, name: str | None) -> str:
        """Name the model that a project is to be served, without loading it.

        Args:
            name: The project's name; None gets the base model.
        """
        return self._announced(name)[0]

    def prompt_free_label_of(self, name: str | None) -> str | None:
        """Say what that model finds without any prompt, without loading it.

        Args:
            name: The project's name; None gets the base model.
        """
        return self._announced(name)[1]

    def _announced(self, name: str | None) -> tuple[str, str | None]:
        base = self.base.model_version, self.base.prompt_free_label
        if name is None:
            return base
        project = self._registry.project(name)
        with self._lock:
            choice = self._choices.get(name)
        if choice is not None and choice.pointer == _pointer_of(project):
            # Which is not the active one if that cannot be loaded.
            return choice.model_version, choice.prompt_free_label
        try:
            version = project.active()
        except RegistryError:
            version = None
        return base if version is None else (version.model_version, version.prompt_free_label)

    def close(self) -> None:
        """End the thread; what it loads is finished."""
        self._loader.shutdown(cancel_futures=True)

    def _in_memory(self, key: _Key) -> ServedModel | None:
        """Look a model up; the lock is held."""
        if key is None:
            return self.base
        if (model := self._loaded.get(key)) is not None:
            self._loaded.move_to_end(key)
        return model

    def _choose_at_once(self, project: ProjectVersions, pointer: bytes) -> ServedModel | None:
        """Choose what is active, if it is in memory."""
        try:
            version = project.active()
        except RegistryError:
            return None
        key = None if version is None else _key_of(project, version)
        with self._lock:
            model = self._in_memory(key)
            if model is not None:
                self._choose(project, pointer, key, model)
                self._errors.pop(project.name, None)
        return model

    def _choose_in_the_background(
        self, project: ProjectVersions, pointer: bytes
    ) -> Future[ServedModel]:
        asked = (project.name, pointer)

        def choose() -> ServedModel:
            try:
                return self._choose_what_loads(project, pointer)
            finally:
                with self._lock:
                    del self._choosing[asked]

        with self._lock:
            if asked not in self._choosing:
                self._choosing[asked] = self._loader.submit(choose)
            return self._choosing[asked]

    def _choose_what_loads(self, project: ProjectVersions, pointer: bytes) -> ServedModel:
        """Load what is active, or what was so last of what can be loaded."""
        failures: list[Exception] = []
        key, model = None, self.base
        try:
            project.active()  # whose folder may be gone
            numbers = project.activated()
        except RegistryError as error:
            failures.append(error)
            numbers = _activated_or_none(project)
        for number in reversed(numbers):
            if number is None:
                break
            try:
                version = project.find(number)
                key, model = _key_of(project, version), self._load(project, version)
                break
            except Exception as error:  # noqa: BLE001  # a damaged file can raise anything
                failures.append(error)
                key = None
        with self._lock:
            self._choose(project, pointer, key, model)
            if not failures:
                self._errors.pop(project.name, None)
        if failures and pointer == _pointer_of(project):  # otherwise it may just be outdated
            self._note(project.name, pointer, model, failures[0])
        return model

    def _load(self, project: ProjectVersions, version: Version) -> ServedModel:
        key = _key_of(project, version)
        with self._lock:
            if (known := self._in_memory(key)) is not None:
                return known
        version.check()
        model = ServedModel(
            predictor=self._load_version(version),
            model_version=version.model_version,
            prompt_free_label=version.prompt_free_label,
        )
        with self._lock:
            self._loaded[key] = model
            while len(self._loaded) > self._max_loaded:
                self._loaded.popitem(last=False)
        _log.info("project %s: %s is loaded", project.name, version.model_version)
        return model

    def _choose(
        self, project: ProjectVersions, pointer: bytes, key: _Key, model: ServedModel
    ) -> None:
        """Remember what a project is served; the lock is held."""
        name = project.name
        self._choices[name] = _Choice(
            pointer=pointer,
            key=key,
            model_version=model.model_version,
            prompt_free_label=model.prompt_free_label,
        )
        self._choices.move_to_end(name)
        if len(self._choices) > _PROJECTS_KEPT:
            self._choices.popitem(last=False)

    def _note(
        self, name: str, pointer: bytes | None, served: ServedModel, error: Exception
    ) -> None:
        """Keep why something else is served than what is active, and log it once."""
        is_known = isinstance(error, BackendError | SamExtError)
        reason = str(error) if is_known else f"{type(error).__name__} ({error})"
        sentence = f"project {name} is served by {served.model_version} instead: {reason}"
        with self._lock:
            if self._errors.get(name) != (pointer, sentence):
                _log.error(sentence, exc_info=None if is_known else error)
            self._errors[name] = pointer, sentence


def _key_of(project: ProjectVersions, version: Version) -> _Key:
    return project.name, version.number, version.manifest["adapter_sha256"]


def _pointer_of(project: ProjectVersions) -> bytes | None:
    try:
        return project.pointer()
    except RegistryError:
        return None


def _activated_or_none(project: ProjectVersions) -> list[int | None]:
    try:
        return project.activated()
    except RegistryError:
        return [None]
