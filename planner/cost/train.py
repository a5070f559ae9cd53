"""Seconds of INFER and TRAIN calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import NamedTuple

from planner.cost.model import CostModel
from planner.cost.pipeline import (
    EXECUTOR,
    PipelinePass,
    Schedule,
    micro_batch_sizes,
    pipeline_parts,
)
from planner.cost.stage import (
    GRADIENT_BYTES,
    ZERO,
    Pass,
    PassCost,
    Priced,
    StageShape,
    expert_ranks,
    expert_values,
    own_values,
    stage_shapes,
    stage_values,
)
from planner.plan import Allocation, Workload
from planner.sharing import attended_tokens, expected_group
from profiles.models import ModelSpec
from profiles.units import MIB

# Of gradients that are summed over replicas at once. Large enough that latency does not count on
# any link, small enough that summing the first overlaps with what comes after. The executor takes
# it from here.
BUCKET_BYTES = 64 * MIB


def infer_parts(
    spec: ModelSpec, workload: Workload, allocation: Allocation, model: CostModel
) -> Mapping[str, Priced]:
    """One forward pass of every sequence of the busiest data-parallel rank."""
    num_groups = ceil(workload.batch_size / allocation.strategy.dp)
    return _pipeline(spec, workload, allocation, model, num_groups, passes=("forward",))


def train_parts(
    spec: ModelSpec,
    workload: Workload,
    allocation: Allocation,
    model: CostModel,
    *,
    num_mini_batches: int,
    num_epochs: int = 1,
    schedule: Schedule = EXECUTOR,
) -> Mapping[str, Priced]:
    """Of each mini-batch: 1F1B, then the gradients' sum over replicas, then the optimizer.

    Mini-batches differ by one group where their number does not divide the batch.
    """
    found: dict[str, Priced] = {}
    for mini_batch, count in micro_batch_sizes(workload.batch_size, num_mini_batches):
        if not count:
            continue
        num_groups = ceil(mini_batch / allocation.strategy.dp)
        parts = _step_parts(spec, workload, allocation, model, num_groups, schedule)
        for name, priced in parts.items():
            found[name] = found.get(name, ZERO) + priced * (count * num_epochs)
    return found


def _step_parts(
    spec: ModelSpec, workload: Workload, allocation: Allocation, model: CostModel, num_groups: int,
    schedule: Schedule,
) -> Mapping[str, Priced]:  # fmt: skip
    """One optimizer step on ``num_groups`` of the busiest data-parallel rank.

    ``data_parallel`` is what of the sum is not hidden behind the last backward pass; see ``_left``.
    """
    s = allocation.strategy
    again: tuple[Pass, ...] = ()
    if s.recompute != "none":
        again = ("recompute" if s.recompute == "full" else "selective",)
    passes: tuple[Pass, ...] = ("forward", *again, "backward")
    # What does not depend on ZeRO, and what depends on little else, is asked once.
    layout = (allocation.mesh, s.pp, s.tp, s.ep, s.sequence_parallel, allocation.num_micro_batches)
    pipeline = model.once(
        ("pipeline", spec, workload, layout, num_groups, passes, schedule),
        lambda: _pipeline(
            spec, workload, allocation, model, num_groups, passes=passes, schedule=schedule
        ),
    )
    sums, tied, optimizer = model.once(
        ("update", spec, allocation.mesh, s.pp, s.tp, s.ep, s.zero),
        lambda: _update(spec, allocation, model),
    )
    early = schedule.early_sums and model.cluster.kind == "cuda" and s.dp > 1
    last = _last_backward(spec, workload, allocation, model, num_groups, (*again, "backward"))
    left = [
        _left(of_stage, last.of(of_stage.shape).seconds) if early else of_stage.all
        for of_stage in sums
    ]
    data_parallel = max(left, key=lambda cost: cost.seconds) + tied
    return {**pipeline, "data_parallel": data_parallel, "optimizer": optimizer}


class _StageSums(NamedTuple):
    """Sums of a stage's gradients over replicas: of all at once, of its blocks, and of the rest.

    ``rest`` has what comes after them, too: with ZeRO 1 the weights' way back. ``num_buckets``: in
    which the blocks' are begun, 0 where none are begun early.
    """

    shape: StageShape
    all: Priced
    blocks: Priced
    rest: Priced
    num_buckets: int


def _left(sums: _StageSums, backward_s: float) -> Priced:
    """What is left of a stage's sums when its last backward pass, of ``backward_s``, is over.

    Of K buckets, last block first, bucket k is whole after k / K of the pass, and they are summed
    one after the other: D / K seconds each. The last of them ends at the later of
    ``backward_s / K + D`` and ``backward_s + D / K``, so of D there are left

        max(D - (1 - 1 / K) backward_s, D / K)

    What both take from each other (SMs, memory bandwidth) is not modelled.
    """
    whole_s, count = sums.blocks.seconds, sums.num_buckets
    if count == 0 or whole_s == 0.0:
        return sums.all
    left_s = max(whole_s - (1.0 - 1.0 / count) * backward_s, whole_s / count)
    return sums.blocks * (left_s / whole_s) + sums.rest


def _last_backward(
    spec: ModelSpec, workload: Workload, allocation: Allocation, model: CostModel, num_groups: int,
    passes: tuple[Pass, ...],
) -> PassCost:  # fmt: skip
    """The last micro-batch's, of the smallest; nothing where that has no sequence."""
    s = allocation.strategy
    groups = num_groups // allocation.num_micro_batches
    tokens = _tokens(workload, groups)
    return model.stages.passes(
        spec, passes, tp=s.tp, size=tokens.computed if groups else 0, rows=tokens.answers,
        length=_length(workload, model), split_tokens=s.sequence_parallel,
        experts=expert_ranks(allocation.mesh, s), copied=tokens.copied,
    )  # fmt: skip


