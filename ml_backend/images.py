"""A task's image: from the address in the task to RGB pixels, with every guard on the way.

The step that failed is the first word of each error: address, fetch, token, decode.

    address   what kind it is, and whether it may be read at all
    fetch     guarded GET: addresses checked after each name lookup, the token only for Label
              Studio's own origin, bytes and seconds bounded
    decode    pixels bounded on the header, then what the annotator's browser shows
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import http.client
import io
import ipaddress
import logging
import os
import socket
import ssl
import tempfile
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import parse_qs, unquote_to_bytes, urldefrag, urljoin, urlsplit

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from requests.utils import requote_uri

from ml_backend.errors import (
    ImageAddressError,
    ImageDecodeError,
    ImageFetchError,
    ImageTooLargeError,
)
from ml_backend.label_studio import (
    LabelStudioClient,
    LabelStudioUnreachableError,
    Origin,
    ca_bundle,
    origin_of,
)
from ml_backend.settings import Settings

__all__ = ["ImageLoader", "LoadedImage", "decode_image"]

logger = logging.getLogger(__name__)

Pixels: TypeAlias = npt.NDArray[np.uint8]
Task: TypeAlias = Mapping[str, Any]
_Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

_CLOUD_SCHEMES = ("s3", "gs", "azure-blob")
_LOCAL_FILES = "/data/local-files/"
_MAX_HOPS = 6
_CHUNK = 2**16
_CONNECT_S = 5.0  # for one of a host's addresses, so that a dead one leaves time for the next
_FRESH_S = 600.0  # how long a fetched file is taken for what its address still holds
_SIZES_KEPT = 4096
_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

# Raster formats only: Pillow would hand EPS to Ghostscript.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
# Whose EXIF orientation a browser follows, and Label Studio's coordinates with it. Tried with
# Chromium 156: WebP's is ignored, and so is XMP's. Pillow turns TIFF by itself.
_ORIENTED_FORMATS = ("JPEG", "MPO", "PNG", "AVIF")
_ORIENTATION_TAG = 0x0112
_TURNS = {  # EXIF orientation: flip the rows, flip the columns, then swap rows and columns
    1: (False, False, False),
    2: (False, True, False),
    3: (True, True, False),
    4: (True, False, False),
    5: (False, False, True),
    6: (True, False, True),
    7: (True, True, True),
    8: (False, True, True),
}


class LoadedImage:
    """One image that is known to decode; its pixels are decoded when first asked for."""

    def __init__(
        self,
        *,
        uri: str,
        content_hash: str,
        size_hw: tuple[int, int],
        pixels: Pixels | Callable[[], Pixels],
    ) -> None:
        """Describe an image.

        Args:
            uri: The address as it stands in the task.
            content_hash: SHA-256 of the file, hex.
            size_hw: Rows and columns as the annotator sees them (EXIF applied).
            pixels: [H, W, 3] uint8 RGB, or what decodes them; called once at most.
        """
        self.uri = uri
        self.content_hash = content_hash
        self.size_hw = size_hw
        self._pixels = pixels
        self._lock = threading.Lock()

    @property
    def pixels(self) -> Pixels:
        """[H, W, 3] uint8 RGB."""
        with self._lock:
            if callable(self._pixels):
                self._pixels = self._pixels()
            return self._pixels


class ImageLoader:
    """Loads task images; safe from several threads, one download per address at a time.

    Fetched files are kept under `DATA_DIR/images`, shared by all workers.
    """

    def __init__(
        self,
        settings: Settings,
        client_for: Callable[[Task], LabelStudioClient | None],
        *,
        known_size: Callable[[str], tuple[int, int] | None] = lambda _: None,
    ) -> None:
        """Make a loader.

        Args:
            settings: The limits, the cache's folder, the hosts that may be asked.
            client_for: Gives the Label Studio that a task came from, or None if it is not known.
            known_size: Gives the size (H, W) of an image that was decoded before, by the SHA-256 of
                its file, so that it need not be decoded for that; None if it is not known.
        """
        self._settings = settings
        self._client_for = client_for
        self._known_size = known_size
        self._files = _FileCache(settings.images_dir, max_bytes=settings.image_cache_bytes)
        self._lock = threading.Lock()
        self._running: dict[str, Future[LoadedImage]] = {}
        self._sizes: OrderedDict[str, tuple[int, int]] = OrderedDict()
        # Pillow warns above this and refuses above twice this, in places where the size is not
        # known before memory is taken; the exact check is in decode_image.
        Image.MAX_IMAGE_PIXELS = settings.image_max_pixels

    def load(self, task: Task, value_key: str) -> LoadedImage:
        """Load one image of a task.

        Args:
            task: A task as Label Studio sends it: `id` and `data` are read.
            value_key: The field of `data` that the Image tag names.

        Returns:
            The image; the same address asked for again is neither fetched nor decoded again
            (until ten minutes have passed), unless the pixels are asked for.

        Raises:
            ImageAddressError: If the field holds no address, one of a kind that is not read, or
                one at a place that may not be read.
            ImageFetchError: If the address did not answer with a file in time.
            ImageTooLargeError: If the file has too many bytes or pixels.
            ImageDecodeError: If the file is no picture.
            LabelStudioError: If Label Studio did not exchange the personal access token.
        """
        address = _address_in(task, value_key)
        scheme = address.partition(":")[0].lower()
        if scheme == "data":
            return self._decoded(self._data_url(address), uri=address)
        client = self._client_for(task)
        url = self._url(address, scheme=scheme, task=task, client=client)
        root, local = self._settings.local_files_root, _local_file(url, client)
        if root is not None and local is not None:
            return self._decoded(self._read_local(root, local), uri=address)
        if client is None and address.startswith("/"):
            raise ImageAddressError(
                f"address: {_shown(address)} is a path on Label Studio, whose address is not "
                "known; set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY"
            )
        return self._load_once(url, uri=address, client=client)

    def _url(
        self, address: str, *, scheme: str, task: Task, client: LabelStudioClient | None
    ) -> str:
        """The http(s) URL behind an address; a bare path where Label Studio is not known."""
        if address.startswith("/") and not address.startswith("//"):
            return address if client is None else str(client.url_of(address))
        if scheme in ("http", "https"):
            try:
                origin_of(address)
                has_password = urlsplit(address).username is not None
            except ValueError as error:
                raise ImageAddressError(
                    f"address: {_shown(address)} must be a valid URL, got one with a fault: {error}"
                ) from error
            if has_password:
                raise ImageAddressError(
                    f"address: {_shown(address)} must not hold a user name; serve the image "
                    "through Label Studio or a signed address"
                )
            return (client and client.url_of(address)) or address
        if scheme in _CLOUD_SCHEMES and "://" in address:
            if client is None:
                raise ImageAddressError(
                    f"address: {_shown(address)} is opened by Label Studio, whose address is not "
                    "known; set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY"
                )
            if not isinstance(task.get("id"), int):
                raise ImageAddressError(
                    f"address: {_shown(address)} is opened by the task's id, which must be a "
                    f"number, got {task.get('id')!r}"
                )
            return client.presign_url(task["id"], address)
        hint = "; serve the folder as a local-files storage of Label Studio"
        raise ImageAddressError(
            f"address: {_shown(address)} must be a path on Label Studio (/data/…), http(s), data, "
            f"or one of {', '.join(_CLOUD_SCHEMES)}{hint if scheme == 'file' else ''}"
        )

    def _data_url(self, address: str) -> bytes:
        head, comma, body = address.partition(",")
        limit = self._settings.image_max_bytes
        if not comma:
            raise ImageAddressError(
                f"address: {_shown(address)} must be data:<type>;base64,<bytes>, got no comma"
            )
        if len(body) > 4 * limit:  # base64 may be percent-encoded, three characters for one
            raise _too_many_bytes(address, limit)
        try:
            data = unquote_to_bytes(body)
            if head.lower().rstrip().endswith(";base64"):
                data = base64.b64decode(data, validate=True)
        except binascii.Error as error:
            raise ImageAddressError(
                f"address: {_shown(address)} must be valid base64, got {error}"
            ) from error
        if len(data) > limit:
            raise _too_many_bytes(address, limit)
        return data

    def _read_local(self, root: Path, name: str) -> bytes:
        """A file below LOCAL_FILES_ROOT; `..` and links may not lead out of it."""
        limit = self._settings.image_max_bytes
        try:
            folder = root.resolve(strict=True)
            path = (folder / name.lstrip("/")).resolve(strict=True)
            if not path.is_relative_to(folder):
                raise ImageAddressError(
                    f"address: {name!r} must lie in LOCAL_FILES_ROOT, got a path that leads out "
                    "of it"
                )
            if not path.is_file():
                raise ImageAddressError(f"address: {name!r} must be a file in LOCAL_FILES_ROOT")
            with path.open("rb") as file:
                data = file.read(limit + 1)
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links
            reason = error.strerror if isinstance(error, OSError) else error
            raise ImageFetchError(
                f"fetch: {name!r} must be readable in LOCAL_FILES_ROOT, got {reason}; check that "
                "it is the folder that Label Studio's local-files storage serves"
            ) from error
        if len(data) > limit:
            raise _too_many_bytes(name, limit)
        return data

    def _load_once(self, url: str, *, uri: str, client: LabelStudioClient | None) -> LoadedImage:
        """Load from the cache or the network; whoever asks meanwhile waits for the same answer."""
        own = client is not None and origin_of(url) == client.origin
        # What one token was allowed to read is not answered to another.
        token = client.token if client is not None and own else None
        key = hashlib.sha256(f"{url}\n{token or ''}".encode()).hexdigest()
        with self._lock:
            running = self._running.get(key)
            if running is None:
                mine = self._running[key] = Future[LoadedImage]()
        if running is not None:
            return running.result()
        try:
            image = self._load_url(key, url, uri=uri, client=client)
        except BaseException as error:
            mine.set_exception(error)
            raise
        else:
            mine.set_result(image)
            return image
        finally:
            with self._lock:
                del self._running[key]

    def _load_url(
        self, key: str, url: str, *, uri: str, client: LabelStudioClient | None
    ) -> LoadedImage:
        kept = self._files.read(key)
        if kept is not None and kept[1] < _FRESH_S:
            return self._decoded(kept[0], uri=uri)
        try:
            data = _fetch(url, uri=uri, client=client, settings=self._settings)
        except (_NoAnswerError, LabelStudioUnreachableError) as error:
            if kept is None:
                raise
            logger.warning("%s; an older copy is used", error)
            return self._decoded(kept[0], uri=uri)
        image = self._decoded(data, uri=uri)
        self._files.write(key, data)
        return image

    def _decoded(self, data: bytes, *, uri: str) -> LoadedImage:
        content_hash = hashlib.sha256(data).hexdigest()

        def decode() -> Pixels:
            return decode_image(data, max_pixels=self._settings.image_max_pixels, name=_shown(uri))

        with self._lock:
            size_hw = self._sizes.get(content_hash)
        size_hw = size_hw or self._known_size(content_hash)
        pixels: Pixels | Callable[[], Pixels] = decode
        if size_hw is None:
            pixels = decode()
            size_hw = pixels.shape[0], pixels.shape[1]
        with self._lock:
            self._sizes[content_hash] = size_hw
            self._sizes.move_to_end(content_hash)
            while len(self._sizes) > _SIZES_KEPT:
                self._sizes.popitem(last=False)
        return LoadedImage(uri=uri, content_hash=content_hash, size_hw=size_hw, pixels=pixels)


def _address_in(task: Task, value_key: str) -> str:
    data, where = task.get("data"), f"data.{value_key} of task {task.get('id')}"
    address = data.get(value_key) if isinstance(data, Mapping) else None
    if not isinstance(address, str) or not address.strip():
        got = "nothing" if address in (None, "") else f"{type(address).__name__}"
        raise ImageAddressError(
            f"address: {where} must be one address, got {got}; check that the Image tag's value "
            "names the field of the tasks that holds the image"
        )
    return address.strip()


def _shown(address: str) -> str:
    """An address as it may stand in a log: no bytes, no passwords, no signatures."""
    if address[:5].lower() == "data:":
        return repr(address.partition(",")[0][:60] + ",…")
    path, mark, query = address.partition("?")
    scheme, slashes, rest = path.partition("://")
    if slashes and "@" in rest.partition("/")[0]:
        path = scheme + slashes + rest.partition("@")[2]
    kept = query if _LOCAL_FILES in path else "…"
    return repr((path + mark + (kept if mark else ""))[:200])


def _local_file(url: str, client: LabelStudioClient | None) -> str | None:
    """What a URL of Label Studio's local-files storage names below the storage's root."""
    if client is None and not url.startswith("/"):
        return None
    if client is not None and origin_of(url) != client.origin:
        return None
    parts = urlsplit(url)
    root = "" if client is None else urlsplit(client.base_url).path
    if parts.path != root + _LOCAL_FILES:
        return None
    return parse_qs(parts.query).get("d", [""])[0]


def _too_many_bytes(address: str, limit: int) -> ImageTooLargeError:
    return ImageTooLargeError(
        f"fetch: {_shown(address)} must have at most {limit} bytes, got more; raise IMAGE_MAX_BYTES"
    )


class _NoAnswerError(ImageFetchError):
    """Nobody answered, or not to the end: an older copy may do."""


def _fetch(url: str, *, uri: str, client: LabelStudioClient | None, settings: Settings) -> bytes:
    """GET a file, along redirects.

    The token goes to Label Studio's own origin only, and no longer once a redirect has left it:
    a chain that comes back was steered by somebody else.
    """
    deadline = time.monotonic() + settings.image_timeout_s
    location, trusted, refused = url, client is not None, None
    for _ in range(_MAX_HOPS):
        try:
            url = urldefrag(urljoin(url, location)).url
            origin = origin_of(url)
        except ValueError as error:
            raise ImageAddressError(
                f"address: {_shown(uri)} must lead to an http(s) URL, got {_shown(location)}: "
                f"{error}"
            ) from error
        own = client is not None and origin == client.origin
        trusted = trusted and own
        header = client.authorization(url, refused=refused) if client and trusted else None
        listed = {origin.host, f"{origin.host}:{origin.port}"} & set(settings.image_private_hosts)
        allowed = _anywhere if listed else _not_link_local if own else _public
        with _get(url, origin, header, allowed=allowed, uri=uri, deadline=deadline) as response:
            if response.status in _REDIRECTS and (target := response.getheader("Location")):
                location, refused = target, None
                continue
            if response.status == 401 and client and header and refused is None:
                refused = header
                if client.authorization(url, refused=refused) != header:
                    continue
            if response.status != 200:
                raise _refusal(response.status, url, uri=uri, client=client, authorization=header)
            return _read(response, uri=uri, limit=settings.image_max_bytes, deadline=deadline)
    raise ImageFetchError(
        f"fetch: {_shown(uri)} must answer within {_MAX_HOPS} requests, got a redirect each time; "
        "check where it leads"
    )


@contextlib.contextmanager
def _get(
    url: str,
    origin: Origin,
    authorization: str | None,
    *,
    allowed: Callable[[_Address], bool],
    uri: str,
    deadline: float,
) -> Iterator[http.client.HTTPResponse]:
    """One GET to an address that was checked; whatever it does, it ends at the deadline."""
    parts = urlsplit(url)
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    target = requote_uri((parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
    headers = {
        "Host": host if parts.port is None else f"{host}:{parts.port}",
        "Accept": "image/*, */*;q=0.5",
        "Accept-Encoding": "identity",
        "User-Agent": "sam-ml-backend",
        "Connection": "close",
    }
    if authorization is not None:
        headers["Authorization"] = authorization
    try:
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(
                _connect(origin, allowed=allowed, uri=uri, deadline=deadline)
            )
            # A server that sends a byte now and then never runs into the socket's own timeout.
            timer = threading.Timer(
                max(0.0, deadline - time.monotonic()), _hang_up, [stack.enter_context(sock.dup())]
            )
            stack.callback(timer.cancel)
            timer.daemon = True
            timer.start()
            if origin.scheme == "https":
                tls = _tls_context(ca_bundle())
                sock = stack.enter_context(tls.wrap_socket(sock, server_hostname=origin.host))
            connection = http.client.HTTPConnection(origin.host, origin.port)
            connection.sock = sock
            connection.request("GET", target, headers=headers)
            yield stack.enter_context(connection.getresponse())
    except (OSError, http.client.HTTPException) as error:
        raise _no_answer(uri, origin, error, deadline=deadline) from error


def _connect(
    origin: Origin, *, allowed: Callable[[_Address], bool], uri: str, deadline: float
) -> socket.socket:
    """Look the name up once, check all it stands for, connect to what was checked."""
    try:
        found = socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # a label of more than 63 characters
        raise OSError(str(error)) from error
    for *_, sockaddr in found:
        if not all(map(allowed, _meant_by(ipaddress.ip_address(sockaddr[0])))):
            raise ImageAddressError(
                f"address: {_shown(uri)} must not lead to a private or local host, got "
                f"{origin.host}:{origin.port}; set LABEL_STUDIO_URL if this is Label Studio, or "
                "add it to IMAGE_PRIVATE_HOSTS if images may come from it"
            )
    failure = OSError("no address")
    for family, kind, protocol, _, sockaddr in found:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(min(_CONNECT_S, max(0.001, deadline - time.monotonic())))
            sock.connect(sockaddr)
        except OSError as error:
            sock.close()
            failure = error
        else:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            return sock
    raise failure


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is over already
        sock.shutdown(socket.SHUT_RDWR)


def _meant_by(address: _Address) -> Iterator[_Address]:
    """An address and the IPv4 address that it carries inside."""
    yield address
    if isinstance(address, ipaddress.IPv6Address):
        inside = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            inside.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        yield from (each for each in inside if each is not None)


def _anywhere(address: _Address) -> bool:
    return True


def _not_link_local(address: _Address) -> bool:
    # Label Studio is at home on private addresses, but never where clouds serve their credentials.
    return not address.is_link_local


def _public(address: _Address) -> bool:
    return address.is_global and not address.is_multicast


@lru_cache(maxsize=1)
def _tls_context(cafile: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=cafile)


def _no_answer(uri: str, origin: Origin, error: Exception, *, deadline: float) -> _NoAnswerError:
    host = f"{origin.host}:{origin.port}"
    if time.monotonic() >= deadline:
        return _NoAnswerError(
            f"fetch: {_shown(uri)} must arrive in time, got no end of it from {host}; raise "
            "IMAGE_TIMEOUT_S if that is normal there"
        )
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = f"a certificate that does not check ({error.verify_message})"
        return _NoAnswerError(
            f"fetch: {_shown(uri)} must come from who it says, got {reason} from {host}; "
            "REQUESTS_CA_BUNDLE names your own authority's certificates"
        )
    reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return _NoAnswerError(
        f"fetch: {_shown(uri)} must be answered by {host}, got {reason}; check the address from "
        "the machine that the backend runs on"
    )


def _refusal(
    status: int, url: str, *, uri: str, client: LabelStudioClient | None, authorization: str | None
) -> ImageFetchError:
    """What a status other than 200 means, and what to do about it."""
    origin = origin_of(url)
    got = f"got status {status} from {origin.host}:{origin.port}"
    if client is None or origin != client.origin:
        moved = client is not None and origin.host == client.origin.host
        what = (
            f"Label Studio's token is not sent there: set LABEL_STUDIO_URL to {origin.scheme}://"
            f"{origin.host}:{origin.port} if Label Studio has moved"
            if moved and status in (401, 403)
            else "open the address in a browser"
        )
    elif status == 401:
        got = f"token: {got}" if authorization else f"token: {got}, asked without a token"
        what = (
            "set LABEL_STUDIO_API_KEY to a personal access token (Account & Settings); the token "
            "of /setup is a legacy one, which Label Studio refuses by default"
        )
    elif _LOCAL_FILES in url:
        what = (
            "start Label Studio with LOCAL_FILES_SERVING_ENABLED=true and connect the folder to "
            "the project as a local-files storage"
        )
    elif "/presign/" in url:
        what = "connect the bucket to the project as a cloud storage"
    elif status == 500:
        what = "Label Studio answers so when the uploaded file is gone: import it again"
    else:
        what = "check that the token's user may see the project"
    failure = _NoAnswerError if status in (502, 503, 504) else ImageFetchError
    return failure(f"fetch: {_shown(uri)} must be answered with a file, {got}; {what}")


def _read(response: http.client.HTTPResponse, *, uri: str, limit: int, deadline: float) -> bytes:
    """The body, undone of a compression that was not asked for, never more than `limit` bytes."""
    length = None if response.chunked else response.length
    if length is not None and length > limit:
        raise _too_many_bytes(uri, limit)
    encoding = (response.getheader("Content-Encoding") or "identity").strip().lower()
    if encoding not in ("identity", "gzip", "deflate"):
        raise ImageFetchError(
            f"fetch: {_shown(uri)} must come as it is (Accept-Encoding: identity), got "
            f"{encoding!r}; switch the compression off where it is served"
        )
    inflate = None if encoding == "identity" else zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    data, received = bytearray(), 0
    while chunk := response.read1(_CHUNK):
        received += len(chunk)
        if inflate is None:
            data += chunk
        else:
            try:
                data += inflate.decompress(chunk, limit + 1 - len(data))
            except zlib.error as error:
                raise ImageFetchError(
                    f"fetch: {_shown(uri)} must be valid {encoding}, got {error}; switch the "
                    "compression off where it is served"
                ) from error
        if len(data) > limit:
            raise _too_many_bytes(uri, limit)
    if time.monotonic() >= deadline:
        raise TimeoutError("the deadline")
    if length is not None and received < length:
        raise http.client.IncompleteRead(b"", length - received)
    if inflate is not None and not inflate.eof:
        raise http.client.IncompleteRead(b"")
    return bytes(data)


class _FileCache:
    """Files by key in one folder, shared by processes: whole or absent, bounded, oldest use first.

    A file is the SHA-256 of its content, then the content. Its modification time is when it was
    fetched, its access time (set here, whatever the mount says) when it was last used.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes

    def read(self, key: str) -> tuple[bytes, float] | None:
        """The content and its age in seconds, or None if it is not there or damaged."""
        path = self._folder / key
        try:
            data, stat = path.read_bytes(), path.stat()
            os.utime(path, ns=(time.time_ns(), stat.st_mtime_ns))
        except OSError:
            return None
        digest, content = data[:32], data[32:]
        if hashlib.sha256(content).digest() != digest:
            return None
        return content, time.time() - stat.st_mtime

    def write(self, key: str, content: bytes) -> None:
        """Keep a file; a disk that cannot take it is logged, not raised: only time is lost."""
        if len(content) + 32 > self._max_bytes:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self._folder, prefix="new-")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(hashlib.sha256(content).digest())
                    file.write(content)
                Path(name).replace(self._folder / key)
            except OSError:
                Path(name).unlink(missing_ok=True)
                raise
            self._evict()
        except OSError as error:
            logger.warning(
                "%s could not be written to, images are not kept: %s", self._folder, error
            )

    def _evict(self) -> None:
        files = []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another worker was faster
                stat = path.stat()
                files.append((stat.st_atime_ns, stat.st_size, path))
        excess = sum(size for _, size, _ in files) - self._max_bytes
        for _, size, path in sorted(files):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size


