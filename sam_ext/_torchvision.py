"""Makes `import torchvision`, and so `import segment_anything`, work beside any build of torch.

torchvision's wheels carry CUDA binaries. Beside a CPU-only torch they do not load, torchvision's
operators are missing, and its import fails where it describes two of them. SAM runs none of them,
so naming the two is enough. Importing this module does it.
"""

from __future__ import annotations

import importlib

import torch

__all__ = ["ensure_importable"]


def ensure_importable() -> None:
    """Import torchvision; where its operators are missing, name those that its import asks for.

    Where torchvision imports by itself nothing is registered. Calling one of the named operators
    (`torchvision.ops.nms`) still fails, as it has no implementation.

    Raises:
        ImportError: If torchvision is not installed.
        RuntimeError: If its import fails for another reason than the missing operators.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                torch.library.define(
                    f"torchvision::{name}",
                    "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                )
        importlib.import_module("torchvision")  # another failure shows again here


ensure_importable()
