import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from sam_ext.errors import CheckpointError, ConfigError
from sam_ext.stable_sam import (
    StableSam,
    load_stable_sam,
    prepare_stable_sam,
    sample_tokens,
    save_stable_sam,
)

GRID = (5, 7)


def tokens(objects=2, channels=8):
    return torch.randn(objects, GRID[0] * GRID[1], channels)


def moved(seed=0, **options):
    """Build a plugin whose parameters are not at their start."""
    torch.manual_seed(seed)
    plugin = StableSam(8, **options)
    for parameter in plugin.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return plugin


def test_parameters_are_as_many_as_the_source_says():
    assert sum(p.numel() for p in StableSam().parameters()) == 73_474 + 261 * 16 + 2


def test_at_the_start_it_changes_nothing():
    x = tokens()
    routed = StableSam(8)(x, torch.randn(2, 8), GRID)
    torch.testing.assert_close(routed.features, x)
    torch.testing.assert_close(routed.routing, torch.full((2, 2), 0.5))


def test_sampling_equals_torchs_grid_sample():
    x = tokens().requires_grad_()
    offsets = (torch.randn(2, 35, 2) * 3).requires_grad_()  # many of them beyond the border
    rows, columns = torch.meshgrid(torch.arange(5), torch.arange(7), indexing="ij")
    place = torch.stack([columns, rows], -1) + offsets.view(2, 5, 7, 2)
    relative = (2 * place + 1) / torch.tensor([7, 5]) - 1
    image = x.transpose(1, 2).unflatten(2, GRID)
    wanted = F.grid_sample(image, relative, padding_mode="border", align_corners=False)
    wanted = wanted.flatten(2).transpose(1, 2)
    got = sample_tokens(x, offsets, GRID)
    torch.testing.assert_close(got, wanted)
    weights = torch.randn_like(got)
    for mine, theirs in zip(
        torch.autograd.grad((got * weights).sum(), (x, offsets)),
        torch.autograd.grad((wanted * weights).sum(), (x, offsets)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_routing_to_the_plain_tokens_is_sam_for_any_offsets():
    x = tokens()
    got = moved()(x, torch.randn(2, 8), GRID, routing=torch.tensor([0.0, 1.0]))
    assert torch.equal(got.features, x)


def test_a_constant_offset_shifts_the_tokens():
    plugin = StableSam(8, is_routed=False)
    with torch.no_grad():
        plugin.offset.bias.copy_(torch.tensor([2.0, -1.0]))  # reads 2 to the right, 1 above
    x = tokens()
    got = plugin(x, torch.randn(2, 8), GRID).features.view(2, *GRID, 8)
    image = x.view(2, *GRID, 8)
    torch.testing.assert_close(got[:, 1:, :-2], image[:, :-1, 2:])
    torch.testing.assert_close(got[:, 0, :-2], image[:, 0, 2:])


def test_each_object_is_routed_by_its_own_token():
    plugin, x, token = moved(), tokens(), torch.randn(2, 8)
    both = plugin(x, token, GRID)
    assert not torch.allclose(both.routing[0], both.routing[1])
    alone = plugin(x[1:], token[1:], GRID)
    torch.testing.assert_close(both.features[1:], alone.features)
    torch.testing.assert_close(both.routing.sum(1), torch.ones(2))


def test_at_the_start_gradients_reach_what_they_can_and_everything_later():
    plugin = StableSam(8)
    plugin(tokens(), torch.randn(2, 8), GRID).features.square().sum().backward()
    reached = {name for name, p in plugin.named_parameters() if p.grad.abs().sum() > 0}
    assert reached == {"transform.weight", "transform.bias", "offset.weight", "offset.bias"}
    plugin = moved()
    plugin(tokens(), torch.randn(2, 8), GRID).features.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in plugin.parameters())


def test_in_bf16_it_answers_nearly_the_same_and_leaves_the_other_as_it_was():
    plugin, x, token = moved().eval(), tokens(), torch.randn(2, 8)
    prepared = prepare_stable_sam(plugin, torch.bfloat16)
    names = {name for name, p in prepared.named_parameters() if p.dtype == torch.bfloat16}
    assert names == {n for n, _ in plugin.named_parameters() if not n.startswith("router.")}
    assert plugin.transform.weight.dtype == torch.float32
    assert prepare_stable_sam(plugin, torch.float32) is plugin
    torch.nn.init.zeros_(plugin.offset.weight)  # a place is not a value: it may jump
    torch.nn.init.zeros_(prepared.offset.weight)
    exact, near = plugin(x, token, GRID), prepared(x, token, GRID)
    assert near.features.dtype == torch.float32
    assert 0 < (near.features - exact.features).norm() / exact.features.norm() < 0.01
    torch.testing.assert_close(near.routing, exact.routing)


def test_tokens_of_another_grid_are_refused():
    with pytest.raises(ConfigError, match="5 x 8 tokens, got 35"):
        StableSam(8)(tokens(), torch.randn(2, 8), (5, 8))


@pytest.mark.parametrize(("is_routed", "scope"), [(True, "points"), (False, "all")])
def test_a_saved_plugin_answers_as_before(tmp_path, is_routed, scope):
    plugin = moved(is_routed=is_routed, scope=scope)
    x, token = tokens(), torch.randn(2, 8)
    save_stable_sam(plugin, tmp_path / "p.safetensors", base="abc")
    loaded = load_stable_sam(tmp_path / "p.safetensors", base="abc")
    assert loaded.scope == scope
    assert torch.equal(loaded(x, token, GRID).features, plugin(x, token, GRID).features)
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]


def test_a_file_that_is_no_plugin_of_this_sam_is_refused(tmp_path):
    path = tmp_path / "p.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read as one"):
        load_stable_sam(path, base="abc")
    path.write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="cannot be read as one"):
        load_stable_sam(path, base="abc")
    save_stable_sam(moved(), path, base="abc")
    with pytest.raises(CheckpointError, match=r"works in \(other\), got one for abc"):
        load_stable_sam(path, base="other")
    save_file(moved().state_dict(), path)
    with pytest.raises(CheckpointError, match="got something else"):
        load_stable_sam(path, base="abc")
    header = {"method": "stable-sam", "base": "abc"}
    save_file(moved().state_dict(), path, metadata=header | {"scope": "coffee"})
    with pytest.raises(CheckpointError, match="one of all, points, got one for 'coffee'"):
        load_stable_sam(path, base="abc")
    save_file(moved().state_dict(), path, metadata=header)  # from before there were scopes
    assert load_stable_sam(path, base="abc").scope == "all"
    state = moved().state_dict()
    del state["offset.bias"]
    save_file(state, path, metadata={"method": "stable-sam", "base": "abc"})
    with pytest.raises(CheckpointError, match=r"offset\.bias"):
        load_stable_sam(path, base="abc")
