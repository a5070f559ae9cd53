"""What crosses in which round of a reallocation, and how: the same at both ends of every pair.

Read ``make_schedule``. Who sends what in which of two phases is the planner's. Values that lie
side by side in the flat buffers of both ends cross from the one straight into the other, as a
``Row``. All else crosses in chunks, of which one pair has one in a round: large slices by rows,
small ones laid end to end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from executor.buffers import row_in
from planner.layout import Layout, ParameterSlice
from planner.optimizer_state import StateReallocation
from planner.reallocation import Reallocation

Pair = tuple[int, int]  # (sender, receiver), world ranks
Chunk = tuple[ParameterSlice, ...]  # boxes that cross together, laid end to end


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """``num_values`` that lie side by side at both ends, from the first of box ``first`` on."""

    first: ParameterSlice
    num_values: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What crosses between two ranks in one round: at most one chunk, and any number of rows."""

    chunk: Chunk
    rows: tuple[Row, ...]


Streams = Mapping[Pair, tuple[Part, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One rank's share of a reallocation: by pair its rounds in each of two phases, and what it

    copies from itself. In phase 0 it sends from what it had, in phase 1 from what came in phase 0.
    ``staging_values``: of all chunks that are on their way at once.
    """

    rank: int
    staging_values: int
    phases: tuple[Streams, Streams]
    copies: tuple[ParameterSlice, ...]


def num_rounds(streams: Streams) -> int:
    return max((len(parts) for parts in streams.values()), default=0)


def chunk_values(chunk: Chunk) -> int:
    return sum(box.num_values for box in chunk)


def make_schedule(
    plan: Reallocation | StateReallocation,
    rank: int,
    staging_values: int,
    *,
    converted: bool = False,
) -> Schedule:
    """What ``rank`` sends, receives and copies; of every pair both ends find the same.

    In each phase a chunk holds at most ``staging_values / (2 * partners)`` values (at least one),
    where ``partners`` are the pairs of the busiest rank: all of a rank's chunks of two rounds fit.
    ``converted``: an end may have values of another type than those that cross, so that nothing
    goes straight; nor does optimizer state, which ends anywhere in a parameter.
    """
    all_ends: tuple[_Ends | None, _Ends | None] = (None, None)
    if isinstance(plan, Reallocation):
        all_ends = (plan.src, plan.dst), (plan.dst, plan.dst)
    first, second = (
        _streams(_boxes(plan, phase), ends, rank, staging_values, converted)
        for phase, ends in enumerate(all_ends)
    )
    copies = tuple(copy.slice for copy in plan.copies if copy.dst == rank)
    return Schedule(rank=rank, staging_values=staging_values, phases=(first, second), copies=copies)


def _boxes(
    plan: Reallocation | StateReallocation, phase: int
) -> Mapping[Pair, list[ParameterSlice]]:
    """What crosses between two ranks in a phase."""
    found: dict[Pair, list[ParameterSlice]] = defaultdict(list)
    for message in plan.messages:
        if message.phase == phase:
            found[message.src, message.dst].append(message.slice)
    return found


_Places = Mapping[str, tuple[int, ParameterSlice]]  # where a slice begins, and what it is


def _places(layout: Layout, device: int) -> _Places:
    """In the device's buffer, as if nothing were lent to it."""
    found, start, gap = {}, 0, layout.ep > 1
    for piece in layout.slices(device):
        if gap and piece.is_expert:  # a buffer may have padding here, which this stands for
            start, gap = start + 1, False
        found[piece.name] = start, piece
        start += piece.num_values
    return found


_Ends = tuple[Layout, Layout]  # of the buffers that senders and receivers have


def _streams(
    boxes: Mapping[Pair, list[ParameterSlice]], ends: _Ends | None, rank: int,
    staging_values: int, converted: bool,
) -> Streams:  # fmt: skip
    """``ends``: None of optimizer state."""
    partners: dict[int, int] = defaultdict(int)
    for src, dst in boxes:
        partners[src] += 1
        partners[dst] += 1
    limit = max(1, staging_values // (2 * max(partners.values(), default=1)))
    places = cache(_places)
    found: dict[Pair, tuple[Part, ...]] = {}
    for (src, dst), own in boxes.items():
        if rank not in (src, dst):
            continue
        rows: list[Row] = []
        if ends is not None:
            here, there = places(ends[0], src), places(ends[1], dst)
            # Routes come cut by cut; what lies side by side may cross at once.
            own = _in_order(own, there)
            if not converted:
                rows, own = _straight(own, here, there, least=limit * _ALONE)
        found[src, dst] = _rounds(list(_chunks(own, limit)), rows)
    return found


def _in_order(boxes: Sequence[ParameterSlice], places: _Places) -> list[ParameterSlice]:
    return sorted(boxes, key=lambda box: (places[box.name][0], box.offset))


def _straight(
    boxes: Sequence[ParameterSlice], here: _Places, there: _Places, *, least: float
) -> tuple[list[Row], list[ParameterSlice]]:
    """Rows of at least so many values that go straight, and the boxes that do not.

    Boxes are joined that follow each other at both ends. What is lent is never received, nor sent
    on, so that a buffer without it has the others no further apart than they are counted here.
    """
    rows: list[Row] = []
    others: list[ParameterSlice] = []
    together: list[ParameterSlice] = []
    ends: tuple[int | None, ...] = ()

    def close() -> None:
        num_values = sum(box.num_values for box in together)
        if num_values >= least and together:
            rows.append(Row(first=together[0], num_values=num_values))
        else:
            others.extend(together)
        together.clear()

    for box in boxes:
        places = []
        for starts in (here, there):
            start, whole = starts[box.name]
            inside = row_in(whole, box)
            places.append(None if inside is None else start + inside)
        if None in places:
            others.append(box)
            continue
        if tuple(places) != ends:
            close()
        together.append(box)
        ends = tuple(place + box.num_values for place in places if place is not None)
    close()
    return rows, others


def _rounds(chunks: Sequence[Chunk], rows: Sequence[Row]) -> tuple[Part, ...]:
    """A chunk a round, and in each about as many values of rows."""
    num_rounds = max(1, len(chunks))
    dealt: list[list[Row]] = [[] for _ in range(num_rounds)]
    total, before = sum(row.num_values for row in rows), 0
    for row in rows:
        dealt[before * num_rounds // total].append(row)
        before += row.num_values
    return tuple(
        Part(chunk=chunks[index] if chunks else (), rows=tuple(own))
        for index, own in enumerate(dealt)
    )


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
