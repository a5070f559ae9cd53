"""Seconds of one call under one allocation: ``call_cost`` is the entry, ``CostModel`` what prices.

``stage.py`` prices a stage, ``pipeline.py`` puts micro-batches through stages, ``train.py`` and
``generate.py`` build calls from them; ``transfer.py`` prices what moves between calls, and
``offload.py`` what moves between a device and its host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil

from planner.cost.generate import generate_parts
from planner.cost.model import CallCost, CostModel
from planner.cost.stage import Priced
from planner.cost.train import infer_parts, train_parts
from planner.graph import CallKind
from planner.mesh import DeviceMesh
from planner.plan import Allocation, Problem

__all__ = ["CallCost", "CostModel", "call_cost"]


def call_cost(
    problem: Problem, call_name: str, allocation: Allocation, model: CostModel
) -> CallCost:
    """Seconds of a call alone on its mesh, every sequence at the workload's mean length.

    What is offloaded is there: bringing it is priced by ``offload.swap_cost``.

    The busiest data-parallel rank counts. Answers are kept in ``model``. The allocation must be
    legal (``plan.allocation_problem``). Nodes are equal, so a mesh costs the same wherever it is.
    """
    call = problem.graph.call(call_name)
    spec = problem.spec_of(call_name)
    allocation = _at_the_start(allocation, model)
    workload = problem.workload_of(call_name)
    passes = (call.num_mini_batches, call.num_epochs)
    question = (call.kind, passes, spec, workload, allocation)
    known = model.known_calls.get(question)
    if known is not None:
        return known
    parts: Mapping[str, Priced]
    if spec is None:
        num_sequences = ceil(workload.batch_size / allocation.strategy.dp) * workload.group_size
        parts = {"compute": Priced.modelled(model.function_s * num_sequences)}
    elif call.kind is CallKind.GENERATE:
        parts = generate_parts(spec, workload, allocation, model)
    elif call.kind is CallKind.TRAIN:
        parts = train_parts(
            spec, workload, allocation, model, num_mini_batches=call.num_mini_batches,
            num_epochs=call.num_epochs,
        )  # fmt: skip
    else:
        parts = infer_parts(spec, workload, allocation, model)
    cost = CallCost.of(parts, model.corrections.get(call.kind.value, 1.0))
    model.known_calls[question] = cost
    return cost


def _at_the_start(allocation: Allocation, model: CostModel) -> Allocation:
    """The same allocation on the first devices that are wired like its own, not offloaded."""
    mesh, per_node = allocation.mesh, model.cluster.devices_per_node
    first = mesh.first % per_node
    first = 0 if first + mesh.num_devices <= per_node else first
    if first == mesh.first and not allocation.offload:
        return allocation
    return replace(allocation, mesh=DeviceMesh(first, mesh.num_devices), offload=False)
