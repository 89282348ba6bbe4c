import pytest

from sam_ext.config import MODELS
from sam_ext.sam import build_sam


def counts(sam):
    return {
        part: sum(p.numel() for p in getattr(sam, part).parameters())
        for part in ("image_encoder", "prompt_encoder", "mask_decoder")
    }


def test_vit_b_has_the_published_parameter_counts():
    assert counts(build_sam(MODELS["vit_b"])) == {
        "image_encoder": 89_670_912,
        "prompt_encoder": 6_220,
        "mask_decoder": 4_058_340,
    }


def test_tiny_is_about_ten_million_parameters_and_in_evaluation_mode():
    sam = build_sam(MODELS["tiny"])
    assert counts(sam) == {
        "image_encoder": 6_206_400,
        "prompt_encoder": 6_220,
        "mask_decoder": 4_058_340,
    }
    assert not sam.training


@pytest.mark.parametrize("name", ["vit_b", "tiny"])
def test_state_dict_keys_are_the_official_ones(name):
    import segment_anything

    official = segment_anything.sam_model_registry["vit_b"]()
    assert list(build_sam(MODELS[name]).state_dict()) == list(official.state_dict())
