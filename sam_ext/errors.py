"""What `sam_ext` raises.

SamExtError
├── ConfigError        a config or an argument is outside what it may be
├── CheckpointError    a weights file is missing, damaged or of another architecture
│   └── DownloadError  a weights file could not be fetched
├── PromptError        points, boxes or masks that do not describe an object of the image
└── DataError          a data set is not what it claims to be
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DownloadError",
    "PromptError",
    "SamExtError",
]


class SamExtError(Exception):
    """The root: every error that `sam_ext` raises on purpose."""


class ConfigError(SamExtError, ValueError):
    """A config or an argument is outside what it may be."""


class CheckpointError(SamExtError):
    """A weights file is missing, damaged or does not fit the model it is loaded into."""

    @classmethod
    def from_keys(
        cls, path: str, *, missing: Sequence[str], unexpected: Sequence[str], shapes: Sequence[str]
    ) -> CheckpointError:
        """Say which file, how many keys of each kind, the first of them, and what to check."""
        return cls(
            f"{path} does not fit this model: {len(missing)} keys missing (first: {missing[:1]}), "
            f"{len(unexpected)} unexpected (first: {unexpected[:1]}), "
            f"{len(shapes)} of another shape (first: {shapes[:1]}). "
            "Check that the model named is the one the file was saved from."
        )


class DownloadError(CheckpointError):
    """A weights file could not be fetched."""


class PromptError(SamExtError, ValueError):
    """Points, boxes or masks do not describe an object of the image."""


class DataError(SamExtError, ValueError):
    """A data set is not what it claims to be."""
