"""The command line: `python -m sam_ext.evaluate TABLE ...`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console

import sam_ext.evaluate
from sam_ext.evaluate import everything
from sam_ext.evaluate.common import print_rows

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print, and write files where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m sam_ext.evaluate", description=sam_ext.evaluate.__doc__
    )
    tables = parser.add_subparsers(dest="table", required=True)
    for name, module in {**everything.TABLES, "all": everything}.items():
        module.add_arguments(tables.add_parser(name, help=(module.__doc__ or "").splitlines()[0]))
    options = parser.parse_args(arguments)
    if options.table == "all":
        for file in everything.run(options):
            Console().print(file, soft_wrap=True)
        return
    rows = everything.TABLES[options.table].run(options)
    print_rows(rows)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if options.markdown is not None:
        options.markdown.write_text(everything.write_markdown(options.table, rows))


if __name__ == "__main__":
    main()
