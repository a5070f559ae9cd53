"""``Exported``: a plan as options of another system; ``Draft``: the same while it is written."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

from planner.graph import CallKind, ModelFunctionCall
from planner.plan import Allocation, ExecutionPlan
from planner.report import strategy_text
from profiles.errors import ConfigError
from profiles.hardware import ClusterSpec

Value = str | int | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """``settings``: options with their values, in the system's own words and order.

    ``command``: what they are arguments of. ``flags``: options are ``--name value``, not
    ``name=value``.
    """

    system: str
    version: str
    command: str
    settings: Mapping[str, Value]
    lost: tuple[str, ...]
    flags: bool = False

    @property
    def text(self) -> str:
        """A shell command with its options, what cannot be said above it as comments."""
        lines = [f"# {self.system}, options as of {self.version}"]
        lines += ["# What the plan says and these options cannot:"] if self.lost else []
        lines += [f"#   {sentence}" for sentence in self.lost]
        words = [self._word(name, value) for name, value in self.settings.items()]
        return "\n".join(lines) + "\n" + " \\\n    ".join([self.command, *words]) + "\n"

    def _word(self, name: str, value: Value) -> str:
        if self.flags:
            return f"--{name}" if value is True else f"--{name} {shlex.quote(str(value))}"
        return f"{name}={shlex.quote(str(value))}"


@dataclass(slots=True, kw_only=True)
class Draft:
    """Settings and losses while they are written, and what the exporters ask of a plan."""

    plan: ExecutionPlan
    settings: dict[str, Value] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    def find(self, kind: CallKind, role: str) -> tuple[ModelFunctionCall, Allocation] | None:
        """The first call of a kind and role, with its allocation."""
        for call in self.plan.problem.graph.calls:
            if call.kind is kind and call.role == role:
                return call, self.plan.allocations[call.name]
        return None

    def need(self, kind: CallKind, role: str) -> tuple[ModelFunctionCall, Allocation]:
        found = self.find(kind, role)
        assert found is not None, (kind, role)
        return found

    @property
    def devices(self) -> int:
        return self.plan.num_devices

    @property
    def samples(self) -> int:
        """Answers to a prompt."""
        return self.plan.problem.workload.group_size

    def mini_batch(self, call: ModelFunctionCall) -> int:
        """Prompts of an optimizer step."""
        return ceil(self.plan.problem.workload.batch_size / call.num_mini_batches)

    def micro_batch(self, call: ModelFunctionCall, allocation: Allocation, dp: int) -> int:
        """Sequences of a micro-batch of one of ``dp`` ranks, in as many as the plan has."""
        share = ceil(self.mini_batch(call) * self.samples / dp)
        return ceil(share / allocation.num_micro_batches)

    def compare_twins(self, system: str, call: str, other: str) -> None:
        """One layout for two calls: told where the plan has two."""
        plan = self.plan.allocations
        if call in plan and other in plan:
            a, b = plan[call], plan[other]
            if (a.mesh, a.strategy.short) != (b.mesh, b.strategy.short):
                self.lost.append(
                    f"{system} runs {call} in the layout of {other} ({strategy_text(b)} on "
                    f"{b.mesh}); the plan has {strategy_text(a)} on {a.mesh}"
                )

    def staleness(self, how: str) -> None:
        if self.plan.problem.graph.max_staleness:
            self.lost.append(how)


def nodes_of(plan: ExecutionPlan, allocation: Allocation) -> tuple[int, int]:
    """(nodes, devices of each) of a mesh."""
    nodes = plan.problem.cluster.group_of(allocation.mesh.first)
    per_node = min(nodes.devices_per_node, allocation.mesh.num_devices)
    return allocation.mesh.num_devices // per_node, per_node


def equal_nodes(plan: ExecutionPlan, system: str) -> ClusterSpec:
    """The plan's cluster; raises ``ConfigError`` where it has unlike nodes."""
    cluster = plan.problem.cluster
    if not isinstance(cluster, ClusterSpec):
        raise ConfigError(
            f"{system} takes a number of equal nodes, the plan is for {cluster.name}",
            where="--to", remedy="export a plan for one of its groups",
        )  # fmt: skip
    return cluster


def unknown(plan: ExecutionPlan, system: str, known: list[str]) -> ConfigError:
    return ConfigError(
        f"{system} is not told of {plan.problem.algorithm}", where="--to",
        remedy=f"export a plan of {', '.join(known)}",
    )  # fmt: skip


def lose_experts(draft: Draft, system: str, *, megatron: bool = False) -> None:
    """Calls whose experts are split over ep, of which the settings say nothing.

    ``megatron``: they do of calls that train or infer.
    """
    for call in draft.plan.problem.graph.calls:
        ep = draft.plan.allocations[call.name].strategy.ep
        if ep > 1 and not (megatron and call.kind is not CallKind.GENERATE):
            draft.lost.append(f"{call.name}: experts over ep {ep} are not said to {system}")


def lose_averages(draft: Draft, system: str) -> None:
    for average in draft.plan.problem.graph.averages:
        draft.lost.append(f"{average.role} as a moving average of {average.of}: not in {system}")
