"""Compiled: seconds per step of a step's events, by the longest cycle of what waits for what.

Seconds per step. Every call is a rendezvous of its mesh, and so is the reallocation before it, of
both meshes, at the step's end also to a role that is an average over steps, and then the average;
ranks take these *events* in one order. So with e_v the end of event v in a step

    e_v >= e_u + d_v                 u before v, on a common device; d_v with all its transfers
                                     and with what comes from the host's memory and goes back
    e_v >= e_p + d_v - (transfers before p's)        p makes data that v reads
    e_v + T >= e_u + d_v             u not before v, on a common device: v is the next step's

and the seconds per step in steady state are the least T for which these have a solution: the
largest ratio of seconds to steps over the cycles of that graph (Baccelli, Cohen, Olsder and
Quadrat 1992, "Synchronization and Linearity", theorem 3.28).
"""

from __future__ import annotations

from planner.jit import compiled, inlined
from planner.search.records import Floats, Ints, Records, Scratch, Tables


@inlined
def overlap(meshes: Records, a: int, b: int) -> bool:
    return meshes[a].first < meshes[b].end and meshes[b].first < meshes[a].end  # type: ignore[no-any-return]


@compiled
def meet(meshes: Records, mesh: Ints, events: Records, u: int, v: int) -> bool:
    """Do two events share a device?"""
    a, b = mesh[events[u].call], mesh[events[v].call]
    if overlap(meshes, a, b):
        return True
    from_u, from_v = events[u].home, events[v].home
    if from_u >= 0:
        if overlap(meshes, mesh[from_u], b):
            return True
        if from_v >= 0 and overlap(meshes, mesh[from_u], mesh[from_v]):
            return True
    return from_v >= 0 and overlap(meshes, a, mesh[from_v])


@inlined
def is_on(meshes: Records, mesh: Ints, events: Records, v: int, device: int) -> bool:
    """Does an event busy a device?"""
    own = meshes[mesh[events[v].call]]
    if own.first <= device < own.end:
        return True
    if events[v].home < 0:
        return False
    other = meshes[mesh[events[v].home]]
    return other.first <= device < other.end  # type: ignore[no-any-return]


@compiled
def link_events(t: Tables, mesh: Ints, count: int, s: Scratch) -> float:
    """Fill ``s.weight_s``; seconds that a step takes at least: the busiest first device."""
    meshes, pairs, events, weight_s = t.meshes, t.pairs, s.events, s.weight_s
    for u in range(count):
        weight_s[u, u] = events[u].busy_s
        for v in range(u + 1, count):
            together = meet(meshes, mesh, events, u, v)
            weight_s[u, v] = events[v].busy_s if together else -1.0
            weight_s[v, u] = events[u].busy_s if together else -1.0
    for i in range(len(mesh)):
        v = s.uses[i].event
        for k in range(t.calls[i].pair_start, t.calls[i].pair_stop):
            u = s.uses[pairs[k].producer].event
            weight_s[u, v] = max(weight_s[u, v], s.after_s[k])
    floor_s = 0.0
    for i in range(len(mesh)):
        device, busy_s = meshes[mesh[i]].first, 0.0
        for v in range(count):
            if is_on(meshes, mesh, events, v, device):
                busy_s += events[v].busy_s
        floor_s = max(floor_s, busy_s)
    return floor_s


@compiled
def cycle_from(events: Records, weight_s: Floats, count: int, start: int) -> float:
    """Seconds over steps of the cycle that ``start``'s parents lead into, 0 where there is none."""
    v = start
    for _ in range(count):
        v = events[v].parent
        if v < 0:
            return 0.0
    seconds, steps, first = 0.0, 0, v
    while True:
        u = events[v].parent
        seconds += weight_s[u, v]
        if u >= v:
            steps += 1
        v = u
        if v == first:
            return float(seconds / steps)


@compiled
def largest_cycle(
    events: Records, weight_s: Floats, count: int, floor_s: float, limit_s: float
) -> float:  # fmt: skip
    """T of the events, or seconds above ``limit_s`` that T is not below.

    From below: under the present T either the constraints have a solution (longest paths, found
    in order), or a cycle breaks them, and T is raised to that cycle's ratio.
    """
    step_s = floor_s
    while step_s <= limit_s:
        for v in range(count):
            events[v].potential_s = 0.0
            events[v].parent = -1
        slack_s = 1e-12 * step_s
        raised_s, changed = 0.0, count > 0
        while changed and raised_s <= 0.0:
            changed = False
            for v in range(count):
                for u in range(count):
                    if weight_s[u, v] < 0.0:
                        continue
                    far_s = events[u].potential_s + weight_s[u, v]
                    if u >= v:
                        far_s -= step_s
                    if far_s > events[v].potential_s + slack_s:
                        events[v].potential_s = far_s
                        events[v].parent = u
                        changed = True
                        if u >= v:
                            raised_s = max(raised_s, cycle_from(events, weight_s, count, v))
        if raised_s <= step_s:
            return step_s
        step_s = raised_s
    return step_s
