"""Protects: optimizer state that moved is the same bit for bit, and no byte came too many.

Oracle of the values: a value of a state is a hash of the state, the parameter and its place in the
whole model. Oracle of the bytes: masks over whole parameters, kept before against kept after.
Oracle of both plan and optimizer together: one that takes all its steps under one layout.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from executor.buffers import ParameterBuffer
from executor.context import build_contexts
from executor.cross_memory import CrossMemory
from executor.optimizer_moves import STATES, States, move_states, states_of
from executor.parallel.optimizer import Adam
from planner.layout import Layout, parameters
from planner.mesh import DeviceMesh
from planner.optimizer_state import StateLayout, StateSection, reallocate_state
from tests.executor.test_optimizer import CONFIG, MIXTURE, SPEC, box, made, set_gradients
from tests.executor.test_reallocate import whole
from tests.spawn import spawn

WORLD = 6
# Divisible by tp 1 to 4, but the vocabulary; kv heads by tp 1, 2 and 4; 4 layers uneven under pp 3.
WIDE = replace(SPEC, num_layers=4, num_heads=12, num_kv_heads=4, ffn=24, vocab=37)
EXPERTS = replace(MIXTURE, num_layers=3, num_experts=6, vocab=36)
# (first device, pp, tp, dp, ep, ZeRO): meshes that are the same, meet, or do not.
PLACES = [
    (0, 1, 1, 1, 1, 0), (0, 1, 1, 4, 1, 1), (0, 1, 2, 2, 1, 0), (2, 2, 2, 1, 1, 1),
    (3, 1, 1, 3, 1, 1), (0, 1, 3, 1, 1, 0), (1, 3, 1, 1, 1, 0), (4, 1, 1, 2, 1, 0),
    (0, 2, 1, 3, 1, 1), (0, 1, 3, 2, 1, 1), (2, 1, 4, 1, 1, 0), (5, 1, 1, 1, 1, 1),
]  # fmt: skip
EXPERT_PLACES = [
    (0, 1, 1, 2, 2, 0), (0, 1, 1, 6, 3, 1), (2, 1, 2, 2, 2, 1), (0, 1, 3, 1, 1, 0),
    (1, 2, 1, 2, 1, 1), (3, 1, 1, 3, 3, 1),
]  # fmt: skip

Pair = tuple[StateLayout, StateLayout]


def state_layout(place: tuple[int, ...], spec: object) -> StateLayout:
    first, pp, tp, dp, ep, zero = place
    mesh = DeviceMesh(first, pp * tp * dp)
    layout = Layout(spec=spec, mesh=mesh, pp=pp, tp=tp, dp=dp, ep=ep)  # type: ignore[arg-type]
    return StateLayout(layout=layout, zero=zero)


def all_pairs() -> list[Pair]:
    found = []
    for spec, places in ((WIDE, PLACES), (EXPERTS, EXPERT_PLACES)):
        layouts = [state_layout(place, spec) for place in places]
        found += list(product(layouts, layouts))
    return found


def value(state: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return whole(f"{state}/{name}", shape)


def kept_masks(state: StateLayout, rank: int) -> Mapping[str, np.ndarray]:  # type: ignore[type-arg]
    """Oracle: by parameter which values the rank's slice of the padded flat buffer has."""
    layout = state.layout
    masks = {p.name: np.zeros(p.shape, dtype=bool) for p in parameters(layout.spec)}
    slices = layout.slices(rank)
    if not slices:
        return masks
    dp_rank = layout.coordinates(rank)[1]
    experts = [piece for piece in slices if layout.ep > 1 and piece.is_expert]
    rest = [piece for piece in slices if piece not in experts]
    for pieces, shards, shard in (
        (rest, layout.dp, dp_rank), (experts, layout.dp // layout.ep, dp_rank // layout.ep),
    ):  # fmt: skip
        total = sum(piece.num_values for piece in pieces)
        share = -(-total // shards)
        flat = np.zeros(total, dtype=bool)
        flat[shard * share : (shard + 1) * share] = True
        start = 0
        for piece in pieces:
            part = flat[start : start + piece.num_values].reshape(piece.length)
            masks[piece.name][box(piece)] = part if state.zero else True
            start += piece.num_values
    return masks


def fill(adam: Adam) -> None:
    """Every state of the own range; the weights follow."""
    shapes = {p.name: p.shape for p in parameters(adam.ctx.layout.spec)}
    for state in STATES:
        flat = torch.zeros_like(adam.buffer.flat)
        for piece in adam.buffer.slices:
            values = value(state, piece.name, shapes[piece.name])[box(piece)]
            adam.buffer.view(piece.name, of=flat).copy_(values)
        for section in adam.sections:
            section.state()[state].copy_(flat[section.own[0] : section.own[1]])


def moved(
    old: Adam | None, pair: Pair, contexts: Mapping[Layout, object], rank: int,
    staging_bytes: int, dtype: torch.dtype = torch.float32, memory: CrossMemory | None = None,
) -> tuple[Adam | None, int]:  # fmt: skip
    """An optimizer under the second layout with the state of ``old``, and the bytes received."""
    layout = pair[1].layout
    buffer = None
    if rank in layout.mesh:
        buffer = ParameterBuffer.for_rank(
            layout, rank, dtype=dtype, device="cpu", multiple=layout.dp
        )
        buffer.flat.fill_(torch.nan)

    def allocate(name: str, section: StateSection) -> torch.Tensor:
        if name == "weight" and dtype == torch.float32:
            assert buffer is not None
            return buffer.flat[section.own[0] : section.own[1]].fill_(0)
        return torch.zeros(section.own[1] - section.own[0])

    states: States | None = None if old is None else states_of(old)
    found, received = move_states(
        reallocate_state(*pair), states, allocate, rank=rank, staging_bytes=staging_bytes,
        memory=memory,
    )  # fmt: skip
    if buffer is None or found is None:
        assert buffer is found
        return None, received
    assert states is None or not states, "taken out one by one"
    sections = [dict(zip(found, each)) for each in zip(*found.values(), strict=True)]
    adam = Adam(
        contexts[layout], buffer, torch.zeros(buffer.flat.shape), CONFIG, zero=pair[1].zero,  # type: ignore[arg-type]
        states=sections,
    )  # fmt: skip
    return adam, received


def move_all(rank: int, world_size: int, pairs: list[Pair], dtype: torch.dtype) -> int:
    layouts = dict.fromkeys(state.layout for pair in pairs for state in pair)
    contexts = build_contexts(layouts, rank=rank, device=torch.device("cpu"))
    total = 0
    memory = CrossMemory.between_workers()
    for number, pair in enumerate(pairs):
        src, dst = pair
        label = f"{src.key} -> {dst.key}, rank {rank}"
        old = None
        if rank in src.layout.mesh:
            _, old = made(contexts[src.layout], CONFIG, src.zero, dtype)
            fill(old)
        staging_bytes = 64 if number % 40 == 7 else (1000, 1 << 20)[number % 2]
        adam, received = moved(
            old, pair, contexts, rank, staging_bytes, dtype, memory if number // 2 % 2 else None
        )
        before, after = kept_masks(src, rank), kept_masks(dst, rank)
        lacking = sum(int((after[name] & ~before[name]).sum()) for name in after)
        assert received == 3 * 4 * lacking, label
        total += received
        if adam is None:
            continue
        adam.go_on(steps=7, updates=5)
        _, expected = made(contexts[dst.layout], CONFIG, dst.zero, dtype)
        fill(expected)
        expected.go_on(steps=7, updates=5)
        for mine, other in zip(adam.sections, expected.sections, strict=True):
            assert mine.own == other.own, label
            for state in STATES:
                assert torch.equal(mine.state()[state], other.state()[state]), f"{state}: {label}"
        assert torch.equal(adam.buffer.flat, expected.buffer.flat), f"weights: {label}"
        assert (adam.steps, float(adam.count)) == (7, 5.0)
    return total


def test_every_pair_of_layouts_keeps_every_bit_and_sends_no_byte_too_many() -> None:
    assert sum(spawn(WORLD, move_all, all_pairs(), torch.float32, timeout_s=280.0)) > 0


def test_low_precision_weights_follow_the_masters_that_came() -> None:
    pairs = random.Random(5).sample(all_pairs(), 16)
    assert sum(spawn(WORLD, move_all, pairs, torch.bfloat16, timeout_s=280.0)) > 0


def train_moving(rank: int, world_size: int, pairs: list[Pair], dtype: torch.dtype) -> float:
    """Two steps, a move, two steps; the largest error against four steps under one layout."""
    layouts = dict.fromkeys(state.layout for pair in pairs for state in pair)
    contexts = build_contexts(layouts, rank=rank, device=torch.device("cpu"))
    worst = 0.0
    for src, dst in pairs:
        old = None
        if rank in src.layout.mesh:
            _, old = made(contexts[src.layout], CONFIG, src.zero, dtype)
            steps(old, range(2))
        adam, _ = moved(old, (src, dst), contexts, rank, 4096, dtype)
        if adam is not None:
            adam.go_on(steps=2, updates=2)
            steps(adam, range(2, 4))
        if rank in dst.layout.mesh:
            assert adam is not None
            _, reference = made(contexts[dst.layout], CONFIG, dst.zero, dtype)
            steps(reference, range(4))
            for mine, other in zip(states_of(adam).values(), states_of(reference).values()):
                for a, b in zip(mine, other, strict=True):
                    worst = max(worst, float((a - b).abs().max() / b.abs().max()))
    return worst


def test_a_state_is_given_back_before_the_next_one_gets_memory() -> None:
    """Else a device would have to hold old and new state at once."""
    pair = (state_layout((0, 1, 1, 1, 1, 0), WIDE),) * 2
    own = pair[0].sections(0)[0].own[1]
    states = {name: [torch.ones(own)] for name in STATES}
    alive = {name: weakref.ref(tensors[0]) for name, tensors in states.items()}
    seen: dict[str, list[str]] = {}

    def allocate(name: str, section: StateSection) -> torch.Tensor:
        seen[name] = [state for state in STATES if alive[state]() is not None]
        return torch.zeros(own)

    move_states(reallocate_state(*pair), states, allocate, rank=0, staging_bytes=4096)
    assert seen == {name: list(STATES[i:]) for i, name in enumerate(STATES)}


def steps(adam: Adam, which: range) -> None:
    for step in which:
        adam.gradients.zero_()
        set_gradients(adam.ctx, adam, step)
        for shape in adam.ctx.layout.stage_parameters(adam.ctx.pp_rank):
            # Shards that hold the same kv heads each have a part of their gradient.
            alike = adam.ctx.layout.tp // shape.num_parts(adam.ctx.layout.tp)
            if shape.max_parts:
                adam.buffer.view(shape.name, of=adam.gradients).div_(alike)
        adam.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_around_a_move_are_steps_without_it(dtype: torch.dtype) -> None:
    pairs = random.Random(2).sample(all_pairs(), 12)
    assert max(spawn(WORLD, train_moving, pairs, dtype, timeout_s=280.0)) < 1e-5
