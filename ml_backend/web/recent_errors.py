"""What this process refused or failed at lately, for the status page."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

__all__ = ["RecentError", "RecentErrors"]

_KEPT = 30


@dataclass(frozen=True, kw_only=True)
class RecentError:
    """A request that was answered with an error, and how often that happened."""

    id: str
    """Of the last such request, as in the log and in its answer."""
    request: str
    """Method and path."""
    status: int
    reason: str
    at: float
    """When it happened last, in seconds since 1970."""
    times: int


class RecentErrors:
    """The last errors of a process, each kind once; safe from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errors: OrderedDict[tuple[str, int, str], RecentError] = OrderedDict()

    def note(self, reason: str, *, request: str, status: int, error_id: str) -> None:
        """Remember an error; one that repeats is counted, so that it does not push out others.

        Args:
            reason: The sentence that it was answered with.
            request: Method and path.
            status: The answer's HTTP status.
            error_id: What stands with it in the log and in the answer.
        """
        key = request, status, reason
        with self._lock:
            known = self._errors.pop(key, None)
            self._errors[key] = RecentError(
                id=error_id,
                request=request,
                status=status,
                reason=reason,
                at=time.time(),
                times=1 if known is None else known.times + 1,
            )
            if len(self._errors) > _KEPT:
                self._errors.popitem(last=False)

    def latest(self) -> list[RecentError]:
        """List them, the last one first."""
        with self._lock:
            return [*reversed(self._errors.values())]
