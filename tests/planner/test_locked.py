"""Protects what is told of a lock that cannot be: which part of it, why, and what could be."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest

from planner.lock import Lock
from planner.memory import RESERVE_BYTES
from planner.mesh import DeviceMesh
from planner.plan import Allocation, validate_plan
from planner.search import search
from planner.search.options import OptionSpace
from planner.simulate import StepPrices
from planner.strategy import ParallelStrategy
from profiles.errors import ConfigError, InfeasibleError
from profiles.hardware import ClusterSpec
from tests.planner.plans import make_test_cluster, ppo, random_allocation
from tests.planner.test_exact import small_problem
from tests.planner.test_search import model_of

EIGHT = DeviceMesh(0, 8)
HALF = ParallelStrategy(dp=4)


def lock_on(cluster: ClusterSpec, call: str, lock: Lock, *, batch_size: int = 24) -> OptionSpace:
    problem = ppo(cluster, [f"batch_size={batch_size}"])
    return OptionSpace(problem, StepPrices(problem, model_of(problem)), {call: lock})


@pytest.mark.parametrize(
    ("call", "lock", "told"),
    [
        ("actor_gen", Lock(mesh=DeviceMesh(0, 3)), r"\.mesh: mesh \[0-2\] is neither whole nodes"),
        ("actor_gen", Lock(mesh=DeviceMesh(4, 8)), r"\.mesh: mesh \[4-11\] is outside the 8 dev"),
        ("actor_gen", Lock(strategy=ParallelStrategy(pp=16)), r"no mesh has so many; .*4 or 8 dev"),
        ("actor_gen", Lock(strategy=ParallelStrategy(pp=8)), r"\.strategy: pp 8 for 4 layers of x"),
        ("actor_gen", Lock(strategy=ParallelStrategy(tp=8)), r"tp 8 does not divide the 4 heads"),
        ("actor_gen", Lock(strategy=ParallelStrategy(dp=4, ep=2)), r"ep 2, but x has no experts"),
        ("actor_train", Lock(strategy=ParallelStrategy(dp=8)), r"dp 8 exceeds the 6 groups of a"),
        ("ref_inf", Lock(mesh=EIGHT, strategy=HALF), r"= 4 devices, but mesh \[0-7\] has 8"),
        ("ref_inf", Lock(num_micro_batches=5), r"5 micro-batches are not tried; use 1, .* or 16"),
        (
            "ref_inf", Lock(strategy=HALF, num_micro_batches=8),
            r"8 micro-batches are not tried; use 1, 2 or 4, or lock\.ref_inf=plan\.json",
        ),
        ("ref_inf", Lock(offload=True), r"\.offload: on a CPU the host's memory is the device's"),
        ("critic_inf", Lock(offload=True), r"\.offload: offload of critic, which is trained"),
        (
            "actor_train", Lock(allocation=Allocation(mesh=EIGHT, strategy=ParallelStrategy(dp=8))),
            r": dp 8 exceeds the 6 groups of a mini-batch; lock what this problem",
        ),
        (
            "ref_inf",
            Lock(mesh=EIGHT, allocation=Allocation(mesh=DeviceMesh(0, 4), strategy=HALF)),
            r"the plan has \[0-3\] d4p1m1 x1, and another part of the lock says otherwise",
        ),
    ],
)  # fmt: skip
def test_a_lock_that_cannot_be_is_told_by_its_part(call: str, lock: Lock, told: str) -> None:
    """A locked allocation was taken unseen, and the search's plan refused at its end."""
    with pytest.raises(ConfigError, match=rf"lock\.{call}.*{told}"):
        lock_on(make_test_cluster(1, 8), call, lock)


def test_a_mesh_that_so_many_nodes_leave_out_is_told_with_the_one_around_it() -> None:
    cluster = make_test_cluster(40, 1)  # of runs above two nodes those at multiples of three
    with pytest.raises(ConfigError, match=r"mesh \[4-8\] is not tried.*use \[3,6\]"):
        lock_on(cluster, "ref_inf", Lock(mesh=DeviceMesh(4, 5)), batch_size=240)


def test_a_lock_that_memory_leaves_nothing_of_says_how_much_lacks() -> None:
    cluster = make_test_cluster(1, 4, memory_bytes=RESERVE_BYTES["cpu"] + 200 * 1024)
    lock = Lock(strategy=ParallelStrategy())
    with pytest.raises(
        InfeasibleError,
        match=r"actor_train: role actor does not fit as it is locked: at its smallest "
        r"\(\[0\] d1p1m1 .* too little; .*lock less of it",
    ):
        lock_on(cluster, "actor_train", lock, batch_size=4)


@pytest.mark.parametrize("seed", range(12))
def test_any_lock_gives_a_plan_as_it_says_or_one_sentence(seed: int) -> None:
    """Also an allocation of another problem: what is found can run."""
    rng = random.Random(seed)
    problem = small_problem(rng)
    costs = model_of(problem)
    other = replace(problem, cluster=make_test_cluster(2, 2))
    for call in problem.graph.calls:
        fixed = random_allocation(rng, other, call.name)
        lock = rng.choice([
            Lock(allocation=fixed),
            Lock(mesh=fixed.mesh, num_micro_batches=fixed.num_micro_batches),
            Lock(strategy=replace(fixed.strategy, zero=0, recompute="none",
                                  sequence_parallel=False)),
        ])  # fmt: skip
        sentence = ""
        try:
            found = search(
                problem, costs, engine="mcmc", locks={call.name: lock}, max_evaluations=500
            )
        except (ConfigError, InfeasibleError) as error:
            sentence = str(error)
        if sentence:
            assert re.fullmatch(r"[^\n]+", sentence)
            continue
        validate_plan(found.plan)
        assert lock.allows(found.plan.allocations[call.name])
