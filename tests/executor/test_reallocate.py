"""Protects: after a reallocation every rank holds its slices bit for bit, and was sent only those.

Oracle of the values: a parameter's element is a hash of its name and place in the whole model.
Oracle of the bytes: boolean masks over whole parameters, held before against wanted after.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.buffers import ParameterBuffer
from executor.cross_memory import CrossMemory
from executor.reallocate import carry_out, execute
from executor.reallocation_rounds import Part, cut, make_schedule
from planner.layout import Layout, ParameterSlice, parameters
from planner.mesh import DeviceMesh
from planner.reallocation import Reallocation, reallocate
from profiles.models import ModelSpec
from tests.spawn import spawn

WORLD = 8
STAGING = (1000, 4096, 1 << 20)  # bytes; single pairs get 64
NODES = (1 << 30, 4, 2, 3)  # devices of a node, which the machine does not know of


def spec(**changes: Any) -> ModelSpec:
    """Divisible by tp 1 to 4, five layers: uneven under every pp but 1."""
    shape: dict[str, Any] = {
        "name": "t", "num_layers": 5, "hidden": 6, "num_heads": 12, "num_kv_heads": 12,
        "head_dim": 2, "ffn": 24, "vocab": 36, "qkv_bias": True,
    }  # fmt: skip
    return ModelSpec(**{**shape, **changes})


def random_pairs(count: int, seed: int) -> list[tuple[Layout, Layout, int]]:
    """(source, destination, staging bytes) over up to eight ranks; meshes meet or do not."""
    rng = random.Random(seed)
    sizes = [s for s in product((1, 2, 3, 4), repeat=3) if np.prod(s) <= WORLD]
    models = [
        spec(tied_embedding=True),
        spec(),
        spec(head="scalar"),
        spec(num_kv_heads=2, vocab=37, tied_embedding=True),
        spec(num_kv_heads=3, num_experts=3, experts_per_token=1, shared_ffn=12),
    ]

    def layout(model: ModelSpec) -> Layout:
        pp, tp, dp = rng.choice(sizes)
        first = rng.randrange(WORLD - pp * tp * dp + 1)
        return Layout(spec=model, mesh=DeviceMesh(first, pp * tp * dp), pp=pp, tp=tp, dp=dp)

    chosen = [rng.choice(models) for _ in range(count)]
    pairs = [(layout(m), layout(m), STAGING[i % len(STAGING)]) for i, m in enumerate(chosen)]
    return [(src, dst, 64 if i % 20 == 7 else size) for i, (src, dst, size) in enumerate(pairs)]


def whole(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Every element a hash below 2**24: exact in float32, unlike its neighbours."""
    count = int(np.prod(shape))
    index = np.arange(count, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()))
    mixed = (index * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    return torch.from_numpy(mixed.astype(np.float32)).view(shape)


def box(piece: ParameterSlice) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.length))


def fill(layout: Layout, rank: int, dtype: torch.dtype = torch.float32) -> ParameterBuffer | None:
    if rank not in layout.mesh:
        return None
    buffer = ParameterBuffer.for_rank(layout, rank, dtype=dtype, device="cpu", multiple=16)
    shapes = {p.name: p.shape for p in parameters(layout.spec)}
    for piece in buffer.slices:
        buffer.view(piece.name).copy_(whole(piece.name, shapes[piece.name])[box(piece)])
    return buffer


def lacking_bytes(src: Layout, dst: Layout, rank: int) -> int:
    """Oracle: what ``rank`` needs under ``dst`` and does not hold under ``src``."""
    total = 0
    for parameter in parameters(src.spec):
        masks = []
        for layout in (src, dst):
            mask = np.zeros(parameter.shape, dtype=bool)
            for piece in layout.slices(rank):
                if piece.name == parameter.name:
                    mask[box(piece)] = True
            masks.append(mask)
        total += int((masks[1] & ~masks[0]).sum()) * 4
    return total


