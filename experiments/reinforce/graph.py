"""The graph of REINFORCE++ and RLOO (no torch): as GRPO's."""

from __future__ import annotations

from collections.abc import Mapping

from experiments.parts import ROLES_WITHOUT_CRITIC, graph_without_critic, workload_of
from experiments.reinforce.config import ReinforceExperiment
from planner.algorithm import Algorithm, RoleSpec
from planner.graph import DataflowGraph
from planner.plan import Workload


def build_graph(config: ReinforceExperiment) -> DataflowGraph:
    """Three calls, four with a KL term."""
    config.check()
    return graph_without_critic("reinforce", config, config.reinforce)


def workload(config: ReinforceExperiment) -> Workload:
    return workload_of(config, group_size=config.samples_per_prompt)


def roles(config: ReinforceExperiment) -> Mapping[str, RoleSpec]:
    return ROLES_WITHOUT_CRITIC


ALGORITHM = Algorithm(
    name="reinforce",
    config_class=ReinforceExperiment,
    graph=build_graph,
    workload=workload,
    roles=roles,
    functions="experiments.reinforce.functions",
)
