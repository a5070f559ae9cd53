"""Command lines with ``key=value`` overrides anywhere among the flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def parse_with_words(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parse ``argv``; words that follow a flag's value join those before it in ``args.words``.

    argparse alone takes positional words of a sub-command in one run only. Unknown flags end
    the program with exit code 2, as argparse does.
    """
    args, rest = parser.parse_known_args(argv)
    flags = [word for word in rest if word.startswith("-")]
    if flags or (rest and not hasattr(args, "words")):
        parser.error(f"unrecognized arguments: {' '.join(flags or rest)}")
    if rest:
        args.words = [*args.words, *rest]
    return args
