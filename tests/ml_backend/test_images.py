import base64
import hashlib
import io
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from ml_backend import images
from ml_backend.errors import (
    ImageAddressError,
    ImageDecodeError,
    ImageError,
    ImageFetchError,
    ImageTooLargeError,
    LabelStudioError,
)
from ml_backend.images import ImageLoader, decode_image
from ml_backend.label_studio import LabelStudioClient
from ml_backend.settings import Settings
from tests.ml_backend.servers import (
    LEGACY_TOKEN,
    Answer,
    FakeLabelStudio,
    Server,
    redirect,
)

# Made for these tests, for localhost, good until 2126; nothing else trusts or uses it.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgeeQS5F1DDlcW4NTs
V1jcSD1nvkMsAe49X/5tsZLEm7ChRANCAAShMu0PtnEvL77mIVNmHuZeKGw25PBr
P2F/VMvFPfE2h+5vS1q/jQtBpCpSIx+5WKwsey4eKv1pOFyDZ3z62LTu
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBlDCCATugAwIBAgIUGUgmV3toEbH70+ktI+Y31fQCGGkwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMTA3NDQ1MFoYDzIxMjYxMDI4
MDc0NDUwWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAShMu0PtnEvL77mIVNmHuZeKGw25PBrP2F/VMvFPfE2h+5vS1q/jQtB
pCpSIx+5WKwsey4eKv1pOFyDZ3z62LTuo2kwZzAdBgNVHQ4EFgQUdvgSgE2zLxdH
GNhQ1v0Qow9BOZQwHwYDVR0jBBgwFoAUdvgSgE2zLxdHGNhQ1v0Qow9BOZQwDwYD
VR0TAQH/BAUwAwEB/zAUBgNVHREEDTALgglsb2NhbGhvc3QwCgYIKoZIzj0EAwID
RwAwRAIgDrMcu5nxL0TSHiT6+hOleRQIc7v7Hcr8oQGQwMV7hr4CIEjvz9RZtO0u
5qQWpWzHmJYyyq3migf+x+6t6STz6jRW
-----END CERTIFICATE-----
"""

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)


def file_of(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


PNG = file_of(Image.fromarray(PIXELS))
UPLOAD = "/data/upload/1/a.png"


@pytest.fixture(autouse=True)
def pillows_own_limit(monkeypatch):
    """Loaders set it for their process; other tests get it back."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


@pytest.fixture
def label_studio():
    with FakeLabelStudio() as server:
        server.routes[UPLOAD] = Answer(PNG)
        yield server


@pytest.fixture
def other():
    """Somebody else's origin."""
    with Server() as server:
        server.routes["/a.png"] = Answer(PNG)
        yield server


@pytest.fixture
def loader_of(tmp_path, label_studio, other):
    """Makes loaders that know the fake Label Studio and may ask the other origin."""

    def make(*, token=label_studio.personal_access_token, announced_url=None, **settings):
        settings = {"data_dir": tmp_path, "image_private_hosts": (other.host,)} | settings
        client = LabelStudioClient(label_studio.url, token, announced_url=announced_url)
        return ImageLoader(Settings(**settings), lambda task: client)

    return make


def task(address):
    return {"id": 11, "project": 5, "data": {"image": address}}


def load(loader, address):
    return loader.load(task(address), "image")


def message_of(loader, address, error):
    with pytest.raises(error) as raised:
        load(loader, address)
    return str(raised.value)


def test_an_upload_is_loaded_with_a_personal_access_token(loader_of, label_studio):
    image = load(loader_of(), UPLOAD)
    np.testing.assert_array_equal(image.pixels, PIXELS)
    assert image.size_hw == (3, 5)
    assert image.content_hash == hashlib.sha256(PNG).hexdigest()
    assert image.uri == UPLOAD


def test_an_upload_is_loaded_with_a_legacy_token(loader_of, label_studio):
    label_studio.legacy_tokens_enabled = True
    image = load(loader_of(token=LEGACY_TOKEN), UPLOAD)
    np.testing.assert_array_equal(image.pixels, PIXELS)
    assert label_studio.sent("authorization") == [f"Token {LEGACY_TOKEN}"]


def test_an_expired_access_token_is_exchanged_once_more(loader_of, label_studio):
    loader = loader_of(image_cache_bytes=0)
    load(loader, UPLOAD)
    label_studio.expire_access_token()
    np.testing.assert_array_equal(load(loader, UPLOAD).pixels, PIXELS)


def test_a_refused_token_names_the_step_and_the_setting(loader_of, label_studio):
    message = message_of(loader_of(token=LEGACY_TOKEN), UPLOAD, ImageFetchError)
    assert message == (
        f"fetch: '{UPLOAD}' must be answered with a file, token: got status 401 from "
        f"{label_studio.host}; set LABEL_STUDIO_API_KEY to a personal access token (Account & "
        "Settings); the token of /setup is a legacy one, which Label Studio refuses by default"
    )
    assert len(label_studio.requests) == 1


def test_a_refused_exchange_is_label_studios_error(loader_of, label_studio):
    loader = loader_of()
    label_studio.personal_access_token = "revoked"
    assert message_of(loader, UPLOAD, LabelStudioError).startswith("token: ")


