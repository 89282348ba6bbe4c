"""Weights files: where they come from, whether they are what they claim to be, loading, saving.

A model is named (`tiny`, `vit_b`, `vit_l`, `vit_h`) or given as the path of a `.pth` or
`.safetensors` file. Nothing is built or changed before the whole file was read and found to fit.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from safetensors import safe_open
from torch import Tensor

from sam_ext.ba_sam import attach_coefficients
from sam_ext.config import MODELS, SamConfig
from sam_ext.errors import CheckpointError, ConfigError, DownloadError
from sam_ext.sam import Sam, build_sam
from sam_ext.state_dicts import check_state, save_state

__all__ = [
    "PUBLISHED",
    "PublishedCheckpoint",
    "config_from_state_dict",
    "download",
    "find_checkpoint",
    "find_stable_sam",
    "load_sam",
    "resolve_device",
    "save_checkpoint",
]

_log = logging.getLogger(__name__)

_BUNDLED = {"tiny": Path(__file__).parent / "weights" / "tiny.safetensors"}
_CONFIG_KEY = "config"
_CHUNK_BYTES = 2**20
_SILENCE_S = 30.0


@dataclass(frozen=True, kw_only=True)
class PublishedCheckpoint:
    """A weights file on the network, and how to know that it arrived whole."""

    file_name: str
    """Its name in the weights folder and on a mirror."""
    url: str
    """Where its publisher keeps it."""
    size: int
    """Its length in bytes."""
    sha256: str
    """The hex digest of its bytes."""


_META = "https://dl.fbaipublicfiles.com/segment_anything/"
PUBLISHED: dict[str, PublishedCheckpoint] = {
    "vit_b": PublishedCheckpoint(
        file_name="sam_vit_b_01ec64.pth",
        url=_META + "sam_vit_b_01ec64.pth",
        size=375_042_383,
        sha256="ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "vit_l": PublishedCheckpoint(
        file_name="sam_vit_l_0b3195.pth",
        url=_META + "sam_vit_l_0b3195.pth",
        size=1_249_524_607,
        sha256="3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_h": PublishedCheckpoint(
        file_name="sam_vit_h_4b8939.pth",
        url=_META + "sam_vit_h_4b8939.pth",
        size=2_564_550_879,
        sha256="a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
}


def find_checkpoint(
    model: str,
    *,
    weights_dir: Path,
    mirror_url: str | None = None,
    offline: bool = False,
    progress: bool = False,
) -> Path:
    """Find a model's weights file, downloading a published one that is not there yet.

    A published file is held against its size and SHA-256 whenever it is asked for, so that one
    put there by hand is checked too.

    Args:
        model: `tiny` (bundled), a key of `PUBLISHED`, or the path of a file.
        weights_dir: Where published files are kept; made when missing.
        mirror_url: Download from `<mirror_url>/<file name>` instead of the published address.
        offline: Never download.
        progress: Draw a progress bar on the standard error stream while downloading.

    Raises:
        CheckpointError: If the file is missing and may not or cannot be downloaded, or if the file
            that is there is not the published one.
        ConfigError: If `mirror_url` is not an http or https address.
    """
    if model in _BUNDLED:
        if not _BUNDLED[model].is_file():
            raise CheckpointError(
                f"the bundled weights of {model!r} must be in {_BUNDLED[model]}, but are not; "
                "install the package again"
            )
        return _BUNDLED[model]
    if model not in PUBLISHED:
        path = Path(model).expanduser()
        if not path.is_file():
            raise CheckpointError(
                f"model must be one of {', '.join(MODELS)} or the path of a checkpoint, "
                f"got {model!r}, which is neither"
            )
        return path
    published = PUBLISHED[model]
    path = weights_dir / published.file_name
    if not path.exists():
        if offline:
            raise CheckpointError(
                f"{path} must be there to use {model!r} offline, but is not; "
                f"download {published.url} ({published.size} bytes) elsewhere and put it there, "
                "or allow downloads"
            )
        return download(published, path, mirror_url=mirror_url, progress=progress)
    if wrong := _difference(published, path):
        raise CheckpointError(
            f"{path} is not the published file: {wrong}; delete it to download it again, "
            "or give a file of your own by its path"
        )
    return path


def download(
    published: PublishedCheckpoint,
    path: Path,
    *,
    mirror_url: str | None = None,
    progress: bool = False,
) -> Path:
    """Download a published file to `path`, unless another process does so meanwhile.

    What has arrived is kept in `<path>.part`; a later call, also of another process, goes on from
    there. The file appears under its own name only when it is whole and its hash is right.

    Args:
        published: What to fetch.
        path: Where it goes.
        mirror_url: Fetch `<mirror_url>/<file name>` instead of the published address.
        progress: Draw a progress bar on the standard error stream.

    Returns:
        `path`.

    Raises:
        DownloadError: If the server cannot be reached, has another file, or stops sending; or if
            the file cannot be written.
        ConfigError: If `mirror_url` is not an http or https address.
    """
    url = published.url if mirror_url is None else _mirrored(mirror_url, published.file_name)
    part = path.with_name(path.name + ".part")
    lock = FileLock(path.with_name(path.name + ".lock"))
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        if path.exists():  # another process was faster
            return path
        _log.info("downloading %s (%d MB)", url, published.size // 10**6)
        with _bar(published, shown=progress) as show:
            _fetch(url, published, part, show)
        if wrong := _difference(published, part):
            part.unlink()
            raise DownloadError(
                f"{url} is not the published {published.file_name}: {wrong}; what arrived was "
                "deleted, start again or use another mirror"
            )
        with _writing(path):
            part.replace(path)
    finally:
        lock.release()
    return path


def find_stable_sam(model: str, *, weights_dir: Path) -> Path | None:
    """Find the plugin for sloppy prompts that goes with a model (Stable-SAM).

    It lies beside the weights file and is called `<its stem>.stable.safetensors`.

    Args:
        model: As `find_checkpoint` takes it; nothing is downloaded, no plugin is published.
        weights_dir: Where published files are kept.

    Returns:
        The file, or None if there is none.
    """
    if model in _BUNDLED:
        weights = _BUNDLED[model]
    elif model in PUBLISHED:
        weights = weights_dir / PUBLISHED[model].file_name
    else:
        weights = Path(model).expanduser()
    path = weights.with_name(f"{weights.stem}.stable.safetensors")
    return path if path.is_file() else None


def load_sam(
    model: str,
    *,
    weights_dir: Path,
    device: str | torch.device = "cpu",
    mirror_url: str | None = None,
    offline: bool = False,
    progress: bool = False,
) -> Sam:
    """Build a SAM from its weights file, in evaluation mode and single precision.

    Args:
        model: `tiny`, a key of `PUBLISHED`, or the path of a `.pth` or `.safetensors` file with
            SAM's state dict, with BA-SAM's coefficients or without; its sizes come from the file's
            metadata, or from the tensors' shapes.
        weights_dir: Where published files are kept.
        device: As `resolve_device` takes it.
        mirror_url: See `find_checkpoint`.
        offline: See `find_checkpoint`.
        progress: See `find_checkpoint`.

    Raises:
        CheckpointError: If the file is missing, damaged, holds more than weights, or is not a SAM.
        ConfigError: If `device` is none that this machine has.
    """
    target = resolve_device(device)
    path = find_checkpoint(
        model, weights_dir=weights_dir, mirror_url=mirror_url, offline=offline, progress=progress
    )
    state, config_json = _read(path)
    try:
        config = (
            config_from_state_dict(state)
            if config_json is None
            else SamConfig.from_json(config_json)
        )
    except ConfigError as error:
        raise CheckpointError(f"{path} is not a checkpoint of SAM: {error}") from error
    with torch.device("meta"):  # no time spent on random weights that are replaced at once
        sam = build_sam(config)
        if any(key.endswith(".ba_sam_coefficient") for key in state):
            attach_coefficients(sam.image_encoder)
    check_state(path, state, sam.state_dict())
    sam.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return sam.to(target)


def resolve_device(device: str | torch.device) -> torch.device:
    """Check that this machine has a device.

    Args:
        device: `auto` (CUDA, else MPS, else the CPU), or a device as torch names it.

    Raises:
        ConfigError: If there is no such device; the message lists those that there are.
    """
    present = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        present.append("mps")
    present.append("cpu")
    if device == "auto":
        return torch.device(present[0])
    if str(device) not in {*present, *(name.partition(":")[0] for name in present)}:
        raise ConfigError(
            f"device must be auto or one that this machine has ({', '.join(present)}), "
            f"got {str(device)!r}"
        )
    return torch.device(device)


def save_checkpoint(
    sam: Sam,
    path: Path,
    *,
    dtype: torch.dtype = torch.float16,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a SAM as safetensors, with its sizes as metadata, so that `load_sam` needs no more.

    The file appears whole or not at all.

    Args:
        sam: The model; it is not changed.
        path: The file, replaced if it is there.
        dtype: The precision of the stored parameters. Buffers keep theirs: the matrix behind the
            position encodings is small, and rounding it would shift every prompt.
        metadata: More texts for the file's header.

    Raises:
        CheckpointError: If a parameter is not finite in `dtype`.
    """
    parameters = {name for name, _ in sam.named_parameters()}
    state = {
        key: value.detach().to("cpu", dtype if key in parameters else value.dtype).contiguous()
        for key, value in sam.state_dict().items()
    }
    if bad := [key for key, value in state.items() if not value.isfinite().all()]:
        raise CheckpointError(
            f"{len(bad)} parameters are not finite in {dtype} (first: {bad[0]}); "
            f"{path} was not written"
        )
    header = {**(metadata or {}), "format": "pt", _CONFIG_KEY: _config_of(sam, state).to_json()}
    save_state(state, path, metadata=header)


