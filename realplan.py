"""The command ``realplan``, also ``python -m realplan``: ready for Ctrl-C before it loads.

It lies beside the packages, as importing anything of ``planner`` loads all that takes a second.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:
    """At once: a library under way may take an exception for a mistake of its own."""
    os.write(sys.stderr.fileno(), b"realplan: interrupted\n")
    os._exit(130)


def main(argv: Sequence[str] | None = None) -> int:
    """``planner.cli.main``, once it is loaded."""
    # A job in the background ignores Ctrl-C, and goes on to.
    listens = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if listens:
        signal.signal(signal.SIGINT, _leave)
    from planner.cli import main as cli_main

    if listens:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli_main(argv)


if __name__ == "__main__":
    sys.exit(main())
