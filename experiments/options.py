"""Options that several algorithms share, and how they are checked (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from planner.run_config import ModelConfig, RunConfig
from profiles.errors import ConfigError


@dataclass
class RewardConfig(ModelConfig):
    """Where rewards come from: a reward model, or a function of the answer's text."""

    source: str = "model"  # model; vader (sentiment); or package.module:function


@dataclass
class GenerationConfig:
    """Sampling of answers; answers are at most ``response_len`` tokens."""

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    greedy: bool = False
    min_new_tokens: int = 0


def check_least(owner: Any, least: float, *names: str, where: str = "") -> None:
    """Raise ``ConfigError`` naming the first of ``names`` that is below ``least``."""
    for name in names:
        if not getattr(owner, name) >= least:
            raise ConfigError(
                f"{getattr(owner, name)} is not at least {least}", where=_path(where, name)
            )


def check_above(owner: Any, bound: float, *names: str, where: str = "") -> None:
    """Raise ``ConfigError`` naming the first of ``names`` that is not above ``bound``."""
    for name in names:
        if not getattr(owner, name) > bound:
            raise ConfigError(
                f"{getattr(owner, name)} is not above {bound}", where=_path(where, name)
            )


def check_share(owner: Any, *names: str, where: str = "") -> None:
    """Raise ``ConfigError`` naming the first of ``names`` outside [0, 1]."""
    for name in names:
        if not 0 <= getattr(owner, name) <= 1:
            raise ConfigError(f"{getattr(owner, name)} is not in [0, 1]", where=_path(where, name))


def check_choice(owner: Any, name: str, choices: tuple[str, ...], *, where: str = "") -> None:
    """Raise ``ConfigError`` unless the text ``name`` is one of ``choices``."""
    if getattr(owner, name) not in choices:
        raise ConfigError(
            f"'{getattr(owner, name)}' is unknown", where=_path(where, name),
            remedy=f"use one of {', '.join(choices)}",
        )  # fmt: skip


def check_mini_batches(run: RunConfig, num_mini_batches: int, *, where: str) -> None:
    """Raise ``ConfigError`` unless every mini-batch gets at least one prompt of the step."""
    if not 1 <= num_mini_batches <= run.batch_size:
        raise ConfigError(
            f"{num_mini_batches} mini-batches of a batch of {run.batch_size}",
            where=f"{where}.num_mini_batches", remedy=f"use 1 to {run.batch_size}",
        )  # fmt: skip


def _path(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
