"""Random small problems and legal plans for the property tests of the planner."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from experiments.ppo.graph import ALGORITHM
from planner.algorithm import make_config, make_problem
from planner.graph import CallKind
from planner.mesh import DeviceMesh, enumerate_meshes
from planner.plan import Allocation, ExecutionPlan, Problem, largest_dp, validate_plan
from planner.strategy import ParallelStrategy, Recompute, legal_strategies
from profiles.hardware import Cluster, ClusterSpec, DeviceSpec, LinkSpec, MixedCluster
from profiles.models import ModelSpec

SPEC = ModelSpec(
    name="x", num_layers=4, hidden=16, num_heads=4, num_kv_heads=4, head_dim=4, ffn=32, vocab=64
)

# Of ``Collectives``: formulas of whole rates, and a network that takes nothing to start.
WHOLE_RATES = {"bandwidth_efficiency": 1.0, "network_efficiency": 1.0, "network_start_s": 0.0}


def make_test_cluster(
    num_nodes: int, devices_per_node: int, *, memory_bytes: int = 1 << 34
) -> ClusterSpec:
    """CPU workers joined by 1 GB/s inside a node and 0.25 GB/s between nodes."""
    fast = LinkSpec(bytes_per_s=1e9, latency_s=1e-6)
    slow = LinkSpec(bytes_per_s=2.5e8, latency_s=1e-5)
    device = DeviceSpec(
        name="d", kind="cpu", peak_flops=1e9, memory_bytes=memory_bytes, memory_bytes_per_s=1e9,
        launch_s=1e-6,
    )  # fmt: skip
    return ClusterSpec(
        name="c", device=device, num_nodes=num_nodes, devices_per_node=devices_per_node,
        intra_link=fast, inter_link=slow, host_link=slow,
    )  # fmt: skip


def make_mixed_cluster(*groups: ClusterSpec) -> MixedCluster:
    return MixedCluster(name="mixed", groups=groups)


def random_group(
    rng: random.Random, shape: tuple[int, int], memory_bytes: int = 1 << 34
) -> ClusterSpec:
    """Nodes with rates of their own: up to four times as fast in one thing, slower in another."""

    def rate(value: float) -> float:
        return value * rng.choice([0.5, 1.0, 2.0, 4.0])

    cluster = make_test_cluster(*shape, memory_bytes=memory_bytes)
    device = replace(
        cluster.device, name=f"d{rng.randrange(1000)}", peak_flops=rate(1e9),
        memory_bytes_per_s=rate(1e9),
    )  # fmt: skip
    links = {
        name: replace(link, bytes_per_s=rate(link.bytes_per_s), latency_s=rate(link.latency_s))
        for name in ("intra_link", "inter_link", "host_link")
        for link in [getattr(cluster, name)]
    }
    return replace(cluster, device=device, **links)


def random_mixed_cluster(
    rng: random.Random, *, shapes: Sequence[tuple[int, int]] = ((1, 2), (2, 2), (1, 4), (3, 1)),
    most_groups: int = 3,
) -> MixedCluster:  # fmt: skip
    """Two groups or more of any of these shapes, no two of them alike but by chance."""
    count = rng.randint(2, most_groups)
    return make_mixed_cluster(*(random_group(rng, rng.choice(shapes)) for _ in range(count)))


def ppo(cluster: Cluster, overrides: Sequence[str] = (), spec: ModelSpec = SPEC) -> Problem:
    """PPO with a critic of one layer less than the actor."""
    config = make_config(ALGORITHM.config_class, ["prompt_len=16", "response_len=16", *overrides])
    critic = replace(spec, num_layers=spec.num_layers - 1)
    return make_problem(ALGORITHM, config, model=spec, critic=critic, cluster=cluster)


def random_problem(rng: random.Random, *, max_nodes: int = 3) -> Problem:
    """PPO on 1 to 24 devices, with a reward model or a reward function."""
    cluster = make_test_cluster(rng.randint(1, max_nodes), rng.choice([1, 2, 4, 8]))
    return ppo(
        cluster,
        [
            f"batch_size={rng.choice([24, 30])}",
            f"ppo.num_mini_batches={rng.choice([1, 2, 3])}",
            f"reward.source={rng.choice(['model', 'vader'])}",
        ],
    )


def random_allocation(rng: random.Random, problem: Problem, call_name: str) -> Allocation:
    """Any legal allocation of a call."""
    spec, most = problem.spec_of(call_name), largest_dp(problem, call_name)
    meshes = list(enumerate_meshes(problem.cluster))
    while True:
        mesh: DeviceMesh = rng.choice(meshes)
        legal = [
            s
            for s in legal_strategies(spec, mesh, problem.cluster, max_dp=most)
            if spec is not None or s.pp == s.tp == 1
        ]
        if legal:
            break
    strategy: ParallelStrategy = rng.choice(legal)
    kind = problem.graph.call(call_name).kind
    if kind is CallKind.TRAIN:
        strategy = replace(
            strategy, zero=rng.choice((0, 1)), recompute=rng.choice(get_args(Recompute))
        )
    if kind in (CallKind.INFER, CallKind.TRAIN) and strategy.tp > 1:
        strategy = replace(strategy, sequence_parallel=rng.choice((False, True)))
    num_micro_batches = 1 if spec is None else rng.randint(1, max(1, most // strategy.dp))
    return Allocation(mesh=mesh, strategy=strategy, num_micro_batches=num_micro_batches)


def random_plan(rng: random.Random, problem: Problem | None = None) -> ExecutionPlan:
    """A legal plan of a random problem; memory is not looked at."""
    problem = problem or random_problem(rng)
    allocations = {c.name: random_allocation(rng, problem, c.name) for c in problem.graph.calls}
    plan = ExecutionPlan(problem=problem, allocations=allocations, seed=rng.randrange(100))
    validate_plan(plan)
    return plan
