"""Bytes on each device: what stays over the step, and what a call needs while it runs.

Read ``MemoryBreakdown``, then ``call_memory`` (one call alone) and ``memory_over_time`` (every
device of a plan). Sequences are taken at their longest: a plan that fits here fits for every batch.

Bytes of a value: weights 2 on CUDA (bf16) and 4 on CPU (fp32); gradients 4; Adam's moments 8, and
on CUDA 4 more for the fp32 master.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil
from typing import NamedTuple

from planner.activations import kept_bytes, working_values
from planner.cost.stage import (
    GRADIENT_BYTES,
    MAX_PROMPT_TOKENS,
    VALUE_BYTES,
    StageShape,
    stage_shapes,
    stage_values,
)
from planner.graph import CallKind, ModelFunctionCall
from planner.layout import Layout
from planner.plan import Allocation, ExecutionPlan, Problem
from planner.strategy import ParallelStrategy
from profiles.errors import InfeasibleError
from profiles.hardware import DeviceKind
from profiles.models import ModelSpec
from profiles.units import GIB, MIB, format_bytes

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
        return MemoryBreakdown(
            weights=self.weights + other.weights,
            gradients=self.gradients + other.gradients,
            optimizer=self.optimizer + other.optimizer,
            activations=self.activations + other.activations,
            logits=self.logits + other.logits,
            kv_cache=self.kv_cache + other.kv_cache,
            buffers=self.buffers + other.buffers,
            reserve=self.reserve + other.reserve,
        )

    @property
    def biggest(self) -> tuple[str, int]:
        """The largest item's name and bytes."""
        return max(self.items().items(), key=lambda item: item[1])


# ---- one call ---------------------------------------------------------------------------------


def _largest_weight_values(spec: ModelSpec, stage: StageShape, tp: int) -> int:
    """Of one weight of a stage, whose gradient exists once beside the flat gradients."""
    first = (2 if spec.gated else 1) * spec.ffn * max(1, spec.num_experts)
    values = max(first, spec.num_heads * spec.head_dim) * spec.hidden // tp
    if stage.first or (stage.last and spec.head == "lm"):
        values = max(values, ceil(spec.vocab / tp) * spec.hidden)
    return values


def call_memory(problem: Problem, call_name: str, allocation: Allocation) -> MemoryBreakdown:
    """What a call alone needs on its fullest device: weights and state of its role included."""
    call = problem.graph.call(call_name)
    kind = problem.cluster.device.kind
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
    values = stage_values(spec, stage_shapes(spec, strategy.pp)[stage], strategy.tp)
    if not trained:
        return MemoryBreakdown(weights=values * VALUE_BYTES[kind])
    own = ceil(values / strategy.dp) if strategy.zero else values
    return MemoryBreakdown(
        weights=values * VALUE_BYTES[kind],
        gradients=values * GRADIENT_BYTES,
        optimizer=own * OPTIMIZER_BYTES[kind],
    )


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
    s, workload = allocation.strategy, problem.workload_of(call.name)
    value_bytes = VALUE_BYTES[problem.cluster.device.kind]
    shape = stage_shapes(spec, s.pp)[stage]
    sequences, tokens = _micro_batch_tokens(problem, call, allocation)
    working = tokens * working_values(spec, s) * value_bytes
    # A language model's head reads the answers only.
    answers = sequences * workload.response_tokens
    logits = answers * ceil(spec.vocab / s.tp) if shape.last and spec.head == "lm" else tokens
    rows = ceil(tokens / s.tp) if s.sequence_parallel else tokens
    buffers = 2 * rows * spec.hidden if s.pp > 1 else 0
    kept = 0
    if call.kind is CallKind.TRAIN:
        in_flight = min(allocation.num_micro_batches, s.pp - stage)
        length = workload.max_tokens
        kept = in_flight * _micro_batch_bytes(problem, call, allocation, spec, shape)
        if s.recompute == "full":  # the block under way keeps all
            working += tokens * kept_bytes(
                spec, s, value_bytes=value_bytes, length=length, recompute="none"
            )
        logits *= 2  # and their gradient
        buffers += _largest_weight_values(spec, shape, s.tp)
    return MemoryBreakdown(
        activations=kept + working,
        logits=logits * value_bytes if shape.last else 0,
        buffers=buffers * value_bytes,
    )


def running_bytes(
    problem: Problem, call: ModelFunctionCall, allocation: Allocation, spec: ModelSpec
) -> tuple[int, ...]:
    """The total of ``running_memory`` on every stage, without itemising each.

    Stages of one shape differ only by the micro-batches under way, each of which keeps as much.
    """
    pp, m = allocation.strategy.pp, allocation.num_micro_batches
    found: list[int] = []
    for shape, run in groupby(stage_shapes(spec, pp)):
        first, count = len(found), len(list(run))
        whole = running_memory(problem, call, allocation, spec, first).total
        each = 0
        if call.kind is CallKind.TRAIN and count > 1:
            each = _micro_batch_bytes(problem, call, allocation, spec, shape)
        most = min(m, pp - first)
        found += [whole - (most - min(m, pp - first - i)) * each for i in range(count)]
    return tuple(found)


