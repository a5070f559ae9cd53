"""``warm_up``: every kernel of the searches is compiled, or read from disk, in the background.

The first search after an installation compiles for some seconds, on a busy machine for a minute;
the options are costed meanwhile. ``are_kept`` says beforehand which of both it will be.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from planner.cost.lanes import lane_loads
from planner.jit import DIGEST
from planner.layout import Layout
from planner.mesh import DeviceMesh
from planner.search.boxes import POOL, Facts, Frame, Room, bound_s, branch
from planner.search.chain import Chain, Found, run_chain, scan_call
from planner.search.cycles import Order
from planner.search.kernels import evaluate
from planner.search.prices import empty_prices
from planner.search.records import CALL, MESH, PAIR, RANGE, ROW, Records, Tables
from planner.search.tables import make_scratch
from profiles.models import ModelSpec


def are_kept() -> bool:
    """Were the kernels of this version compiled before, to the last one of ``run_all``?"""
    folder = cast(Any, scan_call).stats.cache_path  # None where no folder can be written
    return folder is not None and any(Path(folder).glob(f"*.scan_call-{DIGEST}-*.nbi"))


@lru_cache(maxsize=1)
def warm_up() -> threading.Thread:
    """The thread that does it, once in a process; who calls a kernel too early waits for it."""
    thread = threading.Thread(target=run_all, name="compile kernels")
    thread.start()
    return thread


def run_all() -> None:
    """Call every kernel with arrays of the right kinds that hold nothing to do."""
    t, prices = _no_tables(), empty_prices(2)
    scratch = make_scratch(t)
    none, pair = np.zeros(0, dtype=np.int64), np.zeros((2, 0), dtype=np.int64)
    found = Found(mesh=pair, row=pair, values=np.full(2, np.inf))
    evaluate(t, prices, none, none, np.inf, scratch)
    chain = Chain(
        mesh=pair, row=pair, numbers=np.zeros(3), counts=np.zeros(5, dtype=np.int64),
        state=np.zeros(1, dtype=np.uint64), found=found,
    )  # fmt: skip
    run_chain(t, prices, scratch, chain, 0.5)
    spec = ModelSpec(
        name="none", num_layers=1, hidden=1, num_heads=1, num_kv_heads=1, head_dim=1, ffn=1, vocab=1
    )
    layout = Layout(spec=spec, mesh=DeviceMesh(0, 1))
    lane_loads(layout, layout, devices_per_node=1).heaviest(slice(0, 2))
    one = t._replace(calls=np.zeros(1, dtype=CALL))  # a call that has no option
    state, best = np.zeros(5, dtype=np.int64), np.zeros(1)
    column = np.zeros((2, 1), dtype=np.int64)
    _bound_nothing()
    scan_call(one, prices, scratch, column, column, 0, False, state, best, found)


def _bound_nothing() -> None:
    ints, floats = np.zeros(0, dtype=np.int64), np.zeros(0)
    rows, pairs = np.zeros((0, 3), dtype=np.int64), np.zeros((0, 2), dtype=np.int64)
    square = np.zeros((0, 0), dtype=np.int64)
    facts = Facts(
        pools=np.zeros(0, dtype=POOL), terms=np.zeros((0, 0)), shares=np.zeros((0, 0)),
        patterns=np.zeros((0, 2, 5)), layouts=square, halves=pairs,
    )  # fmt: skip
    frame = Frame(
        order=Order(events=pairs, reads=square, home=ints, waits=ints), roles=ints, keeps=ints,
        sole=ints, counts=ints, free_bytes=floats, ends=pairs, weights=floats, windows=rows,
        most_pairs=1,
    )  # fmt: skip
    room = Room(
        box=ints, moves_s=floats, keys=ints, terms=floats, places=square, seconds=floats,
        far=floats, meets=square, rows=np.zeros((0, 5)), windows=rows, returns_s=floats,
        simplex=np.zeros((3, 0)), patterns=np.zeros((2, 1)),
    )  # fmt: skip
    bound_s(frame, facts, empty_prices(2), ints, room, 1.0)
    branch(frame, facts, empty_prices(2), ints, room, 0.0, 1.0, np.zeros((0, 2)))


def _no_tables() -> Tables:
    def records(kind: np.dtype[np.void], *shape: int) -> Records:
        return np.zeros(shape, dtype=kind)

    none = np.zeros(0, dtype=np.int64)
    return Tables(
        num_devices=1, reserve_bytes=0.0, meshes=records(MESH, 0),
        kinds=records(RANGE, 0), kind_meshes=none, allowed=np.zeros((0, 0), dtype=np.bool_),
        calls=records(CALL, 0), call_meshes=none, average_of=none, rows=records(ROW, 0),
        row_ranges=records(RANGE, 0, 0), like=records(RANGE, 0, 0), like_rows=none,
        segment_end=none, segment_bytes=np.zeros((3, 0)), most_bytes=np.zeros((3, 0)),
        pairs=records(PAIR, 0), readers=none, transfer_s=np.zeros((0, 0, 0, 0)),
    )  # fmt: skip