def test_the_token_stays_with_label_studio_when_it_redirects(loader_of, label_studio, other):
    label_studio.presigned["s3://bucket/x y.png"] = f"{other.url}/a.png?X-Signature=1"
    image = load(loader_of(), "s3://bucket/x y.png")
    np.testing.assert_array_equal(image.pixels, PIXELS)
    assert other.sent("authorization") == [None]
    assert label_studio.sent("authorization") == [None, f"Bearer {label_studio.access_token}"]


def test_the_token_is_not_sent_on_a_redirect_that_comes_back(loader_of, label_studio, other):
    label_studio.routes["/data/away"] = redirect(f"{other.url}/back")
    other.routes["/back"] = redirect(label_studio.url + UPLOAD)
    message = message_of(loader_of(), "/data/away", ImageFetchError)
    assert "token: got status 401" in message
    assert "asked without a token" in message
    assert other.sent("authorization") == [None]
    header = f"Bearer {label_studio.access_token}"
    assert label_studio.sent("authorization") == [None, header, None]


def test_the_token_is_not_sent_when_somebody_else_redirects_to_label_studio(
    loader_of, label_studio, other
):
    other.routes["/to"] = redirect(label_studio.url + UPLOAD)
    load_error = message_of(loader_of(), f"{other.url}/to", ImageFetchError)
    assert "asked without a token" in load_error
    assert label_studio.sent("authorization") == [None]


def test_a_redirect_within_label_studio_keeps_the_token(loader_of, label_studio):
    label_studio.routes["/data/old.png"] = redirect(UPLOAD)
    np.testing.assert_array_equal(load(loader_of(), "/data/old.png").pixels, PIXELS)


def test_a_foreign_address_is_loaded_without_the_token(loader_of, label_studio, other):
    np.testing.assert_array_equal(load(loader_of(), f"{other.url}/a.png").pixels, PIXELS)
    assert other.sent("authorization") == [None]
    assert other.sent("accept-encoding") == ["identity"]
    assert other.sent("host") == [other.host]
    assert label_studio.requests == []


def test_the_announced_host_name_is_asked_where_label_studio_really_is(loader_of, other):
    loader = loader_of(announced_url=other.url)
    np.testing.assert_array_equal(load(loader, other.url + UPLOAD).pixels, PIXELS)
    assert other.requests == []


def test_endless_redirects_end(loader_of, other):
    other.routes["/round"] = redirect("/round")
    message = message_of(loader_of(), f"{other.url}/round", ImageFetchError)
    assert "must answer within 6 requests, got a redirect each time" in message
    assert len(other.requests) == 6


@pytest.mark.parametrize(
    ("location", "message"),
    [
        pytest.param("file:///etc/passwd", "must lead to an http(s) URL", id="file"),
        pytest.param("ftp://127.0.0.1/a", "must lead to an http(s) URL", id="ftp"),
        pytest.param("http://[1/", "Invalid IPv6 URL", id="no URL"),
        pytest.param("http://127.0.0.1:1/a", "must not lead to a private", id="private host"),
        pytest.param("http://169.254.169.254/latest", "must not lead to a private", id="metadata"),
    ],
)
def test_a_redirect_is_checked_as_the_first_address_is(loader_of, other, location, message):
    other.routes["/to"] = redirect(location)
    assert message in message_of(loader_of(), f"{other.url}/to", ImageAddressError)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.0.1",
        "100.64.0.1",
        "169.254.169.254",
        "0.0.0.0",
        "224.0.0.1",
        "2130706433",
        "0x7f.1",
        "[::1]",
        "[fe80::1]",
        "[fd00::1]",
        "[::ffff:127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
    ],
)
def test_a_private_address_is_refused_before_it_is_asked(loader_of, host):
    message = message_of(loader_of(), f"http://{host}:9/a.png", ImageAddressError)
    assert message == (
        f"address: 'http://{host}:9/a.png' must not lead to a private or local host, got "
        f"{host.strip('[]')}:9; set LABEL_STUDIO_URL if this is Label Studio, or add it to "
        "IMAGE_PRIVATE_HOSTS if images may come from it"
    )


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"])
def test_a_public_address_passes(address):
    meant = images._meant_by(images.ipaddress.ip_address(address))
    assert all(map(images._public, meant))


def test_a_link_local_address_is_refused_even_as_label_studios_own(tmp_path):
    client = LabelStudioClient("http://169.254.169.254", LEGACY_TOKEN)
    loader = ImageLoader(Settings(data_dir=tmp_path), lambda task: client)
    assert "169.254.169.254:80" in message_of(loader, "/latest/meta-data", ImageAddressError)


def test_a_private_host_can_be_allowed_with_and_without_its_port(loader_of, other):
    for allowed in (other.host, "127.0.0.1"):
        loader = loader_of(image_private_hosts=(allowed,), image_cache_bytes=0)
        np.testing.assert_array_equal(load(loader, f"{other.url}/a.png").pixels, PIXELS)
    wrong_port = loader_of(image_private_hosts=(f"127.0.0.1:{other.port + 1}",))
    message_of(wrong_port, f"{other.url}/a.png", ImageAddressError)


def test_a_name_is_looked_up_once_and_what_was_checked_is_connected_to(
    loader_of, other, monkeypatch
):
    lookups = []

    def resolve(host, port, **_):
        lookups.append(host)
        address = "127.0.0.1" if len(lookups) == 1 else "127.0.0.2"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    name = f"images.example:{other.port}"
    loader = loader_of(image_private_hosts=(name,))
    np.testing.assert_array_equal(load(loader, f"http://{name}/a.png").pixels, PIXELS)
    assert lookups == ["images.example"]
    assert other.sent("host") == [name]