def _micro_batch_tokens(
    problem: Problem, call: ModelFunctionCall, allocation: Allocation
) -> tuple[int, int]:
    """(sequences, tokens) of the largest micro-batch of an INFER or TRAIN call."""
    workload = problem.workload_of(call.name)
    mini_batch = ceil(workload.batch_size / call.num_mini_batches)
    groups = ceil(ceil(mini_batch / allocation.strategy.dp) / allocation.num_micro_batches)
    sequences = groups * workload.group_size
    return sequences, sequences * workload.max_tokens


def _micro_batch_bytes(
    problem: Problem, call: ModelFunctionCall, allocation: Allocation, spec: ModelSpec,
    shape: StageShape,
) -> int:  # fmt: skip
    """What a stage keeps of one micro-batch until its backward pass."""
    value_bytes = VALUE_BYTES[problem.cluster.device.kind]
    block = kept_bytes(
        spec, allocation.strategy, value_bytes=value_bytes, length=problem.workload.max_tokens
    )
    _, tokens = _micro_batch_tokens(problem, call, allocation)
    return shape.num_layers * tokens * block


def _running_generate(
    problem: Problem, call: ModelFunctionCall, allocation: Allocation, spec: ModelSpec, stage: int
) -> MemoryBreakdown:
    """Keys and values of all sequences under way at their longest, one turn's activations

    (at most ``MAX_PROMPT_TOKENS`` or one prompt), and a group's logits: parts, whole, and three
    fp32 copies while a token is chosen.
    """
    s, workload = allocation.strategy, problem.workload_of(call.name)
    value_bytes = VALUE_BYTES[problem.cluster.device.kind]
    shape = stage_shapes(spec, s.pp)[stage]
    num_sequences = ceil(workload.batch_size / s.dp) * workload.group_size
    rows = min(allocation.generation_batch or num_sequences, num_sequences)
    group = ceil(rows / min(allocation.num_micro_batches, rows))
    kv_width = 2 * spec.cached_kv_heads(s.tp) * spec.head_dim
    rows_bytes = rows * workload.max_tokens * kv_width * value_bytes
    limit = max(MAX_PROMPT_TOKENS, workload.prompt_tokens)
    tokens = min(group * workload.prompt_tokens, limit) + group
    logits = group * spec.vocab * (2 * value_bytes + 3 * 4) if shape.last else 0
    return MemoryBreakdown(
        kv_cache=shape.num_layers * rows_bytes,
        activations=tokens * working_values(spec, s) * value_bytes,
        logits=logits,
        # A block's keys or values are there twice while they grow.
        buffers=rows_bytes // 2
        + (2 * tokens * spec.hidden * value_bytes if s.pp > 1 else 0),
    )  # fmt: skip


# ---- a whole plan -----------------------------------------------------------------------------


def home_strategies(plan: ExecutionPlan) -> dict[str, dict[Layout, ParallelStrategy]]:
    """The layouts in which each role's weights stay over steps, with the strategy of each.

    A trained role lives where it is trained, a frozen one in every layout that reads it: as
    ``planner.program.home_layouts``.
    """
    homes: dict[str, dict[Layout, ParallelStrategy]] = {}
    for role in plan.problem.graph.roles:
        train = plan.problem.graph.train_call(role)
        calls = (train,) if train else plan.problem.graph.calls_of(role)
        found = homes.setdefault(role, {})
        for call in calls:
            allocation = plan.allocations[call.name]
            layout = Layout.of(plan.problem.models[role], allocation.mesh, allocation.strategy)
            found.setdefault(layout, allocation.strategy)
    return homes


class MemoryMoment(NamedTuple):
    """A device's bytes while ``call`` runs on it, or ``after`` it; "" between calls."""

    call: str
    need: MemoryBreakdown
    after: str = ""