def config_from_state_dict(state: Mapping[str, Tensor]) -> SamConfig:
    """Read a SAM's sizes off its tensors' shapes.

    Args:
        state: A state dict with the official keys. A block with a relative position table for the
            whole grid counts as one of the global ones.

    Returns:
        The config, named as in `MODELS` where it is one of these, else `custom`.

    Raises:
        ConfigError: If tensors that tell the sizes are missing.
    """
    try:
        _, grid, _, embed_dim = state["image_encoder.pos_embed"].shape
        patch_size = state["image_encoder.patch_embed.proj.weight"].shape[-1]
        prompt_embed_dim = state["image_encoder.neck.0.weight"].shape[0]
        pattern = re.compile(r"image_encoder\.blocks\.(\d+)\.")
        depth = len({found[1] for key in state if (found := pattern.match(key))})
        tables = [state[f"image_encoder.blocks.{i}.attn.rel_pos_h"].shape for i in range(depth)]
        spans = [(length + 1) // 2 for length, _ in tables]
        head_dim = tables[0][1]
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            "a state dict must have the keys and shapes of segment-anything's image encoder, "
            f"got {len(state)} keys (first: {sorted(state)[:1]})"
        ) from error
    windows = [span for span in spans if span != grid]
    config = SamConfig(
        name="custom",
        embed_dim=embed_dim,
        depth=depth,
        num_heads=embed_dim // head_dim,
        global_attn_indexes=tuple(i for i, span in enumerate(spans) if span == grid),
        image_size=grid * patch_size,
        patch_size=patch_size,
        window_size=windows[0] if windows else grid,
        prompt_embed_dim=prompt_embed_dim,
    )
    return _named(config)


