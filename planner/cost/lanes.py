"""What a reallocation puts on each device and link: ``lane_loads``.

The same bytes and messages as those of ``planner.routes``, added up without listing the routes: a
search prices tens of thousands of pairs of layouts. ``_cross`` is ``routes._routes_of``, and what
it calls is named as there.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from math import lcm, prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.jit import brief, compiled, inlined
from planner.layout import Layout, layer_parameters
from planner.lending import may_be_part
from planner.mesh import DeviceMesh
from planner.routes import LEAST_SHARE, Cut, cut_dim, cuts, groups_of_layers, num_parts
from profiles.models import ModelSpec

Ints = npt.NDArray[np.int64]
OUT_INTRA, IN_INTRA, OUT_INTER, IN_INTER, OUT_RELAY, IN_RELAY, PASSES = range(7)


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


def lane_loads(
    src: Layout, dst: Layout, *, devices_per_node: int, least_share: int = LEAST_SHARE
) -> LaneLoads:
    """Values and messages of a reallocation, device by device of ``[0, last of both meshes]``."""
    assert src.spec == dst.spec, (src.spec.name, dst.spec.name)
    last = max(src.mesh.devices[-1], dst.mesh.devices[-1])
    values = np.zeros((7, last + 1), dtype=np.int64)
    messages = np.zeros((6, last + 1), dtype=np.int64)
    shape = np.array(
        [
            src.mesh.first, src.dp, src.tp, src.ep, dst.mesh.first, dst.dp, dst.tp, dst.ep,
            devices_per_node, least_share,
        ],
        dtype=np.int64,
    )  # fmt: skip
    room = Room(
        sent=np.zeros(last + 1, dtype=np.int64), gave=np.zeros(last + 1, dtype=np.int64),
        near=np.zeros(last + 1, dtype=np.int64), holders=np.zeros(last + 1, dtype=np.int64),
        wanting=np.zeros(last + 1, dtype=np.int64),
        shares=np.zeros((4, last + 1), dtype=np.int64),
    )  # fmt: skip
    ends = (src.pp, src.tp, src.ep), (dst.pp, dst.tp, dst.ep)
    _cross_all(shape, _crossings(src.spec, *ends), room, values, messages)
    return LaneLoads(values=values[:PASSES], messages=messages, passes=values[PASSES])


# ---- what does not depend on the meshes, nor on dp ----------------------------------------------


class Crossings(NamedTuple):
    """A row for each group of layers and each cut, in the order of ``planner.routes.routes``.

    ``rows`` [rows, 13], see ``_cross``; ``stages`` of all rows; and of parameters that are cut
    alike (dimensions of equal size) ``sizes`` [rows, kinds of sizes] and ``weights``
    [rows, block or ends, which, kinds of sizes], values for each one along that dimension.
    Which: all, those that only a device that holds them alike may lend, those cut inside rows.
    """

    rows: Ints
    stages: Ints
    sizes: Ints
    weights: Ints


# Fields of a row: whether it is the first of its group, what both ends' parts are, ...
(
    NEW_GROUP, SRC_EP, SRC_TP, DST_EP, DST_TP, EP_UNITS, UNITS, BLOCKS, FIRST_SRC, LAST_SRC,
    FIRST_DST, LAST_DST, NUM_SIZES,
) = range(13)  # fmt: skip
ALL, UNLENDABLE, INNER = range(3)


@lru_cache(maxsize=4096)
def _crossings(
    spec: ModelSpec, source: tuple[int, int, int], target: tuple[int, int, int]
) -> Crossings:
    """``source`` and ``target``: pp, tp and ep."""
    src, dst = _unplaced(spec, *source), _unplaced(spec, *target)
    rows, stages = list[tuple[int, ...]](), list[int]()
    cut_alike = list[tuple[dict[int, Ints], dict[int, Ints]]]()
    for src_stages, dst_stages, blocks, ends in _groups(spec, src.pp, dst.pp):
        first = len(stages)
        middle, last = first + len(src_stages), first + len(src_stages) + len(dst_stages)
        stages += [*src_stages, *dst_stages]
        for index, cut in enumerate(cuts(src, dst)):
            parts = num_parts(src, cut), num_parts(dst, cut)
            units = [lcm(a, b) for a, b in zip(*parts)]
            weights = _weights(spec, (0,) if blocks else (), cut), _weights(spec, ends, cut)
            cut_alike.append(weights)
            rows.append((
                int(index == 0), *parts[0], *parts[1], *units, blocks, first, middle, middle, last,
                len(weights[0].keys() | weights[1].keys()),
            ))  # fmt: skip
    most = max(row[NUM_SIZES] for row in rows)
    sizes = np.zeros((len(rows), most), dtype=np.int64)
    table = np.zeros((len(rows), 2, 3, most), dtype=np.int64)
    for i, (block, end) in enumerate(cut_alike):
        for j, size in enumerate(sorted(block.keys() | end.keys())):
            sizes[i, j] = size
            for k, weights_of in enumerate((block, end)):
                table[i, k, :, j] = weights_of.get(size, 0)
    return Crossings(
        rows=np.array(rows, dtype=np.int64), stages=np.array(stages, dtype=np.int64), sizes=sizes,
        weights=table,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _groups(
    spec: ModelSpec, src_pp: int, dst_pp: int
) -> list[tuple[tuple[int, ...], tuple[int, ...], int, tuple[int, ...]]]:
    """(source stages, destination stages, number of blocks, other layers)."""
    found = []
    ends = _unplaced(spec, src_pp, 1, 1), _unplaced(spec, dst_pp, 1, 1)
    for src_stages, dst_stages, layers in groups_of_layers(*ends):
        others = tuple(layer for layer in layers if not 0 <= layer < spec.num_layers)
        found.append((src_stages, dst_stages, len(layers) - len(others), others))
    return found


def _unplaced(spec: ModelSpec, pp: int, tp: int, ep: int) -> Layout:
    return Layout(spec=spec, mesh=DeviceMesh(0, pp * tp * ep), pp=pp, tp=tp, dp=ep, ep=ep)


@lru_cache(maxsize=4096)
def _weights(spec: ModelSpec, layers: tuple[int, ...], cut: Cut) -> dict[int, Ints]:
    """Of what a cut names of some layers: by size of the dimension that it cuts, [which]."""
    found: dict[int, Ints] = defaultdict(lambda: np.zeros(3, dtype=np.int64))
    for layer in layers:
        for parameter in layer_parameters(spec, layer):
            dim = cut_dim(parameter, cut)
            if dim is not None:
                size = parameter.shape[dim]
                # Who holds a replicated parameter holds it alike.
                is_cut = parameter.shard_dim is not None
                which = 1, is_cut and not may_be_part(parameter), is_cut and dim > 0
                found[size] += np.array(which, dtype=np.int64) * (prod(parameter.shape) // size)
    return dict(found)


# ---- what does: in machine code -----------------------------------------------------------------


class Room(NamedTuple):
    """Arrays to work in [devices]: values that each has been given to send, who gave a device

    something of the layers at hand, and lists of devices. ``shares`` [4, devices]: ``Share``s.
    """

    sent: Ints
    gave: Ints
    near: Ints
    holders: Ints
    wanting: Ints
    shares: Ints


# Of ``shape``: source, destination, and what both share.
FIRST, DP, TP, EP = range(4)
AT_DST, PER_NODE, LEAST = 4, 8, 9


@compiled
def _who(
    shape: Ints, end: int, stages: Ints, ep_parts: int, tp_parts: int, ep_part: int, tp_part: int,
    start: int, stop: int, found: Ints,
) -> int:  # fmt: skip
    """Writes the devices in [start, stop) that hold a part to ``found``; returns how many.

    ``end``: 0 under the source, ``AT_DST`` under the destination.
    """
    first, dp, tp = shape[end + FIRST], shape[end + DP], shape[end + TP]
    repeats, count = tp // tp_parts, 0
    for stage in stages:
        base = first + stage * dp * tp
        if base >= stop or base + dp * tp <= start:
            continue
        low = max(0, (start - base) // tp) if start > base else 0
        high = min(dp, (stop - 1 - base) // tp + 1)
        low += (ep_part - low) % ep_parts
        for dp_rank in range(low, high, ep_parts):
            device = base + dp_rank * tp + tp_part * repeats
            for holder in range(max(device, start), min(device + repeats, stop)):
                found[count] = holder
                count += 1
    return count


@inlined
def _least(devices: Ints, count: int, values: Ints) -> int:
    """The one of least values, of equals the first."""
    best = devices[0]
    for i in range(1, count):
        if values[devices[i]] < values[best]:
            best = devices[i]
    return best  # type: ignore[no-any-return]


@compiled
def _is_at(
    shape: Ints, end: int, stages: Ints, ep_parts: int, tp_parts: int, ep_part: int, tp_part: int,
    device: int,
) -> bool:  # fmt: skip
    """Does a device hold a part?"""
    dp, tp = shape[end + DP], shape[end + TP]
    rank = device - shape[end + FIRST]
    if rank < 0 or rank % tp * tp_parts // tp != tp_part or rank // tp % dp % ep_parts != ep_part:
        return False
    stage = rank // (dp * tp)
    for own in stages:
        if own == stage:
            return True
    return False


@compiled
def _weigh(
    sizes: Ints, weights: Ints, row: Ints, which: int, blocks: int, ends: int, lo: int, hi: int,
    units: int, experts: int,
) -> int:  # fmt: skip
    """Values in [lo, hi) of units of so many blocks, and of the ends ``ends`` times."""
    total = 0
    for j in range(row[NUM_SIZES]):
        length = sizes[j] * hi // units - sizes[j] * lo // units
        total += length * (blocks * weights[0, which, j] + ends * weights[1, which, j])
    return total * experts // row[EP_UNITS]  # type: ignore[no-any-return]


@compiled
def _give(room: Room, givers: Ints, count: int, again: bool, taker: int, num_values: int) -> int:
    """As ``routes._Burden.give``; ``again``: who gave the taker something is one of ``givers``."""
    giver = room.gave[taker] if again else _least(givers, count, room.sent)
    if room.gave[taker] < 0:
        room.gave[taker] = giver
    room.sent[giver] += num_values
    return giver  # type: ignore[no-any-return]


@inlined
def _add(
    values: Ints, messages: Ints, lane: int, giver: int, taker: int, moved: int, count: int
) -> None:
    values[lane, giver] += moved
    values[lane + 1, taker] += moved
    messages[lane, giver] += count
    messages[lane + 1, taker] += count


class Piece(NamedTuple):
    """What a part at the source and one at the destination have in common, as of a ``Route``."""

    src_ep: int
    src_tp: int
    dst_ep: int
    dst_tp: int
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
def _whole(row: Ints, sizes: Ints, weights: Ints, piece: Piece) -> Share:
    """All of a piece. Parts of rows are packed, or unpacked, once read and once written."""
    of = row[BLOCKS], 1, piece.lo, piece.hi, row[UNITS], piece.experts
    inner = 2 * _weigh(sizes, weights, row, INNER, *of)
    width = piece.hi - piece.lo
    return Share(
        _weigh(sizes, weights, row, ALL, *of), 1, inner * (width * row[SRC_TP] != row[UNITS]),
        inner * (width * row[DST_TP] != row[UNITS]),
    )  # fmt: skip


@compiled
def _share(row: Ints, sizes: Ints, weights: Ints, piece: Piece, count: int, shares: Ints) -> None:
    """As ``routes._shares``: fills ``shares`` for so many takers."""
    width, units = piece.hi - piece.lo, row[UNITS] * count
    each = row[BLOCKS] // count
    left = row[BLOCKS] - each * count
    of = each, 0, piece.lo, piece.hi, row[UNITS], piece.experts
    blocks = _weigh(sizes, weights, row, ALL, *of)
    inner = 2 * _weigh(sizes, weights, row, INNER, *of)
    packed = inner * (width * row[SRC_TP] != row[UNITS])
    unpacked = inner * (width * row[DST_TP] != row[UNITS])
    for i in range(count):
        lo = piece.lo * count + width * i
        some = left, 1, lo, lo + width, units, piece.experts
        rows = _weigh(sizes, weights, row, ALL, *some)
        inner = 2 * _weigh(sizes, weights, row, INNER, *some)
        shares[0, i] = blocks + rows
        shares[1, i] = (blocks > 0) + (rows > 0)
        shares[2, i] = packed + inner
        shares[3, i] = unpacked + inner


@compiled
def _enter(
    shape: Ints, row: Ints, src_stages: Ints, piece: Piece, whole: Share, num_holders: int,
    count: int, room: Room, values: Ints, messages: Ints,
) -> None:  # fmt: skip
    """A piece into a node without holders, of which ``room.wanting`` are the takers."""
    split = count > 1 and whole.values >= shape[LEAST] * count
    sole = _least(room.wanting, count, values[IN_INTER])
    moved, routes, passes = 0, 0, 0
    for i in range(count):
        taker, share = room.wanting[i], whole
        if split:
            of = room.shares
            share = Share(of[0, i], of[1, i], of[2, i], of[3, i])
        elif taker != sole:
            continue
        again = room.gave[taker] >= 0 and _is_at(shape, 0, src_stages, row[SRC_EP], row[SRC_TP],
                                                 piece.src_ep, piece.src_tp, room.gave[taker])
        giver = _give(room, room.holders, num_holders, again, taker, share.values)
        _add(values, messages, OUT_INTER, giver, taker, share.values, share.routes)
        values[PASSES, giver] += share.packed
        # It unpacks its share, and packs it for each of the others.
        values[PASSES, taker] += count * share.unpacked
        values[OUT_RELAY, taker] += (count - 1) * share.values
        messages[OUT_RELAY, taker] += (count - 1) * share.routes
        moved, routes, passes = moved + share.values, routes + share.routes, passes + share.unpacked
        values[IN_RELAY, taker] -= share.values
        messages[IN_RELAY, taker] -= share.routes
        values[PASSES, taker] -= share.unpacked
    for i in range(count):
        values[IN_RELAY, room.wanting[i]] += moved
        messages[IN_RELAY, room.wanting[i]] += routes
        values[PASSES, room.wanting[i]] += passes


@compiled
def _copied(
    shape: Ints, row: Ints, sizes: Ints, weights: Ints, piece: Piece, num_values: int
) -> int:
    """Values of a piece, of so many, that a device copies which holds it."""
    tp, shift = shape[TP], shape[FIRST] - shape[AT_DST + FIRST]
    if tp == shape[AT_DST + TP] and shift % tp == 0 and row[SRC_EP] == row[DST_EP]:
        return 0  # it holds all alike
    width = piece.hi - piece.lo
    if width * row[DST_TP] != row[UNITS] or piece.experts * row[DST_EP] != row[EP_UNITS]:
        return num_values  # what is wanted is joined from several pieces
    return _weigh(  # type: ignore[no-any-return]
        sizes, weights, row, UNLENDABLE, row[BLOCKS], 1, piece.lo, piece.hi, row[UNITS],
        piece.experts,
    )  # fmt: skip


@compiled
def _cross(
    shape: Ints, row: Ints, stages: Ints, sizes: Ints, weights: Ints, piece: Piece, room: Room,
    values: Ints, messages: Ints,
) -> None:  # fmt: skip
    """Add one piece of one group of layers on its way to all nodes."""
    whole = _whole(row, sizes, weights, piece)
    if whole.values == 0:
        return
    src_stages = stages[row[FIRST_SRC] : row[LAST_SRC]]
    dst_stages = stages[row[FIRST_DST] : row[LAST_DST]]
    copied = _copied(shape, row, sizes, weights, piece, whole.values)
    num_holders = _who(shape, 0, src_stages, row[SRC_EP], row[SRC_TP], piece.src_ep, piece.src_tp,
                       0, len(room.holders), room.holders)  # fmt: skip
    per_node = shape[PER_NODE]
    first, per_stage = shape[AT_DST + FIRST], shape[AT_DST + DP] * shape[AT_DST + TP]
    shared_by = 0
    for node in range(
        (first + dst_stages[0] * per_stage) // per_node,
        (first + (dst_stages[-1] + 1) * per_stage - 1) // per_node + 1,
    ):
        start, stop = node * per_node, (node + 1) * per_node
        count = _who(shape, AT_DST, dst_stages, row[DST_EP], row[DST_TP], piece.dst_ep,
                     piece.dst_tp, start, stop, room.wanting)  # fmt: skip
        if count == 0:
            continue
        num_near = _who(shape, 0, src_stages, row[SRC_EP], row[SRC_TP], piece.src_ep,
                        piece.src_tp, start, stop, room.near)  # fmt: skip
        if num_near == 0:
            if count > 1 and count != shared_by:
                _share(row, sizes, weights, piece, count, room.shares)
                shared_by = count
            _enter(shape, row, src_stages, piece, whole, num_holders, count, room, values,
                   messages)  # fmt: skip
            continue
        for i in range(count):
            taker = room.wanting[i]
            if _is_at(shape, 0, src_stages, row[SRC_EP], row[SRC_TP], piece.src_ep, piece.src_tp,
                      taker):  # fmt: skip
                values[PASSES, taker] += 2 * copied
                continue
            giver = room.gave[taker]
            again = start <= giver < stop and _is_at(
                shape, 0, src_stages, row[SRC_EP], row[SRC_TP], piece.src_ep, piece.src_tp, giver
            )
            giver = _give(room, room.near, num_near, again, taker, whole.values)
            _add(values, messages, OUT_INTRA, giver, taker, whole.values, 1)
            values[PASSES, giver] += whole.packed
            values[PASSES, taker] += whole.unpacked


@brief
def _cross_all(
    shape: Ints, crossings: Crossings, room: Room, values: Ints, messages: Ints
) -> None:
    """Add all pieces, in order: who has sent much is asked less."""
    for index in range(len(crossings.rows)):
        row = crossings.rows[index]
        if row[NEW_GROUP]:
            room.gave[:] = -1
        ep_steps = row[EP_UNITS] // row[SRC_EP], row[EP_UNITS] // row[DST_EP]
        steps = row[UNITS] // row[SRC_TP], row[UNITS] // row[DST_TP]
        for dst_ep in range(row[DST_EP]):
            for dst_tp in range(row[DST_TP]):
                first, start = dst_ep * ep_steps[1], dst_tp * steps[1]
                last, stop = first + ep_steps[1], start + steps[1]
                for src_ep in range(first // ep_steps[0], -(-last // ep_steps[0])):
                    experts = min(last, (src_ep + 1) * ep_steps[0]) - max(
                        first, src_ep * ep_steps[0]
                    )
                    for src_tp in range(start // steps[0], -(-stop // steps[0])):
                        piece = Piece(
                            src_ep, src_tp, dst_ep, dst_tp, max(start, src_tp * steps[0]),
                            min(stop, (src_tp + 1) * steps[0]), experts,
                        )  # fmt: skip
                        _cross(
                            shape, row, crossings.stages, crossings.sizes[index],
                            crossings.weights[index], piece, room, values, messages,
                        )  # fmt: skip
