import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from sam_ext import sam_adapter as module
from sam_ext.config import MODELS
from sam_ext.errors import ConfigError
from sam_ext.image_encoder import encode_image, prepare_encoder
from sam_ext.predictor import Predictor
from sam_ext.resolution import ResolutionPolicy
from sam_ext.sam import build_sam, weights_fingerprint
from sam_ext.sam_adapter import (
    SamAdapterConfig,
    attach_sam_adapter,
    detach_sam_adapter,
    high_frequency,
    read_task_inputs,
    sam_adapter_of,
    sam_adapter_parameters,
)
from tests.reference import sam_adapter as reference

SMALL = SamAdapterConfig(reduction=8)


@pytest.fixture
def adapted(small_sam):
    """With an adapter whose numbers all matter."""
    attach_sam_adapter(small_sam.image_encoder, SMALL)
    with torch.no_grad():
        for parameter in sam_adapter_parameters(small_sam):
            nn.init.normal_(parameter, std=0.2)
    return small_sam


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.25, 1.0])
@pytest.mark.parametrize("size", [(6, 8), (5, 9), (1, 7)])
def test_high_frequencies_are_the_sum_of_those_kept(size, rate):
    image = torch.randn(size, dtype=torch.float64)
    got = high_frequency(image.expand(2, 3, *size), rate)
    wanted = reference.high_frequency(image, rate).expand(2, 3, *size)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_they_are_those_of_the_official_code_in_a_square_but_for_the_cut_itself():
    image = torch.randn(16, 16, dtype=torch.float64)
    spectrum = torch.fft.fft2(image)
    spectrum[[4, 12]] = 0  # the cut: 16 * sqrt(0.25) / 2
    spectrum[:, [4, 12]] = 0
    image = torch.fft.ifft2(spectrum).real
    torch.testing.assert_close(
        high_frequency(image, 0.25),
        reference.official_high_frequency(image, 0.25),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("size", [(48, 80), (1, 33), (7, 1)])
def test_a_constant_image_has_no_high_frequency_and_rate_zero_keeps_everything(size):
    constant = torch.full((1, 3, *size), 1.7, dtype=torch.float64)
    assert high_frequency(constant, 0.25).max() < 1e-12
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(high_frequency(image, 0.0), image.abs(), rtol=0, atol=1e-12)
    assert (high_frequency(image, 0.25) >= 0).all()


def test_a_slow_wave_goes_and_a_fast_one_stays_at_every_size():
    for side in (64, 96):
        x = torch.arange(side, dtype=torch.float64)
        slow = torch.cos(2 * torch.pi * x / 16).expand(side // 2, side)
        fast = torch.cos(2 * torch.pi * x / 3.2).expand(side // 2, side)
        got = high_frequency(slow + fast, 0.25)
        torch.testing.assert_close(got, fast.abs(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "adapter", "all_trained"),
    [
        pytest.param("vit_b", 63_312, 4_121_908, id="ViT-B"),
        pytest.param("vit_l", 116_544, 4_175_140, id="ViT-L"),
        pytest.param("vit_h", 186_960, 4_245_556, id="ViT-H"),
    ],
)
def test_parameter_counts_are_the_published_ones(name, adapter, all_trained):
    with torch.device("meta"):
        sam = build_sam(MODELS[name])
        names = attach_sam_adapter(sam.image_encoder)
    count = sum(parameter.numel() for parameter in sam_adapter_parameters(sam))
    assert count == adapter
    assert len(names) == len(sam_adapter_parameters(sam))
    assert {name.split(".")[0] for name in names} == {"sam_adapter"}
    decoder = sum(parameter.numel() for parameter in sam.mask_decoder.parameters())
    assert count + decoder + sam.prompt_encoder.no_mask_embed.weight.numel() == all_trained


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [(64, 64), (50, 90)])
def test_a_fresh_adapter_and_a_zeroed_one_are_exactly_sam(small_sam, size, precision):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    policy = ResolutionPolicy(mode="native", min_side=90, max_side=90)
    options = {"policy": policy, "precision": precision}
    plain = Predictor(small_sam, **options).embed(image).image_embeddings
    attach_sam_adapter(small_sam.image_encoder, SMALL)
    assert torch.equal(Predictor(small_sam, **options).embed(image).image_embeddings, plain)
    with torch.no_grad():
        for parameter in sam_adapter_parameters(small_sam):
            nn.init.normal_(parameter)
        assert not torch.equal(Predictor(small_sam, **options).embed(image).image_embeddings, plain)
        for parameter in small_sam.image_encoder.sam_adapter.up.parameters():
            nn.init.zeros_(parameter)
    assert torch.equal(Predictor(small_sam, **options).embed(image).image_embeddings, plain)
    detach_sam_adapter(small_sam.image_encoder)
    assert torch.equal(Predictor(small_sam, **options).embed(image).image_embeddings, plain)


def test_every_block_gets_the_addition_of_the_equations(adapted):
    """Additions, patch embedding and inputs are recorded and made again token by token."""
    encoder = adapted.image_encoder.double()
    seen, patches, embedded = [], [], []
    adapter = encoder.sam_adapter
    adapter.config = dataclasses.replace(
        SMALL, patch_weight=0.5, input_weights=(("high_frequency", 2.0),)
    )
    adapter.up.register_forward_hook(lambda _, __, out: seen.append(out))
    encoder.patch_embed.register_forward_hook(lambda _, __, out: patches.append(out))
    adapter.input_embeddings["high_frequency"].register_forward_hook(
        lambda _, __, out: embedded.append(out)
    )
    with torch.no_grad():
        encode_image(encoder, torch.randn(2, 3, 48, 80, dtype=torch.float64))
    assert len(seen) == len(encoder.blocks)
    for place in [(0, 0, 0), (1, 2, 4)]:
        batch, row, column = place
        wanted = reference.addition(
            patches[0][place],
            [embedded[0][batch, :, row, column]],
            [0.5, 2.0],
            adapter.state_dict(),
        )
        for got, one in zip(seen, wanted, strict=True):
            torch.testing.assert_close(got[place], one, rtol=0, atol=1e-12)


def test_the_addition_goes_into_the_blocks_input(small_sam):
    """With an up-projection of bias alone, the encoder is SAM with that added before each block."""
    encoder = small_sam.image_encoder
    images = torch.randn(1, 3, 48, 80)
    attach_sam_adapter(encoder, SMALL)
    shift = torch.randn(32)
    with torch.no_grad():
        encoder.sam_adapter.up.bias.copy_(shift)
        got = encode_image(encoder, images)
        detach_sam_adapter(encoder)
        for block in encoder.blocks:
            block.norm1.register_forward_pre_hook(lambda _, given: (given[0] + shift,))
        # The residual beside the attention does not pass through norm1: add it there as well.
        for block in encoder.blocks:
            block.attn.proj.bias.add_(shift)
        wanted = encode_image(encoder, images)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)  # float32: another order of sums


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (17, 90), (90, 17)])
def test_the_padding_changes_nothing_in_the_image(adapted, size):
    images = torch.randn(1, 3, *size)
    inputs = []
    for rows, columns in ((96, 96), (112, 96)):
        padded = torch.zeros(1, 3, rows, columns)
        padded[..., : size[0], : size[1]] = images
        inputs.append(read_task_inputs(adapted.image_encoder, padded, size)["high_frequency"])
    assert torch.equal(inputs[0], inputs[1][..., :96, :96])
    assert torch.equal(inputs[0][..., : size[0], : size[1]], high_frequency(images))
    assert not inputs[0][..., size[0] :, :].any()
    assert not inputs[0][..., :, size[1] :].any()


