from pathlib import Path

import pytest

from ml_backend.errors import SettingsError
from ml_backend.settings import Settings, load_settings


def test_reads_only_the_given_variables(monkeypatch):
    monkeypatch.setenv("PORT", "1234")
    monkeypatch.setenv("SAM_MODEL", "vit_h")
    assert load_settings({"PORT": "8001"}) == Settings(port=8001)


def test_reads_the_process_environment_when_nothing_is_given(monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("PORT", "1234")
    assert load_settings() == Settings(port=1234)


def test_built_by_hand_they_do_not_look_at_the_environment(monkeypatch):
    monkeypatch.setenv("PORT", "1234")
    assert Settings().port == 9090


def test_every_kind_of_value_is_read():
    settings = load_settings(
        {
            "DATA_DIR": "/var/sam",
            "SAM_OUTPUT": " brush, polygon",
            "SAM_OFFLINE": "true",
            "SAM_POLYGON_TOLERANCE_PX": "2.5",
            "LABEL_STUDIO_URL": "https://ls.example",
            "LABEL_STUDIO_API_KEY": "key",
            "BASIC_AUTH_USER": "user",
            "BASIC_AUTH_PASS": "pass",
            "SAM_RESOLUTION": "native:512-2048",
            "SAM_BA_SAM": "off",
            "SAM_COLOURS": "on",
            "SAM_PRECISION": "fp32",
            "SAM_CROPS": "off",
            "SAM_PREFETCH": "0",
            "EMBEDDING_DISK_BYTES": "0",
            "IMAGE_PRIVATE_HOSTS": "images:8000,10.0.0.7",
            "WORKER": "false",
            "QUEUE_URL": "redis://redis:6379/0",
            "TRAIN_METHOD": "sam-adapter",
            "TRAIN_EVERY": "20",
            "TRAIN_DEBOUNCE_S": "2.5",
            "TRAIN_MIN_TASKS": "12",
            "TRAIN_STEPS": "300",
            "TRAIN_MARGIN": "0.01",
            "KEEP_VERSIONS": "3",
            "THREADS": "8",
            "LOG_LEVEL": "DEBUG",
            "PATH": "/usr/bin",
        }
    )
    assert settings == Settings(
        data_dir=Path("/var/sam"),
        sam_output=("brush", "polygon"),
        sam_offline=True,
        sam_polygon_tolerance_px=2.5,
        label_studio_url="https://ls.example",
        label_studio_api_key="key",
        basic_auth_user="user",
        basic_auth_pass="pass",
        sam_resolution="native:512-2048",
        sam_ba_sam=False,
        sam_colours=True,
        sam_precision="fp32",
        sam_crops=False,
        sam_prefetch=0,
        embedding_disk_bytes=0,
        image_private_hosts=("images:8000", "10.0.0.7"),
        worker=False,
        queue_url="redis://redis:6379/0",
        train_method="sam-adapter",
        train_every=20,
        train_debounce_s=2.5,
        train_min_tasks=12,
        train_steps=300,
        train_margin=0.01,
        keep_versions=3,
        threads=8,
        log_level="debug",
    )
    assert settings.max_waiting == 4
    folders = ("weights", "images", "embeddings", "connections", "projects", "runs")
    for name in folders:
        assert getattr(settings, f"{name}_dir") == Path("/var/sam") / name


def test_an_empty_variable_counts_as_not_set():
    # As docker-compose passes on what the .env file leaves out.
    assert load_settings(dict.fromkeys(map(str.upper, Settings.model_fields), "")) == Settings()


def test_secrets_are_not_shown():
    settings = load_settings(
        {
            "LABEL_STUDIO_URL": "http://ls",
            "LABEL_STUDIO_API_KEY": "s3cret",
            "BASIC_AUTH_USER": "user",
            "BASIC_AUTH_PASS": "s3cret",
            "QUEUE_URL": "redis://:s3cret@redis:6379/0",
        }
    )
    assert "s3cret" not in f"{settings} {settings!r}"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        pytest.param(
            {"SAM_OUTPUT": "brush,blob"},
            "SAM_OUTPUT must be 'brush', 'bitmask', 'polygon' or 'rectangle', got 'blob'",
            id="one-of-a-list",
        ),
        pytest.param(
            {"PORT": "70000"},
            "PORT must be less than or equal to 65535, got '70000'",
            id="out-of-range",
        ),
        pytest.param(
            {"THREADS": "2"},
            "THREADS must be greater than or equal to 8, got '2'",
            id="too-few-threads-to-keep-some-free",
        ),
        pytest.param(
            {"WORKERS": "many", "LOG_LEVEL": "loud"},
            "WORKERS must be a valid integer, unable to parse string as an integer, got 'many'; "
            "LOG_LEVEL must be 'debug', 'info', 'warning' or 'error', got 'loud'",
            id="two-at-once",
        ),
        pytest.param(
            {"LABEL_STUDIO_URL": "label-studio:8080"},
            "LABEL_STUDIO_URL must be an address such as http://label-studio:8080, "
            "got 'label-studio:8080'",
            id="address-without-scheme",
        ),
        pytest.param(
            {"LABEL_STUDIO_API_KEY": "s3cret"},
            "LABEL_STUDIO_URL must be set where LABEL_STUDIO_API_KEY is, got nothing; set it to "
            "Label Studio's address as this process reaches it",
            id="a-token-that-would-go-to-any-host",
        ),
        pytest.param(
            {"SAM_RESOLUTION": "native:2048-512"},
            "SAM_RESOLUTION must be auto, square, native, native:MIN-MAX, budget or budget:N, such "
            "as native:512-2048, got 'native:2048-512'",
            id="a-range-that-is-none",
        ),
        pytest.param(
            {"SAM_RESOLUTION": "budget:0"},
            "SAM_RESOLUTION must be auto, square, native, native:MIN-MAX, budget or budget:N, such "
            "as native:512-2048, got 'budget:0'",
            id="no-tokens",
        ),
        pytest.param(
            {"QUEUE_URL": "amqp://user:s3cret@rabbit"},
            "QUEUE_URL must be a Redis address such as redis://redis:6379/0, got another kind; "
            "leave it out to queue in a file",
            id="a-queue-of-another-kind",
        ),
        pytest.param(
            {"TRAIN_METHOD": "dora"},
            "TRAIN_METHOD must be 'auto', 'wesam', 'sam-adapter' or 'lora', got 'dora'",
            id="a-method-that-is-none",
        ),
        pytest.param(
            {"TRAIN_MIN_TASKS": "3"},
            "TRAIN_MIN_TASKS must be greater than or equal to 4, got '3'",
            id="too-few-tasks-to-judge-by",
        ),
        pytest.param(
            {"BASIC_AUTH_USER": "user"},
            "BASIC_AUTH_USER and BASIC_AUTH_PASS must be set together, got one of them",
            id="half-of-basic-auth",
        ),
    ],
)
def test_a_wrong_value_is_named(environ, message):
    with pytest.raises(SettingsError) as caught:
        load_settings(environ)
    assert str(caught.value) == message
