"""Protects the figures of many scenarios: points, fronts and bars are those of the frames."""

from __future__ import annotations

import pandas as pd
import pytest

from profiles.units import GIB

pytest.importorskip("plotly", reason="figures need the extra notebook")

from planner.figures_sweep import lines, pareto, tornado

FRAME = pd.DataFrame({
    "gpus": [8, 16, 8, 16, 32], "device": ["a100", "a100", "h100", "h100", "h100"],
    "seconds": [9.0, 5.0, 4.0, 3.0, float("nan")], "dollars": [1.0, 1.2, 0.9, 2.0, float("nan")],
    "peak_memory": [GIB, 2 * GIB, 3 * GIB, 4 * GIB, float("nan")],
})  # fmt: skip


def test_a_front_is_named_and_joined_in_order() -> None:
    front = FRAME.iloc[[3, 2]]
    every, best = pareto(FRAME, front, "seconds", "dollars", axes=["gpus", "device"]).data
    assert list(zip(every.x, every.y)) == [(9, 1), (5, 1.2), (4, 0.9), (3, 2)]
    assert list(best.x) == [3.0, 4.0]
    assert list(best.text) == ["16 gpus, h100", "8 gpus, h100"]


def test_lines_take_the_least_of_each_value() -> None:
    first, second = lines(FRAME, "gpus", "seconds", by="device").data
    assert (first.name, list(first.x), list(first.y)) == ("a100", [8, 16], [9.0, 5.0])
    assert (second.name, list(second.y)) == ("h100", [4.0, 3.0])
    (one,) = lines(FRAME, "gpus", "peak_memory").data
    assert list(one.y) == [1.0, 2.0]  # GiB


def test_bars_of_a_tornado_end_at_their_values() -> None:
    frame = pd.DataFrame({
        "lever": ["FLOP/s", "batch size"], "divided": [9.0, 3.0], "base": [5.0, 5.0],
        "multiplied": [4.0, 8.0], "swing": [5.0, 5.0],
    })  # fmt: skip
    low, high = tornado(frame, "seconds", factor=2.0).data
    assert [b + x for b, x in zip(low.base, low.x)] == [9.0, 3.0]
    assert [b + x for b, x in zip(high.base, high.x)] == [4.0, 8.0]
    assert (low.name, high.name) == ("divided by 2", "multiplied by 2")