def _config_of(sam: Sam, state: Mapping[str, Tensor]) -> SamConfig:
    # A window as large as the grid cannot be told from the shapes; the modules know it.
    windows = [block.window_size for block in sam.image_encoder.blocks]
    config = config_from_state_dict(state)
    return _named(
        replace(
            config,
            window_size=max(windows) or config.window_size,
            global_attn_indexes=tuple(i for i, window in enumerate(windows) if window == 0),
        )
    )


def _named(config: SamConfig) -> SamConfig:
    for name, model in MODELS.items():
        if replace(config, name=name) == model:
            return model
    return replace(config, name="custom")


def _read(path: Path) -> tuple[Mapping[str, Tensor], str | None]:
    """Read a file's tensors and, where it has one, its config; run nothing that it contains."""
    config_json: str | None = None
    state: object
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                config_json = (file.metadata() or {}).get(_CONFIG_KEY)
                # Copied: what safetensors gives is a view of a file that may change.
                state = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} must hold weights alone, but names {found[1]}, which loading would run; "
                "save the model's state dict and use that"
            ) from error
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as a checkpoint "
            f"({type(error).__name__}): it is damaged, of another format, or holds more than "
            "weights; fetch it again or save the model's state dict anew"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        keys = list(state)[:3] if isinstance(state, Mapping) else type(state).__name__
        raise CheckpointError(
            f"{path} must be a state dict, names to tensors, got {keys}; "
            "save the model's state dict and use that"
        )
    return state, config_json


