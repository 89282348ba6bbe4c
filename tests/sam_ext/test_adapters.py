import itertools

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sam_ext.adapters import AdapterInfo, apply_adapter, load_adapter, read_adapter, save_adapter
from sam_ext.ba_sam import BaSamConfig, attach_coefficients
from sam_ext.errors import CheckpointError, ConfigError
from sam_ext.image_encoder import encode_image
from sam_ext.lora import attach_lora, lora_parameters, lora_state, merge_lora
from sam_ext.predictor import ObjectPrompt, Predictor
from sam_ext.resolution import ResolutionPolicy
from sam_ext.sam import weights_fingerprint
from sam_ext.sam_adapter import SamAdapterConfig, attach_sam_adapter, sam_adapter_parameters
from sam_ext.stable_sam import StableSam
from tests.conftest import build_small_sam

SMALL = SamAdapterConfig(reduction=8, frequency_rate=0.1, patch_weight=0.5)


def with_lora(sam):
    attach_lora(sam.image_encoder, rank=2)
    with torch.no_grad():
        for parameter in lora_parameters(sam):
            nn.init.normal_(parameter, std=0.1)


def with_sam_adapter(sam):
    attach_sam_adapter(sam.image_encoder, SMALL)
    with torch.no_grad():
        for parameter in sam_adapter_parameters(sam):
            nn.init.normal_(parameter, std=0.2)
        for parameter in [*sam.mask_decoder.parameters(), sam.prompt_encoder.no_mask_embed.weight]:
            parameter.add_(0.02 * torch.randn_like(parameter))


def with_coefficients(sam):
    attach_coefficients(sam.image_encoder, 0.7)


@pytest.fixture
def adapted():
    sam = build_small_sam()
    with_lora(sam)
    return sam


