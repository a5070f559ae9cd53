"""The graph of reward modelling (no torch): one call on pairs.

sequences (of the data set: chosen, rejected) -> reward_train
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments.parts import SEQUENCES, workload_of
from experiments.reward.config import RewardExperiment
from planner.algorithm import Algorithm, RoleSpec
from planner.graph import CallKind, DataflowGraph, ModelFunctionCall
from planner.plan import Workload


def build_graph(config: RewardExperiment) -> DataflowGraph:
    """One TRAIN call; a group is a pair, its chosen sequence first."""
    config.check()
    inputs = ("sequences", "prompt_lengths")
    train = ModelFunctionCall(
        name="reward_train", kind=CallKind.TRAIN, role="reward", inputs=inputs
    )
    return DataflowGraph(
        name="reward", keys=SEQUENCES, source_keys=frozenset(inputs), calls=(train,)
    )


def workload(config: RewardExperiment) -> Workload:
    return workload_of(config, group_size=2)


def roles(config: RewardExperiment) -> Mapping[str, RoleSpec]:
    return {"reward": RoleSpec(source="model", head="scalar")}


ALGORITHM = Algorithm(
    name="reward",
    config_class=RewardExperiment,
    graph=build_graph,
    workload=workload,
    roles=roles,
    functions="experiments.reward.functions",
    data="pairs",
)
