"""What a reallocation puts on each device and link: ``lane_loads``.

The same bytes and messages as those of ``planner.routes``, added up without listing the routes: a
search prices tens of thousands of pairs of layouts. ``_cross`` is ``routes._routes_of``, and what
it calls is named as there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from planner.cost.crossings import (
    ALL,
    BLOCKS,
    DST_EP,
    DST_TP,
    EP_UNITS,
    FIRST_DST,
    FIRST_SRC,
    INNER,
    LAST_DST,
    LAST_SRC,
    NEW_GROUP,
    NUM_SIZES,
    SRC_EP,
    SRC_TP,
    UNITS,
    UNLENDABLE,
    Crossings,
    Ints,
    crossings,
)
from planner.jit import brief, compiled, inlined
from planner.layout import Layout
from planner.routes import LEAST_SHARE

OUT_INTRA, IN_INTRA, OUT_INTER, IN_INTER, OUT_RELAY, IN_RELAY, PASSES, MESSAGES = range(8)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneLoads:
    """By lane and device [6, devices]: out and in inside a node, out and in between nodes, and

    out and in inside a node of what came over the network (phase 1 of ``planner.routes``).
    ``passes``: values that a device reads or writes for it [devices]; what it need not copy is not
    among them (``planner.lending``).
    """

    values: Ints
    messages: Ints
    passes: Ints

    def heaviest(self, lanes: slice) -> list[tuple[int, int]]:
        """(values, messages) of lanes of which no other has more of the one and no less of the

        other: of one link one of these is the slowest. None where nothing is sent.
        """
        values, messages = self.values[lanes], self.messages[lanes]
        found = np.empty((messages.size + 1, 2), dtype=np.int64)
        count = _heaviest(values, messages, found)
        return [(num_values, sent) for num_values, sent in found[:count].tolist()]


def lane_loads(
    src: Layout, dst: Layout, *, devices_per_node: int, least_share: int = LEAST_SHARE
) -> LaneLoads:
    """Values and messages of a reallocation, device by device of ``[0, last of both meshes]``."""
    assert src.spec == dst.spec, (src.spec.name, dst.spec.name)
    last = max(src.mesh.devices[-1], dst.mesh.devices[-1])
    loads = np.zeros((13, last + 1), dtype=np.int64)
    room = np.zeros((8, last + 1), dtype=np.int64)
    shape = np.array(
        (
            src.mesh.first, src.dp, src.tp, dst.mesh.first, dst.dp, dst.tp, devices_per_node,
            least_share,
        ),
        dtype=np.int64,
    )  # fmt: skip
    ends = (src.pp, src.tp, src.ep), (dst.pp, dst.tp, dst.ep)
    _cross_all(shape, crossings(src.spec, *ends), room, loads)
    return LaneLoads(values=loads[:PASSES], messages=loads[MESSAGES:], passes=loads[PASSES])


# ---- in machine code ----------------------------------------------------------------------------


# Rows of the room to work in [8, devices]: values that each has been given to send; who gave it
# something of the layers at hand, or -1; lists of devices; and by taker a ``Share`` of a piece.
SENT, GAVE, HOLDERS, WANTING, SHARES = range(5)

# Of ``shape``: source, destination, and what both share.
FIRST, DP, TP, AT_DST = range(4)
PER_NODE, LEAST = 6, 7


@compiled
def _who(
    shape: Ints, end: int, stages: Ints, ep_parts: int, tp_parts: int, ep_part: int, tp_part: int,
    found: Ints,
) -> int:  # fmt: skip
    """Writes the devices that hold a part to ``found``, in ascending order; returns how many.

    ``end``: 0 under the source, ``AT_DST`` under the destination.
    """
    first, dp, tp = shape[end + FIRST], shape[end + DP], shape[end + TP]
    repeats, count = tp // tp_parts, 0
    for stage in stages:
        for dp_rank in range(ep_part, dp, ep_parts):
            device = first + (stage * dp + dp_rank) * tp + tp_part * repeats
            for repeat in range(repeats):
                found[count] = device + repeat
                count += 1
    return count


@inlined
def _least(devices: Ints, first: int, last: int, values: Ints) -> int:
    """Of devices ``first`` to ``last`` of a list that of least values, of equals the first."""
    best = devices[first]
    for i in range(first + 1, last):
        if values[devices[i]] < values[best]:
            best = devices[i]
    return best  # type: ignore[no-any-return]


@inlined
def _is_at(shape: Ints, row: Ints, src_stages: Ints, src_ep: int, src_tp: int, device: int) -> bool:
    """Does a device hold a part under the source?"""
    dp, tp = shape[DP], shape[TP]
    rank, found = device - shape[FIRST], False
    if rank % tp * row[SRC_TP] // tp == src_tp and rank // tp % dp % row[SRC_EP] == src_ep:
        stage = rank // (dp * tp)
        for own in src_stages:
            found |= own == stage
    return found


@compiled
def _weigh(
    sizes: Ints, weights: Ints, row: Ints, blocks: int, ends: int, lo: int, hi: int, units: int,
    experts: int,
) -> tuple[int, int, int]:  # fmt: skip
    """Values in [lo, hi) of units of so many blocks, and of the ends ``ends`` times, by which."""
    every, unlendable, inner = 0, 0, 0
    for j in range(row[NUM_SIZES]):
        length = sizes[j] * hi // units - sizes[j] * lo // units
        every += length * (blocks * weights[0, ALL, j] + ends * weights[1, ALL, j])
        unlendable += length * (
            blocks * weights[0, UNLENDABLE, j] + ends * weights[1, UNLENDABLE, j]
        )
        inner += length * (blocks * weights[0, INNER, j] + ends * weights[1, INNER, j])
    if row[EP_UNITS] > 1:
        every = every * experts // row[EP_UNITS]
        unlendable = unlendable * experts // row[EP_UNITS]
        inner = inner * experts // row[EP_UNITS]
    return every, unlendable, inner


@compiled
def _give(room: Ints, first: int, last: int, again: bool, taker: int, num_values: int) -> int:
    """As ``routes._Burden.give``, from holders ``first`` to ``last``.

    ``again``: who gave the taker something is one of them.
    """
    giver = room[GAVE, taker] if again else _least(room[HOLDERS], first, last, room[SENT])
    if room[GAVE, taker] < 0:
        room[GAVE, taker] = giver
    room[SENT, giver] += num_values
    return giver


@inlined
def _add(loads: Ints, lane: int, giver: int, taker: int, moved: int, count: int) -> None:
    loads[lane, giver] += moved
    loads[lane + 1, taker] += moved
    loads[MESSAGES + lane, giver] += count
    loads[MESSAGES + lane + 1, taker] += count


class Piece(NamedTuple):
    """What a part at the source and one at the destination have in common, as of a ``Route``."""

    src_ep: int
    src_tp: int
    lo: int
    hi: int
    experts: int  # how many of ``EP_UNITS``


class Share(NamedTuple):
    """Of a piece, or of one taker's share: what it loads."""

    values: int
    routes: int
    packed: int  # passes of who gives it from the source's slices
    unpacked: int  # passes of who has it in the destination's, whether it takes or gives


