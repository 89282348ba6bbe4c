"""Stable-SAM: a decoder that looks beside a sloppy prompt for what was meant.

A small network shifts where the image is read from (deformable sampling), and a router decides, for
each prompt, how much of the shifted reading and how much of the plain one is used. SAM itself stays
as it is.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sam_ext.errors import CheckpointError, ConfigError
from sam_ext.state_dicts import check_state, save_state

__all__ = [
    "PluginScope",
    "Routed",
    "StableSam",
    "load_stable_sam",
    "plugin_for",
    "plugin_scope",
    "prepare_stable_sam",
    "sample_tokens",
    "save_stable_sam",
    "training_plugin",
]

PluginScope = Literal["all", "points"]
"""What prompts a plugin is for: all of them, as in the source, or several points and no box."""

_ROUTE_HIDDEN = 16
_METHOD = "stable-sam"


class Routed(NamedTuple):
    """The image tokens that one layer's token-to-image attention reads, and how they were mixed."""

    features: Tensor
    """[O, H * W, C]."""
    routing: Tensor
    """[O, 2]: the weights of the shifted tokens and of the plain ones, with sum 1."""


class StableSam(nn.Module):
    r"""Deformable sampling and dynamic routing for the decoder's second layer.

    .. math::
        x^* = W x + b, \quad \Delta p = U\, GELU(LN(DW_{5 \times 5}(x^*))), \quad
        f_p = \alpha_1 x^*_{p + \Delta p} + \alpha_2 x_p, \quad
        \alpha = softmax(MLP(t_o))

    At the start it is exactly SAM: W is the identity, all offsets are 0 and both weights are 1/2.

    Source:
        Fan et al., arXiv:2311.15776, as far as its figures and captions show it; its code was never
        released.

    Differs from the source, or is our choice where it says nothing:
        Offsets are in tokens, one for all heads and channels, and not bounded; beyond the border
        the border is read; positions are not resampled; t_o is the token of the single mask, after
        the second layer's self-attention; the router has 16 hidden units and is soft. A plugin may
        be for several points alone (`scope`).
    """

    def __init__(
        self, channels: int = 256, *, is_routed: bool = True, scope: PluginScope = "all"
    ) -> None:
        """Build the plugin at its start.

        Args:
            channels: Channels of the decoder's tokens.
            is_routed: Whether there is a router; without, only the shifted tokens are read.
            scope: What prompts it is trained on and used for; the others are SAM's alone.
        """
        super().__init__()
        self.scope: PluginScope = scope
        self.transform = nn.Linear(channels, channels)
        self.depthwise = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.offset = nn.Linear(channels, 2)
        nn.init.eye_(self.transform.weight)
        nn.init.zeros_(self.transform.bias)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)
        self.router: nn.Sequential | None = None
        if is_routed:
            last = nn.Linear(_ROUTE_HIDDEN, 2)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.router = nn.Sequential(
                nn.Linear(channels, _ROUTE_HIDDEN), nn.LayerNorm(_ROUTE_HIDDEN), nn.GELU(), last
            )

    def forward(
        self,
        features: Tensor,
        token: Tensor,
        grid_hw: tuple[int, int],
        *,
        routing: Tensor | None = None,
    ) -> Routed:
        """Shift and mix image tokens.

        Args:
            features: [O, H * W, C], an image's tokens for each of O objects.
            token: [O, C], t_o.
            grid_hw: (H, W).
            routing: [2], weights with sum 1 to use in place of the router's.

        Raises:
            ConfigError: If `features` is not of this grid.
        """
        height, width = grid_hw
        objects, count, _ = features.shape
        if count != height * width:
            raise ConfigError(
                f"features must have {height} x {width} tokens, got {count}; "
                "name the grid that they come from"
            )
        transformed = self.transform(features.to(self.transform.weight.dtype))
        # The tokens as they lie are an image of channels last; a copy of it would cost more than
        # the convolution.
        as_image = transformed.view(objects, height, width, -1).permute(0, 3, 1, 2)
        local = self.depthwise(as_image).permute(0, 2, 3, 1).reshape(objects, count, -1)
        offsets = self.offset(F.gelu(self.norm(local)))  # [O, H * W, 2], (x, y) in tokens
        shifted = sample_tokens(transformed, offsets, grid_hw)
        if routing is not None:
            weights = routing.to(token).expand(objects, 2)
        elif self.router is None:
            weights = token.new_tensor([1.0, 0.0]).expand(objects, 2)
        else:
            weights = self.router(token).softmax(dim=-1)
        share = weights[:, 0, None, None].to(features.dtype)
        return Routed(torch.lerp(features, shifted.to(features.dtype), share), weights)


def plugin_for(plugin: StableSam | None, *, is_several_points: bool) -> StableSam | None:
    """Say whether a plugin takes part in an answer.

    Args:
        plugin: The model's, if it has one.
        is_several_points: Whether several points are asked with, and no box.

    Returns:
        The plugin, or None where the prompt is not one of those that it is for.
    """
    if plugin is None or plugin.scope == "all" or is_several_points:
        return plugin
    return None


