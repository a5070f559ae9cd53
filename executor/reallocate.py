"""Carries out a ``planner.reallocation.Reallocation``: from one set of flat buffers to another.

Read ``execute`` first. Who sends what is the planner's; here the slices between two ranks are
cut into chunks: large slices by rows, small ones laid end to end. Chunk ``r`` of every pair
crosses in round ``r``. What is contiguous in a flat buffer is sent from there and received there;
the rest goes through a staging buffer, and while a round is under way the previous one is unpacked
and the next one packed.

No deadlock: a rank posts all sends and receives of a round at once and waits for them before it
posts the round after the next; both ends cut a stream alike, so every round's operations match.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from executor.buffers import ParameterBuffer, Range
from planner.layout import ParameterSlice
from planner.memory import STAGING_BYTES
from planner.reallocation import Reallocation

Pair = tuple[int, int]  # (sender, receiver), world ranks
Chunk = tuple[ParameterSlice, ...]  # boxes that cross together, laid end to end


def execute(
    plan: Reallocation,
    source: ParameterBuffer | None,
    destination: ParameterBuffer | None,
    *,
    rank: int,
    staging_bytes: int | None = None,
    wire_dtype: torch.dtype | None = None,
    most_rounds: int | None = None,
) -> int:
    """Fills ``destination`` with this rank's part of ``plan.dst``; returns the bytes received.

    Every rank of the two meshes calls it, with the buffer of each layout that it belongs to and
    None for the other. Slices that the destination's buffer was lent are there already. All
    values cross as ``wire_dtype`` and are converted at the ends, so that the two layouts may have
    unlike types; None: the type that the buffers share. Copies inside this rank are not counted.
    Memory beyond the buffers: at most ``staging_bytes`` (but at least two values for each
    partner); None: ``STAGING_BYTES`` of the device. ``most_rounds``: leave out all later ones,
    where only memory matters (``fake.py``).

    With NCCL the world's communicator must exist: let all ranks pass a barrier once before.
    """
    buffers = [buffer for buffer in (source, destination) if buffer is not None]
    assert buffers, f"rank {rank} holds nothing of {plan.src.key} or {plan.dst.key}"
    dtype = wire_dtype or buffers[0].flat.dtype
    assert wire_dtype or all(buffer.flat.dtype == dtype for buffer in buffers), (
        "the layouts differ in dtype: say which crosses"
    )
    if staging_bytes is None:
        staging_bytes = STAGING_BYTES["cuda" if buffers[0].flat.is_cuda else "cpu"]
    with torch.no_grad():
        work = _Exchange(
            chunk_streams(plan, rank, staging_bytes // dtype.itemsize), source, destination, rank,
            torch.empty(0, dtype=dtype, device=buffers[0].flat.device),
        )  # fmt: skip
        if most_rounds is not None:
            work.num_rounds = min(work.num_rounds, most_rounds)
        work.start(0)
        for copy in plan.copies:  # under the first round
            if copy.dst == rank:
                assert source is not None, copy
                assert destination is not None, copy
                if copy.slice.name in destination.lent:
                    continue
                destination.box(copy.slice).copy_(source.box(copy.slice))
        return work.finish() * dtype.itemsize


def chunk_streams(
    plan: Reallocation, rank: int, staging_values: int
) -> Mapping[Pair, tuple[Chunk, ...]]:
    """The chunks of every pair that ``rank`` belongs to, the same on both ends.

    A chunk holds at most ``staging_values / (2 * partners)`` values (at least one), where
    ``partners`` are the pairs of the busiest rank: all of a rank's chunks of two rounds fit.
    """
    streams: dict[Pair, list[ParameterSlice]] = defaultdict(list)
    for message in plan.messages:
        streams[message.src, message.dst].append(message.slice)
    partners: dict[int, int] = defaultdict(int)
    for src, dst in streams:
        partners[src] += 1
        partners[dst] += 1
    limit = max(1, staging_values // (2 * max(partners.values(), default=1)))
    return {
        pair: tuple(_chunks(boxes, limit)) for pair, boxes in streams.items() if rank in pair
    }  # fmt: skip


# A slice with at least this share of a chunk's limit crosses alone: often without a copy.
_ALONE = 1 / 8


def _chunks(boxes: Sequence[ParameterSlice], limit: int) -> list[Chunk]:
    """Large boxes by whole rows where a row fits; then the others end to end, cut anywhere."""
    done: list[Chunk] = []
    chunk: list[ParameterSlice] = []
    room = limit
    large = [box for box in boxes if box.num_values >= _ALONE * limit]
    for box in large:
        row = box.num_values // box.length[0]
        step = limit // row * row or limit
        starts = range(0, box.num_values, step)
        done += [cut(box, start, min(start + step, box.num_values)) for start in starts]
    for box in boxes:
        if box.num_values >= _ALONE * limit:
            continue
        start = 0
        while start < box.num_values:
            stop = min(box.num_values, start + room)
            chunk.extend(cut(box, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                done.append(tuple(chunk))
                chunk, room = [], limit
    return [*done, tuple(chunk)] if chunk else done


def cut(box: ParameterSlice, start: int, stop: int) -> tuple[ParameterSlice, ...]:
    """Values ``start`` … ``stop`` of a box in row-major order, as few boxes.

    The end of a row, whole rows, the beginning of a row; rows of more than one dimension are cut
    alike. At most 2 d - 1 boxes in d dimensions.
    """
    if start == stop:
        return ()
    if (start, stop) == (0, box.num_values):
        return (box,)
    row = box.num_values // box.length[0]
    edges = {start, min(-(-start // row) * row, stop), max(stop // row * row, start), stop}
    found: list[ParameterSlice] = []
    for lo, hi in pairwise(sorted(edges)):
        first, num_rows = lo // row, (hi - lo) // row
        if num_rows:
            found.append(_rows(box, first, num_rows))
        else:
            inner = ParameterSlice(name=box.name, offset=box.offset[1:], length=box.length[1:])
            found += [
                ParameterSlice(
                    name=box.name,
                    offset=(box.offset[0] + first, *piece.offset),
                    length=(1, *piece.length),
                )
                for piece in cut(inner, lo - first * row, hi - first * row)
            ]
    return tuple(found)


def _rows(box: ParameterSlice, first: int, count: int) -> ParameterSlice:
    """Rows ``first`` … ``first + count`` of a box."""
    return ParameterSlice(
        name=box.name,
        offset=(box.offset[0] + first, *box.offset[1:]),
        length=(count, *box.length[1:]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    """What is under way: requests, and what they bring: where it is to go, and where it is.

    Of what is received in its place the chunk is empty.
    """

    requests: Sequence[dist.Work]
    incoming: Sequence[tuple[Chunk, Tensor]]


class _Exchange:
    """The rounds of one rank over a staging buffer of two halves, one segment a pair in each."""

    def __init__(
        self,
        streams: Mapping[Pair, tuple[Chunk, ...]],
        source: ParameterBuffer | None,
        destination: ParameterBuffer | None,
        rank: int,
        like: Tensor,
    ) -> None:
        self.streams, self.rank = streams, rank
        self.source, self.destination = source, destination
        self.num_rounds = max((len(chunks) for chunks in streams.values()), default=0)
        self.dtype = like.dtype
        self.direct = {
            pair: [self._in_place(pair, chunk) for chunk in chunks]
            for pair, chunks in streams.items()
        }
        self.sizes = {
            pair: max((_num_values(c) for c, d in zip(chunks, self.direct[pair]) if d is None),
                      default=0)
            for pair, chunks in streams.items()
        }  # fmt: skip
        self.staging = like.new_empty(min(2, self.num_rounds), sum(self.sizes.values()))
        self.under_way: dict[int, _Round] = {}

    def _own(self, pair: Pair) -> ParameterBuffer:
        """What this rank sends from, or receives into."""
        buffer = self.destination if pair[1] == self.rank else self.source
        assert buffer is not None, (pair, self.rank)
        return buffer

    def _in_place(self, pair: Pair, chunk: Chunk) -> Range | None:
        """Where the values of a chunk lie as one row of this rank's buffer, if they do."""
        buffer = self._own(pair)
        if len(chunk) > 1 or buffer.flat.dtype != self.dtype:
            return None
        return buffer.row(chunk[0])

    def start(self, index: int) -> None:
        """Packs and posts round ``index``."""
        if index >= self.num_rounds:
            return
        operations: list[dist.P2POp] = []
        incoming: list[tuple[Chunk, Tensor]] = []
        segments = self.staging[index % 2].split(list(self.sizes.values()))
        for ((src, dst), chunks), segment in zip(self.streams.items(), segments):
            if index >= len(chunks):
                continue
            buffer, chunk, direct = (
                self._own((src, dst)),
                chunks[index],
                self.direct[src, dst][index],
            )
            if direct is None:
                part = segment[: _num_values(chunk)]
            else:
                part = buffer.of_row(chunk[0].name, direct)
            if dst == self.rank:
                operations.append(dist.P2POp(dist.irecv, part, src))
                incoming.append((chunk if direct is None else (), part))
            else:
                if direct is None:
                    _pack(buffer, chunk, part)
                operations.append(dist.P2POp(dist.isend, part, dst))
        self.under_way[index] = _Round(
            requests=dist.batch_isend_irecv(operations), incoming=incoming
        )

    def finish(self) -> int:
        """Runs what ``start(0)`` began to its end; returns the values received."""
        received = 0
        for index in range(self.num_rounds):
            self.start(index + 1)
            current = self.under_way.pop(index)
            for request in current.requests:
                request.wait()
            for chunk, part in current.incoming:
                if chunk:
                    assert self.destination is not None
                    _unpack(self.destination, chunk, part)
                received += part.numel()
        return received


def _num_values(chunk: Chunk) -> int:
    return sum(box.num_values for box in chunk)


def _pack(buffer: ParameterBuffer, chunk: Chunk, flat: Tensor) -> None:
    """Boxes of ``buffer`` into ``flat``, end to end."""
    for box, part in zip(chunk, flat.split([box.num_values for box in chunk])):
        part.view(box.length).copy_(buffer.box(box))


def _unpack(buffer: ParameterBuffer, chunk: Chunk, flat: Tensor) -> None:
    for box, part in zip(chunk, flat.split([box.num_values for box in chunk])):
        buffer.box(box).copy_(part.view(box.length))
