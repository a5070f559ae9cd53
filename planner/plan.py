"""``ExecutionPlan``: everything that is needed to estimate, read, edit and run one RLHF step.

A plan is data. Search writes it, people edit it, the executor runs it; ``plan_schema.py`` reads
and writes its JSON form. ``validate_plan`` says in one sentence what cannot run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from planner.graph import CallKind, DataflowGraph
from planner.mesh import DeviceMesh, check_mesh
from planner.strategy import ParallelStrategy, strategy_problem
from profiles.errors import PlanError
from profiles.hardware import Cluster
from profiles.models import ModelSpec

# Sequences are dealt one by one; a larger number is a slip of the pen.
MAX_SEQUENCES = 2**20
SCHEMA_VERSION = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The data of one step: ``batch_size`` groups of ``group_size`` sequences each.

    A group is what belongs together: the answers to one prompt, or the chosen and the rejected
    answer of a pair. It is what is dealt to data-parallel ranks, mini-batches and micro-batches,
    never a part of it; sequence ``k`` of group ``g`` has the number ``g * group_size + k``.
    ``prompt_tokens`` is the longest prompt, ``response_tokens`` the longest answer: memory is for
    these. Seconds are for prompts of ``mean_prompt_tokens`` and for answers of
    ``response_lengths``, equally many of each; where these are not given they are the longest (an
    upper bound). Prompts' and answers' lengths are taken as independent.
    """

    batch_size: int
    prompt_tokens: int
    response_tokens: int
    mean_prompt_tokens: float | None = None
    response_lengths: tuple[int, ...] = ()
    group_size: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "prompt_tokens", "response_tokens", "group_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PlanError(
                    f"{value!r} is not a positive whole number", where=f"workload.{name}"
                )
        if self.num_sequences > MAX_SEQUENCES:
            raise PlanError(
                f"{self.num_sequences} sequences per step", where="workload.batch_size",
                remedy=f"at most {MAX_SEQUENCES}",
            )  # fmt: skip
        mean = self.mean_prompt_tokens
        if mean is not None and not 0 < mean <= self.prompt_tokens:
            raise PlanError(
                f"{mean!r} is not above 0 and at most {self.prompt_tokens}",
                where="workload.mean_prompt_tokens",
            )
        for length in self.response_lengths:
            if not 1 <= length <= self.response_tokens:
                raise PlanError(
                    f"{length!r} is not from 1 to response_tokens {self.response_tokens}",
                    where="workload.response_lengths",
                )

    @property
    def num_sequences(self) -> int:
        return self.batch_size * self.group_size

    @property
    def expected_prompt_tokens(self) -> float:
        return self.mean_prompt_tokens or float(self.prompt_tokens)

    @property
    def expected_response_tokens(self) -> float:
        lengths = self.response_lengths
        return sum(lengths) / len(lengths) if lengths else float(self.response_tokens)

    @property
    def expected_tokens(self) -> float:
        """Tokens of one sequence, prompt and answer."""
        return self.expected_prompt_tokens + self.expected_response_tokens

    @property
    def attended_tokens(self) -> float:
        """The length of a sequence as its mean token sees it: E[length^2] / E[length].

        Attention's seconds go with the sum of squares of the lengths, which is that of the tokens
        times this; equal to ``expected_tokens`` where all sequences have one length.
        """
        lengths = self.response_lengths or (self.response_tokens,)
        squares = sum((self.expected_prompt_tokens + length) ** 2 for length in lengths)
        return squares / len(lengths) / self.expected_tokens

    @property
    def max_tokens(self) -> int:
        return self.prompt_tokens + self.response_tokens


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Allocation:
    """Where and how one call runs: its mesh, its strategy, its micro-batches.

    ``num_micro_batches`` counts the micro-batches of one data-parallel rank: of one PPO
    mini-batch for TRAIN, of the rank's whole share for INFER, and for GENERATE the groups of
    sequences that are in flight between pipeline stages. ``generation_batch`` is the most
    sequences of a data-parallel rank that GENERATE decodes at once, 0 for all of them: the others
    enter as rows become free. ``offload``: what only this call needs of its role is in the host's
    memory while it does not run: of a frozen role the weights in this layout, of a TRAIN call the
    optimizer's state and the gradients.
    """

    mesh: DeviceMesh
    strategy: ParallelStrategy
    num_micro_batches: int = 1
    generation_batch: int = 0
    offload: bool = False

    def __post_init__(self) -> None:
        if self.num_micro_batches < 1:
            raise PlanError(f"num_micro_batches is {self.num_micro_batches}, not at least 1")
        if self.generation_batch < 0:
            raise PlanError(f"generation_batch is {self.generation_batch}, below 0")

    def __str__(self) -> str:
        batch = f" of {self.generation_batch}" if self.generation_batch else ""
        host = " offloaded" if self.offload else ""
        return f"{self.mesh} {self.strategy.short} x{self.num_micro_batches}{batch}{host}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What the simulator and the memory model say of a plan.

    ``step_s``: seconds per step in steady state. ``lower_bound_s``: no plan of this problem is
    faster under the same costs. ``per_call_s``: seconds of each call alone. ``peak_bytes``:
    the fullest device. ``provenance``: share of the calls' seconds by origin of the numbers.
    """

    step_s: float
    lower_bound_s: float
    per_call_s: Mapping[str, float]
    peak_bytes: int
    provenance: Mapping[str, float] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """(step - bound) / step: 0.05 means at most 5% faster is possible."""
        return max(0.0, 1.0 - self.lower_bound_s / self.step_s) if self.step_s > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is to be planned: the graph, a model for each role, the data, the cluster.

    ``algorithm`` and ``config`` (resolved, plain JSON values) let the executor rebuild the
    algorithm's functions; ``paths`` names each role's Hugging Face folder, where known.
    """

    algorithm: str
    config: Mapping[str, Any]
    graph: DataflowGraph
    models: Mapping[str, ModelSpec]
    workload: Workload
    cluster: Cluster
    paths: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for role in self.graph.roles:
            if role not in self.models:
                raise PlanError("this role of the graph has no model", where=f"models.{role}")
        for average in self.graph.averages:
            if self.models[average.role] != self.models[average.of]:
                raise PlanError(
                    f"is not of {average.of}'s shape, of which it is an average",
                    where=f"models.{average.role}",
                )

    def spec_of(self, call_name: str) -> ModelSpec | None:
        """The model that a call runs; None for a FUNCTION."""
        role = self.graph.call(call_name).role
        return None if role is None else self.models[role]

    def workload_of(self, call_name: str) -> Workload:
        """The data as a call sees it: of some calls, groups have one sequence."""
        if self.workload.group_size == 1:
            return self.workload
        call = self.graph.call(call_name)
        seen = self.graph.sequences_per_group(call, self.workload.group_size)
        return replace(self.workload, group_size=seen)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionPlan:
    """A problem with one allocation for each call; see ``plan_schema`` for its file."""

    problem: Problem
    allocations: Mapping[str, Allocation]
    seed: int = 0
    estimate: Estimate | None = None
    baselines: Mapping[str, float] = field(default_factory=dict)  # name -> seconds per step
    provenance: Mapping[str, Any] = field(default_factory=dict)  # tool version, profile, date
    schema_version: int = SCHEMA_VERSION

    @property
    def num_devices(self) -> int:
        return self.problem.cluster.num_devices

    def __str__(self) -> str:
        """For tables of plans: what of, and how fast."""
        seconds = f", {self.estimate.step_s:.4g} s a step" if self.estimate else ""
        return f"{self.problem.graph.name} on {self.problem.cluster.name}{seconds}"


