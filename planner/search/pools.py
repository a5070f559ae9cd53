"""Boxes of a branch and bound: for each call a ``Pool``, a set of its options that splits in two.

A pool splits first by group of like devices and size of mesh, then by what a choice costs, then by
position; so a box can be halved until it is one assignment. ``relaxation.py`` bounds boxes by what
is kept here of each pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import add

import numpy as np
import numpy.typing as npt

from planner.mesh import MeshKind
from planner.search.choices import Choice
from planner.search.options import Assignment, Option, OptionSpace
from planner.search.patterns import RUNNING

Floats = npt.NDArray[np.float64]
# (calls of a path, calls in a window, first, last) of bounds 3 and 4
Cycle = tuple[frozenset[int], frozenset[int], int, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Table:
    """All choices of a call by row; see ``_Tables`` for the columns."""

    choices: Sequence[tuple[MeshKind, Choice]]
    seconds: Floats
    group: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    shares: Floats  # [rows, num_scales]: of the cluster's capacity, by its devices' weights
    held: Floats  # bytes over all devices
    need: Floats  # bytes while it runs, over all devices, beside what is resident
    borrow: Floats  # bytes of borrowed weights, over all devices
    peak: Floats  # bytes on its fullest device, its own resident weights included
    peak_borrow: Floats  # the same where the weights are borrowed
    floor: Floats  # bytes that its weights keep on every device of its group
    terms: Floats  # [rows, num_terms]: bound 4
    layout: npt.NDArray[np.int64]  # equal for equal (kind, axes)
    pattern: Floats  # [rows, 5]: bound 7, its weights borrowed; without, running is the next
    running: Floats  # bytes while it runs on the stage that needs least


@dataclass(slots=True, kw_only=True, eq=False)
class Pool:
    """Options of one call: rows of its table, at the positions ``[first, last)`` of their kind.

    Positions are restricted only where one choice is left. ``shared``: the devices that every
    mesh of the pool has, as an interval. ``group``: in which all are, -1: several. ``halves`` is
    filled on the first split.
    """

    call: int
    rows: npt.NDArray[np.int64]
    positions: tuple[int, int] | None
    shared: tuple[int, int]
    seconds: float
    group: int
    size: int
    shares: Floats  # [num_scales]
    held: float
    need: float
    need_borrow: float
    peak: float
    peak_borrow: float
    floor: float
    terms: Floats
    layouts: frozenset[int]
    pattern: Floats  # [5]
    pattern_home: Floats  # [5]: where its weights are not borrowed
    halves: tuple[Pool, Pool] | None = field(default=None)

    @property
    def is_single(self) -> bool:
        return self.positions is not None and self.positions[1] - self.positions[0] == 1


Box = tuple[Pool, ...]  # one pool for each call, in the graph's order


class Pools:
    """Makes and splits the pools of one problem.

    ``home``: of each call the one that trains its role. ``keeps``: do the weights of a call's
    layout stay over the step? ``cycles``, ``weights`` and ``scales`` [num_scales, groups]: the
    terms of bound 4.
    """

    def __init__(
        self, space: OptionSpace, *, home: Sequence[int | None], keeps: Sequence[bool],
        cycles: Sequence[Cycle], weights: Sequence[float], scales: Floats,
    ) -> None:  # fmt: skip
        self.space, self.calls, self.home, self.keeps = space, space.calls, home, keeps
        self.cycles, self.weights, self.scales = cycles, weights, scales
        self.cluster = space.problem.cluster
        self.tables = [self._table(i) for i in range(len(self.calls))]

    def _table(self, i: int) -> _Table:
        by_kind = self.space.choices[self.calls[i].name]
        rows = [(kind, c) for kind, choices in by_kind.items() for c in choices]
        always = self.home[i] is None or self.home[i] == i  # its own weights are resident

        def total(size: int, by_stage: Sequence[int]) -> float:
            return float(sum(by_stage)) * size / len(by_stage)

        def fullest(choice: Choice, beside: Sequence[int]) -> float:
            return float(max(a + b for a, b in zip(choice.running, beside, strict=True)))

        seconds = np.array([c.seconds for _, c in rows])
        group = np.array([kind.group for kind, _ in rows])
        size = np.array([kind.num_devices for kind, _ in rows])
        whole = np.array([part.num_devices for part in self.cluster.groups])
        shares = self.scales[:, group].T * size[:, None]
        busy = np.array([c.busy_s for _, c in rows])
        terms = [
            (1 - u) * seconds * ((i in path) + share * (i in window)) + u * busy * share
            for path, window, _, _ in self.cycles
            for share in shares.T
            for u in self.weights
        ]
        return _Table(
            choices=rows, seconds=seconds, group=group, size=size, shares=shares,
            held=np.array([total(n, c.held) for n, (_, c) in zip(size, rows)]),
            need=np.array([total(n, c.running) for n, (_, c) in zip(size, rows)]),
            borrow=np.array([total(n, c.borrowed) for n, (_, c) in zip(size, rows)]),
            peak=np.array([fullest(c, c.held if always else [0] * len(c.running))
                           for _, c in rows]),
            peak_borrow=np.array([fullest(c, c.borrowed) for _, c in rows]),
            floor=np.where(size == whole[group], [float(min(c.held)) for _, c in rows], 0.0),
            terms=np.stack(terms, axis=1),
            layout=np.array([hash((kind, c.axes)) for kind, c in rows]),
            pattern=np.array([
                (kind.num_devices, c.seconds, c.busy_s, min(c.held) if self.keeps[i] else 0.0,
                 min(map(add, c.running, c.borrowed))) for kind, c in rows
            ], dtype=float),
            running=np.array([float(min(c.running)) for _, c in rows]),
        )  # fmt: skip

    def root(self) -> Box:
        """Every option of every call."""
        return tuple(
            self._pool(i, np.arange(len(table.choices)), None)
            for i, table in enumerate(self.tables)
        )

    def _pool(self, i: int, rows: npt.NDArray[np.int64], positions: tuple[int, int] | None) -> Pool:
        table = self.tables[i]
        pairs = zip(table.group[rows].tolist(), table.size[rows].tolist(), strict=True)
        kinds = sorted({MeshKind(group, size) for group, size in pairs})
        lo, hi = 0, self.cluster.num_devices
        if len(rows) == 1 and positions is None:
            positions = (0, len(self.space.meshes_of(self.calls[i].name, kinds[0])))
        for kind in kinds:
            meshes = self.space.meshes_of(self.calls[i].name, kind)
            meshes = meshes[slice(*(positions or (None, None)))]
            lo = max(lo, *(mesh.first for mesh in (meshes[0], meshes[-1])))
            hi = min(hi, *(mesh.first + kind.num_devices for mesh in (meshes[0], meshes[-1])))
        pinned = kinds[0].group == kinds[-1].group
        pattern = table.pattern[rows].min(axis=0)
        pattern_home = pattern.copy()
        pattern_home[RUNNING] = table.running[rows].min()
        return Pool(
            pattern=pattern, pattern_home=pattern_home,
            call=i, rows=rows, positions=positions, shared=(lo, hi),
            seconds=float(table.seconds[rows].min()), group=kinds[0].group if pinned else -1,
            size=min(kind.num_devices for kind in kinds), shares=table.shares[rows].min(axis=0),
            held=float(table.held[rows].min()), need=float(table.need[rows].min()),
            need_borrow=float((table.need[rows] + table.borrow[rows]).min()),
            peak=float(table.peak[rows].min()), peak_borrow=float(table.peak_borrow[rows].min()),
            floor=float(table.floor[rows].min()), terms=table.terms[rows].min(axis=0),
            layouts=frozenset(table.layout[rows].tolist()),
        )  # fmt: skip

    def split(self, pool: Pool) -> tuple[Pool, Pool]:
        """Two pools that together are ``pool``; it has more than one option."""
        if pool.halves is None:
            if pool.positions is not None:
                first, last = pool.positions
                middle = (first + last) // 2
                parts = [(pool.rows, (first, middle)), (pool.rows, (middle, last))]
                pool.halves = tuple(self._pool(pool.call, *part) for part in parts)  # type: ignore[assignment]
            else:
                low = self._low_half(pool)
                pool.halves = (
                    self._pool(pool.call, pool.rows[low], None),
                    self._pool(pool.call, pool.rows[~low], None),
                )
        assert pool.halves is not None
        return pool.halves

    def _low_half(self, pool: Pool) -> npt.NDArray[np.bool_]:
        """All groups but the last; in one group small meshes; of one size the low end of the column

        that is spread most.
        """
        table, rows = self.tables[pool.call], pool.rows
        if pool.group < 0:
            return np.asarray(table.group[rows] < table.group[rows].max())
        sizes = np.unique(table.size[rows])
        if len(sizes) > 1:
            # Large meshes are rarely wrong, so the largest goes alone.
            return np.asarray(table.size[rows] < sizes[-1])
        columns = [table.seconds, table.held, table.need + table.borrow, table.peak]
        spread = [np.ptp(c[rows]) / max(1e-300, c[rows].max()) for c in columns]
        column = columns[int(np.argmax(spread))][rows]
        low = column < (column.max() + column.min()) / 2
        if not low.any():  # all equal: any two halves
            low = np.arange(len(rows)) < len(rows) // 2
        return np.asarray(low)

    def option(self, pool: Pool) -> Option:
        """The only option of a single pool."""
        assert pool.positions is not None
        assert pool.is_single
        kind, choice = self.tables[pool.call].choices[int(pool.rows[0])]
        mesh = self.space.meshes_of(self.calls[pool.call].name, kind)[pool.positions[0]]
        return self.space.option(self.calls[pool.call].name, mesh, choice)

    def assignment(self, box: Box) -> Assignment | None:
        """The box's only assignment; None where it has more."""
        if not all(pool.is_single for pool in box):
            return None
        return tuple(self.option(pool) for pool in box)
