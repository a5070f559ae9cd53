"""Seconds of one kernel between measured ones: products and attention on one device.

Efficiency ((the shortest kernel's time + the time that rates allow) / the time measured) is
interpolated linearly in the logarithm of every dimension, never the time itself.

A product that is measured again and again finds its operands in a cache, which in a run of many
layers they are not: on an L40S (96 MB of cache) products of 8 to 32 MB take half of what its
memory allows. What products that no cache holds achieve is the rate of memory (``cold_share``:
0.74 to 0.82 of the peak); a smaller product that took less counts with the time at that rate
(two fifths of the L40S' rows, next to none of the A100's).

A point of the grid that lacks is filled from its neighbours along every dimension, each weighted
by how well its like predict the points that are there: along the depth of a product times are
smooth, along rows and columns they have steps, where tiles no longer fill the device.

Attention depends on batch and heads through their product only: a kernel works on each (sequence,
kv head) by itself. Of the rows that differ in nothing else half agree to 1-3%, 19 in 20 to 20%;
they are one point, their mean. So any number of heads is inside the table.

Read ``EfficiencyGrid``, then ``KernelSurfaces``; ``kernel_costs.py`` makes layers of these kernels.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping
from statistics import mean, median

from profiles.bounds import (
    Coordinates,
    attention_bound_s,
    attention_point,
    product_bound_s,
    product_bytes,
)
from profiles.costs import Cost, Provenance
from profiles.hardware import DeviceSpec
from profiles.holes import fill_holes
from profiles.kernel_tables import KernelTable, shipped_table

logger = logging.getLogger(__name__)

_Known = tuple[float, Provenance]
_RANK = {p: i for i, p in enumerate(Provenance)}
# No device's caches hold so much (the largest of these, a B200's, 126 MB).
UNCACHED_BYTES = 256e6


def _worse(a: Provenance, b: Provenance) -> Provenance:
    return a if _RANK[a] >= _RANK[b] else b


class _Axis:
    """One dimension: sorted coordinates, and below each the next dimension (or a logarithm)."""

    def __init__(self, points: Mapping[Coordinates, _Known]) -> None:
        below: dict[float, dict[Coordinates, _Known]] = {}
        for point, value in points.items():
            below.setdefault(point[0], {})[point[1:]] = value
        self.coordinates = sorted(below)
        self.logs = [math.log(x) for x in self.coordinates]
        self.leaf = all(len(point) == 1 for point in points)
        self.values: list[_Known] = []
        self.axes: list[_Axis] = []
        for x in self.coordinates:
            if self.leaf:
                self.values.append(below[x][()])
            else:
                self.axes.append(_Axis(below[x]))

    def _value(self, i: int, rest: Coordinates) -> tuple[float, Provenance]:
        if self.leaf:
            return self.values[i]
        return self.axes[i].at(rest)

    def at(self, point: Coordinates) -> tuple[float, Provenance]:
        """The value and how it is known; beyond the ends the value at the end."""
        x, rest = point[0], point[1:]
        if x <= self.coordinates[0] or x >= self.coordinates[-1]:
            i = 0 if x <= self.coordinates[0] else len(self.coordinates) - 1
            value, known = self._value(i, rest)
            return value, known if x == self.coordinates[i] else Provenance.EXTRAPOLATED
        i = bisect_left(self.coordinates, x)
        high, high_known = self._value(i, rest)
        if self.coordinates[i] == x:
            return high, high_known
        low, low_known = self._value(i - 1, rest)
        share = (math.log(x) - self.logs[i - 1]) / (self.logs[i] - self.logs[i - 1])
        known = _worse(Provenance.INTERPOLATED, _worse(low_known, high_known))
        return low + share * (high - low), known


class EfficiencyGrid:
    """log(efficiency) over points that need not form a rectangle: nested axes, each logarithmic.

    ``filled``: points that were not measured, but guessed. What still lacks is filled from its
    neighbours on the last axis, the densest.

    Below the smallest coordinate the caller asks for the smallest (a launch dominates there);
    above the largest the efficiency stays. Both are EXTRAPOLATED, and warned of once.
    """

    def __init__(
        self,
        table: KernelTable,
        points: Mapping[Coordinates, float],
        filled: Mapping[Coordinates, float] | None = None,
    ) -> None:
        self.table = table
        self.source = f"{table.name.replace('_', ' ')}: {table.source}"
        self.floor_s = shortest_s(table)
        known = {point: (value, Provenance.MEASURED) for point, value in points.items()}
        for point, value in (filled or {}).items():
            known[point] = (value, Provenance.INTERPOLATED)
        self._root = _Axis(known)
        dimensions = range(len(next(iter(points))))
        self.lows = tuple(min(point[i] for point in points) for i in dimensions)
        self.highs = tuple(max(point[i] for point in points) for i in dimensions)
        self._warned = False

    def at(self, point: Coordinates) -> tuple[float, Provenance]:
        """(efficiency, provenance) at a point."""
        value, known = self._root.at(point)
        if known is Provenance.EXTRAPOLATED and not self._warned:
            self._warned = True
            ranges = ", ".join(
                f"{a:g} to {b:g}" for a, b in zip(self.lows, self.highs, strict=True)
            )
            logger.warning(
                "%s on %s: %s is outside what was measured (%s; %s); said once",
                self.table.name, self.table.device, "x".join(f"{x:g}" for x in point), ranges,
                self.table.source,
            )  # fmt: skip
        return math.exp(value), known


class KernelSurfaces:
    """Products and attention on ``device``, from the tables ``tables`` (of ``measured_on``).

    ``measured_on``: the device with its published rates; ``device`` may have others (a question
    of what would be if): the efficiencies hold, the rates change.
    """

    def __init__(
        self, device: DeviceSpec, measured_on: DeviceSpec, tables: Mapping[str, KernelTable]
    ) -> None:
        self.device = device
        self._products: dict[tuple[float, ...], Cost] = {}
        self._attentions: dict[tuple[float, ...], Cost] = {}
        self.cold_share = cold_share(tables["gemm"], measured_on)
        self.gemm = product_grid(tables["gemm"], measured_on, self.cold_share)
        self.prefill = attention_grid(tables["prefill_attention"], measured_on, decode=False)
        self.decode = attention_grid(tables["decode_attention"], measured_on, decode=True)

    @classmethod
    def shipped(cls, device: DeviceSpec, measured_on: DeviceSpec) -> KernelSurfaces:
        """The surfaces of this package's tables; raises ``ProfileError`` where one is damaged."""
        names = ("gemm", "prefill_attention", "decode_attention")
        return cls(device, measured_on, {n: shipped_table(measured_on.name, n) for n in names})

    def product(self, m: float, n: float, k: float) -> Cost:
        """[m, k] x [k, n] in bf16."""
        question = (m, n, k)
        answer = self._products.get(question)
        if answer is None:
            m_low, n_low, k_low = self.gemm.lows
            efficiency, known = self.gemm.at((m, n, k))
            inside = max(m, m_low), max(n, n_low), max(k, k_low)
            bound_s = product_bound_s(self.device, *inside, cold_share=self.cold_share)
            seconds = self.least_s(*inside, (self.gemm.floor_s + bound_s) / efficiency)
            answer = Cost(seconds, known, source=self.gemm.source)
            self._products[question] = answer
        return answer

    def least_s(self, m: float, n: float, k: float, seconds: float) -> float:
        """``seconds`` of a product, or what it takes at least where no cache holds its operands."""
        return _not_cached_s(self.device, m, n, k, seconds, self.cold_share)

    def attention(
        self, *, decode: bool, batch: float, length: int, heads: int, kv_heads: int, head_dim: int
    ) -> Cost:
        """Causal attention of ``batch`` sequences of ``length``; in decode one new token each."""
        question = (decode, batch, length, heads, kv_heads, head_dim)
        answer = self._attentions.get(question)
        if answer is None:
            grid = self.decode if decode else self.prefill
            point = attention_point(batch, length, heads, kv_heads, head_dim)
            efficiency, known = grid.at(point)
            inside = tuple(max(x, low) for x, low in zip(point, grid.lows, strict=True))
            bound_s = attention_bound_s(self.device, inside, decode=decode)
            seconds = (grid.floor_s + bound_s) / efficiency
            answer = self._attentions[question] = Cost(seconds, known, source=grid.source)
        return answer