def decode_image(data: bytes, *, max_pixels: int, name: str = "the file") -> Pixels:
    """Decode a file to what a browser shows of it: the first frame, EXIF applied, on white.

    Args:
        data: The file; its content decides what it is, no name or type does.
        max_pixels: The most rows times columns; checked before memory is taken for them.
        name: What errors call the file.

    Returns:
        [H, W, 3] uint8 RGB, contiguous. 16-bit grey is scaled from its whole range, float and
        32-bit grey from their extremes.

    Raises:
        ImageTooLargeError: If the picture has more pixels.
        ImageDecodeError: If the file is no picture, is truncated or damaged, or is of a kind that
            is not read.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            _check_pixels(image, name=name, max_pixels=max_pixels)
            image.load()
            return _oriented(_rgb(image), _orientation(image))
    except ImageTooLargeError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels(name, "far more", max_pixels) from error
    except UnidentifiedImageError as error:
        raise ImageDecodeError(
            f"decode: {name} must be a picture ({', '.join(_formats())}), got {len(data)} bytes "
            f"that begin with {data[:16]!r}; open the address in a browser"
        ) from error
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise ImageDecodeError(
            f"decode: {name} must be a whole, undamaged picture, got {error!r}; save the file again"
        ) from error


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _too_many_pixels(name: str, got: str, max_pixels: int) -> ImageTooLargeError:
    return ImageTooLargeError(
        f"decode: {name} must have at most {max_pixels} pixels, got {got}; raise IMAGE_MAX_PIXELS "
        "if memory allows it, or make the picture smaller"
    )


def _check_pixels(image: Image.Image, *, name: str, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise _too_many_pixels(name, f"{image.width} x {image.height}", max_pixels)


def _rgb(image: Image.Image) -> Pixels:
    """[H, W, 3] uint8 of a loaded image, still as it is stored."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        grey = _eight_bits(image)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _eight_bits(image: Image.Image) -> Pixels:
    values = np.asarray(image)
    # Depending on its version, Pillow says "I" or "I;16" to 16-bit PNG and PNM.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        scaled: Pixels = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        return scaled
    wide = values.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    scale = 255 / (high - low) if high > low else 0.0
    grey = np.nan_to_num(wide, nan=low, posinf=high, neginf=low)
    stretched: Pixels = np.rint((grey - low) * scale).astype(np.uint8)
    return stretched


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation (1..8) that a browser follows; 1 where there is none."""
    data = image.info.get("exif")
    if image.format not in _ORIENTED_FORMATS or not data:
        return 1
    exif = Image.Exif()
    try:
        exif.load(data)
        orientation = exif.get(_ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001  # a damaged note about the picture does not damage it
        return 1
    return orientation if orientation in _TURNS else 1


def _oriented(pixels: Pixels, orientation: int) -> Pixels:
    flip_rows, flip_columns, swap = _TURNS[orientation]
    if flip_rows:
        pixels = pixels[::-1]
    if flip_columns:
        pixels = pixels[:, ::-1]
    if swap:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels)
