"""Every table and plot of the README, from one command."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from sam_ext.errors import ConfigError
from sam_ext.evaluate import adaptation, prompts, resolution, sheet
from sam_ext.evaluate.records import RowFile, markdown_table, provenance

__all__ = ["README_TABLES", "TABLES", "add_arguments", "measure_all", "run", "write_markdown"]

_SHIFTED = {"dsb2018_nuclei": 24, "wbc": 60, "mt_defect": 60, "cwfid": 60}
"""Sets that `tiny` was not trained on, with images to adapt to: how many others to measure on."""


def _adaptation(name: str) -> str:
    return f"adaptation --train DIR/{name} --test DIR/{name} --limit {_SHIFTED[name]}"


README_TABLES: dict[str, tuple[str, ...]] = {
    "prompts": tuple(
        f"prompts --data DIR/{name} --prompts 'tight box;center point'{more}"
        for name, more in (
            ("coco200_panoptic", " --split val"),
            ("feralcat", ""),
            ("bsds500", " --primary"),
            ("dsb2018_nuclei", ""),
            ("treepheno_hr", ""),
            ("carrot_weed_hr", ""),
        )
    ),
    "sloppy": (
        "prompts --data DIR/coco200_panoptic --split val --limit 40 --seed 0",
        "prompts --data DIR/bsds500 --primary --limit 40 --seed 0",
        *(f"prompts --data DIR/{name} --limit 16 --seed 0" for name in _SHIFTED),
    ),
    "resolution": (
        "resolution --data DIR/coco200_panoptic --split val --limit 40 --seed 0",
        "resolution --data DIR/bsds500 --primary --limit 40 --seed 0",
        "resolution --data DIR/treepheno_hr",
        "resolution --data DIR/carrot_weed_hr",
    ),
    **{
        f"weak-{labels}": tuple(
            f"{_adaptation(name)} --supervision {labels} --images 30 {more}"
            for name in _SHIFTED
            for more in lines
        )
        for labels, lines in {
            "box": (
                "--methods direct,wesam --seeds 0,1,2",
                "--methods 'supervised,no anchor,as published but no anchor'",
            ),
            "point": ("--methods direct,wesam --seeds 0,1,2", "--methods supervised"),
            "coarse": ("--methods direct,wesam",),
            "none": ("--methods direct,wesam",),
        }.items()
    },
    "masks": tuple(f"{_adaptation(name)} --images 10,30,all" for name in _SHIFTED),
}
"""By name the command lines whose rows make a table; DIR is the folder of the sets."""

TABLES: dict[str, Any] = {
    "prompts": prompts,
    "resolution": resolution,
    "adaptation": adaptation,
    "sheet": sheet,
}
"""The kinds of tables: modules with `add_arguments` and `run`."""


def write_markdown(table: str, rows: Sequence[Any]) -> str:
    """Write the rows of a kind of table, one of `TABLES`, as Markdown."""
    if table == "adaptation":
        return adaptation.markdown(rows)
    return markdown_table([asdict(row) for row in rows])


def measure_all(
    tables: Mapping[str, Sequence[str]],
    *,
    data: Path,
    out: Path,
    model_arguments: Sequence[str] = (),
) -> list[Path]:
    """Measure tables, each into files of its name: `.jsonl`, `.md`, and plots.

    Adaptation has one plot of all sets, the others one for each.

    What is in a `.jsonl` already is not measured again.

    Args:
        tables: As `README_TABLES` is.
        data: Holds one folder a set; a set that is not there is left out, with a word about it.
        out: Gets the files.
        model_arguments: Put behind every command line.

    Returns:
        The Markdown files.

    Raises:
        ConfigError: If no set of a table is there.
    """
    console = Console(stderr=True)
    written = []
    for name, lines in tables.items():
        done: list[str] = []
        rows: list[Any] = []
        for line in lines:
            table, *arguments = shlex.split(line)
            module, parser = TABLES[table], argparse.ArgumentParser()
            module.add_arguments(parser)
            arguments = [str(data / a[4:]) if a.startswith("DIR/") else a for a in arguments]
            options = parser.parse_args([*arguments, *model_arguments])
            folder: Path = options.test if table == "adaptation" else options.data
            if not folder.is_dir():
                console.print(f"{name}: left out {folder.name}, which {data} does not hold")
                continue
            console.print(f"{name}: python -m sam_ext.evaluate {line}", soft_wrap=True)
            options.rows = out / f"{name}.jsonl"
            # Adaptation's sets stand in one plot, below.
            options.plot = None if table == "adaptation" else out / f"{name}-{folder.name}.png"
            out.mkdir(parents=True, exist_ok=True)
            rows += module.run(options)
            done.append(f"`python -m sam_ext.evaluate {line}`")
            if table == "adaptation":
                adaptation.plot_adaptation(rows, out / f"{name}.png")
            kept = RowFile(options.rows, type(rows[0])).measured
            used = [one for one in kept if set(one.rows) & set(rows)]
            file = out / f"{name}.md"
            file.write_text(
                f"{write_markdown(table, rows)}\n" + "  \n".join(done) + f"\n\n{provenance(used)}\n"
            )
        if not rows:
            raise ConfigError(f"--data must hold a set of the table {name}, found none in {data}")
        written.append(file)
    return written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--out", type=Path, required=True, help="folder for tables and plots")
    parser.add_argument(
        "--only", default=",".join(README_TABLES), metavar="NAME,...", help="some of the tables"
    )
    parser.add_argument("--model", default="tiny", help="a name, or a checkpoint's path")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--weights-dir", type=Path, default=Path("data/weights"))


def run(options: argparse.Namespace) -> list[Path]:
    """Measure as the command line says."""
    names = options.only.split(",")
    if unknown := set(names) - set(README_TABLES):
        raise ConfigError(f"--only must be some of {','.join(README_TABLES)}, got {unknown.pop()}")
    return measure_all(
        {name: README_TABLES[name] for name in names},
        data=options.data,
        out=options.out,
        model_arguments=(
            *("--model", options.model, "--device", options.device),
            *("--weights-dir", str(options.weights_dir)),
        ),
    )
