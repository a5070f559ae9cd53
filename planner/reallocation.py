"""Two layouts of a role -> the minimal messages that turn one into the other.

All parameters of a layer are cut alike: a sharded one at fractions ``t / tp`` of one dimension,
a replicated one not at all. So *who sends what to whom* is decided once for a (source stage,
destination stage) pair, over an interval of ``units`` equal parts, as a ``Route``; routes are
few, the planner prices them, and ``reallocate`` expands them into one ``Message`` per parameter
for the executor.

A rank is sent exactly what it lacks. A missing piece comes from a holder on the same node where
there is one, and among equals from the one that has been given least to send so far.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import lcm

from planner.layout import (
    EMBEDDING_LAYER,
    POSITION_LAYER,
    Layout,
    ParameterSlice,
    head_layer,
    layer_parameters,
)
from profiles.models import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Device ``src`` gives device ``dst`` a part of every parameter of ``layers``.

    Of sharded parameters the part is ``[lo, hi)`` out of ``units`` along the shard dimension
    (``lo == hi``: none); of replicated ones all, where ``replicated``. ``src == dst`` is a copy
    inside one device.
    """

    src: int
    dst: int
    layers: tuple[int, ...]
    lo: int
    hi: int
    units: int
    replicated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """``slice`` goes from device ``src`` to device ``dst``; a copy where they are one."""

    src: int
    dst: int
    slice: ParameterSlice

    @property
    def num_values(self) -> int:
        return self.slice.num_values


@dataclass(frozen=True, slots=True, kw_only=True)
class Reallocation:
    """``messages`` between devices, ``copies`` within one; both in the order of the model."""

    src: Layout
    dst: Layout
    messages: tuple[Message, ...]
    copies: tuple[Message, ...]


def _held_layers(layout: Layout, pp_rank: int) -> frozenset[int]:
    """Layers whose parameters a stage holds, the ends as pseudo-layers."""
    held = set(layout.layers(pp_rank))
    last = pp_rank == layout.pp - 1
    if pp_rank == 0 or (last and layout.spec.tied_embedding):
        held.add(EMBEDDING_LAYER)
    if pp_rank == 0 and layout.spec.positions == "learned":
        held.add(POSITION_LAYER)
    if last:
        held.add(head_layer(layout.spec))
    return frozenset(held)


@lru_cache(maxsize=512)
def _layer_values(spec: ModelSpec, layer: int) -> tuple[int, int]:
    """(values of sharded parameters, values of replicated parameters) of a layer."""
    sharded = replicated = 0
    for parameter in layer_parameters(spec, min(layer, spec.num_layers)):
        count = 1
        for size in parameter.shape:
            count *= size
        if parameter.shard_dim is None:
            replicated += count
        else:
            sharded += count
    return sharded, replicated


def route_values(spec: ModelSpec, route: Route) -> int:
    """Values that a route moves; times the bytes of one value these are its bytes."""
    total = 0
    for layer in route.layers:
        sharded, replicated = _layer_values(spec, layer)
        total += sharded * (route.hi - route.lo) // route.units
        total += replicated if route.replicated else 0
    return total


def _groups_of_layers(src: Layout, dst: Layout) -> Iterator[tuple[int, frozenset[int], list[int]]]:
    """(destination stage, source stages that hold them, layers) with equal sets of holders."""
    src_held = [_held_layers(src, stage) for stage in range(src.pp)]
    for dst_stage in range(dst.pp):
        groups: dict[frozenset[int], list[int]] = defaultdict(list)
        for layer in sorted(_held_layers(dst, dst_stage)):
            stages = frozenset(s for s, held in enumerate(src_held) if layer in held)
            groups[stages].append(layer)
        for stages, layers in groups.items():
            yield dst_stage, stages, layers


