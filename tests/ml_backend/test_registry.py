from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from ml_backend.errors import RegistryError
from ml_backend.registry import ProjectVersions, Registry, is_project_name

ROOT = Path(__file__).parents[2]
PROJECT = "1.1795194739"


@pytest.fixture
def adapter(tmp_path) -> Path:
    path = tmp_path / "candidate.safetensors"
    path.write_bytes(b"adapter")
    return path


@pytest.fixture
def make(tmp_path):
    def call(*, keep: int = 10) -> ProjectVersions:
        return Registry(tmp_path / "projects", keep=keep).project(PROJECT)

    return call


@pytest.fixture
def versions(make) -> ProjectVersions:
    return make()


def add(versions: ProjectVersions, adapter: Path, count: int = 1, **manifest: object):
    added = [versions.add(adapter, {"model": "tiny"} | manifest) for _ in range(count)]
    return added[-1]


def numbers(versions: ProjectVersions) -> list[int]:
    return [version.number for version in versions.versions()]


def active(versions: ProjectVersions) -> int | None:
    version = versions.active()
    return None if version is None else version.number


def folders(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "projects" / PROJECT / "versions").iterdir())


def test_a_project_that_nobody_heard_of_has_the_base_model_and_nothing_is_written(tmp_path):
    registry = Registry(tmp_path / "projects", keep=1)
    versions = registry.project(PROJECT)
    assert (versions.versions(), versions.active(), versions.pointer()) == ([], None, b"")
    assert versions.activated() == [None]
    assert registry.names() == []
    assert not (tmp_path / "projects").exists()


def test_what_was_added_is_found_as_it_was(make, adapter, tmp_path):
    (tmp_path / "picture.png").write_bytes(b"picture")
    files = {"curves.json": b"{}", "before.png": tmp_path / "picture.png"}
    before = time.time()
    added = make().add(adapter, {"model": "tiny", "judgement": {"iou": 0.5}}, files)

    (found,) = make().versions()
    assert found.number == added.number == 1
    assert found.adapter.read_bytes() == b"adapter"
    assert found.model_version == f"sam-tiny-v1-{found.manifest['adapter_sha256'][:8]}"
    assert before <= found.created_at <= time.time()
    assert found.manifest == {
        "model": "tiny",
        "judgement": {"iou": 0.5},
        "number": 1,
        "model_version": found.model_version,
        "adapter_sha256": found.manifest["adapter_sha256"],
        "created_at": found.created_at,
    }
    assert (found.folder / "curves.json").read_bytes() == b"{}"
    assert (found.folder / "before.png").read_bytes() == b"picture"
    found.check()
    assert make().active() is None  # before it is activated


def test_another_adapter_has_another_name(versions, adapter):
    names = {add(versions, adapter).model_version}
    adapter.write_bytes(b"another")
    names.add(add(versions, adapter).model_version)
    assert len({name.rpartition("-")[2] for name in names}) == 2


@pytest.mark.parametrize(
    ("manifest", "files", "sentence"),
    [
        pytest.param({}, {}, "must be the base model's name, got None", id="no-model"),
        pytest.param({"model": "tiny", "iou": float("nan")}, {}, "JSON compliant", id="nan"),
        pytest.param({"model": "tiny"}, {"../x": b""}, "plain names", id="path"),
        pytest.param({"model": "tiny"}, {"manifest.json": b""}, "not taken", id="taken"),
    ],
)
def test_what_is_no_version_is_refused_before_anything_is_written(
    versions, adapter, tmp_path, manifest, files, sentence
):
    with pytest.raises(ValueError, match=sentence):
        versions.add(adapter, manifest, files)
    assert not (tmp_path / "projects").exists()


def test_an_adapter_that_is_not_there_is_said_so(versions, tmp_path):
    with pytest.raises(RegistryError, match=r"must take a version, got .*gone\.safetensors"):
        versions.add(tmp_path / "gone.safetensors", {"model": "tiny"})
    assert folders(tmp_path) == []


def test_rollback_goes_back_step_by_step_to_the_base_model(versions, adapter):
    add(versions, adapter, 3)
    for number in (1, 2, 2, None, 3):
        versions.activate(number)
        assert active(versions) == number
    assert versions.activated() == [None, 1, 2, None, 3]
    returned = [versions.rollback() for _ in range(4)]
    assert [None if version is None else version.number for version in returned] == [
        None,
        2,
        1,
        None,
    ]
    assert active(versions) is None
    with pytest.raises(RegistryError, match="there is nothing to roll back"):
        versions.rollback()


