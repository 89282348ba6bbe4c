import math

import pytest
import torch

from sam_ext.ba_sam import BaSamConfig, attach_coefficients, axis_bias, scaling_factor
from sam_ext.errors import ConfigError
from sam_ext.image_encoder import encode_image
from tests.reference import ba_sam as reference

CONFIGS = [
    pytest.param(BaSamConfig(), id="off"),
    pytest.param(BaSamConfig(scaling_factor=True), id="scaling factor"),
    pytest.param(BaSamConfig(bias="full", beta=1.5), id="full"),
    pytest.param(BaSamConfig(bias="extrapolation", beta=3.0), id="extrapolation"),
    pytest.param(BaSamConfig(bias="stretch", beta=3.0), id="stretch"),
    pytest.param(BaSamConfig(bias="official"), id="official"),
    pytest.param(BaSamConfig(scaling_factor=True, bias="full", beta=1.5), id="both"),
    pytest.param(BaSamConfig(scaling_factor=True, bias="official"), id="both, official"),
]


@pytest.fixture
def encoder(small_sam):
    """An encoder trained at 4 x 4 tokens, with one window block and one global block."""
    encoder = small_sam.image_encoder.double()
    for coefficient in attach_coefficients(encoder):
        torch.nn.init.constant_(coefficient, 0.7)
    return encoder


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "grid_hw",
    [
        pytest.param((3, 7), id="below and above the training side"),
        pytest.param((2, 3), id="below"),
        pytest.param((6, 5), id="above"),
    ],
)
def test_equals_the_equations(encoder, config, grid_hw):
    images = torch.randn(2, 3, 16 * grid_hw[0], 16 * grid_hw[1], dtype=torch.float64)
    factor = 1.0
    if config.scaling_factor:
        factor = math.log(grid_hw[0] * grid_hw[1]) / math.log(16)
    with torch.no_grad():
        wanted = reference.encode(
            encoder, images, factor=factor, mode=config.bias, beta=config.beta
        )
        got = encode_image(encoder, images, ba_sam=config)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(BaSamConfig(), id="off"),
        pytest.param(BaSamConfig(scaling_factor=True), id="scaling factor"),
        pytest.param(BaSamConfig(bias="full"), id="without strength"),
        pytest.param(BaSamConfig(bias="extrapolation", beta=3.0), id="extrapolation"),
        pytest.param(BaSamConfig(bias="stretch", beta=3.0), id="stretch"),
        pytest.param(BaSamConfig(scaling_factor=True, bias="extrapolation", beta=3.0), id="both"),
        pytest.param(BaSamConfig(scaling_factor=True, bias="official"), id="fresh coefficients"),
    ],
)
def test_is_sam_at_the_training_size(small_sam, config):
    attach_coefficients(small_sam.image_encoder)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain = encode_image(small_sam.image_encoder, images)
        got = encode_image(small_sam.image_encoder, images, ba_sam=config)
        sam = small_sam.double().image_encoder(images.double())
    assert torch.equal(got, plain)
    torch.testing.assert_close(got.double(), sam, rtol=1e-4, atol=1e-5)  # float32