@compiled
def _whole(row: Ints, piece: Piece, every: int, inner: int) -> Share:
    """All of a piece. Parts of rows are packed, or unpacked, once read and once written."""
    width = piece.hi - piece.lo
    return Share(
        every, 1, 2 * inner * (width * row[SRC_TP] != row[UNITS]),
        2 * inner * (width * row[DST_TP] != row[UNITS]),
    )  # fmt: skip


@compiled
def _share(row: Ints, sizes: Ints, weights: Ints, piece: Piece, count: int, room: Ints) -> None:
    """As ``routes._shares``: fills ``room`` for so many takers."""
    width, units = piece.hi - piece.lo, row[UNITS] * count
    each = row[BLOCKS] // count
    left = row[BLOCKS] - each * count
    of_blocks = _weigh(sizes, weights, row, each, 0, piece.lo, piece.hi, row[UNITS], piece.experts)
    blocks = _whole(row, piece, of_blocks[ALL], of_blocks[INNER])
    for i in range(count):
        lo = piece.lo * count + width * i
        rows = _weigh(sizes, weights, row, left, 1, lo, lo + width, units, piece.experts)
        room[SHARES, i] = blocks.values + rows[ALL]
        room[SHARES + 1, i] = (blocks.values > 0) + (rows[ALL] > 0)
        room[SHARES + 2, i] = blocks.packed + 2 * rows[INNER]
        room[SHARES + 3, i] = blocks.unpacked + 2 * rows[INNER]


