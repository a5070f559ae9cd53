"""Where the command line writes: results on stdout, messages of what goes on on stderr."""

from __future__ import annotations

import os
import sys

from rich.console import Console


def output_console() -> Console:
    """For results: as wide as the terminal; in a file or a pipe 100 columns."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=100) if piped else Console()


def say(console: Console, line: str) -> None:
    """One line as it is: no markup, no colours of numbers."""
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def note(line: str) -> None:
    """A message of what goes on, on stderr."""
    say(Console(stderr=True), line)
