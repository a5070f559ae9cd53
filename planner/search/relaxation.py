"""``Relaxation.bound_s``: seconds that no assignment of a *box* is below; the proof is here.

A box holds, for each call, a ``Pool``: a set of its options (``pools.py``). ``bounds.py`` branches
on boxes, this file bounds them.

Let T be the steady seconds per step of any assignment of the box that fits, N the devices, and
for each call c ``s_c`` seconds on ``n_c`` devices. Minima below are over the options of a pool.
Devices may be of several groups g, N_g of each; a mesh is in one of them, g(c).

1. *Work.* A device does one thing at a time, so the calls in group g take at most N_g T of its
   devices' seconds: ``sum of s_c n_c <= N_g T`` over c with g(c) = g. With weights ``v_g >= 0`` of
   which ``sum of v_g N_g = 1`` these sum to ``T >= sum of s_c n_c v_g(c)``, in which each call
   takes its least term wherever it is. Of one group that is ``sum of s_c n_c / N``. All such
   weights are right; tried are equal ones, those by FLOP/s and by memory bandwidth (a call is
   about as much work in either group where v goes with its speed) and, for boxes that say where
   calls are, each group alone. In work, here and in 4, ``s_c`` is with what comes from the host
   before c, which may come while c's data are made; elsewhere it is without.
2. *Cycle.* Between events of one step there are edges "starts after the end of": from the
   producer of data to its reader, and, between two calls that surely share a device, in the
   graph's order, which is every rank's order. To the next step's events there are such edges
   from a call to every earlier one that surely shares a device with it (or is itself), and from
   a TRAIN to the calls that read its role. T is at least the longest path from a to b if there
   is an edge from b to the next step's a. Meshes surely overlap if their sizes sum to more than N,
   or than N_g where both are surely in g, or if the devices that all meshes of one pool have and
   those of the other have in common.
   Ranks of a FUNCTION do not wait for each other, so only data joins it to others.
3. *Window.* Let t train a role and r read it. If every call of a set K runs between r's end and
   t's start, ``T >= s_r + sum over K of s_c n_c v_g(c) + s_t``, as 1 for the seconds between.
4. *Mixed.* For 0 <= u <= 1, (1 - u) times a chain of data from r to t (or its window) and u times
   the work is a bound too: a sum over calls of terms that depend on their own option, which is
   least where each call for itself takes its least term.
5. *Memory.* What stays resident, summed over devices, and what any one call needs beside it is at
   most the sum of the devices' memory, as no device is over its own; and so in each group, of calls
   that are surely in it. And roles that stay on all devices of a group leave to the fullest stage
   of a call in it at most the rest. A box in which the minima break this is empty.
6. *Reallocation.* Where the layouts of a role's home and of its reader surely differ, and no
   earlier reader has brought them, the move is one more event on all devices of both, before the
   reader. Where only positions are open it takes what it takes at the best of them; before that
   it takes no time but waits as any other.
7. *Patterns.* Who can share a device in T seconds and in its bytes: ``patterns.py``. On all
   devices together each has at most the memory of the largest; and on those of each group, with
   only the calls that are surely in it: who else is there can but take time and bytes from these.

Transfers are left out: simulated times are sums and maxima, so they only make T larger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import numpy.typing as npt

from planner.graph import CallKind
from planner.memory import RESERVE_BYTES
from planner.search.cycles import Order, longest_cycle_s
from planner.search.evaluate import Evaluator
from planner.search.options import OptionSpace
from planner.search.patterns import MOST_CALLS, pattern_bound_s
from planner.search.pools import Box, Cycle, Pool, Pools
from profiles.hardware import Cluster

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Event:
    """A call, or the reallocation before it (``home``: the call that trains its role)."""

    call: int
    home: int | None


def device_weights(cluster: Cluster) -> Floats:
    """[weights, groups]: of one device in each group, so that all devices' sum to 1 (bound 1)."""
    groups = cluster.groups
    if len(groups) == 1:
        return np.array([[1.0 / cluster.num_devices]])
    counts = np.array([group.num_devices for group in groups], dtype=float)
    speeds = [
        np.ones(len(groups)),
        np.array([group.device.peak_flops for group in groups]),
        np.array([group.device.memory_bytes_per_s for group in groups]),
        *np.eye(len(groups)),
    ]
    # Shares of all work by group, without those that differ by rounding.
    shares = np.unique([np.round(speed * counts / (speed @ counts), 6) for speed in speeds], axis=0)
    return np.array(shares / shares.sum(axis=1, keepdims=True) / counts)


