"""``key=value`` words of a search: those for the planner apart from those of the algorithm.

| word | meaning |
| --- | --- |
| ``lock.CALL=plan.json`` | the call's allocation of that plan |
| ``lock.CALL.mesh=[0,8]`` | first device, number of devices |
| ``lock.CALL.strategy=d4p1m2`` | dp, pp, tp; with experts split over 2 ranks ``d4p1m2e2`` |
| ``lock.CALL=d4p1m2`` | the same |
| ``lock.CALL.num_micro_batches=4`` | as in a plan |
| ``lock.CALL.offload=true`` | as in a plan |
| ``memory_limit=70GiB`` | of each device, at most what it has |
| ``max_staleness=1`` | generation may run a step ahead, on weights that lack one update |
| ``offload=false`` | nothing is in the host's memory between calls, whatever would pay |
| ``gap=0.02`` | stop when at most this share of a step can be saved |
| ``cluster.inter_link.bytes_per_s=12.5GB`` | any field of the cluster |
| ``cluster.groups.0.device.memory_bytes=40GiB`` | of a cluster of groups, any field of one |

All other words are the algorithm's options.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from planner.cluster_file import override_cluster
from planner.graph import DataflowGraph
from planner.lock import Lock
from planner.mesh import DeviceMesh
from planner.plan_schema import load_plan
from planner.strategy import looks_like_strategy, parse_strategy
from profiles.errors import ConfigError, PlanError, unknown_name
from profiles.hardware import Cluster
from profiles.units import format_bytes, parse_bytes

DEFAULT_GAP = 0.01  # as search's
_PLANNER_WORDS = ("lock", "memory_limit", "max_staleness", "offload", "gap", "cluster")
_LOCK_FIELDS = ("mesh", "strategy", "num_micro_batches", "offload")


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """What the words of a search say; see the module. ``algorithm``: words left for its config."""

    locks: Mapping[str, Lock] = field(default_factory=dict)
    memory_limit_bytes: int | None = None
    max_staleness: int = 0
    offload: bool = True
    gap: float = DEFAULT_GAP
    cluster: Mapping[str, Any] = field(default_factory=dict)
    algorithm: tuple[str, ...] = ()

    def on(self, cluster: Cluster) -> Cluster:
        """``cluster`` with its fields and its memory as the words say.

        Raises:
            ConfigError: no such field, a value that it cannot have, or a limit above the memory.
        """
        changed = override_cluster(cluster, self.cluster) if self.cluster else cluster
        limit_bytes = self.memory_limit_bytes
        if limit_bytes is None:
            return changed
        device = max((g.device for g in changed.groups), key=lambda device: device.memory_bytes)
        if limit_bytes > device.memory_bytes:
            raise ConfigError(
                f"{format_bytes(limit_bytes)} is above the {format_bytes(device.memory_bytes)} of "
                f"{device.name}",
                where="memory_limit",
                remedy="a device that has more is cluster.device.memory_bytes=…",
            )
        return changed.with_memory_limit(limit_bytes)

    def check_calls(self, graph: DataflowGraph) -> None:
        """Raise ``ConfigError`` where a lock names no call of ``graph``."""
        names = [call.name for call in graph.calls]
        for name in self.locks:
            if name not in names:
                raise unknown_name("call", name, names, where=f"lock.{name}")


def parse_overrides(words: Sequence[str]) -> Overrides:
    """Sort the words; those of the algorithm are not looked into.

    >>> parse_overrides(["gap=0.02", "ppo.kl_coef=0.1"]).algorithm
    ('ppo.kl_coef=0.1',)

    Raises:
        ConfigError, PlanError: a word of the planner's that cannot be understood.
    """
    algorithm: list[str] = []
    found = Overrides()
    for word in words:
        key = word.partition("=")[0].strip()
        if key.partition(".")[0] not in _PLANNER_WORDS or "=" not in word:
            algorithm.append(word)
            continue
        found = _with(found, key, _value(word), word)
    return replace(found, algorithm=tuple(algorithm))


def _value(word: str) -> Any:
    """The right-hand side in Hydra's grammar: numbers, lists, texts."""
    try:
        (override,) = OverridesParser.create().parse_overrides([word])
        if override.is_delete() or override.is_sweep_override() or override.is_add():
            raise ConfigError("only key=value is understood", where=f"override '{word}'")
        return override.value()
    except HydraException as error:
        first = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(first, where=f"override '{word}'", remedy="write key=value") from None


def _with(found: Overrides, key: str, value: Any, word: str) -> Overrides:
    head, _, path = key.partition(".")
    if head == "lock":
        name, _, part = path.partition(".")
        if not name:
            raise ConfigError("names no call", where=word, remedy="write lock.CALL=plan.json")
        lock = _locked(found.locks.get(name, Lock()), name, part, value)
        return replace(found, locks={**found.locks, name: lock})
    if head == "cluster" and path:
        return replace(found, cluster={**found.cluster, path: value})
    if head == "cluster" or path:
        remedy = "write cluster.FIELD=…" if head == "cluster" else f"write {head}=…"
        raise ConfigError("is not understood", where=key, remedy=remedy)
    if head == "max_staleness":
        if type(value) is not int or value not in (0, 1):
            raise ConfigError(
                f"{value!r} steps are not planned", where="max_staleness", remedy="use 0 or 1"
            )
        return replace(found, max_staleness=value)
    if head == "offload":
        return replace(found, offload=_truth(value, "offload"))
    if head == "gap":
        return replace(found, gap=_gap(value))
    limit_bytes = parse_bytes(str(value), where="memory_limit")
    if limit_bytes < 1:
        raise ConfigError("is not above 0", where="memory_limit")
    return replace(found, memory_limit_bytes=limit_bytes)


def _truth(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{value!r} is not true or false", where=where)
    return value


def _gap(value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < 1:
        raise ConfigError(
            f"{value!r} is not from 0 to below 1", where="gap", remedy="0.02 stops at 2%"
        )
    return float(value)


def _locked(lock: Lock, name: str, part: str, value: Any) -> Lock:
    where = f"lock.{name}" + (f".{part}" if part else "")
    if not part and looks_like_strategy(str(value)):
        part = "strategy"
    if not part:
        return replace(lock, allocation=_allocation(str(value), name, where))
    if part == "mesh":
        whole = isinstance(value, list) and all(type(item) is int for item in value)
        if not whole or len(value) != 2:
            raise ConfigError(
                f"{value!r} is no mesh", where=where,
                remedy="write [first device,number of devices] like [0,8]",
            )  # fmt: skip
        return replace(lock, mesh=DeviceMesh(*value))
    if part == "strategy":
        return replace(lock, strategy=parse_strategy(str(value), where=where))
    if part == "num_micro_batches":
        if type(value) is not int or value < 1:
            raise ConfigError(f"{value!r} is not a positive whole number", where=where)
        return replace(lock, num_micro_batches=value)
    if part == "offload":
        return replace(lock, offload=_truth(value, where))
    raise unknown_name("part", part, _LOCK_FIELDS, where=where)


def _allocation(path: str, name: str, where: str) -> Any:
    if not os.path.isfile(path):  # of any text, as Path's is not
        raise ConfigError(
            f"'{path}' is neither a plan nor a layout", where=where,
            remedy="give a plan.json, or dp, pp and tp like d4p1m2",
        )  # fmt: skip
    plan = load_plan(path)
    if name not in plan.allocations:
        raise PlanError(
            f"{path} has no call {name}", where=where,
            remedy=f"it has {', '.join(sorted(plan.allocations))}",
        )  # fmt: skip
    return plan.allocations[name]
