"""Protects the loads of links: the same values and messages as the routes of the executor."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from planner.cost.lanes import IN_INTER, IN_INTRA, OUT_INTER, OUT_INTRA, lane_loads
from planner.layout import Layout
from planner.mesh import DeviceMesh
from planner.reallocation import route_values, routes
from profiles.models import ModelSpec
from tests.planner.plans import SPEC

PER_NODE = 4


def random_layout(rng: random.Random, spec: ModelSpec) -> Layout:
    """Any split over 1 to 8 devices anywhere on three nodes; tp may exceed the kv heads."""
    pp, tp, dp = rng.choice([1, 2, 3, 4]), rng.choice([1, 2, 4]), rng.choice([1, 2])
    count = pp * tp * dp
    if count > 3 * PER_NODE:
        return random_layout(rng, spec)
    first = rng.randrange(3 * PER_NODE - count + 1)
    ep = rng.choice([1, dp]) if spec.num_experts else 1
    return Layout(spec=spec, mesh=DeviceMesh(first, count), pp=pp, tp=tp, dp=dp, ep=ep)


def experts_alike(src: Layout, dst: Layout, device: int) -> bool:
    held = [
        [piece for piece in layout.slices(device) if "experts." in piece.name]
        for layout in (src, dst)
    ]
    return {(p.offset[0], p.length[0]) for p in held[0]} == {
        (p.offset[0], p.length[0]) for p in held[1]
    }


@pytest.mark.parametrize("seed", range(150))
def test_loads_are_those_of_the_routes(seed: int) -> None:
    """Oracle: ``routes``, added up one by one; the heads that tp does not divide included."""
    rng = random.Random(seed)
    experts = {"num_experts": 4, "experts_per_token": 1} if rng.random() < 0.3 else {}
    spec = replace(
        SPEC, **experts, num_kv_heads=rng.choice([1, 2, 4]), tied_embedding=rng.random() < 0.5,
        positions=rng.choice(["rope", "learned"]),
    )  # fmt: skip
    src, dst = random_layout(rng, spec), random_layout(rng, spec)
    found = lane_loads(src, dst, devices_per_node=PER_NODE)
    values, messages = np.zeros_like(found.values), np.zeros_like(found.messages)
    passes = np.zeros_like(found.passes)
    for route in routes(src, dst, devices_per_node=PER_NODE):
        count = route_values(spec, route)
        lent = route.src == route.dst and src.tp == dst.tp and route.lo < route.hi
        if lent and not experts_alike(src, dst, route.src):
            # A block is lent as a whole, the ends are by themselves.
            ends = tuple(layer for layer in route.layers if not 0 <= layer < spec.num_layers)
            passes[route.dst] += 2 * (count - route_values(spec, replace(route, layers=ends)))
        else:
            passes[route.dst] += 0 if lent else 2 * count
        if route.src == route.dst:
            continue
        passes[route.src] += 2 * count
        inside = route.src // PER_NODE == route.dst // PER_NODE
        out, into = (OUT_INTRA, IN_INTRA) if inside else (OUT_INTER, IN_INTER)
        for lane, device in ((out, route.src), (into, route.dst)):
            values[lane, device] += count
            messages[lane, device] += 1
    assert np.array_equal(found.values, values)
    assert np.array_equal(found.messages, messages)
    assert np.array_equal(found.passes, passes)
