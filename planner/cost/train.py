"""Seconds of INFER and TRAIN calls."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

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
    Pass,
    Priced,
    StageShape,
    expert_ranks,
    expert_values,
    own_values,
    stage_shapes,
    stage_values,
)
from planner.plan import Allocation, Workload
from profiles.models import ModelSpec


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

    The three do not overlap, as the executor runs them: ``data_parallel`` is the most that
    overlapping could save.
    """
    s = allocation.strategy
    mini_batch = ceil(workload.batch_size / num_mini_batches)
    passes: tuple[Pass, ...] = ("forward", "backward")
    if s.recompute != "none":
        again: Pass = "recompute" if s.recompute == "full" else "selective"
        passes = ("forward", again, "backward")
    num_groups = ceil(mini_batch / s.dp)
    # What does not depend on ZeRO, and what depends on little else, is asked once.
    layout = (allocation.mesh, s.pp, s.tp, s.ep, s.sequence_parallel, allocation.num_micro_batches)
    pipeline = model.once(
        ("pipeline", spec, workload, layout, num_groups, passes, schedule),
        lambda: _pipeline(
            spec, workload, allocation, model, num_groups, passes=passes, schedule=schedule
        ),
    )
    update = model.once(
        ("update", spec, allocation.mesh, s.pp, s.tp, s.ep, s.zero),
        lambda: _update(spec, allocation, model),
    )
    parts = {**pipeline, **update}
    return {name: priced * (num_mini_batches * num_epochs) for name, priced in parts.items()}


def _update(spec: ModelSpec, allocation: Allocation, model: CostModel) -> Mapping[str, Priced]:
    """After a mini-batch: data_parallel and optimizer."""
    s = allocation.strategy
    reduced = _reductions(spec, allocation, model)
    if spec.tied_embedding and s.pp > 1:
        reduced = reduced + _tied_embedding(spec, allocation, model)
    most_values = max(own_values(spec, shape, s) for shape in set(stage_shapes(spec, s.pp)))
    return {
        "data_parallel": reduced,
        "optimizer": Priced.of(model.layer_costs.optimizer_step(most_values)),
    }


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
    length = max(1, round(workload.attended_tokens))
    alike = model.stages_alike(spec, allocation)
    directions = 2.0 if "backward" in passes else 1.0
    kinds = []
    for groups, count in micro_batch_sizes(num_groups, allocation.num_micro_batches):
        if not count:
            continue
        sequences = groups * workload.group_size
        size = max(1, round(sequences * workload.expected_tokens))
        answers = max(1, round(sequences * workload.expected_response_tokens))
        cost = model.stages.passes(
            spec, passes, tp=s.tp, size=size, length=length, rows=answers,
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


def _reductions(spec: ModelSpec, allocation: Allocation, model: CostModel) -> Priced:
    """The slowest stage's; those of one shape at one place in their nodes cost the same."""
    s, per_node = allocation.strategy, model.cluster.devices_per_node
    unlike = {
        (shape, s.rank(index, 0, 0) % per_node): index
        for index, shape in enumerate(stage_shapes(spec, s.pp))
    }
    costs = (
        _reduction(spec, shape, index, allocation, model) for (shape, _), index in unlike.items()
    )
    return max(costs, key=lambda cost: cost.seconds)


def _reduction(
    spec: ModelSpec, shape: StageShape, stage: int, allocation: Allocation, model: CostModel
) -> Priced:
    """Gradients of a stage, fp32, over its replicas: all-reduced, or with ZeRO 1

    reduce-scattered, and the updated weights all-gathered. Experts that are split over ep have
    dp / ep replicas.
    """
    s = allocation.strategy
    first = allocation.mesh.first + s.rank(stage, 0, 0)
    last = first + s.dp * s.tp
    values = stage_values(spec, shape, s.tp, s.ep)
    if s.ep == 1:
        return _over_replicas(values, range(first, last, s.tp), s.zero, model)
    experts = expert_values(spec, shape, s.tp, s.ep)
    rest = _over_replicas(values - experts, range(first, last, s.tp), s.zero, model)
    return rest + _over_replicas(experts, range(first, last, s.ep * s.tp), s.zero, model)


def _over_replicas(values: int, group: range, zero: int, model: CostModel) -> Priced:
    if zero == 0:
        return Priced.of(model.collectives.all_reduce(float(GRADIENT_BYTES) * values, group))
    scatter = model.collectives.reduce_scatter(float(GRADIENT_BYTES) * values, group)
    gather = model.collectives.all_gather(float(model.value_bytes) * values, group)
    return Priced.of(scatter) + Priced.of(gather)


def _tied_embedding(spec: ModelSpec, allocation: Allocation, model: CostModel) -> Priced:
    """The first and the last stage each hold the embedding: their gradients are summed."""
    s, mesh = allocation.strategy, allocation.mesh
    pair = range(mesh.first, mesh.first + mesh.num_devices, (s.pp - 1) * s.dp * s.tp)
    num_bytes = float(GRADIENT_BYTES) * spec.embedding_parameters / s.tp
    return Priced.of(model.collectives.all_reduce(num_bytes, pair))
