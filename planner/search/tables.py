"""``make_tables``: an ``OptionSpace`` as the arrays that the kernels read.

``Index`` knows which option has which number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from planner.cost import MixedCosts
from planner.cost.transfer import crossing_end_s
from planner.graph import CallKind
from planner.memory import RESERVE_BYTES
from planner.mesh import DeviceMesh, MeshKind, kind_of
from planner.plan import Problem
from planner.search.choices import Choice
from planner.search.options import Assignment, Option, OptionSpace
from planner.search.records import (
    CALL,
    EVENT,
    MESH,
    NO_KEY,
    PAIR,
    RANGE,
    ROW,
    USE,
    Floats,
    Ints,
    Records,
    Scratch,
    Tables,
)  # fmt: skip
from planner.simulate import StepPrices, num_splits, sample_bytes
from planner.strategy import ParallelStrategy
from planner.transfers import readers_of
from profiles.hardware import Cluster
from profiles.models import ModelSpec

Axes = tuple[int, int, int, int, int]  # (group, pp, tp, dp, ep): what fixes a layout on a mesh


@dataclass(frozen=True, kw_only=True)
class Index:
    """Both ways between options and the numbers that the kernels know them by."""

    space: OptionSpace
    meshes: Sequence[DeviceMesh]
    rows: Sequence[tuple[int, MeshKind, Choice]]  # (call, kind of its meshes, choice)
    axes: Sequence[Axes]
    specs: Sequence[ModelSpec]
    mesh_of: dict[DeviceMesh, int]
    row_of: dict[tuple[int, int], int]  # (call, id of a choice)

    def vectors(self, assignment: Assignment) -> tuple[Ints, Ints]:
        """(mesh, row) of each call."""
        mesh = [self.mesh_of[option.mesh] for option in assignment]
        row = [self.row_of[(i, id(option.choice))] for i, option in enumerate(assignment)]
        return np.array(mesh, dtype=np.int64), np.array(row, dtype=np.int64)

    def assignment(self, mesh: Ints, row: Ints) -> Assignment:
        """The options of two vectors."""
        return tuple(self.option(i, int(m), int(r)) for i, (m, r) in enumerate(zip(mesh, row)))

    def option(self, call: int, mesh: int, row: int) -> Option:
        return self.space.option(self.space.calls[call].name, self.meshes[mesh], self.rows[row][2])


def make_index(space: OptionSpace) -> Index:
    meshes = [mesh for like in space.meshes_by_kind.values() for mesh in like]
    rows = [
        (i, kind, choice)
        for i, call in enumerate(space.calls)
        for kind in space.meshes_by_kind
        for choice in space.choices[call.name].get(kind, ())
    ]
    roles = [call.role for call in space.calls if call.role is not None]
    return Index(
        space=space,
        meshes=meshes,
        rows=rows,
        axes=sorted({(kind.group, *choice.axes) for _, kind, choice in rows}),
        specs=list(dict.fromkeys(space.problem.models[role] for role in roles)),
        mesh_of={mesh: n for n, mesh in enumerate(meshes)},
        row_of={(i, id(choice)): n for n, (i, _, choice) in enumerate(rows)},
    )


def make_tables(index: Index) -> Tables:
    """The arrays; see ``Tables`` for their shapes."""
    space, problem = index.space, index.space.problem
    cluster, calls = problem.cluster, space.calls
    kinds = list(space.meshes_by_kind)
    by_kind = [[index.mesh_of[m] for m in space.meshes_by_kind[kind]] for kind in kinds]
    allowed = np.zeros((len(calls), len(index.meshes)), dtype=np.bool_)
    for i, call in enumerate(calls):
        allowed[i, [index.mesh_of[mesh] for mesh in space.meshes[call.name]]] = True
    choices = [choice for _, _, choice in index.rows]
    copies = sorted({c.strategy.pp * c.strategy.tp for c in choices})
    segments = [_segments(choice) for choice in choices]
    pairs = _Pairs.of(problem)
    counts = [[len(space.choices[call.name].get(kind, ())) for kind in kinds] for call in calls]
    like, like_rows = _like(index)
    return Tables(
        num_devices=cluster.num_devices,
        reserve_bytes=float(RESERVE_BYTES[cluster.kind]),
        meshes=_meshes(index, kinds),
        kinds=_ranges([len(like) for like in by_kind]),
        kind_meshes=_ints([m for like in by_kind for m in like]),
        allowed=allowed,
        calls=_calls(index, pairs, allowed),
        call_meshes=np.nonzero(allowed)[1].astype(np.int64),
        average_of=_ints(
            [i for a in problem.graph.averages for i, call in enumerate(calls)
             if call.kind is CallKind.TRAIN and call.role == a.of]
        ),
        rows=_rows(index, segments, copies),
        row_ranges=_ranges([n for row in counts for n in row]).reshape(len(calls), len(kinds)),
        like=like,
        like_rows=like_rows,
        segment_end=_ints([end for found in segments for end, _ in found]),
        segment_bytes=np.array(
            [[b[column] for found in segments for _, b in found] for column in range(3)],
            dtype=float,
        ),
        most_bytes=np.array(
            [[max(b[column] for _, b in found) for found in segments] for column in range(3)],
            dtype=float,
        ),
        pairs=_records(
            PAIR,
            [(producer, *ends) for (producer, _), ends in zip(
                pairs.pairs, _spans([len(found) for found in pairs.readers]))],
        ),
        readers=_ints([reader for found in pairs.readers for reader in found]),
        transfer_s=_transfer_table(pairs.sample_bytes, copies, kinds, space.prices),
    )  # fmt: skip


def _meshes(index: Index, kinds: Sequence[MeshKind]) -> Records:
    cluster = index.space.problem.cluster
    reserve_bytes = RESERVE_BYTES[cluster.kind]
    found: list[tuple[float, ...]] = []
    for mesh in index.meshes:
        kind = kind_of(mesh, cluster)
        start, group = cluster.starts[kind.group], cluster.groups[kind.group]
        nodes = (group.node_of(device - start) for device in (mesh.first, mesh.devices[-1]))
        firsts = (start + node * group.devices_per_node for node in nodes)
        memory_bytes = group.device.memory_bytes
        found.append((
            mesh.first, mesh.first + mesh.num_devices, kinds.index(kind), kind.group, *firsts,
            memory_bytes, memory_bytes - reserve_bytes,
        ))  # fmt: skip
    return _records(MESH, found)


def _calls(index: Index, pairs: _Pairs, allowed: npt.NDArray[np.bool_]) -> Records:
    problem, calls = index.space.problem, index.space.calls
    graph, position = problem.graph, {call.name: i for i, call in enumerate(calls)}
    meshes = _spans(allowed.sum(axis=1).tolist())
    ends = _spans([sum(c == i for _, c in pairs.pairs) for i in range(len(calls))])
    found: list[tuple[int, ...]] = []
    for i, call in enumerate(calls):
        train = graph.train_call(call.role) if call.role is not None else None
        spec = problem.spec_of(call.name)
        averages = [n for n, a in enumerate(graph.averages) if a.role == call.role]
        found.append((
            -1 if train is None else position[train.name],
            int(call in graph.ahead),
            averages[0] if averages else -1,
            -1 if call.role is None else graph.roles.index(call.role),
            -1 if spec is None else index.specs.index(spec),
            int(call.kind is CallKind.INFER),
            *meshes[i], *ends[i],
        ))  # fmt: skip
    return _records(CALL, found)


def _rows(index: Index, segments: Sequence[Sequence[object]], copies: Sequence[int]) -> Records:
    place = {axes: n for n, axes in enumerate(index.axes)}
    spans = _spans([len(found) for found in segments])
    calls = index.space.calls
    dealt: dict[tuple[int, ...], int] = {}

    def samples(i: int, s: ParallelStrategy) -> int:
        # As ``simulate._placement``: where experts lie (ep) does not matter.
        key = (s.pp, s.tp, s.dp, num_splits(calls[i], s))
        return dealt.setdefault(key, len(dealt))

    return _records(ROW, [
        (c.seconds, c.reload_s, c.average_s, place[(kind.group, *c.axes)], c.strategy.pp,
         samples(i, c.strategy), copies.index(c.strategy.pp * c.strategy.tp), *span)
        for (i, kind, c), span in zip(index.rows, spans, strict=True)
    ])  # fmt: skip


def make_scratch(tables: Tables) -> Scratch:
    """Room for the evaluations of one thread."""
    num_calls = len(tables.calls)
    num_events = 4 * num_calls  # reallocations before calls, averages and those to them at the end
    return Scratch(
        events=np.zeros(num_events, dtype=EVENT),
        uses=np.zeros(num_calls, dtype=USE),
        after_s=np.zeros(len(tables.pairs)),
        weight_s=np.zeros((num_events, num_events)),
        missing=np.full(1, NO_KEY, dtype=np.int64),
    )


def _ints(values: Sequence[int]) -> Ints:
    return np.array(values, dtype=np.int64)


def _records(kind: np.dtype[np.void], values: Sequence[tuple[float, ...]]) -> Records:
    return np.array(values, dtype=kind)


def _spans(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(start, stop) of runs of these lengths, one after another."""
    stops = np.cumsum(counts, dtype=np.int64).tolist()
    return [(stop - count, stop) for count, stop in zip(counts, stops, strict=True)]


