import pytest
import torch
from safetensors.torch import load_file, save_file

from sam_ext.adapters import apply_adapter
from sam_ext.errors import CheckpointError
from sam_ext.image_encoder import encode_image
from sam_ext.lora import attach_lora, lora_parameters, merge_lora, save_lora
from sam_ext.sam import weights_fingerprint
from tests.conftest import build_small_sam


@pytest.fixture
def adapted():
    sam = build_small_sam()
    attach_lora(sam.image_encoder, rank=2)
    with torch.no_grad():
        for parameter in lora_parameters(sam):
            torch.nn.init.normal_(parameter, std=0.1)
    return sam


@pytest.fixture
def path(adapted, small_sam, tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_lora(adapted, path, base=weights_fingerprint(small_sam))
    return path


def rewritten(path, *, metadata=None, **changes):
    """Write an adapter again with other tensors or another header; None leaves a tensor out."""
    state = {key: value for key, value in (load_file(path) | changes).items() if value is not None}
    header = {"format": "pt", "method": "lora", "rank": "2"} | (metadata or {})
    save_file(state, path, metadata=header)


def test_it_makes_the_model_that_was_trained_and_leaves_the_given_one_alone(
    adapted, small_sam, path
):
    before = weights_fingerprint(small_sam)
    got = apply_adapter(small_sam, path)
    assert weights_fingerprint(got) == weights_fingerprint(merge_lora(adapted))
    assert weights_fingerprint(got) != before
    assert weights_fingerprint(small_sam) == before
    assert all(parameter.requires_grad for parameter in small_sam.parameters())
    images = torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        # float32: the sum of weight and update is rounded before the product, not after
        torch.testing.assert_close(
            encode_image(got.image_encoder, images),
            encode_image(adapted.image_encoder, images),
            rtol=1e-3,
            atol=1e-4,
        )
    assert not got.training


@pytest.mark.parametrize("damage", ["missing", "cut off", "no safetensors"])
def test_a_file_that_cannot_be_read_is_refused(small_sam, path, damage):
    if damage == "missing":
        path.unlink()
    elif damage == "cut off":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        path.write_bytes(b"nonsense" * 10)
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors .*missing or damaged"):
        apply_adapter(small_sam, path)


def test_another_base_model_is_refused(path):
    other = build_small_sam(seed=1)
    with pytest.raises(CheckpointError, match=weights_fingerprint(other)[:8]):
        apply_adapter(other, path)


def test_an_unknown_method_is_refused(small_sam, path):
    rewritten(path, metadata={"method": "magic", "base": weights_fingerprint(small_sam)})
    with pytest.raises(CheckpointError, match="'lora', got 'magic'"):
        apply_adapter(small_sam, path)


@pytest.mark.parametrize(
    ("rank", "change", "message"),
    [
        pytest.param("many", lambda t: t, "LoRA's rank in its header, got 'many'", id="rank"),
        pytest.param("2", lambda t: None, "1 keys missing", id="a tensor missing"),
        pytest.param("2", lambda t: t[:, :-1], "1 of another shape", id="shape"),
        pytest.param("3", lambda t: t, "4 of another shape", id="another rank than it says"),
        pytest.param("2", lambda t: t * float("inf"), "1 tensors that do not", id="not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(small_sam, path, rank, change, message):
    name = "image_encoder.blocks.0.attn.qkv.lora_a"
    changed = change(load_file(path)[name])
    header = {"rank": rank, "base": weights_fingerprint(small_sam)}
    rewritten(path, metadata=header, **{name: None if changed is None else changed.contiguous()})
    with pytest.raises(CheckpointError, match=message):
        apply_adapter(small_sam, path)