def _not_cached_s(
    device: DeviceSpec, m: float, n: float, k: float, seconds: float, cold: float
) -> float:
    if product_bytes(m, n, k) >= UNCACHED_BYTES:
        return seconds
    return max(seconds, product_bound_s(device, m, n, k, cold_share=cold))


def cold_share(table: KernelTable, device: DeviceSpec) -> float:
    """Of the memory's peak rate, what products achieve that no cache holds: their median.

    Counted are those that memory bounds clearly, twice as long as their arithmetic. 1 where a
    table has none.
    """
    found = []
    for (m, n, k), seconds in table.rows.items():
        memory_s = product_bytes(m, n, k) / device.memory_bytes_per_s
        flops_s = 2.0 * m * n * k / device.peak_flops
        if product_bytes(m, n, k) >= UNCACHED_BYTES and memory_s > 2.0 * flops_s:
            found.append(memory_s / seconds)
    return min(1.0, median(found)) if found else 1.0


def shortest_s(table: KernelTable) -> float:
    """Seconds of the shortest kernel: what each takes however little it does."""
    return min(table.rows.values())


def product_grid(table: KernelTable, device: DeviceSpec, cold: float) -> EfficiencyGrid:
    """Efficiency over (m, n, k) on the device that ``table`` was measured on.

    ``cold``: see ``cold_share``.
    """
    points: dict[Coordinates, float] = {}
    floor_s = shortest_s(table)
    for (m, n, k), seconds in table.rows.items():
        bound_s = product_bound_s(device, m, n, k, cold_share=cold)
        taken_s = _not_cached_s(device, m, n, k, seconds, cold)
        points[(m, n, k)] = math.log((floor_s + bound_s) / taken_s)
    return EfficiencyGrid(table, points, fill_holes(points))


def attention_grid(table: KernelTable, device: DeviceSpec, *, decode: bool) -> EfficiencyGrid:
    """Efficiency over ``attention_point``s; rows of one point count with their geometric mean."""
    found: dict[Coordinates, list[float]] = defaultdict(list)
    floor_s = shortest_s(table)
    for row, seconds in table.rows.items():
        point = attention_point(*row)
        bound_s = attention_bound_s(device, point, decode=decode)
        found[point].append(math.log((floor_s + bound_s) / max(seconds, bound_s)))
    return EfficiencyGrid(table, {point: mean(values) for point, values in found.items()})
