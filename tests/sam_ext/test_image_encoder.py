import pytest
import torch

from sam_ext.errors import ConfigError
from sam_ext.image_encoder import encode_image, relative_position_bias, resize_position_embedding


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
    got = relative_position_bias(q, rows, columns, (height, width))
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
