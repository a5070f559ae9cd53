"""Rewards that are functions of an answer: ``f(prompt, answer, record) -> float``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from profiles.errors import ConfigError

RewardFunction = Callable[[str, str, Mapping[str, Any]], float]


def vader() -> RewardFunction:
    """The compound sentiment of the answer in [-1, 1] (Hutto and Gilbert 2014).

    Raises:
        ConfigError: the package vaderSentiment is not installed.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise ConfigError(
            "the package vaderSentiment is not installed", where="reward.source=vader",
            remedy="pip install vaderSentiment",
        ) from None  # fmt: skip
    analyzer = SentimentIntensityAnalyzer()

    def reward(prompt: str, answer: str, record: Mapping[str, Any]) -> float:
        return float(analyzer.polarity_scores(answer)["compound"])

    return reward


def load_reward(source: str) -> RewardFunction:
    """``vader``, or ``package.module:function``.

    Raises:
        ConfigError: no such module or function.
    """
    if source == "vader":
        return vader()
    module_name, _, name = source.partition(":")
    where = f"reward.source={source}"
    remedy = "use model, vader or package.module:function"
    if not name:
        raise ConfigError("not a reward", where=where, remedy=remedy)
    try:
        function = getattr(importlib.import_module(module_name), name, None)
    except ModuleNotFoundError as error:
        raise ConfigError(f"no module '{error.name}'", where=where, remedy=remedy) from None
    if not callable(function):
        raise ConfigError(f"no function '{name}' in {module_name}", where=where, remedy=remedy)
    reward: RewardFunction = function
    return reward
