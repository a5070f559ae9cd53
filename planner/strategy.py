"""``ParallelStrategy``: how one call is split over its mesh, and which splits a model allows.

Convention, used everywhere: inside a mesh
``rank = (pp_rank * dp + dp_rank) * tp + tp_rank``; tp is innermost, so it stays in a node.
With pp 2, dp 1, tp 2 the four ranks are (pp, tp) = (0,0) (0,1) (1,0) (1,1).

Experts are split over ``ep`` neighbouring data-parallel ranks, which hold everything else alike:
``ep_rank = dp_rank % ep``. Of dp 4, ep 2 and 8 experts, dp ranks 0 and 2 hold experts 0 to 3, and
1 and 3 hold 4 to 7: gradients of experts are summed over dp / ep ranks, all others over dp.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Literal, get_args

from planner.mesh import DeviceMesh
from profiles.errors import PlanError
from profiles.hardware import Cluster
from profiles.models import ModelSpec

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ParallelStrategy:
    """``pp * tp * dp`` devices: pipeline stages, tensor shards, data-parallel replicas.

    ``zero`` is the ZeRO stage of a TRAIN call: 0 replicates the optimizer, 1 shards it over dp.
    ``recompute`` drops activations in the forward pass and recomputes them backward: those of a
    whole block (full), or only those that are large and cheap to make again (selective).
    ``sequence_parallel`` splits what lies between tensor-parallel parts over their tokens.
    ``ep`` splits a model's experts over so many of the dp ranks, which send each other tokens.
    """

    pp: int = 1
    tp: int = 1
    dp: int = 1
    zero: int = 0
    recompute: Recompute = "none"
    sequence_parallel: bool = False
    # In a plan's file it may be left out: most models have no experts.
    ep: int = field(default=1, metadata={"optional": True})

    def __post_init__(self) -> None:
        for axis in ("pp", "tp", "dp", "ep"):
            value = getattr(self, axis)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PlanError(f"{axis} is {value!r}, not a positive whole number")
        if self.dp % self.ep:
            raise PlanError(
                f"ep {self.ep} does not divide dp {self.dp}",
                remedy="experts are split over data-parallel ranks",
            )
        if self.zero not in (0, 1):
            raise PlanError(f"ZeRO stage {self.zero!r} is not supported", remedy="use 0 or 1")
        if self.recompute not in get_args(Recompute):
            raise PlanError(
                f"recompute is {self.recompute!r}", remedy=f"use {', '.join(get_args(Recompute))}"
            )
        if self.sequence_parallel and self.tp == 1:
            raise PlanError("sequence_parallel without tp", remedy="it splits over tp: raise tp")

    @property
    def num_devices(self) -> int:
        return self.pp * self.tp * self.dp

    @property
    def short(self) -> str:
        """``d4p2m1``: dp 4, pp 2, tp 1, as users of the prior system write it; with ep

        ``d4p2m1e2``.
        """
        return f"d{self.dp}p{self.pp}m{self.tp}" + (f"e{self.ep}" if self.ep > 1 else "")

    def rank(self, pp_rank: int, dp_rank: int, tp_rank: int) -> int:
        """The place inside the mesh."""
        return (pp_rank * self.dp + dp_rank) * self.tp + tp_rank

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(pp_rank, dp_rank, tp_rank) of a place inside the mesh."""
        return rank // (self.dp * self.tp), rank // self.tp % self.dp, rank % self.tp


def looks_like_strategy(text: str) -> bool:
    """Letters of axes with numbers, and nothing else?"""
    return re.fullmatch(r"([dpme]\d+)+", text) is not None


def parse_strategy(text: str, *, where: str = "--layout") -> ParallelStrategy:
    """``d4p2m1`` in any order of its letters; with experts split, ``d4p2m1e2``.

    >>> parse_strategy("p2d4m1").short
    'd4p2m1'

    Raises:
        PlanError: a letter is missing, doubled or unknown, or ep does not divide dp.
    """
    parts = re.findall(r"([dpme])(\d+)", text)
    letters = sorted(letter for letter, _ in parts)
    known = letters in (["d", "m", "p"], ["d", "e", "m", "p"])
    if not looks_like_strategy(text) or not known:
        raise PlanError(
            f"'{text}' is not a layout", where=where,
            remedy="write dp, pp and tp like d4p2m1, and ep like d4p2m1e2",
        )  # fmt: skip
    size = {letter: int(number) for letter, number in parts}
    try:
        return ParallelStrategy(dp=size["d"], pp=size["p"], tp=size["m"], ep=size.get("e", 1))
    except PlanError as error:
        raise PlanError(error.problem, where=where, remedy=error.remedy) from None