@pytest.mark.parametrize(
    ("side_px", "wanted"),
    [
        (512, 0.833333),
        (768, 0.930827),
        (1024, 1),
        (1536, 1.097494),
        (2048, 1.166667),
        (4096, 1.333333),
    ],
)
def test_the_scaling_factor_of_square_images(side_px, wanted):
    assert scaling_factor((side_px // 16) ** 2, 64 * 64) == pytest.approx(wanted, abs=1e-6)


def test_the_scaling_factor_counts_tokens_and_refuses_what_has_no_logarithm():
    assert scaling_factor(48 * 64, 64 * 64) == pytest.approx(math.log(3072) / math.log(4096))
    assert scaling_factor(1, 16) == 0  # nothing to choose from
    with pytest.raises(ConfigError, match="got 0, 16"):
        scaling_factor(0, 16)
    with pytest.raises(ConfigError, match="train_tokens at least 2, got 16, 1"):
        scaling_factor(16, 1)


def test_the_scaling_factor_keeps_the_entropy():
    """Entropy over log n of a softmax of i.i.d. bounded logits, n from 4096 to 16384.

    The formula assumes that the best logit is equally far above the mean whatever n is. Gaussian
    logits do not keep to that: with them the factor overshoots.
    """
    generator = torch.Generator().manual_seed(0)

    def relative_entropy(tokens, scale):
        logits = 8 * torch.rand(50, tokens, dtype=torch.float64, generator=generator)
        p = (scale * logits).softmax(1)
        return float(-(p * p.log()).sum(1).mean()) / math.log(tokens)

    trained = relative_entropy(4096, 1.0)
    plain = relative_entropy(16384, 1.0)
    scaled = relative_entropy(16384, scaling_factor(16384, 4096))
    assert abs(scaled - trained) < 0.5 * abs(plain - trained)


@pytest.mark.parametrize("mode", ["full", "extrapolation", "stretch"])
def test_the_axis_bias_grows_with_the_distance_both_ways(mode):
    bias = axis_bias(9, 4, mode, 2.0)
    assert torch.equal(bias, bias.t())
    assert not bias.diagonal().any()
    assert (bias[0].diff() <= 0).all()
    assert bias[0, -1] < bias[0, 4] < 0
    assert torch.equal(bias[3, 3:8], bias[0, :5])


def test_the_axis_bias_in_numbers():
    assert axis_bias(6, 4, "full", 2.0)[0].tolist() == [0, -0.5, -1, -1.5, -2, -2.5]
    assert axis_bias(6, 4, "extrapolation", 2.0)[0].tolist() == [0, 0, 0, 0, -0.5, -1]
    assert axis_bias(8, 4, "stretch", 2.0)[1, :5].tolist() == [-0.25, 0, -0.25, -0.5, -0.75]
    for length in (2, 4):
        assert not axis_bias(length, 4, "extrapolation", 2.0).any()
        assert not axis_bias(length, 4, "stretch", 2.0).any()
    assert not axis_bias(6, 4, "none", 2.0).any()


def test_gradients_reach_exactly_the_coefficients(encoder):
    encoder.requires_grad_(False)
    attn = encoder.blocks[1].attn
    attn.ba_sam_coefficient.requires_grad_(True)
    images = torch.randn(1, 3, 48, 80, dtype=torch.float64)
    encode_image(encoder, images, ba_sam=BaSamConfig(bias="official")).square().sum().backward()
    with_gradient = [name for name, p in encoder.named_parameters() if p.grad is not None]
    assert with_gradient == ["blocks.1.attn.ba_sam_coefficient"]
    assert attn.ba_sam_coefficient.grad != 0


def test_coefficients_are_of_the_global_blocks_and_attached_once(small_sam):
    encoder = small_sam.image_encoder
    with pytest.raises(ConfigError, match="call attach_coefficients first"):
        encode_image(encoder, torch.zeros(1, 3, 64, 64), ba_sam=BaSamConfig(bias="official"))
    before = set(encoder.state_dict())
    (coefficient,) = attach_coefficients(encoder, initial=0.1)
    assert coefficient is encoder.blocks[1].attn.ba_sam_coefficient
    assert float(coefficient.detach()) == pytest.approx(0.1)
    assert set(encoder.state_dict()) - before == {"blocks.1.attn.ba_sam_coefficient"}
    with pytest.raises(ConfigError, match="has its coefficients already"):
        attach_coefficients(encoder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bias": "alibi"}, "none, full, extrapolation, stretch, official, got 'alibi'"),
        ({"beta": -1.0}, "beta must be at least 0 and finite, got -1.0"),
        ({"beta": math.nan}, "beta must be at least 0 and finite, got nan"),
    ],
)
def test_a_wrong_config_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        BaSamConfig(**fields)
