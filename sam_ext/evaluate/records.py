"""Rows of a table, kept in a file as they are measured: when, of which code, on which machine."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from sam_ext.errors import ConfigError

__all__ = ["Measured", "RowFile", "machine_facts", "markdown_table", "provenance"]

Row = TypeVar("Row")


def machine_facts() -> dict[str, Any]:
    """Describe what measures: the time, the code and the machine."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = re.findall(r"model name\s+: (.+)", cpuinfo)
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": commit or "unknown",
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "bf16": [name for name in ("avx512_bf16", "amx_bf16") if name in cpuinfo],
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


@dataclass(frozen=True, kw_only=True)
class Measured(Generic[Row]):
    """Rows that were measured together."""

    key: dict[str, Any]
    """What they follow from."""
    rows: tuple[Row, ...]
    machine: dict[str, Any]
    """As `machine_facts` gives it."""


class RowFile(Generic[Row]):
    """Rows by what they follow from, in a file of JSON lines; what is there is not measured again.

    A run may be ended at any moment: it loses what it was measuring, and nothing else.
    """

    def __init__(self, path: Path | None, kind: type[Row]) -> None:
        """Read what is there.

        Args:
            path: The file, which need not exist; None keeps nothing.
            kind: The rows' class.

        Raises:
            ConfigError: If the file holds rows of another class.
        """
        self._path, self._kind = path, kind
        self._known: dict[str, Measured[Row]] = {}
        if path is None or not path.exists():
            return
        for line in path.read_text().splitlines():
            try:
                content = json.loads(line)
            except ValueError:  # the end of a run that was ended while it wrote
                continue
            try:
                one = Measured(
                    key=content["key"],
                    rows=tuple(kind(**row) for row in content["rows"]),
                    machine=content["machine"],
                )
            except (KeyError, TypeError) as error:
                raise ConfigError(
                    f"{path} must hold rows of this table, got others ({error}); "
                    "name another file, or delete it to measure all again"
                ) from error
            self._known[_written(one.key)] = one

    @property
    def measured(self) -> tuple[Measured[Row], ...]:
        """All that is known, in the order in which it was measured."""
        return tuple(self._known.values())

    def get(self, key: Mapping[str, Any], measure: Callable[[], Sequence[Row]]) -> tuple[Row, ...]:
        """Give the rows of a key; measure and keep them if they are not known.

        Args:
            key: All that the rows follow from, JSON's values.
            measure: Makes the rows.
        """
        known = self._known.get(_written(key))
        if known is None:
            known = Measured(key=dict(key), rows=tuple(measure()), machine=machine_facts())
            self._known[_written(key)] = known
            self._append(known)
        return known.rows

    def _append(self, one: Measured[Row]) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rows: list[Any] = list(one.rows)
        content = {"key": one.key, "rows": [asdict(row) for row in rows], "machine": one.machine}
        with self._path.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(content).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _written(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows as a Markdown table; columns that are None in all rows are left out."""
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    lines = [columns, ["---"] * len(columns)]
    lines += [["" if row[name] is None else str(row[name]) for name in columns] for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def provenance(measured: Sequence[Measured[Any]]) -> str:
    """Say in a sentence or more when, of which code and on which machine rows were measured."""
    by_place: dict[tuple[str, str], list[str]] = {}
    for one in measured:
        facts = one.machine
        place = f"{facts['processor']}, {facts['threads']} threads, torch {facts['torch']}"
        by_place.setdefault((facts["commit"], place), []).append(facts["date"])
    return "\n".join(
        f"Measured {' to '.join(dict.fromkeys((min(dates), max(dates))))} at {commit} on {place}."
        for (commit, place), dates in by_place.items()
    )