@pytest.fixture
def path(adapted, small_sam, tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_adapter(adapted, path, base=small_sam, method="wesam")
    return path


def rewritten(path, *, metadata=None, **changes):
    """Write an adapter again with other tensors or another header; None leaves a thing out."""
    state = {key: value for key, value in (load_file(path) | changes).items() if value is not None}
    with safe_open(path, framework="pt") as file:
        header = file.metadata() | (metadata or {})
    save_file(state, path, metadata={key: v for key, v in header.items() if v is not None})


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
    assert read_adapter(path).parts == ("lora",)
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


@pytest.mark.parametrize(
    "changes", [{"method": "magic"}, {"method": None}, {"parts": "lora,magic"}]
)
def test_an_unknown_method_or_part_is_refused(small_sam, path, changes):
    rewritten(path, metadata=changes)
    with pytest.raises(CheckpointError, match="wesam, lora, sam-adapter with some of the parts"):
        apply_adapter(small_sam, path)
    with pytest.raises(CheckpointError, match="newer version"):
        read_adapter(path)


@pytest.mark.parametrize(
    ("rank", "change", "message"),
    [
        pytest.param("many", lambda t: t, "LoRA's rank in its header, got 'many'", id="rank"),
        pytest.param(None, lambda t: t, "LoRA's rank in its header, got None", id="no rank"),
        pytest.param("2", lambda t: None, "1 keys missing", id="a tensor missing"),
        pytest.param("2", lambda t: t[:, :-1], "1 of another shape", id="shape"),
        pytest.param("3", lambda t: t, "4 of another shape", id="another rank than it says"),
        pytest.param("2", lambda t: t * float("inf"), "1 tensors that do not", id="not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(small_sam, path, rank, change, message):
    name = "image_encoder.blocks.0.attn.qkv.lora_a"
    changed = change(load_file(path)[name])
    rewritten(
        path,
        metadata={"rank": rank},
        **{name: None if changed is None else changed.contiguous()},
    )
    with pytest.raises(CheckpointError, match=message):
        apply_adapter(small_sam, path)


def test_files_of_the_time_of_lora_alone_are_still_read(adapted, small_sam, path):
    base = weights_fingerprint(small_sam)
    header = {"format": "pt", "method": "lora", "rank": "2", "base": base}
    save_file(lora_state(adapted), path, metadata=header)
    assert weights_fingerprint(apply_adapter(small_sam, path)) == weights_fingerprint(
        merge_lora(adapted)
    )
    assert read_adapter(path) == AdapterInfo(
        method="wesam", parts=("lora",), prompt_free=False, base=base
    )


def test_a_file_holds_what_is_new_and_says_what_it_is(small_sam, tmp_path):
    sam, path = build_small_sam(), tmp_path / "versions" / "a.safetensors"
    with_sam_adapter(sam)
    save_adapter(sam, path, base=small_sam, method="sam-adapter", prompt_free=True)
    base = weights_fingerprint(small_sam)
    assert read_adapter(path) == AdapterInfo(
        method="sam-adapter", parts=("sam-adapter", "decoder"), prompt_free=True, base=base
    )
    held, state = load_file(path), sam.state_dict()
    assert all(torch.equal(held[key], state[key]) for key in held)
    assert held.keys() == {
        key
        for key in state
        if key.startswith(("mask_decoder.", "image_encoder.sam_adapter."))
        or key == "prompt_encoder.no_mask_embed.weight"
    }
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("header", ["{", "[]", '{"reduction": 0}', '{"input_weights": []}'])
def test_settings_that_are_none_are_refused(small_sam, tmp_path, header):
    sam, path = build_small_sam(), tmp_path / "a.safetensors"
    with_sam_adapter(sam)
    save_adapter(sam, path, base=small_sam, method="sam-adapter")
    rewritten(path, metadata={"sam_adapter": header})
    with pytest.raises(CheckpointError, match=r"SAM-Adapter's settings in its header|shape|keys"):
        apply_adapter(small_sam, path)


@pytest.mark.parametrize("part", ["lora_b", "mask_decoder.iou_token", "stable_sam.norm.bias"])
def test_what_is_not_finite_is_neither_written_nor_read(small_sam, tmp_path, part):
    sam, plugin, path = build_small_sam(), StableSam(), tmp_path / "a.safetensors"
    with_lora(sam)
    with_sam_adapter(sam)
    named = {**sam.state_dict(), **{f"stable_sam.{k}": v for k, v in plugin.state_dict().items()}}
    save_adapter(sam, path, base=small_sam, method="lora", stable_sam=plugin)
    key = next(key for key in named if part in key)
    rewritten(path, **{key: torch.full_like(named[key], torch.nan)})
    with pytest.raises(CheckpointError, match="damaged, train anew"):
        load_adapter(small_sam, path)
    named[key].fill_(torch.nan)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"1 tensors .*it was not written"):
        save_adapter(sam, path, base=small_sam, method="lora", stable_sam=plugin)
    assert not list(tmp_path.iterdir())


def test_nothing_new_and_no_method_are_refused(small_sam, adapted, tmp_path):
    with pytest.raises(ConfigError, match="one that is its base; train it"):
        save_adapter(small_sam, tmp_path / "a", base=small_sam, method="wesam")
    with pytest.raises(ConfigError, match="wesam, lora, sam-adapter, got 'magic'"):
        save_adapter(adapted, tmp_path / "a", base=small_sam, method="magic")


def a_plugin():
    plugin = StableSam()
    with torch.no_grad():
        for parameter in plugin.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return plugin.eval()


WAYS = {
    "BA-SAM": {"ba_sam": BaSamConfig(scaling_factor=True, bias="full", beta=2.0)},
    "BA-SAM official": {"change": with_coefficients, "ba_sam": BaSamConfig(bias="official")},
    "Stable-SAM": {"stable_sam": True},
    "LoRA": {"change": with_lora},
    "SAM-Adapter": {"change": with_sam_adapter},
}
PAIRS = [
    pair
    for pair in itertools.combinations(WAYS, 2)
    if pair != ("BA-SAM", "BA-SAM official")  # two settings of one thing
]


def answers(sam, *, ba_sam=None, stable_sam=None, precision="fp32"):
    """Everything a model says of a wide image, and its two fingerprints."""
    predictor = Predictor(
        sam,
        ba_sam=ba_sam,
        stable_sam=stable_sam,
        precision=precision,
        policy=ResolutionPolicy(mode="native", min_side=100, max_side=100),
    )
    image = np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)
    embedding = predictor.embed(image)
    no_points = {"point_coords": np.zeros((0, 2)), "point_labels": np.zeros(0, int)}
    prompts = [
        ObjectPrompt(**no_points, box_xyxy=np.array([10.0, 12, 60, 44])),
        ObjectPrompt(point_coords=np.array([[30.0, 20]]), point_labels=np.ones(1, int)),
    ]
    decoded = predictor.decode_low_res(embedding, prompts)
    tensors = [embedding.image_embeddings, *(part for one in decoded for part in one[:2])]
    return tensors, (predictor.embedding_fingerprint, predictor.fingerprint)


def together(names):
    """Build a model with several ways at once."""
    sam, ba_sam, plugin = build_small_sam(), None, None
    for way in (WAYS[name] for name in names):
        if "change" in way:
            way["change"](sam)
        ba_sam = way.get("ba_sam", ba_sam)
        if "stable_sam" in way:
            plugin = a_plugin()
    return sam, ba_sam, plugin


@pytest.mark.parametrize(
    ("names", "precision"),
    [
        *((pair, "fp32") for pair in PAIRS),
        *((pair[::-1], "bf16") for pair in PAIRS),
        (tuple(WAYS), "fp32"),
    ],
    ids=lambda value: value if isinstance(value, str) else " + ".join(value),
)
def test_any_two_run_together_and_are_one_file(small_sam, tmp_path, names, precision):
    """Composition: in either order, saved, read again, and the same to the last bit."""
    sam, ba_sam, plugin = together(names)
    wanted, fingerprints = answers(
        merge_lora(sam), ba_sam=ba_sam, stable_sam=plugin, precision=precision
    )
    path = tmp_path / "adapter.safetensors"
    save_adapter(sam, path, base=small_sam, method="lora", ba_sam=ba_sam, stable_sam=plugin)
    before = weights_fingerprint(small_sam)
    got = load_adapter(small_sam, path)
    assert got.ba_sam == ba_sam
    again, fingerprints_again = answers(
        got.sam, ba_sam=got.ba_sam, stable_sam=got.stable_sam, precision=precision
    )
    assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True))
    assert fingerprints_again == fingerprints
    assert weights_fingerprint(small_sam) == before


@pytest.mark.parametrize("names", PAIRS)
def test_each_of_two_matters(names):
    """Leaving one of two out changes the answers, and the fingerprints with them."""
    both, fingerprints = answers_of(names)
    for one in names:
        alone, other_fingerprints = answers_of([one])
        assert not all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))
        assert other_fingerprints[1] != fingerprints[1]


def answers_of(names):
    torch.manual_seed(1)
    sam, ba_sam, plugin = together(names)
    return answers(merge_lora(sam), ba_sam=ba_sam, stable_sam=plugin)


def test_a_plugin_and_settings_are_none_where_the_file_has_none(small_sam, path):
    got = load_adapter(small_sam, path)
    assert got.stable_sam is None
    assert got.ba_sam is None
    assert got.info == read_adapter(path)


def test_a_plugin_without_a_router_is_read(small_sam, adapted, tmp_path):
    path, plugin = tmp_path / "a.safetensors", StableSam(is_routed=False, scope="points")
    save_adapter(adapted, path, base=small_sam, method="wesam", stable_sam=plugin)
    got = load_adapter(small_sam, path).stable_sam
    assert got.state_dict().keys() == plugin.state_dict().keys()
    assert got.scope == "points"
    assert not got.training
