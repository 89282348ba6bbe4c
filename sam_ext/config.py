"""The sizes of the models that can be built, by name."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from sam_ext.errors import ConfigError

__all__ = ["MODELS", "SamConfig"]


@dataclass(frozen=True, kw_only=True)
class SamConfig:
    """One SAM: the image encoder's sizes; prompt encoder and mask decoder are SAM's own."""

    name: str
    """How the model is called in messages and version strings."""
    embed_dim: int
    """Channels of the image encoder's tokens."""
    depth: int
    """Number of transformer blocks."""
    num_heads: int
    """Attention heads; must divide `embed_dim`."""
    global_attn_indexes: tuple[int, ...]
    """The blocks that attend to the whole image; the others attend within windows."""
    image_size: int
    """Side of the square training image in pixels; a multiple of `patch_size`."""
    patch_size: int = 16
    """Side of one token's patch in pixels."""
    window_size: int = 14
    """Side of an attention window in tokens."""
    prompt_embed_dim: int = 256
    """Channels of the image embedding, the prompts and the decoder."""

    def __post_init__(self) -> None:
        if min(self.embed_dim, self.depth, self.num_heads, self.window_size) < 1:
            raise ConfigError(f"SamConfig's sizes must be at least 1, got {self}")
        if self.embed_dim % self.num_heads:
            raise ConfigError(
                f"SamConfig.embed_dim must be a multiple of num_heads, "
                f"got {self.embed_dim} and {self.num_heads}"
            )
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise ConfigError(
                f"SamConfig.image_size must be a multiple of patch_size ({self.patch_size}), "
                f"got {self.image_size}"
            )
        if bad := [i for i in self.global_attn_indexes if not 0 <= i < self.depth]:
            raise ConfigError(
                f"SamConfig.global_attn_indexes has {bad}; this encoder has 0..{self.depth - 1}"
            )

    @property
    def grid_size(self) -> int:
        """Side of the token grid at the training size."""
        return self.image_size // self.patch_size

    def to_json(self) -> str:
        """Write the config as the JSON text that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> SamConfig:
        """Read a config that `to_json` wrote.

        Raises:
            ConfigError: If the text is not such a config.
        """
        try:
            fields = json.loads(text)
            fields["global_attn_indexes"] = tuple(fields["global_attn_indexes"])
            return cls(**fields)
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"a model config must be the JSON of a SamConfig, got {text[:80]!r}"
            ) from error


MODELS: dict[str, SamConfig] = {
    "tiny": SamConfig(
        name="tiny",
        embed_dim=192,
        depth=12,
        num_heads=3,
        global_attn_indexes=(2, 5, 8, 11),
        image_size=256,
        window_size=8,
    ),
    "vit_b": SamConfig(
        name="vit_b",
        embed_dim=768,
        depth=12,
        num_heads=12,
        global_attn_indexes=(2, 5, 8, 11),
        image_size=1024,
    ),
    "vit_l": SamConfig(
        name="vit_l",
        embed_dim=1024,
        depth=24,
        num_heads=16,
        global_attn_indexes=(5, 11, 17, 23),
        image_size=1024,
    ),
    "vit_h": SamConfig(
        name="vit_h",
        embed_dim=1280,
        depth=32,
        num_heads=16,
        global_attn_indexes=(7, 15, 23, 31),
        image_size=1024,
    ),
}
