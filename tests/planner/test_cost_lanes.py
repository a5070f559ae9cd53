"""Protects the loads of links: the same values and messages as the routes of the executor."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from planner.cost.lanes import IN_INTER, IN_INTRA, OUT_INTER, OUT_INTRA, lane_loads
from planner.layout import Layout, ParameterSlice
from planner.mesh import DeviceMesh
from planner.lending import lent
from planner.reallocation import reallocate
from planner.routes import route_values, routes
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


def copied_values(src: Layout, dst: Layout, device: int) -> int:
    """Oracle: what is not lent is copied, and what is no whole rows of a slice is packed."""
    plan = reallocate(src, dst, devices_per_node=PER_NODE)
    names = lent(dst.slices(device), src.slices(device))
    total = sum(m.num_values for m in plan.copies if m.dst == device and m.slice.name not in names)
    for end, layout in (("src", src), ("dst", dst)):
        own = {piece.name: piece for piece in layout.slices(device)}
        for message in plan.messages:
            if getattr(message, end) == device and not side_by_side(message.slice, own):
                total += message.num_values
    return total


def side_by_side(piece: ParameterSlice, own: dict[str, ParameterSlice]) -> bool:
    return piece.length[1:] == own[piece.name].length[1:]


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
        if route.src == route.dst:
            continue
        inside = route.src // PER_NODE == route.dst // PER_NODE
        out, into = (OUT_INTRA, IN_INTRA) if inside else (OUT_INTER, IN_INTER)
        for lane, device in ((out, route.src), (into, route.dst)):
            values[lane, device] += count
            messages[lane, device] += 1
    for device in range(len(passes)):
        passes[device] = 2 * copied_values(src, dst, device)
    assert np.array_equal(found.values, values)
    assert np.array_equal(found.messages, messages)
    assert np.array_equal(found.passes, passes)
