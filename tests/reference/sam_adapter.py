"""SAM-Adapter's equations written out, slowly, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def high_frequency(image: Tensor, rate: float) -> Tensor:
    """Sum every kept frequency of an image [H, W], one after the other."""
    height, width = image.shape
    ys = torch.arange(height, dtype=torch.float64)[:, None]
    xs = torch.arange(width, dtype=torch.float64)[None]
    total = torch.zeros((height, width), dtype=torch.complex128)
    for row in range(height):
        for column in range(width):
            wave = torch.exp(2j * math.pi * (row * ys / height + column * xs / width))
            f_y, f_x = min(row, height - row) / height, min(column, width - column) / width
            if max(f_y, f_x) >= math.sqrt(rate) / 2:
                amplitude = (image * wave.conj()).sum() / (height * width)
                total += amplitude * wave
    return total.real.abs()


def official_high_frequency(image: Tensor, rate: float) -> Tensor:
    """Remove the square around frequency zero of a shifted spectrum, as the official code does."""
    height, width = image.shape
    spectrum = torch.fft.fftshift(torch.fft.fft2(image, norm="forward"))
    line = int((width * height * rate) ** 0.5 // 2)
    middle_y, middle_x = height // 2, width // 2
    spectrum[middle_y - line : middle_y + line, middle_x - line : middle_x + line] = 0
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum), norm="forward").real.abs()


def addition(
    patches: Tensor, embedded_inputs: list[Tensor], weights: list[float], state: dict[str, Tensor]
) -> list[Tensor]:
    """Make every block's addition of one token's patch embedding [D] and inputs [c] each."""
    feature = weights[0] * (
        state["patch_projection.weight"] @ patches + state["patch_projection.bias"]
    )
    for weight, embedded in zip(weights[1:], embedded_inputs, strict=True):
        feature = feature + weight * embedded
    added, block = [], 0
    while f"tune.{block}.weight" in state:
        tuned = state[f"tune.{block}.weight"] @ feature + state[f"tune.{block}.bias"]
        activated = 0.5 * tuned * (1 + torch.erf(tuned / math.sqrt(2)))
        added.append(state["up.weight"] @ activated + state["up.bias"])
        block += 1
    return added