def _ranges(counts: Sequence[int]) -> Records:
    """(start, count) of runs of these lengths, one after another."""
    spans = zip(counts, _spans(counts), strict=True)
    return _records(RANGE, [(start, count) for count, (start, _) in spans])


def _segments(choice: Choice) -> list[tuple[int, tuple[int, int, int]]]:
    """(last stage + 1, bytes held, borrowed, running) of runs of stages with equal bytes."""
    stages = list(zip(choice.held, choice.borrowed, choice.running, strict=True))
    found, end = [], 0
    for values, run in groupby(stages):
        end += len(list(run))
        found.append((end, values))
    return found


def _like(index: Index) -> tuple[Records, Ints]:
    """(ranges [calls, axes], rows): rows of each call by their axes."""
    place = {axes: n for n, axes in enumerate(index.axes)}
    groups: dict[tuple[int, int], list[int]] = {
        (i, n): [] for i in range(len(index.space.calls)) for n in range(len(place))
    }
    for n, (i, kind, choice) in enumerate(index.rows):
        groups[(i, place[(kind.group, *choice.axes)])].append(n)
    ranges = _ranges([len(found) for found in groups.values()])
    rows = _ints([n for found in groups.values() for n in found])
    return ranges.reshape(-1, len(place)), rows


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """(producer, consumer) by consumer and then producer, and what ``transfer_bytes`` asks."""

    pairs: Sequence[tuple[int, int]]
    readers: Sequence[Sequence[int]]
    sample_bytes: Sequence[float]  # of all samples, once

    @classmethod
    def of(cls, problem: Problem) -> _Pairs:
        calls = problem.graph.step_calls
        position = {call.name: i for i, call in enumerate(calls)}
        pairs, readers, num_bytes = [], [], []
        for i, call in enumerate(calls):
            for producer, keys in readers_of(problem, call.name).items():
                pairs.append((position[producer], i))
                readers.append([j for j in range(i) if set(keys) <= set(calls[j].inputs)])
                num_bytes.append(problem.workload.batch_size * sample_bytes(problem, keys))
        return cls(pairs=pairs, readers=readers, sample_bytes=num_bytes)


