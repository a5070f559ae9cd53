"""Which rank works on which samples, and who sends what to whom: ``plan_transfers``.

A sample is a group of sequences that stays together (``plan.Workload``). Everything here is
integers: ``program.py`` makes instructions of it, ``simulate.py`` prices it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from planner.graph import CallKind, ModelFunctionCall
from planner.plan import ExecutionPlan, Problem
from planner.strategy import ParallelStrategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """Samples (numbers of whole groups) that go to, or come from, rank ``peer``."""

    peer: int
    samples: tuple[int, ...]


# Receiving rank -> what it lacks, each parcel with the rank that sends it.
Arrivals = Mapping[int, Sequence[Parcel]]


def split_evenly(count: int, parts: int) -> list[range]:
    """``range(count)`` in ``parts`` runs whose lengths differ by at most one.

    >>> [list(r) for r in split_evenly(5, 2)]
    [[0, 1, 2], [3, 4]]
    """
    base, extra = divmod(count, parts)
    bounds = [part * base + min(part, extra) for part in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(bounds)]


def assign_samples(batch_size: int, dp: int, num_mini_batches: int = 1) -> list[list[range]]:
    """Samples of each data-parallel rank, by mini-batch: ``[dp_rank][mini_batch]``.

    Mini-batches are runs of the batch, whatever dp is, and each is split evenly over dp; so the
    optimizer takes the same steps under every plan.

    >>> assign_samples(8, 2, 2)
    [[range(0, 2), range(4, 6)], [range(2, 4), range(6, 8)]]
    """
    mini_batches = split_evenly(batch_size, num_mini_batches)
    return [
        [range(m.start + part.start, m.start + part.stop) for m, part in zip(mini_batches, row)]
        for row in zip(*(split_evenly(len(m), dp) for m in mini_batches), strict=True)
    ]


def samples_of(problem: Problem, call: ModelFunctionCall, dp: int) -> list[tuple[int, ...]]:
    """All samples that each data-parallel rank of ``call`` works on."""
    mini = call.num_mini_batches if call.kind is CallKind.TRAIN else 1
    parts = assign_samples(problem.workload.batch_size, dp, mini)
    return [tuple(s for run in runs for s in run) for runs in parts]


def producing_ranks(
    call: ModelFunctionCall, strategy: ParallelStrategy, first: int
) -> list[list[int]]:
    """Ranks that hold the outputs of each data-parallel rank's samples.

    Generation tells every rank of the replica; inference ends on the last stage.
    """
    s = strategy
    stages = range(s.pp) if call.kind is not CallKind.INFER else range(s.pp - 1, s.pp)
    return [
        [first + s.rank(stage, dp_rank, tp_rank) for stage in stages for tp_rank in range(s.tp)]
        for dp_rank in range(s.dp)
    ]


def readers_of(problem: Problem, consumer: str) -> dict[str, tuple[str, ...]]:
    """Keys that a call reads, by the call that produces them, in the graph's order."""
    graph = problem.graph
    found: dict[str, tuple[str, ...]] = {}
    for call in graph.calls:
        keys = tuple(key for key in graph.call(consumer).inputs if key in call.outputs)
        if keys:
            found[call.name] = keys
    return found


def plan_transfers(plan: ExecutionPlan) -> dict[tuple[str, str], Arrivals]:
    """(producer, consumer) -> what has to be sent, for pairs where something has."""
    graph, dealer = plan.problem.graph, _Dealer(plan)
    found: dict[tuple[str, str], Arrivals] = {}
    for call in graph.calls:
        for producer, keys in readers_of(plan.problem, call.name).items():
            arrivals = dealer.missing(graph.call(producer), call, keys)
            if arrivals:
                found[(producer, call.name)] = arrivals
        dealer.record_outputs(call)
    return found


