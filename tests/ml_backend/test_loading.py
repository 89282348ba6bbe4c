import numpy as np
import pytest
import torch

from ml_backend.loading import colour_config, load_predictor, open_store, resolution_policy
from ml_backend.settings import Settings
from sam_ext.ba_sam import DEFAULT_BA_SAM, default_ba_sam
from sam_ext.checkpoints import load_sam, save_checkpoint
from sam_ext.colours import ColourConfig
from sam_ext.errors import CheckpointError
from sam_ext.predictor import ObjectPrompt
from sam_ext.resolution import ResolutionPolicy, default_policy
from sam_ext.sam import weights_fingerprint
from sam_ext.stable_sam import StableSam, save_stable_sam
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
    changes = (
        {},
        {"sam_resolution": "square"},
        {"sam_ba_sam": True},
        {"sam_colours": False},
        {"sam_precision": "bf16"},
        {"sam_compile": True},
    )
    base = {"data_dir": tmp_path, "sam_model": str(path), "sam_precision": "fp32"}
    fingerprints = {load_predictor(Settings(**base | change)).fingerprint for change in changes}
    assert len(fingerprints) == len(changes)


def plugin_beside(path):
    """Write a small checkpoint with a plugin whose answers are not SAM's."""
    save_checkpoint(build_small_sam(), path, metadata={})
    plugin = StableSam()
    torch.nn.init.normal_(plugin.transform.weight)
    base = weights_fingerprint(load_sam(str(path), weights_dir=path.parent))
    save_stable_sam(plugin, path.with_suffix(".stable.safetensors"), base=base)
    return plugin


def test_a_plugin_beside_the_model_is_used_unless_it_is_switched_off(tmp_path):
    path = tmp_path / "small.safetensors"
    plugin = plugin_beside(path)

    def loaded(**changes):
        return load_predictor(Settings(data_dir=tmp_path, sam_model=str(path), **changes))

    assert loaded().stable_sam is not None
    assert torch.equal(
        loaded(sam_precision="fp32").stable_sam.transform.weight, plugin.transform.weight
    )
    assert loaded(sam_stable=True).fingerprint == loaded().fingerprint
    off = loaded(sam_stable=False)
    assert off.stable_sam is None
    assert off.fingerprint != loaded().fingerprint
    assert off.embedding_fingerprint == loaded().embedding_fingerprint


def test_tiny_comes_with_a_plugin_for_several_points(tmp_path):
    """Trained with the very weights that are bundled, or it would be refused."""
    predictor = load_predictor(Settings(data_dir=tmp_path))
    assert predictor.stable_sam.scope == "points"
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    coords = np.array([[20.0, 20.0], [30.0, 22.0], [24.0, 30.0]])
    clicks = [
        ObjectPrompt(point_coords=coords[:count], point_labels=np.ones(count, np.int64))
        for count in (1, 3)
    ]
    one, several = predictor.decode(predictor.embed(image), clicks)
    assert (len(one.masks), one.routing) == (3, None)
    assert 0 < several.routing < 1


def test_a_plugin_that_is_wanted_must_be_there_and_fit(tmp_path):
    path = tmp_path / "small.safetensors"
    save_checkpoint(build_small_sam(), path, metadata={})
    settings = Settings(data_dir=tmp_path, sam_model=str(path), sam_stable=True)
    with pytest.raises(CheckpointError, match="SAM_STABLE must not be true without a plugin"):
        load_predictor(settings)
    assert load_predictor(settings.model_copy(update={"sam_stable": None})).stable_sam is None
    plugin_beside(path)
    save_checkpoint(build_small_sam(seed=1), path, metadata={})
    with pytest.raises(CheckpointError, match="must be trained with the SAM that it works in"):
        load_predictor(settings)


def test_ba_sam_is_on_for_models_that_know_one_size(tmp_path):
    assert default_ba_sam(1024) == DEFAULT_BA_SAM
    assert default_ba_sam(256) is None
    path = tmp_path / "small.safetensors"
    save_checkpoint(build_small_sam(), path, metadata={})
    base = {"data_dir": tmp_path, "sam_model": str(path)}
    unset = load_predictor(Settings(**base)).fingerprint
    assert load_predictor(Settings(**base, sam_ba_sam=False)).fingerprint == unset
    assert load_predictor(Settings(**base, sam_ba_sam=True)).fingerprint != unset


@pytest.mark.parametrize(("setting", "is_on"), [(None, True), (False, False), (True, True)])
def test_colours_correct_coarse_masks_unless_switched_off(tmp_path, setting, is_on):
    predictor = load_predictor(Settings(data_dir=tmp_path, sam_colours=setting))
    assert predictor.colours == (ColourConfig() if is_on else None)
    assert colour_config(Settings(sam_colours=setting), 1024) == (
        ColourConfig() if setting else None
    )


def test_no_bytes_are_no_store(tmp_path):
    assert open_store(Settings(data_dir=tmp_path, embedding_disk_bytes=0)) is None
    assert open_store(Settings(data_dir=tmp_path)) is not None
