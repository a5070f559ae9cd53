"""Two layouts of a role -> the minimal messages that turn one into the other.

All parameters of a layer are cut alike: a sharded one at fractions ``t / tp`` of one dimension,
a replicated one not at all. So *who sends what to whom* is decided once for a (source stage,
destination stage) pair, over an interval of ``units`` equal parts, as a ``Route``; routes are
few, the planner prices them, and ``reallocate`` expands them into one ``Message`` per parameter
for the executor. Only where tp does not divide the kv heads are keys and values cut otherwise,
and have routes of their own; so have experts that one of the layouts splits over ep: these are cut
in two dimensions.

A rank is sent exactly what it lacks. A missing piece comes from a holder on the same node where
there is one, and among equals from the one that has been given least to send so far.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from planner.mesh import DeviceMesh
from profiles.models import ModelSpec

# Sharded parameters by how they are cut: into tp parts, or with kv heads into fewer, or with
# experts into ep times tp parts. What a cut names:
Cut = Literal["all", "tp", "kv", "dense", "experts"]
_NAMED: Mapping[Cut, tuple[str, ...]] = {
    "all": ("tp", "kv", "experts"),
    "tp": ("tp", "experts"),
    "kv": ("kv",),
    "dense": ("tp",),
    "experts": ("experts",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Device ``src`` gives device ``dst`` a part of every parameter of ``layers``.

    Of sharded parameters the part is ``[lo, hi)`` out of ``units`` along the shard dimension
    (``lo == hi``: none), of those that ``cut`` names; of replicated ones all, where
    ``replicated``. ``src == dst`` is a copy inside one device. ``experts``: of experts those
    in ``[first, last)`` out of so many equal parts.
    """

    src: int
    dst: int
    layers: tuple[int, ...]
    lo: int
    hi: int
    units: int
    replicated: bool
    cut: Cut = "all"
    experts: tuple[int, int, int] = (0, 1, 1)


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


def _is_cut(parameter: ParameterShape, cut: Cut) -> bool:
    """Whether ``cut`` names this parameter."""
    kind = "kv" if parameter.max_parts else "experts" if parameter.is_expert else "tp"
    return parameter.shard_dim is not None and kind in _NAMED[cut]


def _part(parameter: ParameterShape, route: Route) -> ParameterSlice | None:
    """What a route moves of one parameter of its layers, None: nothing."""
    offset, length = [0] * len(parameter.shape), list(parameter.shape)
    if (dim := parameter.shard_dim) is None:
        if not route.replicated:
            return None
    else:
        size = parameter.shape[dim]
        offset[dim] = size * route.lo // route.units
        length[dim] = size * route.hi // route.units - offset[dim]
        if not _is_cut(parameter, route.cut) or length[dim] == 0:
            return None
    if parameter.is_expert:
        first, last, parts = route.experts
        offset[0] = parameter.shape[0] * first // parts
        length[0] = parameter.shape[0] * last // parts - offset[0]
    return ParameterSlice(name=parameter.name, offset=tuple(offset), length=tuple(length))


# Of the parameters of a route: all; those that a device which holds more of them cannot lend
# (``lent``); those that are cut inside their rows, so that parts do not lie side by side.
Which = Literal["all", "unlendable", "inner"]


def route_values(spec: ModelSpec, route: Route, which: Which = "all") -> int:
    """Values that a route moves; times the bytes of one value these are its bytes."""
    blocks = sum(0 <= layer < spec.num_layers for layer in route.layers)
    ends = [layer for layer in route.layers if not 0 <= layer < spec.num_layers]
    interval = (route.lo, route.hi, route.units, route.replicated, route.cut, route.experts, which)
    total = blocks * _layer_values(spec, 0, *interval) if blocks else 0
    return total + sum(_layer_values(spec, layer, *interval) for layer in ends)


