"""Boxes of a branch and bound: for each call a *pool*, a set of its options that splits in two.

A pool splits first by group of like devices and size of mesh, then by what a choice costs, then by
position; so a box can be halved until it is one assignment. A pool is a number: ``Facts`` has what
``boxes.py`` asks of it. Positions are restricted only where one choice is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.layout import Layout
from planner.mesh import MeshKind
from planner.search.boxes import POOL, Facts
from planner.search.choices import Choice
from planner.search.options import Assignment, Option, OptionSpace
from planner.search.patterns import RUNNING

Floats = npt.NDArray[np.float64]
# (calls of a path, calls in a window, first, last) of bounds 3 and 4
Cycle = tuple[frozenset[int], frozenset[int], int, int]
BITS = 63  # of a word of ``Facts.layouts``; the sign is left alone


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
    layout: npt.NDArray[np.int64]  # equal for equal (role, kind, axes)
    pattern: Floats  # [rows, 5]: bound 7, its weights borrowed; without, running is the next
    running: Floats  # bytes while it runs on the stage that needs least


Box = tuple[int, ...]  # a pool for each call, in the graph's order


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
        self._layouts: dict[tuple[str | None, MeshKind, tuple[int, ...]], int] = {}
        self.tables = [self._table(i) for i in range(len(self.calls))]
        counts = [len(table.choices) for table in self.tables]
        self._calls: list[int] = []
        self._rows: list[npt.NDArray[np.int64]] = []
        self._positions: list[tuple[int, int] | None] = []
        table, words = self.tables[0], len(self._layouts) // BITS + 1
        self.facts = Facts(
            pools=np.zeros(64, dtype=POOL), terms=np.zeros((64, table.terms.shape[1])),
            shares=np.zeros((64, table.shares.shape[1])), patterns=np.zeros((64, 2, 5)),
            layouts=np.zeros((64, words), dtype=np.int64), halves=np.zeros((64, 2), dtype=np.int64),
        )  # fmt: skip
        self._root = tuple(self._add(i, np.arange(count), None) for i, count in enumerate(counts))

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
            layout=np.array([
                self._layouts.setdefault((self.calls[i].role, kind, c.axes), len(self._layouts))
                for kind, c in rows
            ], dtype=np.int64),
            pattern=np.array([
                (kind.num_devices, c.seconds, c.busy_s, min(c.held) if self.keeps[i] else 0.0,
                 min(map(add, c.running, c.borrowed))) for kind, c in rows
            ], dtype=float),
            running=np.array([float(min(c.running)) for _, c in rows]),
        )  # fmt: skip

    def root(self) -> Box:
        """Every option of every call."""
        return self._root

    def _add(self, i: int, rows: npt.NDArray[np.int64], positions: tuple[int, int] | None) -> int:
        """A pool of call i: these rows of its table, on the meshes at ``positions`` (None: all)."""
        table, call, pool = self.tables[i], self.calls[i].name, len(self._rows)
        layouts = sorted(set(table.layout[rows].tolist()))
        pairs = zip(table.group[rows].tolist(), table.size[rows].tolist(), strict=True)
        kinds = sorted({MeshKind(group, size) for group, size in pairs})
        if len(rows) == 1 and positions is None:
            positions = (0, len(self.space.meshes_of(call, kinds[0])))
        first, end = 0, self.cluster.num_devices
        for kind in kinds:
            meshes = self.space.meshes_of(call, kind)[slice(*(positions or (None, None)))]
            first = max(first, *(mesh.first for mesh in (meshes[0], meshes[-1])))
            end = min(end, *(mesh.first + kind.num_devices for mesh in (meshes[0], meshes[-1])))
        if pool == len(self.facts.pools):
            twice: Any = (np.concatenate((a, np.zeros_like(a))) for a in self.facts)
            self.facts = Facts(*twice)
        facts = self.facts
        facts.pools[pool] = (
            min(kind.num_devices for kind in kinds), first, end,
            kinds[0].group if kinds[0].group == kinds[-1].group else -1,
            layouts[0] if len(layouts) == 1 else -1, len(layouts),
            positions is not None and positions[1] - positions[0] == 1,
            table.seconds[rows].min(), table.held[rows].min(), table.need[rows].min(),
            (table.need[rows] + table.borrow[rows]).min(), table.peak[rows].min(),
            table.peak_borrow[rows].min(), table.floor[rows].min(),
        )  # fmt: skip
        facts.terms[pool] = table.terms[rows].min(axis=0)
        facts.shares[pool] = table.shares[rows].min(axis=0)
        home, away = facts.patterns[pool]
        home[:] = away[:] = table.pattern[rows].min(axis=0)
        home[RUNNING] = table.running[rows].min()
        for layout in layouts:
            facts.layouts[pool, layout // BITS] |= 1 << layout % BITS
        facts.halves[pool] = -1
        self._calls.append(i)
        self._rows.append(rows)
        self._positions.append(positions)
        return pool

    def is_single(self, pool: int) -> bool:
        """Is it one option?"""
        return bool(self.facts.pools[pool]["single"])

    def split(self, pool: int) -> tuple[int, int]:
        """Two pools that together are ``pool``; it has more than one option."""
        if self.facts.halves[pool, 0] < 0:
            i, rows, positions = self._calls[pool], self._rows[pool], self._positions[pool]
            if positions is not None:
                first, last = positions
                middle = (first + last) // 2
                halves = self._add(i, rows, (first, middle)), self._add(i, rows, (middle, last))
            else:
                low = self._low_half(pool)
                halves = self._add(i, rows[low], None), self._add(i, rows[~low], None)
            self.facts.halves[pool] = halves
        low_half, high_half = self.facts.halves[pool].tolist()
        return low_half, high_half

    def _low_half(self, pool: int) -> npt.NDArray[np.bool_]:
        """All groups but the last; in one group small meshes; of one size the low end of the column

        that is spread most.
        """
        table, rows = self.tables[self._calls[pool]], self._rows[pool]
        if self.facts.pools[pool]["group"] < 0:
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

    def option(self, pool: int) -> Option:
        """The only option of a single pool."""
        positions = self._positions[pool]
        assert positions is not None
        (option,) = self._options(self._calls[pool], self._rows[pool][0], slice(*positions))
        return option

    def layouts(self, pool: int) -> dict[int, list[Layout]]:
        """Each layout of a pool's choices, on all meshes that it may have."""
        i = self._calls[pool]
        rows = self._rows[pool]
        numbers, first = np.unique(self.tables[i].layout[rows], return_index=True)
        return {
            int(number): [o.layout for o in self._options(i, row) if o.layout is not None]
            for number, row in zip(numbers, rows[first], strict=True)
        }

    def _options(self, i: int, row: int, positions: slice = slice(None)) -> list[Option]:
        """One choice of call i on all its meshes, or those at ``positions``."""
        (kind, choice), call = self.tables[i].choices[int(row)], self.calls[i].name
        meshes = self.space.meshes_of(call, kind)[positions]
        return [self.space.option(call, mesh, choice) for mesh in meshes]

    def assignment(self, box: Box) -> Assignment | None:
        """The box's only assignment; None where it has more."""
        if not all(self.is_single(pool) for pool in box):
            return None
        return tuple(self.option(pool) for pool in box)
