"""Rewards that are functions of an answer: ``f(prompt, answer, record) -> float``.

``record`` is the prompt's line of the data file, with ``answer_ids`` (the answer's tokens) and
``where`` (file:line) added.
A function with an attribute ``takes_lists = True`` is called once for many answers instead:
``f(prompts, answers, records) -> one number an answer``.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from executor.optional import optional_package
from planner.algorithm import import_file
from profiles.errors import ConfigError

Record = Mapping[str, Any]
RewardFunction = Callable[[str, str, Record], float]


def rewards_of(function: Callable[..., Any], records: Sequence[Record]) -> list[float]:
    """The function's reward of every record, which has ``prompt`` and ``answer``.

    Raises:
        ConfigError: a reward is not a finite number (names the sample), or a function of lists
            gives another number of rewards than there are answers.
    """
    if getattr(function, "takes_lists", False):
        prompts, answers = [r["prompt"] for r in records], [r["answer"] for r in records]
        found = list(function(prompts, answers, records))
        if len(found) != len(records):
            raise ConfigError(
                f"{len(found)} rewards of {len(records)} answers", where="reward.source",
                remedy="a function with takes_lists returns one number for every answer",
            )  # fmt: skip
    else:
        found = [function(r["prompt"], r["answer"], r) for r in records]
    return [_finite(value, record) for value, record in zip(found, records, strict=True)]


def _finite(value: Any, record: Record) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(
            f"the reward of sample {record.get('id', '?')} is {value!r}",
            where=record.get("where") or "reward.source",
            remedy="rewards must be finite numbers: mend the line or reward.source",
        )  # fmt: skip
    return number


def share_of_even_tokens(prompt: str, answer: str, record: Record) -> float:
    """How many of the answer's token ids are even, in [0, 1]: needs no tokenizer."""
    ids = record["answer_ids"]
    return sum(i % 2 == 0 for i in ids) / max(1, len(ids))


def share_of_distinct_words(prompt: str, answer: str, record: Record) -> float:
    """Distinct words among the answer's words, in [0, 1]; 0 of an empty answer.

    Distinct-1 of Li et al. 2016 (arXiv:1510.03055): low where an answer repeats itself.
    """
    words = answer.lower().split()
    return len(set(words)) / max(1, len(words))


def vader() -> RewardFunction:
    """The compound sentiment of the answer in [-1, 1] (Hutto and Gilbert 2014).

    Raises:
        ConfigError: the package vaderSentiment is not installed.
    """
    package = optional_package(
        "vaderSentiment.vaderSentiment", where="reward.source=vader",
        remedy="pip install vaderSentiment",
    )  # fmt: skip
    analyzer = package.SentimentIntensityAnalyzer()

    def reward(prompt: str, answer: str, record: Record) -> float:
        return float(analyzer.polarity_scores(answer)["compound"])

    return reward


def load_reward(source: str) -> RewardFunction:
    """``vader``; ``package.module:function``, found by ``import``; or ``path/to/file.py:function``.

    Raises:
        ConfigError: no such module, file or function.
    """
    if source == "vader":
        return vader()
    module_name, _, name = source.rpartition(":")
    where = f"reward.source={source}"
    remedy = "use model, vader, package.module:function or path/to/file.py:function"
    if not name or not module_name or (module_name.startswith(".") and "/" not in module_name):
        raise ConfigError("not a reward", where=where, remedy=remedy)
    if module_name.endswith(".py"):
        module = import_file(Path(module_name).resolve())
    else:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ConfigError(f"no module '{error.name}'", where=where, remedy=remedy) from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"no function '{name}' in {module_name}", where=where, remedy=remedy)
    reward: RewardFunction = function
    return reward
