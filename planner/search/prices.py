"""``ReallocationPrices``: the one table that grows while a search runs.

A price is asked of the cost model when a kernel first needs it.
"""

from __future__ import annotations

import threading

import numpy as np

from planner.layout import Layout
from planner.mesh import DeviceMesh
from planner.search.kernels import slot
from planner.search.records import NO_KEY, Prices, Tables
from planner.search.tables import Index
from planner.simulate import StepPrices


class ReallocationPrices:
    """``table`` has seconds by ``kernels.reallocation_key``.

    Threads may read it while one adds: a place's seconds are written before its key, and a table
    that is full is replaced as a whole.
    """

    def __init__(self, index: Index, tables: Tables, prices: StepPrices) -> None:
        self.index, self.tables, self.prices = index, tables, prices
        self.table = empty_prices(1 << 12)
        self.count = 0
        self._lock = threading.Lock()

    def add(self, key: int) -> None:
        """Ask the cost model for the price of ``key``."""
        with self._lock:
            if self.table.keys[slot(self.table.keys, key)] == key:
                return
            if 2 * self.count >= len(self.table.keys):
                self.table = grown(self.table)
            put(self.table, key, self.prices.reallocation_s(*self.layouts(key)))
            self.count += 1

    def layouts(self, key: int) -> tuple[Layout, Layout]:
        """What ``kernels.reallocation_key`` packed."""
        t, num_axes = self.tables, len(self.index.axes)
        key, other = divmod(key, t.num_devices)
        key, first = divmod(key, t.num_devices)
        key, target = divmod(key, num_axes)
        spec, source = divmod(key, num_axes)
        return self._layout(spec, source, first), self._layout(spec, target, other)

    def _layout(self, spec: int, axes: int, offset: int) -> Layout:
        """``offset``: of the first device in its group."""
        group, pp, tp, dp, ep = self.index.axes[axes]
        start = self.index.space.problem.cluster.starts[group]
        mesh = DeviceMesh(start + offset, pp * tp * dp)
        return Layout(spec=self.index.specs[spec], mesh=mesh, pp=pp, tp=tp, dp=dp, ep=ep)


def empty_prices(num_places: int) -> Prices:
    """Room for less than ``num_places``, a power of two."""
    return Prices(keys=np.full(num_places, NO_KEY, dtype=np.int64), seconds=np.zeros(num_places))


def put(table: Prices, key: int, seconds: float) -> None:
    """Seconds first: who finds the key finds them."""
    place = slot(table.keys, key)
    table.seconds[place] = seconds
    table.keys[place] = key


def grown(table: Prices) -> Prices:
    """The same in a table of twice the size."""
    larger = empty_prices(2 * len(table.keys))
    for place in np.flatnonzero(table.keys != NO_KEY):
        put(larger, int(table.keys[place]), float(table.seconds[place]))
    return larger
