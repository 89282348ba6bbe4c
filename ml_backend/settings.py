"""The service's settings: read from the environment once, typed, checked, never read again."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from ml_backend.errors import SettingsError

__all__ = ["Output", "Precision", "Settings", "TrainMethod", "load_settings"]

Output = Literal["brush", "bitmask", "polygon", "rectangle"]
Precision = Literal["auto", "bf16", "fp32"]
TrainMethod = Literal["auto", "wesam", "sam-adapter", "lora"]

_THREADS_KEPT_FREE = 4
_RESOLUTION = re.compile(
    r"auto|square|native(:([1-9]\d{0,4})-([1-9]\d{0,4}))?|budget(:[1-9]\d{0,5})?"
)


class Settings(BaseModel):
    """Everything that can be set; the environment variable is the field's name in capitals.

    Only `load_settings` looks at the environment: a `Settings` built by hand is what it says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    data_dir: Path = Path("data")
    """Where everything is kept: downloaded weights, images, later versions and jobs."""

    sam_model: str = "tiny"
    """`tiny` (bundled), `vit_b`, `vit_l` or `vit_h` (downloaded once), or a checkpoint's path."""
    sam_device: str = "auto"
    """`auto` (CUDA, then MPS, then CPU), or a torch device such as `cpu` or `cuda:1`."""
    sam_weights_url: str | None = None
    """A mirror: `<url>/<file name>` replaces the published address; size and hash still checked."""
    sam_offline: bool = False
    """Never download: a checkpoint that is not in `DATA_DIR/weights` is a start-up error."""
    sam_resolution: str = "auto"
    """At which size images are encoded. `auto`: what suits the model. `square`: SAM's own. `native`
    or `native:MIN-MAX`: the image's size, its long side clamped to so many pixels. `budget` or
    `budget:N`: as large as N tokens of 16 x 16 px allow, by default those of training."""
    sam_ba_sam: bool | None = None
    """Keep the attention's habits at sizes that the model was not trained at (BA-SAM); unset: where
    the model was trained at one size only, as all but `tiny` were."""
    sam_stable: bool | None = None
    """Forgive sloppy prompts (Stable-SAM); unset: where the model has a plugin for it."""
    sam_colours: bool | None = None
    """Let the image's colours correct masks; unset: where the model's own are coarse, as those of
    `tiny` are."""
    sam_precision: Precision = "auto"
    """Of the encoder: `bf16`, `fp32`, or `auto`, bf16 where the processor or GPU does it well."""
    sam_compile: bool = False
    """Compile the encoder, for GPUs: each shape of image takes its time once per process, so images
    are padded to multiples of 128 px."""
    sam_crops: bool = True
    """Look at small objects in a crop of the image, embedded for itself."""
    sam_prefetch: int = Field(default=2, ge=0)
    """When a task is opened, embed its image and those of so many next tasks; 0: none at all."""
    sam_output: tuple[Output, ...] | None = None
    """Which regions to return, as `brush,polygon`; unset: all that the labelling config has."""
    sam_automatic: bool = False
    """Answer a batch request for tasks without any prompt with automatic masks."""
    sam_polygon_tolerance_px: float = Field(default=1.0, ge=0.0)
    """How far a returned polygon may stray from the mask's outline, in image pixels."""

    label_studio_url: str | None = None
    """Label Studio as the backend reaches it; unset: the host name that /setup announced."""
    label_studio_api_key: SecretStr | None = None
    """A personal access token or legacy token; unset: the token that /setup announced."""
    local_files_root: Path | None = None
    """The folder that Label Studio's local-files storage serves, where this process sees it too."""

    basic_auth_user: str | None = None
    basic_auth_pass: SecretStr | None = None
    """Both set: all routes want them but /health, and /webhook, where Label Studio has none."""

    image_max_bytes: int = Field(default=64 * 2**20, gt=0)
    """The largest image file that is fetched."""
    image_max_pixels: int = Field(default=100_000_000, gt=0)
    """The largest image, in pixels, that is decoded."""
    image_timeout_s: float = Field(default=20.0, gt=0)
    """How long one image may take to arrive."""
    image_private_hosts: tuple[str, ...] = ()
    """Private or local hosts, `host` or `host:port`, that images may come from, too."""
    image_cache_bytes: int = Field(default=2 * 2**30, ge=0)
    """Bound of `DATA_DIR/images`, the cache of fetched files."""
    embedding_cache_bytes: int = Field(default=512 * 2**20, ge=0)
    """Bound of the embeddings kept in memory."""
    embedding_disk_bytes: int = Field(default=8 * 2**30, ge=0)
    """Bound of `DATA_DIR/embeddings`, where they outlive the process; 0: they do not."""

    models_loaded: int = Field(default=4, ge=1)
    """Trained versions that one process keeps in memory, of all projects, beside the base model."""
    worker: bool = True
    """`serve` runs the worker that trains, too; false where that is a container of its own."""
    queue_url: SecretStr | None = None
    """`redis://…`: training jobs go through that Redis, which nobody else may write to; unset:
    through a file in `DATA_DIR`."""
    train_method: TrainMethod = "auto"
    """How projects are trained: `wesam` learns from boxes, points and rough masks, `sam-adapter`
    and `lora` from full masks; `auto` chooses by what the labels are. A project's own
    `train_method` in the model's extra params comes first."""
    train_every: int = Field(default=0, ge=0)
    """Train after so many new or changed annotations of a project; 0: only when asked to."""
    train_debounce_s: float = Field(default=60.0, ge=0)
    """Such a training waits until nobody has annotated for so long."""
    train_min_tasks: int = Field(default=8, ge=4)
    """The least number of annotated tasks to train with, held-out ones included."""
    train_steps: int = Field(default=0, ge=0)
    """Steps of a training; 0: chosen by the number of images."""
    train_margin: float = Field(default=0.005, ge=0, lt=1)
    """A trained version is served if its mean IoU on the held-out tasks is better by this much."""
    keep_versions: int = Field(default=5, ge=2)
    """Versions of a project that are kept, the active one and the one before it included."""

    host: str = "0.0.0.0"
    port: int = Field(default=9090, ge=1, le=65535)
    workers: int = Field(default=1, ge=1)
    """gunicorn processes; each holds the model once."""
    threads: int = Field(default=256, ge=8)
    """Requests that one process may hold. Four are kept for /health, /setup and /webhook; further
    predictions are answered 503 with Retry-After. A waiting thread costs next to nothing."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("sam_output", "image_private_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("label_studio_url", "sam_weights_url")
    @classmethod
    def _check_url(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError(
                f"{str(info.field_name).upper()} must be an address such as "
                f"http://label-studio:8080, got {value!r}"
            )
        return value

    @field_validator("queue_url")
    @classmethod
    def _check_queue_url(cls, value: SecretStr | None) -> SecretStr | None:
        schemes = ("redis://", "rediss://", "unix://")
        if value is not None and not value.get_secret_value().startswith(schemes):
            raise ValueError(
                "QUEUE_URL must be a Redis address such as redis://redis:6379/0, got another "
                "kind; leave it out to queue in a file"
            )
        return value

    @field_validator("sam_resolution")
    @classmethod
    def _check_resolution(cls, value: str) -> str:
        match = _RESOLUTION.fullmatch(value)
        if match is None or int(match[2] or 0) > int(match[3] or 0):
            raise ValueError(
                "SAM_RESOLUTION must be auto, square, native, native:MIN-MAX, budget or budget:N, "
                f"such as native:512-2048, got {value!r}"
            )
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_pairs(self) -> Settings:
        if (self.basic_auth_user is None) != (self.basic_auth_pass is None):
            raise ValueError(
                "BASIC_AUTH_USER and BASIC_AUTH_PASS must be set together, got one of them"
            )
        if self.label_studio_api_key is not None and self.label_studio_url is None:
            # Anybody who reaches /setup can announce a host; the token must not go there.
            raise ValueError(
                "LABEL_STUDIO_URL must be set where LABEL_STUDIO_API_KEY is, got nothing; set it "
                "to Label Studio's address as this process reaches it"
            )
        return self

    @property
    def max_waiting(self) -> int:
        """Predictions that one process may hold, running and waiting together."""
        return self.threads - _THREADS_KEPT_FREE

    @property
    def weights_dir(self) -> Path:
        """Where downloaded checkpoints are kept."""
        return self.data_dir / "weights"

    @property
    def images_dir(self) -> Path:
        """Where fetched image files are kept; deleting it loses nothing."""
        return self.data_dir / "images"

    @property
    def embeddings_dir(self) -> Path:
        """Where embeddings are kept; deleting it loses nothing but time."""
        return self.data_dir / "embeddings"

    @property
    def connections_dir(self) -> Path:
        """Where the Label Studio of each project is kept, as /setup announced it: with tokens."""
        return self.data_dir / "connections"

    @property
    def projects_dir(self) -> Path:
        """Where each project's trained versions are kept."""
        return self.data_dir / "projects"

    @property
    def runs_dir(self) -> Path:
        """Where each training keeps what it needs to go on after a stop, until it ends."""
        return self.data_dir / "runs"


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read and check the settings.

    Args:
        environ: Variables to read instead of the process's own; an empty one counts as not set.

    Raises:
        SettingsError: If a variable has a value that it may not have; the message names it.
    """
    variables = os.environ if environ is None else environ
    values = {
        name: value for name in Settings.model_fields if (value := variables.get(name.upper()))
    }
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError("; ".join(_sentence(fault) for fault in error.errors())) from None


def _sentence(fault: ErrorDetails) -> str:
    """Say a fault with the variable's name; secrets are plain text, so none of them is at fault."""
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    variable = str(fault["loc"][0]).upper()
    wanted = fault["msg"].removeprefix("Input should be ")
    return f"{variable} must be {wanted}, got {fault['input']!r}"