@lru_cache(maxsize=1024)
def stage_layers(num_layers: int, pp: int) -> tuple[range, ...]:
    """Blocks of each pipeline stage, the first stages taking the remainder.

    >>> [len(r) for r in stage_layers(10, 4)]
    [3, 3, 2, 2]
    """
    if not 1 <= pp <= num_layers:
        raise PlanError(f"pp {pp} for {num_layers} layers", remedy=f"pp must be 1 to {num_layers}")
    base, extra = divmod(num_layers, pp)
    bounds = [stage * base + min(stage, extra) for stage in range(pp + 1)]
    return tuple(range(a, b) for a, b in pairwise(bounds))


def tensor_parallel_problem(spec: ModelSpec, tp: int) -> str | None:
    """Why ``tp`` does not divide the model, or None where it does.

    Kv heads need not divide, shards then share some; nor the vocabulary, of which shards then
    hold one row more or less (``planner.layout``).
    """
    for what, size in (
        ("heads", spec.num_heads),
        ("feed-forward columns", spec.ffn),
        ("columns of the shared expert", spec.shared_ffn),
    ):
        if size % tp:
            return f"tp {tp} does not divide the {size} {what} of {spec.name}"
    return None


def expert_parallel_problem(spec: ModelSpec | None, ep: int) -> str | None:
    """Why the experts of ``spec`` cannot be split over ``ep`` ranks, or None."""
    if ep == 1:
        return None
    if spec is None or not spec.num_experts:
        return f"ep {ep}, but {spec.name if spec else 'a function call'} has no experts"
    if spec.num_experts % ep:
        return f"ep {ep} does not divide the {spec.num_experts} experts of {spec.name}"
    return None


def strategy_problem(
    spec: ModelSpec | None, strategy: ParallelStrategy, mesh: DeviceMesh, cluster: Cluster
) -> str | None:
    """Why ``strategy`` cannot run ``spec`` on ``mesh``, or None. ``spec`` None: a FUNCTION call."""
    s = strategy
    if s.num_devices != mesh.num_devices:
        return (
            f"pp {s.pp} x tp {s.tp} x dp {s.dp} = {s.num_devices} devices, "
            f"but mesh {mesh} has {mesh.num_devices}"
        )
    if (reason := expert_parallel_problem(spec, s.ep)) is not None:
        return reason
    if spec is None:
        return None if s.pp == s.tp == 1 else "a function call is split over dp only"
    if s.pp > spec.num_layers:
        return f"pp {s.pp} for {spec.num_layers} layers of {spec.name}"
    nodes = cluster.group_of(mesh.first)
    if s.tp > nodes.devices_per_node:
        return f"tp {s.tp} leaves a node of {nodes.devices_per_node} devices"
    # A mesh is a part of one node, or whole nodes.
    if mesh.num_devices > nodes.devices_per_node and nodes.devices_per_node % s.tp:
        return f"tp {s.tp} does not divide a node of {nodes.devices_per_node} devices"
    return tensor_parallel_problem(spec, s.tp)


def legal_strategies(
    spec: ModelSpec | None, mesh: DeviceMesh, cluster: Cluster, *, max_dp: int
) -> Iterator[ParallelStrategy]:
    """Every (pp, tp, dp) that ``strategy_problem`` allows, with dp <= ``max_dp``, zero 0, ep 1."""
    count = mesh.num_devices
    for tp in (t for t in range(1, count + 1) if count % t == 0):
        rest = count // tp
        for pp in (p for p in range(1, rest + 1) if rest % p == 0):
            strategy = ParallelStrategy(pp=pp, tp=tp, dp=rest // pp)
            if strategy.dp <= max_dp and not strategy_problem(spec, strategy, mesh, cluster):
                yield strategy
