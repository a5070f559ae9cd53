"""Protects the fan-out: what goes over the network enters a node once, evenly, and then goes on.

Oracles: parameters as arrays of numbers that are moved message by message, and masks over whole
parameters.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.layout import Layout, ParameterSlice, layer_parameters, parameters
from planner.mesh import DeviceMesh
from planner.reallocation import reallocate
from planner.routes import LEAST_SHARE, cut_dim, cuts, num_parts, route_values, routes
from profiles.catalogue import MODELS
from profiles.models import ModelSpec
from tests.planner.plans import SPEC
from tests.planner.test_reallocation import pairs_of_layouts

grids = st.tuples(st.sampled_from([1, 2, 3, 4, 8, 100]), st.integers(0, 7)).map(
    lambda grid: {"devices_per_node": grid[0], "first_device": grid[1] % grid[0]}
)
least_shares = st.sampled_from([1, 5, 100, LEAST_SHARE])


def node_of(device: int, grid: dict[str, int]) -> int:
    return (device - grid["first_device"]) // grid["devices_per_node"]


def box(piece: ParameterSlice) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.length))


Held = dict[tuple[int, str], np.ndarray]  # by device and parameter; -1 where it has nothing


def held_under(layout: Layout) -> Held:
    """Every value is its place in its parameter."""
    shapes = {p.name: p.shape for p in parameters(layout.spec)}
    found: Held = {}
    for device in layout.mesh.devices:
        for piece in layout.slices(device):
            shape = shapes[piece.name]
            whole = np.arange(np.prod(shape)).reshape(shape)
            found[device, piece.name] = np.full(shape, -1)
            found[device, piece.name][box(piece)] = whole[box(piece)]
    return found


@settings(max_examples=150, deadline=None)
@given(pairs_of_layouts(), grids, least_shares)
def test_messages_of_both_phases_fill_the_layout(
    layouts: tuple[Layout, Layout], grid: dict[str, int], least_share: int
) -> None:
    """Moved in order, with nothing sent on but what came in phase 0; over no network in phase 1."""
    src, dst = layouts
    plan = reallocate(src, dst, **grid, least_share=least_share)
    source = held_under(src)
    found = {key: np.full_like(values, -1) for key, values in held_under(dst).items()}
    arrived: Held = {}
    for phase in (0, 1):
        sends_from = source if phase == 0 else arrived
        for message in plan.messages:
            if message.phase != phase:
                continue
            name, place = message.slice.name, box(message.slice)
            values = sends_from[message.src, name][place]
            assert (values >= 0).all(), "sent before it came"
            assert (found[message.dst, name][place] < 0).all(), "sent twice"
            found[message.dst, name][place] = values
            if phase == 1:
                assert node_of(message.src, grid) == node_of(message.dst, grid)
        arrived = {key: values.copy() for key, values in found.items()}
    for copy in plan.copies:
        place = box(copy.slice)
        found[copy.dst, copy.slice.name][place] = source[copy.src, copy.slice.name][place]
    for key, expected in held_under(dst).items():
        assert np.array_equal(found[key], expected), key


@settings(max_examples=150, deadline=None)
@given(pairs_of_layouts(), grids, least_shares)
def test_what_enters_a_node_is_what_all_its_devices_lack(
    layouts: tuple[Layout, Layout], grid: dict[str, int], least_share: int
) -> None:
    """Value by value: wanted by a device that lacks it, held by none of the node, and that once."""
    src, dst = layouts
    entered: dict[int, int] = defaultdict(int)
    for message in reallocate(src, dst, **grid, least_share=least_share).messages:
        node = node_of(message.dst, grid)
        entered[node] += message.num_values * (node_of(message.src, grid) != node)
    shapes = {p.name: p.shape for p in parameters(src.spec)}
    masks: list[dict[tuple[int, str], np.ndarray]] = [{}, {}]
    for layout, mask in zip(layouts, masks):
        for device in layout.mesh.devices:
            for piece in layout.slices(device):
                key = node_of(device, grid), piece.name
                mask.setdefault(key, np.zeros(shapes[piece.name], dtype=bool))[box(piece)] = True
    lacking: dict[int, int] = defaultdict(int)
    for (node, name), wanted in masks[1].items():
        held = masks[0].get((node, name), np.zeros_like(wanted))
        lacking[node] += int((wanted & ~held).sum())
    assert {n: v for n, v in entered.items() if v} == {n: v for n, v in lacking.items() if v}


@st.composite
def large_pairs(draw: st.DrawFn) -> tuple[Layout, Layout]:
    """Layouts of real models over 1 to 4 nodes of 8, that meet or do not."""
    spec = MODELS[draw(st.sampled_from(["llama-7b", "qwen2.5-0.5b", "mixtral-8x7b"]))]

    def layout() -> Layout:
        pp, tp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4, 8]))
        count = max(pp * tp, 8 * draw(st.integers(1, 4)) // (pp * tp) * pp * tp)
        dp = count // (pp * tp)
        ep = draw(st.sampled_from([e for e in (1, 2, 4) if not (spec.num_experts % e or dp % e)]))
        first = 8 * draw(st.integers(0, 3))
        ep = ep if spec.num_experts else 1
        return Layout(spec=spec, mesh=DeviceMesh(first, count), pp=pp, tp=tp, dp=dp, ep=ep)

    return layout(), layout()


def rounding(src: Layout, dst: Layout) -> int:
    """Values by which shares may be unequal: a row of every parameter of every piece."""
    total = 0
    for cut in cuts(src, dst):
        pieces = np.prod(num_parts(src, cut))
        for layer in range(-2, src.spec.num_layers + 1):
            for parameter in layer_parameters(src.spec, layer):
                dim = cut_dim(parameter, cut)
                if dim is not None:
                    total += pieces * int(np.prod(parameter.shape)) // parameter.shape[dim]
    return total


@settings(max_examples=60, deadline=None)
@given(large_pairs())
def test_alike_devices_of_a_node_take_equal_shares_from_the_network(
    layouts: tuple[Layout, Layout],
) -> None:
    """What one of them may take so may the others, so each adapter should carry as much: but for

    rows, which are not cut, and one piece that is too small to be shared.
    """
    src, dst = layouts
    taken: dict[tuple[int, ...], dict[int, int]] = defaultdict(dict)
    for device in dst.mesh.devices:
        pp_rank, _, tp_rank = dst.coordinates(device)
        taken[device // 8, pp_rank, tp_rank, dst.ep_rank(device)][device] = 0
    for route in routes(src, dst, devices_per_node=8):
        if route.src // 8 != route.dst // 8:
            pp_rank, _, tp_rank = dst.coordinates(route.dst)
            key = route.dst // 8, pp_rank, tp_rank, dst.ep_rank(route.dst)
            taken[key][route.dst] += route_values(src.spec, route)
    for values in map(dict.values, taken.values()):
        assert max(values) - min(values) <= 8 * LEAST_SHARE + rounding(src, dst)


def test_a_replicated_model_enters_a_node_in_equal_shares() -> None:
    """By hand: 32 layers for 8 takers are 4 each, and of the embedding and the head an eighth."""
    spec = MODELS["llama-7b"]
    src = Layout(spec=spec, mesh=DeviceMesh(0, 8), tp=8)
    dst = Layout(spec=spec, mesh=DeviceMesh(8, 8), dp=8)
    found = [r for r in routes(src, dst, devices_per_node=8) if r.cut == "all"]
    entering = [r for r in found if r.phase == 0]
    assert {(r.src, r.dst) for r in entering} == {(a, b) for a in range(8) for b in range(8, 16)}
    assert all(len(r.layers) == 4 or r.layers == (-1, 32) for r in entering)
    values = {b: sum(route_values(spec, r) for r in entering if r.dst == b) for b in range(8, 16)}
    assert len(set(values.values())) == 1
    sent = {a: sum(route_values(spec, r) for r in entering if r.src == a) for a in range(8)}
    assert len(set(sent.values())) == 1
    onward = sum(route_values(spec, r) for r in found if r.phase == 1)
    assert onward == 7 * sum(values.values())


@pytest.mark.parametrize(("least_share", "takers"), [(1, 4), (1 << 30, 1)])
def test_a_small_piece_is_taken_by_one_of_a_node(least_share: int, takers: int) -> None:
    """Of a layer that is cut in no two equal blocks; norms go the same way as their layer."""
    src = Layout(spec=SPEC, mesh=DeviceMesh(0, 1))
    dst = Layout(spec=SPEC, mesh=DeviceMesh(4, 4), dp=4)
    found = routes(src, dst, devices_per_node=4, least_share=least_share)
    assert len({r.dst for r in found if r.phase == 0 and r.cut == "all"}) == takers
    for device in range(4, 8):
        values = sum(route_values(SPEC, r) for r in found if r.dst == device)
        assert values == dst.num_values(device)


def test_moving_both_layouts_by_whole_nodes_moves_all_routes() -> None:
    """A search keeps one price for all such pairs."""
    spec: ModelSpec = MODELS["llama-7b"]

    def pair(shift: int) -> tuple[Layout, Layout]:
        src = Layout(spec=spec, mesh=DeviceMesh(shift, 8), pp=2, tp=2, dp=2)
        return src, Layout(spec=spec, mesh=DeviceMesh(shift + 4, 12), tp=2, dp=6)

    found = [
        [(r.src - shift, r.dst - shift, r.layers, r.lo, r.hi, r.units, r.cut, r.phase)
         for r in routes(*pair(shift), devices_per_node=4)]
        for shift in (0, 4, 20)
    ]  # fmt: skip
    assert found[0] == found[1] == found[2]
