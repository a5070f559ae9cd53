"""Boxes of a branch and bound: for each call a ``Pool``, a set of its options that splits in two.

A pool splits first by size of mesh, then by what a choice costs, then by position; so a box can be
halved until it is one assignment. ``relaxation.py`` bounds boxes by what is kept here of each pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import add

import numpy as np
import numpy.typing as npt

from planner.search.choices import Choice
from planner.search.options import Assignment, Option, OptionSpace
from planner.search.patterns import RUNNING

Floats = npt.NDArray[np.float64]
# (calls of a path, calls in a window, first, last) of bounds 3 and 4
Cycle = tuple[frozenset[int], frozenset[int], int, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Table:
    """All choices of a call by row; see ``_Tables`` for the columns."""

    choices: Sequence[tuple[int, Choice]]  # (size of mesh, choice)
    seconds: Floats
    size: npt.NDArray[np.int64]
    held: Floats  # bytes over all devices
    need: Floats  # bytes while it runs, over all devices, beside what is resident
    borrow: Floats  # bytes of borrowed weights, over all devices
    peak: Floats  # bytes on its fullest device, its own resident weights included
    peak_borrow: Floats  # the same where the weights are borrowed
    floor: Floats  # bytes that its weights keep on every device of the cluster
    terms: Floats  # [rows, num_terms]: bound 4
    layout: npt.NDArray[np.int64]  # equal for equal (size, axes)
    pattern: Floats  # [rows, 5]: bound 7, its weights borrowed; without, running is the next
    running: Floats  # bytes while it runs on the stage that needs least


@dataclass(slots=True, kw_only=True, eq=False)
class Pool:
    """Options of one call: rows of its table, at the positions ``[first, last)`` of their size.

    Positions are restricted only where one choice is left. ``shared``: the devices that every
    mesh of the pool has, as an interval. ``halves`` is filled on the first split.
    """

    call: int
    rows: npt.NDArray[np.int64]
    positions: tuple[int, int] | None
    shared: tuple[int, int]
    seconds: float
    size: int
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
    layout stay over the step? ``cycles`` and ``weights``: the terms of bound 4.
    """

    def __init__(
        self, space: OptionSpace, *, home: Sequence[int | None], keeps: Sequence[bool],
        cycles: Sequence[Cycle], weights: Sequence[float],
    ) -> None:  # fmt: skip
        self.space, self.calls, self.home, self.keeps = space, space.calls, home, keeps
        self.cycles, self.weights = cycles, weights
        self.num_devices = space.problem.cluster.num_devices
        self.tables = [self._table(i) for i in range(len(self.calls))]

    def _table(self, i: int) -> _Table:
        name, num_devices = self.calls[i].name, self.num_devices
        rows = [(size, c) for size, group in self.space.choices[name].items() for c in group]
        codes: dict[tuple[int, tuple[int, int, int, int]], int] = {}
        always = self.home[i] is None or self.home[i] == i  # its own weights are resident

        def total(size: int, by_stage: Sequence[int]) -> float:
            return float(sum(by_stage)) * size / len(by_stage)

        def fullest(choice: Choice, beside: Sequence[int]) -> float:
            return float(max(a + b for a, b in zip(choice.running, beside, strict=True)))

        seconds = np.array([c.seconds for _, c in rows])
        size = np.array([n for n, _ in rows])
        share = size / num_devices
        busy = np.array([c.busy_s for _, c in rows])
        terms = [
            (1 - u) * seconds * ((i in path) + share * (i in window)) + u * busy * share
            for path, window, _, _ in self.cycles
            for u in self.weights
        ]
        return _Table(
            choices=rows, seconds=seconds, size=size,
            held=np.array([total(n, c.held) for n, c in rows]),
            need=np.array([total(n, c.running) for n, c in rows]),
            borrow=np.array([total(n, c.borrowed) for n, c in rows]),
            peak=np.array([fullest(c, c.held if always else [0] * len(c.running))
                           for _, c in rows]),
            peak_borrow=np.array([fullest(c, c.borrowed) for _, c in rows]),
            floor=np.array([float(min(c.held)) if n == num_devices else 0.0 for n, c in rows]),
            terms=np.stack(terms, axis=1),
            layout=np.array([codes.setdefault((n, c.axes), hash((n, c.axes))) for n, c in rows]),
            pattern=np.array([
                (n, c.seconds, c.busy_s, min(c.held) if self.keeps[i] else 0.0,
                 min(map(add, c.running, c.borrowed))) for n, c in rows
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
        sizes = sorted(set(table.size[rows].tolist()))
        lo, hi = 0, self.num_devices
        if len(rows) == 1 and positions is None:
            positions = (0, len(self.space.meshes_of(self.calls[i].name, sizes[0])))
        for size in sizes:
            meshes = self.space.meshes_of(self.calls[i].name, size)
            meshes = meshes[slice(*(positions or (None, None)))]
            lo = max(lo, *(mesh.first for mesh in (meshes[0], meshes[-1])))
            hi = min(hi, *(mesh.first + size for mesh in (meshes[0], meshes[-1])))
        pattern = table.pattern[rows].min(axis=0)
        pattern_home = pattern.copy()
        pattern_home[RUNNING] = table.running[rows].min()
        return Pool(
            pattern=pattern, pattern_home=pattern_home,
            call=i, rows=rows, positions=positions, shared=(lo, hi),
            seconds=float(table.seconds[rows].min()), size=sizes[0],
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
        """Small meshes; of one size, the low end of the column that is spread most."""
        table, rows = self.tables[pool.call], pool.rows
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
        size, choice = self.tables[pool.call].choices[int(pool.rows[0])]
        mesh = self.space.meshes_of(self.calls[pool.call].name, size)[pool.positions[0]]
        return self.space.option(self.calls[pool.call].name, mesh, choice)

    def assignment(self, box: Box) -> Assignment | None:
        """The box's only assignment; None where it has more."""
        if not all(pool.is_single for pool in box):
            return None
        return tuple(self.option(pool) for pool in box)