def test_a_name_that_stands_for_a_private_address_too_is_refused(loader_of, monkeypatch):
    def resolve(host, port, **_):
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in ("8.8.8.8", "10.1.1.1")
        ]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    message_of(loader_of(), "http://images.example/a.png", ImageAddressError)


def test_https_is_checked_against_the_name_in_the_address(tmp_path, monkeypatch):
    pem = tmp_path / "localhost.pem"
    pem.write_text(CERTIFICATE)
    settings = Settings(data_dir=tmp_path, image_private_hosts=("localhost", "127.0.0.1"))
    loader = ImageLoader(settings, lambda task: None)
    with Server(certificate=pem) as server:
        server.routes["/a.png"] = Answer(PNG)
        unknown = message_of(loader, f"https://localhost:{server.port}/a.png", ImageFetchError)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(pem))
        image = load(loader, f"https://localhost:{server.port}/a.png")
        other_name = message_of(loader, f"{server.url}/a.png", ImageFetchError)
    np.testing.assert_array_equal(image.pixels, PIXELS)
    assert "a certificate that does not check (self-signed certificate)" in unknown
    assert "a certificate that does not check (IP address mismatch" in other_name


@pytest.mark.parametrize(
    ("address", "message"),
    [
        pytest.param("file:///etc/passwd", "local-files storage", id="file"),
        pytest.param("ftp://host/a.png", "must be a path on Label Studio", id="ftp"),
        pytest.param("a.png", "must be a path on Label Studio", id="bare name"),
        pytest.param("//host/a.png", "must be a path on Label Studio", id="no scheme"),
        pytest.param("C:\\a.png", "must be a path on Label Studio", id="Windows path"),
        pytest.param("http://user:secret@host/a.png", "must not hold a user name", id="password"),
        pytest.param("http://:9/a.png", "host must not be empty", id="no host"),
        pytest.param("http://host:99999/a.png", "Port out of range", id="no port"),
        pytest.param("", "must be one address, got nothing", id="empty"),
        pytest.param(None, "must be one address, got nothing", id="null"),
        pytest.param(["/a.png"], "must be one address, got list", id="list"),
        pytest.param("data:image/png;base64", "got no comma", id="data without a comma"),
        pytest.param("data:image/png;base64,a!", "must be valid base64", id="data not base64"),
    ],
)
def test_an_address_that_is_not_read_is_refused(loader_of, address, message):
    text = message_of(loader_of(), address, ImageAddressError)
    assert text.startswith("address: ")
    assert message in text
    assert "secret" not in text


def test_a_field_that_the_task_lacks_is_named(loader_of):
    with pytest.raises(ImageAddressError) as raised:
        loader_of().load(task("/a.png"), "photo")
    assert str(raised.value) == (
        "address: data.photo of task 11 must be one address, got nothing; check that the Image "
        "tag's value names the field of the tasks that holds the image"
    )


@pytest.mark.parametrize("address", [UPLOAD, "s3://bucket/a.png"])
def test_label_studios_addresses_need_label_studio(tmp_path, address):
    loader = ImageLoader(Settings(data_dir=tmp_path), lambda task: None)
    assert "set LABEL_STUDIO_URL" in message_of(loader, address, ImageAddressError)


@pytest.mark.parametrize(
    ("address", "status", "message"),
    [
        pytest.param("/data/gone", 404, "the token's user may see the project", id="404"),
        pytest.param(UPLOAD, 500, "when the uploaded file is gone", id="lost upload"),
        pytest.param("/data/local-files/?d=a.png", 403, "LOCAL_FILES_SERVING_ENABLED", id="403"),
        pytest.param("s3://bucket/a.png", 404, "connect the bucket to the project", id="presign"),
    ],
)
def test_a_refusal_says_what_to_do(loader_of, label_studio, address, status, message):
    label_studio.routes[address.partition("?")[0]] = Answer(status=status)
    text = message_of(loader_of(), address, ImageFetchError)
    assert f"got status {status} from {label_studio.host}" in text
    assert message in text


def test_a_signature_is_not_repeated_in_errors(loader_of, other):
    text = message_of(loader_of(), f"{other.url}/gone.png?X-Signature=secret", ImageFetchError)
    assert text == (
        f"fetch: '{other.url}/gone.png?…' must be answered with a file, got status 404 from "
        f"{other.host}; open the address in a browser"
    )


def test_a_host_that_is_away_is_named(loader_of, label_studio):
    with Server() as gone:
        pass
    loader = loader_of(image_private_hosts=(gone.host,))
    assert message_of(loader, f"{gone.url}/a.png", ImageFetchError) == (
        f"fetch: '{gone.url}/a.png' must be answered by {gone.host}, got Connection refused; check "
        "the address from the machine that the backend runs on"
    )


