"""The command line: `python -m sam_ext.evaluate TABLE ...`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

import sam_ext.evaluate
from sam_ext.evaluate import adaptation, prompts, resolution
from sam_ext.evaluate.common import print_rows

__all__ = ["main"]

_TABLES = {"prompts": prompts, "resolution": resolution, "adaptation": adaptation}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m sam_ext.evaluate", description=sam_ext.evaluate.__doc__
    )
    tables = parser.add_subparsers(dest="table", required=True)
    for name, table in _TABLES.items():
        table.add_arguments(tables.add_parser(name, help=(table.__doc__ or "").splitlines()[0]))
    options = parser.parse_args(arguments)
    rows = _TABLES[options.table].run(options)
    print_rows(rows)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
