"""The data mixes and schedules of the bundled checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sam_ext.errors import ConfigError
from sam_ext.training.data import CocoFolder, PhotographsOf, Source, SyntheticSource
from sam_ext.training.supervised import Stage, SupervisedConfig
from sam_ext.training.synthetic import SyntheticConfig

__all__ = ["TINY", "TINY_MIX", "Recipe", "open_sources"]

# Folder below the data directory -> weight. Only sets whose licence lets weights trained on them be
# shipped. Narrow sets weigh little: they are sampled by set, not by mask.
TINY_MIX: dict[str, float] = {
    "feralcat": 2.0,
    "ccp": 2.0,
    "kudzu_bugs": 0.2,
    "web/bottles": 0.5,
    "web/cardamage": 0.5,
    "web/cocomini": 0.4,
    "web/cocotiny": 0.2,
    "web/deskobjects": 0.8,
    "web/electronics": 0.5,
    "web/facade": 0.5,
    "web/flakes2d": 0.2,
    "web/granular": 0.3,
    "web/maize": 0.3,
    "web/mushrooms": 0.3,
    "web/plants": 0.4,
    "web/potholes": 0.2,
    "web/strawberry": 0.3,
    "web/warehouse": 0.3,
    "synthetic": 7.0,
}
_SYNTHETIC = "synthetic"
_SYNTHETIC_SCENES = 8000


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model's data mix and run."""

    model: str
    mix: dict[str, float]
    held_out: dict[str, float]
    """Sets whose `val` split is measured while training, never trained on."""
    config: SupervisedConfig


TINY = Recipe(
    model="tiny",
    mix=TINY_MIX,
    held_out={
        "feralcat": 1.0,
        "ccp": 1.0,
        "web/cocomini": 1.0,
        "web/electronics": 0.5,
        "web/bottles": 0.5,
        "web/plants": 0.5,
    },
    config=SupervisedConfig(
        stages=(
            Stage(image_size=128, batch_size=32, steps=1500),
            Stage(image_size=256, batch_size=12, steps=2300),
            Stage(image_size=256, batch_size=8, steps=150, clicks=1),
        ),
        optimizer="muon",
        box_chance=0.6,
    ),
)


def open_sources(
    data_dir: Path, weights: dict[str, float], *, splits: Iterable[str], seed: int
) -> list[tuple[Source, float]]:
    """Open the sets of a mix.

    Args:
        data_dir: Holds one folder per set.
        weights: Folder name to weight; `synthetic` is generated, with textures and objects cut from
            the others.
        splits: Which images by their split.
        seed: Of the generated scenes.

    Raises:
        ConfigError: If a set's folder does not exist.
    """
    folders: list[tuple[Source, float]] = []
    for name, weight in weights.items():
        if name == _SYNTHETIC:
            continue
        folder = data_dir / name
        if not folder.is_dir():
            raise ConfigError(f"--data must hold the folder {name}, found none in {data_dir}")
        folders.append((CocoFolder(folder, splits=tuple(splits)), weight))
    if _SYNTHETIC not in weights:
        return folders
    synthetic = SyntheticSource(
        SyntheticConfig(),
        count=_SYNTHETIC_SCENES,
        seed=seed,
        photographs=PhotographsOf(folders) if folders else None,
    )
    return [*folders, (synthetic, weights[_SYNTHETIC])]