def test_what_was_rolled_back_can_be_activated_again(versions, adapter):
    add(versions, adapter, 2)
    versions.activate(1)
    versions.activate(2)
    versions.rollback()
    versions.activate(2)
    assert versions.activated() == [None, 1, 2]


def test_the_pointer_changes_with_every_change_and_only_then(versions, adapter):
    add(versions, adapter, 2)
    seen = [versions.pointer()]
    for change in (
        lambda: versions.activate(1),
        lambda: versions.activate(2),
        versions.rollback,
        versions.rollback,
    ):
        change()
        seen.append(versions.pointer())
    assert len(set(seen)) == len(seen)
    versions.activate(None)
    assert versions.pointer() == seen[-1]


def test_a_version_that_is_not_there_cannot_be_activated(versions, adapter):
    add(versions, adapter)
    with pytest.raises(RegistryError, match=rf"one of project {PROJECT}'s \[1\], got 7"):
        versions.activate(7)
    assert active(versions) is None


def test_old_versions_go_but_never_the_active_one_nor_what_rollback_returns_to(make, adapter):
    versions = make(keep=2)
    add(versions, adapter, 2)
    versions.activate(1)
    versions.activate(2)
    add(versions, adapter, 5)
    assert numbers(versions) == [1, 2, 6, 7]
    assert versions.rollback().number == 1
    add(versions, adapter)
    assert numbers(versions) == [1, 7, 8]
    versions.activate(8)
    versions.activate(7)
    add(versions, adapter)
    assert numbers(versions) == [7, 8, 9]
    # 1 is gone, and rollback passes it by.
    assert [versions.rollback().number, versions.rollback()] == [8, None]


def test_two_activations_that_were_apart_are_one_when_what_was_between_is_gone(make, adapter):
    versions = make(keep=1)
    add(versions, adapter)
    for number in (1, None, 1):
        versions.activate(number)
    add(versions, adapter)
    versions.activate(2)
    add(versions, adapter)
    assert numbers(versions) == [1, 2, 3]
    versions.activate(3)
    add(versions, adapter)
    assert numbers(versions) == [2, 3, 4]
    assert versions.activated() == [None, 2, 3]


def test_a_number_is_never_given_twice(make, adapter, tmp_path):
    versions = make(keep=1)
    add(versions, adapter, 2)
    versions.activate(2)
    (tmp_path / "projects" / PROJECT / "versions" / "2").rename(tmp_path / "away")
    assert add(versions, adapter).number == 3


@pytest.mark.parametrize(
    "manifest",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="no-json"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"\xff\xfe", id="no-text"),
        pytest.param(b'{"number": 2}', id="keys-missing"),
        pytest.param(
            b'{"number": 3, "adapter_sha256": "x", "model_version": "y", "created_at": 1.0}',
            id="anothers",
        ),
        pytest.param(None, id="gone"),
    ],
)
def test_a_damaged_manifest_is_left_out_named_and_rolled_back_over(versions, adapter, manifest):
    add(versions, adapter, 3)
    for number in (1, 2, 3):
        versions.activate(number)
    path = versions.find(2).folder / "manifest.json"
    path.unlink() if manifest is None else path.write_bytes(manifest)

    assert numbers(versions) == [1, 3]
    for use in (lambda: versions.find(2), lambda: versions.activate(2)):
        with pytest.raises(
            RegistryError, match=r"2/manifest\.json must be the manifest of version"
        ):
            use()
    assert versions.rollback().number == 1
    assert add(versions, adapter).number == 4


def test_a_damaged_adapter_is_found_by_its_digest(versions, adapter):
    version = add(versions, adapter)
    version.adapter.write_bytes(b"adapteR")
    with pytest.raises(RegistryError, match="it was changed: roll back, or train again"):
        version.check()
    version.adapter.unlink()
    with pytest.raises(RegistryError, match=r"adapter\.safetensors must be a file"):
        version.check()


@pytest.mark.parametrize("text", ["", "{", "{}", '{"activated": 3}', '{"activated": ["1"]}'])
def test_a_damaged_pointer_is_named_with_its_remedy(versions, adapter, tmp_path, text):
    add(versions, adapter)
    versions.activate(1)
    path = tmp_path / "projects" / PROJECT / "active.json"
    path.write_text(text)
    if not text:
        assert active(versions) is None  # as if it were deleted
        return
    for use in (versions.active, versions.rollback, lambda: versions.activate(1)):
        with pytest.raises(RegistryError, match=r"active\.json must be what the backend wrote"):
            use()
    path.unlink()
    versions.activate(1)
    assert active(versions) == 1


def test_what_an_activation_says_can_be_read_by_people(versions, adapter, tmp_path):
    add(versions, adapter)
    versions.activate(1)
    body = json.loads((tmp_path / "projects" / PROJECT / "active.json").read_text())
    assert body["activated"] == [None, 1]