@compiled
def _enter(
    shape: Ints, row: Ints, src_stages: Ints, piece: Piece, whole: Share, num_holders: int,
    first: int, last: int, room: Ints, loads: Ints,
) -> None:  # fmt: skip
    """A piece into a node without holders, of which wanting ``first`` to ``last`` are takers."""
    count = last - first
    split = count > 1 and whole.values >= shape[LEAST] * count
    sole = _least(room[WANTING], first, last, loads[IN_INTER])
    moved, routes, passes = 0, 0, 0
    for i in range(count):
        taker, share = room[WANTING, first + i], whole
        if split:
            share = Share(
                room[SHARES, i], room[SHARES + 1, i], room[SHARES + 2, i], room[SHARES + 3, i]
            )
        elif taker != sole:
            continue
        again = room[GAVE, taker] >= 0 and not row[NEW_GROUP]
        if again:
            again = _is_at(shape, row, src_stages, piece.src_ep, piece.src_tp, room[GAVE, taker])
        giver = _give(room, 0, num_holders, again, taker, share.values)
        _add(loads, OUT_INTER, giver, taker, share.values, share.routes)
        loads[PASSES, giver] += share.packed
        # It unpacks its share, and packs it for each of the others.
        loads[PASSES, taker] += count * share.unpacked
        if count == 1:
            return
        loads[OUT_RELAY, taker] += (count - 1) * share.values
        loads[MESSAGES + OUT_RELAY, taker] += (count - 1) * share.routes
        moved, routes, passes = moved + share.values, routes + share.routes, passes + share.unpacked
        loads[IN_RELAY, taker] -= share.values
        loads[MESSAGES + IN_RELAY, taker] -= share.routes
        loads[PASSES, taker] -= share.unpacked
    for i in range(first, last):
        loads[IN_RELAY, room[WANTING, i]] += moved
        loads[MESSAGES + IN_RELAY, room[WANTING, i]] += routes
        loads[PASSES, room[WANTING, i]] += passes


@compiled
def _copied(shape: Ints, row: Ints, piece: Piece, num_values: int, unlendable: int) -> int:
    """Values of a piece that a device copies which holds it."""
    tp, shift = shape[TP], shape[FIRST] - shape[AT_DST + FIRST]
    if tp == shape[AT_DST + TP] and shift % tp == 0 and row[SRC_EP] == row[DST_EP]:
        return 0  # it holds all alike
    width = piece.hi - piece.lo
    if width * row[DST_TP] != row[UNITS] or piece.experts * row[DST_EP] != row[EP_UNITS]:
        return num_values  # what is wanted is joined from several pieces
    return unlendable


