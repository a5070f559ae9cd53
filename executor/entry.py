"""The command ``realexec`` until it is loaded: no traceback for Ctrl-C or where torch is absent."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from realplan import loading

_EXTRA = frozenset({"torch", "transformers", "safetensors"})


def main(argv: Sequence[str] | None = None) -> int:
    """``executor.cli.main``, once what it needs is there."""
    try:
        with loading("realexec"):  # torch takes seconds
            from executor.cli import main as cli_main
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        print(
            f"realexec: {error.name} is not installed; pip install 'realplan[executor]'",
            file=sys.stderr,
        )
        return 2
    return cli_main(argv)


if __name__ == "__main__":
    sys.exit(main())