def _transfer_table(
    sample_bytes: Sequence[float], copies: Sequence[int], kinds: Sequence[MeshKind],
    prices: StepPrices,
) -> Floats:  # fmt: skip
    """Seconds by pair, copies, kind of the smaller mesh, and whether it leaves a node.

    They depend on meshes in no other way; so a pair of meshes stands for all of its kind. Between
    groups each end by itself, by the other end's group.
    """
    cluster, costs = prices.problem.cluster, prices.model
    found = np.zeros((len(sample_bytes), len(copies), len(kinds), 2 + len(cluster.groups)))
    moved_bytes = np.outer(sample_bytes, copies)
    for n, kind in enumerate(kinds):
        for far, (source, target) in _ends(kind, cluster):
            for (k, c), num_bytes in np.ndenumerate(moved_bytes):
                found[k, c, n, far] = prices.transfer_s(float(num_bytes), source, target)
        if isinstance(costs, MixedCosts):
            own = DeviceMesh(cluster.starts[kind.group], kind.num_devices)
            for other, start in enumerate(cluster.starts):
                for (k, c), num_bytes in np.ndenumerate(moved_bytes):
                    if other != kind.group:
                        found[k, c, n, 2 + other] = crossing_end_s(
                            float(num_bytes), own, DeviceMesh(start, 1), costs
                        )
    return found


def _ends(kind: MeshKind, cluster: Cluster) -> Iterator[tuple[int, tuple[DeviceMesh, DeviceMesh]]]:
    """Two meshes of a kind that are as far apart as can be on one node (0), on all nodes (1)."""
    group, size, start = cluster.groups[kind.group], kind.num_devices, cluster.starts[kind.group]
    total, per_node = group.num_devices, group.devices_per_node
    for far, end in enumerate((per_node if size <= per_node else 0, total)):
        if end > 1 and (far == 0 or total > per_node):
            yield far, (DeviceMesh(start, size), DeviceMesh(start + end - size, size))
