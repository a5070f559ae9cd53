"""Protects the words behind the flags: the planner's are understood or refused, all others reach
the algorithm as they were written.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.lock import Lock
from planner.mesh import DeviceMesh
from planner.overrides import parse_overrides
from planner.plan import Allocation, ExecutionPlan
from planner.plan_schema import save_plan
from planner.strategy import ParallelStrategy
from profiles.clusters import make_cluster
from profiles.errors import ConfigError, UserError
from tests.planner.plans import make_test_cluster, ppo


def test_words_are_sorted() -> None:
    words = ["ppo.kl_coef=0.1", "gap=0.05", "memory_limit=70GiB", "batch_size=64"]
    found = parse_overrides([*words, "lock.actor_gen.mesh=[0,8]", "lock.actor_gen.strategy=d4p1m2"])
    assert found.algorithm == ("ppo.kl_coef=0.1", "batch_size=64")
    assert found.gap == 0.05
    assert found.memory_limit_bytes == 70 * 2**30
    lock = found.locks["actor_gen"]
    assert lock.mesh == DeviceMesh(0, 8)
    assert lock.strategy == ParallelStrategy(dp=4, tp=2)
    cluster = found.on(make_cluster("a100", 8))
    assert cluster.device.memory_bytes == 70 * 2**30
    graph = ppo(make_test_cluster(1, 2)).graph
    found.check_calls(graph)
    with pytest.raises(ConfigError, match=r"lock\.actor_gn: unknown call .*mean actor_gen"):
        parse_overrides(["lock.actor_gn.mesh=[0,1]"]).check_calls(graph)


def test_a_lock_of_a_plan_is_its_allocation(tmp_path: Path) -> None:
    problem = ppo(make_test_cluster(1, 2))
    one = Allocation(mesh=DeviceMesh(1, 1), strategy=ParallelStrategy())
    plan = ExecutionPlan(
        problem=problem, allocations={call.name: one for call in problem.graph.calls}
    )
    save_plan(plan, tmp_path / "plan.json")
    found = parse_overrides([f"lock.actor_gen={tmp_path / 'plan.json'}"])
    assert found.locks == {"actor_gen": Lock(allocation=one)}


def test_a_lock_of_a_layout_is_its_strategy() -> None:
    found = parse_overrides(["lock.actor_gen=d4p1m2"])
    assert found.locks == {"actor_gen": Lock(strategy=ParallelStrategy(dp=4, tp=2))}
    with pytest.raises(ConfigError, match=r"lock\.actor_gen: 'zzz' is neither a plan nor a layout"):
        parse_overrides(["lock.actor_gen=zzz"])


def test_a_lock_allows_what_it_does_not_fix() -> None:
    there = Allocation(
        mesh=DeviceMesh(0, 4), strategy=ParallelStrategy(dp=4, zero=1), num_micro_batches=2
    )
    assert Lock().allows(there)
    assert Lock(mesh=DeviceMesh(0, 4), strategy=ParallelStrategy(dp=4)).allows(there)
    assert not Lock(mesh=DeviceMesh(4, 4)).allows(there)
    assert not Lock(strategy=ParallelStrategy(tp=4)).allows(there)
    assert not Lock(num_micro_batches=1).allows(there)
    assert Lock(allocation=there).allows(there)


@settings(max_examples=300, deadline=None)
@given(
    key=st.sampled_from(["gap", "memory_limit", "lock.a", "lock.a.mesh", "lock", "cluster", "gap.x",
                         "cluster.device", "cluster.num_nodes", "max_staleness", "lock.a.x"]),
    value=st.text(max_size=8) | st.integers().map(str) | st.floats().map(str),
)  # fmt: skip
def test_no_word_ends_in_a_traceback(key: str, value: str) -> None:
    with suppress(UserError):
        found = parse_overrides([f"{key}={value}"])
        found.on(make_cluster("a100", 8))
