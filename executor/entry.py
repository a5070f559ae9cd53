"""``realexec`` where only the planner is installed: one sentence instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_EXTRA = frozenset({"torch", "transformers", "safetensors"})


def main(argv: Sequence[str] | None = None) -> int:
    """``executor.cli.main``, once what it needs is there."""
    try:
        from executor.cli import main as cli_main
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        print(
            f"realexec: {error.name} is not installed; pip install 'realplan[executor]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:  # torch takes seconds to load
        print("realexec: interrupted", file=sys.stderr)
        return 130
    return cli_main(argv)
