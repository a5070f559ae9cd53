"""DPO's graph (no torch): the reference reads the pairs, the actor trains on them.

sequences (of the data set: chosen, rejected) -> ref_inf -> actor_train
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments.dpo.config import DPOExperiment
from experiments.parts import SEQUENCES, workload_of
from planner.algorithm import Algorithm, RoleSpec
from planner.graph import CallKind, DataflowGraph, DataKey, ModelFunctionCall
from planner.plan import Workload

# Of a whole answer: the sum over its tokens.
REF_ANSWER_LOG_PROBS = DataKey(name="ref_answer_log_probs", per="sequence")


def build_graph(config: DPOExperiment) -> DataflowGraph:
    """Two calls; a group is a pair, its chosen sequence first."""
    config.check()
    inputs = ("sequences", "prompt_lengths")
    return DataflowGraph(
        name="dpo",
        keys=(*SEQUENCES, REF_ANSWER_LOG_PROBS),
        source_keys=frozenset(inputs),
        calls=(
            ModelFunctionCall(
                name="ref_inf", kind=CallKind.INFER, role="ref", inputs=inputs,
                outputs=("ref_answer_log_probs",),
            ),
            ModelFunctionCall(
                name="actor_train", kind=CallKind.TRAIN, role="actor",
                inputs=(*inputs, "ref_answer_log_probs"),
            ),
        ),
    )  # fmt: skip


def workload(config: DPOExperiment) -> Workload:
    return workload_of(config, group_size=2)


def roles(config: DPOExperiment) -> Mapping[str, RoleSpec]:
    return {role: RoleSpec(source="model", head="lm") for role in ("actor", "ref")}


ALGORITHM = Algorithm(
    name="dpo",
    config_class=DPOExperiment,
    graph=build_graph,
    workload=workload,
    roles=roles,
    functions="experiments.dpo.functions",
    data="pairs",
)
