"""Compiled: seconds that no assignment of a box is below, and which call of it to branch on.

``relaxation.py`` has the proof, bound by bound; the numbers below are its. ``pools.py`` says what a
box is and fills ``Facts``, ``relaxation.py`` makes the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from planner.jit import compiled, entry
from planner.search.cycles import Order, longest_cycle_s
from planner.search.kernels import slot
from planner.search.patterns import MOST_CALLS, pattern_bound_s
from planner.search.records import NO_KEY, Floats, Ints, Prices, Records

ROUNDING = 1e-9  # relative: sums in another order than the evaluator's

MOST_POOLS = 1 << 31

# Least over the options of a pool, but for what says which they are.
POOL = np.dtype(
    [
        ("size", "i8"),  # devices
        ("first", "i8"),  # the devices that every mesh of the pool has, as an interval
        ("end", "i8"),
        ("group", "i8"),  # in which all are, -1: several
        ("layout", "i8"),  # the only one, -1: several
        ("num_layouts", "i8"),
        ("single", "i8"),  # 1: one choice on one mesh
        ("seconds", "f8"),
        ("held", "f8"),  # bytes over all devices
        ("need", "f8"),  # bytes while it runs, over all devices, beside what is resident
        ("need_borrow", "f8"),  # and with its weights borrowed
        ("peak", "f8"),  # bytes on its fullest device, its own resident weights included
        ("peak_borrow", "f8"),
        ("floor", "f8"),  # bytes that its weights keep on every device of its group
    ],
    align=True,
)


class Facts(NamedTuple):
    """What is known of ``P`` pools."""

    pools: Records  # [P] of POOL
    terms: Floats  # [P, terms]: bound 4
    shares: Floats  # [P, scales]: of the cluster's capacity, by its devices' weights
    patterns: Floats  # [P, 2, 5]: bound 7, weights at home or borrowed
    layouts: Ints  # [P, words]: a bit for each layout, of one role
    halves: Ints  # [P, 2]: two pools that together are this one, -1: not split


class Frame(NamedTuple):
    """What the graph and the cluster say of every box: ``C`` calls, ``G`` groups, ``W`` windows."""

    order: Order
    roles: Ints  # [C], -1: none
    keeps: Ints  # [C]: 1 where the weights of a call's layout stay over the step
    sole: Ints  # [C]: 1 where it is its role's only reader away from home
    counts: Ints  # [G]: devices
    free_bytes: Floats  # [G]: of each device
    ends: Ints  # [cycles of bound 4, 2]: first and last call
    weights: Floats  # [U] of bound 4
    windows: Ints  # [W, 3]: bound 7
    most_pairs: int  # of layouts, of which a move's price is the least


class Room(NamedTuple):
    """Room for one bound; ``E`` events."""

    box: Ints  # [C]
    moves_s: Floats  # [E]: below 0 where the event may not take place
    keys: Ints  # [E]: of moves that were never priced, else NO_KEY
    terms: Floats  # [terms]
    places: Ints  # [C, 5]
    seconds: Floats  # [E]
    far: Floats  # [E]
    meets: Ints  # [E, E]
    rows: Floats  # [2 C, 5]: of all calls, then of those in one group
    windows: Ints  # [W, 3]
    returns_s: Floats  # [2 W]
    simplex: Floats  # [C + 3, C]
    patterns: Floats  # [2, 2^C]


@compiled
def apart(layouts: Ints, a: int, b: int) -> bool:
    """Do the layouts of two pools surely differ?"""
    common = 0
    for word in range(layouts.shape[1]):
        common |= layouts[a, word] & layouts[b, word]
    return common == 0


@compiled
def borrows(frame: Frame, facts: Facts, box: Ints, i: int) -> bool:
    """Do the weights of call i surely come from another layout?"""
    home = frame.order.home[i]
    return home >= 0 and home != i and apart(facts.layouts, box[i], box[home])


# ---- bound 5 ----------------------------------------------------------------------------------


@compiled
def fits_in(
    frame: Frame, facts: Facts, box: Ints, group: int, total: float, each: float
) -> bool:  # fmt: skip
    """May the calls in ``group`` (-1: all) share devices of ``total`` bytes, all of ``each``?"""
    pools, held, floor = facts.pools, 0.0, 0.0
    for i in range(len(box)):
        if frame.keeps[i] == 1 and (group < 0 or pools[box[i]].group == group):
            held += pools[box[i]].held
            floor += pools[box[i]].floor
    if held > total:
        return False
    for i in range(len(box)):
        pool, home = pools[box[i]], frame.order.home[i]
        if group >= 0 and pool.group != group:
            continue
        away = borrows(frame, facts, box, i)
        if held + (pool.need_borrow if away else pool.need) > total:
            return False
        others = floor
        for j in range(len(box)):
            inside = frame.keeps[j] == 1 and (group < 0 or pools[box[j]].group == group)
            if inside and (home < 0 or home == i) and frame.roles[j] == frame.roles[i]:
                others -= pools[box[j]].floor
        if (pool.peak_borrow if away else pool.peak) + others > each:
            return False
    return True


@compiled
def fits(frame: Frame, facts: Facts, box: Ints) -> bool:
    num_groups, total = len(frame.counts), 0.0
    for group in range(num_groups):
        room = frame.counts[group] * frame.free_bytes[group]
        total += room
        if not fits_in(frame, facts, box, group, room, frame.free_bytes[group]):
            return False
    return num_groups == 1 or fits_in(frame, facts, box, -1, total, np.inf)


# ---- bound 6 ----------------------------------------------------------------------------------


@compiled
def move_s(
    frame: Frame, facts: Facts, prices: Prices, box: Ints, event: int, keys: Ints
) -> float:  # fmt: skip
    """Seconds of a reallocation; below 0 where it may not take place.

    One that was never priced takes no time, and leaves its key in ``keys``.
    """
    call, home = frame.order.events[event, 0], frame.order.events[event, 1]
    here, there = facts.pools[box[call]], facts.pools[box[home]]
    fixed = here.single == 1 and there.single == 1
    if not fixed and not apart(facts.layouts, box[call], box[home]):
        return -1.0
    for i in range(call):  # weights that an earlier reader brought are not brought again
        if frame.order.home[i] == home and not apart(facts.layouts, box[i], box[call]):
            return -1.0
    if here.num_layouts * there.num_layouts > frame.most_pairs:
        return 0.0
    if fixed and here.layout == there.layout and here.first == there.first:
        return -1.0
    key = box[home] * MOST_POOLS + box[call]
    place = slot(prices.keys, key)
    if prices.keys[place] == key:
        return float(prices.seconds[place])
    keys[event] = key
    return 0.0


# ---- bounds 1, 3 and 4 ------------------------------------------------------------------------


@compiled
def largest_term_s(frame: Frame, facts: Facts, box: Ints, room: Room) -> float:
    """Each call for itself takes its least term; a move is a term of the larger of its meshes."""
    terms, num_scales = room.terms, facts.shares.shape[1]
    for k in range(len(terms)):
        terms[k] = 0.0
        for i in range(len(box)):
            terms[k] += facts.terms[box[i], k]
    for e in range(len(room.moves_s)):
        seconds = room.moves_s[e]
        if seconds <= 0.0:
            continue
        call, home, k = frame.order.events[e, 0], frame.order.events[e, 1], 0
        for cycle in range(len(frame.ends)):
            whole = frame.ends[cycle, 0] == call and frame.ends[cycle, 1] == home
            for scale in range(num_scales):
                share = max(facts.shares[box[call], scale], facts.shares[box[home], scale])
                work = seconds * share if frame.sole[call] == 1 else 0.0
                for u in frame.weights:
                    terms[k] += (1.0 - u) * (seconds if whole else 0.0) + u * work
                    k += 1
    most = 0.0
    for k in range(len(terms)):
        most = max(most, terms[k])
    return most


# ---- bound 2 ----------------------------------------------------------------------------------


@compiled
def cycle_s(frame: Frame, facts: Facts, box: Ints, room: Room) -> float:
    num_devices = 0
    for count in frame.counts:
        num_devices += count
    for i in range(len(box)):
        pool = facts.pools[box[i]]
        room.places[i, 0], room.places[i, 1], room.places[i, 2] = pool.size, pool.first, pool.end
        room.places[i, 3] = pool.group
        room.places[i, 4] = frame.counts[pool.group] if pool.group >= 0 else num_devices
    for e in range(len(room.seconds)):
        own = frame.order.events[e, 1] < 0
        call = frame.order.events[e, 0]
        room.seconds[e] = facts.pools[box[call]].seconds if own else room.moves_s[e]
    return longest_cycle_s(
        frame.order, room.places, num_devices, room.seconds, room.far, room.meets
    )


# ---- bound 7 ----------------------------------------------------------------------------------


@compiled
def patterns_s(
    frame: Frame, facts: Facts, box: Ints, room: Room, low_s: float, best_s: float
) -> float:  # fmt: skip
    """At least ``low_s``."""
    count, windows, num_devices, most_bytes = len(box), frame.windows, 0.0, 0.0
    for w in range(len(windows)):
        room.returns_s[w] = 0.0
        for e in range(len(room.moves_s)):
            call, home = frame.order.events[e, 0], frame.order.events[e, 1]
            if room.moves_s[e] > 0.0 and windows[w, 0] == call and windows[w, 1] == home:
                room.returns_s[w] = room.moves_s[e]
    for i in range(count):
        away = 1 if borrows(frame, facts, box, i) else 0
        for k in range(5):
            room.rows[i, k] = facts.patterns[box[i], away, k]
    for group in range(len(frame.counts)):
        num_devices += frame.counts[group]
        most_bytes = max(most_bytes, frame.free_bytes[group])
    low_s = pattern_bound_s(
        room.rows[:count], windows, room.returns_s[: len(windows)], num_devices, most_bytes,
        low_s, best_s, room.simplex, room.patterns,
    )  # fmt: skip
    if len(frame.counts) > 1:
        for group in range(len(frame.counts)):
            if low_s < best_s:
                low_s = group_patterns_s(frame, facts, box, room, group, low_s, best_s)
    return low_s


@compiled
def group_patterns_s(
    frame: Frame, facts: Facts, box: Ints, room: Room, group: int, low_s: float, best_s: float
) -> float:  # fmt: skip
    """Of the calls that are surely in one group, at least ``low_s``."""
    count, inside, kept, total = len(box), 0, 0, len(frame.windows)
    for i in range(count):
        room.places[i, 0] = -1
        if facts.pools[box[i]].group == group:
            room.places[i, 0] = inside
            for k in range(5):
                room.rows[count + inside, k] = room.rows[i, k]
            inside += 1
    if inside == 0:
        return low_s
    for w in range(total):
        first = room.places[frame.windows[w, 0], 0]
        last = room.places[frame.windows[w, 1], 0]
        if first >= 0 and last >= 0:
            bits = 0
            for i in range(count):
                if frame.windows[w, 2] >> i & 1 and room.places[i, 0] >= 0:
                    bits |= 1 << room.places[i, 0]
            room.windows[kept, 0], room.windows[kept, 1], room.windows[kept, 2] = first, last, bits
            room.returns_s[total + kept] = room.returns_s[w]
            kept += 1
    return float(pattern_bound_s(
        room.rows[count : count + inside], room.windows[:kept],
        room.returns_s[total : total + kept], float(frame.counts[group]),
        frame.free_bytes[group], low_s, best_s, room.simplex, room.patterns,
    ))  # fmt: skip


# ---- all of them ------------------------------------------------------------------------------


@entry
def bound_s(
    frame: Frame, facts: Facts, prices: Prices, box: Ints, room: Room, best_s: float
) -> float:  # fmt: skip
    """Seconds that no assignment of ``box`` that fits is below; inf where none fits.

    At ``best_s`` or more it need not be the most that can be shown. ``room.keys``: of the moves
    that were never priced, which here take no time.
    """
    for e in range(len(room.keys)):
        room.keys[e] = NO_KEY
    if not fits(frame, facts, box):
        return np.inf
    for e in range(len(room.moves_s)):
        own = frame.order.events[e, 1] < 0
        room.moves_s[e] = -1.0 if own else move_s(frame, facts, prices, box, e, room.keys)
    low_s = largest_term_s(frame, facts, box, room)
    low_s = max(low_s, cycle_s(frame, facts, box, room))
    if low_s >= best_s or len(box) > MOST_CALLS:
        return low_s
    return patterns_s(frame, facts, box, room, low_s, best_s)


@entry
def branch(
    frame: Frame, facts: Facts, prices: Prices, box: Ints, room: Room, low_s: float, best_s: float,
    bounds: Floats,
) -> int:  # fmt: skip
    """The call to branch on, -1: no half of some call may hold a plan below ``best_s``.

    Every call's pool that can be is split. ``low_s``: bound of ``box``. ``bounds`` [C, 2] of the
    halves of the calls that were looked at: of all, or up to one of which a half is cut off.
    """
    best, best_low, best_high = -1, 0.0, 0.0
    for i in range(len(box)):
        if facts.halves[box[i], 0] < 0:
            continue
        for half in range(2):
            for j in range(len(box)):
                room.box[j] = box[j]
            room.box[i] = facts.halves[box[i], half]
            bounds[i, half] = max(low_s, bound_s(frame, facts, prices, room.box, room, best_s))
        low, high = min(bounds[i, 0], bounds[i, 1]), max(bounds[i, 0], bounds[i, 1])
        if low * (1.0 - ROUNDING) >= best_s:
            return -1
        if high * (1.0 - ROUNDING) >= best_s:
            return i
        if best < 0 or low > best_low or (low == best_low and high > best_high):
            best, best_low, best_high = i, low, high
    return best
