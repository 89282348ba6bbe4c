"""Our forward passes over prompt encoder and mask decoder, against segment-anything's."""

import pytest
import torch

from sam_ext.mask_decoder import decode_masks
from sam_ext.prompt_encoder import (
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    NOT_A_POINT,
    dense_position_encoding,
    embed_dense,
    embed_tokens,
)
from sam_ext.stable_sam import StableSam

POINTS = torch.tensor([[[3.25, 60.0], [10.0, 12.5]], [[63.0, 0.0], [31.5, 31.5]]])
LABELS = torch.tensor([[1, 0], [0, 1]])
BOXES = torch.tensor([[1.0, 2.0, 30.0, 60.0], [0.0, 0.0, 64.0, 64.0]])
CORNERS = torch.tensor([[BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]] * 2)


def test_points_alone_get_one_padding_token(small_sam):
    wanted, _ = small_sam.prompt_encoder(points=(POINTS, LABELS), boxes=None, masks=None)
    padded = torch.cat([POINTS, torch.zeros(2, 1, 2)], 1)
    labels = torch.cat([LABELS, torch.full((2, 1), NOT_A_POINT)], 1)
    got = embed_tokens(small_sam.prompt_encoder, padded, labels, input_size=(64, 64))
    torch.testing.assert_close(got, wanted)


def test_a_box_is_two_labelled_points_after_the_others(small_sam):
    wanted, _ = small_sam.prompt_encoder(points=(POINTS, LABELS), boxes=BOXES, masks=None)
    coords = torch.cat([POINTS, BOXES.view(2, 2, 2)], 1)
    labels = torch.cat([LABELS, CORNERS], 1)
    got = embed_tokens(small_sam.prompt_encoder, coords, labels, input_size=(64, 64))
    torch.testing.assert_close(got, wanted)


def test_coordinates_are_relative_to_the_size_of_the_input(small_sam):
    at_full = embed_tokens(small_sam.prompt_encoder, POINTS, LABELS, input_size=(64, 64))
    half = (POINTS + 0.5) * torch.tensor([0.5, 0.25]) - 0.5
    scaled = embed_tokens(small_sam.prompt_encoder, half, LABELS, input_size=(16, 32))
    torch.testing.assert_close(scaled, at_full)


def test_masks_and_positions_equal_segment_anythings(small_sam):
    masks = torch.randn(2, 1, 16, 16)
    encoder = small_sam.prompt_encoder
    _, with_mask = encoder(points=None, boxes=BOXES, masks=masks)
    _, without = encoder(points=None, boxes=BOXES, masks=None)
    assert torch.equal(embed_dense(encoder, masks, grid_hw=(4, 4)), with_mask)
    assert torch.equal(embed_dense(encoder, None, grid_hw=(4, 4)).expand(2, -1, -1, -1), without)
    assert torch.equal(dense_position_encoding(encoder, (4, 4)), encoder.get_dense_pe())


@pytest.mark.parametrize("shared", [False, True], ids=["mask inputs", "no mask inputs"])
def test_prompts_of_several_images_decode_as_each_image_alone(small_sam, shared):
    embeddings = torch.randn(2, 256, 4, 6)
    sparse, dense = torch.randn(6, 3, 256), torch.randn(1 if shared else 6, 256, 4, 6)
    image_pe = dense_position_encoding(small_sam.prompt_encoder, (4, 6))
    with torch.no_grad():
        got = decode_masks(
            small_sam.mask_decoder,
            embeddings,
            image_pe=image_pe,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
        for image in range(2):
            part = slice(3 * image, 3 * image + 3)
            wanted = small_sam.mask_decoder.predict_masks(
                image_embeddings=embeddings[image : image + 1],
                image_pe=image_pe,
                sparse_prompt_embeddings=sparse[part],
                dense_prompt_embeddings=dense if shared else dense[part],
            )
            # float32: products of other batch sizes may add in another order
            torch.testing.assert_close(got[0][part], wanted[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(got[1][part], wanted[1], rtol=1e-4, atol=1e-5)


def decode(sam, **options):
    torch.manual_seed(1)
    with torch.no_grad():
        return decode_masks(
            sam.mask_decoder,
            torch.randn(2, 256, 4, 6),
            image_pe=dense_position_encoding(sam.prompt_encoder, (4, 6)),
            sparse_prompt_embeddings=torch.randn(6, 3, 256),
            dense_prompt_embeddings=torch.randn(1, 256, 4, 6),
            **options,
        )


def moved_plugin():
    plugin = StableSam()
    torch.manual_seed(2)
    for parameter in plugin.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return plugin


def test_stable_sam_is_sam_at_its_start_and_when_routed_to_the_plain_tokens(small_sam):
    wanted = decode(small_sam)
    assert wanted.routing is None
    for options in (
        {"stable_sam": StableSam()},
        {"stable_sam": moved_plugin(), "routing": torch.tensor([0.0, 1.0])},
    ):
        got = decode(small_sam, **options)
        torch.testing.assert_close(got.low_res_logits, wanted.low_res_logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.iou_predictions, wanted.iou_predictions)
        assert got.routing.shape == (6, 2)


def test_stable_sam_changes_what_the_tokens_read_in_the_second_layer_only(small_sam):
    """Against SAM's own transformer with only that layer's token-to-image attention replaced."""
    plugin = moved_plugin()
    got = decode(small_sam, stable_sam=plugin)
    layer = small_sam.mask_decoder.transformer.layers[1]
    attention = layer.cross_attn_token_to_image
    tokens_after_self_attention = []
    layer.norm1.register_forward_hook(lambda *a: tokens_after_self_attention.append(a[2]))

    class Shifted(torch.nn.Module):
        def forward(self, q, k, v):
            read = plugin(v, tokens_after_self_attention[-1][:, 1], (4, 6)).features
            return attention(q=q, k=read + (k - v), v=read)

    layer.cross_attn_token_to_image = Shifted()
    torch.manual_seed(1)
    embeddings, sparse, dense = (
        torch.randn(2, 256, 4, 6),
        torch.randn(6, 3, 256),
        torch.randn(1, 256, 4, 6),
    )
    with torch.no_grad():
        for image in range(2):
            part = slice(3 * image, 3 * image + 3)
            wanted = small_sam.mask_decoder.predict_masks(
                image_embeddings=embeddings[image : image + 1],
                image_pe=dense_position_encoding(small_sam.prompt_encoder, (4, 6)),
                sparse_prompt_embeddings=sparse[part],
                dense_prompt_embeddings=dense,
            )
            torch.testing.assert_close(got[0][part], wanted[0], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(got[1][part], wanted[1], rtol=1e-3, atol=1e-4)
