"""The Docker files against the code: no engine runs here, so what they name must exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import label_studio_ml.api
import pytest
import yaml

from ml_backend.cli import app as cli
from ml_backend.settings import Settings

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "ml_backend" / "Dockerfile"
COMPOSE = ROOT / "docker-compose.yml"
SETTINGS = {name.upper() for name in Settings.model_fields}
OF_THE_IMAGE = {"DATA_DIR", "HOST", "PORT"}
HEALTH_URL = re.compile(r"/health\b")


def stages() -> list[list[tuple[str, str]]]:
    """The Dockerfile's instructions by stage, with continued lines joined."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    found: list[list[tuple[str, str]]] = [[]]
    for line in lines:
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            found.append([])
        found[-1].append((instruction, rest.strip()))
    return found


def of(stage: list[tuple[str, str]], instruction: str) -> list[str]:
    return [rest for name, rest in stage if name == instruction]


@pytest.fixture
def compose():
    return yaml.safe_load(COMPOSE.read_text())


@pytest.fixture
def final():
    return stages()[-1]


@pytest.fixture
def environ(final):
    pairs = (pair.partition("=") for line in of(final, "ENV") for pair in shlex.split(line))
    return {name: value for name, _, value in pairs}


def test_what_is_copied_exists_and_is_not_ignored():
    ignored = (ROOT / "ml_backend" / "Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "*"
    (build,) = [stage for stage in stages() if ("WORKDIR", "/source") in stage]
    sources = [path for line in of(build, "COPY") for path in line.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored


def test_the_project_files_that_the_build_needs_are_copied():
    pyproject = (ROOT / "pyproject.toml").read_text()
    readme = re.search(r'^readme = "(.+)"', pyproject, re.MULTILINE)
    (licences,) = re.findall(r"^license-files = (.+)$", pyproject, re.MULTILINE)
    copied = " ".join(rest for stage in stages() for rest in of(stage, "COPY")).split()
    assert readme
    assert readme[1] in copied
    assert set(json.loads(licences)) <= set(copied)


def test_makefile_and_image_install_the_same_torch():
    makefile = dict(
        re.findall(r"^(TORCH|TORCHVISION) := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    )
    build = stages()[1]
    image = dict(re.findall(r'(TORCH|TORCHVISION)="(.+?)"', "\n".join(of(build, "ARG"))))
    assert makefile == image


def test_the_image_is_for_cpus_unless_another_build_of_torch_is_named(compose):
    build = stages()[1]
    assert "TORCH_INDEX=cpu" in of(build, "ARG")
    assert compose["services"]["sam"]["build"]["args"] == {"TORCH_INDEX": "${TORCH_INDEX:-cpu}"}
    installs = " ".join(of(build, "RUN"))
    assert installs.count('/whl/$TORCH_INDEX"') == 2


def test_the_image_sets_only_settings_that_exist(environ):
    assert environ.keys() - {"PATH", "PYTHONUNBUFFERED"} == OF_THE_IMAGE
    assert OF_THE_IMAGE <= SETTINGS


def test_the_image_serves_as_another_user_than_root_without_a_shell(final):
    assert of(final, "USER") == ["sam"]
    script, command = json.loads(of(final, "CMD")[0])
    assert f'{script} = "ml_backend.cli:app"' in (ROOT / "pyproject.toml").read_text()
    assert command in {c.name or c.callback.__name__ for c in cli.registered_commands}


def test_the_port_is_the_same_everywhere(final, environ, compose):
    default = str(Settings.model_fields["port"].default)
    assert of(final, "EXPOSE") == [default]
    assert environ["PORT"] == default
    assert [port.split(":")[-1] for port in compose["services"]["sam"]["ports"]] == [default]
    assert f"127.0.0.1:{default}/health" in compose["services"]["sam"]["healthcheck"]["test"][-1]


def test_data_survives_the_container(final, environ, compose):
    assert of(final, "VOLUME") == [environ["DATA_DIR"]]
    assert compose["services"]["sam"]["volumes"] == [f"sam:{environ['DATA_DIR']}"]
    assert compose["services"]["label-studio"]["volumes"] == ["label-studio:/label-studio/data"]
    assert set(compose["volumes"]) == {"sam", "label-studio"}


def test_health_checks_are_python_that_compiles(final, compose):
    (check,) = of(final, "HEALTHCHECK")
    commands = [json.loads(check.partition(" CMD ")[2])]
    routes = {rule.rule for rule in label_studio_ml.api._server.url_map.iter_rules()}
    assert "/health" in routes
    checks = {name: service["healthcheck"] for name, service in compose["services"].items()}
    assert checks.pop("worker") == {"disable": True}  # it answers nobody
    commands += [check["test"][1:] for check in checks.values()]
    for _python, option, code in commands:
        assert option == "-c"
        compile(code, "<health check>", "exec")
        assert HEALTH_URL.search(code)


def test_compose_passes_every_setting_on(compose):
    environment = compose["services"]["sam"]["environment"]
    assert environment.keys() == SETTINGS - OF_THE_IMAGE
    own = {"LABEL_STUDIO_URL": "http://label-studio:8080", "WORKER": "false"}
    assert environment == {name: f"${{{name}:-}}" for name in environment} | own


def test_the_worker_is_the_same_image_with_the_same_settings_and_data(compose, final):
    sam, worker = (compose["services"][name] for name in ("sam", "worker"))
    script, command = worker["command"]
    assert script == json.loads(of(final, "CMD")[0])[0]
    assert command in {c.name or c.callback.__name__ for c in cli.registered_commands}
    for name in ("image", "environment", "volumes"):
        assert worker[name] == sam[name]
    assert "ports" not in worker


def test_compose_builds_the_dockerfile_with_arguments_that_it_has(compose):
    build = compose["services"]["sam"]["build"]
    assert ROOT / build["context"] / build["dockerfile"] == DOCKERFILE
    declared = {arg.partition("=")[0] for stage in stages() for arg in of(stage, "ARG")}
    assert build["args"].keys() <= declared


def test_label_studio_accepts_a_backend_at_a_private_address_and_calls_nobody(compose):
    environment = compose["services"]["label-studio"]["environment"]
    assert environment["LABEL_STUDIO_USE_DEFAULT_BANNED_SUBNETS"] == "false"
    assert environment["USER_ADDITIONAL_BANNED_SUBNETS"] == "169.254.0.0/16"
    quiet = {"COLLECT_ANALYTICS", "LATEST_VERSION_CHECK", "SENTRY_DSN", "FRONTEND_SENTRY_DSN"}
    assert {environment[name] for name in quiet} == {"0", ""}


def test_makefile_and_compose_run_the_same_label_studio(compose):
    (version,) = re.findall(
        r"^LABEL_STUDIO := label-studio==(.+)$", (ROOT / "Makefile").read_text(), re.M
    )
    assert f":-{version}}}" in compose["services"]["label-studio"]["image"]


def test_all_services_come_back_after_a_reboot(compose):
    assert {s["restart"] for s in compose["services"].values()} == {"unless-stopped"}


def test_the_readmes_gpu_override_changes_only_what_the_compose_file_has(compose):
    """Compose ignores `reservations` that do not stand below `resources`."""
    (text,) = re.findall(r"```yaml\n(services:\n.*?)```", (ROOT / "README.md").read_text(), re.S)
    override = yaml.safe_load(text)
    assert override.keys() == {"services"}
    assert override["services"].keys() == {"sam", "worker"}
    for name, service in override["services"].items():
        theirs = compose["services"][name]
        assert service.get("build", {}).get("args", {}).keys() == (
            theirs.get("build", {}).get("args", {}).keys()
        )
        assert service["environment"].keys() <= SETTINGS
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
