"""Errors that a user can mend: each says where, what is wrong, and what would be right.

The command line prints ``str(error)`` and exits with code 2. A mistake of ours is an assertion
or any other exception and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input: ``where`` (JSON path, file:line or flag), ``problem``, ``remedy``."""

    def __init__(self, problem: str, *, where: str = "", remedy: str = "") -> None:
        self.where = where
        self.problem = problem
        self.remedy = remedy
        super().__init__(problem)

    def __str__(self) -> str:
        head = f"{self.where}: {self.problem}" if self.where else self.problem
        return f"{head}; {self.remedy}" if self.remedy else head


class ConfigError(UserError):
    """A flag, an override or a model or cluster description is wrong."""


class PlanError(UserError):
    """A plan file breaks its schema or contradicts itself."""


class ProfileError(UserError):
    """A table of measured costs is damaged, foreign or does not hold what was asked."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete or of another model."""


class InfeasibleError(UserError):
    """No plan fits: the message names the role, the device and the bytes that lack."""


def unknown_name(what: str, name: str, known: Iterable[str], *, where: str) -> ConfigError:
    """The error for a name that is not among ``known``, with the nearest ones."""
    names = sorted(known)
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return ConfigError(
        f"unknown {what} '{name}'", where=where, remedy=f"{hint}known: {', '.join(names)}"
    )