def _pieces(lo: int, hi: int, step: int) -> Iterator[tuple[int, int, int]]:
    """[lo, hi) cut at multiples of ``step``: (shard index, start, end)."""
    for index in range(lo // step, -(-hi // step)):
        yield index, max(lo, index * step), min(hi, (index + 1) * step)


def routes(src: Layout, dst: Layout, *, devices_per_node: int = 1 << 30) -> tuple[Route, ...]:
    """Who gives what to whom so that every device of ``dst`` holds its layout.

    Raises nothing; the two layouts must be of one model. Cost: O(devices of dst x dp of src x
    source shards that overlap), independent of the number of layers.
    """
    assert src.spec == dst.spec, (src.spec.name, dst.spec.name)
    units = lcm(src.tp, dst.tp)
    src_step, dst_step = units // src.tp, units // dst.tp
    sent: dict[int, int] = defaultdict(int)  # values that each source has been given to send
    found: list[Route] = []
    for dst_stage, src_stages, layers in _groups_of_layers(src, dst):
        weight = sum(sum(_layer_values(src.spec, layer)) for layer in layers)
        nearest: dict[tuple[int, int], list[int]] = {}  # (shard, node) -> who may give it
        for dp_rank in range(dst.dp):
            for tp_rank in range(dst.tp):
                device = dst.device(dst_stage, dp_rank, tp_rank)
                lo, hi = tp_rank * dst_step, (tp_rank + 1) * dst_step
                parts = list(_pieces(lo, hi, src_step))
                held = src.coordinates(device) if device in src.mesh else None
                for position, (shard_index, start, end) in enumerate(parts):
                    # Replicated parameters come with the part that is held here, else the first.
                    local = held is not None and held[0] in src_stages
                    with_replicated = (
                        held[2] == shard_index if local and held and _holds(held[2], parts)
                        else position == 0 and not local
                    )  # fmt: skip
                    if local and held is not None and held[2] == shard_index:
                        giver = device
                    else:
                        place = (shard_index, device // devices_per_node)
                        if place not in nearest:
                            nearest[place] = _nearest_holders(
                                src, src_stages, *place, devices_per_node
                            )
                        # The least burdened, and of equals the first.
                        giver = min(nearest[place], key=sent.__getitem__)
                        sent[giver] += weight * (end - start) // units
                    found.append(
                        Route(src=giver, dst=device, layers=tuple(layers), lo=start, hi=end,
                              units=units, replicated=with_replicated)
                    )  # fmt: skip
                if held is not None and held[0] in src_stages and not _holds(held[2], parts):
                    # Here are the layers' norms but no part of the shards that are wanted.
                    found.append(
                        Route(src=device, dst=device, layers=tuple(layers), lo=lo, hi=lo,
                              units=units, replicated=True)
                    )  # fmt: skip
    return tuple(found)


def _holds(tp_rank: int, parts: list[tuple[int, int, int]]) -> bool:
    return any(index == tp_rank for index, _, _ in parts)


def _nearest_holders(
    src: Layout, stages: frozenset[int], shard_index: int, node: int, devices_per_node: int
) -> list[int]:
    """Holders of a shard on ``node``; all of them where that has none."""
    holders = [src.device(s, d, shard_index) for s in sorted(stages) for d in range(src.dp)]
    return [h for h in holders if h // devices_per_node == node] or holders


def _expand(spec: ModelSpec, route: Route) -> Iterator[Message]:
    for layer in route.layers:
        for parameter in layer_parameters(spec, layer):
            offset, length = [0] * len(parameter.shape), list(parameter.shape)
            if parameter.shard_dim is not None:
                size = parameter.shape[parameter.shard_dim]
                offset[parameter.shard_dim] = size * route.lo // route.units
                length[parameter.shard_dim] = size * (route.hi - route.lo) // route.units
                if route.lo == route.hi:
                    continue
            elif not route.replicated:
                continue
            box = ParameterSlice(name=parameter.name, offset=tuple(offset), length=tuple(length))
            yield Message(src=route.src, dst=route.dst, slice=box)


@lru_cache(maxsize=32)
def reallocate(src: Layout, dst: Layout, *, devices_per_node: int = 1 << 30) -> Reallocation:
    """The messages and local copies that fill ``dst`` from ``src``.

    >>> from planner.mesh import DeviceMesh
    >>> from profiles.models import ModelSpec
    >>> spec = ModelSpec(name="x", num_layers=2, hidden=4, num_heads=2, num_kv_heads=2,
    ...                  head_dim=2, ffn=8, vocab=10)
    >>> two = DeviceMesh(0, 2)
    >>> plan = reallocate(Layout(spec=spec, mesh=two, tp=2), Layout(spec=spec, mesh=two, dp=2))
    >>> whole = Layout(spec=spec, mesh=two, dp=2).num_values(0)
    >>> sum(m.num_values for m in plan.messages if m.dst == 0) < whole / 2
    True
    """
    messages: list[Message] = []
    copies: list[Message] = []
    for route in routes(src, dst, devices_per_node=devices_per_node):
        (copies if route.src == route.dst else messages).extend(_expand(src.spec, route))
    return Reallocation(src=src, dst=dst, messages=tuple(messages), copies=tuple(copies))
