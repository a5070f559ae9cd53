"""Command lines: ``key=value`` overrides anywhere among the flags, and the numbers of flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from profiles.errors import ConfigError


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


def whole(text: str, flag: str, *, least: int) -> int:
    """A whole number of a flag.

    Raises:
        ConfigError: it is none, or below ``least``.
    """
    try:
        number = int(text)
    except ValueError:
        raise ConfigError(
            f"'{text}' is not a whole number", where=flag, remedy="write it like 8"
        ) from None
    if number < least:
        raise ConfigError(f"{number} is below {least}", where=flag, remedy=f"use {least} or more")
    return number


def seconds(text: str, flag: str) -> float:
    """A positive, finite number of seconds of a flag; raises ``ConfigError``."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise ConfigError(f"'{text}' is not a number of seconds above 0", where=flag)
    return number