def training_plugin(plugin: StableSam | None) -> StableSam | None:
    """Choose the plugin that weights are trained with which are then served with `plugin`.

    A plugin for all prompts is part of how its model answers. One for several points is left out:
    with it, WeSAM from ten images of cwfid, which teaches points by the way, reaches 0.429 by one
    click, and 0.488 without (LoRA 0.520 and 0.516). Weights that were trained without it are served
    with it, and answer several points better so. Held-out images of train splits, WeSAM from boxes
    / from points, five points on the object, IoU without and with the plugin:

    ===============  =============  =============  =============
    set              as it is       boxes          points
    ===============  =============  =============  =============
    dsb2018_nuclei   0.320  0.449   0.465  0.577   0.477  0.605
    wbc              0.601  0.667   0.600  0.647   0.620  0.654
    cwfid            0.458  0.533   0.428  0.471   0.551  0.556
    mt_defect        0.313  0.375   0.356  0.416   0.364  0.488
    ===============  =============  =============  =============

    Args:
        plugin: What the weights are served with, before and after; None if there is none.
    """
    return plugin if plugin is not None and plugin.scope == "all" else None


def prepare_stable_sam(plugin: StableSam, dtype: torch.dtype) -> StableSam:
    """Return a plugin that looks for offsets and reads shifted tokens in `dtype`.

    The router stays as it is, and so does the sum of shifted and plain tokens.

    Returns:
        The plugin itself if it does, else a copy.
    """
    if plugin.transform.weight.dtype == dtype:
        return plugin
    prepared = copy.deepcopy(plugin)
    for module in (prepared.transform, prepared.depthwise, prepared.norm, prepared.offset):
        module.to(dtype)
    return prepared


def sample_tokens(tokens: Tensor, offsets: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Read tokens at shifted places, bilinearly; beyond the border the border is read.

    Args:
        tokens: [O, H * W, C].
        offsets: [O, H * W, 2], (x, y) in tokens, where each reads relative to its own place.
        grid_hw: (H, W).

    Returns:
        [O, H * W, C].
    """
    height, width = grid_hw
    objects, count, channels = tokens.shape
    place = torch.arange(count, device=tokens.device)
    x = (offsets[..., 0].float() + place % width).clamp(0, width - 1)
    y = (offsets[..., 1].float() + place // width).clamp(0, height - 1)
    left, top = x.detach().floor(), y.detach().floor()
    share_x, share_y = x - left, y - top  # of the right and lower neighbour
    first_row = torch.arange(objects, device=tokens.device)[:, None] * count
    corners, shares = [], []
    for down in (0, 1):
        for right in (0, 1):
            row = (top + down).clamp(max=height - 1)
            column = (left + right).clamp(max=width - 1)
            corners.append(first_row + (row * width + column).long())
            shares.append((share_x if right else 1 - share_x) * (share_y if down else 1 - share_y))
    # Rows of channels are read whole, which a grid sample of [O, C, H, W] does not do.
    read = F.embedding_bag(
        torch.stack(corners, -1).view(-1, 4),
        tokens.reshape(-1, channels),
        per_sample_weights=torch.stack(shares, -1).view(-1, 4).to(tokens.dtype),
        mode="sum",
    )
    return read.view(objects, count, channels)


def save_stable_sam(plugin: StableSam, path: Path, *, base: str) -> None:
    """Write a plugin as safetensors; the file appears whole or not at all.

    Args:
        plugin: The plugin; it is not changed.
        path: The file, replaced if it is there.
        base: Fingerprint of the SAM that it was trained with.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in plugin.state_dict().items()}
    metadata = {"format": "pt", "method": _METHOD, "base": base, "scope": plugin.scope}
    save_state(state, path, metadata=metadata)


def plugin_scope(path: Path, name: str) -> PluginScope:
    """Read what prompts a plugin is for.

    Raises:
        CheckpointError: If it is none of `PluginScope`.
    """
    for scope in get_args(PluginScope):
        if name == scope:
            return cast(PluginScope, scope)
    raise CheckpointError(
        f"{path} must be a plugin for one of {', '.join(get_args(PluginScope))}, got one for "
        f"{name!r}; update the project, or train it again"
    )


def load_stable_sam(path: Path, *, base: str) -> StableSam:
    """Read a plugin, in evaluation mode, on the CPU.

    Args:
        path: What `save_stable_sam` wrote.
        base: Fingerprint of the SAM that it shall work in.

    Raises:
        CheckpointError: If the file is missing or damaged, is no such plugin, or was trained with
            another SAM.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} must be a plugin of Stable-SAM, and cannot be read as one ({error}); "
            "train it again, or take its file from the project"
        ) from error
    if header.get("method") != _METHOD:
        raise CheckpointError(
            f"{path} must be a plugin of {_METHOD}, got {header.get('method') or 'something else'}"
        )
    if header.get("base") != base:
        raise CheckpointError(
            f"{path} must be trained with the SAM that it works in ({base[:12]}), "
            f"got one for {str(header.get('base'))[:12]}; train it for this one"
        )
    channels = len(state["norm.weight"]) if "norm.weight" in state else 0
    plugin = StableSam(
        max(channels, 1),
        is_routed=any(name.startswith("router.") for name in state),
        scope=plugin_scope(path, header.get("scope", "all")),
    )
    check_state(path, state, plugin.state_dict())
    plugin.load_state_dict(state)
    return plugin.eval()