def _difference(published: PublishedCheckpoint, path: Path) -> str | None:
    """Say in what a file differs from the published one."""
    if (size := path.stat().st_size) != published.size:
        return f"it must have {published.size} bytes, got {size}"
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    if (got := digest.hexdigest()) != published.sha256:
        return f"its SHA-256 must be {published.sha256}, got {got}"
    return None


def _mirrored(mirror_url: str, file_name: str) -> str:
    parts = urlsplit(mirror_url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"mirror_url must start with http:// or https://, got {mirror_url!r}")
    return f"{mirror_url.rstrip('/')}/{file_name}"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DownloadError(
            f"{path} cannot be written: {error}; free space or name another weights folder"
        ) from error


@contextmanager
def _bar(published: PublishedCheckpoint, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Draw a progress bar; what is yielded takes the number of bytes that are there."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task(published.file_name, total=published.size)
        yield lambda received: progress.update(task, completed=received)


def _fetch(
    url: str, published: PublishedCheckpoint, part: Path, show: Callable[[int], None]
) -> None:
    """Bring `part` to the published size, however often the connection breaks."""
    have = part.stat().st_size if part.exists() else 0
    while have != published.size:
        offset = have if have < published.size else 0
        reason = _attempt(url, published, part, offset, show)
        have = part.stat().st_size if part.exists() else 0
        # A connection that brought something may be asked for more; asking one that brought
        # nothing again at once would only bring nothing again.
        if have != published.size and have <= offset:
            raise DownloadError(
                f"{url} could not be downloaded: {reason}; {have} of {published.size} bytes are "
                f"kept, start again to go on from there, or put the file into {part.parent}"
            )


def _attempt(
    url: str, published: PublishedCheckpoint, part: Path, offset: int, show: Callable[[int], None]
) -> str | None:
    """Ask once for what is missing; say what broke, if anything did."""
    headers = {"User-Agent": "sam-ml-backend", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    try:
        response = urlopen(Request(url, headers=headers), timeout=_SILENCE_S)
    except HTTPError as error:
        with error:
            return f"the server answered {error.code} {error.reason}"
    except (OSError, HTTPException) as error:
        return f"the server cannot be reached: {error}"
    with response:
        start, total = _announced(response)
        if start not in (0, offset) or total not in (None, published.size):
            raise DownloadError(
                f"{url} must have {published.size} bytes, but the server announced {total}, from "
                f"{start}; check that the address is that of {published.file_name}"
            )
        with _writing(part), part.open("r+b" if start else "wb") as file:
            file.seek(start)
            return _receive(response, file, start=start, size=published.size, show=show)


def _announced(response: HTTPResponse) -> tuple[int, int | None]:
    """Read where an answer starts and how long the whole file is, where the server says so."""
    if response.status == 206:
        found = re.match(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if found is None:
            return -1, None
        return int(found[1]), None if found[2] == "*" else int(found[2])
    length = response.headers.get("Content-Length")  # a server without ranges sends it all
    return 0, int(length) if length and length.isdecimal() else None


def _receive(
    response: HTTPResponse, file: BinaryIO, *, start: int, size: int, show: Callable[[int], None]
) -> str | None:
    have = start
    while have < size:
        show(have)
        try:
            # What has come, without waiting for a whole chunk: if it breaks, nothing is lost.
            chunk = response.read1(min(_CHUNK_BYTES, size - have))
        except (OSError, HTTPException) as error:
            return f"the connection broke: {error}"
        if not chunk:
            return "the connection was closed early"
        file.write(chunk)
        have += len(chunk)
    show(have)
    return None
