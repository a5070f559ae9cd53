"""Compiled: the longest cycle of events that a box's assignments all have: ``longest_cycle_s``.

``relaxation.py`` has the proof (bound 2).
"""

from __future__ import annotations

from typing import NamedTuple

from planner.jit import compiled
from planner.search.records import Floats, Ints


class Order(NamedTuple):
    """What the graph alone says of events: ``E`` of them, ``C`` calls.

    ``events`` [E, 2]: call, and of a reallocation before it the call that trains its role, else -1.
    ``reads`` [C, C]: 1 where the column's data are read. ``home`` [C]: the call that trains the
    role, else -1. ``waits`` [C]: 0 for a FUNCTION, whose ranks do not wait for each other.
    """

    events: Ints
    reads: Ints
    home: Ints
    waits: Ints


@compiled
def surely_meet(places: Ints, num_devices: int, i: int, j: int) -> bool:
    """Do two calls share a device?

    ``places`` [C, 5]: devices, the interval that all have, the group that all are in (-1: several)
    and its devices (of several, all that there are).
    """
    room = places[i, 4] if places[i, 3] == places[j, 3] else num_devices
    if i == j or places[i, 0] + places[j, 0] > room:
        return True
    return bool(max(places[i, 1], places[j, 1]) < min(places[i, 2], places[j, 2]))


@compiled
def events_meet(order: Order, places: Ints, num_devices: int, a: int, b: int) -> bool:
    """Do two events surely share a device that runs them in order?"""
    i, j = order.events[a, 0], order.events[b, 0]
    if order.waits[i] == 0 or order.waits[j] == 0:
        return False
    p, q = order.events[a, 1], order.events[b, 1]
    return (
        surely_meet(places, num_devices, i, j)
        or (q >= 0 and surely_meet(places, num_devices, i, q))
        or (p >= 0 and surely_meet(places, num_devices, p, j))
        or (p >= 0 and q >= 0 and surely_meet(places, num_devices, p, q))
    )


@compiled
def longest_cycle_s(
    order: Order, places: Ints, num_devices: int, seconds: Floats, far: Floats, meets: Ints
) -> float:  # fmt: skip
    """Seconds of a step at least. ``seconds`` [E]: below 0 where an event may not take place.

    ``far`` [E] and ``meets`` [E, E] are written to. O(E^3).
    """
    count, best_s = len(seconds), 0.0
    for a in range(count):
        for b in range(a, count):
            live = seconds[a] >= 0.0 and seconds[b] >= 0.0
            meets[a, b] = 1 if live and events_meet(order, places, num_devices, a, b) else 0
    for a in range(count):
        if seconds[a] < 0.0:
            continue
        for b in range(a, count):
            far[b] = seconds[a] if b == a else -1.0
        for b in range(a, count):
            call = order.events[b, 0]
            own = order.events[b, 1] < 0
            if seconds[b] < 0.0:
                continue
            for p in range(a, b):
                if far[p] < 0.0:
                    continue
                data = own and order.events[p, 1] < 0 and order.reads[call, order.events[p, 0]] == 1
                if data or meets[p, b] == 1:
                    far[b] = max(far[b], far[p] + seconds[b])
            closes = meets[a, b] == 1 or (own and order.home[order.events[a, 0]] == call)
            if closes and far[b] >= 0.0:
                best_s = max(best_s, far[b])
    return best_s
