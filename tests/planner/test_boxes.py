"""Protects the algebra of boxes: no value lost, none twice. Oracle: numbered values of an array."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from planner.boxes import intersection, interval_boxes, without
from planner.layout import ParameterSlice

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


def index(box: ParameterSlice) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(box.offset, box.length, strict=True))


def draw_box(data: Any, shape: tuple[int, ...]) -> ParameterSlice:
    offset = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    length = tuple(data.draw(st.integers(1, size - o)) for size, o in zip(shape, offset))
    return ParameterSlice(name="p", offset=offset, length=length)


@given(shape=shapes, data=st.data())
def test_boxes_of_an_interval_are_its_values_in_order(shape: tuple[int, ...], data: Any) -> None:
    count = prod(shape)
    lo = data.draw(st.integers(0, count))
    hi = data.draw(st.integers(lo, count))
    values = np.arange(count).reshape(shape)
    found = [
        values[tuple(slice(o, o + n) for o, n in zip(offset, length, strict=True))].ravel()
        for offset, length in interval_boxes(shape, lo, hi)
    ]
    assert [int(v) for part in found for v in part] == list(range(lo, hi))
    assert len(found) <= 2 * len(shape) - 1


@given(shape=shapes, data=st.data())
def test_what_is_common_and_what_is_left_make_up_the_box(shape: tuple[int, ...], data: Any) -> None:
    a, b = draw_box(data, shape), draw_box(data, shape)
    masks = [np.zeros(shape, dtype=bool) for _ in range(2)]
    for mask, box in zip(masks, (a, b)):
        mask[index(box)] = True
    common = intersection(a, b)
    assert (0 if common is None else common.num_values) == int((masks[0] & masks[1]).sum())
    if common is None:
        return
    assert all(mask[index(common)].all() for mask in masks)
    count = np.zeros(shape, dtype=int)
    rest = without(a, common)
    for box in rest:
        count[index(box)] += 1
    assert (count == (masks[0] & ~masks[1])).all()
    assert len(rest) <= 2 * len(shape)
