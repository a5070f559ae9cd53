"""``Relaxation.bound_s``: seconds that no assignment of a *box* is below; the proof is here.

A box holds, for each call, a ``Pool``: a set of its options. A pool splits in two, first by size
of mesh, then by what a choice costs, then by position; so a box can be halved until it is one
assignment. ``bounds.py`` and ``exact.py`` branch on boxes, this file bounds them.

Let T be the steady seconds per step of any assignment of the box that fits, N the devices, and
for each call c ``s_c`` seconds on ``n_c`` devices. Minima below are over the options of a pool.

1. *Work.* A device does one thing at a time: ``T >= sum of s_c n_c / N``. In work, here and in 4,
   ``s_c`` is with what comes from the host before c, which may come while c's data are made;
   elsewhere it is without.
2. *Cycle.* Between events of one step there are edges "starts after the end of": from the
   producer of data to its reader, and, between two calls that surely share a device, in the
   graph's order, which is every rank's order. To the next step's events there are such edges
   from a call to every earlier one that surely shares a device with it (or is itself), and from
   a TRAIN to the calls that read its role. T is at least the longest path from a to b if there
   is an edge from b to the next step's a. Meshes surely overlap if their sizes sum to more than N,
   or if the devices that all meshes of one pool have and those of the other have in common.
   Ranks of a FUNCTION do not wait for each other, so only data joins it to others.
3. *Window.* Let t train a role and r read it. If every call of a set K runs between r's end and
   t's start, ``T >= s_r + sum over K of s_c n_c / N + s_t``.
4. *Mixed.* For 0 <= u <= 1, (1 - u) times a chain of data from r to t (or its window) and u times
   the work is a bound too: a sum over calls of terms that depend on their own option, which is
   least where each call for itself takes its least term.
5. *Memory.* What stays resident, summed over devices, and what any one call needs beside it is at
   most N times a device's memory, as no device is over it. And roles that stay on all devices
   leave to a call's fullest stage at most the rest. A box in which the minima break this is empty.
6. *Reallocation.* Where the layouts of a role's home and of its reader surely differ, and no
   earlier reader has brought them, the move is one more event on all devices of both, before the
   reader. It is priced where both are fixed; else it takes no time but waits as any other.

Transfers are left out: simulated times are sums and maxima, so they only make T larger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from planner.graph import CallKind
from planner.memory import RESERVE_BYTES
from planner.search.evaluate import Evaluator
from planner.search.options import Assignment, Choice, Option, OptionSpace

Floats = npt.NDArray[np.float64]


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
    halves: tuple[Pool, Pool] | None = field(default=None)

    @property
    def is_single(self) -> bool:
        return self.positions is not None and self.positions[1] - self.positions[0] == 1


Box = tuple[Pool, ...]  # one pool for each call, in the graph's order


@dataclass(frozen=True, slots=True)
class _Event:
    """A call, or the reallocation before it (``home``: the call that trains its role)."""

    call: int
    home: int | None


class Relaxation:
    """Bounds boxes of one problem."""

    def __init__(self, evaluator: Evaluator, *, num_weights: int = 16) -> None:
        self.evaluator = evaluator
        self.space: OptionSpace = evaluator.space
        self.calls = evaluator.calls
        self.home = evaluator.home
        cluster = self.space.problem.cluster
        self.num_devices = cluster.num_devices
        self.free_bytes = float(cluster.device.memory_bytes - RESERVE_BYTES[cluster.device.kind])
        # What is resident over the step: the training's weights, or a frozen role's first.
        roles = [call.role for call in self.calls]
        self.keeps = [
            role is not None and (self.home[i] == i if self.home[i] is not None
                                  else roles.index(role) == i)
            for i, role in enumerate(roles)
        ]  # fmt: skip
        self.roles = roles
        self.events = self._find_events()
        self.data = self._find_data()
        self.weights = [step / num_weights for step in range(num_weights + 1)]
        self.cycles = self._find_cycles()
        # The only reader of a trained role away from its home: its reallocation counts as work.
        readers = [(i, h) for i, h in enumerate(self.home) if h is not None and h != i]
        homes = [h for _, h in readers]
        self.sole_readers = {i for i, h in readers if homes.count(h) == 1}
        self.tables = [self._table(i) for i in range(len(self.calls))]

    # ---- what the graph alone decides ----

    def _find_events(self) -> list[_Event]:
        events = []
        for i, home in enumerate(self.home):
            if home is not None and home != i:
                events.append(_Event(i, home))
            events.append(_Event(i, None))
        return events

    def _find_data(self) -> list[set[int]]:
        """Calls whose outputs each call reads."""
        return [{pair.producer for pair in self.evaluator.pairs if pair.consumer == i}
                for i in range(len(self.calls))]  # fmt: skip

    def _find_cycles(self) -> list[tuple[frozenset[int], frozenset[int], int, int]]:
        """(path, window, first, last) of bounds 3 and 4, joined by data alone."""
        before: list[set[int]] = []
        for direct in self.data:
            before.append(direct.union(*(before[i] for i in direct)))
        found = [
            (frozenset(chain), frozenset[int](), chain[0], chain[-1])
            for chain in self.evaluator.chains
            if all(a in self.data[b] for a, b in pairwise(chain))
        ]
        for t, call in enumerate(self.calls):
            readers = [i for i in before[t] if call.kind is CallKind.TRAIN and self.home[i] == t]
            for r in readers:
                between = frozenset(i for i in before[t] if r in before[i])
                if between:
                    found.append((frozenset((r, t)), between, r, t))
        return found or [(frozenset(), frozenset(), -1, -1)]

    # ---- tables and pools ----

    def _table(self, i: int) -> _Table:
        name, num_devices = self.calls[i].name, self.num_devices
        rows = [(size, c) for size, group in self.space.choices[name].items() for c in group]
        codes: dict[tuple[int, tuple[int, int, int]], int] = {}
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
        return Pool(
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

    # ---- the bound ----

    def bound_s(self, box: Box, *, price: bool = False) -> float:
        """Seconds that no assignment of ``box`` that fits is below; inf where none fits.

        ``price``: reallocations that were never priced are; else they take no time.
        """
        if not self._fits(box):
            return math.inf
        moves_s = [self._reallocation_s(box, event, price) for event in self.events]
        terms = box[0].terms.copy()
        for pool in box[1:]:
            terms += pool.terms
        best = 0.0
        if max(moves_s) > 0:
            num_weights = len(self.weights)
            for event, seconds in zip(self.events, moves_s):
                if seconds > 0 and event.home is not None:
                    for k, (_, _, first, last) in enumerate(self.cycles):
                        own = seconds if (first, last) == (event.call, event.home) else 0.0
                        size = max(box[event.call].size, box[event.home].size)
                        work = seconds * size / self.num_devices
                        work = work if event.call in self.sole_readers else 0.0
                        for n, u in enumerate(self.weights):
                            terms[k * num_weights + n] += (1 - u) * own + u * work
        best = float(terms.max())
        return max(best, self._longest_cycle_s(box, moves_s))

    def _fits(self, box: Box) -> bool:
        """Bound 5."""
        held = sum(pool.held for pool, keeps in zip(box, self.keeps) if keeps)
        floor = sum(pool.floor for pool, keeps in zip(box, self.keeps) if keeps)
        if held > self.num_devices * self.free_bytes:
            return False
        for i, pool in enumerate(box):
            home = self.home[i]
            moves = home is not None and home != i and not pool.layouts & box[home].layouts
            need = pool.need_borrow if moves else pool.need
            if held + need > self.num_devices * self.free_bytes:
                return False
            others = floor
            if home is None or home == i:
                others -= sum(
                    box[j].floor for j, keeps in enumerate(self.keeps)
                    if keeps and self.roles[j] == self.roles[i]
                )  # fmt: skip
            if (pool.peak_borrow if moves else pool.peak) + others > self.free_bytes:
                return False
        return True

    def _reallocation_s(self, box: Box, event: _Event, price: bool) -> float:
        """Seconds of bound 6; -1 where the event may not take place."""
        if event.home is None:
            return -1.0
        here, home = box[event.call], box[event.home]
        one_pair = here.is_single and home.is_single
        if not one_pair and here.layouts & home.layouts:
            return -1.0
        # Weights that an earlier reader brought are not brought again.
        for i in range(event.call):
            if self.home[i] == event.home and box[i].layouts & here.layouts:
                return -1.0
        if not one_pair:
            return 0.0
        source, layout = self.option(home).layout, self.option(here).layout
        assert source is not None
        assert layout is not None
        if source == layout:
            return -1.0
        prices = self.space.prices
        if price:
            return prices.reallocation_s(source, layout)
        return prices.known_reallocation_s(source, layout)

    def _longest_cycle_s(self, box: Box, moves_s: Sequence[float]) -> float:
        """Bound 2: O(events^3)."""
        live = [n for n, e in enumerate(self.events) if e.home is None or moves_s[n] >= 0]
        events = [self.events[n] for n in live]
        seconds = [box[e.call].seconds if e.home is None else moves_s[n]
                   for n, e in zip(live, events)]  # fmt: skip
        count, best = len(events), 0.0
        meets = [[a <= b and self._meet(box, events[a], events[b]) for b in range(count)]
                 for a in range(count)]  # fmt: skip
        for a in range(count):
            far = [-1.0] * count
            far[a] = seconds[a]
            for b in range(a, count):
                here, call = events[b], events[b].call
                for p in range(a, b):
                    joined = meets[p][b] or (
                        here.home is None and events[p].home is None
                        and events[p].call in self.data[call]
                    )  # fmt: skip
                    if joined and far[p] >= 0:
                        far[b] = max(far[b], far[p] + seconds[b])
                closes = meets[a][b] or (self.home[events[a].call] == call and here.home is None)
                if closes:
                    best = max(best, far[b])
        return best

    def _meet(self, box: Box, a: _Event, b: _Event) -> bool:
        """Do two events surely share a device that runs them in order?"""
        if CallKind.FUNCTION in (self.calls[a.call].kind, self.calls[b.call].kind):
            return False
        for i in (a.call,) if a.home is None else (a.call, a.home):
            for j in (b.call,) if b.home is None else (b.call, b.home):
                if i == j or box[i].size + box[j].size > self.num_devices:
                    return True
                (lo, hi), (start, end) = box[i].shared, box[j].shared
                if max(lo, start) < min(hi, end):
                    return True
        return False