def memory_over_time(plan: ExecutionPlan) -> Mapping[int, tuple[MemoryMoment, ...]]:
    """Every device's bytes over a step: between calls, then in each of its calls in their order.

    What stays, what the call needs while it runs, and weights that are borrowed for it, or for
    calls before and after it.
    """
    problem = plan.problem
    homes = home_strategies(plan)
    resident = _resident(plan, homes)
    borrowed = _borrowed(plan, homes)
    found = {device: [MemoryMoment("", need)] for device, need in resident.items()}
    for position, call in enumerate(problem.graph.calls):
        allocation = plan.allocations[call.name]
        spec = problem.spec_of(call.name)
        stages: list[MemoryBreakdown] = [MemoryBreakdown()]
        if spec is not None:
            pp = allocation.strategy.pp
            stages = [running_memory(problem, call, allocation, spec, stage) for stage in range(pp)]
        width = allocation.mesh.num_devices // len(stages)
        there = [layout for (_, layout), (a, b) in borrowed.items() if a <= position <= b]
        for device in allocation.mesh.devices:
            need = resident[device] + stages[(device - allocation.mesh.first) // width]
            for layout in there:
                if device in layout.mesh:
                    need += _borrowed_memory(layout, device, problem.cluster.device.kind)
            found[device].append(MemoryMoment(call.name, need))
    for average in problem.graph.averages:
        train = problem.graph.train_call(average.of)
        assert train is not None, average
        for layout in homes[average.role]:
            for device in layout.mesh.devices:
                need = resident[device]
                if layout not in homes[average.of]:  # the trained weights are brought here
                    need += _borrowed_memory(layout, device, problem.cluster.device.kind)
                found[device].append(MemoryMoment(train.name, need, f"average {average.role}"))
    return {device: tuple(moments) for device, moments in found.items()}


def _borrowed_memory(layout: Layout, device: int, kind: DeviceKind) -> MemoryBreakdown:
    """Weights of a layout that is no home, and what was under way to bring them."""
    strategy = ParallelStrategy(pp=layout.pp, tp=layout.tp, dp=layout.dp)
    stage = layout.coordinates(device)[0]
    held = held_memory(layout.spec, strategy, stage, kind, trained=False)
    return held + MemoryBreakdown(buffers=STAGING_BYTES[kind])


def fullest(moments: Sequence[MemoryMoment]) -> MemoryMoment:
    """The moment with the most bytes, the first of several."""
    return max(moments, key=lambda moment: moment.need.total)


def plan_memory(plan: ExecutionPlan) -> Mapping[int, MemoryBreakdown]:
    """The fullest moment of every device of the cluster: what stays, and the worst call."""
    return {device: fullest(moments).need for device, moments in memory_over_time(plan).items()}


def check_memory(plan: ExecutionPlan) -> None:
    """Raise unless every device of the plan has the memory that it needs.

    Raises:
        InfeasibleError: names the fullest device, the call, the roles, the bytes and the item
            that takes most.
    """
    had = plan.problem.cluster.device.memory_bytes
    peaks = {device: fullest(moments) for device, moments in memory_over_time(plan).items()}
    device, (call_name, need, _) = max(peaks.items(), key=lambda item: item[1].need.total)
    call_name = call_name or plan.problem.graph.calls[0].name  # too full before any call
    if need.total <= had:
        return
    item, num_bytes = need.biggest
    roles = [
        role
        for role, layouts in home_strategies(plan).items()
        if any(device in layout.mesh for layout in layouts)
    ]
    raise InfeasibleError(
        f"device {device} needs {format_bytes(need.total)} while {call_name} runs and has "
        f"{format_bytes(had)}, {format_bytes(need.total - had)} too little; most is {item} with "
        f"{format_bytes(num_bytes)} "
        f"(roles that stay there: {', '.join(roles) or 'none'})",
        where=f"allocations.{call_name}",
        remedy=REMEDIES[item],
    )


REMEDIES: Mapping[str, str] = {
    "weights": "raise tp or pp, or place roles on different devices",
    "gradients": "raise tp or pp of the trained roles, or train them on different devices",
    "optimizer": "use ZeRO 1, or raise tp or pp of the trained roles",
    "activations": "use more micro-batches, recompute, or raise tp or dp",
    "logits": "use more micro-batches, or raise tp or dp",
    "kv_cache": "lower the call's generation_batch, or raise its dp, tp or pp",
    "buffers": "use more micro-batches, or raise tp",
    "reserve": "use devices with more memory",
}


def _resident(
    plan: ExecutionPlan, homes: Mapping[str, Mapping[Layout, ParallelStrategy]]
) -> dict[int, MemoryBreakdown]:
    """What every device holds at all times."""
    kind = plan.problem.cluster.device.kind
    found = {
        device: MemoryBreakdown(reserve=RESERVE_BYTES[kind])
        for device in range(plan.problem.cluster.num_devices)
    }
    for role, layouts in homes.items():
        trained = plan.problem.graph.train_call(role) is not None
        averaged = any(average.role == role for average in plan.problem.graph.averages)
        for layout, strategy in layouts.items():
            held = [
                held_memory(layout.spec, strategy, stage, kind, trained=trained)
                for stage in range(layout.pp)
            ]
            for device in layout.mesh.devices:
                own = held[layout.coordinates(device)[0]]
                found[device] += own
                if averaged:
                    more = average_bytes(own.weights, kind) - own.weights
                    found[device] += MemoryBreakdown(weights=more)
    return found


def _borrowed(
    plan: ExecutionPlan, homes: Mapping[str, Mapping[Layout, ParallelStrategy]]
) -> dict[tuple[str, Layout], tuple[int, int]]:
    """Layouts that exist for a part of the step: positions of their first and last call."""
    found: dict[tuple[str, Layout], tuple[int, int]] = {}
    for position, call in enumerate(plan.problem.graph.calls):
        if call.role is None:
            continue
        allocation = plan.allocations[call.name]
        layout = Layout.of(plan.problem.models[call.role], allocation.mesh, allocation.strategy)
        if layout not in homes[call.role]:
            first, _ = found.get((call.role, layout), (position, position))
            found[(call.role, layout)] = (first, position)
    return found
