"""Options that several algorithms share, and how they are checked (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from planner.run_config import ModelConfig, RunConfig
from profiles.errors import ConfigError

KL_ESTIMATORS = ("k1", "k2", "k3")
AGGREGATIONS = ("token", "sequence", "constant")


@dataclass
class RewardConfig(ModelConfig):
    """Where rewards come from: a reward model, or a function of the answer's text."""

    # model; vader (sentiment); package.module:function or path/to/file.py:function; or several of
    # them joined by + : their sum.
    source: str = "model"


@dataclass
class GenerationConfig:
    """Sampling of answers; answers are at most ``response_len`` tokens."""

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    greedy: bool = False
    min_new_tokens: int = 0


@dataclass
class PassesConfig:
    """How training goes through a step's batch: ``num_epochs * num_mini_batches`` optimizer steps.

    The first pass takes the prompts in the data's order, which is shuffled already; every later
    one in an order of its own that follows from (seed, step, pass).
    """

    num_mini_batches: int = 1  # optimizer steps of a pass over the batch
    num_epochs: int = 1  # passes over the batch


@dataclass
class PolicyConfig(PassesConfig):
    """The clipped loss of a policy, and its divergence from the reference."""

    clip: float = 0.2  # policy ratio is clipped to at least 1 - clip
    clip_high: float = 0.0  # and to at most 1 + clip_high; 0: as clip
    dual_clip: float = (
        0.0  # where the advantage is negative the loss is at most -A dual_clip; 0: off
    )
    # Losses of tokens are averaged over all tokens (token); over each answer, then over answers
    # (sequence); or summed and divided by answers * response_len (constant).
    aggregation: str = "token"
    kl_coef: float = 0.1  # beta of KL(pi, ref); 0: no reference
    kl_in: str = "reward"  # reward: -beta KL of each token; loss: + beta KL
    kl_estimator: str = "k1"  # k1: log p - log p_ref; k2: half its square; k3: Schulman's, >= 0
    kl_target: float = 0.0  # beta moves towards this KL of a whole answer; 0: it is fixed
    kl_horizon: int = 10000  # answers over which it moves by as much as KL is off, at most a fifth
    ref_average: float = 0.0  # share of the actor that the reference takes over after each step
    entropy_coef: float = 0.0  # of the bonus for the entropy of the next token
    # A mini-batch beyond a limit changes nothing and is the step's last; 0: no limit.
    max_ratio: float = 0.0  # of the mean policy ratio
    max_kl: float = 0.0  # of the mean divergence (k3) from the policy that answered


def check_passes(run: RunConfig, passes: PassesConfig, *, where: str) -> None:
    """Raise ``ConfigError`` unless every mini-batch gets at least one prompt of the step."""
    if not 1 <= passes.num_mini_batches <= run.batch_size:
        raise ConfigError(
            f"{passes.num_mini_batches} mini-batches of a batch of {run.batch_size}",
            where=f"{where}.num_mini_batches", remedy=f"use 1 to {run.batch_size}",
        )  # fmt: skip
    check_least(passes, 1, "num_epochs", where=where)


def check_policy(run: RunConfig, policy: PolicyConfig, *, where: str) -> None:
    """Raise ``ConfigError`` naming the first value out of range."""
    check_passes(run, policy, where=where)
    check_above(policy, 0, "clip", where=where)
    none_below_0 = ("clip_high", "kl_coef", "kl_target", "entropy_coef", "max_ratio", "max_kl")
    check_least(policy, 0, *none_below_0, where=where)
    check_least(policy, 1, "kl_horizon", where=where)
    check_choice(policy, "kl_in", ("reward", "loss"), where=where)
    check_choice(policy, "kl_estimator", KL_ESTIMATORS, where=where)
    check_choice(policy, "aggregation", AGGREGATIONS, where=where)
    if policy.dual_clip and not policy.dual_clip > 1:
        raise ConfigError(
            f"{policy.dual_clip} is not above 1", where=f"{where}.dual_clip",
            remedy="3 is usual, 0 is off",
        )  # fmt: skip
    check_share(policy, "ref_average", where=where)
    for name in ("kl_target", "ref_average"):
        if getattr(policy, name) and not policy.kl_coef:
            raise ConfigError(
                "there is no reference to be near to", where=f"{where}.{name}",
                remedy=f"set {where}.kl_coef to begin with",
            )  # fmt: skip


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


def _path(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
