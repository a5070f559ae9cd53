"""``Relaxation.bound_s``: seconds that no assignment of a *box* is below; the proof is here.

A box holds, for each call, a *pool*: a set of its options (``pools.py``). ``bounds.py`` branches
on boxes, this file bounds them with the compiled ``boxes.py``.

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
   reader. Where few layouts are left to either end it takes the least between any two, wherever
   they are, and where both ends are known what it takes between these; before that it takes no
   time but waits as any other.
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
from typing import Any

import numpy as np

from planner.graph import CallKind
from planner.layout import Layout
from planner.memory import RESERVE_BYTES
from planner.search.boxes import ROUNDING, Frame, Room, bound_s, branch
from planner.search.cycles import Order
from planner.search.evaluate import Evaluator
from planner.search.options import OptionSpace
from planner.search.patterns import MOST_CALLS
from planner.search.pools import Box, Cycle, Pools
from planner.search.prices import empty_prices, grown, put
from planner.search.records import NO_KEY, Floats, Ints
from profiles.hardware import Cluster

# Layouts at both ends of a move whose prices are all asked for: so many pairs, or fewer where these
# times the devices are more. A price takes as long as there are devices.
MOST_PAIRS, MOST_PRICED = 16, 1 << 14


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
    """Bounds boxes of one problem; bounds that ask for no new price are ``boxes.bound_s``.

    Reallocations are priced here and nowhere else, so that bounds do not depend on what a walk
    asked meanwhile.
    """

    def __init__(self, evaluator: Evaluator, *, num_weights: int = 16) -> None:
        self.evaluator = evaluator
        self.space: OptionSpace = evaluator.space
        self.calls = evaluator.calls
        self.home = evaluator.home
        cluster, graph = self.space.problem.cluster, self.space.problem.graph
        # What is resident over the step: the training's weights, or a frozen role's first.
        roles = [call.role for call in self.calls]
        keeps = [
            role is not None and (self.home[i] == i if self.home[i] is not None
                                  else roles.index(role) == i)
            for i, role in enumerate(roles)
        ]  # fmt: skip
        self.ahead = {i for i, call in enumerate(self.calls) if call in graph.ahead}
        self.events = self._find_events()
        self.data = self._find_data()
        self.cycles = self._find_cycles()
        weights = [step / num_weights for step in range(num_weights + 1)]
        readers = [(i, h) for i, h in enumerate(self.home) if h is not None and h != i]
        homes = [h for _, h in readers]
        self.pools = Pools(
            self.space, home=self.home, keeps=keeps, cycles=self.cycles, weights=weights,
            scales=device_weights(cluster),
        )  # fmt: skip
        count, num_events = len(self.calls), len(self.events)
        windows = [(first, last, sum(1 << i for i in inside))
                   for _, inside, first, last in self.cycles if inside]  # fmt: skip
        order = Order(
            events=_ints([(e.call, -1 if e.home is None else e.home) for e in self.events]),
            reads=_ints([[int(p in self.data[i]) for p in range(count)] for i in range(count)]),
            home=_ints([-1 if h is None else h for h in self.home]),
            waits=_ints([int(c.kind is not CallKind.FUNCTION) for c in self.calls]),
        )
        names = list(dict.fromkeys(roles))
        self.frame = Frame(
            order=order, keeps=_ints(keeps),
            roles=_ints([-1 if role is None else names.index(role) for role in roles]),
            # Its reallocation counts as work.
            sole=_ints([int((i, h) in readers and homes.count(h or 0) == 1)
                        for i, h in enumerate(self.home)]),
            counts=_ints([group.num_devices for group in cluster.groups]),
            free_bytes=np.array([
                float(group.device.memory_bytes - RESERVE_BYTES[cluster.kind])
                for group in cluster.groups
            ]),
            ends=_ints([(first, last) for _, _, first, last in self.cycles]),
            weights=np.array(weights),
            windows=_ints(windows).reshape(-1, 3),
            most_pairs=max(1, min(MOST_PAIRS, MOST_PRICED // cluster.num_devices)),
        )  # fmt: skip
        self.room = Room(
            box=np.zeros(count, dtype=np.int64), moves_s=np.zeros(num_events),
            keys=np.zeros(num_events, dtype=np.int64),
            terms=np.zeros(self.pools.facts.terms.shape[1]),
            places=np.zeros((count, 5), dtype=np.int64),
            seconds=np.zeros(num_events), far=np.zeros(num_events),
            meets=np.zeros((num_events, num_events), dtype=np.int64),
            rows=np.zeros((2 * count, 5)),
            windows=np.zeros((len(windows), 3), dtype=np.int64),
            returns_s=np.zeros(2 * len(windows)), simplex=np.zeros((count + 3, count)),
            patterns=np.zeros((2, 1 << min(count, MOST_CALLS))),
        )  # fmt: skip
        self._bounds = np.zeros((count, 2))
        self.moves, self.num_moves = empty_prices(1 << 10), 0
        self._least: dict[tuple[int, int, int], float] = {}

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
        pools = np.array(box, dtype=np.int64)
        while True:
            found_s = bound_s(self.frame, self.pools.facts, self.moves, pools, self.room, best_s)
            missing = [e for e, key in enumerate(self.room.keys.tolist()) if key != NO_KEY]
            if not price or not missing:
                return found_s
            for event in missing:
                self._price(box, event)

    def _price(self, box: Box, event: int) -> None:
        """Where both ends are if that is known, else the least of their layouts anywhere."""
        call, home = self.frame.order.events[event].tolist()
        ends = box[home], box[call]
        if all(self.pools.is_single(pool) for pool in ends):
            source, target = (self.pools.option(pool).layout for pool in ends)
            assert source is not None
            assert target is not None
            seconds = self.space.prices.reallocation_s(source, target)
        else:
            sources, targets = (self.pools.layouts(pool).items() for pool in ends)
            seconds = min(
                self._least_s((call, a, b), x, y) for (a, x), (b, y) in product(sources, targets)
            )
        self.num_moves += 1
        if 2 * self.num_moves >= len(self.moves.keys):
            self.moves = grown(self.moves)
        put(self.moves, int(self.room.keys[event]), seconds)

    def _least_s(
        self, key: tuple[int, int, int], sources: list[Layout], targets: list[Layout]
    ) -> float:
        """Of one layout to another, wherever they are; ``key``: reader and both layouts."""
        if key not in self._least:
            self._least[key] = min(
                self.space.prices.reallocation_s(*ends) for ends in product(sources, targets)
            )
        return self._least[key]

    def branch(self, box: Box, low_s: float, best_s: float) -> list[tuple[float, Box]]:
        """Parts of ``box``, each with its bound, that may hold a plan below ``best_s``."""
        for pool in box:
            if not self.pools.is_single(pool):
                self.pools.split(pool)
        i = branch(
            self.frame, self.pools.facts, self.moves, np.array(box, dtype=np.int64), self.room,
            low_s, best_s, self._bounds,
        )  # fmt: skip
        if i < 0:
            return []
        halves = zip(self._bounds[i].tolist(), self.pools.split(box[i]), strict=True)
        return [
            (half_s, (*box[:i], half, *box[i + 1 :]))
            for half_s, half in halves
            if half_s * (1 - ROUNDING) < best_s
        ]


def _ints(values: Sequence[Any]) -> Ints:
    return np.array(values, dtype=np.int64)
