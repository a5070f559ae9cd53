"""Protects the loads of links: the same values and messages as the routes of the executor."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from planner.cost.lanes import (
    IN_INTER,
    IN_INTRA,
    IN_RELAY,
    OUT_INTER,
    OUT_INTRA,
    OUT_RELAY,
    LaneLoads,
    lane_loads,
)
from planner.layout import Layout, ParameterSlice
from planner.lending import lent
from planner.mesh import DeviceMesh
from planner.reallocation import Reallocation, reallocate
from planner.routes import route_values, routes
from profiles.models import ModelSpec
from tests.planner.plans import SPEC

LAST = 24  # devices


def random_layout(rng: random.Random, spec: ModelSpec) -> Layout:
    """Any split over 1 to 24 devices, anywhere; tp may exceed the kv heads, or not divide them."""
    pp, tp, dp = (rng.choice([1, 2, 3, 4]) for _ in range(3))
    count = pp * tp * dp
    if count > LAST:
        return random_layout(rng, spec)
    first = rng.randrange(LAST - count + 1)
    degrees = [ep for ep in (1, 2, 4) if not (dp % ep or spec.num_experts % ep)]
    ep = rng.choice(degrees) if spec.num_experts else 1
    return Layout(spec=spec, mesh=DeviceMesh(first, count), pp=pp, tp=tp, dp=dp, ep=ep)


def copied_values(plan: Reallocation, device: int) -> int:
    """Oracle: what is not lent is copied, and what is no whole rows of a slice is packed."""
    own = [{piece.name: piece for piece in x.slices(device)} for x in (plan.src, plan.dst)]
    names = lent(tuple(own[1].values()), tuple(own[0].values()))
    total = sum(m.num_values for m in plan.copies if m.dst == device and m.slice.name not in names)
    for message in plan.messages:
        # In phase 1 the sender packs out of the slices of its destination.
        if message.src == device and not side_by_side(message.slice, own[message.phase]):
            total += message.num_values
        if message.dst == device and not side_by_side(message.slice, own[1]):
            total += message.num_values
    return total


def side_by_side(piece: ParameterSlice, own: dict[str, ParameterSlice]) -> bool:
    return piece.length[1:] == own[piece.name].length[1:]


@pytest.mark.parametrize("seed", range(50))
def test_the_heaviest_lanes_are_those_that_no_other_exceeds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    most = rng.integers(1, 8)  # so that many lanes are alike
    values, messages = rng.integers(0, most, (2, 6, 20))
    loads = LaneLoads(values=values, messages=messages, passes=values[0])
    lanes = slice(1, 3)
    sent = {(v, m) for v, m in zip(values[lanes].flat, messages[lanes].flat) if m}
    beaten = {a for a in sent for b in sent if a != b and a[0] <= b[0] and a[1] <= b[1]}
    found = loads.heaviest(lanes)
    assert len(found) == len(set(found))
    assert set(found) == sent - beaten


@pytest.mark.parametrize("seed", range(200))
def test_loads_are_those_of_the_routes(seed: int) -> None:
    """Oracle: ``routes``, added up one by one; the heads that tp does not divide included."""
    rng = random.Random(seed)
    experts = {"num_experts": 4, "experts_per_token": 1} if rng.random() < 0.4 else {}
    spec = replace(
        SPEC, **experts, num_kv_heads=rng.choice([1, 2, 4]), tied_embedding=rng.random() < 0.5,
        positions=rng.choice(["rope", "learned"]), num_layers=rng.choice([4, 5, 9]),
    )  # fmt: skip
    src, dst = random_layout(rng, spec), random_layout(rng, spec)
    per_node = rng.choice([1, 2, 3, 4, 8, 1 << 30])
    # All pieces are shared, those of some layers are, or none is.
    options = {"devices_per_node": per_node, "least_share": rng.choice([1, 100, 2000, 1 << 17])}
    found = lane_loads(src, dst, **options)
    values, messages = np.zeros_like(found.values), np.zeros_like(found.messages)
    passes = np.zeros_like(found.passes)
    for route in routes(src, dst, **options):
        count = route_values(spec, route)
        if route.src == route.dst:
            continue
        inside = route.src // per_node == route.dst // per_node
        out, into = (OUT_INTRA, IN_INTRA) if inside else (OUT_INTER, IN_INTER)
        if route.phase == 1:
            assert inside
            out, into = OUT_RELAY, IN_RELAY
        for lane, device in ((out, route.src), (into, route.dst)):
            values[lane, device] += count
            messages[lane, device] += 1
    plan = reallocate(src, dst, **options)
    for device in range(len(passes)):
        passes[device] = 2 * copied_values(plan, device)
    assert np.array_equal(found.values, values)
    assert np.array_equal(found.messages, messages)
    assert np.array_equal(found.passes, passes)
