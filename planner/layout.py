"""``Layout``: which slice of which parameter lies on which device.

A layout is (model, mesh, strategy). Everything is integers: the executor carves its flat
buffers by ``Layout.slices`` and ``reallocation.py`` intersects two layouts.

For a model of 2 blocks under pp 2, tp 2 (4 ranks) block 0's q [heads * head_dim, hidden] lies so:

    rank 0  layers.0.q rows 0 … half      rank 2  (block 1 …)
    rank 1  layers.0.q rows half … end    rank 3  (block 1 …)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from planner.mesh import DeviceMesh
from planner.strategy import ParallelStrategy, stage_layers
from profiles.models import ModelSpec

# The two ends of the model count as layers of their own: they sit on the outer stages.
EMBEDDING_LAYER = -1


def head_layer(spec: ModelSpec) -> int:
    """The index of the pseudo-layer of final norm and head."""
    return spec.num_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterShape:
    """One parameter of the whole model; ``shard_dim`` is split over tp, None is replicated."""

    name: str
    shape: tuple[int, ...]
    layer: int
    shard_dim: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSlice:
    """A box of a parameter: ``offset`` and ``length`` in each dimension of the whole."""

    name: str
    offset: tuple[int, ...]
    length: tuple[int, ...]

    @property
    def num_values(self) -> int:
        return prod(self.length)

    def relative_to(self, outer: ParameterSlice) -> tuple[slice, ...]:
        """Index of this box inside a tensor that holds ``outer``."""
        assert self.name == outer.name, (self.name, outer.name)
        return tuple(
            slice(o - base, o - base + n)
            for o, base, n in zip(self.offset, outer.offset, self.length, strict=True)
        )


def block_parameters(spec: ModelSpec, layer: int) -> tuple[ParameterShape, ...]:
    """The parameters of one block, in the order of the flat buffer.

    q, k, v are neighbours, and so are gate and up: the executor multiplies each group at once.
    """
    q, kv, h = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.hidden
    rows: list[tuple[str, tuple[int, ...], int | None]] = [
        ("attention_norm.weight", (h,), None),
        ("q.weight", (q, h), 0),
        ("k.weight", (kv, h), 0),
        ("v.weight", (kv, h), 0),
    ]
    if spec.qkv_bias:
        rows += [("q.bias", (q,), 0), ("k.bias", (kv,), 0), ("v.bias", (kv,), 0)]
    rows += [
        ("o.weight", (h, q), 1),
        ("ffn_norm.weight", (h,), None),
        ("gate.weight", (spec.ffn, h), 0),
        ("up.weight", (spec.ffn, h), 0),
        ("down.weight", (h, spec.ffn), 1),
    ]
    return tuple(
        ParameterShape(name=f"layers.{layer}.{name}", shape=shape, layer=layer, shard_dim=dim)
        for name, shape, dim in rows
    )


def embedding_parameter(spec: ModelSpec) -> ParameterShape:
    return ParameterShape(
        name="embedding.weight", shape=(spec.vocab, spec.hidden), layer=EMBEDDING_LAYER, shard_dim=0
    )


def head_parameters(spec: ModelSpec) -> tuple[ParameterShape, ...]:
    """Final norm and head; with a tied embedding the norm only."""
    layer = head_layer(spec)
    norm = ParameterShape(
        name="final_norm.weight", shape=(spec.hidden,), layer=layer, shard_dim=None
    )
    if spec.tied_embedding:
        return (norm,)
    head = ParameterShape(
        name="head.weight",
        shape=(spec.output_size, spec.hidden),
        layer=layer,
        shard_dim=0 if spec.head == "lm" else None,
    )
    return (norm, head)


@lru_cache(maxsize=64)
def parameters(spec: ModelSpec) -> tuple[ParameterShape, ...]:
    """Every parameter of the model, once, in model order."""
    blocks = (p for layer in range(spec.num_layers) for p in block_parameters(spec, layer))
    return (embedding_parameter(spec), *blocks, *head_parameters(spec))


def shard(parameter: ParameterShape, tp: int, tp_rank: int) -> ParameterSlice:
    """The box of ``parameter`` that one tensor-parallel rank holds."""
    offset, length = [0] * len(parameter.shape), list(parameter.shape)
    if parameter.shard_dim is not None:
        size = parameter.shape[parameter.shard_dim]
        assert size % tp == 0, (parameter.name, size, tp)
        length[parameter.shard_dim] = size // tp
        offset[parameter.shard_dim] = size // tp * tp_rank
    return ParameterSlice(name=parameter.name, offset=tuple(offset), length=tuple(length))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A role's weights on a mesh under a strategy. Equal layouts share their buffers."""

    spec: ModelSpec
    mesh: DeviceMesh
    pp: int = 1
    tp: int = 1
    dp: int = 1

    @classmethod
    def of(cls, spec: ModelSpec, mesh: DeviceMesh, strategy: ParallelStrategy) -> Layout:
        return cls(spec=spec, mesh=mesh, pp=strategy.pp, tp=strategy.tp, dp=strategy.dp)

    @property
    def key(self) -> str:
        """A short name, unique among the layouts of one role: ``[0-7] d4p2m1``."""
        return f"{self.mesh} d{self.dp}p{self.pp}m{self.tp}"

    def coordinates(self, device: int) -> tuple[int, int, int]:
        """(pp_rank, dp_rank, tp_rank) of a device of the mesh."""
        rank = device - self.mesh.first
        return rank // (self.dp * self.tp), rank // self.tp % self.dp, rank % self.tp

    def device(self, pp_rank: int, dp_rank: int, tp_rank: int) -> int:
        return self.mesh.first + (pp_rank * self.dp + dp_rank) * self.tp + tp_rank

    def layers(self, pp_rank: int) -> range:
        """The blocks of a stage."""
        return stage_layers(self.spec.num_layers, self.pp)[pp_rank]

    def stage_parameters(self, pp_rank: int) -> tuple[ParameterShape, ...]:
        """Whole parameters of a stage in buffer order; a tied head's stage holds the embedding."""
        first, last = pp_rank == 0, pp_rank == self.pp - 1
        found: list[ParameterShape] = []
        if first or (last and self.spec.tied_embedding):
            found.append(embedding_parameter(self.spec))
        for layer in self.layers(pp_rank):
            found.extend(block_parameters(self.spec, layer))
        if last:
            found.extend(head_parameters(self.spec))
        return tuple(found)

    def slices(self, device: int) -> tuple[ParameterSlice, ...]:
        """What a device holds, in buffer order; nothing outside the mesh."""
        if device not in self.mesh:
            return ()
        pp_rank, _, tp_rank = self.coordinates(device)
        return tuple(shard(p, self.tp, tp_rank) for p in self.stage_parameters(pp_rank))

    def num_values(self, device: int) -> int:
        """Values that a device holds."""
        return sum(piece.num_values for piece in self.slices(device))