class _Tokens(NamedTuple):
    """Of a micro-batch: those that are computed, those of answers, and those of whole sequences

    whose keys and values are copied together, 0 where no prompt is shared.
    """

    computed: int
    answers: int
    copied: int


def _tokens(workload: Workload, groups: int) -> _Tokens:
    """Of so many groups, each of which computes its prompt once (``planner.sharing``)."""
    group = expected_group(workload)
    answers = groups * workload.group_size * workload.expected_response_tokens
    copied = round(groups * group.whole) if group.shares else 0
    return _Tokens(max(1, round(groups * group.computed)), max(1, round(answers)), copied)


def _length(workload: Workload, model: CostModel) -> int:
    return max(1, round(attended_tokens(workload, model.cluster.kind)))


def _update(
    spec: ModelSpec, allocation: Allocation, model: CostModel
) -> tuple[Sequence[_StageSums], Priced, Priced]:
    """After a mini-batch: sums of unlike stages, of a tied embedding over its ends, optimizer."""
    s, per_node = allocation.strategy, model.cluster.devices_per_node
    # Stages of one shape at one place in their nodes cost the same.
    unlike = {
        (shape, s.rank(index, 0, 0) % per_node): index
        for index, shape in enumerate(stage_shapes(spec, s.pp))
    }
    sums = [_sums(spec, shape, index, allocation, model) for (shape, _), index in unlike.items()]
    tied = ZERO
    if spec.tied_embedding and s.pp > 1:
        tied = _tied_embedding(spec, allocation, model)
    most_values = max(own_values(spec, shape, s) for shape in set(stage_shapes(spec, s.pp)))
    return sums, tied, Priced.of(model.layer_costs.optimizer_step(most_values))


