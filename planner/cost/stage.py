"""Seconds of one pipeline stage: its layers, their tensor-parallel collectives, its ends.

Read ``Priced`` (seconds that know their origin), then ``StageCosts``, which answers for every
call kind and keeps its answers: a search asks the same question many times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil
from typing import Literal, NamedTuple

from planner.layout import EMBEDDING_LAYER, POSITION_LAYER, head_layer, shard_values
from planner.mesh import DeviceMesh
from planner.strategy import ParallelStrategy, stage_layers
from profiles.collectives import Collectives
from profiles.costs import Component, Cost, LayerCosts, Operation, Provenance
from profiles.hardware import DeviceKind, DeviceSpec
from profiles.models import ModelSpec
from profiles.roofline import RooflineCosts

# recompute: the forward pass of blocks again; selective: the part of it that is cheap.
Pass = Literal["forward", "backward", "recompute", "selective", "prefill", "decode", "decode_alone"]

_ORDER: Mapping[Provenance, int] = {p: i for i, p in enumerate(Provenance)}

# Bytes of one value of weights and activations (bf16, fp32) by device kind.
VALUE_BYTES = {"cuda": 2, "cpu": 4}
# Gradients are summed in fp32 on every device.
GRADIENT_BYTES = 4
# Prompt tokens that enter in one turn of generation at most (but always one prompt): bounds the
# activations. The executor's engine takes it from here.
MAX_PROMPT_TOKENS = 8192


@dataclass(slots=True, unsafe_hash=True)
class Priced:
    """Seconds, split by where they come from: one entry for each ``Provenance``, in its order.

    A value: nothing assigns to it. It is not frozen, as a search adds up a million of these, and
    a frozen one takes twice as long to make; so are ``StageCost`` and ``StagesAlike``.
    """

    seconds: float = 0.0
    origin: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    @classmethod
    def of(cls, cost: Cost, times: float = 1.0) -> Priced:
        if cost.shares is not None:
            return cls(cost.seconds, cost.shares) * times
        origin = [0.0, 0.0, 0.0, 0.0]
        origin[_ORDER[cost.provenance]] = cost.seconds * times
        return cls(cost.seconds * times, (origin[0], origin[1], origin[2], origin[3]))

    @classmethod
    def modelled(cls, seconds: float) -> Priced:
        """Seconds of a formula on peak rates."""
        return cls.of(Cost(seconds, Provenance.ROOFLINE))

    def __add__(self, other: Priced) -> Priced:
        a, b = self.origin, other.origin
        return Priced(
            self.seconds + other.seconds, (a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3])
        )

    def __mul__(self, times: float) -> Priced:
        a = self.origin
        return Priced(
            self.seconds * times, (a[0] * times, a[1] * times, a[2] * times, a[3] * times)
        )

    def by_provenance(self) -> dict[Provenance, float]:
        return {p: self.origin[i] for p, i in _ORDER.items() if self.origin[i] > 0}


ZERO = Priced()


@dataclass(slots=True, unsafe_hash=True)
class StageCost:
    """One pass of one micro-batch through a stage: ``compute`` and ``tensor_parallel``, what shards

    send each other for it, and with experts over ep also replicas.
    """

    compute: Priced = ZERO
    tensor_parallel: Priced = ZERO

    @property
    def seconds(self) -> float:
        return self.compute.seconds + self.tensor_parallel.seconds

    def __add__(self, other: StageCost) -> StageCost:
        return StageCost(self.compute + other.compute, self.tensor_parallel + other.tensor_parallel)

    def __mul__(self, times: float) -> StageCost:
        return StageCost(self.compute * times, self.tensor_parallel * times)


class StageShape(NamedTuple):
    """What a stage's cost depends on: its number of blocks, and which ends of the model it has."""

    num_layers: int
    first: bool
    last: bool


@lru_cache(maxsize=1024)
def stage_shapes(spec: ModelSpec, pp: int) -> tuple[StageShape, ...]:
    """The stages of a pipeline in order; many are equal."""
    return tuple(
        StageShape(len(layers), index == 0, index == pp - 1)
        for index, layers in enumerate(stage_layers(spec.num_layers, pp))
    )


NOTHING = StageCost()
NO_RANKS = range(1)  # experts are with their tokens


