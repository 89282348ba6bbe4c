"""The versions of a project's model: kept whole, never changed, and one of them served.

projects/<name>/
├── versions/<number>/      adapter.safetensors, manifest.json, files of the report
├── active.json             the activations, of which the last one counts
└── .lock                   held by whoever changes any of it

A version is made in a folder of another name, and renamed when all of it is on the disk. So several
processes may share the registry, and one that is killed leaves nothing half done.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock, Timeout

from ml_backend.errors import RegistryError

__all__ = ["VERSION_PREFIX", "ProjectVersions", "Registry", "Version", "is_project_name"]

VERSION_PREFIX = "sam-"
"""What the names of all models of this backend begin with."""

_PROJECT = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,99}")
_FILE = re.compile(r"[0-9A-Za-z_-][0-9A-Za-z._-]{0,99}")
_ADAPTER = "adapter.safetensors"
_MANIFEST = "manifest.json"
_UNFINISHED = ".new-"  # whoever holds the lock may delete it
_LOCK_TIMEOUT_S = 60.0
_ACTIVATIONS_KEPT = 100


def is_project_name(text: str) -> bool:
    """Whether a text may be a project's name; it becomes a file's name, too."""
    return _PROJECT.fullmatch(text) is not None


@dataclass(frozen=True, kw_only=True, eq=False)
class Version:
    """One adapted model of a project."""

    number: int
    """1 and up, in the order in which they were added; none is given twice."""
    folder: Path
    """All of its files."""
    adapter: Path
    """What distinguishes it from the base model."""
    manifest: Mapping[str, Any]
    """What was said of it when it was added, and what stands in the other fields."""
    model_version: str
    """The name that its predictions carry: `sam-tiny-v3-0123abcd`."""
    created_at: float
    """When it was added, in seconds since 1970."""

    @property
    def prompt_free_label(self) -> str | None:
        """What it finds in an image without any prompt: a label, empty where the project has none.

        None for a version that was not trained to.
        """
        mode = self.manifest.get("prompt_free")
        label = mode.get("label") if isinstance(mode, Mapping) else None
        return label if isinstance(label, str) else None

    def check(self) -> None:
        """See that the adapter is the file that was added.

        Raises:
            RegistryError: If it is not, or cannot be read.
        """
        wanted = self.manifest["adapter_sha256"]
        try:
            got = _sha256_of(self.adapter)
        except OSError as error:
            raise RegistryError(
                f"{self.adapter} must be a file that can be read, got {error.strerror}; roll back, "
                "or train again"
            ) from error
        if got != wanted:
            raise RegistryError(
                f"{self.adapter} must have the SHA-256 {wanted}, got {got}; it was changed: roll "
                "back, or train again"
            )


class Registry:
    """The projects that have versions."""

    def __init__(self, projects_dir: Path, *, keep: int) -> None:
        """Look at a folder; it need not exist yet.

        Args:
            projects_dir: Where the projects are.
            keep: How many versions of each are kept, at least 1. The one that is served and the one
                that a rollback returns to are kept in any case.
        """
        self._folder = projects_dir
        self._keep = keep

    def names(self) -> list[str]:
        """The names of the projects that have, or had, versions."""
        try:
            folders = [path.name for path in self._folder.iterdir() if path.is_dir()]
        except FileNotFoundError:
            return []
        return sorted(name for name in folders if is_project_name(name))

    def project(self, name: str) -> ProjectVersions:
        """Give the versions of a project; of one that nobody heard of there are none.

        Raises:
            RegistryError: If `name` is no project's name.
        """
        if not is_project_name(name):
            raise RegistryError(
                f"project must be a project's name such as 1.1795194739, got {name[:100]!r}"
            )
        return ProjectVersions(name, self._folder / name, keep=self._keep)

    def find_project(self, name_or_id: str) -> ProjectVersions:
        """Give the versions of a project that has some.

        Args:
            name_or_id: Its name, or the number before the name's dot.

        Raises:
            RegistryError: If no project has this name or number, or several have the number.
        """
        names = self.names()
        found = [name for name in names if name_or_id in (name, name.partition(".")[0])]
        if name_or_id in found:
            found = [name_or_id]
        if len(found) != 1:
            known = ", ".join(found or names) or "none"
            raise RegistryError(
                f"project must name one project that has versions, got {name_or_id!r}; there are: "
                f"{known}"
            )
        return self.project(found[0])


class ProjectVersions:
    """The versions of one project, and which of them is served."""

    def __init__(self, name: str, folder: Path, *, keep: int) -> None:
        self.name = name
        self._folder = folder
        self._versions = folder / "versions"
        self._active = folder / "active.json"
        self._keep = keep

    def versions(self) -> list[Version]:
        """All versions, ascending; one whose manifest is damaged is left out."""
        found = []
        for number in self._numbers():
            with contextlib.suppress(RegistryError):
                found.append(self.find(number))
        return found

    def find(self, number: int) -> Version:
        """Look a version up.

        Raises:
            RegistryError: If there is no such version, or its manifest is damaged.
        """
        folder = self._versions / str(number)
        path = folder / _MANIFEST
        try:
            manifest = json.loads(path.read_bytes())
            model_version, created_at = manifest["model_version"], manifest["created_at"]
            is_right = (
                manifest["number"] == number
                and isinstance(manifest["adapter_sha256"], str)
                and isinstance(model_version, str)
                and isinstance(created_at, float)
            )
        except FileNotFoundError:
            if not folder.exists():
                raise RegistryError(
                    f"version must be one of project {self.name}'s {self._numbers()}, got {number}"
                ) from None
            is_right = False
        except OSError as error:
            raise RegistryError(
                f"{path} must be a file that can be read, got {error.strerror}"
            ) from error
        except (ValueError, KeyError, TypeError):
            is_right = False
        if not is_right:
            raise RegistryError(
                f"{path} must be the manifest of version {number}, got something else; it was "
                "changed: roll back, or train again"
            )
        return Version(
            number=number,
            folder=folder,
            adapter=folder / _ADAPTER,
            manifest=MappingProxyType(manifest),
            model_version=model_version,
            created_at=created_at,
        )

    def pointer(self) -> bytes:
        """Say in a cheap way what is active: as long as it is equal, nothing has changed.

        Raises:
            RegistryError: If the disk does not answer.
        """
        try:
            return self._active.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise RegistryError(
                f"{self._active} must be a file that can be read, got {error.strerror}"
            ) from error

    def active(self) -> Version | None:
        """Give the version that is to be served; None for the base model.

        Raises:
            RegistryError: If what says so, or that version's manifest, is damaged.
        """
        while True:
            pointer = self.pointer()
            number = _numbers_in(pointer, self._active)[-1]
            try:
                return None if number is None else self.find(number)
            except RegistryError:
                if self.pointer() == pointer:  # otherwise it was deleted meanwhile
                    raise

    def activated(self) -> list[int | None]:
        """Number what was active, the version that is so now last; None stands for the base model.

        It begins with the base model. Versions that are gone, and those that were rolled back, are
        not in it.

        Raises:
            RegistryError: If what says so is damaged.
        """
        there = {None, *self._numbers()}
        numbers: list[int | None] = []
        for number in _numbers_in(self.pointer(), self._active):
            if number in there and numbers[-1:] != [number]:
                numbers.append(number)
        return numbers

    def add(
        self,
        adapter: Path,
        manifest: Mapping[str, Any],
        files: Mapping[str, Path | bytes] = MappingProxyType({}),
    ) -> Version:
        """Keep a new version; it is not served before it is activated.

        Old versions beyond those that are to be kept are deleted.

        Args:
            adapter: Its adapter; copied.
            manifest: What is known of it, as JSON has it, among it `model`, the base model's name
                as it stands in version names. `number`, `model_version`, `adapter_sha256` and
                `created_at` are added.
            files: Further files by their names: copied from a path, or the bytes themselves.

        Returns:
            The version as it is kept.

        Raises:
            RegistryError: If it could not be written, all of it; then nothing is there.
            ValueError: If the manifest is not for JSON or has no `model`, or if a file's name is
                none or is taken.
        """
        if not manifest.get("model"):
            raise ValueError(
                f"manifest['model'] must be the base model's name, got {manifest.get('model')!r}"
            )
        for name in files:
            if not _FILE.fullmatch(name) or name in (_ADAPTER, _MANIFEST):
                raise ValueError(
                    f"files must have plain names that are not taken, such as curves.json, got "
                    f"{name[:100]!r}"
                )
        json.dumps(dict(manifest), allow_nan=False)
        with self._changing("take a version"):
            self._versions.mkdir(exist_ok=True)
            self._clean_up()
            number = 1 + max(
                n or 0 for n in [*self._numbers(), *_numbers_in(self.pointer(), self._active)]
            )
            unfinished = Path(tempfile.mkdtemp(dir=self._versions, prefix=_UNFINISHED))
            try:
                for name, content in {_ADAPTER: adapter, **files}.items():
                    _write(unfinished / name, content)
                digest = _sha256_of(unfinished / _ADAPTER)
                whole = {
                    **manifest,
                    "number": number,
                    "model_version": f"{VERSION_PREFIX}{manifest['model']}-v{number}-{digest[:8]}",
                    "adapter_sha256": digest,
                    "created_at": time.time(),
                }
                text = json.dumps(whole, indent=2, sort_keys=True)
                _write(unfinished / _MANIFEST, text.encode())
                unfinished.chmod(0o755)
                _sync(unfinished)
                unfinished.rename(self._versions / str(number))
            except OSError:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
            _sync(self._versions)
            self._delete_old()
            return self.find(number)

    def activate(self, number: int | None) -> None:
        """Have a version served from now on; None is the base model.

        Raises:
            RegistryError: If there is no such version, its manifest is damaged, or the disk does
                not take the change; then nothing has changed.
        """
        with self._changing("take a change"):
            if number is not None:
                self.find(number)
            activated = self.activated()
            if activated[-1] != number:
                self._write_activated([*activated, number])

    def rollback(self) -> Version | None:
        """Have served again what was before the version that is active.

        A version whose manifest is damaged is passed over.

        Returns:
            What is active now; None for the base model.

        Raises:
            RegistryError: If nothing was active before, or the disk does not take the change; then
                nothing has changed.
        """
        with self._changing("take a change"):
            activated = self.activated()
            if len(activated) == 1:
                raise RegistryError(
                    f"project {self.name} must have had another model before the one that is "
                    "served, got the base model alone; there is nothing to roll back"
                )
            earlier = activated[:-1]
            while (number := earlier[-1]) is not None:
                with contextlib.suppress(RegistryError):
                    self.find(number)
                    break
                earlier.pop()
            self._write_activated(earlier)
            return None if number is None else self.find(number)

    @contextlib.contextmanager
    def _changing(self, what: str) -> Iterator[None]:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self._folder / ".lock", timeout=_LOCK_TIMEOUT_S):
                yield
        except Timeout as error:
            raise RegistryError(
                f"{self._folder} must be free to {what}, got no lock in {_LOCK_TIMEOUT_S:.0f} s; "
                "look for a process that hangs"
            ) from error
        except OSError as error:
            raise RegistryError(
                f"{self._folder} must {what}, got {error}; nothing has changed: see to the "
                "disk, and try again"
            ) from error

    def _numbers(self) -> list[int]:
        try:
            names = [path.name for path in self._versions.iterdir()]
        except FileNotFoundError:
            return []
        return sorted(int(name) for name in names if name.isdecimal())

    def _write_activated(self, numbers: list[int | None]) -> None:
        body = {"activated": numbers[-_ACTIVATIONS_KEPT:], "at": time.time()}
        descriptor, name = tempfile.mkstemp(dir=self._folder, prefix=_UNFINISHED)
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, 0o644)
                file.write(json.dumps(body).encode())
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(self._active)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
        _sync(self._folder)

    def _delete_old(self) -> None:
        needed = {*self._numbers()[-max(self._keep, 1) :], *self.activated()[-2:]}
        for number in self._numbers():
            if number not in needed:
                # Renamed first: nobody may find half of it.
                gone = self._versions / f"{_UNFINISHED}gone-{number}"
                with contextlib.suppress(OSError):  # the next time, then
                    (self._versions / str(number)).rename(gone)
                    shutil.rmtree(gone)

    def _clean_up(self) -> None:
        """Delete what killed processes left; the lock is held, so nobody works on it."""
        for path in self._versions.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self._folder.glob(f"{_UNFINISHED}*"):
            path.unlink(missing_ok=True)


def _numbers_in(pointer: bytes, path: Path) -> list[int | None]:
    """Read the numbers that were activated; the base model was so before all of them."""
    if not pointer:
        return [None]
    try:
        numbers = json.loads(pointer)["activated"]
        is_right = all(number is None or type(number) is int for number in numbers)
    except (ValueError, KeyError, TypeError):
        is_right = False
    if not is_right:
        raise RegistryError(
            f"{path} must be what the backend wrote, got something else; delete it to serve the "
            "base model"
        )
    return [None, *numbers]


def _write(path: Path, content: Path | bytes) -> None:
    with path.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            with content.open("rb") as source:
                shutil.copyfileobj(source, file)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """See that the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