def run_pairs(
    rank: int, world_size: int, pairs: list[tuple[Layout, Layout, int]]
) -> tuple[int, int]:
    """Bytes received in all, and messages that were sent on.

    Every second pair's destination borrows what the rank holds alike. All is sent, or all is read
    that the machine allows, or only within the first and the last ranks, as on two machines.
    """
    moved, lent, relayed = 0, 0, 0
    every = CrossMemory.between_workers()
    memories = [None, every, halves(every, world_size)]
    for number, (src, dst, staging_bytes) in enumerate(pairs):
        if rank not in src.mesh and rank not in dst.mesh:
            continue
        source, destination, expected = fill(src, rank), None, fill(dst, rank)
        if expected is not None:
            destination = ParameterBuffer.for_rank(
                dst, rank, dtype=torch.float32, device="cpu", multiple=16,
                lender=source if number % 2 else None,
            )  # fmt: skip
            destination.flat[: destination.num_values] = float("nan")
        per_node = NODES[number // 2 % len(NODES)]
        plan = reallocate(src, dst, devices_per_node=per_node, least_share=1 + number % 40)
        received = execute(
            plan, source, destination, rank=rank, staging_bytes=staging_bytes,
            memory=memories[number // 3 % len(memories)],
        )  # fmt: skip
        relayed += sum(m.phase for m in plan.messages if m.src == rank)
        label = (
            f"{src.key} -> {dst.key}, nodes of {per_node}, {staging_bytes} bytes of staging, "
            f"rank {rank}"
        )
        assert received == lacking_bytes(src, dst, rank), label
        if destination is not None and expected is not None:
            for piece in destination.slices:
                found, wanted = (b.view(piece.name) for b in (destination, expected))
                assert torch.equal(found, wanted), f"{piece.name}: {label}"
            assert destination.num_values + lent_values(destination) == expected.num_values
            lent += lent_values(destination)
        if source is not None:
            again = fill(src, rank)
            assert again is not None
            assert torch.equal(source.flat, again.flat), f"source changed: {label}"
        moved += received
    assert rank or lent, "no pair that could borrow"
    return moved, relayed


def halves(memory: CrossMemory, world_size: int) -> CrossMemory:
    """Only ranks of one half may read each other."""
    near = {(a, b) for a, b in memory.readable if 2 * a // world_size == 2 * b // world_size}
    return CrossMemory(memory.pids, frozenset(near))


def lent_values(buffer: ParameterBuffer) -> int:
    return sum(piece.num_values for piece in buffer.slices if piece.name in buffer.lent)


def test_every_slice_arrives_exactly_and_no_byte_too_many() -> None:
    """Over nodes of 2, 3 and 4 too: what enters a node once is sent on out of the destination."""
    found = spawn(WORLD, run_pairs, random_pairs(48, seed=3), timeout_s=240.0)
    assert sum(moved for moved, _ in found) > 0
    assert sum(relayed > 0 for _, relayed in found) == WORLD, "every rank relays something"


def test_experts_that_are_split_over_replicas_arrive_beside_their_padding() -> None:
    """Where experts come last a buffer has padding before them, which no message may run over."""
    model = spec(num_experts=4, experts_per_token=1, shared_ffn=12)
    one, two = DeviceMesh(0, 1), DeviceMesh(2, 2)
    split = Layout(spec=model, mesh=two, dp=2, ep=2)
    whole, halves = Layout(spec=model, mesh=one), Layout(spec=model, mesh=two, tp=2)
    moved = Layout(spec=model, mesh=DeviceMesh(0, 2), dp=2, ep=2)
    cases = [
        (split, whole), (whole, split), (split, halves), (halves, split), (split, moved),
        (whole, moved),
    ]  # fmt: skip
    found = spawn(4, run_pairs, [(*case, 1 << 20) for case in cases for _ in range(2)])
    assert sum(moved for moved, _ in found) > 0


def relay(rank: int, world_size: int) -> int:
    """Ranks 0 to 3 train, all generate: the second node gets each byte once and shares it out.

    Returns the bytes from the other node.
    """
    model = spec(num_experts=4, experts_per_token=1, tied_embedding=True)
    src = Layout(spec=model, mesh=DeviceMesh(0, 4), pp=2, tp=2)
    dst = Layout(spec=model, mesh=DeviceMesh(0, 8), dp=8, ep=2)
    source, expected = fill(src, rank), fill(dst, rank)
    assert expected is not None
    plan = reallocate(src, dst, devices_per_node=4, least_share=100)
    schedule = make_schedule(plan, rank, 750)
    for lender in (None, source):
        target = ParameterBuffer.for_rank(
            dst, rank, dtype=torch.float32, device="cpu", lender=lender, multiple=16
        )
        for _ in range(2):  # a schedule is for every step
            target.flat[: target.num_values] = float("nan")
            received = carry_out(schedule, source, target)
            assert received == lacking_bytes(src, dst, rank)
        for piece in target.slices:
            assert torch.equal(target.view(piece.name), expected.view(piece.name)), piece.name
    far = [m for m in plan.messages if m.dst == rank and m.src // 4 != rank // 4]
    return sum(4 * m.num_values for m in far)


def test_a_node_that_did_not_train_gets_each_byte_once() -> None:
    found = spawn(WORLD, relay)
    model = spec(num_experts=4, experts_per_token=1, tied_embedding=True)
    whole = 4 * Layout(spec=model, mesh=DeviceMesh(0, 1)).num_values(0)
    assert found[:4] == [0] * 4
    entered = found[4:]
    assert sum(entered) == whole, "the four of the second node want all of the model"
    assert max(entered) < 1.1 * min(entered), "each of its adapters takes about a quarter"


def convert_twice(rank: int, world_size: int) -> None:
    src = Layout(spec=spec(), mesh=DeviceMesh(0, 2), tp=2)
    dst = Layout(spec=spec(), mesh=DeviceMesh(2, 2), dp=2)
    source, expected = fill(src, rank), fill(dst, rank, torch.bfloat16)
    target = None
    if rank in dst.mesh:
        target = ParameterBuffer.for_rank(dst, rank, dtype=torch.bfloat16, device="cpu")
    plan = reallocate(src, dst, devices_per_node=2, least_share=10)
    execute(plan, source, target, rank=rank, staging_bytes=300, wire_dtype=torch.float32)
    assert any(message.phase for message in plan.messages)
    if target is not None and expected is not None:
        assert torch.equal(target.flat, expected.flat[: target.num_values])


def test_what_is_sent_on_inside_a_node_is_converted_too() -> None:
    spawn(4, convert_twice)


def convert(rank: int, world_size: int) -> None:
    src = Layout(spec=spec(tied_embedding=True), mesh=DeviceMesh(0, 2), tp=2)
    dst = Layout(spec=spec(tied_embedding=True), mesh=DeviceMesh(0, 3), pp=3)
    source, expected = fill(src, rank), fill(dst, rank, torch.bfloat16)
    destination = ParameterBuffer.for_rank(dst, rank, dtype=torch.bfloat16, device="cpu")
    plan = reallocate(src, dst)
    received = execute(
        plan, source, destination, rank=rank, staging_bytes=300, wire_dtype=torch.bfloat16
    )
    assert expected is not None
    assert torch.equal(destination.flat, expected.flat[: destination.num_values])
    assert received == lacking_bytes(src, dst, rank) // 2, "two bytes a value"
    if rank == 0:
        with pytest.raises(AssertionError, match="differ in dtype"):
            execute(plan, source, destination, rank=rank)


def test_layouts_of_unlike_types_are_converted_on_the_way() -> None:
    spawn(3, convert)


@settings(deadline=None)
@given(st.data())
def test_cut_is_a_range_of_a_box_in_row_major_order(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    offset = tuple(data.draw(st.integers(0, 3)) for _ in shape)
    piece = ParameterSlice(name="x", offset=offset, length=shape)
    start = data.draw(st.integers(0, piece.num_values - 1))
    stop = data.draw(st.integers(start + 1, piece.num_values))
    values = np.arange(10 ** len(shape)).reshape([10] * len(shape))
    pieces = cut(piece, start, stop)
    assert len(pieces) <= 2 * len(shape) - 1
    found = np.concatenate([values[box(p)].ravel() for p in pieces])
    assert found.tolist() == values[box(piece)].ravel()[start:stop].tolist()


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), staging_values=st.integers(1, 5000))
def test_chunks_of_two_rounds_fit_the_staging_and_both_ends_agree(
    seed: int, staging_values: int
) -> None:
    ((src, dst, _),) = random_pairs(1, seed)
    plan = reallocate(src, dst, devices_per_node=NODES[seed % len(NODES)], least_share=30)
    for phase in (0, 1):
        check_phase(plan, phase, staging_values)


def check_phase(plan: Reallocation, phase: int, staging_values: int) -> None:
    streams = [make_schedule(plan, rank, staging_values).phases[phase] for rank in range(WORLD)]
    crossing = Counter[tuple[int, int]]()
    for message in plan.messages:
        if message.phase == phase:
            crossing[message.src, message.dst] += message.num_values
    assert sum(map(len, streams)) == 2 * len(crossing)
    for rank, mine in enumerate(streams):
        for pair, parts in mine.items():
            assert streams[pair[0]][pair] == streams[pair[1]][pair] == parts
            assert all(part.chunk for part in parts) or len(parts) == 1
            assert sum(map(num_values, parts)) == crossing[pair]
        largest = [
            max(sum(b.num_values for b in p.chunk) for p in parts) for parts in mine.values()
        ]
        partners = max(len(m) for m in streams)
        assert 2 * sum(largest) <= max(staging_values, 2 * partners), (rank, largest)


def num_values(part: Part) -> int:
    return sum(box.num_values for box in part.chunk) + sum(row.num_values for row in part.rows)


def test_whole_stages_go_straight_in_one_message() -> None:
    """To ranks without a share of it: neighbours at both ends are one row."""
    model = spec(tied_embedding=True)
    src = Layout(spec=model, mesh=DeviceMesh(0, 1))
    dst = Layout(spec=model, mesh=DeviceMesh(1, 2), pp=2)
    parts = [make_schedule(reallocate(src, dst), 0, 1000).phases[0][0, rank] for rank in (1, 2)]
    assert [[len(part.rows) for part in own] for own in parts] == [
        [1],
        [1 + 1],
    ]  # tied: first, last
    assert not any(part.chunk for own in parts for part in own)