@lru_cache(maxsize=4096)
def _layer_values(
    spec: ModelSpec, layer: int, lo: int, hi: int, units: int, replicated: bool, cut: Cut,
    experts: tuple[int, int, int], which: Which,
) -> int:  # fmt: skip
    """As ``route_values``, of one layer; all blocks have the same."""
    route = Route(
        src=0, dst=1, layers=(layer,), lo=lo, hi=hi, units=units, replicated=replicated, cut=cut,
        experts=experts,
    )  # fmt: skip
    total = 0
    for parameter in layer_parameters(spec, layer):
        part = _part(parameter, route)
        if part is not None and (which == "all" or _is(parameter, which)):
            total += part.num_values
    return total


def _is(parameter: ParameterShape, which: Literal["unlendable", "inner"]) -> bool:
    if which == "inner":
        return bool(parameter.shard_dim)
    return len(parameter.shape) > 2 or _group(parameter.name) != parameter.name


# Parameters that the executor multiplies at once: neighbours in the buffer that holds them.
_TOGETHER = {
    "q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up", "q_norm": "qk_norm",
    "k_norm": "qk_norm",
}  # fmt: skip


def _group(name: str) -> str:
    """``layers.3.qkv.weight`` of ``layers.3.q.weight``; what is used alone is a group by itself."""
    prefix, _, kind = name.rpartition(".")
    before, _, last = prefix.rpartition(".")
    return f"{before}.{_TOGETHER[last]}.{kind}" if last in _TOGETHER else name


def lent(wanted: Sequence[ParameterSlice], held: Sequence[ParameterSlice]) -> frozenset[str]:
    """Names of wanted slices that need no memory: views of held ones of the same device.

    A matrix or a vector is one where the held slice covers it, strided if need be: a product takes
    rows at any distance. What is multiplied at once only if all of it is held alike, and so is
    a stack of matrices.
    """
    by_name = {piece.name: piece for piece in held}
    unlike = {_group(piece.name) for piece in wanted if by_name.get(piece.name) != piece}
    found = []
    for piece in wanted:
        group = _group(piece.name)
        covered = group == piece.name and len(piece.length) <= 2 and piece.name in by_name
        if group not in unlike or (covered and _covers(by_name[piece.name], piece)):
            found.append(piece.name)
    return frozenset(found)


def _covers(outer: ParameterSlice, inner: ParameterSlice) -> bool:
    return all(
        a <= o and o + n <= a + have
        for a, have, o, n in zip(
            outer.offset, outer.length, inner.offset, inner.length, strict=True
        )
    )


def stored_values(src: Layout, dst: Layout, device: int) -> int:
    """Values of ``dst`` that ``device`` needs memory for beside those of ``src`` (``lent``)."""
    near, far = (
        replace(layout, mesh=DeviceMesh(0, layout.mesh.num_devices)) for layout in (src, dst)
    )
    held_at = None if device not in src.mesh else _alike_to(src, device)
    return _stored_values(near, far, held_at, _alike_to(dst, device))


def _alike_to(layout: Layout, device: int) -> int:
    """The first device that holds what ``device`` does, were the mesh to begin at 0."""
    pp_rank, _, tp_rank = layout.coordinates(device)
    return layout.device(pp_rank, layout.ep_rank(device), tp_rank) - layout.mesh.first


@lru_cache(maxsize=4096)
def _stored_values(src: Layout, dst: Layout, held_at: int | None, wanted_at: int) -> int:
    wanted = dst.slices(wanted_at)
    names = lent(wanted, () if held_at is None else src.slices(held_at))
    return sum(piece.num_values for piece in wanted if piece.name not in names)


def groups_of_layers(src: Layout, dst: Layout) -> Iterator[tuple[int, frozenset[int], list[int]]]:
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


