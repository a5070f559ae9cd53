"""Seconds of one call under one allocation: ``call_cost`` is the entry, ``CostModel`` what prices.

``stage.py`` prices a stage, ``pipeline.py`` puts micro-batches through stages, ``train.py`` and
``generate.py`` build calls from them; ``transfer.py`` prices what moves between calls, and
``offload.py`` what moves between a device and its host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import NamedTuple

from planner.cost.generate import generate_parts
from planner.cost.model import CallCost, CostModel, Costs, MixedCosts
from planner.cost.stage import Priced
from planner.cost.train import infer_parts, train_parts
from planner.graph import CallKind, ModelFunctionCall
from planner.mesh import DeviceMesh
from planner.plan import Allocation, Problem, Workload
from profiles.models import ModelSpec

__all__ = ["CallCost", "CostModel", "Costs", "MixedCosts", "call_cost", "call_seconds"]


def call_cost(problem: Problem, call_name: str, allocation: Allocation, costs: Costs) -> CallCost:
    """Seconds of a call alone on its mesh, every sequence at the workload's mean length.

    What is offloaded is there: bringing it is priced by ``offload.swap_cost``.

    The busiest data-parallel rank counts. The allocation must be legal
    (``plan.allocation_problem``). Nodes of a group are equal, so a mesh costs the same wherever in
    its group it is.
    """
    call = problem.graph.call(call_name)
    model, allocation = _in_its_group(allocation, costs)
    question = _question(problem, call, allocation, model)
    return CallCost.of(_parts(question, model), model.corrections.get(call.kind.value, 1.0))


def call_seconds(
    problem: Problem, call: ModelFunctionCall, allocation: Allocation, costs: Costs
) -> float:
    """The seconds of ``call_cost``, which are kept by ``costs``: a search asks for thousands."""
    model, allocation = _in_its_group(allocation, costs)
    question = _question(problem, call, allocation, model)
    seconds = model.known_calls.get(question)
    if seconds is None:
        factor = model.corrections.get(call.kind.value, 1.0)
        parts = _parts(question, model).values()
        seconds = model.known_calls[question] = sum(part.seconds * factor for part in parts)
    return seconds


class _Question(NamedTuple):
    """All that a call's seconds depend on."""

    kind: CallKind
    num_mini_batches: int
    num_epochs: int
    spec: ModelSpec | None
    workload: Workload
    allocation: Allocation


def _question(
    problem: Problem, call: ModelFunctionCall, allocation: Allocation, model: CostModel
) -> _Question:
    return _Question(
        call.kind, call.num_mini_batches, call.num_epochs, problem.spec_of(call.name),
        problem.workload_of(call.name), _at_the_start(allocation, model),
    )  # fmt: skip


def _parts(question: _Question, model: CostModel) -> Mapping[str, Priced]:
    kind, num_mini_batches, num_epochs, spec, workload, allocation = question
    if spec is None:
        num_sequences = ceil(workload.batch_size / allocation.strategy.dp) * workload.group_size
        return {"compute": Priced.modelled(model.function_s * num_sequences)}
    if kind is CallKind.GENERATE:
        return generate_parts(spec, workload, allocation, model)
    if kind is CallKind.TRAIN:
        return train_parts(
            spec, workload, allocation, model, num_mini_batches=num_mini_batches,
            num_epochs=num_epochs,
        )  # fmt: skip
    return infer_parts(spec, workload, allocation, model)


def _in_its_group(allocation: Allocation, costs: Costs) -> tuple[CostModel, Allocation]:
    """What prices the allocation, and the same allocation on devices as numbered there."""
    model, mesh = costs.at(allocation.mesh)
    return model, allocation if mesh is allocation.mesh else replace(allocation, mesh=mesh)


def _at_the_start(allocation: Allocation, model: CostModel) -> Allocation:
    """The same allocation on the first devices that are wired like its own, not offloaded."""
    mesh, per_node = allocation.mesh, model.cluster.devices_per_node
    first = mesh.first % per_node
    first = 0 if first + mesh.num_devices <= per_node else first
    if first == mesh.first and not allocation.offload:
        return allocation
    return replace(allocation, mesh=DeviceMesh(first, mesh.num_devices), offload=False)
