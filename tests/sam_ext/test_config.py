import pytest

from sam_ext.config import MODELS, SamConfig
from sam_ext.errors import ConfigError

GOOD = {
    "name": "x",
    "embed_dim": 8,
    "depth": 2,
    "num_heads": 2,
    "global_attn_indexes": (1,),
    "image_size": 32,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_config_survives_json(name):
    assert SamConfig.from_json(MODELS[name].to_json()) == MODELS[name]
    assert MODELS[name].name == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"depth": 0}, "at least 1", id="no blocks"),
        pytest.param({"num_heads": 3}, "multiple of num_heads, got 8 and 3", id="heads"),
        pytest.param({"image_size": 40}, "multiple of patch_size", id="not whole patches"),
        pytest.param({"image_size": 0}, "multiple of patch_size", id="no image"),
        pytest.param(
            {"global_attn_indexes": (2,)}, r"has \[2\]; this encoder has 0..1", id="block"
        ),
    ],
)
def test_an_impossible_config_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        SamConfig(**(GOOD | change))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "x", "global_attn_indexes": [1]}'])
def test_json_that_is_no_config_is_refused(text):
    with pytest.raises(ConfigError, match="JSON of a SamConfig"):
        SamConfig.from_json(text)