@pytest.mark.parametrize("answer", ["body", "headers"])
def test_a_server_that_never_ends_is_left_at_the_deadline(loader_of, other, answer):
    def drip():
        waiting = threading.Event()
        while True:  # until the client hangs up
            yield b"x: y\r\n"
            waiting.wait(0.02)

    def raw():
        """A status line and then headers without an end."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            ports.append(server.getsockname()[1])
            listening.set()
            connection = server.accept()[0]
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\n")
                try:
                    for chunk in drip():
                        connection.sendall(chunk[:1])
                except OSError:
                    return

    ports, listening = [other.port], threading.Event()
    other.routes["/slow"] = lambda request: Answer(drip())
    thread = threading.Thread(target=raw)
    if answer == "headers":
        thread.start()
        assert listening.wait(10)
    loader = loader_of(image_timeout_s=0.4, image_private_hosts=("127.0.0.1",))
    start = time.monotonic()
    text = message_of(loader, f"http://127.0.0.1:{ports[-1]}/slow", ImageFetchError)
    assert time.monotonic() - start < 3
    assert "must arrive in time" in text
    assert "raise IMAGE_TIMEOUT_S" in text
    if answer == "headers":
        thread.join(10)
        assert not thread.is_alive()


def test_a_silent_server_is_left_at_the_deadline(loader_of, other):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        loader = loader_of(image_timeout_s=0.3, image_private_hosts=("127.0.0.1",))
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/a.png"
        assert "must arrive in time" in message_of(loader, address, ImageFetchError)


def endless(counter):
    while True:
        counter.append(2**16)
        yield bytes(2**16)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({}, id="no length said"),
        pytest.param({"Content-Length": "99999999"}, id="length said"),
        pytest.param({"Content-Encoding": "gzip"}, id="compressed, though it was not asked for"),
    ],
)
def test_a_file_over_the_limit_is_left_as_soon_as_that_shows(loader_of, other, headers):
    sent = []
    body = endless(sent)
    if "Content-Encoding" in headers:  # 64 MiB of zeros in 64 KiB
        body = zlib.compress(bytes(2**26), wbits=zlib.MAX_WBITS | 16)
    other.routes["/big"] = Answer(body, headers=headers)
    loader = loader_of(image_max_bytes=100_000)
    tracemalloc.start()
    try:
        text = message_of(loader, f"{other.url}/big", ImageTooLargeError)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert text == (
        f"fetch: '{other.url}/big' must have at most 100000 bytes, got more; raise IMAGE_MAX_BYTES"
    )
    assert peak < 2**22
    assert sum(sent) < 2**25  # what fits into the sockets' buffers, not endless


def test_a_file_of_just_the_limit_is_loaded(loader_of, other):
    address = f"{other.url}/a.png"
    message_of(loader_of(image_max_bytes=len(PNG) - 1), address, ImageTooLargeError)
    np.testing.assert_array_equal(load(loader_of(image_max_bytes=len(PNG)), address).pixels, PIXELS)


@pytest.mark.parametrize("wbits", [zlib.MAX_WBITS | 16, zlib.MAX_WBITS], ids=["gzip", "deflate"])
def test_a_file_that_comes_compressed_all_the_same_is_decoded(loader_of, other, wbits):
    encoding = "gzip" if wbits > zlib.MAX_WBITS else "deflate"
    body = zlib.compress(PNG, wbits=wbits)
    other.routes["/z.png"] = Answer(body, headers={"Content-Encoding": encoding})
    np.testing.assert_array_equal(load(loader_of(), f"{other.url}/z.png").pixels, PIXELS)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        pytest.param(Answer(PNG, headers={"Content-Encoding": "br"}), "got 'br'", id="brotli"),
        pytest.param(
            Answer(PNG, headers={"Content-Encoding": "gzip"}), "must be valid gzip", id="not gzip"
        ),
        pytest.param(
            Answer(PNG[:40], headers={"Content-Length": str(len(PNG))}),
            f"IncompleteRead(0 bytes read, {len(PNG) - 40} more expected)",
            id="cut off",
        ),
        pytest.param(
            Answer(zlib.compress(PNG, wbits=31)[:-9], headers={"Content-Encoding": "gzip"}),
            "IncompleteRead",
            id="gzip cut off",
        ),
    ],
)
def test_a_body_that_does_not_arrive_whole_is_refused(loader_of, other, answer, message):
    other.routes["/b"] = answer
    assert message in message_of(loader_of(), f"{other.url}/b", ImageFetchError)


@pytest.mark.parametrize(
    "address",
    [
        pytest.param("data:image/png;base64," + base64.b64encode(PNG).decode(), id="base64"),
        pytest.param(
            "data:;base64," + base64.b64encode(PNG).decode().replace("+", "%2B"), id="percent"
        ),
        pytest.param("data:," + "".join(f"%{byte:02x}" for byte in PNG), id="not base64"),
    ],
)
def test_a_data_url_is_loaded(loader_of, address):
    np.testing.assert_array_equal(load(loader_of(), address).pixels, PIXELS)


@pytest.mark.parametrize("size", [100, 10_000])
def test_a_data_url_over_the_limit_is_refused_without_its_bytes(loader_of, size):
    address = "data:image/png;base64," + "A" * 4 * size
    text = message_of(loader_of(image_max_bytes=200), address, ImageTooLargeError)
    assert "'data:image/png;base64,…' must have at most 200 bytes" in text


@pytest.fixture
def storage(tmp_path):
    root = tmp_path / "storage"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "local one.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "sub" / "in.png").symlink_to(root / "sub" / "local one.png")
    return root


@pytest.mark.parametrize("name", ["sub/local%20one.png", "/sub/local+one.png", "sub/in.png"])
@pytest.mark.parametrize("known", [True, False], ids=["Label Studio known", "not known"])
def test_a_local_file_is_read_from_the_storage(tmp_path, storage, label_studio, name, known):
    client = LabelStudioClient(label_studio.url, None) if known else None
    settings = Settings(data_dir=tmp_path, local_files_root=storage)
    image = load(ImageLoader(settings, lambda task: client), f"/data/local-files/?d={name}")
    np.testing.assert_array_equal(image.pixels, PIXELS)
    assert label_studio.requests == []


def test_a_local_file_is_asked_from_label_studio_without_the_setting(loader_of, label_studio):
    label_studio.routes["/data/local-files/"] = Answer(PNG)
    image = load(loader_of(), f"{label_studio.url}/data/local-files/?d=sub/local%20one.png")
    np.testing.assert_array_equal(image.pixels, PIXELS)
    assert label_studio.requests[-1].query == {"d": ["sub/local one.png"]}


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        pytest.param("../secret.png", ImageAddressError, "leads out of it", id="dots"),
        pytest.param("%2e%2e/secret.png", ImageAddressError, "leads out of it", id="encoded dots"),
        pytest.param("sub/../../secret.png", ImageAddressError, "leads out of it", id="inner dots"),
        pytest.param("out.png", ImageAddressError, "leads out of it", id="link out"),
        pytest.param("/etc/hostname", ImageFetchError, "No such file", id="absolute"),
        pytest.param("gone.png", ImageFetchError, "No such file", id="missing"),
        pytest.param("loop.png", ImageFetchError, "LOCAL_FILES_ROOT", id="link to itself"),
        pytest.param("a%00b", ImageFetchError, "null", id="null byte"),
        pytest.param("sub", ImageAddressError, "must be a file", id="folder"),
        pytest.param("", ImageAddressError, "must be a file", id="nothing"),
    ],
)
def test_nothing_outside_the_storage_is_read(loader_of, storage, name, error, message):
    loader = loader_of(local_files_root=storage)
    assert message in message_of(loader, f"/data/local-files/?d={name}", error)


def test_somebody_elses_local_files_path_is_not_read_from_the_storage(loader_of, storage, other):
    loader = loader_of(local_files_root=storage)
    message_of(loader, f"{other.url}/data/local-files/?d=sub/in.png", ImageFetchError)
    assert len(other.requests) == 1


def test_a_local_file_over_the_limit_is_refused(loader_of, storage):
    loader = loader_of(local_files_root=storage, image_max_bytes=len(PNG) - 1)
    message_of(loader, "/data/local-files/?d=sub/in.png", ImageTooLargeError)


def test_one_address_is_downloaded_once_by_many_threads(loader_of, other):
    all_waiting = threading.Barrier(9)
    release = threading.Event()

    def slow(request):
        assert release.wait(10)
        return Answer(PNG)

    def ask():
        all_waiting.wait(10)
        hashes.append(load(loader, f"{other.url}/slow").content_hash)

    other.routes["/slow"] = slow
    loader, hashes = loader_of(image_cache_bytes=0), []
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    all_waiting.wait(10)
    release.set()
    for thread in threads:
        thread.join(10)
    assert hashes == [hashlib.sha256(PNG).hexdigest()] * 8
    assert len(other.requests) == 1


def test_threads_with_different_addresses_do_not_wait_for_each_other(loader_of, other):
    release = threading.Event()

    def slow(request):
        assert release.wait(10)
        return Answer(PNG)

    other.routes["/slow"] = slow
    loader = loader_of()
    thread = threading.Thread(target=load, args=(loader, f"{other.url}/slow"))
    thread.start()
    load(loader, f"{other.url}/a.png")
    assert thread.is_alive()
    release.set()
    thread.join(10)


def test_a_failure_reaches_all_who_wait_and_the_next_one_tries_again(loader_of, other):
    arrived, release, failures = threading.Event(), threading.Event(), []

    def fail_once(request):
        other.routes["/once"] = Answer(PNG)
        arrived.set()
        assert release.wait(10)
        return Answer(status=404)

    def ask():
        failures.append(message_of(loader, f"{other.url}/once", ImageFetchError))

    other.routes["/once"] = fail_once
    loader = loader_of()
    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads[0].start()
    assert arrived.wait(10)
    threads[1].start()
    while not next(iter(loader._running.values()))._condition._waiters:
        pass  # until the second one waits
    release.set()
    for thread in threads:
        thread.join(10)
    assert len(failures) == 2
    np.testing.assert_array_equal(load(loader, f"{other.url}/once").pixels, PIXELS)


def test_a_kept_file_is_neither_fetched_nor_decoded_again(loader_of, other, monkeypatch):
    first = loader_of()
    load(first, f"{other.url}/a.png")
    monkeypatch.setattr(images, "decode_image", lambda *_, **__: pytest.fail("decoded again"))
    again = load(first, f"{other.url}/a.png")
    assert (again.size_hw, len(other.requests)) == ((3, 5), 1)


def test_a_kept_file_serves_the_next_process_too(loader_of, other):
    load(loader_of(), f"{other.url}/a.png")
    np.testing.assert_array_equal(load(loader_of(), f"{other.url}/a.png").pixels, PIXELS)
    assert len(other.requests) == 1


def test_what_one_token_may_read_is_not_given_to_another(loader_of, label_studio):
    load(loader_of(), UPLOAD)
    message_of(loader_of(token=LEGACY_TOKEN), UPLOAD, ImageFetchError)


def test_a_foreign_file_is_kept_once_whatever_the_token(loader_of, other):
    for token in (None, LEGACY_TOKEN):
        load(loader_of(token=token), f"{other.url}/a.png")
    assert len(other.requests) == 1


def kept_files(tmp_path):
    return sorted((tmp_path / "images").iterdir())


def age(path, seconds):
    stat = path.stat()
    os.utime(path, (stat.st_atime, stat.st_mtime - seconds))


def test_a_kept_file_is_fetched_again_after_ten_minutes(loader_of, other, tmp_path):
    load(loader_of(), f"{other.url}/a.png")
    age(kept_files(tmp_path)[0], 601)
    other.routes["/a.png"] = Answer(file_of(Image.fromarray(PIXELS[::-1])))
    np.testing.assert_array_equal(load(loader_of(), f"{other.url}/a.png").pixels, PIXELS[::-1])


def test_being_used_does_not_make_a_kept_file_fresh(loader_of, other, tmp_path):
    for _ in range(3):
        load(loader_of(), f"{other.url}/a.png")
        age(kept_files(tmp_path)[0], 301)
    load(loader_of(), f"{other.url}/a.png")
    assert len(other.requests) == 2


def test_an_old_copy_is_used_while_its_server_is_away(tmp_path, caplog):
    with Server() as server:
        server.routes["/a.png"] = Answer(PNG)
        settings = Settings(data_dir=tmp_path, image_private_hosts=(server.host,))
        loader = ImageLoader(settings, lambda task: None)
        load(loader, f"{server.url}/a.png")
        age(kept_files(tmp_path)[0], 601)
        server.routes["/b.png"] = Answer(PNG)
    np.testing.assert_array_equal(load(loader, f"{server.url}/a.png").pixels, PIXELS)
    assert "an older copy is used" in caplog.text


def test_an_old_copy_is_not_used_when_access_is_refused(loader_of, other, tmp_path):
    load(loader_of(), f"{other.url}/a.png")
    age(kept_files(tmp_path)[0], 601)
    other.routes["/a.png"] = Answer(status=403)
    message_of(loader_of(), f"{other.url}/a.png", ImageFetchError)


def test_a_damaged_copy_is_fetched_again(loader_of, other, tmp_path):
    load(loader_of(), f"{other.url}/a.png")
    path = kept_files(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-5])
    np.testing.assert_array_equal(load(loader_of(), f"{other.url}/a.png").pixels, PIXELS)
    assert len(other.requests) == 2


def test_kept_files_are_bounded_and_the_longest_unused_goes_first(loader_of, other, tmp_path):
    for name in "abcd":
        other.routes[f"/{name}.png"] = Answer(PNG)
    loader = loader_of(image_cache_bytes=3 * (len(PNG) + 32))
    known = set()
    for seconds, name in enumerate("abc"):
        load(loader, f"{other.url}/{name}.png")
        (path,) = set(kept_files(tmp_path)) - known
        known.add(path)
        # Used after it was written: then most mounts do not note a read by themselves.
        now = time.time()
        os.utime(path, (now - 60 + seconds, now - 100))
    for name in "ad":  # b is the longest unused when d comes
        load(loader, f"{other.url}/{name}.png")
    assert len(kept_files(tmp_path)) == 3
    other.requests.clear()
    for name in "acdb":
        load(loader, f"{other.url}/{name}.png")
    assert [request.path for request in other.requests] == ["/b.png"]


def test_what_is_no_picture_is_not_kept(loader_of, other, tmp_path):
    other.routes["/page"] = Answer(b"<!DOCTYPE html><p>Log in</p>")
    assert message_of(loader_of(), f"{other.url}/page", ImageDecodeError) == (
        f"decode: '{other.url}/page' must be a picture ({', '.join(images._formats())}), got 28 "
        "bytes that begin with b'<!DOCTYPE html><'; open the address in a browser"
    )
    assert not (tmp_path / "images").exists()


def test_a_folder_that_cannot_be_written_to_costs_only_time(loader_of, other, tmp_path, caplog):
    (tmp_path / "images").write_text("in the way")
    np.testing.assert_array_equal(load(loader_of(), f"{other.url}/a.png").pixels, PIXELS)
    assert "images are not kept" in caplog.text


def decode(data, max_pixels=1000):
    return decode_image(data, max_pixels=max_pixels)


GREY = np.array([[0, 64, 255], [1, 128, 254]], np.uint8)
GREY_RGB = np.repeat(GREY[:, :, None], 3, axis=2)
RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def palette_image(transparent=False):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putdata([0, 1])
    if transparent:
        image.info["transparency"] = 1
    return image


def of_pixels(mode, *pixels):
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    return image


def sixteen_bits(values):
    return Image.frombytes("I;16", values.shape[::-1], values.astype("<u2").tobytes())


def animated(file_format):
    frames = [Image.new("RGB", (2, 1), colour) for colour in (RED, GREEN)]
    options = {"lossless": True} if file_format == "WEBP" else {}
    return file_of(frames[0], file_format, save_all=True, append_images=frames[1:], **options)


WIDE_GREY = np.array([[0, 1, 129], [0x4000, 0x8000, 0xFFFF]])
WIDE_AS_8_BITS = np.array([[0, 0, 1], [64, 128, 255]])  # as Chromium shows 16-bit PNG
FLOAT = np.array([[-1.0, 0.0, np.nan], [3.0, np.inf, -np.inf]], np.float32)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(file_of(Image.fromarray(PIXELS)), PIXELS, id="RGB"),
        pytest.param(file_of(Image.fromarray(GREY)), GREY_RGB, id="grey"),
        pytest.param(file_of(of_pixels("1", 0, 1)), [[(0, 0, 0), WHITE]], id="one bit"),
        pytest.param(file_of(palette_image()), [[RED, GREEN]], id="palette"),
        pytest.param(file_of(palette_image(True)), [[RED, WHITE]], id="palette, transparent"),
        pytest.param(file_of(palette_image(True), "GIF"), [[RED, WHITE]], id="GIF, transparent"),
        pytest.param(
            file_of(of_pixels("RGBA", (255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 51))),
            [[RED, WHITE, (204, 204, 204)]],
            id="alpha, on white",
        ),
        pytest.param(
            file_of(of_pixels("LA", (7, 255), (7, 0))), [[(7, 7, 7), WHITE]], id="grey and alpha"
        ),
        pytest.param(
            file_of(of_pixels("RGB", RED, GREEN), transparency=GREEN),
            [[RED, WHITE]],
            id="key colour",
        ),
        pytest.param(
            file_of(of_pixels("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), "TIFF"),
            [[RED, (0, 0, 0)]],
            id="CMYK",
        ),
        pytest.param(
            file_of(sixteen_bits(WIDE_GREY)),
            np.repeat(WIDE_AS_8_BITS[:, :, None], 3, axis=2),
            id="16-bit PNG",
        ),
        pytest.param(
            file_of(sixteen_bits(WIDE_GREY), "TIFF"),
            np.repeat(WIDE_AS_8_BITS[:, :, None], 3, axis=2),
            id="16-bit TIFF",
        ),
        pytest.param(
            b"P5 3 2 65535 " + WIDE_GREY.astype(">u2").tobytes(),
            np.repeat(WIDE_AS_8_BITS[:, :, None], 3, axis=2),
            id="16-bit PGM",
        ),
        pytest.param(
            file_of(Image.fromarray(FLOAT), "TIFF"),
            np.repeat(np.array([[0, 64, 0], [255, 255, 0]])[:, :, None], 3, axis=2),
            id="float TIFF",
        ),
        pytest.param(
            file_of(Image.fromarray(np.full((1, 2), 7, np.int32)), "TIFF"),
            np.zeros((1, 2, 3)),
            id="32-bit TIFF, all the same",
        ),
        pytest.param(animated("GIF"), [[RED, RED]], id="animated GIF"),
        pytest.param(animated("PNG"), [[RED, RED]], id="animated PNG"),
        pytest.param(animated("WEBP"), [[RED, RED]], id="animated WebP"),
        pytest.param(animated("TIFF"), [[RED, RED]], id="TIFF of two pages"),
        pytest.param(file_of(Image.fromarray(PIXELS), "BMP"), PIXELS, id="BMP"),
        pytest.param(file_of(Image.fromarray(PIXELS), "WEBP", lossless=True), PIXELS, id="WebP"),
    ],
)
def test_every_kind_of_picture_becomes_rgb(data, expected):
    got = decode(data)
    np.testing.assert_array_equal(got, np.array(expected, np.uint8))
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous
    assert got.flags.writeable


def test_a_16_bit_rgb_png_keeps_its_high_bytes():
    pixels = np.array([[[0x1234, 0xFFFF, 0x0100], [0, 0x80FF, 0x00FF]]], ">u2")  # [1, 2, 3]
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" + pixels.tobytes())
    np.testing.assert_array_equal(
        decode(png_of(header, rows)), [[(0x12, 0xFF, 0x01), (0, 0x80, 0)]]
    )


def test_an_adobe_cmyk_jpeg_is_not_inverted():
    image = Image.new("CMYK", (16, 8), (0, 255, 255, 0))
    got = decode(file_of(image, "JPEG", quality=100))
    assert np.abs(got.astype(int) - RED).max() <= 3


def png_of(header, *data):
    def chunk(kind, body):
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    idat = b"".join(chunk(b"IDAT", each) for each in data)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + idat + chunk(b"IEND", b"")


def with_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


STORED = np.repeat(np.array([[10, 20, 30], [40, 50, 60]], np.uint8)[:, :, None], 3, axis=2)


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        pytest.param(1, [[10, 20, 30], [40, 50, 60]], id="1 as stored"),
        pytest.param(2, [[30, 20, 10], [60, 50, 40]], id="2 mirrored"),
        pytest.param(3, [[60, 50, 40], [30, 20, 10]], id="3 half a turn"),
        pytest.param(4, [[40, 50, 60], [10, 20, 30]], id="4 upside down, mirrored"),
        pytest.param(5, [[10, 40], [20, 50], [30, 60]], id="5 transposed"),
        pytest.param(6, [[40, 10], [50, 20], [60, 30]], id="6 a quarter clockwise"),
        pytest.param(7, [[60, 30], [50, 20], [40, 10]], id="7 transposed the other way"),
        pytest.param(8, [[30, 60], [20, 50], [10, 40]], id="8 a quarter anticlockwise"),
        pytest.param(9, [[10, 20, 30], [40, 50, 60]], id="9 is none"),
    ],
)
@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_exif_orientation_is_applied(file_format, orientation, expected):
    image = Image.fromarray(STORED)
    got = decode(file_of(image, file_format, exif=with_orientation(orientation)))
    np.testing.assert_array_equal(got[:, :, 0], expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpegs_exif_orientation_is_applied_as_pillow_does(orientation):
    smooth = np.linspace(0, 255, 16 * 24, dtype=np.uint8).reshape(16, 24)
    data = file_of(Image.fromarray(smooth), "JPEG", exif=with_orientation(orientation))
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(decode(data), expected)


def test_a_webps_exif_orientation_is_ignored_as_browsers_do():
    image = Image.fromarray(STORED)
    data = file_of(image, "WEBP", lossless=True, exif=with_orientation(6))
    np.testing.assert_array_equal(decode(data), STORED)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_damage_the_picture():
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"
    got = decode(file_of(Image.new("RGB", (16, 8), RED), "JPEG", exif=exif, quality=100))
    assert got.shape == (8, 16, 3)


@pytest.mark.parametrize("name", ["a.txt", "a.jpg", "a"])
def test_the_content_decides_not_the_name_or_the_type(loader_of, other, name):
    other.routes[f"/{name}"] = Answer(PNG, headers={"Content-Type": "text/plain"})
    np.testing.assert_array_equal(load(loader_of(), f"{other.url}/{name}").pixels, PIXELS)


NOISE = np.random.default_rng(1).integers(0, 256, (24, 36, 3), np.uint8)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000"])
def test_a_truncated_file_is_refused(file_format):
    data = file_of(Image.fromarray(NOISE), file_format)
    with pytest.raises(ImageDecodeError, match=r"^decode: the file must be a"):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", id="SVG"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", id="EPS"),
        pytest.param(b"%PDF-1.7", id="PDF"),
    ],
)
def test_what_is_no_raster_picture_is_refused(data):
    with pytest.raises(ImageDecodeError, match="must be a picture"):
        decode(data)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about what it could mend
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
def test_a_damaged_file_is_decoded_or_refused_but_nothing_else(file_format):
    data = file_of(Image.fromarray(NOISE), file_format, exif=with_orientation(6))
    random = np.random.default_rng(2)
    for _ in range(60):
        damaged = bytearray(data)
        for position in random.integers(0, min(len(data), 400), 3):
            damaged[position] = random.integers(0, 256)
        try:
            got = decode(bytes(damaged))
        except ImageError:
            continue
        assert got.ndim == 3


def test_one_pixel_over_the_limit_is_refused():
    assert decode(PNG, max_pixels=15).shape == (3, 5, 3)
    with pytest.raises(ImageTooLargeError) as raised:
        decode(PNG, max_pixels=14)
    assert str(raised.value) == (
        "decode: the file must have at most 14 pixels, got 5 x 3; raise IMAGE_MAX_PIXELS if memory "
        "allows it, or make the picture smaller"
    )


def test_the_loader_refuses_pixels_by_its_setting(loader_of, other):
    for limit in (14, 8, 7, 1):  # Pillow itself warns above 1 x and refuses above 2 x the setting
        text = message_of(
            loader_of(image_max_pixels=limit), f"{other.url}/a.png", ImageTooLargeError
        )
        assert f"must have at most {limit} pixels" in text


def test_a_limit_above_pillows_own_holds(loader_of, other):
    Image.MAX_IMAGE_PIXELS = 5  # a third of the picture
    assert load(loader_of(image_max_pixels=15), f"{other.url}/a.png").size_hw == (3, 5)


MEASURE = """
import resource, sys
from pathlib import Path
from ml_backend.errors import ImageTooLargeError
from ml_backend.images import ImageLoader
from ml_backend.settings import Settings

