"""Compiled: seconds and memory of an assignment, moves, the chain of the walk, scans.

An assignment is two vectors over calls: ``mesh`` (an index of ``Tables.mesh_first``) and ``row``
(a choice, an index of ``Tables.seconds``). ``evaluate`` gives what the simulator and the memory
model give for the compiled plan, to rounding (``tests/planner/test_kernels.py``).

Seconds are the longest cycle of the step's events (``pace.py``).
"""

from __future__ import annotations

import numpy as np

from planner.jit import brief, compiled, entry, inlined
from planner.search.pace import largest_cycle, link_events, overlap
from planner.search.records import NO_KEY, Floats, Ints, Prices, Records, Scratch, Tables

# ---- prices of reallocations ------------------------------------------------------------------


@brief
def slot(keys: Ints, key: int) -> int:
    """Where ``key`` is or would be in an open-addressing table of a power of two places."""
    mask = len(keys) - 1
    place = ((key ^ (key >> 29)) * 0x2545F4914F6CDD1D >> 20) & mask
    while keys[place] != NO_KEY and keys[place] != key:
        place = (place + 1) & mask
    return place


@compiled
def reallocation_key(t: Tables, mesh: Ints, row: Ints, source: int, target: int) -> int:
    """Of the layouts of two calls of one role; equal for both moved by whole nodes of a group."""
    a, b = t.meshes[mesh[source]], t.meshes[mesh[target]]
    # Between groups it does not matter where in them.
    first, other = 0, 0
    if a.group == b.group:
        shift = min(a.node, b.node)
        first, other = a.first - shift, b.first - shift
    num_axes = t.like.shape[1]
    key = t.calls[target].spec * num_axes + t.rows[row[source]].axes
    key = key * num_axes + t.rows[row[target]].axes
    key = key * t.num_devices + first
    return key * t.num_devices + other  # type: ignore[no-any-return]


# ---- seconds ----------------------------------------------------------------------------------


@inlined
def same_layout(rows: Records, mesh: Ints, row: Ints, i: int, j: int) -> bool:
    return mesh[i] == mesh[j] and rows[row[i]].axes == rows[row[j]].axes  # type: ignore[no-any-return]


@inlined
def same_samples(rows: Records, mesh: Ints, row: Ints, i: int, j: int) -> bool:
    """Do two calls work on the same samples on each rank?"""
    return mesh[i] == mesh[j] and rows[row[i]].samples == rows[row[j]].samples  # type: ignore[no-any-return]


@compiled
def find_transfers(t: Tables, mesh: Ints, row: Ints, transfer_s: Floats) -> None:
    """Fill ``transfer_s`` [P]: as ``simulate.transfer_bytes`` and its price."""
    meshes, rows, calls, pairs = t.meshes, t.rows, t.calls, t.pairs
    readers, prices_s = t.readers, t.transfer_s
    for i in range(len(mesh)):
        for k in range(calls[i].pair_start, calls[i].pair_stop):
            source = pairs[k].producer
            transfer_s[k] = 0.0
            whole = calls[source].last_stage_only == 0 or rows[row[source]].stages == 1
            there = whole and same_samples(rows, mesh, row, source, i)
            for n in range(pairs[k].reader_start, pairs[k].reader_stop):
                there = there or same_samples(rows, mesh, row, readers[n], i)
            a, b = meshes[mesh[source]], meshes[mesh[i]]
            copies = rows[row[i]].copies
            if there:
                continue
            if a.group != b.group:
                transfer_s[k] = max(
                    prices_s[k, copies, a.kind, 2 + b.group],
                    prices_s[k, copies, b.kind, 2 + a.group],
                )
            elif min(a.first, b.first) != max(a.end, b.end) - 1:
                far = 0 if min(a.node, b.node) == max(a.last_node, b.last_node) else 1
                kind = b.kind if b.end - b.first < a.end - a.first else a.kind
                transfer_s[k] = prices_s[k, copies, kind, far]


@compiled
def averages(t: Tables, mesh: Ints, row: Ints, n: int, i: int) -> bool:
    """Is average n taken in the layout of call i at the end of a step? Once in each layout."""
    if t.calls[i].average != n:
        return False
    for j in range(i):
        if t.calls[j].average == n and same_layout(t.rows, mesh, row, i, j):
            return False
    return True


