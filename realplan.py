"""The command ``realplan``, also ``python -m realplan``: ready for Ctrl-C before it loads.

It lies beside the packages, as importing anything of ``planner`` loads all that takes a second.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType


@contextmanager
def loading(command: str) -> Iterator[None]:
    """Ctrl-C ends the process at once, with a line of ``command`` and exit code 130.

    A library under way may take an exception for a mistake of its own.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        os.write(sys.stderr.fileno(), f"{command}: interrupted\n".encode())
        os._exit(130)

    # A job in the background ignores Ctrl-C, and goes on to.
    listens = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if listens:
        signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        if listens:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def main(argv: Sequence[str] | None = None) -> int:
    """``planner.cli.main``, once it is loaded."""
    with loading("realplan"):
        from planner.cli import main as cli_main
    return cli_main(argv)


if __name__ == "__main__":
    sys.exit(main())
