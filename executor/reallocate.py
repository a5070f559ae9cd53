"""Carries out a ``planner.reallocation.Reallocation``: from one set of flat buffers to another.

Read ``execute`` first. What crosses in which round is ``reallocation_rounds.py``'s. Chunks go
through a staging buffer, unless they are side by side at this end. While a round is under way the
previous one is unpacked, the next one packed, and a share of what stays in this rank copied.

No deadlock: a rank posts all sends and receives of a round at once and waits for them before it
posts the round after the next; both ends cut a stream alike, so every round's operations match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from executor.buffers import ParameterBuffer, Range
from executor.reallocation_rounds import Chunk, Pair, Schedule, chunk_values, make_schedule
from planner.layout import ParameterSlice
from planner.memory import STAGING_BYTES
from planner.reallocation import Reallocation


def execute(
    plan: Reallocation,
    source: ParameterBuffer | None,
    destination: ParameterBuffer | None,
    *,
    rank: int,
    staging_bytes: int | None = None,
    wire_dtype: torch.dtype | None = None,
) -> int:
    """Fills ``destination`` with this rank's part of ``plan.dst``; returns the bytes received.

    Every rank of the two meshes calls it, with the buffer of each layout that it belongs to and
    None for the other. Slices that the destination's buffer was lent are there already. All
    values cross as ``wire_dtype`` and are converted at the ends, so that the two layouts may have
    unlike types; None: the type that the buffers share. Copies inside this rank are not counted.
    Memory beyond the buffers: at most ``staging_bytes`` (but at least two values for each
    partner); None: ``STAGING_BYTES`` of the device.

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
    schedule = make_schedule(
        plan, rank, staging_bytes // dtype.itemsize, converted=wire_dtype is not None
    )
    return carry_out(schedule, source, destination, wire_dtype=wire_dtype)


def carry_out(
    schedule: Schedule,
    source: ParameterBuffer | None,
    destination: ParameterBuffer | None,
    *,
    wire_dtype: torch.dtype | None = None,
    staging: Tensor | None = None,
    most_rounds: int | None = None,
) -> int:
    """``execute`` with a schedule that was made before, and can be run again and again.

    ``staging``: memory to go through, flat and as much as the schedule was made for; None: new.
    ``most_rounds``: leave out all later ones, where only memory matters (``fake.py``).
    """
    one = destination if source is None else source
    assert one is not None, schedule.rank
    assert source is None or source.lender is None, "rows run on over what is lent"
    dtype = wire_dtype or one.flat.dtype
    like = torch.empty(0, dtype=dtype, device=one.flat.device)
    num_rounds = min(schedule.num_rounds, most_rounds or schedule.num_rounds)
    with torch.no_grad():
        work = _Exchange(schedule, source, destination, like if staging is None else staging)
        return work.run(num_rounds) * dtype.itemsize


# ---- carrying it out ----------------------------------------------------------------------------


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
        self, schedule: Schedule, source: ParameterBuffer | None,
        destination: ParameterBuffer | None, like: Tensor,
    ) -> None:  # fmt: skip
        self.schedule, self.rank, self.dtype = schedule, schedule.rank, like.dtype
        self.source, self.destination = source, destination
        self.in_place = {
            pair: [self._in_place(pair, part.chunk) for part in parts]
            for pair, parts in schedule.streams.items()
        }
        self.sizes = {
            pair: max(
                chunk_values(part.chunk) if place is None else 0
                for part, place in zip(parts, self.in_place[pair], strict=True)
            )
            for pair, parts in schedule.streams.items()
        }
        halves, width = min(2, schedule.num_rounds), sum(self.sizes.values())
        if like.numel() < halves * width:
            like = like.new_empty(halves * width)
        self.staging = like[: halves * width].view(halves, width)
        self.under_way: dict[int, _Round] = {}

    def _own(self, pair: Pair) -> ParameterBuffer:
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

    def run(self, num_rounds: int) -> int:
        """All rounds; returns the values received."""
        received, copied = 0, 0
        copies = self._copies()
        total = sum(theirs.numel() for theirs, _ in copies)
        if num_rounds:
            self.start(0)
        for index in range(num_rounds):
            if index + 1 < num_rounds:
                self.start(index + 1)
            while copies and copied * num_rounds <= index * total:
                theirs, mine = copies.pop()
                mine.copy_(theirs)
                copied += theirs.numel()
            received += self.finish(index)
        for theirs, mine in reversed(copies):
            mine.copy_(theirs)
        return received

    def _copies(self) -> list[tuple[Tensor, Tensor]]:
        """What goes from this rank to itself, from and to, the last first."""
        source, destination = self.source, self.destination
        if source is None or destination is None:
            return []
        return [
            (source.box(piece), destination.box(piece))
            for piece in reversed(self.schedule.copies)
            if piece.name not in destination.lent
        ]

    def start(self, index: int) -> None:
        """Packs and posts round ``index``."""
        operations: list[dist.P2POp] = []
        incoming: list[tuple[Chunk, Tensor]] = []
        segments = self.staging[index % 2].split(list(self.sizes.values()))
        for (pair, parts), segment in zip(self.schedule.streams.items(), segments, strict=True):
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


def _row(buffer: ParameterBuffer, first: ParameterSlice, num_values: int) -> Tensor:
    place = buffer.row(first)
    assert place is not None, first
    return buffer.of_row(first.name, (place[0], place[0] + num_values))


def _pack(buffer: ParameterBuffer, chunk: Chunk, flat: Tensor) -> None:
    """Boxes of ``buffer`` into ``flat``, end to end."""
    for box, part in zip(chunk, flat.split([box.num_values for box in chunk])):
        part.view(box.length).copy_(buffer.box(box))


def _unpack(buffer: ParameterBuffer, chunk: Chunk, flat: Tensor) -> None:
    for box, part in zip(chunk, flat.split([box.num_values for box in chunk])):
        buffer.box(box).copy_(part.view(box.length))