def _pipeline(
    spec: ModelSpec,
    workload: Workload,
    allocation: Allocation,
    model: CostModel,
    num_groups: int,
    *,
    passes: tuple[Pass, ...],
    schedule: Schedule = EXECUTOR,
) -> Mapping[str, Priced]:
    """``num_groups`` in micro-batches through the stages, ``passes`` on each stage."""
    s = allocation.strategy
    length = _length(workload, model)
    alike = model.stages_alike(spec, allocation)
    directions = 2.0 if "backward" in passes else 1.0
    kinds = []
    for groups, count in micro_batch_sizes(num_groups, allocation.num_micro_batches):
        if not count:
            continue
        size, answers, copied = _tokens(workload, groups)
        cost = model.stages.passes(
            spec, passes, tp=s.tp, size=size, length=length, rows=answers, copied=copied,
            split_tokens=s.sequence_parallel, experts=expert_ranks(allocation.mesh, s),
        )  # fmt: skip
        split = s.sequence_parallel or schedule.scatter_hops
        own = ceil(size / s.tp) if split else size
        hops = model.hops(alike, float(own) * spec.hidden * model.value_bytes, directions)
        if schedule.scatter_hops and not s.sequence_parallel:
            whole_bytes = float(size) * spec.hidden * model.value_bytes
            gather = Priced.of(model.collectives.all_gather(whole_bytes, range(s.tp)), directions)
            hops = [hop + gather for hop in hops[:-1]] + hops[-1:]  # none after the last
        kinds.append(PipelinePass([cost.of(stages.shape) for stages in alike], hops, count))
    return pipeline_parts(kinds, [stages.count for stages in alike], schedule)


def _sums(
    spec: ModelSpec, shape: StageShape, stage: int, allocation: Allocation, model: CostModel
) -> _StageSums:
    """Gradients of a stage, fp32, over its replicas: all-reduced, or with ZeRO 1

    reduce-scattered, and the updated weights all-gathered. Experts that are split over ep have
    dp / ep replicas; of a model with experts nothing is begun early.
    """
    s = allocation.strategy
    first = allocation.mesh.first + s.rank(stage, 0, 0)
    last = first + s.dp * s.tp
    group = range(first, last, s.tp)
    values = stage_values(spec, shape, s.tp, s.ep)
    if s.ep > 1:
        experts = expert_values(spec, shape, s.tp, s.ep)
        of_experts = range(first, last, s.ep * s.tp)
        whole = _over_replicas(values - experts, group, s.zero, model) + _over_replicas(
            experts, of_experts, s.zero, model
        )
        return _StageSums(shape, whole, ZERO, ZERO, 0)
    whole = _over_replicas(values, group, s.zero, model)
    if spec.num_experts:
        return _StageSums(shape, whole, ZERO, ZERO, 0)
    of_blocks = stage_values(spec, StageShape(shape.num_layers, False, False), s.tp)
    blocks = _summed(of_blocks, group, s.zero, model)
    rest = _summed(values - of_blocks, group, s.zero, model) + _gathered(
        values, group, s.zero, model
    )
    block_bytes = GRADIENT_BYTES * of_blocks / shape.num_layers
    num_buckets = ceil(shape.num_layers / ceil(BUCKET_BYTES / block_bytes))
    return _StageSums(shape, whole, blocks, rest, num_buckets)


def _over_replicas(values: int, group: range, zero: int, model: CostModel) -> Priced:
    return _summed(values, group, zero, model) + _gathered(values, group, zero, model)


def _summed(values: int, group: range, zero: int, model: CostModel) -> Priced:
    """Gradients, on every rank or with ZeRO 1 each on its owner."""
    collective = model.collectives.reduce_scatter if zero else model.collectives.all_reduce
    return Priced.of(collective(float(GRADIENT_BYTES) * values, group))


def _gathered(values: int, group: range, zero: int, model: CostModel) -> Priced:
    """Updated weights from their owners."""
    if zero == 0:
        return ZERO
    return Priced.of(model.collectives.all_gather(float(model.value_bytes) * values, group))


def _tied_embedding(spec: ModelSpec, allocation: Allocation, model: CostModel) -> Priced:
    """The first and the last stage each hold the embedding: their gradients are summed."""
    s, mesh = allocation.strategy, allocation.mesh
    pair = range(mesh.first, mesh.first + mesh.num_devices, (s.pp - 1) * s.dp * s.tp)
    num_bytes = float(GRADIENT_BYTES) * spec.embedding_parameters / s.tp
    return Priced.of(model.collectives.all_reduce(num_bytes, pair))
