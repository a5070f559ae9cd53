"""Boxes of a parameter: what intervals of it, common parts and rests are, in as few boxes.

A box is an offset and a length in each dimension (``layout.ParameterSlice``). Nothing here knows
of devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from planner.layout import ParameterSlice


def interval_boxes(
    shape: Sequence[int], lo: int, hi: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, length) of the boxes that values ``lo`` to ``hi`` of a flattened tensor make up.

    In the order of the values: a part of a row, whole rows, a part of a row.

    >>> interval_boxes((4, 3), 2, 10)
    [((0, 2), (1, 1)), ((1, 0), (2, 3)), ((3, 0), (1, 1))]
    """
    if lo >= hi:
        return []
    if len(shape) == 1:
        return [((lo,), (hi - lo,))]
    row = prod(shape[1:])
    first, last = -(-lo // row), hi // row  # whole rows

    def part(index: int, start: int, stop: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        inner = interval_boxes(shape[1:], start - index * row, stop - index * row)
        return [((index, *offset), (1, *length)) for offset, length in inner]

    if first > last:  # inside one row
        return part(last, lo, hi)
    rest = tuple(shape[1:])
    whole = [((first, *(0 for _ in rest)), (last - first, *rest))] if last > first else []
    head = part(first - 1, lo, first * row) if lo < first * row else []
    tail = part(last, last * row, hi) if last * row < hi else []
    return [*head, *whole, *tail]


def intersection(a: ParameterSlice, b: ParameterSlice) -> ParameterSlice | None:
    """What two boxes of one parameter have in common."""
    offset = tuple(max(x, y) for x, y in zip(a.offset, b.offset, strict=True))
    ends = (
        min(x + n, y + m) for x, n, y, m in zip(a.offset, a.length, b.offset, b.length, strict=True)
    )
    length = tuple(end - start for start, end in zip(offset, ends, strict=True))
    if any(n <= 0 for n in length):
        return None
    return ParameterSlice(name=a.name, offset=offset, length=length)


def without(box: ParameterSlice, inner: ParameterSlice) -> list[ParameterSlice]:
    """The rest of ``box`` when ``inner``, a box inside it, is taken out: at most two a dimension.

    >>> whole = ParameterSlice(name="q", offset=(0, 0), length=(4, 4))
    >>> for b in without(whole, ParameterSlice(name="q", offset=(1, 0), length=(1, 3))):
    ...     print(b.offset, b.length)
    (0, 0) (1, 4)
    (2, 0) (2, 4)
    (1, 3) (1, 1)
    """
    found: list[ParameterSlice] = []
    offset, length = list(box.offset), list(box.length)
    for dim, (lo, n) in enumerate(zip(inner.offset, inner.length, strict=True)):
        start, end = offset[dim], offset[dim] + length[dim]
        for a, b in ((start, lo), (lo + n, end)):
            if a < b:
                offset[dim], length[dim] = a, b - a
                found.append(
                    ParameterSlice(name=box.name, offset=tuple(offset), length=tuple(length))
                )
        offset[dim], length[dim] = lo, n
    return found
