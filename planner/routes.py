"""Two layouts of a role -> who gives what to whom; ``routes``.

All parameters of a layer that a ``Cut`` names are cut alike: into ``units`` equal parts, of which
each shard holds an interval. So *who sends what to whom* is decided once for layers that go from
the same stages to the same stages, as a ``Route``; routes are few, the planner prices them
(``cost.lanes`` without listing them), and ``reallocation.py`` expands them into messages.

A device is given exactly what it lacks, and what goes over the network enters a node once. A piece
comes from a holder on the same node where there is one. Else those devices of the node that want
it, the *takers*, get a share each from holders elsewhere (phase 0), and then give these to each
other inside the node (phase 1). Among equal givers the one with the least to send so far gives.

Of 4 devices, two a node, device 0 holds [0, 4), and 2 and 3 want it all:

    phase 0   0 -> 2 [0, 2)   0 -> 3 [2, 4)        phase 1   2 -> 3 [0, 2)   3 -> 2 [2, 4)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from math import gcd, lcm
from typing import Literal

from planner.layout import (
    EMBEDDING_LAYER,
    POSITION_LAYER,
    Layout,
    ParameterShape,
    ParameterSlice,
    head_layer,
    layer_parameters,
)
from profiles.models import ModelSpec

# Parameters by how they are cut: into tp parts, or with kv heads into fewer, or with experts into
# ep times tp parts, or not at all. What a cut names:
Cut = Literal["all", "tp", "kv", "dense", "experts", "replicated"]
_NAMED: Mapping[Cut, tuple[str, ...]] = {
    "all": ("tp", "kv", "experts"),
    "tp": ("tp", "experts"),
    "kv": ("kv",),
    "dense": ("tp",),
    "experts": ("experts",),
    "replicated": ("replicated",),
}

# A node's takers share a piece if each gets so many values: a quarter of a MiB in two bytes each,
# which a GPU's share of a fast network (50 GB/s) carries in the time that a message takes to start
# (5 µs). Of less one takes all.
LEAST_SHARE = 1 << 17

Part = tuple[int, int]  # which of the parts of experts, and which of those of a shard dimension


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Device ``src`` gives device ``dst`` a part of what ``cut`` names of ``layers``.

    ``[lo, hi)`` out of ``units`` along the shard dimension, of replicated parameters along the
    first; ``experts``: of experts those in ``[first, last)`` out of so many equal parts.
    ``src == dst`` is a copy inside one device. In ``phase`` 0 ``src`` gives what it holds, in
    phase 1 what it was given in phase 0.
    """

    src: int
    dst: int
    layers: tuple[int, ...]
    lo: int
    hi: int
    units: int
    cut: Cut
    experts: tuple[int, int, int] = (0, 1, 1)
    phase: Literal[0, 1] = 0


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


def cut_dim(parameter: ParameterShape, cut: Cut) -> int | None:
    """The dimension along which ``cut`` divides a parameter, None: it does not name it."""
    kind = "kv" if parameter.max_parts else "experts" if parameter.is_expert else "tp"
    if parameter.shard_dim is None:
        return 0 if cut == "replicated" else None
    return parameter.shard_dim if kind in _NAMED[cut] else None


def part_of(parameter: ParameterShape, route: Route) -> ParameterSlice | None:
    """What a route moves of one parameter of its layers, None: nothing."""
    dim = cut_dim(parameter, route.cut)
    if dim is None:
        return None
    offset, length = [0] * len(parameter.shape), list(parameter.shape)
    size = parameter.shape[dim]
    offset[dim] = size * route.lo // route.units
    length[dim] = size * route.hi // route.units - offset[dim]
    if length[dim] == 0:
        return None
    if parameter.is_expert:
        first, last, parts = route.experts
        offset[0] = parameter.shape[0] * first // parts
        length[0] = parameter.shape[0] * last // parts - offset[0]
    return ParameterSlice(name=parameter.name, offset=tuple(offset), length=tuple(length))


def route_values(spec: ModelSpec, route: Route) -> int:
    """Values that a route moves; times the bytes of one value these are its bytes."""
    blocks = sum(0 <= layer < spec.num_layers for layer in route.layers)
    ends = [layer for layer in route.layers if not 0 <= layer < spec.num_layers]
    interval = (route.lo, route.hi, route.units, route.cut, route.experts)
    total = blocks * _layer_values(spec, 0, *interval) if blocks else 0
    return total + sum(_layer_values(spec, layer, *interval) for layer in ends)


@lru_cache(maxsize=4096)
def _layer_values(
    spec: ModelSpec, layer: int, lo: int, hi: int, units: int, cut: Cut,
    experts: tuple[int, int, int],
) -> int:  # fmt: skip
    """As ``route_values``, of one layer; all blocks have the same."""
    route = Route(
        src=0, dst=1, layers=(layer,), lo=lo, hi=hi, units=units, cut=cut, experts=experts
    )
    parts = [part_of(parameter, route) for parameter in layer_parameters(spec, layer)]
    return sum(part.num_values for part in parts if part is not None)