def largest_dp(problem: Problem, call_name: str) -> int:
    """The most data-parallel ranks that all get at least one group of every mini-batch."""
    call = problem.graph.call(call_name)
    return problem.workload.batch_size // call.num_mini_batches


def allocation_problem(problem: Problem, call_name: str, allocation: Allocation) -> str | None:
    """Why a call cannot run under an allocation, or None."""
    reason = strategy_problem(
        problem.spec_of(call_name), allocation.strategy, allocation.mesh, problem.cluster
    )
    if reason is not None:
        return reason
    s, most = allocation.strategy, largest_dp(problem, call_name)
    if s.dp > most:
        return f"dp {s.dp} exceeds the {most} groups of a mini-batch"
    if allocation.num_micro_batches > max(1, most // s.dp):
        return (
            f"{allocation.num_micro_batches} micro-batches of {most // s.dp} groups "
            f"on each data-parallel rank"
        )
    if s.zero and problem.graph.call(call_name).kind is not CallKind.TRAIN:
        return "ZeRO applies to TRAIN calls only"
    if s.recompute != "none" and problem.graph.call(call_name).kind is not CallKind.TRAIN:
        return "recomputation applies to TRAIN calls only"
    if s.sequence_parallel and problem.graph.call(call_name).kind is CallKind.GENERATE:
        return "sequence_parallel applies to INFER and TRAIN calls only"
    if allocation.generation_batch and problem.graph.call(call_name).kind is not CallKind.GENERATE:
        return "generation_batch applies to GENERATE calls only"
    if 0 < allocation.generation_batch < allocation.num_micro_batches:
        return (
            f"generation_batch {allocation.generation_batch} is less than one sequence for each of "
            f"{allocation.num_micro_batches} micro-batches"
        )
    return offload_problem(problem, call_name) if allocation.offload else None


def offload_problem(problem: Problem, call_name: str) -> str | None:
    """Why nothing of a call's role can be in the host's memory between calls, or None."""
    call = problem.graph.call(call_name)
    if call.role is None:
        return "offload applies to calls with a model only"
    if call.kind is not CallKind.TRAIN and problem.graph.train_call(call.role) is not None:
        return f"offload of {call.role}, which is trained, applies to its TRAIN call only"
    if any(average.role == call.role for average in problem.graph.averages):
        return f"{call.role} is an average over steps, which cannot be offloaded"
    return None


def validate_plan(plan: ExecutionPlan) -> None:
    """Raise ``PlanError`` with the call's name unless every call of the plan can run."""
    problem = plan.problem
    names = {call.name for call in problem.graph.calls}
    for name in plan.allocations:
        if name not in names:
            raise PlanError(
                f"'{name}' is not a call of {problem.graph.name}", where="allocations",
                remedy=f"calls: {', '.join(sorted(names))}",
            )  # fmt: skip
    for call in problem.graph.calls:
        where = f"allocations.{call.name}"
        if call.name not in plan.allocations:
            raise PlanError("missing", where=where, remedy="every call needs an allocation")
        allocation = plan.allocations[call.name]
        check_mesh(allocation.mesh, problem.cluster, where=f"{where}.mesh")
        reason = allocation_problem(problem, call.name, allocation)
        if reason is not None:
            raise PlanError(reason, where=where)
    _check_shared_weights(plan)


def _check_shared_weights(plan: ExecutionPlan) -> None:
    """Calls that read one copy of a frozen role's weights all offload it, or none does."""
    seen: dict[tuple[object, ...], str] = {}
    for call in plan.problem.graph.calls:
        if call.role is None or plan.problem.graph.train_call(call.role) is not None:
            continue
        allocation = plan.allocations[call.name]
        s = allocation.strategy
        other = seen.setdefault((call.role, allocation.mesh, s.pp, s.tp, s.dp, s.ep), call.name)
        if plan.allocations[other].offload != allocation.offload:
            raise PlanError(
                f"is {str(allocation.offload).lower()}, but {other} reads the same weights of "
                f"{call.role} and has {str(not allocation.offload).lower()}",
                where=f"allocations.{call.name}.offload", remedy="set both alike",
            )  # fmt: skip