class _Sums(NamedTuple):
    """Collectives on hidden states: of each block, and at the ends."""

    block: Priced
    first: Priced
    last: Priced


@dataclass(slots=True)
class PassCost:
    """Passes of one micro-batch by what a stage has: each block, and the ends of the model.

    A search asks for few of these and adds up stages of many shapes from each.
    """

    block: StageCost = NOTHING
    first: StageCost = NOTHING
    last: StageCost = NOTHING
    _known: dict[StageShape, StageCost] = field(default_factory=dict, repr=False, compare=False)

    def of(self, stage: StageShape) -> StageCost:
        cost = self._known.get(stage)
        if cost is None:
            cost = self.block * stage.num_layers
            if stage.first and self.first is not NOTHING:
                cost = cost + self.first
            if stage.last and self.last is not NOTHING:
                cost = cost + self.last
            self._known[stage] = cost
        return cost

    def whole_model(self, num_layers: int) -> Priced:
        """All stages, one after another."""
        cost = self.block * num_layers + self.first + self.last
        return cost.compute + cost.tensor_parallel

    def __add__(self, other: PassCost) -> PassCost:
        return PassCost(self.block + other.block, self.first + other.first, self.last + other.last)


class StageCosts:
    """Answers ``passes(...)`` from layer costs and collectives, and remembers the answers."""

    def __init__(
        self, device: DeviceSpec, layer_costs: LayerCosts, collectives: Collectives,
        kernels: RooflineCosts | None = None, *, stops_early: bool = True,
    ) -> None:  # fmt: skip
        self.stops_early = stops_early
        self.layers = layer_costs
        self.kernels = kernels or RooflineCosts(device)
        self.collectives = collectives
        self.value_bytes = VALUE_BYTES[device.kind]
        self._answers: dict[tuple[object, ...], PassCost] = {}

    def passes(
        self, spec: ModelSpec, passes: tuple[Pass, ...], *, tp: int, size: int, length: int,
        rows: int = 0, split_tokens: bool = False, experts: range = NO_RANKS, copied: int = 0,
    ) -> PassCost:  # fmt: skip
        """The sum of ``passes``. ``size`` tokens in sequences of ``length``, or in decode ``size``

        sequences with ``length`` tokens of context. ``rows``: of these tokens, those that a
        language model's head reads; in prefill one for each sequence, elsewhere 0 means all. A
        scalar head reads all. ``recompute`` is the blocks' forward pass again, without the ends,
        and where it stops early without what nothing is kept of: a dense block's last product,
        and its sum over shards. ``selective`` is what is made again where only cheap things are.
        ``split_tokens``: sequence parallelism. ``experts``: the devices that a device's experts
        are split over, with as many tokens each. ``copied``: tokens of whole sequences whose keys
        and values every block copies together, as some have their prompt from others.
        """
        if size <= 0:
            return PassCost()
        question = (spec, passes, tp, size, length, rows, split_tokens, experts, copied)
        answer = self._answers.get(question)
        if answer is None:
            length = max(1, length)
            answer = PassCost()
            for what in passes:
                cost = (
                    self._selective(spec, tp, size, length, split_tokens)
                    if what == "selective"
                    else self._pass(spec, what, tp, size, length, rows, split=split_tokens)
                )
                if len(experts) > 1 and what != "selective":
                    cost = self._with_experts_apart(cost, spec, what, tp, size, experts)
                if copied and what != "selective":
                    cost = cost + self._copies(spec, what, tp, copied)
                answer = answer + cost
            self._answers[question] = answer
        return answer

    def _copies(self, spec: ModelSpec, what: Pass, tp: int, copied: int) -> PassCost:
        """Keys and values of ``copied`` tokens, read and written in every block.

        In backward their gradients are taken apart, read and written once to be moved and once to
        be added up.
        """
        width = 2 * spec.cached_kv_heads(tp) * spec.head_dim
        each_s = self.kernels.stream_s(2.0 * self.value_bytes * width * copied)
        times = 2.0 if what == "backward" else 1.0
        return PassCost(block=StageCost(compute=Priced.modelled(times * each_s)))

    def _with_experts_apart(
        self, cost: PassCost, spec: ModelSpec, what: Pass, tp: int, size: int, experts: range
    ) -> PassCost:  # fmt: skip
        """``cost`` of a pass where experts are split over ``experts``.

        Every expert is taken to be equally likely, so that a device gets as many rows as it sends:
        its products are as large in all, fewer and larger, and of their matrices fewer bytes are
        read and get gradients. Rows go to their experts and back, after their counts; backward
        likewise, without counts. ``selective`` makes nothing of experts again.
        """
        operation: Operation = "backward" if what == "backward" else "forward"
        whole_s, split_s = (
            self.kernels.experts_s(spec, operation, tp, size, ep) for ep in (1, len(experts))
        )
        compute = cost.block.compute
        # Measured blocks keep their origin, as with split tokens.
        if compute.seconds:
            compute = compute * max(0.0, 1.0 - (whole_s - split_s) / compute.seconds)
        rows_bytes = float(size) * spec.experts_per_token * spec.hidden * self.value_bytes
        sent = Priced.of(self.collectives.all_to_all(rows_bytes, experts)) * 2.0
        if what != "backward":
            sent = sent + Priced.of(self.collectives.all_to_all(8.0 * spec.num_experts, experts))
        block = StageCost(compute, cost.block.tensor_parallel + sent)
        return PassCost(block, cost.first, cost.last)

    def _selective(self, spec: ModelSpec, tp: int, size: int, length: int, split: bool) -> PassCost:
        """Inputs of products made again in backward, and with split tokens gathered again.

        Where scores are made again instead (eager attention), inputs are not dropped, but their
        gathers are still needed: a shard keeps its own rows only.
        """
        own = ceil(size / tp) if split else size
        block = Priced.modelled(self.kernels.selective_s(spec, tp, size, length, own))
        num_gathers = (1 if spec.num_experts else 2) if split else 0
        hidden_bytes = float(size) * spec.hidden * self.value_bytes
        gather = Priced.of(self.collectives.all_gather(hidden_bytes, range(tp)))
        return PassCost(block=StageCost(compute=block, tensor_parallel=gather * num_gathers))

    def _pass(
        self, spec: ModelSpec, what: Pass, tp: int, size: int, length: int, rows: int, *,
        split: bool,
    ) -> PassCost:  # fmt: skip
        operation: Operation = what if what in ("backward", "decode", "decode_alone") else "forward"

        def layer(component: Component, op: Operation, count: int) -> Priced:
            return Priced.of(
                self.layers.layer(spec, component, op, tp=tp, size=count, length=length)
            )

        group = range(tp)  # tensor-parallel groups lie in one node, and nodes are equal
        sums = self._sums(spec, what, size, group, split)
        block = layer("block", operation, size)
        if what == "recompute" and self.stops_early and not spec.num_experts:
            block = block * (1.0 - self.kernels.last_product_share(spec, tp, size, length))
        if split:
            block = self._with_split_tokens(block, spec, what, tp, size)
        found = PassCost(block=StageCost(block, sums.block))
        if what != "recompute":
            found.first = StageCost(layer("embedding", operation, size), sums.first)
        if what in ("forward", "backward"):
            read = rows if rows and spec.head == "lm" else size
            of_head = sums.last + self._head_collectives(spec, what, read, group)
            found.last = StageCost(layer("head", operation, read), of_head)
        if what in ("prefill", "decode", "decode_alone"):
            count = rows if what == "prefill" else size
            choice: Operation = "decode" if what == "prefill" else operation
            logits_bytes = float(count) * spec.vocab * self.value_bytes
            gather = Priced.of(self.collectives.all_gather(logits_bytes, group))
            found.last = StageCost(layer("head", choice, count), sums.last + gather)
        return found

    def _with_split_tokens(
        self, block: Priced, spec: ModelSpec, what: Pass, tp: int, size: int
    ) -> Priced:
        """``block`` with its norms and residual sums on 1 / tp of the tokens."""
        passes = 2 if what == "backward" else 1
        whole_s, split_s = (self.kernels.between_s(spec, n) for n in (size, ceil(size / tp)))
        saved_s = passes * (whole_s - split_s)
        # Measured blocks keep their origin: the share that is left of every part.
        return block * max(0.0, 1.0 - saved_s / block.seconds) if block.seconds else block

    def _sums(self, spec: ModelSpec, what: Pass, size: int, group: range, split: bool) -> _Sums:
        """Collectives on hidden states: around both halves of every block, and at the ends.

        An all-reduce after either half, in backward before it. ``split``: a half is entered
        through an all-gather and left through a reduce-scatter instead, backward the other way
        round; the embedding is left as a half of a block, and after the final norm tokens are
        gathered. Source: Korthikanti et al. 2022, sections 4.2.1 and 4.2.2.
        """
        hidden_bytes = float(size) * spec.hidden * self.value_bytes
        reduce = Priced.of(self.collectives.all_reduce(hidden_bytes, group))
        left = 1.0 if what == "recompute" and self.stops_early else 2.0
        # The gradient that shards of a language model's head give to the same hidden states.
        of_head = reduce if what == "backward" and spec.head == "lm" else ZERO
        if not split:
            # Parts of the vocabulary are summed.
            return _Sums(reduce * left, ZERO if what == "backward" else reduce, of_head)
        gather = Priced.of(self.collectives.all_gather(hidden_bytes, group))
        scatter = Priced.of(self.collectives.reduce_scatter(hidden_bytes, group))
        return _Sums(
            gather * 2.0 + scatter * left,
            gather if what == "backward" else scatter,
            gather if what == "forward" else of_head,
        )

    def _head_collectives(self, spec: ModelSpec, what: Pass, size: int, group: range) -> Priced:
        """Largest logit, sum of exponentials and the chosen logit: fp32, one value a token."""
        if spec.head == "scalar" or what == "backward":
            return ZERO
        return Priced.of(self.collectives.all_reduce(4.0 * size, group)) * 3.0


