"""The graph of batch inference (no torch): generate and write.

prompts -> actor_gen -> sequences -> write
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments.generation.config import GenerationExperiment
from experiments.parts import FINISHED, PROMPTS, SEQUENCES, actor_gen, workload_of
from planner.algorithm import Algorithm, RoleSpec
from planner.graph import CallKind, DataflowGraph, ModelFunctionCall
from planner.plan import Workload


def build_graph(config: GenerationExperiment) -> DataflowGraph:
    """Two calls; ``write`` has no output but its file."""
    config.check()
    answers = ("sequences", "prompt_lengths", "finished")
    return DataflowGraph(
        name="generation",
        keys=(PROMPTS, *SEQUENCES, FINISHED),
        source_keys=frozenset({"prompts"}),
        calls=(
            actor_gen(*answers),
            ModelFunctionCall(name="write", kind=CallKind.FUNCTION, role=None, inputs=answers),
        ),
    )


def workload(config: GenerationExperiment) -> Workload:
    return workload_of(config, group_size=config.samples_per_prompt)


def roles(config: GenerationExperiment) -> Mapping[str, RoleSpec]:
    return {"actor": RoleSpec(source="model", head="lm")}


ALGORITHM = Algorithm(
    name="generation",
    config_class=GenerationExperiment,
    graph=build_graph,
    workload=workload,
    roles=roles,
    functions="experiments.generation.functions",
)