def test_the_predictor_reads_frequencies_without_the_padding(adapted, monkeypatch):
    given = []

    def seen(images, rate):
        given.append(tuple(images.shape[-2:]))
        return high_frequency(images, rate)

    monkeypatch.setattr(module, "high_frequency", seen)
    predictor = Predictor(adapted, policy=ResolutionPolicy(mode="native", min_side=90, max_side=90))
    embedding = predictor.embed(np.zeros((50, 90, 3), np.uint8))
    assert given == [(50, 90)] == [embedding.input_size]
    assert embedding.padded_size == (64, 96)


def test_another_input_is_weighted_in(small_sam, monkeypatch):
    monkeypatch.setitem(module.TASK_INPUTS, "brightness", lambda images, _: images.abs())
    weights = (("high_frequency", 1.0), ("brightness", 0.5))
    attach_sam_adapter(small_sam.image_encoder, dataclasses.replace(SMALL, input_weights=weights))
    adapter = sam_adapter_of(small_sam.image_encoder)
    nn.init.normal_(adapter.up.weight)
    images = torch.randn(2, 3, 48, 80)
    inputs = read_task_inputs(small_sam.image_encoder, images)
    assert list(inputs) == ["high_frequency", "brightness"]
    patches = torch.randn(2, 3, 5, 32)
    with torch.no_grad():
        both = adapter.features(patches, inputs)
        one = adapter.features(patches, inputs | {"brightness": torch.zeros_like(images)})
        alone = adapter.input_embeddings["brightness"](images.abs()).permute(0, 2, 3, 1)
    torch.testing.assert_close(both - one, 0.5 * alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_adapter_and_nothing_else(adapted, checkpointing):
    adapted.image_encoder.requires_grad_(False)
    for parameter in sam_adapter_parameters(adapted):
        parameter.requires_grad_(True)
    out = encode_image(
        adapted.image_encoder, torch.randn(2, 3, 48, 80), checkpointing=checkpointing
    )
    out.square().mean().backward()
    assert all(parameter.grad.any() for parameter in sam_adapter_parameters(adapted))
    reached = {n for n, p in adapted.image_encoder.named_parameters() if p.grad is not None}
    assert {name.split(".")[0] for name in reached} == {"sam_adapter"}


def test_a_fresh_adapter_learns(small_sam):
    attach_sam_adapter(small_sam.image_encoder, SMALL)
    encode_image(small_sam.image_encoder, torch.randn(1, 3, 48, 80)).square().mean().backward()
    assert small_sam.image_encoder.sam_adapter.up.weight.grad.any()


def test_the_fingerprint_knows_of_the_adapter_and_its_settings(small_sam):
    plain = weights_fingerprint(small_sam)
    seen = {plain}
    torch.manual_seed(3)
    attach_sam_adapter(small_sam.image_encoder, SMALL)
    seen.add(weights_fingerprint(small_sam))
    small_sam.image_encoder.sam_adapter.config = dataclasses.replace(SMALL, frequency_rate=0.5)
    seen.add(weights_fingerprint(small_sam))
    assert len(seen) == 3
    detach_sam_adapter(small_sam.image_encoder)
    assert weights_fingerprint(small_sam) == plain


def test_a_prepared_encoder_keeps_its_adapter_in_single_precision(adapted):
    prepared = prepare_encoder(adapted.image_encoder, torch.bfloat16)
    assert {p.dtype for p in sam_adapter_parameters(prepared)} == {torch.float32}
    images = torch.randn(1, 3, 48, 80)
    with torch.no_grad():
        got, wanted = (encode_image(e, images) for e in (prepared, adapted.image_encoder))
    assert torch.nn.functional.cosine_similarity(got.flatten(), wanted.flatten(), 0) > 0.99


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"reduction": 0}, "reduction must be at least 1, got 0", id="reduction"),
        pytest.param({"frequency_rate": 1.5}, r"in 0\.\.1, got 1\.5", id="rate"),
        pytest.param(
            {"input_weights": (("colour", 1.0),)}, "different ones of high_frequency", id="name"
        ),
        pytest.param(
            {"input_weights": (("high_frequency", 1.0),) * 2}, "different ones", id="twice"
        ),
        pytest.param({"patch_weight": float("nan")}, "finite and not all 0", id="weight"),
        pytest.param({"patch_weight": 0.0, "input_weights": ()}, "not all 0", id="nothing"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SamAdapterConfig(**changes)


def test_what_cannot_be_attached_changes_nothing(small_sam):
    encoder = small_sam.image_encoder
    with pytest.raises(ConfigError, match="at least one channel of 32, got 64"):
        attach_sam_adapter(encoder, SamAdapterConfig(reduction=64))
    assert sam_adapter_of(encoder) is None
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    attach_sam_adapter(encoder, SMALL)
    with pytest.raises(ConfigError, match="already; detach it first"):
        attach_sam_adapter(encoder, SMALL)
