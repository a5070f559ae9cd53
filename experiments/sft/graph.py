"""The graph of supervised fine-tuning (no torch): one call.

sequences (of the data set) -> actor_train
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments.parts import SEQUENCES, workload_of
from experiments.sft.config import SFTExperiment
from planner.algorithm import Algorithm, RoleSpec
from planner.graph import CallKind, DataflowGraph, ModelFunctionCall


def build_graph(config: SFTExperiment) -> DataflowGraph:
    """One TRAIN call on sequences of the data set."""
    config.check()
    inputs = ("sequences", "prompt_lengths")
    train = ModelFunctionCall(name="actor_train", kind=CallKind.TRAIN, role="actor", inputs=inputs)
    return DataflowGraph(name="sft", keys=SEQUENCES, source_keys=frozenset(inputs), calls=(train,))


def roles(config: SFTExperiment) -> Mapping[str, RoleSpec]:
    return {"actor": RoleSpec(source="model", head="lm")}


ALGORITHM = Algorithm(
    name="sft",
    config_class=SFTExperiment,
    graph=build_graph,
    workload=workload_of,
    roles=roles,
    functions="experiments.sft.functions",
    data="answers",
)
