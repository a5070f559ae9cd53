"""Between measured points: ``Surface``, the seconds of one operation over size and length.

Seconds per unit of size (the inverse of efficiency) are far smoother than seconds: they are
interpolated linearly in the logarithms of size and length. ``Messages`` is for what links carry.
Every answer says whether it was measured, lies between measurements, or lies beyond them.
``table.TableCosts`` holds one surface for each component, operation, width and tp.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping

from profiles.costs import Cost, Provenance

Point = tuple[int, int]  # (size, length)


def _between(x: float, x0: float, x1: float, y0: float, y1: float) -> float:
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


class _Line:
    """Seconds over length at one size."""

    def __init__(self, points: Mapping[int, float]) -> None:
        self.lengths = sorted(points)
        self.seconds = [points[length] for length in self.lengths]

    def covers(self, length: int) -> bool:
        return self.lengths[0] <= length <= self.lengths[-1]

    def at(self, length: int) -> float:
        """Seconds; log-log inside, constant below, and beyond along the last two points.

        Attention makes a token's cost a + b * length, so it goes on as a straight line.
        """
        lengths, seconds = self.lengths, self.seconds
        if length <= lengths[0] or len(lengths) == 1:
            return seconds[0]
        if length > lengths[-1]:
            slope = (seconds[-1] - seconds[-2]) / (lengths[-1] - lengths[-2])
            return seconds[-1] + max(0.0, slope) * (length - lengths[-1])
        i = bisect_left(lengths, length)
        if lengths[i] == length:
            return seconds[i]
        low, high = max(lengths[i - 1], 1), lengths[i]
        return math.exp(
            _between(
                math.log(length), math.log(low), math.log(high),
                math.log(seconds[i - 1]), math.log(seconds[i]),
            )
        ) if low < high else seconds[i]  # fmt: skip


class Surface:
    """Seconds over (size, length), from points that need not form a rectangle."""

    def __init__(self, points: Mapping[Point, float]) -> None:
        by_size: dict[int, dict[int, float]] = defaultdict(dict)
        for (size, length), seconds in points.items():
            by_size[size][length] = seconds
        self.sizes = sorted(by_size)
        self.lines = [_Line(by_size[size]) for size in self.sizes]
        # One length in all: it does not matter, or was not varied.
        self.any_length = len({length for _, length in points}) == 1

    def at(self, size: int, length: int) -> Cost:
        """Seconds at a point.

        Inside: log(seconds / size) is linear in log(size), and on the neighbouring sizes in
        log(length). Beyond the largest size: its seconds per unit. Below the smallest: its
        seconds, since launching dominates there.
        """
        sizes = self.sizes
        if size <= sizes[0] or size >= sizes[-1]:
            line, edge = (self.lines[0], sizes[0]) if size <= sizes[0] else (
                self.lines[-1], sizes[-1])  # fmt: skip
            seconds = line.at(length) * max(1.0, size / edge)
            if size == edge:
                return Cost(seconds, self._provenance(line, length))
            return Cost(seconds, Provenance.EXTRAPOLATED)
        i = bisect_left(sizes, size)
        high = self.lines[i]
        if sizes[i] == size and (self.any_length or high.covers(length)):
            return Cost(high.at(length), self._provenance(high, length))
        below, low, above = sizes[i - 1], self.lines[i - 1], sizes[i]
        log_unit_s = _between(
            math.log(size), math.log(below), math.log(above),
            math.log(low.at(length) / below), math.log(high.at(length) / above),
        )  # fmt: skip
        inside = self.any_length or low.covers(length) or high.covers(length)
        return Cost(
            math.exp(log_unit_s) * size,
            Provenance.INTERPOLATED if inside else Provenance.EXTRAPOLATED,
        )

    def _provenance(self, line: _Line, length: int) -> Provenance:
        if self.any_length or length in line.lengths:
            return Provenance.MEASURED
        return Provenance.INTERPOLATED if line.covers(length) else Provenance.EXTRAPOLATED

    @property
    def range_text(self) -> str:
        lengths = [length for line in self.lines for length in line.lengths]
        return (
            f"sizes {self.sizes[0]} to {self.sizes[-1]}, lengths {min(lengths)} to {max(lengths)}"
        )


class Messages:
    """Seconds of a message or collective over (bytes, workers); workers from lowest to highest.

    Between two measured sizes one protocol takes a start and its bytes at a rate: a straight
    line. Where the network's library changes its protocol between them, no curve through the
    sizes of a series knows at how many bytes.
    """

    def __init__(self, points: Mapping[Point, float]) -> None:
        by_workers: dict[int, dict[int, float]] = defaultdict(dict)
        for (num_bytes, workers), seconds in points.items():
            by_workers[workers][num_bytes] = seconds
        self.workers = sorted(by_workers)
        self._series = {
            workers: (sorted(line), [line[num_bytes] for num_bytes in sorted(line)])
            for workers, line in by_workers.items()
        }

    def at(self, num_bytes: float, workers: int) -> Cost:
        """Seconds of ``num_bytes``: below the smallest size its seconds, since starting dominates

        there; beyond the largest its seconds per byte. Between two numbers of workers log-log.
        """
        i = bisect_left(self.workers, workers)
        assert self.workers[0] <= workers <= self.workers[-1], (workers, self.workers)
        high = self.workers[i]
        if high == workers:
            return self._along(num_bytes, workers)
        low = self.workers[i - 1]
        less, more = self._along(num_bytes, low), self._along(num_bytes, high)
        log_s = _between(
            math.log(workers), math.log(low), math.log(high),
            math.log(less.seconds), math.log(more.seconds),
        )  # fmt: skip
        beyond = Provenance.EXTRAPOLATED in (less.provenance, more.provenance)
        provenance = Provenance.EXTRAPOLATED if beyond else Provenance.INTERPOLATED
        return Cost(math.exp(log_s), provenance)

    def _along(self, num_bytes: float, workers: int) -> Cost:
        sizes, seconds = self._series[workers]
        i = bisect_left(sizes, num_bytes)
        if i < len(sizes) and sizes[i] == num_bytes:
            return Cost(seconds[i], Provenance.MEASURED)
        if i == 0:
            return Cost(seconds[0], Provenance.EXTRAPOLATED)
        if i == len(sizes):
            return Cost(seconds[-1] * num_bytes / sizes[-1], Provenance.EXTRAPOLATED)
        line_s = _between(num_bytes, sizes[i - 1], sizes[i], seconds[i - 1], seconds[i])
        return Cost(line_s, Provenance.INTERPOLATED)