def handed_over(before: ExecutionPlan, after: ExecutionPlan, call: ModelFunctionCall) -> Arrivals:
    """What ``before`` made in ``call`` and ranks lack that hold its outputs under ``after``.

    Both plans are of one problem; the devices of one may be some of the other's.
    """
    here, there = (plan.allocations[call.name] for plan in (before, after))
    cluster = max((p.problem.cluster for p in (before, after)), key=lambda c: c.num_devices)
    held: dict[int, set[int]] = defaultdict(set)  # rank -> samples
    holders: dict[int, list[int]] = {}  # sample -> ranks
    of_replicas = producing_ranks(call, here.strategy, here.mesh.first)
    for ranks, owned in zip(
        of_replicas, samples_of(before.problem, call, here.strategy.dp), strict=True
    ):
        holders.update(dict.fromkeys(owned, ranks))
        for rank in ranks:
            held[rank].update(owned)
    found: dict[int, list[Parcel]] = {}
    wanted = producing_ranks(call, there.strategy, there.mesh.first)
    for ranks, owned in zip(
        wanted, samples_of(after.problem, call, there.strategy.dp), strict=True
    ):
        for rank in ranks:
            from_rank: dict[int, list[int]] = defaultdict(list)
            for sample in owned:
                if sample not in held[rank]:
                    giver = _nearest(holders[sample], rank, cluster.node_of)
                    from_rank[giver].append(sample)
            for giver, samples in from_rank.items():
                found.setdefault(rank, []).append(Parcel(peer=giver, samples=tuple(samples)))
    return found


def _nearest(holders: Sequence[int], rank: int, node_of: Callable[[int], int]) -> int:
    """A holder on the rank's own node, else any; spread over the holders by rank."""
    near = [h for h in holders if node_of(h) == node_of(rank)]
    candidates = near or holders
    return candidates[rank % len(candidates)]


class _Dealer:
    """Who holds what as a step goes on; lives for one ``plan_transfers``."""

    def __init__(self, plan: ExecutionPlan) -> None:
        self.plan = plan
        self.problem = plan.problem
        cluster = plan.problem.cluster
        self.nodes = [cluster.node_of(device) for device in range(cluster.num_devices)]
        self.held: dict[tuple[int, str], set[int]] = defaultdict(set)  # (rank, key) -> samples

    def record_outputs(self, call: ModelFunctionCall) -> None:
        allocation = self.plan.allocations[call.name]
        ranks = producing_ranks(call, allocation.strategy, allocation.mesh.first)
        samples = samples_of(self.problem, call, allocation.strategy.dp)
        for holders, owned in zip(ranks, samples, strict=True):
            for rank in holders:
                for key in call.outputs:
                    self.held[(rank, key)].update(owned)

    def missing(
        self, producer: ModelFunctionCall, consumer: ModelFunctionCall, keys: Iterable[str]
    ) -> dict[int, list[Parcel]]:
        """By receiving rank the samples of which it lacks some of ``keys``; it has them then.

        A rank that lacks one key of a sample is sent all of that producer's.
        """
        keys = tuple(keys)
        source, target = (self.plan.allocations[c.name] for c in (producer, consumer))
        holders = producing_ranks(producer, source.strategy, source.mesh.first)
        replica_of = {
            sample: dp_rank
            for dp_rank, owned in enumerate(samples_of(self.problem, producer, source.strategy.dp))
            for sample in owned
        }
        needed = samples_of(self.problem, consumer, target.strategy.dp)
        found: dict[int, list[Parcel]] = {}
        for rank in target.mesh.devices:
            _, dp_rank, _ = target.strategy.coordinates(rank - target.mesh.first)
            have = set.intersection(*(self.held[(rank, key)] for key in keys))
            missing: dict[int, list[int]] = defaultdict(list)
            for sample in needed[dp_rank]:
                if sample not in have:
                    missing[replica_of[sample]].append(sample)
            for replica, samples in missing.items():
                giver = _nearest(holders[replica], rank, self.nodes.__getitem__)
                found.setdefault(rank, []).append(Parcel(peer=giver, samples=tuple(samples)))
                for key in keys:
                    self.held[(rank, key)].update(samples)
        return found
