"""GRPO's graph (no torch): ``parts.graph_without_critic``; a group is a prompt's answers."""

from __future__ import annotations

from collections.abc import Mapping

from experiments.grpo.config import GRPOExperiment
from experiments.parts import ROLES_WITHOUT_CRITIC, graph_without_critic, workload_of
from planner.algorithm import Algorithm, RoleSpec
from planner.graph import DataflowGraph
from planner.plan import Workload


def build_graph(config: GRPOExperiment) -> DataflowGraph:
    """Three calls, four with a KL term."""
    config.check()
    return graph_without_critic("grpo", config, config.grpo)


def workload(config: GRPOExperiment) -> Workload:
    return workload_of(config, group_size=config.samples_per_prompt)


def roles(config: GRPOExperiment) -> Mapping[str, RoleSpec]:
    return ROLES_WITHOUT_CRITIC


ALGORITHM = Algorithm(
    name="grpo",
    config_class=GRPOExperiment,
    graph=build_graph,
    workload=workload,
    roles=roles,
    functions="experiments.grpo.functions",
)