@compiled
def add_reallocation(
    t: Tables, prices: Prices, mesh: Ints, row: Ints, home: int, i: int, s: Scratch, count: int
) -> None:  # fmt: skip
    """Fill event ``count``: weights go from the layout of call ``home`` to that of call i."""
    key = reallocation_key(t, mesh, row, home, i)
    place = slot(prices.keys, key)
    known = prices.keys[place] == key
    if not known:
        s.missing[0] = key
    s.events[count].call = i
    s.events[count].home = home
    s.events[count].busy_s = prices.seconds[place] if known else 0.0


@compiled
def borrows(t: Tables, mesh: Ints, row: Ints, uses: Records, i: int) -> bool:
    """Are weights brought for call i? No earlier reader has brought them; then ``uses`` knows."""
    h = t.calls[i].home
    if h < 0 or h == i or same_layout(t.rows, mesh, row, i, h):
        return False
    for j in range(len(mesh)):
        if t.calls[j].home == h and uses[j].last >= 0 and same_layout(t.rows, mesh, row, i, j):
            uses[j].last = max(uses[j].last, i)
            return False
    uses[i].first = i
    uses[i].last = i
    return True


@compiled
def list_events(
    t: Tables, prices: Prices, mesh: Ints, row: Ints, s: Scratch
) -> int:  # fmt: skip
    """Fill ``s`` with the events of a step in their order; how many. Unknown prices are 0."""
    calls, rows, events, uses, after_s = t.calls, t.rows, s.events, s.uses, s.after_s
    find_transfers(t, mesh, row, after_s)
    count = 0
    for i in range(len(mesh)):
        uses[i].last = -1
    for i in range(len(mesh)):
        if calls[i].ahead == 1 and borrows(t, mesh, row, uses, i):
            uses[i].first = 0
            add_reallocation(t, prices, mesh, row, calls[i].home, i, s, count)
            count += 1
    for i in range(len(mesh)):
        if calls[i].ahead == 0 and borrows(t, mesh, row, uses, i):
            add_reallocation(t, prices, mesh, row, calls[i].home, i, s, count)
            count += 1
        total = rows[row[i]].seconds
        for k in range(calls[i].pair_stop - 1, calls[i].pair_start - 1, -1):
            total += after_s[k]
            after_s[k] = total
        events[count].call = i
        events[count].home = -1
        events[count].busy_s = total + rows[row[i]].reload_s
        uses[i].event = count
        count += 1
    for n in range(len(t.average_of)):
        for i in range(len(mesh)):
            if averages(t, mesh, row, n, i):
                h = t.average_of[n]
                if not same_layout(rows, mesh, row, i, h):
                    add_reallocation(t, prices, mesh, row, h, i, s, count)
                    count += 1
                events[count].call = i
                events[count].home = -1
                events[count].busy_s = rows[row[i]].average_s
                count += 1
    return count


# ---- memory -----------------------------------------------------------------------------------


@compiled
def find_residents(rows: Records, calls: Records, mesh: Ints, row: Ints, uses: Records) -> bool:
    """Fill ``uses.stays``: which calls' layouts are homes, each counted once.

    False where one call has weights offloaded that another one keeps: that is no plan.
    """
    agree = True
    for j in range(len(mesh)):
        uses[j].stays = 0
        if calls[j].home >= 0:
            uses[j].stays = 1 if calls[j].home == j else 0
        elif calls[j].role >= 0:
            uses[j].stays = 1
            for k in range(j):
                if calls[k].role == calls[j].role and same_layout(rows, mesh, row, j, k):
                    uses[j].stays = 0
                    if (rows[row[j]].reload_s > 0.0) != (rows[row[k]].reload_s > 0.0):
                        agree = False
    return agree


@inlined
def column_of(uses: Records, i: int, j: int) -> int:
    """Bytes of call j that are there while call i runs: 0 held, 1 borrowed, -1 neither."""
    if uses[j].stays == 1:
        return 0
    return 1 if uses[j].last >= 0 and uses[j].first <= i <= uses[j].last else -1


