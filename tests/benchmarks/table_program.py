"""A program that judges models one by one, prints a row of each, and writes the table to a page."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

Row = TypeVar("Row")


def line(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [line(heads), "|---" * len(heads) + "|", *(line(row) for row in rows)]


def run(
    program: str,
    judges: Mapping[str, Callable[[], Row]],
    text: Callable[[Row], str],
    page: Callable[[Sequence[Row], str], str],
    is_fault: Callable[[Row], bool],
) -> int:
    """Judge the models that are named on the command line, or all of `judges`, as `python -m
    program [NAME ...] [--markdown FILE]`; 1 where there is a fault. `page` gets the rows and the
    command."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}")
    parser.add_argument("names", nargs="*", metavar="NAME", help="models; all unless given")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in judges]:
        parser.error(f"no such model: {', '.join(unknown)}. There are {', '.join(judges)}")
    warnings.simplefilter("ignore")
    rows: dict[str, Row] = {}
    for name in (name for name in judges if not given.names or name in given.names):
        begin = time.perf_counter()
        rows[name] = judges[name]()
        print(text(rows[name]), flush=True)
        print(f"{time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    if given.markdown:
        command = " ".join([f"python -m {program}", *sys.argv[1:]])
        given.markdown.write_text(page(list(rows.values()), command))
    faults = [name for name, row in rows.items() if is_fault(row)]
    print(f"\n{len(rows)} models, {len(faults)} faults {' '.join(faults)}")
    return 1 if faults else 0