@contextmanager
def files_of_at_most(nbytes: int):
    """Let the kernel refuse to write more, as it does when a disk is full."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_is_full_leaves_everything_as_it_was(versions, adapter, tmp_path):
    add(versions, adapter)
    versions.activate(1)
    adapter.write_bytes(bytes(2**21))
    with files_of_at_most(2**20), pytest.raises(RegistryError, match="nothing has changed"):
        add(versions, adapter)
    assert folders(tmp_path) == ["1"]
    assert active(versions) == 1
    with files_of_at_most(0), pytest.raises(RegistryError, match="must take a change"):
        versions.activate(None)
    assert active(versions) == 1
    assert sorted(p.name for p in (tmp_path / "projects" / PROJECT).iterdir()) == [
        ".lock",
        "active.json",
        "versions",
    ]
    assert add(versions, adapter).number == 2


ADDING = """
import sys
from pathlib import Path
from ml_backend.registry import Registry
adapter, folder = Path(sys.argv[1]), Path(sys.argv[2])
versions = Registry(folder, keep=1000).project(sys.argv[3])
for _ in range(15):
    versions.activate(versions.add(adapter, {"model": "tiny"}).number)
"""


def test_two_processes_may_add_at_once(versions, adapter, tmp_path):
    command = [sys.executable, "-c", ADDING, adapter, tmp_path / "projects", PROJECT]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert numbers(versions) == list(range(1, 31))
    assert sorted(versions.activated()[1:]) == list(range(1, 31))
    assert folders(tmp_path) == sorted(str(number) for number in range(1, 31))


KILLED = """
import os, signal, sys
from pathlib import Path
from ml_backend.registry import Registry
adapter, folder = Path(sys.argv[1]), Path(sys.argv[2])
versions = Registry(folder, keep=2).project(sys.argv[3])
add = lambda: versions.activate(versions.add(adapter, {"model": "tiny"}, {"x": adapter}).number)
for _ in range(4):
    add()

def add_until(last_event):
    left = last_event
    def hook(event, _):
        nonlocal left
        if event == "open" or event.startswith(("os.", "shutil.", "tempfile.", "fcntl.")):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    add()
    os._exit(0)

killed, status = 0, 1
while status:
    killed += 1
    if (child := os.fork()) == 0:
        add_until(killed)
    _, status = os.waitpid(child, 0)
    names = os.listdir(folder / sys.argv[3] / "versions")
    found = versions.versions()
    assert len(found) == sum(name.isdecimal() for name in names) >= 2
    for version in found:
        version.check()
        assert (version.folder / "x").read_bytes() == adapter.read_bytes()
    assert versions.active() is not None
    print(any(name.startswith(".new-") for name in names))
"""


def test_a_process_killed_at_any_step_leaves_no_half_version(versions, adapter, tmp_path):
    command = [sys.executable, "-c", KILLED, adapter, tmp_path / "projects", PROJECT]
    ended = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    steps = ended.stdout.split()
    assert len(steps) > 20
    assert steps.count("True") > 5  # in the middle of a version
    assert steps[-1] == "False"  # it came to its end, and has cleaned up
    assert all(name.isdecimal() for name in folders(tmp_path))


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("1.1795194739", True),
        ("1", True),
        ("", False),
        ("../1", False),
        ("a/b", False),
        ("-", False),
    ],
)
def test_names_of_projects_are_names_of_files(tmp_path, name, is_one):
    assert is_project_name(name) == is_one
    if not is_one:
        with pytest.raises(RegistryError, match=r"such as 1\.1795194739"):
            Registry(tmp_path, keep=1).project(name)


def test_a_project_is_found_by_its_name_or_its_number(tmp_path, adapter):
    registry = Registry(tmp_path / "projects", keep=1)
    for name in ("1.5", "1.6", "2.5", "3"):
        add(registry.project(name), adapter)
    assert registry.names() == ["1.5", "1.6", "2.5", "3"]
    assert [registry.find_project(text).name for text in ("1.5", "2", "2.5", "3")] == [
        "1.5",
        "2.5",
        "2.5",
        "3",
    ]
    with pytest.raises(RegistryError, match=r"got '1'; there are: 1\.5, 1\.6$"):
        registry.find_project("1")
    with pytest.raises(RegistryError, match=r"got '9'; there are: 1\.5, 1\.6, 2\.5, 3$"):
        registry.find_project("9")
    with pytest.raises(RegistryError, match="there are: none"):
        Registry(tmp_path / "nothing", keep=1).find_project("1")