def peak_mib():
    status = Path("/proc/self/status")
    if status.exists():  # Linux hands ru_maxrss on from the parent
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

def load(name):
    address = f"/data/local-files/?d={name}"
    return loader.load({"id": 1, "data": {"image": address}}, "image")

root = Path(sys.argv[1])
loader = ImageLoader(Settings(data_dir=root, local_files_root=root), lambda task: None)
load("small.png")
start = peak_mib()
for name in sys.argv[2:]:
    try:
        load(name)
    except ImageTooLargeError as error:
        print(error, file=sys.stderr)
refused = peak_mib()
load("large.png")
print(refused - start, peak_mib() - refused)
"""


def bomb_png(side):
    """A whole, valid PNG of side x side pixels, one bit each."""
    compressor = zlib.compressobj(1)
    rows = [compressor.compress(bytes(100 * (1 + side // 8))) for _ in range(side // 100)]
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return png_of(header, b"".join(rows) + compressor.flush())


def bomb_webp():
    """The header of an animation of the largest size that WebP has, with one frame of 1 x 1."""
    data = bytearray(animated("WEBP"))
    assert data[12:16] == b"VP8X"
    data[24:30] = (16382).to_bytes(3, "little") * 2
    return bytes(data)


def test_a_bomb_is_refused_without_memory_for_it(tmp_path):
    (tmp_path / "small.png").write_bytes(PNG)
    (tmp_path / "large.png").write_bytes(bomb_png(4000))
    (tmp_path / "bomb.png").write_bytes(bomb_png(30_000))
    (tmp_path / "bomb.webp").write_bytes(bomb_webp())
    assert (tmp_path / "bomb.png").stat().st_size < 2**20
    command = [sys.executable, "-W", "error", "-c", MEASURE, tmp_path, "bomb.png", "bomb.webp"]
    run = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    refused_mib, control_mib = map(float, run.stdout.split())
    assert run.stderr.count("must have at most 100000000 pixels, got") == 2
    assert refused_mib < 20
    assert control_mib > 40  # the measure sees 4,000 x 4,000 x 3 bytes