def routes(
    src: Layout, dst: Layout, *, devices_per_node: int = 1 << 30, first_device: int = 0
) -> tuple[Route, ...]:
    """Who gives what to whom so that every device of ``dst`` holds its layout.

    ``first_device``: the first one of a node (``mesh.node_grid``).

    Raises nothing; the two layouts must be of one model. Cost: O(devices of dst x dp of src x
    source shards that overlap), independent of the number of layers.
    """
    assert src.spec == dst.spec, (src.spec.name, dst.spec.name)
    sent: dict[int, int] = defaultdict(int)  # values that each source has been given to send
    found: list[Route] = []
    for dst_stage, src_stages, layers in groups_of_layers(src, dst):
        for cut in cuts(src, dst):
            if cut in ("kv", "experts"):  # the ends have none
                layers = [layer for layer in layers if 0 <= layer < src.spec.num_layers]
            crossing = _Crossing(
                src=src, dst=dst, src_stages=src_stages, dst_stage=dst_stage,
                layers=tuple(layers), cut=cut, devices_per_node=devices_per_node,
                first_device=first_device,
            )  # fmt: skip
            of_cut = _expert_routes if cut == "experts" else _routes_of
            found.extend(of_cut(crossing, sent))
    return tuple(found)


def cuts(src: Layout, dst: Layout) -> tuple[Cut, ...]:
    """All sharded parameters at once, or keys and values apart, and last experts apart."""
    heads = src.spec.num_kv_heads
    if src.ep > 1 or dst.ep > 1:
        return ("dense", "kv", "experts")
    return ("all",) if heads % src.tp == 0 and heads % dst.tp == 0 else ("tp", "kv")


def crossing_parts(layout: Layout, cut: Cut) -> int:
    """Different parts of the parameters that ``cut`` names under a layout."""
    return gcd(layout.tp, layout.spec.num_kv_heads) if cut == "kv" else layout.tp


@dataclass(frozen=True, slots=True, kw_only=True)
class _Crossing:
    """Layers that go from some stages to one, and how many parts of them there are."""

    src: Layout
    dst: Layout
    src_stages: frozenset[int]
    dst_stage: int
    layers: tuple[int, ...]
    cut: Cut
    devices_per_node: int
    first_device: int

    def node_of(self, device: int) -> int:
        return (device - self.first_device) // self.devices_per_node

    def num_parts(self, layout: Layout) -> int:
        return crossing_parts(layout, self.cut)

    def part_of(self, layout: Layout, tp_rank: int) -> int:
        """Which part a shard holds."""
        return tp_rank * self.num_parts(layout) // layout.tp

    def held_by(self, device: int) -> int | None:
        """The part that a device holds under the source, None where it has not these layers."""
        if device not in self.src.mesh:
            return None
        pp_rank, _, tp_rank = self.src.coordinates(device)
        return self.part_of(self.src, tp_rank) if pp_rank in self.src_stages else None

    def nearest_holders(self, part: int, node: int) -> list[int]:
        """Holders of a part on ``node``; all of them where that has none."""
        repeats = self.src.tp // self.num_parts(self.src)
        holders = [
            self.src.device(stage, dp_rank, part * repeats + repeat)
            for stage in sorted(self.src_stages)
            for dp_rank in range(self.src.dp)
            for repeat in range(repeats)
        ]
        return [h for h in holders if self.node_of(h) == node] or holders

    def nearest_expert_holders(self, ep_part: int, tp_part: int, node: int) -> list[int]:
        """Holders of a part of the experts, as ``nearest_holders``."""
        holders = [
            self.src.device(stage, dp_rank, tp_part)
            for stage in sorted(self.src_stages)
            for dp_rank in range(ep_part, self.src.dp, self.src.ep)
        ]
        return [h for h in holders if self.node_of(h) == node] or holders


