import hashlib
import json
import os
import pickle
import socket
import struct
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sam_ext import checkpoints
from sam_ext.checkpoints import (
    PUBLISHED,
    PublishedCheckpoint,
    config_from_state_dict,
    download,
    find_checkpoint,
    load_sam,
    resolve_device,
    save_checkpoint,
)
from sam_ext.config import MODELS, SamConfig
from sam_ext.errors import CheckpointError, ConfigError, DownloadError
from sam_ext.sam import build_sam

CONTENT = np.random.default_rng(0).bytes(3_000_000)
FILE_NAME = "weights.pth"


class Server(ThreadingHTTPServer):
    """Serves one file; can be told to break, to ignore ranges, to fail or to hold an answer."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.sends = []  # bytes that the next answers send before the connection is closed
        self.resets = False  # closed by a reset instead of an orderly end
        self.ranges = True
        self.status = 200
        self.asked = []  # the Range header of each request
        self.paths = []
        self.hold = None  # called before each answer
        self.redirect = False

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers["Range"]
        if server.redirect and not self.path.startswith("/elsewhere"):
            self.send_response(302)
            self.send_header("Location", "/elsewhere" + self.path)
            self.end_headers()
            return
        server.asked.append(wanted)
        server.paths.append(self.path)
        if server.hold is not None:
            server.hold()
        if server.status != 200 or self.path.rpartition("/")[2] != FILE_NAME:
            self.send_error(server.status if server.status != 200 else 404)
            return
        start = int(wanted[6:-1]) if wanted and server.ranges else 0
        total = len(server.content)
        if start:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(total - start))
        self.end_headers()
        count = server.sends.pop(0) if server.sends else total
        self.wfile.write(server.content[start : start + count])
        if server.resets:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def published(server, monkeypatch):
    """Put a file of the test server in the place of vit_b."""
    one = PublishedCheckpoint(
        file_name=FILE_NAME,
        url=f"{server.url}/models/{FILE_NAME}",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    monkeypatch.setitem(PUBLISHED, "vit_b", one)
    return one


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_a_missing_checkpoint_is_downloaded_once_and_checked(server, published, tmp_path):
    for _ in range(2):
        path = find_checkpoint("vit_b", weights_dir=tmp_path / "new" / "weights")
        assert path == tmp_path / "new" / "weights" / FILE_NAME
        assert path.read_bytes() == CONTENT
        assert files(path.parent) == [FILE_NAME]
    assert server.asked == [None]


def test_a_mirror_and_a_redirect_serve_as_well(server, published, tmp_path, monkeypatch):
    server.redirect = True
    elsewhere = replace(published, url="http://127.0.0.1:1/unreachable")
    monkeypatch.setitem(PUBLISHED, "vit_b", elsewhere)
    path = find_checkpoint("vit_b", weights_dir=tmp_path, mirror_url=f"{server.url}/mirror/")
    assert path.read_bytes() == CONTENT
    assert server.paths == [f"/elsewhere/mirror/{FILE_NAME}"]


@pytest.mark.parametrize(
    ("ranges", "sends", "asked"),
    [
        pytest.param(True, [], ["bytes=1000000-"], id="server with ranges"),
        pytest.param(
            True,
            [500_000, 1_000_000],
            ["bytes=1000000-", "bytes=1500000-", "bytes=2500000-"],
            id="connection breaks twice",
        ),
        pytest.param(False, [], ["bytes=1000000-"], id="server that ignores ranges"),
        pytest.param(
            False,
            [1_500_000],
            ["bytes=1000000-", "bytes=1500000-"],
            id="server that ignores ranges, connection breaks",
        ),
    ],
)
def test_a_partial_file_is_completed(server, published, tmp_path, ranges, sends, asked):
    (tmp_path / f"{FILE_NAME}.part").write_bytes(CONTENT[:1_000_000])
    server.ranges, server.sends = ranges, sends
    assert find_checkpoint("vit_b", weights_dir=tmp_path).read_bytes() == CONTENT
    assert server.asked == asked
    assert files(tmp_path) == [FILE_NAME]


def test_a_reset_connection_is_named(server, published, tmp_path):
    server.sends, server.resets = [0], True
    with pytest.raises(
        DownloadError, match=r"could not be downloaded: .* reset by peer; 0 of 3000"
    ):
        find_checkpoint("vit_b", weights_dir=tmp_path)


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(CONTENT + b"more", id="longer than the file"),
        pytest.param(CONTENT, id="whole, but not renamed yet"),
    ],
)
def test_a_part_that_needs_no_resuming_is_handled(server, published, tmp_path, part):
    (tmp_path / f"{FILE_NAME}.part").write_bytes(part)
    assert find_checkpoint("vit_b", weights_dir=tmp_path).read_bytes() == CONTENT
    assert server.asked == ([None] if len(part) > len(CONTENT) else [])


def test_what_arrived_is_kept_when_the_server_gives_nothing_more(server, published, tmp_path):
    server.sends = [1_000_000, 0]
    with pytest.raises(DownloadError) as raised:
        find_checkpoint("vit_b", weights_dir=tmp_path)
    assert str(raised.value) == (
        f"{published.url} could not be downloaded: the connection was closed early; "
        f"1000000 of 3000000 bytes are kept, start again to go on from there, "
        f"or put the file into {tmp_path}"
    )
    assert files(tmp_path) == [f"{FILE_NAME}.part"]
    assert find_checkpoint("vit_b", weights_dir=tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000000-", "bytes=1000000-"]


@pytest.mark.parametrize("status", [403, 404, 416, 500])
def test_an_http_error_is_named(server, published, tmp_path, status):
    server.status = status
    with pytest.raises(
        DownloadError, match=f"could not be downloaded: the server answered {status}"
    ):
        find_checkpoint("vit_b", weights_dir=tmp_path)
    assert files(tmp_path) == []


def test_an_unreachable_server_is_named(published, tmp_path):
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(DownloadError, match=r"the server cannot be reached: .*refused"):
            find_checkpoint(
                "vit_b",
                weights_dir=tmp_path,
                mirror_url=f"http://127.0.0.1:{taken.getsockname()[1]}",
            )


def test_a_file_of_another_size_is_refused_before_it_is_fetched(server, published, tmp_path):
    server.content = b"<html>sign in first</html>"
    with pytest.raises(
        DownloadError, match="must have 3000000 bytes, but the server announced 26,"
    ):
        find_checkpoint("vit_b", weights_dir=tmp_path)
    assert files(tmp_path) == []


def test_a_file_of_another_content_is_refused_and_deleted(server, published, tmp_path):
    server.content = bytes(len(CONTENT))
    with pytest.raises(DownloadError) as raised:
        find_checkpoint("vit_b", weights_dir=tmp_path)
    assert str(raised.value) == (
        f"{published.url} is not the published weights.pth: its SHA-256 must be "
        f"{published.sha256}, got {hashlib.sha256(bytes(len(CONTENT))).hexdigest()}; "
        "what arrived was deleted, start again or use another mirror"
    )
    assert files(tmp_path) == []


def test_two_workers_download_once(server, published, tmp_path):
    second = threading.Event()

    def hold():  # gives the other worker the time to ask too, if nothing holds it back
        if len(server.asked) > 1:
            second.set()
        second.wait(0.3)

    server.hold = hold
    paths = []
    workers = [
        threading.Thread(
            target=lambda: paths.append(find_checkpoint("vit_b", weights_dir=tmp_path))
        )
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert paths == [tmp_path / FILE_NAME] * 2
    assert paths[0].read_bytes() == CONTENT
    assert server.asked == [None]


def test_a_folder_that_cannot_be_written_is_named(published, tmp_path):
    (tmp_path / "weights").write_text("a file where the folder should be")
    with pytest.raises(DownloadError, match=r"weights\.pth cannot be written: .*; free space or"):
        download(published, tmp_path / "weights" / FILE_NAME)


def test_a_full_disk_is_named(published, tmp_path):
    (tmp_path / f"{FILE_NAME}.part").symlink_to("/dev/full")
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(DownloadError, match="No space left on device; free space or"):
        download(published, tmp_path / FILE_NAME)


def test_the_progress_bar_goes_to_the_error_stream(published, tmp_path, capsys):
    download(published, tmp_path / FILE_NAME, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert FILE_NAME in err
    assert "3.0/3.0 MB" in err


@pytest.mark.parametrize(
    "mirror_url", ["file:///etc", "ftp://host/sam", "host/sam", "https:///sam"]
)
def test_a_mirror_that_is_not_http_is_refused(tmp_path, mirror_url):
    with pytest.raises(ConfigError) as raised:
        find_checkpoint("vit_b", weights_dir=tmp_path, mirror_url=mirror_url)
    assert str(raised.value) == (
        f"mirror_url must start with http:// or https://, got '{mirror_url}'"
    )


def test_offline_a_missing_file_says_what_to_put_where(server, published, tmp_path):
    with pytest.raises(CheckpointError) as raised:
        find_checkpoint("vit_b", weights_dir=tmp_path, offline=True)
    assert str(raised.value) == (
        f"{tmp_path / FILE_NAME} must be there to use 'vit_b' offline, but is not; download "
        f"{published.url} (3000000 bytes) elsewhere and put it there, or allow downloads"
    )
    (tmp_path / FILE_NAME).write_bytes(CONTENT)
    assert find_checkpoint("vit_b", weights_dir=tmp_path, offline=True) == tmp_path / FILE_NAME
    assert server.asked == []


@pytest.mark.parametrize(
    ("content", "difference"),
    [
        pytest.param(CONTENT[:-1], "it must have 3000000 bytes, got 2999999;", id="truncated"),
        pytest.param(bytes(len(CONTENT)), "its SHA-256 must be ", id="other bytes"),
    ],
)
def test_a_file_that_is_not_the_published_one_is_refused(published, tmp_path, content, difference):
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"is not the published file: {difference}"):
        find_checkpoint("vit_b", weights_dir=tmp_path)
    assert files(tmp_path) == [FILE_NAME]


def test_the_bundled_model_needs_no_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(checkpoints._BUNDLED, "tiny", tmp_path / "tiny.safetensors")
    with pytest.raises(CheckpointError, match=r"the bundled weights of 'tiny' must be in .*, but"):
        find_checkpoint("tiny", weights_dir=Path("unused"), offline=True)
    (tmp_path / "tiny.safetensors").touch()
    found = find_checkpoint("tiny", weights_dir=Path("unused"), offline=True)
    assert found == tmp_path / "tiny.safetensors"


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(CheckpointError) as raised:
        find_checkpoint("vit_x", weights_dir=tmp_path)
    assert str(raised.value) == (
        "model must be one of tiny, vit_b, vit_l, vit_h or the path of a checkpoint, "
        "got 'vit_x', which is neither"
    )


def states_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_a_saved_model_loads_as_it_was(small_sam, tmp_path):
    path = tmp_path / "new" / "small.safetensors"
    save_checkpoint(small_sam, path, dtype=torch.float32, metadata={"recipe": "none"})
    loaded = load_sam(str(path), weights_dir=tmp_path)
    assert states_equal(loaded, small_sam)
    assert not loaded.training
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert {t.device.type for t in [*loaded.parameters(), *loaded.buffers()]} == {"cpu"}
    image = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(loaded.image_encoder(image), small_sam.image_encoder(image))
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    config = json.loads(header.pop("config"))
    assert header == {"recipe": "none", "format": "pt"}
    assert (config["window_size"], config["global_attn_indexes"]) == (3, [1])
    assert files(path.parent) == ["small.safetensors"]


def test_half_precision_rounds_parameters_and_keeps_buffers(small_sam, tmp_path):
    save_checkpoint(small_sam, tmp_path / "a.safetensors")
    loaded = load_sam(str(tmp_path / "a.safetensors"), weights_dir=tmp_path)
    for (name, got), wanted in zip(loaded.named_parameters(), small_sam.parameters(), strict=True):
        assert torch.equal(got, wanted.half().float()), name
        assert got.dtype == torch.float32, name
    assert torch.equal(
        loaded.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix,
        small_sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix,
    )


def test_a_window_as_large_as_the_grid_stays_a_window(tmp_path):
    config = SamConfig(
        name="custom",
        embed_dim=8,
        depth=2,
        num_heads=1,
        global_attn_indexes=(0,),
        image_size=48,
        window_size=3,
    )
    save_checkpoint(build_sam(config), tmp_path / "a.safetensors")
    loaded = load_sam(str(tmp_path / "a.safetensors"), weights_dir=tmp_path)
    assert [block.window_size for block in loaded.image_encoder.blocks] == [0, 3]


def test_a_model_that_cannot_be_stored_leaves_the_old_file(small_sam, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    small_sam.mask_decoder.iou_token.weight.data[0, 3] = 1e6
    with pytest.raises(CheckpointError, match=r"1 parameters are not finite in torch\.float16 "):
        save_checkpoint(small_sam, path)
    assert path.read_text() == "old"
    assert files(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_bare_state_dict_tells_its_sizes(small_sam, tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    if suffix == ".pth":
        torch.save(small_sam.state_dict(), path)
    else:
        save_file(small_sam.state_dict(), path)
    loaded = load_sam(str(path), weights_dir=tmp_path, offline=True)
    assert states_equal(loaded, small_sam)
    assert [block.window_size for block in loaded.image_encoder.blocks] == [3, 0]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_recognised_by_its_shapes(name):
    with torch.device("meta"):
        sam = build_sam(MODELS[name])
    assert config_from_state_dict(sam.state_dict()) == MODELS[name]


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_refused_and_not_run(small_sam, tmp_path):
    path = tmp_path / "mine.pth"
    torch.save(small_sam.state_dict() | {"extra": Harmful(tmp_path / "ran")}, path)
    with pytest.raises(CheckpointError) as raised:
        load_sam(str(path), weights_dir=tmp_path)
    assert str(raised.value) == (
        f"{path} must hold weights alone, but names {os.mkdir.__module__}.mkdir, which loading "
        "would run; save the model's state dict and use that"
    )
    path.write_bytes(pickle.dumps(Harmful(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="holds more than weights"):
        load_sam(str(path), weights_dir=tmp_path)
    assert files(tmp_path) == ["mine.pth"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[: len(content) // 2], id="truncated in the middle"),
        pytest.param(lambda content: content[:-1], id="truncated at the end"),
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: b"<html>not found</html>", id="a page"),
    ],
)
def test_a_damaged_file_is_refused(small_sam, tmp_path, suffix, damage):
    path = tmp_path / f"mine{suffix}"
    if suffix == ".pth":
        torch.save(small_sam.state_dict(), path)
    else:
        save_checkpoint(small_sam, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError) as raised:
        load_sam(str(path), weights_dir=tmp_path)
    assert str(raised.value).startswith(
        f"{path} ({path.stat().st_size} bytes) cannot be read as a checkpoint ("
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda state: {"model": state, "epoch": 3},
            r"must be a state dict, names to tensors, got \['model', 'epoch'\]; save the model's",
            id="wrapped",
        ),
        pytest.param(list, "must be a state dict, names to tensors, got list; save", id="a list"),
        pytest.param(
            lambda state: torch.nn.Linear(2, 2).state_dict(),
            r"is not a checkpoint of SAM: .* got 2 keys \(first: \['bias'\]\)",
            id="another architecture",
        ),
        pytest.param(
            lambda state: {k: v for k, v in state.items() if k != "mask_decoder.iou_token.weight"},
            r"1 keys missing \(first: \['mask_decoder.iou_token.weight'\]\), 0 unexpected \(first: "
            r"\[\]\), 0 of another shape",
            id="a key missing",
        ),
        pytest.param(
            lambda state: state | {"lora.a": torch.zeros(1)},
            r"0 keys missing \(first: \[\]\), 1 unexpected \(first: \['lora.a'\]\), 0 of another",
            id="a key too many",
        ),
        pytest.param(
            lambda state: state | {"mask_decoder.iou_token.weight": torch.zeros(2, 256)},
            r"1 of another shape \(first: "
            r"\['mask_decoder.iou_token.weight \(2, 256\) instead of \(1, 256\)'\]\)",
            id="another shape",
        ),
    ],
)
def test_a_file_that_is_no_sam_is_refused_by_name(small_sam, tmp_path, change, message):
    path = tmp_path / "mine.pth"
    torch.save(change(small_sam.state_dict()), path)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_sam(str(path), weights_dir=tmp_path)
    assert str(raised.value).startswith(str(path))


def test_a_config_that_is_none_is_refused(small_sam, tmp_path):
    path = tmp_path / "mine.safetensors"
    save_checkpoint(small_sam, path)
    save_file(load_file(path), path, metadata={"config": '{"embed_dim": 32}'})
    with pytest.raises(CheckpointError, match="is not a checkpoint of SAM: a model config must"):
        load_sam(str(path), weights_dir=tmp_path)


def test_the_cpu_is_always_there_and_auto_is_one_of_the_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")
    assert resolve_device("auto").type in ("cuda", "mps", "cpu")


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "", "meta"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(ConfigError, match=rf"device must be auto or .*cpu\), got '{device}'"):
        resolve_device(device)
