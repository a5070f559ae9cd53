"""Protects the moves of optimizer state: every value comes once, to a rank that lacks it.

Oracle: a rank's flat buffer written out value by value, padded and cut as ZeRO 1 does it; masks
over whole parameters of what was held before and of what came.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.layout import Layout, ParameterSlice, parameters
from planner.mesh import DeviceMesh
from planner.optimizer_state import StateLayout, reallocate_state
from profiles.models import ModelSpec

WORLD = 8
SPEC = ModelSpec(
    name="t", num_layers=5, hidden=6, num_heads=12, num_kv_heads=12, head_dim=2, ffn=24, vocab=36,
    qkv_bias=True,
)  # fmt: skip
MODELS = (
    SPEC,
    replace(SPEC, tied_embedding=True, vocab=37),
    replace(SPEC, num_kv_heads=2, head="scalar"),
    replace(SPEC, num_kv_heads=3, num_experts=4, experts_per_token=1, shared_ffn=12),
)

Masks = dict[str, np.ndarray[Any, Any]]


@st.composite
def state_layouts(draw: Any, spec: ModelSpec) -> StateLayout:
    sizes = [(p, t, d) for p in (1, 2, 3) for t in (1, 2, 3, 4) for d in (1, 2, 3, 4)]
    pp, tp, dp = draw(st.sampled_from([s for s in sizes if prod(s) <= WORLD]))
    first = draw(st.integers(0, WORLD - pp * tp * dp))
    ep = 1
    if spec.num_experts:
        ep = draw(st.sampled_from([e for e in (1, 2, 4) if dp % e == 0]))
    mesh = DeviceMesh(first, pp * tp * dp)
    layout = Layout(spec=spec, mesh=mesh, pp=pp, tp=tp, dp=dp, ep=ep)
    return StateLayout(layout=layout, zero=draw(st.integers(0, 1)))


@st.composite
def pairs(draw: Any) -> tuple[StateLayout, StateLayout]:
    spec = draw(st.sampled_from(MODELS))
    return draw(state_layouts(spec)), draw(state_layouts(spec))


def index(box: ParameterSlice) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(box.offset, box.length, strict=True))


def values_of(piece: ParameterSlice) -> Iterator[tuple[str, tuple[int, ...]]]:
    for place in np.ndindex(*piece.length):
        yield piece.name, tuple(o + p for o, p in zip(piece.offset, place))


def kept(state: StateLayout, device: int) -> list[tuple[str, tuple[int, ...]] | None]:
    """Oracle: the values that a device keeps state for, in order; None is padding."""
    layout = state.layout
    if device not in layout.mesh:
        return []
    _, dp_rank, _ = layout.coordinates(device)
    split = [p for p in layout.slices(device) if layout.ep > 1 and p.is_expert]
    rest = [p for p in layout.slices(device) if p not in split]
    found: list[tuple[str, tuple[int, ...]] | None] = []
    parts = [(rest, layout.dp, dp_rank)]
    if split:
        parts.append((split, layout.dp // layout.ep, dp_rank // layout.ep))
    for pieces, shards, rank in parts:
        flat: list[tuple[str, tuple[int, ...]] | None] = [v for p in pieces for v in values_of(p)]
        while len(flat) % shards:
            flat.append(None)
        share = len(flat) // shards
        found += flat[rank * share : (rank + 1) * share] if state.zero else flat
    return found


def masks_of(state: StateLayout, device: int) -> Masks:
    shapes = {p.name: p.shape for p in parameters(state.layout.spec)}
    masks: Masks = {name: np.zeros(shape, dtype=int) for name, shape in shapes.items()}
    for value in kept(state, device):
        if value is not None:
            masks[value[0]][value[1]] += 1
    return masks


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_rank_keeps_its_part_of_the_flat_buffer_in_its_order(data: Any) -> None:
    state = data.draw(state_layouts(data.draw(st.sampled_from(MODELS))))
    for device in range(WORLD):
        found: list[tuple[str, tuple[int, ...]] | None] = []
        for section in state.sections(device):
            own: list[tuple[str, tuple[int, ...]] | None]
            own = [None] * (section.own[1] - section.own[0])
            for start, box in section.boxes:
                own[start : start + box.num_values] = values_of(box)
            found += own
        assert found == kept(state, device)


@settings(deadline=None, max_examples=60)
@given(pair=pairs(), node=st.sampled_from([2, 4, 8]))
def test_every_value_that_a_rank_lacks_comes_once_and_from_a_nearest_holder(
    pair: tuple[StateLayout, StateLayout], node: int
) -> None:
    src, dst = pair
    plan = reallocate_state(src, dst, devices_per_node=node)
    held = {device: masks_of(src, device) for device in range(WORLD)}
    came: dict[int, Masks] = {}
    copied: dict[int, Masks] = {}
    for found, moves in ((came, plan.messages), (copied, plan.copies)):
        for device in range(WORLD):
            found[device] = {name: np.zeros_like(mask) for name, mask in held[0].items()}
        for move in moves:
            place = index(move.slice)
            found[move.dst][move.slice.name][place] += 1
            assert held[move.src][move.slice.name][place].all(), "sent by who holds it"
    for device in range(WORLD):
        for name, wanted in masks_of(dst, device).items():
            own = held[device][name]
            assert (copied[device][name] == wanted * own).all(), name
            assert (came[device][name] == wanted * (1 - own)).all(), name
    for move in plan.messages:
        near = range(move.dst // node * node, min(WORLD, (move.dst // node + 1) * node))
        if move.src not in near:
            holds = [held[d][move.slice.name][index(move.slice)] for d in near]
            assert not any(mask.any() for mask in holds), "somebody on the node has a part of it"


@pytest.mark.parametrize("zero", [0, 1])
def test_holders_of_the_same_give_about_as_much(zero: int) -> None:
    """From two replicas to six on other devices: no giver is ahead by more than one box."""
    src = StateLayout(layout=Layout(spec=SPEC, mesh=DeviceMesh(0, 2), dp=2), zero=0)
    dst = StateLayout(layout=Layout(spec=SPEC, mesh=DeviceMesh(2, 6), dp=6), zero=zero)
    sent: Counter[int] = Counter()
    for message in reallocate_state(src, dst).messages:
        sent[message.src] += message.num_values
    largest = max(p.shape[0] * p.shape[-1] for p in parameters(SPEC))
    assert len(sent) == 2
    assert max(sent.values()) - min(sent.values()) <= largest


def test_zero_1_to_zero_1_moves_less_than_the_whole_state() -> None:
    """A rank of the new plan is sent its shard, not the whole model's: with a message each from
    those that hold a part of it."""
    src = StateLayout(layout=Layout(spec=SPEC, mesh=DeviceMesh(0, 4), dp=4), zero=1)
    dst = StateLayout(layout=Layout(spec=SPEC, mesh=DeviceMesh(0, 4), tp=2, dp=2), zero=1)
    came: dict[int, int] = defaultdict(int)
    for message in reallocate_state(src, dst).messages:
        came[message.dst] += message.num_values
    whole = src.layout.num_values(0)
    assert max(came.values()) < whole / 3