class Relaxation:
    """Bounds boxes of one problem."""

    def __init__(self, evaluator: Evaluator, *, num_weights: int = 16) -> None:
        self.evaluator = evaluator
        self.space: OptionSpace = evaluator.space
        self.calls = evaluator.calls
        self.home = evaluator.home
        cluster = self.space.problem.cluster
        self.num_devices = cluster.num_devices
        self.counts = [group.num_devices for group in cluster.groups]
        self.free_bytes = [
            float(group.device.memory_bytes - RESERVE_BYTES[cluster.kind])
            for group in cluster.groups
        ]
        # What is resident over the step: the training's weights, or a frozen role's first.
        roles = [call.role for call in self.calls]
        self.keeps = [
            role is not None and (self.home[i] == i if self.home[i] is not None
                                  else roles.index(role) == i)
            for i, role in enumerate(roles)
        ]  # fmt: skip
        self.roles = roles
        graph = self.space.problem.graph
        self.ahead = {i for i, call in enumerate(self.calls) if call in graph.ahead}
        self.events = self._find_events()
        self.data = self._find_data()
        self.weights = [step / num_weights for step in range(num_weights + 1)]
        self.cycles = self._find_cycles()
        # The only reader of a trained role away from its home: its reallocation counts as work.
        readers = [(i, h) for i, h in enumerate(self.home) if h is not None and h != i]
        homes = [h for _, h in readers]
        self.sole_readers = {i for i, h in readers if homes.count(h) == 1}
        self.scales = device_weights(cluster)
        self.pools = Pools(
            self.space, home=self.home, keeps=self.keeps, cycles=self.cycles, weights=self.weights,
            scales=self.scales,
        )  # fmt: skip
        self.windows = np.array(
            [(first, last, sum(1 << i for i in inside)) for _, inside, first, last in self.cycles
             if inside], dtype=np.int64,
        ).reshape(-1, 3)  # fmt: skip
        count = len(self.calls)
        self.order = Order(
            events=np.array(
                [(e.call, -1 if e.home is None else e.home) for e in self.events], dtype=np.int64
            ),
            reads=np.array(
                [[int(p in self.data[i]) for p in range(count)] for i in range(count)],
                dtype=np.int64,
            ),
            home=np.array([-1 if h is None else h for h in self.home], dtype=np.int64),
            waits=np.array(
                [int(c.kind is not CallKind.FUNCTION) for c in self.calls], dtype=np.int64
            ),
        )
        self._places = np.zeros((count, 5), dtype=np.int64)
        self._seconds, self._far = np.zeros((2, len(self.events)))
        self._meets = np.zeros((len(self.events), len(self.events)), dtype=np.int64)
        self._least_moves: dict[tuple[int, int, int, int], float] = {}
        self._rows, self._room = np.zeros((count, 5)), np.zeros((count + 3, count))
        self._patterns = np.zeros((2, 1 << min(count, MOST_CALLS)))

    # ---- what the graph alone decides ----

    def _find_events(self) -> list[_Event]:
        readers = [i for i, home in enumerate(self.home) if home is not None and home != i]
        events = [_Event(i, self.home[i]) for i in readers if i in self.ahead]
        for i, home in enumerate(self.home):
            if i in readers and i not in self.ahead:
                events.append(_Event(i, home))
            events.append(_Event(i, None))
        return events

    def _find_data(self) -> list[set[int]]:
        """Calls of the same step whose outputs each call reads."""
        return [
            {p.producer for p in self.evaluator.pairs if p.consumer == i} - self.ahead
            for i in range(len(self.calls))
        ]

    def _find_cycles(self) -> list[Cycle]:
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

    # ---- the bound ----

    def bound_s(self, box: Box, *, price: bool = False, best_s: float = math.inf) -> float:
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
            for event, seconds in zip(self.events, moves_s):
                if seconds > 0 and event.home is not None:
                    self._add_move(terms, box, event.call, event.home, seconds)
        best = max(float(terms.max()), self._longest_cycle_s(box, moves_s))
        return best if best >= best_s else self._patterns_s(box, moves_s, best, best_s)

    def _add_move(self, terms: Floats, box: Box, call: int, home: int, seconds: float) -> None:
        """A move in the terms of bound 4: both meshes are busy, so at least the larger one is."""
        shares = np.maximum(box[call].shares, box[home].shares).tolist()
        position, of_work = 0, call in self.sole_readers
        for _, _, first, last in self.cycles:
            own = seconds if (first, last) == (call, home) else 0.0
            for share in shares:
                work = seconds * share if of_work else 0.0
                for u in self.weights:
                    terms[position] += (1 - u) * own + u * work
                    position += 1

    def _patterns_s(self, box: Box, moves_s: Sequence[float], low_s: float, best_s: float) -> float:
        """Bound 7, at least ``low_s``."""
        if len(box) > MOST_CALLS:
            return low_s
        returns_s = np.zeros(len(self.windows))
        for event, seconds in zip(self.events, moves_s):
            if event.home is not None and seconds > 0:
                own = (self.windows[:, 0] == event.call) & (self.windows[:, 1] == event.home)
                returns_s[own] = seconds
        for i, pool in enumerate(box):
            home = self.home[i]
            moves = home is not None and home != i and not pool.layouts & box[home].layouts
            self._rows[i] = pool.pattern if moves else pool.pattern_home
        low_s = pattern_bound_s(
            self._rows, self.windows, returns_s, float(self.num_devices), max(self.free_bytes),
            low_s, best_s, self._room, self._patterns,
        )  # fmt: skip
        if len(self.counts) > 1:
            for group in range(len(self.counts)):
                if low_s < best_s:
                    low_s = self._group_patterns_s(box, group, returns_s, low_s, best_s)
        return low_s

    def _group_patterns_s(
        self, box: Box, group: int, returns_s: Floats, low_s: float, best_s: float
    ) -> float:
        """Bound 7 of the calls that are surely in one group, at least ``low_s``."""
        inside = [i for i, pool in enumerate(box) if pool.group == group]
        if not inside:
            return low_s
        place = {i: n for n, i in enumerate(inside)}
        kept, windows = [], []
        for w, (first, last, between) in enumerate(self.windows.tolist()):
            if first in place and last in place:
                bits = sum(1 << place[i] for i in inside if between >> i & 1)
                windows.append((place[first], place[last], bits))
                kept.append(w)
        count = len(inside)
        return pattern_bound_s(
            self._rows[inside], np.array(windows, dtype=np.int64).reshape(-1, 3), returns_s[kept],
            float(self.counts[group]), self.free_bytes[group], low_s, best_s,
            np.zeros((count + 3, count)), np.zeros((2, 1 << count)),
        )  # fmt: skip

    def _fits(self, box: Box) -> bool:
        """Bound 5."""
        if len(self.counts) > 1:
            total = sum(count * free for count, free in zip(self.counts, self.free_bytes))
            if not self._fits_in(box, range(len(box)), total, math.inf):
                return False
        for group, (count, free) in enumerate(zip(self.counts, self.free_bytes)):
            inside = [i for i, pool in enumerate(box) if pool.group == group]
            if not self._fits_in(box, inside, count * free, free):
                return False
        return True

    def _fits_in(self, box: Box, inside: Sequence[int], total: float, each: float) -> bool:
        """May the calls ``inside`` share devices of ``total`` bytes, all of them of ``each``?"""
        kept = [i for i in inside if self.keeps[i]]
        held, floor = sum(box[i].held for i in kept), sum(box[i].floor for i in kept)
        if held > total:
            return False
        for i in inside:
            pool = box[i]
            home = self.home[i]
            moves = home is not None and home != i and not pool.layouts & box[home].layouts
            need = pool.need_borrow if moves else pool.need
            if held + need > total:
                return False
            others = floor
            if home is None or home == i:
                others -= sum(box[j].floor for j in kept if self.roles[j] == self.roles[i])
            if (pool.peak_borrow if moves else pool.peak) + others > each:
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
            return self._least_move_s(here, home, price) if self._is_pair(here, home) else 0.0
        source, layout = self.pools.option(home).layout, self.pools.option(here).layout
        assert source is not None
        assert layout is not None
        if source == layout:
            return -1.0
        prices = self.space.prices
        if price:
            return prices.reallocation_s(source, layout)
        return prices.known_reallocation_s(source, layout)

    def _is_pair(self, here: Pool, home: Pool) -> bool:
        return len(here.rows) == len(home.rows) == 1

    def _least_move_s(self, here: Pool, home: Pool, price: bool) -> float:
        """Of one choice to another, wherever they are; 0 where it is not known and not to be."""
        key = (home.call, int(home.rows[0]), here.call, int(here.rows[0]))
        if key not in self._least_moves and price:
            ends = []
            for pool in (home, here):
                kind, choice = self.pools.tables[pool.call].choices[int(pool.rows[0])]
                name = self.calls[pool.call].name
                meshes = self.space.meshes_of(name, kind)
                ends.append([self.space.option(name, mesh, choice).layout for mesh in meshes])
            self._least_moves[key] = min(
                self.space.prices.reallocation_s(a, b)
                for a, b in product(*ends) if a is not None and b is not None
            )  # fmt: skip
        return self._least_moves.get(key, 0.0)

    def _longest_cycle_s(self, box: Box, moves_s: Sequence[float]) -> float:
        """Bound 2."""
        for i, pool in enumerate(box):
            room = self.counts[pool.group] if pool.group >= 0 else self.num_devices
            self._places[i] = (pool.size, *pool.shared, pool.group, room)
        for n, event in enumerate(self.events):
            self._seconds[n] = box[event.call].seconds if event.home is None else moves_s[n]
        return longest_cycle_s(
            self.order, self._places, self.num_devices, self._seconds, self._far, self._meets
        )
