"""What a reallocation puts on each device and link: ``lane_loads``.

The same bytes and messages as those of ``planner.reallocation.routes``, added up without listing
the routes: a search prices tens of thousands of pairs of layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import lcm

import numpy as np
import numpy.typing as npt

from planner.jit import brief, compiled, inlined
from planner.layout import Layout
from planner.mesh import DeviceMesh
from planner.reallocation import (
    Cut,
    Route,
    Which,
    crossing_parts,
    cuts,
    groups_of_layers,
    route_values,
    routes,
    stored_values,
)
from profiles.models import ModelSpec

Ints = npt.NDArray[np.int64]
OUT_INTRA, IN_INTRA, OUT_INTER, IN_INTER, PASSES = range(5)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneLoads:
    """By lane (out and in inside a node, out and in between nodes) and device: [4, devices].

    ``passes``: values that a device reads or writes for it [devices]; what it need not copy is not
    among them (``planner.reallocation.lent``).
    """

    values: Ints
    messages: Ints
    passes: Ints


def lane_loads(src: Layout, dst: Layout, *, devices_per_node: int) -> LaneLoads:
    """Values and messages of a reallocation, device by device of ``[0, last of both meshes]``."""
    assert src.spec == dst.spec, (src.spec.name, dst.spec.name)
    if src.ep > 1 or dst.ep > 1:
        return _loads_of_routes(src, dst, devices_per_node)
    last = max(src.mesh.devices[-1], dst.mesh.devices[-1])
    values = np.zeros((5, last + 1), dtype=np.int64)
    messages = np.zeros((4, last + 1), dtype=np.int64)
    shape = np.array(
        [src.mesh.first, src.dp, src.tp, dst.mesh.first, dst.dp, dst.tp, devices_per_node, src.pp],
        dtype=np.int64,
    )
    sent = np.zeros(last + 1, dtype=np.int64)
    _cross_all(shape, *_crossings(src.spec, src.pp, src.tp, dst.pp, dst.tp), sent, values, messages)
    return LaneLoads(values=values[:4], messages=messages, passes=values[PASSES])


def _loads_of_routes(src: Layout, dst: Layout, devices_per_node: int) -> LaneLoads:
    """The same from the routes themselves, one by one: of experts that are split over ep."""
    last = max(src.mesh.devices[-1], dst.mesh.devices[-1])
    values = np.zeros((5, last + 1), dtype=np.int64)
    messages = np.zeros((4, last + 1), dtype=np.int64)
    received = np.zeros(last + 1, dtype=np.int64)
    for route in routes(src, dst, devices_per_node=devices_per_node):
        if route.src == route.dst:
            continue
        moved = route_values(src.spec, route)
        received[route.dst] += moved
        # As in _cross: parts of rows are packed and unpacked.
        inner = route_values(src.spec, replace(route, replicated=False), "inner")
        for device, tp in ((route.src, src.tp), (route.dst, dst.tp)):
            values[PASSES, device] += 2 * inner * ((route.hi - route.lo) * tp != route.units)
        near = route.src // devices_per_node == route.dst // devices_per_node
        lane = OUT_INTRA if near else OUT_INTER
        values[lane, route.src] += moved
        values[lane + 1, route.dst] += moved
        messages[lane, route.src] += 1
        messages[lane + 1, route.dst] += 1
    for device in dst.mesh.devices:  # what is neither lent nor received is copied
        values[PASSES, device] += 2 * (stored_values(src, dst, device) - received[device])
    return LaneLoads(values=values[:4], messages=messages, passes=values[PASSES])


@lru_cache(maxsize=4096)
def _crossings(
    spec: ModelSpec, src_pp: int, src_tp: int, dst_pp: int, dst_tp: int
) -> tuple[Ints, Ints, Ints]:
    """What does not depend on the meshes, nor on dp: a row for each group of layers and each cut.

    (details [rows, 9], source stages of all rows, cumulated [rows, kinds, units + 1]); see
    ``_cross``.
    """
    src, dst = _unplaced(spec, src_pp, src_tp), _unplaced(spec, dst_pp, dst_tp)
    details, held_by, before = list[tuple[int, ...]](), list[int](), list[Ints]()
    for dst_stage, src_stages, blocks, ends in _groups(spec, src_pp, dst_pp):
        first = len(held_by)
        held_by += src_stages
        for cut in cuts(src, dst):
            parts = crossing_parts(src, cut), crossing_parts(dst, cut)
            cumulated, replicated, weight = _values(
                spec, blocks, ends if cut != "kv" else (), *parts, cut
            )
            units = cumulated.shape[1] - 1
            details.append(
                (dst_stage, *parts, replicated, weight, cut != "kv", units, first, len(held_by))
            )
            before.append(cumulated)
    cumulated = np.zeros((len(details), 3, max(c.shape[1] for c in before)), dtype=np.int64)
    for row, found in enumerate(before):
        cumulated[row, :, : found.shape[1]] = found
    return np.array(details, dtype=np.int64), np.array(held_by, dtype=np.int64), cumulated


@lru_cache(maxsize=1024)
def _groups(
    spec: ModelSpec, src_pp: int, dst_pp: int
) -> Sequence[tuple[int, Sequence[int], int, tuple[int, ...]]]:
    """(destination stage, source stages, number of blocks, other layers)."""
    num_layers = spec.num_layers
    return [
        (
            stage,
            sorted(stages),
            sum(0 <= layer < num_layers for layer in layers),
            tuple(layer for layer in layers if not 0 <= layer < num_layers),
        )
        for stage, stages, layers in groups_of_layers(
            _unplaced(spec, src_pp, 1), _unplaced(spec, dst_pp, 1)
        )
    ]


def _unplaced(spec: ModelSpec, pp: int, tp: int) -> Layout:
    return Layout(spec=spec, mesh=DeviceMesh(0, pp * tp), pp=pp, tp=tp)


@lru_cache(maxsize=4096)
def _values(
    spec: ModelSpec, blocks: int, ends: tuple[int, ...], src_parts: int, dst_parts: int, cut: Cut
) -> tuple[Ints, int, int]:
    """(sharded values before each unit [kinds, units + 1], replicated ones, all) of some layers.

    Kinds: all, those that cannot be lent, those that are cut inside their rows.
    """
    units = lcm(src_parts, dst_parts)

    def count(lo: int, hi: int, units: int, replicated: bool, which: Which = "all") -> int:
        def of(layers: tuple[int, ...]) -> int:
            route = Route(
                src=0, dst=1, layers=layers, lo=lo, hi=hi, units=units, replicated=replicated,
                cut=cut,
            )  # fmt: skip
            return route_values(spec, route, which)

        return (blocks * of((0,)) if blocks else 0) + of(ends)

    kinds: tuple[Which, ...] = ("all", "unlendable", "inner")
    before = [[count(0, unit, units, False, kind) for unit in range(units + 1)] for kind in kinds]
    return np.array(before, dtype=np.int64), count(0, 0, units, True), count(0, 1, 1, True)


@compiled
def _nearest(
    shape: Ints, stages: Ints, src_parts: int, part: int, node: int, sent: Ints, anywhere: bool
) -> int:  # fmt: skip
    """The holder of a part on ``node``, or anywhere, with least to send; of equals the first."""
    first, dp, tp, per_node = shape[0], shape[1], shape[2], shape[6]
    repeats, best = tp // src_parts, -1
    for stage in stages:
        for dp_rank in range(dp):
            for repeat in range(repeats):
                holder = first + (stage * dp + dp_rank) * tp + part * repeats + repeat
                if anywhere or holder // per_node == node:
                    if best < 0 or sent[holder] < sent[best]:
                        best = holder
    return best


@inlined
def _held_by(shape: Ints, stages: Ints, src_parts: int, device: int) -> int:
    """The part that a device holds under the source, -1 where it has not these layers."""
    first, dp, tp, pp = shape[0], shape[1], shape[2], shape[7]
    rank = device - first
    if rank < 0 or rank >= pp * dp * tp:
        return -1
    for stage in stages:
        if rank // (dp * tp) == stage:
            return rank % tp * src_parts // tp  # type: ignore[no-any-return]
    return -1


@compiled
def _cross(
    shape: Ints, detail: Ints, stages: Ints, cumulated: Ints, sent: Ints, values: Ints,
    messages: Ints,
) -> None:  # fmt: skip
    """Add one group of layers on their way to one stage: as ``reallocation._routes_of``.

    ``shape``: of source first, dp, tp; of destination first, dp, tp; devices of a node; source
    pp. ``detail``: destination stage, parts of both, replicated values, all values, whether
    replicated ones are counted, and units. ``cumulated`` [kinds, units + 1 or more].
    """
    first, dp, tp, per_node = shape[3], shape[4], shape[5], shape[6]
    dst_stage, src_parts, dst_parts, units = detail[0], detail[1], detail[2], detail[6]
    src_step, dst_step = units // src_parts, units // dst_parts
    for rank in range(dp * tp):
        device = first + dst_stage * dp * tp + rank
        lo = rank % tp * dst_parts // tp * dst_step
        hi = lo + dst_step
        held = _held_by(shape, stages, src_parts, device)
        wanted = held >= 0 and held * src_step < hi and (held + 1) * src_step > lo
        for part in range(lo // src_step, -(-hi // src_step)):
            start, end = max(lo, part * src_step), min(hi, (part + 1) * src_step)
            sharded = cumulated[0, end] - cumulated[0, start]
            unlendable = cumulated[1, end] - cumulated[1, start]
            inner = cumulated[2, end] - cumulated[2, start]
            moved = sharded
            with_replicated = held == part if wanted else start == lo
            if with_replicated and (held < 0 or held == part) and detail[5] == 1:
                moved += detail[3]
            whole = start == lo and end == hi
            if held == part:
                # One shard of equally many: all is alike, and lent.
                if shape[2] != tp or (device - shape[0]) % tp != rank % tp:
                    values[PASSES, device] += 2 * (unlendable if whole else sharded)
                continue
            giver = _nearest(shape, stages, src_parts, part, device // per_node, sent, False)
            if giver < 0:
                giver = _nearest(shape, stages, src_parts, part, 0, sent, True)
            sent[giver] += detail[4] * (end - start) // units
            # Parts of rows are packed, or unpacked, once read and once written.
            values[PASSES, giver] += 0 if end - start == src_step else 2 * inner
            values[PASSES, device] += 0 if whole else 2 * inner
            lane = OUT_INTRA if giver // per_node == device // per_node else OUT_INTER
            values[lane, giver] += moved
            values[lane + 1, device] += moved
            messages[lane, giver] += 1
            messages[lane + 1, device] += 1


@brief
def _cross_all(
    shape: Ints, details: Ints, held_by: Ints, cumulated: Ints, sent: Ints, values: Ints,
    messages: Ints,
) -> None:  # fmt: skip
    """Add all groups, in order: who has sent much is asked less."""
    for row in range(len(details)):
        stages = held_by[details[row, 7] : details[row, 8]]
        _cross(shape, details[row], stages, cumulated[row], sent, values, messages)
