"""Where the command line writes: results on stdout, messages of what goes on on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable

from rich import box
from rich.console import Console
from rich.table import Table


def output_console() -> Console:
    """For results: as wide as the terminal; in a file or a pipe 100 columns."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=100) if piped else Console()


def make_table(
    title: str | None, columns: Iterable[str], *, whole: Collection[str] = ()
) -> Table:  # fmt: skip
    """Narrow, so that it fits a terminal of 80 columns where it can.

    ``whole``: columns of numbers, to the right and never broken; the others fold where they must,
    so that nothing is left out.
    """
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )  # fmt: skip
    for name in columns:
        if name in whole:
            table.add_column(name, justify="right", no_wrap=True)
        else:
            table.add_column(name, overflow="fold")
    return table


def say(console: Console, line: str) -> None:
    """One line as it is: no markup, no colours of numbers."""
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def note(line: str) -> None:
    """A message of what goes on, on stderr."""
    say(Console(stderr=True), line)
