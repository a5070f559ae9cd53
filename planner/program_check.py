"""Static proof that a program cannot hang: every send has its receive, and no wait is circular.

``check_program`` plays the program with every rank as slow as it may be: calls and
reallocations are rendezvous of all their ranks, sends never wait, receives wait for their
send. If that play reaches the end, so does every real execution, whose waits are a subset.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

from planner.graph import CallKind
from planner.layout import Layout
from planner.plan import ExecutionPlan
from planner.program import (
    Average,
    ByRank,
    Free,
    Function,
    Generate,
    Infer,
    Instruction,
    Load,
    Offload,
    Offloaded,
    Program,
    Reallocate,
    Reload,
    Train,
    Transfer,
    on_policy,
    what_leaves,
)
from planner.program_versions import check_versions
from profiles.errors import PlanError


def _participants(instruction: Instruction, plan: ExecutionPlan) -> frozenset[int]:
    """Ranks that an instruction makes wait for each other; empty where none does."""
    if isinstance(instruction, Generate | Infer | Train):
        return frozenset(plan.allocations[instruction.call].mesh.devices)
    if isinstance(instruction, Reallocate):
        source, destination = instruction.source.mesh, instruction.destination.mesh
        return frozenset({*source.devices, *destination.devices})
    return frozenset()


def check_program(plan: ExecutionPlan, program: Program) -> None:
    """Raise ``PlanError`` with the rank and instruction that would wait for ever, or be wrong.

    Also checks that each call runs on every rank of its mesh, that its weights are there when it
    runs, of the version that the step allows, and do not change while a borrowed layout may share
    them, and that its inputs have arrived.
    """
    graph = plan.problem.graph
    _check_steps(plan, program, program.step, [call.name for call in graph.step_calls])
    if program.ahead is not None:
        ahead = [call.name for call in graph.ahead]
        others = [call.name for call in graph.calls if call.name not in ahead]
        _check_steps(plan, program, program.ahead.first, ahead)
        _check_steps(plan, program, program.ahead.last, others)
        own = [call.name for call in graph.calls]
        _check_steps(on_policy(plan), program, program.ahead.alone, own)
    check_versions(plan, program)


def _check_steps(plan: ExecutionPlan, program: Program, step: ByRank, calls: Sequence[str]) -> None:
    """A step that runs ``calls`` in this order, after the program's setup."""
    _check_order(step)
    _check_pairs(step)
    _play(plan, step)
    for rank in sorted(step):
        own = (*program.setup.get(rank, ()), *step[rank])
        run = _check_weights(plan, own, rank)
        expected = [name for name in calls if rank in plan.allocations[name].mesh]
        if run != expected:
            raise PlanError(f"runs {run} instead of {expected}", where=f"rank {rank}")


def _check_order(step: ByRank) -> None:
    for rank, instructions in step.items():
        indices = [instruction.index for instruction in instructions]
        if indices != sorted(indices) or len(indices) != len(set(indices)):
            raise PlanError("instructions are out of the global order", where=f"rank {rank}")


def _check_pairs(step: ByRank) -> None:
    """Between two ranks, messages are received in the order in which they are sent."""
    sent: dict[tuple[int, int], list[object]] = defaultdict(list)
    received: dict[tuple[int, int], list[object]] = defaultdict(list)
    for rank, instructions in step.items():
        for instruction in instructions:
            if isinstance(instruction, Transfer):
                for parcel in instruction.sends:
                    sent[(rank, parcel.peer)].append((instruction.transfer, parcel.samples))
                for parcel in instruction.receives:
                    received[(parcel.peer, rank)].append((instruction.transfer, parcel.samples))
    for pair in sorted({*sent, *received}):
        if sent[pair] != received[pair]:
            raise PlanError(
                f"sends {sent[pair]} do not match receives {received[pair]}",
                where=f"rank {pair[0]} -> rank {pair[1]}",
            )


def _play(plan: ExecutionPlan, step: ByRank) -> None:
    place = dict.fromkeys(step, 0)
    arrived: set[tuple[int, int, int]] = set()  # (transfer, source, destination)
    waiting: dict[int, set[int]] = defaultdict(set)  # instruction index -> ranks at it
    ready = deque(sorted(step))
    while ready:
        rank = ready.popleft()
        if place[rank] >= len(step[rank]):
            continue
        instruction = step[rank][place[rank]]
        together = _participants(instruction, plan)
        if together:
            waiting[instruction.index].add(rank)
            if waiting[instruction.index] == together:
                for member in sorted(together):
                    place[member] += 1
                    ready.append(member)
            continue
        if isinstance(instruction, Transfer):
            number = instruction.transfer
            if any((number, p.peer, rank) not in arrived for p in instruction.receives):
                continue  # whoever sends puts this rank back into the queue
            for parcel in instruction.sends:
                arrived.add((number, rank, parcel.peer))
                ready.append(parcel.peer)
        place[rank] += 1
        ready.append(rank)
    stuck = {r: step[r][p] for r, p in place.items() if p < len(step[r])}
    if stuck:
        rank, instruction = min(stuck.items(), key=lambda item: item[1].index)
        raise PlanError(
            f"waits for ever at {type(instruction).__name__} {instruction.index}",
            where=f"rank {rank}",
        )


def _check_weights(
    plan: ExecutionPlan, instructions: Sequence[Instruction], rank: int
) -> list[str]:
    """No call reads weights that are not there, or that change meanwhile; the calls that run."""
    graph = plan.problem.graph
    present: set[tuple[str, Layout]] = {
        (i.role, i.layout) for i in instructions if isinstance(i, Load)
    }
    copies: set[tuple[str, Layout]] = set()
    away: set[tuple[str, Layout, Offloaded]] = set()
    calls_run: list[str] = []
    for instruction in instructions:
        if isinstance(instruction, Offload):
            away.add((instruction.role, instruction.layout, instruction.what))
        elif isinstance(instruction, Reload):
            away.remove((instruction.role, instruction.layout, instruction.what))
        elif isinstance(instruction, Reallocate) and rank in instruction.destination.mesh:
            present.add((instruction.role, instruction.destination))
            if not instruction.lends:
                copies.add((instruction.role, instruction.destination))
        elif isinstance(instruction, Free):
            present.discard((instruction.role, instruction.layout))
        elif isinstance(instruction, Average):
            for role in (instruction.role, instruction.of):
                if (role, instruction.layout) not in present:
                    raise PlanError(
                        f"the average reads {role} in {instruction.layout.key}, which is not there",
                        where=f"rank {rank}",
                    )
        elif isinstance(instruction, Generate | Infer | Train | Function):
            call = graph.call(instruction.call)
            calls_run.append(call.name)
            if call.kind is CallKind.FUNCTION or call.role is None:
                continue
            allocation = plan.allocations[call.name]
            layout = Layout.of(plan.problem.models[call.role], allocation.mesh, allocation.strategy)
            if (call.role, layout) not in present:
                raise PlanError(
                    f"{call.name} reads {call.role} in {layout.key}, which is not there",
                    where=f"rank {rank}",
                )
            # Of a trained role the optimizer leaves, which other calls do not need.
            if (call.role, layout, what_leaves(call)) in away:
                raise PlanError(
                    f"{call.name} needs what {call.role} has offloaded from {layout.key}",
                    where=f"rank {rank}",
                )
            others = [
                held for role, held in present - copies if role == call.role and held != layout
            ]
            if call.kind is CallKind.TRAIN and others:
                raise PlanError(
                    f"{call.name} changes {call.role} while {others[0].key} has its old weights",
                    where=f"rank {rank}",
                )
    return calls_run
