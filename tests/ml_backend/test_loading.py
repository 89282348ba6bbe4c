import pytest

from ml_backend.loading import load_predictor, open_store, resolution_policy
from ml_backend.settings import Settings
from sam_ext.checkpoints import save_checkpoint
from sam_ext.resolution import ResolutionPolicy, default_policy
from tests.conftest import build_small_sam


@pytest.mark.parametrize(
    ("setting", "policy"),
    [
        pytest.param("auto", default_policy(256), id="auto"),
        pytest.param("square", ResolutionPolicy(), id="square"),
        pytest.param("native", default_policy(256), id="native"),
        pytest.param(
            "native:300-700",
            ResolutionPolicy(mode="native", min_side=300, max_side=700),
            id="native-in-a-range",
        ),
        pytest.param("budget", ResolutionPolicy(mode="budget", max_tokens=256), id="budget"),
        pytest.param(
            "budget:1000", ResolutionPolicy(mode="budget", max_tokens=1000), id="budget-of-tokens"
        ),
    ],
)
def test_the_resolution_is_what_the_setting_says(setting, policy):
    assert resolution_policy(setting, 256) == policy


def test_every_setting_of_the_model_makes_another_one(tmp_path):
    path = tmp_path / "small.safetensors"
    save_checkpoint(build_small_sam(), path, metadata={})
    changes = ({}, {"sam_resolution": "square"}, {"sam_ba_sam": False}, {"sam_precision": "bf16"})
    base = {"data_dir": tmp_path, "sam_model": str(path), "sam_precision": "fp32"}
    fingerprints = {load_predictor(Settings(**base | change)).fingerprint for change in changes}
    assert len(fingerprints) == len(changes)


def test_no_bytes_are_no_store(tmp_path):
    assert open_store(Settings(data_dir=tmp_path, embedding_disk_bytes=0)) is None
    assert open_store(Settings(data_dir=tmp_path)) is not None
