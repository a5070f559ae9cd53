"""Protects reallocation: every device gets exactly what it lacks, from who has it."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.layout import Layout, ParameterSlice
from planner.mesh import DeviceMesh
from planner.reallocation import Message, reallocate
from planner.routes import route_values, routes
from profiles.models import ModelSpec
from tests.planner.plans import SPEC


@st.composite
def pairs_of_layouts(draw: st.DrawFn) -> tuple[Layout, Layout]:
    """Two layouts of one small model on devices 0 to 55, tp 1 to 4 (3 included).

    Kv heads and vocabulary need not divide by tp; experts are split over ep, which divides dp.
    """
    num_layers = draw(st.integers(1, 5))
    learned = draw(st.booleans())
    num_experts = draw(st.sampled_from([0, 3, 6]))
    spec = ModelSpec(
        name="x", num_layers=num_layers, hidden=4, num_heads=12, head_dim=2, ffn=12,
        num_kv_heads=draw(st.sampled_from([12, 6, 3, 2, 1])), vocab=draw(st.sampled_from([24, 23])),
        tied_embedding=draw(st.booleans()), qkv_bias=learned, num_experts=num_experts,
        experts_per_token=num_experts // 3, positions="learned" if learned else "rope",
        max_positions=5,
    )  # fmt: skip

    def layout() -> Layout:
        pp = draw(st.integers(1, min(4, num_layers)))
        tp, dp = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 4))
        degrees = [ep for ep in (1, 2, 3) if not (dp % ep or num_experts % ep)]
        ep = draw(st.sampled_from(degrees)) if num_experts else 1
        mesh = DeviceMesh(draw(st.integers(0, 8)), pp * tp * dp)
        return Layout(spec=spec, mesh=mesh, pp=pp, tp=tp, dp=dp, ep=ep)

    return layout(), layout()


@settings(max_examples=150, deadline=None)
@given(pairs_of_layouts(), st.sampled_from([1, 2, 4, 100]))
def test_every_value_comes_once_and_none_that_is_held(
    layouts: tuple[Layout, Layout], per_node: int
) -> None:
    """For each destination slice: covered exactly once, by holders, and held parts by copies."""
    src, dst = layouts
    found = reallocate(src, dst, devices_per_node=per_node)
    incoming: dict[tuple[int, str], list[Message]] = defaultdict(list)
    for message in found.messages + found.copies:
        incoming[(message.dst, message.slice.name)].append(message)
    for device in dst.mesh.devices:
        held = {piece.name: piece for piece in src.slices(device)}
        for wanted in dst.slices(device):
            count = np.zeros(wanted.length, dtype=int)
            for message in incoming.pop((device, wanted.name)):
                count[message.slice.relative_to(wanted)] += 1
                if message.phase == 1:  # test_routes.py
                    continue
                owned = {piece.name: piece for piece in src.slices(message.src)}[wanted.name]
                for o, n, ho, hn in zip(
                    message.slice.offset, message.slice.length, owned.offset, owned.length
                ):
                    assert ho <= o
                    assert o + n <= ho + hn
                if message.src != device and wanted.name in held:
                    assert not _overlap(message, held[wanted.name])
            assert (count == 1).all(), (wanted.name, count)
    assert not incoming, "messages that nobody wants"


def _overlap(message: Message, held: ParameterSlice) -> bool:
    piece = message.slice
    return all(
        max(a, b) < min(a + n, b + m)
        for a, n, b, m in zip(piece.offset, piece.length, held.offset, held.length)
    )


@settings(max_examples=100, deadline=None)
@given(pairs_of_layouts(), st.sampled_from([1, 2, 4, 100]))
def test_routes_price_what_messages_move(layouts: tuple[Layout, Layout], per_node: int) -> None:
    src, dst = layouts
    found = reallocate(src, dst, devices_per_node=per_node)
    moved = sum(message.num_values for message in found.messages + found.copies)
    priced = sum(
        route_values(src.spec, route) for route in routes(src, dst, devices_per_node=per_node)
    )
    assert moved == priced


@settings(max_examples=60, deadline=None)
@given(pairs_of_layouts())
def test_an_equal_layout_moves_nothing(layouts: tuple[Layout, Layout]) -> None:
    src, _ = layouts
    assert reallocate(src, src).messages == ()


@settings(max_examples=60, deadline=None)
@given(pairs_of_layouts(), st.sampled_from([1, 2, 4]))
def test_a_holder_on_the_same_node_is_preferred(
    layouts: tuple[Layout, Layout], per_node: int
) -> None:
    """Nothing crosses nodes that some device of the own node holds."""
    src, dst = layouts
    for message in reallocate(src, dst, devices_per_node=per_node).messages:
        node = message.dst // per_node
        if message.src // per_node == node:
            continue
        for near in range(node * per_node, (node + 1) * per_node):
            owned = {piece.name: piece for piece in src.slices(near)}
            piece = owned.get(message.slice.name)
            inside = piece is not None and all(
                ho <= o and o + n <= ho + hn
                for o, n, ho, hn in zip(
                    message.slice.offset, message.slice.length, piece.offset, piece.length
                )
            )
            assert not inside


def test_equal_givers_share_the_load() -> None:
    """Four replicas that hold everything each give one of four that lack everything."""
    src = Layout(spec=SPEC, mesh=DeviceMesh(0, 4), dp=4)
    dst = Layout(spec=SPEC, mesh=DeviceMesh(4, 4), dp=4)
    assert {(route.src, route.dst) for route in routes(src, dst)} == {
        (0, 4),
        (1, 5),
        (2, 6),
        (3, 7),
    }