def _routes_of(crossing: _Crossing, sent: dict[int, int]) -> Iterator[Route]:
    """The routes of one crossing; adds to what each source has been given to send."""
    src, dst, layers, cut = crossing.src, crossing.dst, crossing.layers, crossing.cut
    src_parts, dst_parts = crossing.num_parts(src), crossing.num_parts(dst)
    units = lcm(src_parts, dst_parts)
    src_step, dst_step = units // src_parts, units // dst_parts
    whole = Route(src=0, dst=1, layers=layers, lo=0, hi=1, units=1, replicated=True, cut=cut)
    weight = route_values(src.spec, whole)
    nearest: dict[tuple[int, int], list[int]] = {}  # (part, node) -> who may give it
    for dp_rank in range(dst.dp):
        for tp_rank in range(dst.tp):
            device = dst.device(crossing.dst_stage, dp_rank, tp_rank)
            lo = crossing.part_of(dst, tp_rank) * dst_step
            parts = list(_pieces(lo, lo + dst_step, src_step))
            held = crossing.held_by(device)
            for position, (part, start, end) in enumerate(parts):
                # Replicated parameters come with the part that is held here, else the first.
                with_replicated = held == part if _holds(held, parts) else position == 0
                with_replicated &= held is None or held == part
                if held == part:
                    giver = device
                else:
                    place = (part, crossing.node_of(device))
                    if place not in nearest:
                        nearest[place] = crossing.nearest_holders(*place)
                    # The least burdened, and of equals the first.
                    giver = min(nearest[place], key=sent.__getitem__)
                    sent[giver] += weight * (end - start) // units
                yield Route(src=giver, dst=device, layers=layers, lo=start, hi=end, units=units,
                            replicated=with_replicated and cut != "kv", cut=cut)  # fmt: skip
            if held is not None and cut != "kv" and not _holds(held, parts):
                # Here are the layers' norms but no part of the shards that are wanted.
                yield Route(src=device, dst=device, layers=layers, lo=lo, hi=lo, units=units,
                            replicated=True, cut=cut)  # fmt: skip


def _holds(part: int | None, parts: list[tuple[int, int, int]]) -> bool:
    return any(index == part for index, _, _ in parts)


def _expert_routes(crossing: _Crossing, sent: dict[int, int]) -> Iterator[Route]:
    """The routes of experts, cut over ep and tp: each piece from one holder of both parts."""
    src, dst = crossing.src, crossing.dst
    expert_units, units = lcm(src.ep, dst.ep), lcm(src.tp, dst.tp)
    src_steps = expert_units // src.ep, units // src.tp
    dst_steps = expert_units // dst.ep, units // dst.tp
    whole = Route(src=0, dst=1, layers=crossing.layers, lo=0, hi=1, units=1, replicated=False,
                  cut="experts")  # fmt: skip
    weight = route_values(src.spec, whole)
    nearest: dict[tuple[int, int, int], list[int]] = {}  # (ep part, tp part, node) -> holders
    for dp_rank, tp_rank in product(range(dst.dp), range(dst.tp)):
        device = dst.device(crossing.dst_stage, dp_rank, tp_rank)
        node = crossing.node_of(device)
        starts = dp_rank % dst.ep * dst_steps[0], tp_rank * dst_steps[1]
        pieces = [_pieces(a, a + n, step) for a, n, step in zip(starts, dst_steps, src_steps)]
        for (ep_part, first, last), (tp_part, lo, hi) in product(*map(list, pieces)):
            place = (ep_part, tp_part, node)
            if place not in nearest:
                nearest[place] = crossing.nearest_expert_holders(*place)
            giver = device
            if device not in nearest[place]:
                giver = min(nearest[place], key=sent.__getitem__)
                sent[giver] += weight * (last - first) * (hi - lo) // (expert_units * units)
            yield Route(
                src=giver, dst=device, layers=crossing.layers, lo=lo, hi=hi, units=units,
                replicated=False, cut="experts", experts=(first, last, expert_units),
            )  # fmt: skip


def _expand(spec: ModelSpec, route: Route) -> Iterator[Message]:
    for layer in route.layers:
        for parameter in layer_parameters(spec, layer):
            box = _part(parameter, route)
            if box is not None:
                yield Message(src=route.src, dst=route.dst, slice=box)


@lru_cache(maxsize=32)
def reallocate(
    src: Layout, dst: Layout, *, devices_per_node: int = 1 << 30, first_device: int = 0
) -> Reallocation:
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
    grid = {"devices_per_node": devices_per_node, "first_device": first_device}
    for route in routes(src, dst, **grid):
        (copies if route.src == route.dst else messages).extend(_expand(src.spec, route))
    return Reallocation(src=src, dst=dst, messages=tuple(messages), copies=tuple(copies))
