"""Protects: what is read of another process is what lies there, and who may not read finds it out.

Oracle: torch's own copy between the same views.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import executor.cross_memory as cross_memory
from executor.cross_memory import CrossMemory, place_of
from tests.spawn import spawn

OWN = CrossMemory([os.getpid()], frozenset())  # a process may read itself


@st.composite
def views(draw: st.DrawFn) -> tuple[tuple[int, ...], list[slice], list[slice]]:
    """A shape, and a box of that shape in each of two larger tensors."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    ends = [[draw(st.integers(0, 3)) for _ in shape] for _ in range(2)]
    return shape, *[[slice(o, o + n) for o, n in zip(end, shape)] for end in ends]


@settings(deadline=None)
@given(st.lists(views(), min_size=1, max_size=4), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_box_comes_into_any_box_of_its_shape(
    boxes: list[tuple[tuple[int, ...], list[slice], list[slice]]], dtype: torch.dtype
) -> None:
    shapes = [[n + 3 for n in shape] for shape, _, _ in boxes]
    wholes = [(torch.rand(shape).to(dtype), torch.zeros(shape).to(dtype)) for shape in shapes]
    pairs = [
        (there[tuple(a)], here[tuple(b)])
        for (there, here), (_, a, b) in zip(wholes, boxes, strict=True)
    ]
    OWN.read(0, [place_of(theirs) for theirs, _ in pairs], [mine for _, mine in pairs])
    for (theirs, mine), (_, here) in zip(pairs, wholes, strict=True):
        assert torch.equal(mine, theirs)
        assert here.count_nonzero() == mine.count_nonzero(), "nothing beside it is written"


@pytest.mark.parametrize(
    ("shape", "there", "here"),
    [
        ((5000, 3), (7, 1), (3, 1)),  # more rows than one call takes
        ((3, 700_000), (700_001, 1), (800_000, 1)),  # rows of more than a piece
        ((3_000_000,), (1,), (1,)),  # several pieces side by side
        ((40, 50, 6), (1000, 10, 1), (300, 6, 1)),
    ],
)
def test_large_and_many(
    shape: tuple[int, ...], there: tuple[int, ...], here: tuple[int, ...]
) -> None:
    def view(stride: tuple[int, ...], values: torch.Tensor) -> torch.Tensor:
        return values[: 1 + sum((n - 1) * s for n, s in zip(shape, stride))].as_strided(
            shape, stride
        )

    theirs = view(there, torch.rand(3_000_000))
    mine = view(here, torch.zeros(3_000_000))
    OWN.read(0, [place_of(theirs)], [mine])
    assert torch.equal(mine, theirs)


def test_pieces_are_alike_at_both_ends_also_where_runs_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows that end within a piece come from, or into, what lies side by side."""
    monkeypatch.setattr(cross_memory, "_PIECE_BYTES", 64)
    rows = torch.rand(1500, 30)[:, :24]
    whole = torch.zeros(1500, 24)
    OWN.read(0, [place_of(rows)], [whole])
    assert torch.equal(whole, rows)
    back = torch.zeros(1500, 30)
    OWN.read(0, [place_of(whole)], [back[:, :24]])
    assert torch.equal(back[:, :24], whole)
    assert not back[:, 24:].any()


def test_whoever_has_ended_is_named() -> None:
    ended = os.fork()
    if ended == 0:
        os._exit(0)
    os.waitpid(ended, 0)
    memory = CrossMemory([os.getpid(), ended], frozenset())
    with pytest.raises(OSError, match="cannot read the memory of rank 1: No such process"):
        memory.read(1, [place_of(torch.ones(3))], [torch.ones(3)])


def test_what_is_not_there_is_an_error_and_no_crash() -> None:
    with pytest.raises(OSError, match="rank 0"):
        OWN.read(0, [[8, 0, 0, 0, 4]], [torch.ones(3)])


def who_reads(rank: int, world_size: int) -> tuple[frozenset[tuple[int, int]], float]:
    """Rank 2 says that it is on another machine; rank 3 tells of another process than its own."""
    if rank == 2:
        cross_memory._process_space = lambda: 7
    elif rank == 3:
        cross_memory.os.getpid = os.getppid
    memory = CrossMemory.between_workers()
    values = torch.full((1000,), float(rank))
    own = torch.tensor(place_of(values))
    told = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(told, own)
    seen = torch.zeros(1000)
    other = {0: 1, 1: 0, 2: 2, 3: 3}[rank]
    if (rank, other) in memory.readable:
        memory.read(other, [told[other].tolist()], [seen])
    dist.barrier()
    return memory.readable, float(seen.mean())


def test_workers_find_out_whom_they_may_read() -> None:
    found = spawn(4, who_reads)
    (readable,) = {pairs for pairs, _ in found}
    if not readable:
        pytest.skip("this machine lets no process read another")
    assert readable == {(0, 1), (1, 0)}
    assert [mean for _, mean in found] == [1.0, 0.0, 0.0, 0.0]
