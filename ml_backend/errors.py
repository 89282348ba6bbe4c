"""What `ml_backend` raises; each class knows the HTTP status it is answered with.

BackendError                500  anything of ours that has no better name
├── BadRequestError         400  the request's body or its drawing
├── UnauthorizedError       401  basic auth is on and the request has none that fits
├── ForbiddenError          403  a button of the status page or a route, used by another site
├── LabelConfigError        400  the labelling config offers nothing to prompt or to return
├── ImageError                   the task's image, by step
│   ├── ImageAddressError   400  the address is of a kind or at a place that is not read
│   ├── ImageFetchError     502  the address did not answer with a file
│   ├── ImageTooLargeError  413  more bytes or pixels than the limits allow
│   └── ImageDecodeError    422  the file is no picture that can be read
├── LabelStudioError        502  Label Studio's API refused or did not answer
├── JobExistsError          409  the project has a training job under way; carries its number
├── JobNotFoundError        404  there is no training job of that number
├── JobsUnavailableError    503  the jobs' database or queue cannot be read or written
├── OverloadedError         503  the queue is full; carries Retry-After
├── RegistryError           409  a version of a model is not there, is damaged, or cannot be kept
└── SettingsError           500  a setting is missing or wrong (raised at start-up)
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "BadRequestError",
    "ForbiddenError",
    "ImageAddressError",
    "ImageDecodeError",
    "ImageError",
    "ImageFetchError",
    "ImageTooLargeError",
    "JobExistsError",
    "JobNotFoundError",
    "JobsUnavailableError",
    "LabelConfigError",
    "LabelStudioError",
    "OverloadedError",
    "RegistryError",
    "SettingsError",
    "UnauthorizedError",
]


class BackendError(Exception):
    """The root: answered as one sentence with the class's HTTP status, never with a traceback."""

    status = 500


class BadRequestError(BackendError):
    """The request's body or its drawing is not what the protocol says."""

    status = 400


class UnauthorizedError(BackendError):
    """Basic auth is on and the request carries no credentials that fit."""

    status = 401


class ForbiddenError(BackendError):
    """A button of the status page was not pressed there, or another site's page sent a request."""

    status = 403


class LabelConfigError(BackendError):
    """The labelling config offers nothing to prompt with, or nothing to return."""

    status = 400


class ImageError(BackendError):
    """The task's image could not be had; the subclass names the step that failed."""

    status = 422


class ImageAddressError(ImageError):
    """The image's address is of a kind, or at a place, that is not read."""

    status = 400


class ImageFetchError(ImageError):
    """The image's address did not answer with a file."""

    status = 502


class ImageTooLargeError(ImageError):
    """The image has more bytes or pixels than the limits allow."""

    status = 413


class ImageDecodeError(ImageError):
    """The file is not a picture that can be read."""

    status = 422


class LabelStudioError(BackendError):
    """Label Studio's API refused, or did not answer."""

    status = 502


class JobExistsError(BackendError):
    """The project has a training job under way already: job `job_id`."""

    status = 409

    def __init__(self, message: str, *, job_id: int) -> None:
        super().__init__(message)
        self.job_id = job_id


class JobNotFoundError(BackendError):
    """There is no training job of that number."""

    status = 404


class JobsUnavailableError(BackendError):
    """The jobs' database or their queue cannot be read or written.

    With `is_locked` somebody else holds the database, as a backup does: that passes.
    """

    status = 503

    def __init__(self, message: str, *, is_locked: bool = False) -> None:
        super().__init__(message)
        self.is_locked = is_locked


class OverloadedError(BackendError):
    """The queue is full; try again after `retry_after_s` seconds."""

    status = 503

    def __init__(self, message: str, *, retry_after_s: int = 5) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RegistryError(BackendError):
    """A version of a project's model is not there, is damaged, or cannot be kept or changed."""

    status = 409


class SettingsError(BackendError):
    """A setting is missing or wrong; raised at start-up, before anything is served."""
