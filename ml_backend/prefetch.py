"""Embeds what annotators will draw on next, while they look at what they have opened."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TypeAlias

from ml_backend.engine import Engine
from ml_backend.errors import BackendError
from ml_backend.images import LoadedImage
from ml_backend.lanes import EncodeAbandonedError, Priority
from sam_ext.errors import SamExtError
from sam_ext.predictor import Predictor

__all__ = ["Images", "Prefetcher"]

Images: TypeAlias = Callable[[], Iterable[Callable[[], LoadedImage]]]
"""Finds images; each is loaded when it is called for."""

_log = logging.getLogger(__name__)

_LOADED_AT_ONCE = 2
_OPENED_KEPT = 16
_PROJECTS_KEPT = 256


@dataclass(frozen=True, eq=False)
class _Opening:
    project: str
    predictor: Callable[[], Predictor]
    own: Images
    following: Images
    number: int


class Prefetcher:
    """Embeds the images of opened tasks, the newest first, and then those of the next tasks.

    Next tasks are given up when another task of the project is opened, unless they have begun. Too
    many openings at once are forgotten, the oldest first. A failure is logged and nothing else:
    whoever draws on that image is told what is wrong with it.
    """

    def __init__(self, engine: Engine) -> None:
        """Start the threads; they end with the process, or after `close`."""
        self._engine = engine
        self._changed = threading.Condition()
        self._opened: deque[_Opening] = deque(maxlen=_OPENED_KEPT)
        self._following: deque[_Opening] = deque(maxlen=_OPENED_KEPT)
        # The number of each project's newest opening; that itself would keep its model alive.
        self._newest: OrderedDict[str, int] = OrderedDict()
        self._numbers = count()
        self._closed = False
        for target in [self._embed_opened] * _LOADED_AT_ONCE + [self._embed_following]:
            threading.Thread(target=target, name="prefetch", daemon=True).start()

    def open(
        self,
        project: str,
        *,
        predictor: Callable[[], Predictor],
        own: Images,
        following: Images,
    ) -> None:
        """Begin with a task that was just opened; returns at once.

        Args:
            project: The project's name.
            predictor: Gives the model that embeds; it may take its time.
            own: The task's images.
            following: Those of the next tasks.
        """
        opening = _Opening(project, predictor, own, following, next(self._numbers))
        with self._changed:
            self._opened.append(opening)
            self._newest[project] = opening.number
            self._newest.move_to_end(project)
            if len(self._newest) > _PROJECTS_KEPT:
                self._newest.popitem(last=False)
            self._changed.notify_all()

    def close(self) -> None:
        """Begin nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _embed_opened(self) -> None:
        while (opening := self._take(self._opened)) is not None:
            self._embed(opening, opening.own, Priority.OPENED, is_wanted=lambda: True)
            with self._changed:
                self._following.append(opening)
                self._changed.notify_all()

    def _embed_following(self) -> None:
        while (opening := self._take(self._following)) is not None:

            def is_wanted(opening: _Opening = opening) -> bool:
                return self._newest.get(opening.project) == opening.number

            if is_wanted():
                self._embed(opening, opening.following, Priority.NEIGHBOUR, is_wanted=is_wanted)

    def _take(self, openings: deque[_Opening]) -> _Opening | None:
        """Wait for an opening, the newest if there are several; None after `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or openings)
            return None if self._closed else openings.pop()

    def _embed(
        self,
        opening: _Opening,
        images: Images,
        priority: Priority,
        *,
        is_wanted: Callable[[], bool],
    ) -> None:
        with _logged_failures():
            predictor = opening.predictor()
            for load in images():
                with _logged_failures():
                    if not is_wanted():
                        return
                    self._engine.embed(predictor, load(), priority=priority, is_wanted=is_wanted)


@contextmanager
def _logged_failures() -> Iterator[None]:
    try:
        yield
    except EncodeAbandonedError:
        pass
    except (BackendError, SamExtError) as error:
        _log.warning("prefetch: %s", error)
    except Exception:  # noqa: BLE001  # a thread that ends would prefetch nothing any more
        _log.exception("prefetch failed")
