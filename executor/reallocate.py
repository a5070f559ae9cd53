"""Carries out a ``planner.reallocation.Reallocation``: from one set of flat buffers to another.

Of optimizer state ``optimizer_moves.py`` does, with ``carry_out``, one state at a time.
Read ``execute`` first. What crosses in which round is ``reallocation_rounds.py``'s. Chunks go
through a staging buffer, unless they are side by side at this end. While a round is under way the
previous one is unpacked, the next one packed, and a share of what stays in this rank copied.

What came over the network goes on inside a node in a second phase, out of the destination's buffer:
a rank begins it when all that it receives in the first is in its place.

A rank that holds nothing of the destination only sends, and need not wait: ``carry_out`` then posts
all that it sends at once and leaves the wait to its caller.

Two ranks of one machine that may read each other's memory (``cross_memory.py``) send only where
the values lie, and back that they have been read. The former every rank does as a phase begins; the
reading follows the phase's rounds with others; the answers are waited for at the very end.

No deadlock: a rank posts all sends and receives of a round at once, waits for them before it posts
the round after the next, and for all of one phase before it posts any of the other. Both ends cut a
stream alike, so every round's operations match, in order, between the two ranks of a pair. And each
waits for operations of the same phase and round only, whose ranks wait for earlier ones before they
post them: nobody waits for a later phase, nor in one phase for a later round, so no wait is
circular, also where a rank's operations run in the order in which they were posted (NCCL). Who
leaves its sends behind has posted all that others wait for. Who reads waits for what the owner
tells before it waits for anything in that phase; an answer waits for the reading only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from executor.buffers import FlatBoxes, Range
from executor.cross_memory import PLACE_VALUES, CrossMemory, place_of
from executor.reallocation_rounds import (
    Chunk,
    Pair,
    Schedule,
    Streams,
    chunk_values,
    make_schedule,
    num_rounds,
)
from executor.transfer import Pending, wait_for_all
from planner.layout import ParameterSlice
from planner.memory import STAGING_BYTES
from planner.reallocation import Reallocation


def execute(
    plan: Reallocation,
    source: FlatBoxes | None,
    destination: FlatBoxes | None,
    *,
    rank: int,
    staging_bytes: int | None = None,
    wire_dtype: torch.dtype | None = None,
    memory: CrossMemory | None = None,
) -> int:
    """Fills ``destination`` with this rank's part of ``plan.dst``; returns the bytes received.

    Every rank of the two meshes calls it, with the buffer of each layout that it belongs to and
    None for the other. Slices that the destination's buffer was lent are there already. All
    values cross as ``wire_dtype`` and are converted at the ends, so that the two layouts may have
    unlike types (what goes on inside a node has been through the destination's); None: the type
    that the buffers share. Copies inside this rank are not counted. Memory beyond the buffers: at
    most ``staging_bytes`` (but at least two values for each partner); None: ``STAGING_BYTES`` of
    the device. ``memory``: what need not be converted is read through it where that is allowed.

    With NCCL the world's communicator must exist: all ranks pass a collective once before.
    """
    buffers = [buffer for buffer in (source, destination) if buffer is not None]
    assert buffers, f"rank {rank} holds nothing of {plan.src.key} or {plan.dst.key}"
    dtype = wire_dtype or buffers[0].flat.dtype
    assert wire_dtype or all(buffer.flat.dtype == dtype for buffer in buffers), (
        "the layouts differ in dtype: say which crosses"
    )
    if staging_bytes is None:
        staging_bytes = STAGING_BYTES["cuda" if buffers[0].flat.is_cuda else "cpu"]
    schedule = make_schedule(
        plan, rank, staging_bytes // dtype.itemsize, converted=wire_dtype is not None
    )
    return carry_out(schedule, source, destination, wire_dtype=wire_dtype, memory=memory)


def carry_out(
    schedule: Schedule,
    source: FlatBoxes | None,
    destination: FlatBoxes | None,
    *,
    wire_dtype: torch.dtype | None = None,
    staging: Tensor | None = None,
    most_rounds: int | None = None,
    left: list[Callable[[], None]] | None = None,
    memory: CrossMemory | None = None,
) -> int:
    """``execute`` with a schedule that was made before, and can be run again and again.

    ``staging``: memory to go through, flat and as much as the schedule was made for; None: new.
    ``most_rounds``: leave out all later ones of each phase, where only memory matters
    (``fake.py``). ``left``: where a rank that only sends adds what waits for its sends, if all that
    it has to pack for them fits the staging at once, and until others have read it; until these
    have returned nobody may write its source.
    """
    one = destination if source is None else source
    assert one is not None, schedule.rank
    assert source is None or not source.lent, "rows run on over what is lent"
    dtype = wire_dtype or one.flat.dtype
    like = torch.empty(0, dtype=dtype, device=one.flat.device)
    if staging is not None:
        like = staging
    copies = _Copies(schedule, source, destination)
    received = 0
    read: list[Callable[[], None]] = []  # what waits until others have read this rank's memory
    with torch.no_grad():
        for every, sends_from in zip(schedule.phases, (source, destination), strict=True):
            near, streams = _near_and_far(every, memory if wire_dtype is None else None)
            reads = _Reads(near, schedule.rank, sends_from, destination)
            rounds = min(num_rounds(streams), most_rounds or num_rounds(streams))
            at_once = None
            if left is not None and destination is None and streams:
                at_once = schedule.staging_values
            exchange = _Exchange(
                streams, schedule.rank, sends_from, destination, like, at_once=at_once
            )
            if left is not None and exchange.all_at_once:
                left.append(exchange.post(rounds))
            else:
                received += exchange.run(rounds, copies)
            del exchange  # no name keeps its staging while the next phase takes its own
            if memory is not None:
                received += reads.take(memory)
            if reads.pending:
                read.append(reads.wait)
        copies.finish()
    if left is not None and destination is None:
        left += read
    else:
        for wait in read:
            wait()
    return received * dtype.itemsize


# ---- carrying it out ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    """What is under way: requests, and what they bring: where it is to go, and where it is.

    Of what is received in its place the chunk is empty.
    """

    requests: Sequence[dist.Work]
    incoming: Sequence[tuple[Chunk, Tensor]]


class _Copies:
    """What goes from a rank to itself, a share of it beside each round."""

    def __init__(
        self, schedule: Schedule, source: FlatBoxes | None, destination: FlatBoxes | None
    ) -> None:
        self.left: list[tuple[Tensor, Tensor]] = []  # from and to, the last first
        if source is not None and destination is not None:
            self.left = [
                (source.box(piece), destination.box(piece))
                for piece in reversed(schedule.copies)
                if piece.name not in destination.lent
            ]
        self.total = sum(theirs.numel() for theirs, _ in self.left)
        self.copied = 0

    def share(self, index: int, num_rounds: int) -> None:
        """What is to be there after round ``index``."""
        while self.left and self.copied * num_rounds <= index * self.total:
            self._copy()

    def finish(self) -> None:
        while self.left:
            self._copy()

    def _copy(self) -> None:
        theirs, mine = self.left.pop()
        mine.copy_(theirs)
        self.copied += theirs.numel()


def _near_and_far(streams: Streams, memory: CrossMemory | None) -> tuple[Streams, Streams]:
    """Pairs whose receiver may read the sender's memory, and all others; alike at both ends."""
    near = {
        pair: parts for pair, parts in streams.items()
        if memory is not None and (pair[1], pair[0]) in memory.readable
    }  # fmt: skip
    return near, {pair: parts for pair, parts in streams.items() if pair not in near}


class _Reads:
    """A phase's pairs of which the receiver reads; begun when it is made.

    Two messages for a pair: where the values lie, and that they have been read.
    """

    def __init__(
        self, streams: Streams, rank: int, source: FlatBoxes | None,
        destination: FlatBoxes | None,
    ) -> None:  # fmt: skip
        self.pending: list[Pending] = []
        self.wanted: list[tuple[dist.Work | None, Tensor, int, list[Tensor]]] = []
        for (src, dst), parts in streams.items():
            buffer = destination if dst == rank else source
            assert buffer is not None, (src, dst, rank)
            tensors = [_row(buffer, row.first, row.num_values) for p in parts for row in p.rows]
            tensors += [buffer.box(box) for part in parts for box in part.chunk]
            if dst == rank:
                places = torch.empty(len(tensors), PLACE_VALUES, dtype=torch.int64)
                self.wanted.append((dist.irecv(places, src), places, src, tensors))
            else:
                places = torch.tensor([place_of(tensor) for tensor in tensors])
                self.pending.append((dist.isend(places, dst), places))
        for src, dst in streams:
            if src == rank:  # what a reader says comes after where its own values lie
                answer = torch.empty(1, dtype=torch.uint8)
                self.pending.append((dist.irecv(answer, dst), answer))

    def take(self, memory: CrossMemory) -> int:
        """All that this rank wants, owner by owner; returns the values."""
        received = 0
        for work, places, owner, tensors in self.wanted:
            wait_for_all([(work, places)])
            memory.read(owner, places.tolist(), tensors)
            answer = torch.ones(1, dtype=torch.uint8)
            self.pending.append((dist.isend(answer, owner), answer))
            received += sum(tensor.numel() for tensor in tensors)
        return received

    def wait(self) -> None:
        """Until others have read what they want of this rank's."""
        wait_for_all(self.pending)


class _Exchange:
    """A phase's rounds of one rank over a staging buffer of two halves, each one segment a pair.

    ``at_once``: of a rank that only sends, the values that its staging may have. Where that is
    enough for every round to have its own, all can be posted at once (``all_at_once``).
    """

    def __init__(
        self, streams: Streams, rank: int, source: FlatBoxes | None,
        destination: FlatBoxes | None, like: Tensor, *, at_once: int | None,
    ) -> None:  # fmt: skip
        self.streams, self.rank, self.dtype = streams, rank, like.dtype
        self.source, self.destination = source, destination
        self.in_place = {
            pair: [self._in_place(pair, part.chunk) for part in parts]
            for pair, parts in streams.items()
        }
        self.sizes = {
            pair: max(
                chunk_values(part.chunk) if place is None else 0
                for part, place in zip(parts, self.in_place[pair], strict=True)
            )
            for pair, parts in streams.items()
        }
        rounds, width = num_rounds(streams), sum(self.sizes.values())
        self.all_at_once = at_once is not None and rounds * width <= at_once
        held = rounds if self.all_at_once else min(2, rounds)
        if like.numel() < held * width:
            like = like.new_empty(held * width)
        self.staging = like[: held * width].view(held, width)
        self.under_way: dict[int, _Round] = {}

    def _own(self, pair: Pair) -> FlatBoxes:
        """What this rank sends from, or receives into."""
        buffer = self.destination if pair[1] == self.rank else self.source
        assert buffer is not None, (pair, self.rank)
        return buffer

    def _in_place(self, pair: Pair, chunk: Chunk) -> Range | None:
        """Where the values of a chunk lie as one row of this rank's buffer, if they do."""
        buffer = self._own(pair)
        if len(chunk) != 1 or buffer.flat.dtype != self.dtype:
            return None
        return buffer.row(chunk[0])

    def run(self, num_rounds: int, copies: _Copies) -> int:
        """All rounds; returns the values received."""
        received = 0
        if num_rounds:
            self.start(0)
        for index in range(num_rounds):
            if index + 1 < num_rounds:
                self.start(index + 1)
            copies.share(index, num_rounds)
            received += self.finish(index)
        return received

    def post(self, num_rounds: int) -> Callable[[], None]:
        """Begins all rounds; returns what waits for them."""
        for index in range(num_rounds):
            self.start(index)
        return self._wait

    def _wait(self) -> None:
        for index in sorted(self.under_way):
            self.finish(index)

    def start(self, index: int) -> None:
        """Packs and posts round ``index``."""
        operations: list[dist.P2POp] = []
        incoming: list[tuple[Chunk, Tensor]] = []
        segments = self.staging[index % len(self.staging)].split(list(self.sizes.values()))
        for (pair, parts), segment in zip(self.streams.items(), segments, strict=True):
            if index >= len(parts):
                continue
            part, place, buffer = parts[index], self.in_place[pair][index], self._own(pair)
            receives = pair[1] == self.rank
            tensors = [_row(buffer, row.first, row.num_values) for row in part.rows]
            if part.chunk:
                chunk = segment[: chunk_values(part.chunk)]
                if place is not None:
                    chunk = buffer.of_row(part.chunk[0].name, place)
                elif not receives:
                    _pack(buffer, part.chunk, chunk)
                if receives:
                    incoming.append((part.chunk if place is None else (), chunk))
                tensors.append(chunk)
            if receives:
                operations += [dist.P2POp(dist.irecv, tensor, pair[0]) for tensor in tensors]
                incoming += [((), tensor) for tensor in tensors[: len(part.rows)]]
            else:
                operations += [dist.P2POp(dist.isend, tensor, pair[1]) for tensor in tensors]
        self.under_way[index] = _Round(
            requests=dist.batch_isend_irecv(operations), incoming=incoming
        )

    def finish(self, index: int) -> int:
        """Waits for round ``index`` and unpacks it; returns the values received."""
        current = self.under_way.pop(index)
        for request in current.requests:
            request.wait()
        for chunk, tensor in current.incoming:
            if chunk:
                assert self.destination is not None
                _unpack(self.destination, chunk, tensor)
        return sum(tensor.numel() for _, tensor in current.incoming)


def _row(buffer: FlatBoxes, first: ParameterSlice, num_values: int) -> Tensor:
    place = buffer.row(first)
    assert place is not None, first
    return buffer.of_row(first.name, (place[0], place[0] + num_values))


def _pack(buffer: FlatBoxes, chunk: Chunk, flat: Tensor) -> None:
    """Boxes of ``buffer`` into ``flat``, end to end."""
    for box, part in zip(chunk, flat.split([box.num_values for box in chunk])):
        part.view(box.length).copy_(buffer.box(box))


def _unpack(buffer: FlatBoxes, chunk: Chunk, flat: Tensor) -> None:
    for box, part in zip(chunk, flat.split([box.num_values for box in chunk])):
        buffer.box(box).copy_(part.view(box.length))