@compiled
def peak_of(t: Tables, mesh: Ints, row: Ints, uses: Records, i: int, now: int) -> float:
    """Bytes of the fullest device of call i's mesh while it runs (``now`` is i).

    At the step's end, when no call does, ``now`` is their number, and it borrows weights.
    """
    meshes, rows = t.meshes, t.rows
    segment_end, segment_bytes = t.segment_end, t.segment_bytes
    peak, device, end = 0.0, meshes[mesh[i]].first, meshes[mesh[i]].end
    while device < end:
        total, until = 0.0, end
        for n in range(-1, len(mesh)):
            j = i if n < 0 else n
            column = column_of(uses, now, j)
            if n < 0:
                column = 2 if now == i else 1
            place, what = meshes[mesh[j]], rows[row[j]]
            if column < 0 or device >= place.end:
                continue
            if device < place.first:
                until = min(until, place.first)
                continue
            width = (place.end - place.first) // what.stages
            k = what.segment_start
            while k < what.segment_stop and place.first + width * segment_end[k] <= device:
                k += 1
            if k < what.segment_stop:
                total += segment_bytes[column, k]
                until = min(until, place.first + width * segment_end[k])
        peak = max(peak, total)
        device = until
    return peak


@compiled
def overshoot_of(t: Tables, mesh: Ints, row: Ints, uses: Records) -> float:
    """Bytes that the fullest device lacks, as a share of what it has. Needs ``list_events``.

    Device by device only where the sum of the fullest stages is too much.
    """
    meshes, most_bytes = t.meshes, t.most_bytes
    if not find_residents(t.rows, t.calls, mesh, row, uses):
        return 1.0
    full = 1.0
    for i in range(len(mesh)):
        most, place = most_bytes[2, row[i]], meshes[mesh[i]]
        for j in range(len(mesh)):
            column = column_of(uses, i, j)
            if column >= 0 and overlap(meshes, mesh[i], mesh[j]):
                most += most_bytes[column, row[j]]
        if most > place.free_bytes and most + t.reserve_bytes > full * place.memory_bytes:
            peak = peak_of(t, mesh, row, uses, i, i)
            full = max(full, (peak + t.reserve_bytes) / place.memory_bytes)
    for n in range(len(t.average_of)):
        for i in range(len(mesh)):
            if averages(t, mesh, row, n, i) and not same_layout(
                t.rows, mesh, row, i, t.average_of[n]
            ):
                peak = peak_of(t, mesh, row, uses, i, len(mesh))
                full = max(full, (peak + t.reserve_bytes) / meshes[mesh[i]].memory_bytes)
    return full - 1.0


# ---- both -------------------------------------------------------------------------------------


@entry
def evaluate(
    t: Tables, prices: Prices, mesh: Ints, row: Ints, limit_s: float, s: Scratch
) -> tuple[float, float]:  # fmt: skip
    """(seconds per step, overshoot); where the seconds are above ``limit_s`` only that is sure.

    ``s.missing`` has a key where a price was unknown: the seconds are then no more than the true.
    """
    s.missing[0] = NO_KEY
    count = list_events(t, prices, mesh, row, s)
    floor_s = link_events(t, mesh, count, s)
    step_s = largest_cycle(s.events, s.weight_s, count, floor_s, limit_s)
    if step_s > limit_s:
        return step_s, 0.0
    return step_s, overshoot_of(t, mesh, row, s.uses)


@entry
def energy_of(step_s: float, overshoot: float) -> float:
    """What searches minimise: seconds, dearer the less a plan fits."""
    return step_s * (1.05 + 4.0 * overshoot) if overshoot > 0 else step_s


@entry
def evaluate_many(
    t: Tables, prices: Prices, mesh: Ints, row: Ints, out: Floats, s: Scratch
) -> int:  # fmt: skip
    """Fill ``out`` [N, 2] for ``mesh`` and ``row`` [N, C]; how many have an unknown price."""
    unknown = 0
    for n in range(len(out)):
        out[n, 0], out[n, 1] = evaluate(t, prices, mesh[n], row[n], np.inf, s)
        if s.missing[0] != NO_KEY:
            unknown += 1
    return unknown
