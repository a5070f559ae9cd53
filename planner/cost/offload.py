"""Seconds in which a role's state goes to the host's memory and comes back: ``swap_cost``."""

from __future__ import annotations

from dataclasses import dataclass

from planner.cost.model import CostModel, Costs
from planner.cost.stage import stage_shapes
from planner.graph import CallKind
from planner.memory import held_memory
from planner.plan import Allocation, Problem
from planner.strategy import ParallelStrategy
from profiles.models import ModelSpec


@dataclass(frozen=True, slots=True)
class SwapCost:
    """Seconds before a call (``reload_s``) and after it (``offload_s``) on its slowest device."""

    reload_s: float = 0.0
    offload_s: float = 0.0


NO_SWAP = SwapCost()


def swap_cost(problem: Problem, call_name: str, allocation: Allocation, costs: Costs) -> SwapCost:
    """Bytes of the fullest stage over the host link, one latency each way; every device has its own

    link (``ClusterSpec.host_link``). A frozen role's weights come, and are dropped: the host still
    has them. Of a trained role the optimizer's state comes and goes; gradients are written as zeros
    at the speed of the memory. Nothing where the call is not offloaded.
    """
    spec = problem.spec_of(call_name)
    if not allocation.offload or spec is None:
        return NO_SWAP
    trained, s = problem.graph.call(call_name).kind is CallKind.TRAIN, allocation.strategy
    model, _ = costs.at(allocation.mesh)
    # Of the allocation only its layout and its ZeRO stage matter.
    question = ("swap", spec, trained, s.pp, s.tp, s.dp, s.ep, s.zero)
    return model.once(question, lambda: _swap_cost(spec, trained, s, model))


def _swap_cost(
    spec: ModelSpec, trained: bool, s: ParallelStrategy, model: CostModel
) -> SwapCost:  # fmt: skip
    device = model.cluster.device
    shapes = stage_shapes(spec, s.pp)
    firsts = [shapes.index(shape) for shape in set(shapes)]  # stages of one shape hold as much
    held = [held_memory(spec, s, stage, device.kind, trained=trained) for stage in firsts]
    host = model.cluster.host_link
    moved_bytes = max(need.optimizer if trained else need.weights for need in held)
    one_way_s = host.latency_s + moved_bytes / host.bytes_per_s
    if not trained:
        return SwapCost(reload_s=one_way_s)
    cleared_s = max(need.gradients for need in held) / device.memory_bytes_per_s
    return SwapCost(reload_s=one_way_s + cleared_s, offload_s=one_way_s)