def _stages_by_layer(layout: Layout) -> dict[int, tuple[int, ...]]:
    """Stages that hold a layer, in order."""
    found: dict[int, tuple[int, ...]] = {}
    for stage in range(layout.pp):
        for layer in _held_layers(layout, stage):
            found[layer] = (*found.get(layer, ()), stage)
    return found


def groups_of_layers(
    src: Layout, dst: Layout
) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """(source stages, destination stages, layers) that equal sets of stages hold, in order."""
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = defaultdict(list)
    givers, takers = (_stages_by_layer(x) for x in (src, dst))
    for layer in sorted(takers):
        found[givers[layer], takers[layer]].append(layer)
    return [(*stages, tuple(layers)) for stages, layers in found.items()]


def cuts(src: Layout, dst: Layout) -> tuple[Cut, ...]:
    """All sharded parameters at once, or keys and values apart, and experts; then all others."""
    heads = src.spec.num_kv_heads
    if src.ep > 1 or dst.ep > 1:
        return ("dense", "kv", "experts", "replicated")
    if heads % src.tp == 0 and heads % dst.tp == 0:
        return ("all", "replicated")
    return ("tp", "kv", "replicated")


def num_parts(layout: Layout, cut: Cut) -> Part:
    """Different parts of what ``cut`` names under a layout: of experts, and of shards."""
    if cut == "replicated":
        return 1, 1
    if cut == "kv":
        return 1, gcd(layout.tp, layout.spec.num_kv_heads)
    return layout.ep if cut == "experts" else 1, layout.tp


