from pathlib import Path

import pytest
import torch

from sam_ext import image_encoder as module
from sam_ext.ba_sam import BaSamConfig
from sam_ext.errors import ConfigError
from sam_ext.image_encoder import (
    encode_image,
    prepare_encoder,
    relative_position_terms,
    resize_position_embedding,
    resolve_precision,
)


def test_equals_segment_anything_at_the_training_size(small_sam):
    encoder = small_sam.image_encoder.double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(
            encode_image(encoder, images), encoder(images), rtol=0, atol=1e-12
        )


def test_the_bias_is_the_sum_over_row_and_column_distances():
    height, width, dim = 3, 4, 5
    q = torch.randn(2, 2, height * width, dim, dtype=torch.float64)
    rows = torch.randn(2 * height - 1, dim, dtype=torch.float64)
    columns = torch.randn(2 * width - 1, dim, dtype=torch.float64)
    wanted = torch.zeros(2, 2, height * width, height * width, dtype=torch.float64)
    for i in range(height * width):
        for j in range(height * width):
            dy, dx = i // width - j // width, i % width - j % width
            wanted[:, :, i, j] = q[:, :, i] @ rows[dy + height - 1]
            wanted[:, :, i, j] += q[:, :, i] @ columns[dx + width - 1]
    of_rows, of_columns = relative_position_terms(q, rows, columns, (height, width))
    got = of_rows.unsqueeze(-1) + of_columns.unsqueeze(-2)  # [2, 2, H, W, H, W]
    got = got.reshape(wanted.shape)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("height", "width"),
    [
        pytest.param(32, 80, id="smaller and larger"),
        pytest.param(48, 48, id="no multiple of the window"),
    ],
)
def test_any_grid_is_embedded(small_sam, height, width):
    with torch.no_grad():
        got = encode_image(small_sam.image_encoder, torch.randn(2, 3, height, width))
    assert got.shape == (2, 256, height // 16, width // 16)
    assert got.isfinite().all()


def test_images_of_a_batch_do_not_see_each_other(small_sam):
    images = torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        together = encode_image(small_sam.image_encoder, images)
        alone = encode_image(small_sam.image_encoder, images[1:])
    # float32: a batched product may add in another order
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


def test_the_position_embedding_is_untouched_at_its_own_grid_and_keeps_its_mean_elsewhere():
    pos_embed = torch.randn(1, 4, 4, 3)
    assert resize_position_embedding(pos_embed, (4, 4)) is pos_embed
    constant = torch.full((1, 4, 4, 3), 0.5)
    assert torch.equal(resize_position_embedding(constant, (2, 6)), torch.full((1, 2, 6, 3), 0.5))


def test_an_image_of_broken_patches_is_refused(small_sam):
    with pytest.raises(ConfigError, match=r"multiples of 16, got \(64, 72\)"):
        encode_image(small_sam.image_encoder, torch.zeros(1, 3, 64, 72))


def test_tables_are_resized_to_the_grid_and_keep_their_ends():
    dim, side = 3, 4
    table = torch.randn(2 * side - 1, dim, dtype=torch.float64)
    for length in (2, 9):
        # With unit queries the term is the table itself, read by distance.
        q = torch.eye(dim, dtype=torch.float64)[None, None].repeat(1, 1, length, 1)
        rows, _ = relative_position_terms(q, table, table[:1], (dim * length, 1))
        assert rows.shape == (1, 1, dim * length, 1, dim * length)
        farthest = rows[0, 0, dim * length - 1, 0, 0]  # the last row's query, the first row's key
        torch.testing.assert_close(farthest, table[-1, -1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("logits", "tokens"),
    [
        pytest.param(1, 1, id="query by query, one strip of windows at a time"),
        pytest.param(90, 20, id="some queries of a head"),
        pytest.param(200, 50, id="some windows, two strips"),
    ],
)
def test_pieces_add_up_to_the_whole(small_sam, monkeypatch, logits, tokens):
    """Without gradients the encoder works in pieces; with them all at once."""
    encoder = small_sam.image_encoder.double()
    images = torch.randn(2, 3, 80, 112, dtype=torch.float64)
    wanted = encode_image(encoder, images).detach()
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", logits)
    monkeypatch.setattr(module, "_TOKENS_AT_ONCE", tokens)
    with torch.inference_mode():
        torch.testing.assert_close(encode_image(encoder, images), wanted, rtol=0, atol=1e-12)


def test_checkpointing_gives_the_same_gradients_and_keeps_less(small_sam):
    encoder = small_sam.image_encoder.double()
    images = torch.randn(2, 3, 96, 112, dtype=torch.float64, requires_grad=True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    kept, gradients = [], []
    for checkpointing in (False, True):
        sizes = []

        def pack(tensor, sizes=sizes):
            if tensor.untyped_storage().data_ptr() not in weights:
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            embeddings = encode_image(encoder, images, checkpointing=checkpointing)
        kept.append(sum(sizes))
        (gradient,) = torch.autograd.grad(embeddings.square().sum(), images)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-10)
    assert kept[1] < 0.75 * kept[0]


def test_it_pauses_between_blocks_and_within_long_attention(small_sam, monkeypatch):
    calls = []
    images = torch.randn(1, 3, 64, 96)

    def count(*, pieces):
        monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 24 * 24 // pieces)
        calls.clear()
        encode_image(small_sam.image_encoder, images, pause=lambda: calls.append(None))
        return len(calls)

    assert count(pieces=1) == len(small_sam.image_encoder.blocks)  # with gradients
    with torch.inference_mode():
        heads = 2
        one, four = count(pieces=1), count(pieces=4)
        assert one >= len(small_sam.image_encoder.blocks) + heads
        assert four - one >= 3 * heads


@pytest.mark.parametrize("gradients", [True, False])
def test_pausing_may_abandon_the_embedding(small_sam, gradients):
    def abandon():
        raise InterruptedError

    with torch.set_grad_enabled(gradients), pytest.raises(InterruptedError):
        encode_image(small_sam.image_encoder, torch.randn(1, 3, 32, 48), pause=abandon)


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_reach_every_weight(small_sam, autocast):
    images = torch.randn(1, 3, 48, 80)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        embeddings = encode_image(small_sam.image_encoder, images)
    embeddings.float().square().sum().backward()
    for name, parameter in small_sam.image_encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("config", [None, BaSamConfig(scaling_factor=True, bias="full", beta=1)])
def test_bf16_is_close_and_leaves_the_original_alone(small_sam, config):
    encoder = small_sam.image_encoder
    assert prepare_encoder(encoder, torch.float32) is encoder
    before = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    prepared = prepare_encoder(encoder, torch.bfloat16)
    images = torch.randn(2, 3, 48, 80)
    with torch.inference_mode():
        wanted = encode_image(encoder, images, ba_sam=config)
        got = encode_image(prepared, images, ba_sam=config)
    assert (wanted.dtype, got.dtype) == (torch.float32, torch.bfloat16)
    assert 0 < (got.float() - wanted).norm() < 0.01 * wanted.norm()
    after = encoder.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert all(after[name].dtype == weight.dtype for name, weight in before.items())
    of_matrices = {p.dtype for p in prepared.blocks.parameters() if p.ndim == 2 and len(p) >= 32}
    assert of_matrices == {torch.bfloat16}
    assert {p.dtype for p in prepared.neck.parameters()} == {torch.float32}


def test_precision_is_resolved_by_what_the_device_can():
    cpu = torch.device("cpu")
    assert resolve_precision(cpu, "fp32") == torch.float32
    assert resolve_precision(cpu, "bf16") == torch.bfloat16
    assert resolve_precision(torch.device("meta"), "auto") == torch.float32
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        assert resolve_precision(cpu) == torch.bfloat16
    elif flags:
        assert resolve_precision(cpu) == torch.float32
    with pytest.raises(ConfigError, match="one of auto, bf16, fp32, got 'fp16'"):
        resolve_precision(cpu, "fp16")
