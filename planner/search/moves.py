"""Compiled moves of the walk: each makes another assignment out of one, or says that it cannot.

A move changes ``mesh`` and ``row`` in place. Rows of one call and kind of mesh are sorted by
seconds, and moves prefer the front of the list: the slow end is long and rarely right.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from planner.jit import compiled, inlined
from planner.search.records import Ints, Tables

State = npt.NDArray[np.uint64]  # [1] of the random numbers

# Name -> how often a move is tried relative to the others; the order is ``propose``'s.
MOVES = {
    "change_strategy": 4.0,
    "change_anywhere": 2.0,
    "move_mesh": 1.0,
    "resize": 2.0,
    "copy_mesh": 2.0,
    "join_role": 1.0,
    "change_role": 2.0,
    "swap_meshes": 1.0,
    "split_pair": 2.0,
}
SHARES = np.cumsum(list(MOVES.values())) / sum(MOVES.values())


@compiled
def uniform(state: State) -> float:
    """A number in [0, 1). Source: Steele, Lea and Flood 2014 (splitmix64)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return float(z >> np.uint64(11)) / 9007199254740992.0


@inlined
def below(state: State, count: int) -> int:
    """One of ``range(count)``."""
    return int(uniform(state) * count)


@compiled
def pick_row(t: Tables, call: int, mesh: int, state: State) -> int:
    """A row of ``call`` on ``mesh``: mostly among the fastest few, now and then any."""
    kind = t.meshes[mesh].kind
    count = t.row_ranges[call, kind].count
    if uniform(state) < 0.3:
        return int(t.row_ranges[call, kind].start + below(state, count))
    ahead = int(-math.log(1.0 - uniform(state)) * 3.0)
    return int(t.row_ranges[call, kind].start + min(ahead, count - 1))


@compiled
def pick_mesh(t: Tables, call: int, state: State) -> int:
    """A mesh that a call may take: a kind first, as there are many small meshes."""
    while True:
        kind = below(state, len(t.kinds))
        if t.row_ranges[call, kind].count > 0:
            mesh = t.kind_meshes[t.kinds[kind].start + below(state, t.kinds[kind].count)]
            if t.allowed[call, mesh]:
                return int(mesh)


@inlined
def pick_like(t: Tables, call: int, mesh: int, axes: int, state: State) -> int:
    """A row of ``call`` with ``axes``, mostly the fastest; -1 where it has none."""
    count = t.like[call, axes].count
    if count == 0 or not t.allowed[call, mesh]:
        return -1
    k = 0 if uniform(state) < 0.7 else below(state, count)
    return int(t.like_rows[t.like[call, axes].start + k])


@compiled
def put(t: Tables, mesh: Ints, row: Ints, i: int, m: int, state: State) -> bool:
    """Call i goes to mesh m, half of the time with its axes if it is of the same kind."""
    if not t.allowed[i, m]:
        return False
    new = -1
    if t.meshes[m].kind == t.meshes[mesh[i]].kind and uniform(state) < 0.5:
        new = row[i]
    mesh[i] = m
    row[i] = pick_row(t, i, m, state) if new < 0 else new
    return True


@compiled
def resize(t: Tables, mesh: Ints, row: Ints, i: int, state: State) -> bool:
    """A mesh that begins or ends where the call's does, or at another call's edge."""
    j = below(state, len(mesh))
    edge = t.meshes[mesh[j]].first if uniform(state) < 0.5 else t.meshes[mesh[j]].end
    at_start = uniform(state) < 0.5
    fixed = t.meshes[mesh[i]].first if at_start else t.meshes[mesh[i]].end
    low, high = min(fixed, edge), max(fixed, edge)
    chosen, seen = -1, 0
    for k in range(t.calls[i].mesh_start, t.calls[i].mesh_stop):
        m = t.call_meshes[k]
        first, end = t.meshes[m].first, t.meshes[m].end
        exact = first == low and end == high
        near = (first if at_start else end) == fixed
        if exact:
            chosen = m
            break
        if near:
            seen += 1
            if below(state, seen) == 0:
                chosen = m
    return bool(chosen >= 0 and put(t, mesh, row, i, chosen, state))