@lru_cache(maxsize=4096)
def stage_values(spec: ModelSpec, stage: StageShape, tp: int, ep: int = 1) -> int:
    """Parameter values that the fullest device of a stage holds.

    The same number as ``planner.layout.Layout.num_values``, without listing the slices.
    """
    values = stage.num_layers * shard_values(spec, 0, tp, ep)
    if stage.first or (stage.last and spec.tied_embedding):
        values += shard_values(spec, EMBEDDING_LAYER, tp)
    if stage.first:
        values += shard_values(spec, POSITION_LAYER, tp)
    if stage.last:
        values += shard_values(spec, head_layer(spec), tp)
    return values


def packed_values(spec: ModelSpec, stage: StageShape, tp: int, kind: DeviceKind) -> int:
    """Values that a device copies for a generation, in the order that its kernels read.

    Only CPUs do: of all blocks (their norms are next to nothing) but experts, and the head.
    """
    if kind != "cpu":
        return 0
    values = stage.num_layers * shard_values(spec, 0, tp) - expert_values(spec, stage, tp, 1)
    return values + (ceil(spec.vocab / tp) * spec.hidden if stage.last else 0)


def decodes_as_graph(spec: ModelSpec, kind: DeviceKind) -> bool:
    """Does the engine replay decode turns as CUDA graphs (``executor.generate.static_step``)?"""
    return kind == "cuda" and spec.decode_is_static


def expert_values(spec: ModelSpec, stage: StageShape, tp: int, ep: int) -> int:
    """Of ``stage_values`` those of experts."""
    return stage.num_layers * shard_values(spec, 0, tp, ep, only_experts=True)


def own_values(spec: ModelSpec, stage: StageShape, s: ParallelStrategy) -> int:
    """Values of a stage's shard that a rank keeps optimizer state for: with ZeRO 1 its share of

    experts over the dp / ep ranks that hold them, and of all else over dp.
    """
    values = stage_values(spec, stage, s.tp, s.ep)
    if s.zero == 0:
        return values
    experts = expert_values(spec, stage, s.tp, s.ep) if s.ep > 1 else 0
    return ceil((values - experts) / s.dp) + ceil(experts * s.ep / s.dp)


def expert_ranks(mesh: DeviceMesh, s: ParallelStrategy) -> range:
    """The first devices of a mesh that its experts are split over."""
    return range(mesh.first, mesh.first + s.ep * s.tp, s.tp) if s.ep > 1 else NO_RANKS
