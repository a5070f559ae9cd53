"""``Layout``: which slice of which parameter lies on which device.

A layout is (model, mesh, strategy). Everything is integers: the executor carves its flat
buffers by ``Layout.slices`` and ``reallocation.py`` intersects two layouts.

For a model of 2 blocks under pp 2, tp 2 (4 ranks) block 0's q [heads * head_dim, hidden] lies so:

    rank 0  layers.0.q rows 0 … half      rank 2  (block 1 …)
    rank 1  layers.0.q rows half … end    rank 3  (block 1 …)

Experts are split over ep too: of dp 2, ep 2 and 4 experts rank 0 holds experts 0 and 1, rank 1
experts 2 and 3, and both all of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod

from planner.mesh import DeviceMesh
from planner.strategy import ParallelStrategy, stage_layers
from profiles.models import ModelSpec

# The ends of the model count as layers of their own: they sit on the outer stages. Learned
# positions are apart from the embedding, of which the last stage may hold a copy.
EMBEDDING_LAYER = -1
POSITION_LAYER = -2
EXPERTS = "experts."  # what the names of experts' parameters begin with, inside their block


def head_layer(spec: ModelSpec) -> int:
    """The index of the pseudo-layer of final norm and head."""
    return spec.num_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterShape:
    """One parameter of the whole model; ``shard_dim`` is split over tp, None is replicated.

    It is cut into gcd(tp, ``max_parts``) parts, 0: tp; neighbouring shards hold the same part
    where these are fewer than tp. Keys and values have a part for each kv head at most.
    ``is_expert``: dimension 0 counts experts, and is split over ep.
    """

    name: str
    shape: tuple[int, ...]
    layer: int
    shard_dim: int | None
    max_parts: int = 0
    is_expert: bool = False

    def num_parts(self, tp: int) -> int:
        """Different parts under ``tp``: each is held by tp / parts shards."""
        if self.shard_dim is None:
            return 1
        return gcd(tp, self.max_parts) if self.max_parts else tp


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSlice:
    """A box of a parameter: ``offset`` and ``length`` in each dimension of the whole."""

    name: str
    offset: tuple[int, ...]
    length: tuple[int, ...]

    @property
    def num_values(self) -> int:
        return prod(self.length)

    @property
    def is_expert(self) -> bool:
        return f".{EXPERTS}" in self.name

    def relative_to(self, outer: ParameterSlice) -> tuple[slice, ...]:
        """Index of this box inside a tensor that holds ``outer``."""
        assert self.name == outer.name, (self.name, outer.name)
        return tuple(
            slice(o - base, o - base + n)
            for o, base, n in zip(self.offset, outer.offset, self.length, strict=True)
        )


# (name inside the block, shape, shard dimension, most parts)
_Row = tuple[str, tuple[int, ...], int | None, int]


def block_parameters(spec: ModelSpec, layer: int) -> tuple[ParameterShape, ...]:
    """The parameters of one block, in the order of the flat buffer.

    q, k, v are neighbours, and so are gate and up: the executor multiplies each group at once.
    """
    rows = [
        *_norm("attention_norm", spec),
        *_attention_rows(spec),
        *_norm("ffn_norm", spec),
        *_feed_forward_rows(spec),
    ]
    return tuple(
        ParameterShape(
            name=f"layers.{layer}.{name}",
            shape=shape,
            layer=layer,
            shard_dim=dim,
            max_parts=parts,
            is_expert=name.startswith(EXPERTS),
        )
        for name, shape, dim, parts in rows
    )


def _norm(name: str, spec: ModelSpec) -> list[_Row]:
    weight: _Row = (f"{name}.weight", (spec.hidden,), None, 0)
    bias: _Row = (f"{name}.bias", (spec.hidden,), None, 0)
    return [weight, bias] if spec.norm == "layer" else [weight]


def _attention_rows(spec: ModelSpec) -> list[_Row]:
    q, kv, h = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.hidden
    heads = spec.num_kv_heads
    rows: list[_Row] = [
        ("q.weight", (q, h), 0, 0),
        ("k.weight", (kv, h), 0, heads),
        ("v.weight", (kv, h), 0, heads),
    ]
    if spec.qkv_bias:
        rows += [("q.bias", (q,), 0, 0), ("k.bias", (kv,), 0, heads), ("v.bias", (kv,), 0, heads)]
    if spec.qk_norm:
        rows += [(f"{name}.weight", (spec.head_dim,), None, 0) for name in ("q_norm", "k_norm")]
    rows.append(("o.weight", (h, q), 1, 0))
    if spec.o_bias:
        rows.append(("o.bias", (h,), None, 0))
    return rows


def _feed_forward_rows(spec: ModelSpec) -> list[_Row]:
    if not spec.num_experts:
        return _dense_rows("", spec, spec.ffn)
    n, h = spec.num_experts, spec.hidden
    rows: list[_Row] = [
        ("router.weight", (n, h), None, 0),
        # Of every expert its gate and its up, in this order.
        (f"{EXPERTS}gate_up.weight", (n, 2 if spec.gated else 1, spec.ffn, h), 2, 0),
        (f"{EXPERTS}down.weight", (n, h, spec.ffn), 2, 0),
    ]
    if spec.shared_ffn:
        rows += _dense_rows("shared.", spec, spec.shared_ffn)
        rows.append(("shared_gate.weight", (1, h), None, 0))
    return rows


def _dense_rows(prefix: str, spec: ModelSpec, ffn: int) -> list[_Row]:
    first = ("gate", "up") if spec.gated else ("up",)
    rows: list[_Row] = [(f"{prefix}{name}.weight", (ffn, spec.hidden), 0, 0) for name in first]
    if spec.ffn_bias:
        rows += [(f"{prefix}{name}.bias", (ffn,), 0, 0) for name in first]
    rows.append((f"{prefix}down.weight", (spec.hidden, ffn), 1, 0))
    if spec.ffn_bias:
        rows.append((f"{prefix}down.bias", (spec.hidden,), None, 0))
    return rows


def embedding_parameter(spec: ModelSpec) -> ParameterShape:
    return ParameterShape(
        name="embedding.weight", shape=(spec.vocab, spec.hidden), layer=EMBEDDING_LAYER, shard_dim=0
    )


def position_parameters(spec: ModelSpec) -> tuple[ParameterShape, ...]:
    """The table of learned positions, if there is one."""
    shape = (spec.max_positions, spec.hidden)
    if spec.positions != "learned":
        return ()
    return (
        ParameterShape(name="position.weight", shape=shape, layer=POSITION_LAYER, shard_dim=None),
    )


def head_parameters(spec: ModelSpec) -> tuple[ParameterShape, ...]:
    """Final norm and head; with a tied embedding the norm only."""
    layer = head_layer(spec)
    norm = tuple(
        ParameterShape(name=name, shape=shape, layer=layer, shard_dim=None)
        for name, shape, _, _ in _norm("final_norm", spec)
    )
    if spec.tied_embedding:
        return norm
    head = ParameterShape(
        name="head.weight",
        shape=(spec.output_size, spec.hidden),
        layer=layer,
        shard_dim=0 if spec.head == "lm" else None,
    )
    return (*norm, head)


def layer_parameters(spec: ModelSpec, layer: int) -> tuple[ParameterShape, ...]:
    """The parameters of a block or of one of the pseudo-layers."""
    if layer == EMBEDDING_LAYER:
        return (embedding_parameter(spec),)
    if layer == POSITION_LAYER:
        return position_parameters(spec)
    if layer == head_layer(spec):
        return head_parameters(spec)
    return block_parameters(spec, layer)


@lru_cache(maxsize=64)
def parameters(spec: ModelSpec) -> tuple[ParameterShape, ...]:
    """Every parameter of the model, once, in model order."""
    blocks = (p for layer in range(spec.num_layers) for p in block_parameters(spec, layer))
    ends = embedding_parameter(spec), *position_parameters(spec)
    return (*ends, *blocks, *head_parameters(spec))


def shard(
    parameter: ParameterShape, tp: int, tp_rank: int, ep: int = 1, ep_rank: int = 0
) -> ParameterSlice:
    """The box of ``parameter`` that one tensor-parallel rank holds; of experts, one expert rank.

    Part i of n begins at floor(size i / n): parts differ by one row where n does not divide.
    """
    offset, length = [0] * len(parameter.shape), list(parameter.shape)
    if (dim := parameter.shard_dim) is not None:
        num_parts = parameter.num_parts(tp)
        part, size = tp_rank * num_parts // tp, parameter.shape[dim]
        offset[dim] = size * part // num_parts
        length[dim] = size * (part + 1) // num_parts - offset[dim]
    if parameter.is_expert:
        length[0] //= ep
        offset[0] = ep_rank * length[0]
    return ParameterSlice(name=parameter.name, offset=tuple(offset), length=tuple(length))


@lru_cache(maxsize=1024)
def shard_values(
    spec: ModelSpec, layer: int, tp: int, ep: int = 1, *, only_experts: bool = False
) -> int:
    """Values of a block or pseudo-layer, or of its experts, on the shard that holds most."""
    return sum(
        max(shard(parameter, tp, rank, ep).num_values for rank in range(tp))
        for parameter in layer_parameters(spec, layer)
        if parameter.is_expert or not only_experts
    )


def repeated_kv_heads(spec: ModelSpec, tp: int, tp_rank: int) -> tuple[int, ...] | None:
    """For each of ``spec.cached_kv_heads`` its index among the kv heads that a shard holds.

    None: those that it holds, as they are.

    >>> from profiles.catalogue import MODELS
    >>> repeated_kv_heads(MODELS["phi3-medium"], 4, 1)  # 10 kv heads, 5 on a shard
    (2, 3, 3, 4, 4)
    """
    num_parts = gcd(tp, spec.num_kv_heads)
    count = spec.cached_kv_heads(tp)
    if num_parts == tp or num_parts == spec.num_kv_heads:
        return None
    repeats = count * tp // spec.num_kv_heads
    first = tp_rank * num_parts // tp * (spec.num_kv_heads // num_parts)
    return tuple((tp_rank * count + i) // repeats - first for i in range(count))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A role's weights on a mesh under a strategy. Equal layouts share their buffers."""

    spec: ModelSpec
    mesh: DeviceMesh
    pp: int = 1
    tp: int = 1
    dp: int = 1
    ep: int = 1

    @classmethod
    def of(cls, spec: ModelSpec, mesh: DeviceMesh, strategy: ParallelStrategy) -> Layout:
        s = strategy
        return cls(spec=spec, mesh=mesh, pp=s.pp, tp=s.tp, dp=s.dp, ep=s.ep)

    @property
    def key(self) -> str:
        """A short name, unique among the layouts of one role: ``[0-7] d4p2m1``."""
        experts = f"e{self.ep}" if self.ep > 1 else ""
        return f"{self.mesh} d{self.dp}p{self.pp}m{self.tp}{experts}"

    def coordinates(self, device: int) -> tuple[int, int, int]:
        """(pp_rank, dp_rank, tp_rank) of a device of the mesh."""
        rank = device - self.mesh.first
        return rank // (self.dp * self.tp), rank // self.tp % self.dp, rank % self.tp

    def device(self, pp_rank: int, dp_rank: int, tp_rank: int) -> int:
        return self.mesh.first + (pp_rank * self.dp + dp_rank) * self.tp + tp_rank

    def ep_rank(self, device: int) -> int:
        """Which of the ``ep`` parts of the experts a device of the mesh holds."""
        return self.coordinates(device)[1] % self.ep

    def layers(self, pp_rank: int) -> range:
        """The blocks of a stage."""
        return stage_layers(self.spec.num_layers, self.pp)[pp_rank]

    def stage_parameters(self, pp_rank: int) -> tuple[ParameterShape, ...]:
        """Whole parameters of a stage in buffer order; a tied head's stage holds the embedding.

        With ep, experts come last: their gradients are summed over other ranks than the rest.
        """
        first, last = pp_rank == 0, pp_rank == self.pp - 1
        found: list[ParameterShape] = []
        if first or (last and self.spec.tied_embedding):
            found.append(embedding_parameter(self.spec))
        if first:
            found.extend(position_parameters(self.spec))
        for layer in self.layers(pp_rank):
            found.extend(block_parameters(self.spec, layer))
        if last:
            found.extend(head_parameters(self.spec))
        if self.ep > 1:
            found.sort(key=lambda parameter: parameter.is_expert)
        return tuple(found)

    def slices(self, device: int) -> tuple[ParameterSlice, ...]:
        """What a device holds, in buffer order; nothing outside the mesh."""
        if device not in self.mesh:
            return ()
        pp_rank, _, tp_rank = self.coordinates(device)
        of_experts = self.ep, self.ep_rank(device)
        found = self.stage_parameters(pp_rank)
        return tuple(shard(parameter, self.tp, tp_rank, *of_experts) for parameter in found)

    def num_values(self, device: int) -> int:
        """Values that a device holds."""
        return sum(piece.num_values for piece in self.slices(device))