@compiled
def change_role(t: Tables, mesh: Ints, row: Ints, i: int, state: State) -> bool:
    """All calls of a role take one layout, on the mesh of one of them or anywhere."""
    if t.calls[i].role < 0:
        return False
    m = mesh[i] if uniform(state) < 0.5 else pick_mesh(t, i, state)
    new = pick_row(t, i, m, state)
    for j in range(len(mesh)):
        if t.calls[j].role == t.calls[i].role:
            found = new if j == i else pick_like(t, j, m, t.rows[new].axes, state)
            if found < 0:
                return False
            mesh[j], row[j] = m, found
    return True


@compiled
def join_role(t: Tables, mesh: Ints, row: Ints, i: int, state: State) -> bool:
    """A call takes the layout of another call of its role, so that no weights move."""
    start = below(state, len(mesh))
    for k in range(len(mesh)):
        j = (start + k) % len(mesh)
        if j != i and t.calls[j].role >= 0 and t.calls[j].role == t.calls[i].role:
            found = pick_like(t, i, mesh[j], t.rows[row[j]].axes, state)
            if found >= 0:
                mesh[i], row[i] = mesh[j], found
                return True
            return False
    return False


@compiled
def copy_mesh(t: Tables, mesh: Ints, row: Ints, i: int, state: State) -> bool:
    """A call goes to the mesh of another, half of the time with its strategy."""
    j = below(state, len(mesh))
    if uniform(state) < 0.5:
        found = pick_like(t, i, mesh[j], t.rows[row[j]].axes, state)
        if found >= 0:
            mesh[i], row[i] = mesh[j], found
            return True
    return put(t, mesh, row, i, mesh[j], state)


@compiled
def split_pair(t: Tables, mesh: Ints, row: Ints, i: int, state: State) -> bool:
    """Two calls share out a mesh: one takes a front part of it, the other the rest."""
    j = below(state, len(mesh))
    m = mesh[below(state, len(mesh))]
    if uniform(state) < 0.5:
        m = pick_mesh(t, j, state)
    chosen, seen = -1, 0
    for k in range(t.calls[i].mesh_start, t.calls[i].mesh_stop):
        a = t.call_meshes[k]
        if t.meshes[a].first == t.meshes[m].first and t.meshes[a].end < t.meshes[m].end:
            seen += 1
            if below(state, seen) == 0:
                chosen = a
    if i == j or chosen < 0:
        return False
    for k in range(t.calls[j].mesh_start, t.calls[j].mesh_stop):
        b = t.call_meshes[k]
        if t.meshes[b].first == t.meshes[chosen].end and t.meshes[b].end == t.meshes[m].end:
            return put(t, mesh, row, i, chosen, state) and put(t, mesh, row, j, b, state)
    return False


@compiled
def move(t: Tables, number: int, mesh: Ints, row: Ints, state: State) -> bool:
    """Move ``number`` of ``MOVES``; False where it does not apply."""
    i = below(state, len(mesh))
    if number == 0:
        row[i] = pick_row(t, i, mesh[i], state)
        return True
    if number == 1:
        return put(t, mesh, row, i, pick_mesh(t, i, state), state)
    if number == 2:
        same = t.kinds[t.meshes[mesh[i]].kind]
        return put(t, mesh, row, i, t.kind_meshes[same.start + below(state, same.count)], state)
    if number == 3:
        return resize(t, mesh, row, i, state)
    if number == 4:
        return copy_mesh(t, mesh, row, i, state)
    if number == 5:
        return join_role(t, mesh, row, i, state)
    if number == 6:
        return change_role(t, mesh, row, i, state)
    if number == 7:
        j = below(state, len(mesh))
        a, b = mesh[i], mesh[j]
        return put(t, mesh, row, i, b, state) and put(t, mesh, row, j, a, state)
    return split_pair(t, mesh, row, i, state)


@compiled
def propose(t: Tables, mesh: Ints, row: Ints, state: State) -> bool:
    """One move by weight; False where it does not apply."""
    r, number = uniform(state), 0
    while r >= SHARES[number]:
        number += 1
    return move(t, number, mesh, row, state)
