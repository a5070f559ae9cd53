"""Bytes on a device: what stays over the step, and what a call needs while it runs.

Read ``MemoryBreakdown``, then ``call_memory``; a whole plan is ``plan_memory.py``'s. Sequences are
taken at their longest: a plan that fits here fits for every batch.

Bytes of a value: weights 2 on CUDA (bf16) and 4 on CPU (fp32); gradients 4; Adam's moments 8, and
on CUDA 4 more for the fp32 master.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate, groupby
from math import ceil

from planner.activations import copied_values, kept_bytes, working_values
from planner.cost.stage import (
    GRADIENT_BYTES,
    MAX_PROMPT_TOKENS,
    VALUE_BYTES,
    StageShape,
    decodes_as_graph,
    own_values,
    packed_values,
    stage_shapes,
    stage_values,
)
from planner.graph import CallKind, ModelFunctionCall
from planner.plan import Allocation, Problem
from planner.sharing import GroupTokens, largest_groups
from planner.strategy import ParallelStrategy
from profiles.hardware import DeviceKind
from profiles.models import ModelSpec
from profiles.units import GIB, MIB

OPTIMIZER_BYTES: Mapping[DeviceKind, int] = {"cuda": 12, "cpu": 8}

# Of the framework, before anything of ours: CUDA context, kernels, NCCL's channels and the
# allocator's slack on a GPU; the interpreter with torch on a CPU.
RESERVE_BYTES: Mapping[DeviceKind, int] = {"cuda": 2 * GIB, "cpu": 2 * GIB // 5}

# What a reallocation has under way at most: the executor takes it from here. Measured over gloo
# on one machine, 285 to 570 MB moved: 16 MiB is 1.1 to 1.7 times as fast as 256 MiB (packed chunks
# stay in the cache) and 1.9 to 3.3 times as fast as 1 MiB. Links between GPUs want messages of
# tens of MiB, and a rank has about ten partners.
STAGING_BYTES: Mapping[DeviceKind, int] = {"cuda": 256 * MIB, "cpu": 16 * MIB}

AVERAGE_BYTES = 4  # of a value of a role that is an average, in fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBreakdown:
    """Bytes on one device, by what they are for."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    kv_cache: int = 0
    buffers: int = 0
    reserve: int = 0

    @property
    def total(self) -> int:
        held = self.weights + self.gradients + self.optimizer + self.activations
        return held + self.logits + self.kv_cache + self.buffers + self.reserve

    def items(self) -> dict[str, int]:
        """Bytes by the item's name."""
        return {name: getattr(self, name) for name in self.__slots__}

    def __add__(self, other: MemoryBreakdown) -> MemoryBreakdown:
        return self._with(other, 1)

    def __sub__(self, other: MemoryBreakdown) -> MemoryBreakdown:
        return self._with(other, -1)

    def _with(self, other: MemoryBreakdown, times: int) -> MemoryBreakdown:
        return MemoryBreakdown(
            weights=self.weights + times * other.weights,
            gradients=self.gradients + times * other.gradients,
            optimizer=self.optimizer + times * other.optimizer,
            activations=self.activations + times * other.activations,
            logits=self.logits + times * other.logits,
            kv_cache=self.kv_cache + times * other.kv_cache,
            buffers=self.buffers + times * other.buffers,
            reserve=self.reserve + times * other.reserve,
        )

    @property
    def biggest(self) -> tuple[str, int]:
        """The largest item's name and bytes."""
        return max(self.items().items(), key=lambda item: item[1])


# ---- one call ---------------------------------------------------------------------------------


