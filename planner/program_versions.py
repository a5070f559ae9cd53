"""Which version of its weights every call of a program reads, and whose data: ``check_versions``.

A version is the number of steps that have trained the role. Instructions are taken in their
global order, which every rank follows, over as many steps as it takes to see all that may differ:
what was made before the first step, and two steps after one another.
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.graph import CallKind, DataflowGraph
from planner.instructions import (
    Average,
    ByRank,
    Free,
    Function,
    Generate,
    Infer,
    Instruction,
    Load,
    Program,
    Reallocate,
    Train,
    Transfer,
)
from planner.layout import Layout
from planner.plan import ExecutionPlan
from profiles.errors import PlanError

NUM_STEPS = 3  # the last of them works for none after it


def check_versions(plan: ExecutionPlan, program: Program) -> None:
    """Raise ``PlanError`` where a call would read other weights, or data of another step.

    In step k every call reads weights that k steps have trained, but those that work for step
    k + 1: at most ``max_staleness`` trainings may come between their weights and that step.
    """
    whole = _Versions(plan)
    whole.run(program.setup, step=0)
    if program.ahead is None:
        for step in range(NUM_STEPS):
            whole.run(program.step, step=step)
        return
    whole.run(program.ahead.first, step=-1)
    for step in range(NUM_STEPS - 1):
        whole.run(program.step, step=step)
    whole.run(program.ahead.last, step=NUM_STEPS - 1)
    alone = _Versions(plan, alone=True)
    alone.run(program.setup, step=0)
    alone.run(program.ahead.alone, step=0)


class _Versions:
    """Versions of weights by (role, layout), and by call the step that its data are for."""

    def __init__(self, plan: ExecutionPlan, *, alone: bool = False) -> None:
        self.plan = plan
        self.graph: DataflowGraph = plan.problem.graph
        self.ahead = frozenset() if alone else frozenset(c.name for c in self.graph.ahead)
        self.weights: dict[tuple[str, Layout], int] = {}
        self.made: dict[str, int] = {}

    def run(self, program: ByRank, *, step: int) -> None:
        """``step``: that the instructions are of; -1: they only work for step 0."""
        for instruction in _in_order(program):
            if isinstance(instruction, Load):
                self.weights[instruction.role, instruction.layout] = 0
            elif isinstance(instruction, Reallocate):
                version = self._read(instruction.role, instruction.source, instruction)
                self.weights[instruction.role, instruction.destination] = version
            elif isinstance(instruction, Free):
                del self.weights[instruction.role, instruction.layout]
            elif isinstance(instruction, Average):
                version = self._read(instruction.of, instruction.layout, instruction)
                self._expect(instruction, f"averages {instruction.of}", step + 1 - version, 0)
            elif isinstance(instruction, Transfer):
                made = self.made.get(instruction.producer, -1)
                self._expect(instruction, f"moves {instruction.producer}'s data", step - made, 0)
            elif isinstance(instruction, Generate | Infer | Train | Function):
                self._call(instruction, step)

    def _call(self, instruction: Generate | Infer | Train | Function, step: int) -> None:
        call, allocation = self.graph.call(instruction.call), self.plan.allocations
        works_for = step + (call.name in self.ahead)
        self.made[call.name] = works_for
        if call.kind is CallKind.FUNCTION or call.role is None:
            return
        if self.graph.train_call(call.role) is None:
            return  # frozen
        place = allocation[call.name]
        layout = Layout.of(self.plan.problem.models[call.role], place.mesh, place.strategy)
        version = self._read(call.role, layout, instruction)
        most = self.graph.max_staleness if call.name in self.ahead else 0
        self._expect(instruction, f"{call.name} reads {call.role}", works_for - version, most)
        if call.kind is CallKind.TRAIN:
            self.weights[call.role, layout] = version + 1

    def _read(self, role: str, layout: Layout, instruction: Instruction) -> int:
        if (role, layout) not in self.weights:
            raise PlanError(
                f"reads {role} in {layout.key}, which is not there",
                where=f"instruction {instruction.index}",
            )
        return self.weights[role, layout]

    def _expect(self, instruction: Instruction, what: str, behind: int, most: int) -> None:
        if not 0 <= behind <= most:
            raise PlanError(
                f"{what} {behind} steps behind, at most {most} are allowed",
                where=f"instruction {instruction.index}",
            )


def _in_order(program: ByRank) -> Iterable[Instruction]:
    """Every instruction once."""
    found = {i.index: i for own in program.values() for i in own}
    return (found[index] for index in sorted(found))
