"""Compiled loops of the searches: a Metropolis chain, a scan of one call's options, a full sweep.

Each runs until it is done or needs a reallocation's price that nobody has asked for yet; then it
returns ``NEEDS_PRICE`` with the key in ``Scratch.missing``, and goes on when called again.
An unknown price counts as nothing at first, and most assignments are out already with that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from planner.jit import entry, inlined
from planner.search.kernels import energy_of, evaluate
from planner.search.moves import State, propose, uniform
from planner.search.records import NO_KEY, Floats, Ints, Prices, Scratch, Tables

DONE, NEEDS_PRICE = 0, 1
CONTROL = 256  # proposals between two corrections of the temperature


class Found(NamedTuple):
    """The best assignment that fits, and the one that lacks least: a row each.

    ``values``: seconds of the best, overshoot of the least unfit.
    """

    mesh: Ints  # [2, C]
    row: Ints  # [2, C]
    values: Floats  # [2]


class Chain(NamedTuple):
    """A walk's place: ``here`` and ``next`` (proposed) assignments, counts, random numbers.

    ``numbers``: energy here, temperature, threshold of the proposal. ``counts``: proposals to
    go, done in all, accepted and done since the last correction, 1 where one is pending.
    """

    mesh: Ints  # [2, C] here and next
    row: Ints  # [2, C]
    numbers: Floats  # [3]
    counts: Ints  # [5]
    state: State
    found: Found


@inlined
def copy_row(values: Ints, source: int, target: int) -> None:
    for i in range(values.shape[1]):
        values[target, i] = values[source, i]


@inlined
def remember(mesh: Ints, row: Ints, step_s: float, overshoot: float, found: Found) -> None:
    """Keep an assignment that is the best of its kind so far."""
    kind = 1 if overshoot > 0 else 0
    value = overshoot if overshoot > 0 else step_s
    if value < found.values[kind]:
        found.values[kind] = value
        for i in range(len(mesh)):
            found.mesh[kind, i], found.row[kind, i] = mesh[i], row[i]


@entry
def run_chain(
    t: Tables, prices: Prices, s: Scratch, c: Chain, accept: float
) -> int:  # fmt: skip
    """Propose ``c.counts[0]`` times; the temperature is led to where ``accept`` are accepted.

    A proposal of energy E' is accepted if ``E' <= E (1 - temperature log(1 - r))``, r in [0, 1):
    with probability ``exp(-(E' / E - 1) / temperature)`` if it is worse. r is drawn first, so
    that a proposal that is surely over it need not be known any better.
    """
    while c.counts[0] > 0:
        if c.counts[4] == 0:
            copy_row(c.mesh, 0, 1)
            copy_row(c.row, 0, 1)
            changed = propose(t, c.mesh[1], c.row[1], c.state)
            c.numbers[2] = c.numbers[0] * (1.0 - c.numbers[1] * math.log(1.0 - uniform(c.state)))
            if not changed:
                c.counts[0] -= 1
                c.counts[1] += 1
                continue
        limit = max(c.numbers[2], c.found.values[0])
        step_s, overshoot = evaluate(t, prices, c.mesh[1], c.row[1], limit, s)
        energy = energy_of(step_s, overshoot)
        c.counts[4] = 1 if energy <= limit and s.missing[0] != NO_KEY else 0
        if c.counts[4] == 1:
            return NEEDS_PRICE
        c.counts[0] -= 1
        c.counts[1] += 1
        c.counts[3] += 1
        if step_s <= limit:
            remember(c.mesh[1], c.row[1], step_s, overshoot, c.found)
        if energy <= c.numbers[2]:
            copy_row(c.mesh, 1, 0)
            copy_row(c.row, 1, 0)
            c.numbers[0] = energy
            c.counts[2] += 1
        if c.counts[3] == CONTROL:
            c.numbers[1] *= 1.15 if c.counts[2] < accept * CONTROL else 1.0 / 1.15
            c.numbers[1] = min(0.5, max(1e-6, c.numbers[1]))
            c.counts[2] = c.counts[3] = 0
    return DONE


@entry
def scan_call(
    t: Tables, prices: Prices, s: Scratch, mesh: Ints, row: Ints, i: int,
    whole_role: bool, place: Ints, best: Floats, found: Found,
) -> int:  # fmt: skip
    """Try every option of call i, or every layout for all calls of its role.

    ``mesh`` and ``row`` [2, C]: the assignment, and room for the one that is tried. ``place``: the
    position among the call's meshes, the row there, evaluations, mesh and row of the best (all as
    found so far; the first two at the start 0). ``best``: its energy, at the start the energy
    that is to be beaten.
    """
    num_calls = len(t.calls)
    next_mesh, next_row = mesh[1], row[1]
    for j in range(num_calls):
        next_mesh[j], next_row[j] = mesh[0, j], row[0, j]
    while t.calls[i].mesh_start + place[0] < t.calls[i].mesh_stop:
        m = t.call_meshes[t.calls[i].mesh_start + place[0]]
        kind = t.meshes[m].kind
        while place[1] < t.row_ranges[i, kind].count:
            r = t.row_ranges[i, kind].start + place[1]
            possible = True
            next_mesh[i], next_row[i] = m, r
            if whole_role:
                for j in range(num_calls):
                    if j != i and t.calls[j].role == t.calls[i].role:
                        if t.like[j, t.rows[r].axes].count == 0 or not t.allowed[j, m]:
                            possible = False
                        else:
                            next_mesh[j] = m
                            next_row[j] = t.like_rows[t.like[j, t.rows[r].axes].start]
            if possible:
                step_s, over = evaluate(t, prices, next_mesh, next_row, best[0], s)
                energy = energy_of(step_s, over)
                if energy < best[0] and s.missing[0] != NO_KEY:
                    return NEEDS_PRICE
                place[2] += 1
                if step_s <= best[0]:
                    remember(next_mesh, next_row, step_s, over, found)
                if energy < best[0] * (1.0 - 1e-9):
                    best[0] = energy
                    place[3], place[4] = m, r
            place[1] += 1
        place[1] = 0
        place[0] += 1
    return DONE


@entry
def sweep(
    t: Tables, prices: Prices, s: Scratch, place: Ints, budget: int, found: Found
) -> int:  # fmt: skip
    """Every assignment, from ``place`` [4, C] (position among meshes, row there; room) on.

    Stops after ``budget`` of them; ``place[0, 0]`` is past its end when all were seen.
    """
    num_calls = len(t.calls)
    mesh, row = place[2], place[3]
    for _ in range(budget):
        if t.calls[0].mesh_start + place[0, 0] >= t.calls[0].mesh_stop:
            return DONE
        for i in range(num_calls):
            mesh[i] = t.call_meshes[t.calls[i].mesh_start + place[0, i]]
            row[i] = t.row_ranges[i, t.meshes[mesh[i]].kind].start + place[1, i]
        step_s, overshoot = evaluate(t, prices, mesh, row, found.values[0], s)
        if step_s <= found.values[0]:
            if s.missing[0] != NO_KEY:
                return NEEDS_PRICE
            remember(mesh, row, step_s, overshoot, found)
        for i in range(num_calls - 1, -1, -1):  # an odometer
            place[1, i] += 1
            if place[1, i] < t.row_ranges[i, t.meshes[mesh[i]].kind].count:
                break
            place[1, i] = 0
            place[0, i] += 1
            if i == 0 or t.calls[i].mesh_start + place[0, i] < t.calls[i].mesh_stop:
                break
            place[0, i] = 0
    return DONE