def _largest_weight_values(spec: ModelSpec, stage: StageShape, tp: int, ep: int) -> int:
    """Of one weight of a stage, whose gradient exists once beside the flat gradients."""
    first = (2 if spec.gated else 1) * spec.ffn * max(1, spec.num_experts // ep)
    values = max(first, spec.num_heads * spec.head_dim) * spec.hidden // tp
    if stage.first or (stage.last and spec.head == "lm"):
        values = max(values, ceil(spec.vocab / tp) * spec.hidden)
    return values


def call_memory(problem: Problem, call_name: str, allocation: Allocation) -> MemoryBreakdown:
    """What a call alone needs on its fullest device: weights and state of its role included."""
    call = problem.graph.call(call_name)
    kind = problem.cluster.kind
    spec = problem.spec_of(call_name)
    reserve = MemoryBreakdown(reserve=RESERVE_BYTES[kind])
    if spec is None:
        return reserve
    trained = call.kind is CallKind.TRAIN
    # Stages between the ends hold no more than the first, which has most of everything but head.
    stages = {0, allocation.strategy.pp - 1}
    needs = (
        held_memory(spec, allocation.strategy, index, kind, trained=trained)
        + running_memory(problem, call, allocation, spec, index)
        for index in stages
    )
    return max(needs, key=lambda need: need.total) + reserve


def held_memory(
    spec: ModelSpec, strategy: ParallelStrategy, stage: int, kind: DeviceKind, *, trained: bool
) -> MemoryBreakdown:
    """Weights of a stage's shard, and of a trained role gradients and optimizer state."""
    s, shape = strategy, stage_shapes(spec, strategy.pp)[stage]
    values = stage_values(spec, shape, s.tp, s.ep)
    if not trained:
        return MemoryBreakdown(weights=values * VALUE_BYTES[kind])
    own = own_values(spec, shape, s)
    return MemoryBreakdown(
        weights=values * VALUE_BYTES[kind],
        gradients=values * GRADIENT_BYTES,
        optimizer=own * OPTIMIZER_BYTES[kind],
    )


def offloaded_memory(held: MemoryBreakdown, *, trained: bool) -> MemoryBreakdown:
    """Of ``held_memory`` what is in the host's memory while an offloaded call does not run."""
    if trained:
        return MemoryBreakdown(gradients=held.gradients, optimizer=held.optimizer)
    return MemoryBreakdown(weights=held.weights)


def leaves_device(allocation: Allocation, kind: DeviceKind) -> bool:
    """Is there less on the device while the call does not run? A CPU's memory is the host's."""
    return allocation.offload and kind != "cpu"


def average_bytes(weights_bytes: int, kind: DeviceKind) -> int:
    """Of weights that are an average: in fp32 as well, as a small step is lost in a bf16 weight."""
    if VALUE_BYTES[kind] >= AVERAGE_BYTES:
        return weights_bytes
    return weights_bytes + weights_bytes // VALUE_BYTES[kind] * AVERAGE_BYTES


def running_memory(
    problem: Problem, call: ModelFunctionCall, allocation: Allocation, spec: ModelSpec, stage: int
) -> MemoryBreakdown:
    """What exists only while the call runs, on a device of ``stage``."""
    if call.kind is CallKind.GENERATE:
        return _running_generate(problem, call, allocation, spec, stage)
    return _MicroBatch.of(problem, call, allocation, spec).running(spec, allocation, stage)


def running_bytes(
    problem: Problem, call: ModelFunctionCall, allocation: Allocation, spec: ModelSpec
) -> tuple[int, ...]:
    """The total of ``running_memory`` on every stage, without itemising each.

    Stages of one shape differ only by the micro-batches under way, each of which keeps as much.
    """
    s, m = allocation.strategy, allocation.num_micro_batches
    pp, generates = s.pp, call.kind is CallKind.GENERATE
    micro_batch = None if generates else _MicroBatch.of(problem, call, allocation, spec)
    found: list[int] = []
    for shape, first, count in _runs_of_stages(spec, pp):
        most, each = min(m, pp - first), 0
        if micro_batch is None:
            whole = _running_generate(problem, call, allocation, spec, first).total
        else:
            whole, each = micro_batch.bytes_of(spec, s, shape, most)
        if each and most > pp - first - count + 1:
            found += [whole - (most - min(m, pp - first - i)) * each for i in range(count)]
        else:
            found += [whole] * count
    return tuple(found)


@lru_cache(maxsize=1024)
def _runs_of_stages(spec: ModelSpec, pp: int) -> tuple[tuple[StageShape, int, int], ...]:
    """(shape, first stage, number of stages) of runs of stages of one shape."""
    runs = [(shape, len(list(run))) for shape, run in groupby(stage_shapes(spec, pp))]
    firsts = accumulate((count for _, count in runs), initial=0)
    return tuple((shape, first, count) for (shape, count), first in zip(runs, firsts))


@dataclass(frozen=True, slots=True, kw_only=True)
class _MicroBatch:
    """Bytes of the largest micro-batch of an INFER or TRAIN call, which no stage changes.

    ``kept``: by each block until its backward pass. ``sent``: by every stage but the last, which
    goes back through what it gave on. ``working``: of the block under way. ``logits``: on the last
    stage. ``received``: from the stage before, and for the next.
    """

    trained: bool
    value_bytes: int
    kept: int
    sent: int
    working: int
    logits: int
    received: int

    @classmethod
    def of(
        cls, problem: Problem, call: ModelFunctionCall, allocation: Allocation, spec: ModelSpec
    ) -> _MicroBatch:
        s, workload = allocation.strategy, problem.workload_of(call.name)
        mini_batch = ceil(workload.batch_size / call.num_mini_batches)
        groups = ceil(ceil(mini_batch / s.dp) / allocation.num_micro_batches)
        found = [
            cls._of_groups(problem, call, s, spec, groups, group)
            for group in largest_groups(workload)
        ]
        if len(found) == 1:
            return found[0]
        most = {n: max(getattr(one, n) for one in found) for n in ("kept", "working", "received")}
        return replace(found[0], **most)

    @classmethod
    def _of_groups(
        cls, problem: Problem, call: ModelFunctionCall, s: ParallelStrategy, spec: ModelSpec,
        groups: int, group: GroupTokens,
    ) -> _MicroBatch:  # fmt: skip
        """Of ``groups`` alike: blocks work on the tokens that are computed, the head on what it

        reads of whole sequences.
        """
        workload, trained = problem.workload_of(call.name), call.kind is CallKind.TRAIN
        value_bytes = VALUE_BYTES[problem.cluster.kind]
        tokens, whole = ceil(groups * group.computed), ceil(groups * group.whole)
        copies = partial(copied_values, spec, s.tp, computed=tokens, whole=whole)
        copied, kept_copies = (copies(), copies(kept=True)) if group.shares else (0, 0)
        working, kept = tokens * working_values(spec, s, ceil(copied / tokens)) * value_bytes, 0
        # A language model's head reads the answers only.
        answers = groups * workload.group_size * workload.response_tokens
        logits = answers * ceil(spec.vocab / s.tp) if spec.head == "lm" else whole
        if trained:
            logits *= 2  # and their gradient
            block = partial(
                kept_bytes, spec, s, value_bytes=value_bytes, length=workload.max_tokens
            )
            kept = tokens * block()
            if s.recompute == "full":  # the block under way keeps all
                working += tokens * block(recompute="none") + kept_copies * value_bytes
            else:
                kept += kept_copies * value_bytes
        if group.shares:
            logits += whole * spec.hidden  # final hidden states, of whole sequences
        rows = ceil(tokens / s.tp) if s.sequence_parallel else tokens
        hidden_bytes = rows * spec.hidden * value_bytes
        return cls(
            trained=trained, value_bytes=value_bytes, kept=kept, working=working,
            logits=logits * value_bytes, sent=hidden_bytes if trained else 0,
            received=2 * hidden_bytes if s.pp > 1 else 0,
        )  # fmt: skip

    def _each(self, shape: StageShape) -> int:
        """Bytes of every micro-batch under way on a stage."""
        return shape.num_layers * self.kept + (0 if shape.last else self.sent)

    def running(self, spec: ModelSpec, allocation: Allocation, stage: int) -> MemoryBreakdown:
        s = allocation.strategy
        shape = stage_shapes(spec, s.pp)[stage]
        in_flight = min(allocation.num_micro_batches, s.pp - stage)
        gradient = _largest_weight_values(spec, shape, s.tp, s.ep) if self.trained else 0
        return MemoryBreakdown(
            activations=in_flight * self._each(shape) + self.working,
            logits=self.logits if shape.last else 0,
            buffers=self.received + gradient * self.value_bytes,
        )

    def bytes_of(
        self, spec: ModelSpec, s: ParallelStrategy, shape: StageShape, in_flight: int
    ) -> tuple[int, int]:
        """(total of ``running``, of this each micro-batch under way)."""
        each = self._each(shape)
        whole = in_flight * each + self.working + self.received
        if shape.last:
            whole += self.logits
        if self.trained:
            whole += _largest_weight_values(spec, shape, s.tp, s.ep) * self.value_bytes
        return whole, each


def _running_generate(
    problem: Problem, call: ModelFunctionCall, allocation: Allocation, spec: ModelSpec, stage: int
) -> MemoryBreakdown:
    """``cache_memory``, one turn's activations (at most ``MAX_PROMPT_TOKENS`` or one prompt), and

    a group's logits.
    """
    s, workload = allocation.strategy, problem.workload_of(call.name)
    value_bytes = VALUE_BYTES[problem.cluster.kind]
    shape = stage_shapes(spec, s.pp)[stage]
    rows, group = generation_rows(problem, call, allocation)
    limit = max(MAX_PROMPT_TOKENS, workload.prompt_tokens)
    # Sequences of one prompt share its pass; rows that are no whole number of prompts cut one more.
    prompts = min(group, ceil(group / workload.group_size) + (group % workload.group_size > 0))
    tokens = min(prompts * workload.prompt_tokens, limit) + group
    cache = cache_memory(problem, call, allocation, spec, stage)
    graphs = decodes_as_graph(spec, problem.cluster.kind)
    return cache + MemoryBreakdown(
        activations=tokens * working_values(spec, s) * value_bytes,
        logits=_chosen_bytes(spec, group, value_bytes) if shape.last else 0,
        # Without graphs, a block's keys or values are there twice while they grow.
        buffers=(0 if graphs else _row_bytes(problem, call, s, spec) * rows // 2)
        + packed_values(spec, shape, s.tp, problem.cluster.kind) * value_bytes
        + (2 * tokens * spec.hidden * value_bytes if s.pp > 1 else 0),
    )  # fmt: skip


def cache_memory(
    problem: Problem, call: ModelFunctionCall, allocation: Allocation, spec: ModelSpec, stage: int
) -> MemoryBreakdown:
    """Of a GENERATE call's ``running_memory`` what may stay for the next step's generation.

    Keys and values of all sequences under way at their longest. Where decode turns are CUDA graphs,
    also the memory that these share: activations and logits of one turn.
    """
    s, kind = allocation.strategy, problem.cluster.kind
    shape = stage_shapes(spec, s.pp)[stage]
    rows, group = generation_rows(problem, call, allocation)
    graphs = decodes_as_graph(spec, kind)
    return MemoryBreakdown(
        kv_cache=shape.num_layers * rows * _row_bytes(problem, call, s, spec),
        activations=graphs * group * working_values(spec, s) * VALUE_BYTES[kind],
        logits=graphs * _chosen_bytes(spec, group, VALUE_BYTES[kind]) if shape.last else 0,
    )


def generation_rows(
    problem: Problem, call: ModelFunctionCall, allocation: Allocation
) -> tuple[int, int]:
    """Sequences that a GENERATE call has under way at once: (at most, of these in a group)."""
    workload = problem.workload_of(call.name)
    num_sequences = ceil(workload.batch_size / allocation.strategy.dp) * workload.group_size
    rows = min(allocation.generation_batch or num_sequences, num_sequences)
    return rows, ceil(rows / min(allocation.num_micro_batches, rows))


def _row_bytes(
    problem: Problem, call: ModelFunctionCall, s: ParallelStrategy, spec: ModelSpec
) -> int:
    """A block's keys and values of one sequence at its longest."""
    width = 2 * spec.cached_kv_heads(s.tp) * spec.head_dim
    return problem.workload_of(call.name).max_tokens * width * VALUE_BYTES[problem.cluster.kind]


def _chosen_bytes(spec: ModelSpec, group: int, value_bytes: int) -> int:
    """A group's logits while tokens are chosen: parts, whole, and three fp32 copies."""
    return group * spec.vocab * (2 * value_bytes + 3 * 4)
