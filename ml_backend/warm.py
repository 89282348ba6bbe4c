"""Embeds all images of a project ahead of its annotators, into the cache that the service reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ml_backend.embeddings import EmbeddingKey, EmbeddingStore
from ml_backend.errors import BackendError, SettingsError
from ml_backend.images import ImageLoader
from ml_backend.label_config import ImageTag, parse_label_config
from ml_backend.label_studio import LabelStudioClient, project_name
from ml_backend.models import Models
from ml_backend.settings import Settings
from sam_ext.errors import SamExtError

__all__ = ["WarmReport", "warm_project"]


@dataclass
class WarmReport:
    """What came of the images of a project."""

    embedded: int = 0
    already_there: int = 0
    failures: list[str] = field(default_factory=list)
    """A sentence each, with the task's number."""
    nbytes: int = 0
    """What all embeddings of the project take on disk, without headers."""


def warm_project(
    client: LabelStudioClient,
    project_id: int,
    *,
    settings: Settings,
    models: Models,
    store: EmbeddingStore | None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> WarmReport:
    """Embed what is not there yet; an image that fails is noted, and the next one's turn.

    Args:
        client: The project's Label Studio.
        project_id: The project.
        settings: The service's, for its limits and folders.
        models: The service's; the one that the project is served embeds.
        store: Where the service looks for embeddings.
        progress: Told how many tasks are done, and of how many.

    Raises:
        SettingsError: If there is no store, or it does not take an embedding.
        LabelStudioError: If Label Studio refuses, does not answer, or has no such project.
        LabelConfigError: If the project has no images.
    """
    if store is None:
        raise SettingsError(
            "EMBEDDING_DISK_BYTES must be above 0 to keep embeddings on disk, got 0"
        )
    project = client.get_project(project_id)
    predictor = models.for_project(project_name(project)).predictor
    tags = parse_label_config(str(project["label_config"])).images
    images = ImageLoader(settings, lambda _task: client)
    total, report = int(project.get("task_number") or 0), WarmReport()
    progress(0, total)
    for done, task in enumerate(_tasks(client, project_id), start=1):
        for task_of_one, tag in _addresses(task, tags):
            try:
                image = images.load(task_of_one, tag.value_key)
                key = EmbeddingKey(image.content_hash, predictor.embedding_fingerprint)
                kept = store.read(key)
                embedding = kept or predictor.embed(image.pixels)
            except (BackendError, SamExtError) as error:
                report.failures.append(f"task {task['id']}: {error}")
                continue
            if kept is not None:
                report.already_there += 1
            elif store.write(key, embedding):
                report.embedded += 1
            else:
                raise SettingsError(
                    f"{settings.embeddings_dir} must take an embedding of {embedding.nbytes} "
                    "bytes, got no room for it; free the disk, or raise EMBEDDING_DISK_BYTES"
                )
            report.nbytes += embedding.nbytes
        progress(done, max(done, total))
    return report


def _tasks(client: LabelStudioClient, project_id: int) -> Iterator[dict[str, Any]]:
    after = 0
    while tasks := client.list_tasks(project_id, after=after):
        yield from tasks
        after = tasks[-1]["id"]


def _addresses(
    task: dict[str, Any], tags: tuple[ImageTag, ...]
) -> Iterator[tuple[dict[str, Any], ImageTag]]:
    """Take a task apart: one address each, also of a list of images."""
    for tag in tags:
        addresses = task["data"].get(tag.value_key)
        for address in addresses if tag.is_list and isinstance(addresses, list) else [addresses]:
            yield {**task, "data": {tag.value_key: address}}, tag
