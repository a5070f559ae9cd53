"""Protects the compiler: programs of random plans cannot hang and give every rank its data; and
the checker does find what is planted.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.graph import CallKind
from planner.mesh import DeviceMesh
from planner.plan import Allocation, ExecutionPlan
from planner.program import (
    Average,
    Free,
    Instruction,
    Program,
    Reallocate,
    Train,
    Transfer,
    compile_plan,
    home_layouts,
)
from planner.program_check import check_program
from planner.strategy import ParallelStrategy
from planner.transfers import assign_samples, producing_ranks, samples_of
from profiles.errors import PlanError
from tests.planner.plans import make_test_cluster, ppo, random_plan

SEEDS = range(60)


@pytest.mark.parametrize("seed", SEEDS)
def test_programs_of_random_plans_run_to_their_end(seed: int) -> None:
    plan = random_plan(random.Random(seed))
    check_program(plan, compile_plan(plan))


@pytest.mark.parametrize("seed", SEEDS[:20])
def test_an_average_is_taken_in_every_layout_of_its_role_after_the_training(seed: int) -> None:
    rng = random.Random(seed)
    problem = ppo(make_test_cluster(2, 4), ["batch_size=24", "ppo.ref_average=0.1"])
    plan = random_plan(rng, problem)
    program = compile_plan(plan)
    check_program(plan, program)
    layouts = home_layouts(plan)["ref"]
    for rank in range(plan.num_devices):
        own = program.step.get(rank, ())
        taken = [i for i in own if isinstance(i, Average)]
        assert {i.layout for i in taken} == {layout for layout in layouts if rank in layout.mesh}
        trained = [i.index for i in own if isinstance(i, Train) and i.call == "actor_train"]
        assert all(i.index > index for i in taken for index in trained)
        for average in taken:
            assert average.rate == 0.1
    broken = {
        rank: tuple(
            i
            for i in own
            if not isinstance(i, Reallocate)
            or i.index < min(a.index for a in averages(program)) - 1
        )
        for rank, own in program.step.items()
    }
    moved = [layout for layout in layouts if layout not in home_layouts(plan)["actor"]]
    if moved:
        with pytest.raises(PlanError, match="the average reads actor"):
            check_program(plan, replace(program, step=broken))


def averages(program: Program) -> list[Average]:
    return [i for own in program.step.values() for i in own if isinstance(i, Average)]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_rank_has_its_inputs(seed: int) -> None:
    """Played by hand: before a call a rank holds all keys of all its samples, each sent once."""
    plan = random_plan(random.Random(seed))
    graph, program = plan.problem.graph, compile_plan(plan)
    held: dict[tuple[int, str], set[int]] = defaultdict(set)
    makers: dict[tuple[int, str], set[int]] = {}
    for call in graph.calls:
        allocation = plan.allocations[call.name]
        owners = producing_ranks(call, allocation.strategy, allocation.mesh.first)
        samples = samples_of(plan.problem, call, allocation.strategy.dp)
        for ranks, owned in zip(owners, samples):
            for rank in ranks:
                makers[(rank, call.name)] = set(owned)
    for rank, instructions in program.step.items():
        for instruction in instructions:
            if isinstance(instruction, Transfer):
                for parcel in instruction.receives:
                    sent = set(parcel.samples)
                    assert sent <= makers[(parcel.peer, instruction.producer)]
                    assert parcel.peer != rank
                    for key in instruction.keys:
                        held[(rank, key)] |= sent
            elif hasattr(instruction, "call"):
                call = graph.call(instruction.call)
                allocation = plan.allocations[call.name]
                place = allocation.strategy.coordinates(rank - allocation.mesh.first)
                wanted = set(samples_of(plan.problem, call, allocation.strategy.dp)[place[1]])
                for key in call.inputs:
                    if key not in graph.source_keys:
                        assert wanted <= held[(rank, key)], (rank, call.name, key)
                for key in call.outputs:
                    held[(rank, key)] |= makers.get((rank, call.name), set())


@pytest.mark.parametrize("seed", SEEDS)
def test_trained_roles_live_where_they_are_trained(seed: int) -> None:
    """Frozen roles are never moved; a rank frees in the same step what it borrowed."""
    plan = random_plan(random.Random(seed))
    homes = home_layouts(plan)
    for rank, instructions in compile_plan(plan).step.items():
        borrowed = set()
        for instruction in instructions:
            if isinstance(instruction, Reallocate):
                assert plan.problem.graph.train_call(instruction.role) is not None
                assert (instruction.source,) == homes[instruction.role]
                assert instruction.destination not in homes[instruction.role]
                if rank in instruction.destination.mesh:
                    borrowed.add((instruction.role, instruction.destination))
            elif isinstance(instruction, Free):
                borrowed.remove((instruction.role, instruction.layout))
        assert not borrowed


@given(st.integers(1, 40), st.data())
def test_samples_are_split_evenly_and_once(batch_size: int, data: st.DataObject) -> None:
    """Every sample once; a mini-batch is the same run of samples whatever dp is."""
    mini = data.draw(st.integers(1, batch_size))
    dp = data.draw(st.integers(1, max(1, batch_size // mini)))
    parts = assign_samples(batch_size, dp, mini)
    assert sorted(s for own in parts for run in own for s in run) == list(range(batch_size))
    alone = assign_samples(batch_size, 1, mini)[0]
    for index in range(mini):
        together = sorted(s for own in parts for s in own[index])
        assert together == list(alone[index])
        sizes = [len(own[index]) for own in parts]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1


# ---- the checker finds what is planted ---------------------------------------------------------


def _two_ranks() -> ExecutionPlan:
    """Actor on rank 0, everything else on rank 1; actor generates on both."""
    problem = ppo(make_test_cluster(1, 2), ["batch_size=4", "ppo.num_mini_batches=1"])
    zero, one = (Allocation(mesh=DeviceMesh(i, 1), strategy=ParallelStrategy()) for i in (0, 1))
    both = Allocation(mesh=DeviceMesh(0, 2), strategy=ParallelStrategy(dp=2))
    allocations = {call.name: one for call in problem.graph.calls}
    allocations.update(actor_gen=both, actor_train=zero)
    return ExecutionPlan(problem=problem, allocations=allocations)


def _without(kind: type) -> Callable[[tuple[Instruction, ...]], tuple[Instruction, ...]]:
    return lambda instructions: tuple(i for i in instructions if not isinstance(i, kind))


def _swap_ends(instructions: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
    return (instructions[-1], *instructions[1:-1], instructions[0])


def _no_receives(instructions: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
    return tuple(i for i in instructions if not (isinstance(i, Transfer) and i.receives))


@pytest.mark.parametrize(
    ("rank", "change", "message"),
    [
        (0, _without(Reallocate), "rank 1: waits for ever at Reallocate"),
        (
            0,
            _without(Train),
            r"rank 0: runs \['actor_gen'\] instead of \['actor_gen', 'actor_train'",
        ),
        (0, _swap_ends, "rank 0: instructions are out of the global order"),
        (1, _no_receives, "rank 0 -> rank 1: sends .* do not match receives"),
    ],
)
def test_a_planted_mistake_is_found(
    rank: int, change: Callable[[tuple[Instruction, ...]], tuple[Instruction, ...]], message: str
) -> None:
    plan = _two_ranks()
    program = compile_plan(plan)
    check_program(plan, program)
    broken = Program(setup=program.setup, step={**program.step, rank: change(program.step[rank])})
    with pytest.raises(PlanError, match=message):
        check_program(plan, broken)


def test_weights_that_are_not_there_are_found() -> None:
    plan = _two_ranks()
    program = compile_plan(plan)
    with pytest.raises(PlanError, match=r"rank 1: ref_inf|rank 1: rew_inf reads reward"):
        check_program(plan, replace(program, setup={0: program.setup[0]}))


def test_a_circular_wait_is_found() -> None:
    """Two ranks that each wait for the other's message first."""
    plan = _two_ranks()
    program = compile_plan(plan)
    step = {rank: list(instructions) for rank, instructions in program.step.items()}
    sends = [i for i in step[0] if isinstance(i, Transfer) and i.sends]
    receives = [i for i in step[0] if isinstance(i, Transfer) and i.receives]
    assert sends
    assert receives
    others = [i for i in step[0] if i not in sends and i not in receives]
    order = [*receives, *others, *sends]
    renumbered = tuple(replace(i, index=n) for n, i in enumerate(order))
    with pytest.raises(PlanError, match="waits for ever"):
        check_program(plan, Program(setup=program.setup, step={**program.step, 0: renumbered}))


def test_a_generating_call_is_not_trained_elsewhere() -> None:
    """The compiler refuses a plan without one of its calls, by name."""
    plan = _two_ranks()
    allocations = dict(plan.allocations)
    del allocations["critic_train"]
    assert plan.problem.graph.call("critic_train").kind is CallKind.TRAIN
    with pytest.raises(PlanError, match=r"allocations.critic_train: missing"):
        compile_plan(replace(plan, allocations=allocations))
