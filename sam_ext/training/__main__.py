"""`python -m sam_ext.training`: train the bundled checkpoint, resumably, or a plugin for it, or
average checkpoints.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from sam_ext.ba_sam import BaSamConfig, attach_coefficients
from sam_ext.checkpoints import find_checkpoint, load_sam, save_checkpoint
from sam_ext.config import MODELS
from sam_ext.sam import build_sam, weights_fingerprint
from sam_ext.stable_sam import PluginScope, StableSam, save_stable_sam
from sam_ext.training.recipes import TINY, open_sources
from sam_ext.training.robust import RobustConfig, train_stable
from sam_ext.training.supervised import Stage, train

_LOG = logging.getLogger("sam_ext.training")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m sam_ext.training", description=__doc__)
    parser.add_argument(
        "what",
        nargs="?",
        choices=("sam", "stable", "average"),
        default="sam",
        help="the model itself, Stable-SAM's plugin for the one that --init names, or the average "
        "of the weights of those that --of names",
    )
    parser.add_argument("--data", type=Path, help="folder of COCO-format sets")
    parser.add_argument("--out", type=Path, required=True, help="run directory; resumes there")
    parser.add_argument("--of", nargs="+", metavar="MODEL", help="models or checkpoints to average")
    parser.add_argument("--init", help="start from this model or checkpoint, not from nothing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=TINY.config.seed)
    parser.add_argument("--workers", type=int, default=1, help="processes that prepare samples")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default=TINY.config.optimizer)
    parser.add_argument("--learning-rate", type=float, default=TINY.config.learning_rate)
    parser.add_argument("--warmup", type=int, default=TINY.config.warmup_steps, metavar="STEPS")
    parser.add_argument(
        "--stage",
        action="append",
        metavar="SIZE[+SIZE...]:BATCH:STEPS:CLICKS",
        help="replaces the recipe's stages; may be given several times",
    )
    parser.add_argument(
        "--ba-sam",
        choices=("factor", "coefficients", "all"),
        help="fine-tune with BA-SAM's scaling factor, and (`coefficients`, or `all` weights with "
        "them) its learnable coefficients",
    )
    parser.add_argument("--steps", type=int, default=1500, help="of the plugin's training")
    parser.add_argument(
        "--size",
        type=_sides,
        metavar="SIZE[+SIZE...]",
        help="sides of the images of the plugin's training; by default the model's own",
    )
    parser.add_argument(
        "--scope",
        choices=get_args(PluginScope),
        default="points",
        help="what prompts the plugin is for: several points and no box, or all",
    )
    parser.add_argument(
        "--no-routing", action="store_true", help="a plugin without router, for comparison"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    wanted = "of" if arguments.what == "average" else "data"
    if getattr(arguments, wanted) is None:
        parser.error(f"--{wanted} is required for {arguments.what}")
    if arguments.what == "average":
        _average(arguments)
    elif arguments.what == "stable":
        _train_stable(arguments)
    else:
        _train_sam(arguments)


def _train_stable(arguments: argparse.Namespace) -> None:
    model = arguments.init or TINY.model
    torch.manual_seed(arguments.seed)
    sam = load_sam(model, weights_dir=arguments.out, device=arguments.device)
    plugin = StableSam(is_routed=not arguments.no_routing, scope=arguments.scope)
    plugin.to(arguments.device)
    size, *others = arguments.size or (sam.image_encoder.img_size,)
    train_stable(
        sam,
        plugin,
        open_sources(arguments.data, TINY.mix, splits=("train",), seed=arguments.seed),
        RobustConfig(
            image_size=size,
            other_sizes=tuple(others),
            steps=arguments.steps,
            seed=arguments.seed,
        ),
        num_workers=arguments.workers,
        on_progress=_report,
    )
    weights = find_checkpoint(model, weights_dir=arguments.out)
    path = arguments.out / f"{weights.stem}.stable.safetensors"
    save_stable_sam(plugin, path, base=weights_fingerprint(sam))
    _LOG.info("wrote %s", path)


def _train_sam(arguments: argparse.Namespace) -> None:
    config = replace(
        TINY.config,
        seed=arguments.seed,
        optimizer=arguments.optimizer,
        learning_rate=arguments.learning_rate,
        warmup_steps=arguments.warmup,
    )
    if arguments.ba_sam is not None:
        learnable = arguments.ba_sam != "factor"
        config = replace(
            config,
            ba_sam=BaSamConfig(scaling_factor=True, bias="official" if learnable else "none"),
            trained="ba_sam" if arguments.ba_sam == "coefficients" else "all",
        )
    if arguments.stage:
        config = replace(config, stages=tuple(_stage(text) for text in arguments.stage))
    torch.manual_seed(config.seed)
    if arguments.init is None:
        sam = build_sam(MODELS[TINY.model]).to(arguments.device)
    else:
        sam = load_sam(arguments.init, weights_dir=arguments.out, device=arguments.device)
    has_coefficients = any(name.endswith("ba_sam_coefficient") for name in sam.state_dict())
    if arguments.ba_sam in ("coefficients", "all") and not has_coefficients:
        attach_coefficients(sam.image_encoder)
    train(
        sam,
        open_sources(arguments.data, TINY.mix, splits=("train",), seed=config.seed),
        config,
        run_dir=arguments.out,
        held_out=open_sources(arguments.data, TINY.held_out, splits=("val",), seed=config.seed),
        num_workers=arguments.workers,
        on_progress=_report,
    )
    path = arguments.out / f"{TINY.model}.safetensors"
    save_checkpoint(sam, path)
    _LOG.info("wrote %s", path)


def _average(arguments: argparse.Namespace) -> None:
    """Average weights (Wortsman et al., arXiv:2203.05482), of runs that began at one another's."""
    sams = [load_sam(one, weights_dir=arguments.out) for one in arguments.of]
    states = [sam.state_dict() for sam in sams]
    averaged = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
    sams[0].load_state_dict(averaged)
    path = arguments.out / f"{TINY.model}.safetensors"
    save_checkpoint(sams[0], path)
    _LOG.info("wrote %s", path)


def _stage(text: str) -> Stage:
    sides, batch, steps, clicks = text.split(":")
    size, *others = _sides(sides)
    return Stage(
        image_size=size,
        other_sizes=tuple(others),
        batch_size=int(batch),
        steps=int(steps),
        clicks=int(clicks),
    )


def _sides(text: str) -> tuple[int, ...]:
    return tuple(int(side) for side in text.split("+"))


def _report(line: dict[str, float]) -> None:
    _LOG.info("  ".join(f"{key} {value:.4g}" for key, value in line.items()))


if __name__ == "__main__":
    main()