@compiled
def _cross(
    shape: Ints, row: Ints, stages: Ints, sizes: Ints, weights: Ints, piece: Piece,
    num_wanting: int, room: Ints, loads: Ints,
) -> None:  # fmt: skip
    """Add one piece of one group of layers, on its way to devices ``room[WANTING]``."""
    every, unlendable, inner = _weigh(
        sizes, weights, row, row[BLOCKS], 1, piece.lo, piece.hi, row[UNITS], piece.experts
    )
    if every == 0:
        return
    whole = _whole(row, piece, every, inner)
    copied = _copied(shape, row, piece, every, unlendable)
    src_stages = stages[row[FIRST_SRC] : row[LAST_SRC]]
    num_holders = _who(shape, 0, src_stages, row[SRC_EP], row[SRC_TP], piece.src_ep, piece.src_tp,
                       room[HOLDERS])  # fmt: skip
    per_node, shared_by = shape[PER_NODE], 0
    last, near_last = 0, 0
    while last < num_wanting:  # node after node
        node = room[WANTING, last] // per_node
        first, near = last, near_last
        while last < num_wanting and room[WANTING, last] < (node + 1) * per_node:
            last += 1
        while near < num_holders and room[HOLDERS, near] < node * per_node:
            near += 1
        near_last = near
        while near_last < num_holders and room[HOLDERS, near_last] < (node + 1) * per_node:
            near_last += 1
        if near == near_last:
            if last - first > 1 and last - first != shared_by:
                shared_by = last - first
                _share(row, sizes, weights, piece, shared_by, room)
            _enter(shape, row, src_stages, piece, whole, num_holders, first, last, room, loads)
            continue
        own = near
        for i in range(first, last):
            taker = room[WANTING, i]
            while own < near_last and room[HOLDERS, own] < taker:
                own += 1
            if own < near_last and room[HOLDERS, own] == taker:
                loads[PASSES, taker] += 2 * copied
                continue
            giver = room[GAVE, taker]
            again = room[HOLDERS, near] <= giver <= room[HOLDERS, near_last - 1]
            if again:
                again = _is_at(shape, row, src_stages, piece.src_ep, piece.src_tp, giver)
            giver = _give(room, near, near_last, again, taker, whole.values)
            _add(loads, OUT_INTRA, giver, taker, whole.values, 1)
            loads[PASSES, giver] += whole.packed
            loads[PASSES, taker] += whole.unpacked


@brief
def _heaviest(values: Ints, messages: Ints, found: Ints) -> int:
    """Writes what ``LaneLoads.heaviest`` lists to ``found``; returns how many."""
    count = 0
    for lane in range(values.shape[0]):
        for device in range(values.shape[1]):
            own, sent = values[lane, device], messages[lane, device]
            if sent == 0:
                continue
            kept, beaten = 0, False
            for i in range(count):
                if found[i, 0] >= own and found[i, 1] >= sent:
                    beaten = True
                    break
                if found[i, 0] > own or found[i, 1] > sent:
                    found[kept, 0], found[kept, 1] = found[i, 0], found[i, 1]
                    kept += 1
            if not beaten:
                found[kept, 0], found[kept, 1] = own, sent
                count = kept + 1
    return count


@brief
def _cross_all(shape: Ints, of: Crossings, room: Ints, loads: Ints) -> None:
    """Add all pieces, in order: who has sent much is asked less."""
    for index in range(len(of.rows)):
        row = of.rows[index]
        if row[NEW_GROUP]:
            room[GAVE, :] = -1
        dst_stages = of.stages[row[FIRST_DST] : row[LAST_DST]]
        ep_steps = row[EP_UNITS] // row[SRC_EP], row[EP_UNITS] // row[DST_EP]
        steps = row[UNITS] // row[SRC_TP], row[UNITS] // row[DST_TP]
        for dst_ep in range(row[DST_EP]):
            for dst_tp in range(row[DST_TP]):
                count = _who(shape, AT_DST, dst_stages, row[DST_EP], row[DST_TP], dst_ep, dst_tp,
                             room[WANTING])  # fmt: skip
                first, start = dst_ep * ep_steps[1], dst_tp * steps[1]
                last, stop = first + ep_steps[1], start + steps[1]
                for src_ep in range(first // ep_steps[0], -(-last // ep_steps[0])):
                    experts = min(last, (src_ep + 1) * ep_steps[0]) - max(
                        first, src_ep * ep_steps[0]
                    )
                    for src_tp in range(start // steps[0], -(-stop // steps[0])):
                        piece = Piece(
                            src_ep, src_tp, max(start, src_tp * steps[0]),
                            min(stop, (src_tp + 1) * steps[0]), experts,
                        )  # fmt: skip
                        _cross(
                            shape, row, of.stages, of.sizes[index],
                            of.weights[index], piece, count, room, loads,
                        )  # fmt: skip