@dataclass(frozen=True, slots=True, kw_only=True)
class _Crossing:
    """What a cut names of layers that go from some stages to some."""

    src: Layout
    dst: Layout
    src_stages: tuple[int, ...]
    dst_stages: tuple[int, ...]
    layers: tuple[int, ...]
    cut: Cut
    devices_per_node: int
    first_device: int

    def who(self, layout: Layout, part: Part) -> dict[int, list[int]]:
        """Devices that hold a part under a layout, by node, all in ascending order."""
        stages = self.src_stages if layout is self.src else self.dst_stages
        ep_parts, tp_parts = num_parts(layout, self.cut)
        repeats = layout.tp // tp_parts
        found: dict[int, list[int]] = defaultdict(list)
        for stage, dp_rank, repeat in product(
            stages, range(part[0], layout.dp, ep_parts), range(repeats)
        ):
            device = layout.device(stage, dp_rank, part[1] * repeats + repeat)
            found[(device - self.first_device) // self.devices_per_node].append(device)
        return found

    def pieces(self) -> Iterator[tuple[Part, Part, Route]]:
        """(part at the destination, part at the source, what both have in common)."""
        src_parts, dst_parts = (num_parts(layout, self.cut) for layout in (self.src, self.dst))
        units = [lcm(a, b) for a, b in zip(src_parts, dst_parts)]
        steps = [(n // a, n // b) for n, a, b in zip(units, src_parts, dst_parts)]
        for wanted in product(*map(range, dst_parts)):
            axes = [
                list(_pieces(index * step[1], (index + 1) * step[1], step[0]))
                for index, step in zip(wanted, steps)
            ]
            for (ep_part, first, last), (tp_part, lo, hi) in product(*axes):
                piece = Route(
                    src=0, dst=0, layers=self.layers, lo=lo, hi=hi, units=units[1], cut=self.cut,
                    experts=(first, last, units[0]),
                )  # fmt: skip
                yield (wanted[0], wanted[1]), (ep_part, tp_part), piece


def _pieces(lo: int, hi: int, step: int) -> Iterator[tuple[int, int, int]]:
    """[lo, hi) cut at multiples of ``step``: (index of the multiple, start, end)."""
    for index in range(lo // step, -(-hi // step)):
        yield index, max(lo, index * step), min(hi, (index + 1) * step)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """Routes without ends that one device takes from another, and their values."""

    routes: tuple[Route, ...]
    num_values: int


def _share(spec: ModelSpec, parts: Sequence[Route]) -> _Share:
    values = [route_values(spec, part) for part in parts]
    routes = tuple(part for part, count in zip(parts, values) if count)
    return _Share(routes=routes, num_values=sum(values))


def _shares(spec: ModelSpec, piece: Route, count: int) -> list[_Share]:
    """A piece in so many nearly equal shares: whole blocks, and rows of what is left of layers."""
    blocks = [layer for layer in piece.layers if 0 <= layer < spec.num_layers]
    each = len(blocks) // count
    rest = tuple(layer for layer in piece.layers if layer not in blocks[: each * count])
    lo, width = piece.lo * count, piece.hi - piece.lo
    found = []
    for i in range(count):
        whole = replace(piece, layers=tuple(blocks[i * each : (i + 1) * each]))
        rows = replace(
            piece,
            layers=rest,
            lo=lo + width * i,
            hi=lo + width * (i + 1),
            units=piece.units * count,
        )
        found.append(_share(spec, (whole, rows)))
    return found


@dataclass(slots=True, kw_only=True)
class _Burden:
    """Values so far: sent by each giver, and taken by each device over the network."""

    least_share: int
    sent: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    taken: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    def give(
        self, share: _Share, givers: Sequence[int], taker: int, gave: dict[int, int]
    ) -> Iterator[Route]:
        """One share, from the least burdened of ``givers``, of equals the first.

        But who gives the taker other parameters of these layers gives it these too: so what lies
        side by side at both ends crosses at once.
        """
        giver = gave.get(taker, -1)
        if giver not in givers:
            giver = min(givers, key=self.sent.__getitem__)
        gave.setdefault(taker, giver)
        self.sent[giver] += share.num_values
        for route in share.routes:
            yield replace(route, src=giver, dst=taker)

    def enter(
        self, piece: _Share, shares: Sequence[_Share], givers: Sequence[int],
        takers: Sequence[int], gave: dict[int, int],
    ) -> Iterator[Route]:  # fmt: skip
        """Into a node without holders: ``shares`` are the piece's, one for each taker."""
        if 1 < len(takers) <= piece.num_values // self.least_share:
            dealt = list(zip(takers, shares))
        else:
            dealt = [(min(takers, key=self.taken.__getitem__), piece)]
        for taker, share in dealt:
            self.taken[taker] += share.num_values
            yield from self.give(share, givers, taker, gave)
            for other, route in product(takers, share.routes):
                if other != taker:
                    yield replace(route, src=taker, dst=other, phase=1)


def routes(
    src: Layout, dst: Layout, *, devices_per_node: int = 1 << 30, first_device: int = 0,
    least_share: int = LEAST_SHARE,
) -> tuple[Route, ...]:  # fmt: skip
    """Who gives what to whom so that every device of ``dst`` holds its layout.

    ``first_device``: the first one of a node (``mesh.node_grid``). ``least_share``: values.

    Raises nothing; the two layouts must be of one model. Cost: O(devices of dst x dp of src x
    source shards that overlap), independent of the number of layers.
    """
    assert src.spec == dst.spec, (src.spec.name, dst.spec.name)
    burden = _Burden(least_share=least_share)
    found: list[Route] = []
    for src_stages, dst_stages, layers in groups_of_layers(src, dst):
        gave: dict[int, int] = {}  # who gives something of these layers to whom
        for cut in cuts(src, dst):
            crossing = _Crossing(
                src=src, dst=dst, src_stages=src_stages, dst_stages=dst_stages,
                layers=_named_layers(src.spec, layers, cut), cut=cut,
                devices_per_node=devices_per_node, first_device=first_device,
            )  # fmt: skip
            found.extend(_routes_of(crossing, burden, gave))
    return tuple(found)


def _named_layers(spec: ModelSpec, layers: Sequence[int], cut: Cut) -> tuple[int, ...]:
    """Those in which ``cut`` names a parameter."""
    found = []
    for layer in layers:
        shapes = layer_parameters(spec, 0 if 0 <= layer < spec.num_layers else layer)
        if any(cut_dim(parameter, cut) is not None for parameter in shapes):
            found.append(layer)
    return tuple(found)


def _routes_of(crossing: _Crossing, burden: _Burden, gave: dict[int, int]) -> Iterator[Route]:
    """The routes of one crossing; adds to ``burden`` and ``gave``."""
    spec = crossing.src.spec
    for dst_part, src_part, piece in crossing.pieces():
        whole = _share(spec, (piece,))
        if not whole.routes:
            continue
        shares: dict[int, list[_Share]] = {}  # by the number of takers
        holders = crossing.who(crossing.src, src_part)
        everywhere = [holder for near in holders.values() for holder in near]
        for node, devices in crossing.who(crossing.dst, dst_part).items():
            near = holders.get(node, [])
            having = frozenset(near)
            takers = [device for device in devices if device not in having]
            for device in devices:
                if device in having:
                    yield replace(piece, src=device, dst=device)
            if near:
                for taker in takers:
                    yield from burden.give(whole, near, taker, gave)
                continue
            if len(takers) not in shares:
                shares[len(takers)] = _shares(spec, piece, len(takers))
            yield from burden.enter(whole, shares[len(takers)], everywhere, takers, gave)
