import copy

import pytest
import torch
from torch import nn

from sam_ext.config import MODELS
from sam_ext.errors import ConfigError
from sam_ext.image_encoder import encode_image
from sam_ext.lora import (
    LoraLinear,
    attach_lora,
    lora_parameters,
    merge_lora,
)
from sam_ext.sam import build_sam


def moved(sam):
    """Away from the zero start, where a test proves nothing."""
    with torch.no_grad():
        for parameter in lora_parameters(sam):
            nn.init.normal_(parameter, std=0.1)
    return sam


@pytest.fixture
def adapted(small_sam):
    attach_lora(small_sam.image_encoder)
    return moved(small_sam)


@pytest.fixture
def images():
    return torch.randn(2, 3, 48, 80)


def test_q_and_v_get_the_papers_update_and_k_none():
    """arXiv:2106.09685, equation 3, for each third by itself."""
    plain = nn.Linear(6, 18).double()
    layer = LoraLinear(copy.deepcopy(plain), rank=2).double()
    nn.init.normal_(layer.lora_a)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    q, k, v = (
        x @ w.t() + b for w, b in zip(plain.weight.chunk(3), plain.bias.chunk(3), strict=True)
    )
    wanted_q = q + x @ (layer.lora_b[0] @ layer.lora_a[0]).t()
    wanted_v = v + x @ (layer.lora_b[1] @ layer.lora_a[1]).t()
    wanted = torch.cat([wanted_q, k, wanted_v], dim=-1)
    torch.testing.assert_close(layer(x), wanted, rtol=0, atol=1e-12)
    merged = nn.functional.linear(x, layer.merged_weight(), layer.bias)
    torch.testing.assert_close(merged, wanted, rtol=0, atol=1e-12)


def test_fresh_lora_changes_no_bit(small_sam, images):
    wanted = encode_image(small_sam.image_encoder, images)
    attach_lora(small_sam.image_encoder)
    assert torch.equal(encode_image(small_sam.image_encoder, images), wanted)
    assert all(parameter.any() for parameter in lora_parameters(small_sam)[::2])


def test_gradients_reach_the_listed_parameters_and_no_others(small_sam, images):
    names = attach_lora(small_sam.image_encoder, rank=3)
    moved(small_sam)
    encode_image(small_sam.image_encoder, images).square().sum().backward()
    reached = [n for n, p in small_sam.image_encoder.named_parameters() if p.grad is not None]
    assert reached == names
    assert all(p.grad.any() for p in lora_parameters(small_sam))
    assert len(names) == 4


def test_it_adds_as_many_parameters_to_vit_b_as_the_paper_counts():
    with torch.device("meta"):
        sam = build_sam(MODELS["vit_b"])
    attach_lora(sam.image_encoder)
    assert sum(parameter.numel() for parameter in lora_parameters(sam)) == 147_456


def test_sams_own_keys_stay(small_sam):
    before = small_sam.state_dict()
    attach_lora(small_sam.image_encoder)
    after = small_sam.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert {key.rsplit(".", 1)[1] for key in after.keys() - before.keys()} == {"lora_a", "lora_b"}


def test_a_merged_sam_answers_the_same_with_plain_modules(small_sam, images):
    attach_lora(small_sam.image_encoder)
    adapted = moved(small_sam).double()
    before = {key: value.clone() for key, value in adapted.state_dict().items()}
    merged = merge_lora(adapted)
    with torch.no_grad():
        torch.testing.assert_close(
            encode_image(merged.image_encoder, images.double()),
            encode_image(adapted.image_encoder, images.double()),
            rtol=0,
            atol=1e-10,
        )
    assert not lora_parameters(merged)
    assert {type(block.attn.qkv) for block in merged.image_encoder.blocks} == {nn.Linear}
    assert not merged.training
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert all(torch.equal(adapted.state_dict()[key], value) for key, value in before.items())


def test_it_is_merged_on_the_cpu(small_sam, monkeypatch):
    """Apple's GPUs have no double precision."""
    attach_lora(small_sam.image_encoder)
    copied, to_cpu, to_double = [], torch.Tensor.cpu, torch.Tensor.double

    def cpu(tensor):
        copied.append(to_cpu(tensor).clone())
        return copied[-1]

    def double(tensor):
        assert any(tensor is one for one in copied)
        return to_double(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(torch.Tensor, "double", double)
    merged = merge_lora(moved(small_sam))
    assert copied
    assert {p.dtype for p in merged.parameters()} == {torch.float32}


def test_a_refused_attachment_changes_nothing(small_sam):
    with pytest.raises(ConfigError, match="rank must be at least 1, got 0"):
        attach_lora(small_sam.image_encoder, rank=0)
    assert all(parameter.requires_grad for parameter in small_sam.parameters())
    attach_lora(small_sam.image_encoder)
    with pytest.raises(ConfigError, match="has LoRA already"):
        attach_lora(small_sam.image_encoder)


def test_only_a_fused_projection_is_taken():
    with pytest.raises(ConfigError, match="8 to 24 channels, got 8"):
        LoraLinear(nn.Linear(8, 8), rank=4)
