"""Protects plans on unlike groups of nodes: a call costs what it costs on its own group, the fast
evaluator says what the simulator and the memory model say, bounds are below every plan, and the
optimum has common sense.

Oracles: a cluster of the one group, ``brute``, ``exact`` run to its end, equal nodes cut in two.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.algorithm import find_algorithm, make_config, make_problem
from planner.cost import call_cost
from planner.cost.offload import swap_cost
from planner.cost.transfer import average_seconds, reallocation_seconds, transfer_seconds
from planner.layout import Layout
from planner.memory import RESERVE_BYTES
from planner.mesh import (
    DeviceMesh,
    check_mesh,
    enumerate_meshes,
    kind_of,
    node_edges,
    node_grid,
)
from planner.plan import Problem, validate_plan
from planner.plan_memory import check_memory, fullest_device, plan_memory
from planner.program import compile_plan
from planner.program_check import check_program
from planner.reallocation import reallocate
from planner.search import SearchResult, search
from planner.search.baselines import baselines
from planner.search.bounds import lower_bound_s
from planner.search.evaluate import Evaluator
from planner.search.options import OptionSpace
from planner.search.relaxation import Relaxation, device_weights
from planner.search.variants import considered_meshes, ways
from planner.simulate import StepPrices, run_program
from profiles.catalogue import MODELS
from profiles.clusters import make_groups
from profiles.errors import InfeasibleError, PlanError
from profiles.hardware import Cluster, ClusterSpec, LinkSpec, MixedCluster
from tests.planner.plans import (
    SPEC,
    make_mixed_cluster,
    make_test_cluster,
    ppo,
    random_allocation,
    random_group,
    random_mixed_cluster,
)
from tests.planner.test_algorithms import CALLS
from tests.planner.test_search import model_of, random_assignment, space_of

PPO = ["batch_size=24"]


# ---- meshes -----------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 3, 4])), min_size=2, max_size=3)
)
def test_meshes_are_those_of_each_group(shapes: list[tuple[int, int]]) -> None:
    """Oracles: ``check_mesh`` on every run of devices, and the groups' own meshes."""
    cluster = make_mixed_cluster(*(make_test_cluster(*shape) for shape in shapes))
    legal = set()
    for first in range(cluster.num_devices):
        for count in range(1, cluster.num_devices - first + 1):
            try:
                check_mesh(DeviceMesh(first, count), cluster, where="mesh")
            except PlanError:
                continue
            legal.add(DeviceMesh(first, count))
    found = list(enumerate_meshes(cluster))
    assert len(found) == len(set(found))
    assert set(found) == legal
    own = [
        mesh.shifted(start)
        for start, group in zip(cluster.starts, cluster.groups, strict=True)
        for mesh in enumerate_meshes(group)
    ]
    assert found == own
    assert list(considered_meshes(cluster)) == own
    assert all(kind_of(mesh, cluster).num_devices == mesh.num_devices for mesh in found)


def test_a_mesh_of_two_groups_is_refused() -> None:
    cluster = make_groups("h100:8+l40s:8")
    with pytest.raises(PlanError, match=r"\[0-15\] leaves its group .* \[0-7\] \(h100\); keep a"):
        check_mesh(DeviceMesh(0, 16), cluster, where="allocations.x.mesh")
    check_mesh(DeviceMesh(8, 8), cluster, where="allocations.x.mesh")


def test_lines_between_nodes_go_on_over_groups() -> None:
    cluster = make_mixed_cluster(make_test_cluster(2, 4), make_test_cluster(3, 2))
    assert node_edges(cluster) == [0, 4, 8, 10, 12, 14]


# ---- costs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_a_call_costs_as_much_as_on_its_group_alone(seed: int) -> None:
    """Seconds and their parts, moves of state to the host, averages, and bytes."""
    rng = random.Random(seed)
    cluster = random_mixed_cluster(rng)
    mixed = ppo(cluster, PPO)
    costs = model_of(mixed)
    for call in mixed.graph.calls:
        allocation = random_allocation(rng, mixed, call.name)
        index = cluster.group_index(allocation.mesh.first)
        alone = ppo(cluster.groups[index], PPO)
        there = replace(allocation, mesh=allocation.mesh.shifted(-cluster.starts[index]))
        own = model_of(alone)
        assert call_cost(mixed, call.name, allocation, costs) == call_cost(
            alone, call.name, there, own
        )
        spec = mixed.spec_of(call.name)
        if spec is None:
            continue
        away = [replace(a, offload=True) for a in (allocation, there)]
        assert swap_cost(mixed, call.name, away[0], costs) == swap_cost(
            alone, call.name, away[1], own
        )
        layouts = [Layout.of(spec, a.mesh, a.strategy) for a in (allocation, there)]
        assert average_seconds(layouts[0], model=costs) == average_seconds(layouts[1], model=own)


@pytest.mark.parametrize("seed", range(8))
def test_what_moves_inside_a_group_costs_as_much_as_on_it_alone(seed: int) -> None:
    rng = random.Random(seed)
    cluster = random_mixed_cluster(rng)
    mixed = ppo(cluster, PPO)
    costs = model_of(mixed)
    for _ in range(20):
        a, b = (random_allocation(rng, mixed, name) for name in ("actor_train", "actor_gen"))
        index = cluster.group_index(a.mesh.first)
        if cluster.group_index(b.mesh.first) != index:
            continue
        own, start = model_of(ppo(cluster.groups[index], PPO)), cluster.starts[index]
        layouts = [Layout.of(SPEC, x.mesh, x.strategy) for x in (a, b)]
        there = [replace(x, mesh=x.mesh.shifted(-start)) for x in layouts]
        found = reallocation_seconds(*layouts, bytes_per_value=4, model=costs)
        assert found == reallocation_seconds(*there, bytes_per_value=4, model=own)
        meshes = [x.mesh for x in there]
        assert transfer_seconds(1e6, a.mesh, b.mesh, costs) == transfer_seconds(1e6, *meshes, own)


INTRA = LinkSpec(bytes_per_s=50.0, latency_s=0.0)


def two_groups(*, rates: tuple[float, float], memory: tuple[float, float]) -> MixedCluster:
    """Two nodes of four devices each, joined by networks of these rates, without latencies."""
    base = make_test_cluster(2, 4)
    return make_mixed_cluster(*(
        replace(
            base, device=replace(base.device, memory_bytes_per_s=passes),
            intra_link=INTRA, inter_link=LinkSpec(bytes_per_s=rate, latency_s=0.0),
        )
        for rate, passes in zip(rates, memory, strict=True)
    ))  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_between_groups_each_device_has_the_rate_of_its_own_network(seed: int) -> None:
    """Oracle: the messages themselves, added up by device; the last ones stay in a node."""
    rng = random.Random(seed)
    rates, share, start_s = (rng.choice([10.0, 40.0]), rng.choice([10.0, 40.0])), 0.72, 14e-6
    cluster = two_groups(rates=rates, memory=(1e30, 1e30))
    problem = ppo(cluster, PPO)
    costs = model_of(problem)
    while True:
        a, b = (random_allocation(rng, problem, name) for name in ("actor_train", "actor_gen"))
        if cluster.group_index(a.mesh.first) != cluster.group_index(b.mesh.first):
            break
    src, dst = (Layout.of(SPEC, x.mesh, x.strategy) for x in (a, b))
    sent, taken = np.zeros((2, cluster.num_devices))
    onward = np.zeros((2, cluster.num_devices))  # out and in
    grid = node_grid(src.mesh, dst.mesh, cluster)
    for message in reallocate(
        src, dst, devices_per_node=grid.size, first_device=grid.first
    ).messages:
        if message.phase == 1:
            ends = message.src, message.dst
            onward[(0, 1), ends] += 4 * message.num_values
            assert cluster.node_of(message.src) == cluster.node_of(message.dst)
            continue
        sent[message.src] += 4 * message.num_values
        taken[message.dst] += 4 * message.num_values
        assert message.src in src.mesh
    own = np.array([rates[cluster.group_index(d)] * share for d in range(cluster.num_devices)])
    expected_s = max((sent / own).max(), (taken / own).max()) + start_s
    target = costs.models[cluster.group_index(b.mesh.first)]
    expected_s += onward.max() / (INTRA.bytes_per_s * target.collectives.efficiency)
    found_s = reallocation_seconds(src, dst, bytes_per_value=4, model=costs)
    assert found_s == pytest.approx(expected_s, rel=1e-9)
    moved_s = transfer_seconds(1e6, a.mesh, b.mesh, costs)
    ends_s = [1e6 / x.mesh.num_devices / own[x.mesh.first] for x in (a, b)]
    assert moved_s == pytest.approx(max(ends_s) + start_s, rel=1e-9)


def test_a_message_between_groups_takes_the_slower_network() -> None:
    """One device to one: whichever is the source, bytes by the lower rate; and each end's memory

    passes over what it packs.
    """
    for rates in ((10.0, 40.0), (40.0, 10.0)):
        costs = model_of(ppo(two_groups(rates=rates, memory=(1e30, 1e30)), PPO))
        src, dst = (Layout(spec=SPEC, mesh=DeviceMesh(first, 1)) for first in (3, 8))
        found_s = reallocation_seconds(src, dst, bytes_per_value=4, model=costs)
        assert found_s == pytest.approx(4 * SPEC.num_parameters / 7.2 + 14e-6, rel=1e-9)
    fast = model_of(ppo(two_groups(rates=(1e30, 1e30), memory=(2.0, 8.0)), PPO))
    halves = Layout(spec=SPEC, mesh=DeviceMesh(0, 2), tp=2)
    whole = Layout(spec=SPEC, mesh=DeviceMesh(8, 1))
    packed_s = reallocation_seconds(halves, whole, bytes_per_value=4, model=fast)
    assert packed_s > 1.0  # unpacking parts of rows at 8 bytes/s
    again = model_of(ppo(two_groups(rates=(1e30, 1e30), memory=(2.0, 16.0)), PPO))
    assert reallocation_seconds(halves, whole, bytes_per_value=4, model=again) == pytest.approx(
        packed_s / 2, rel=1e-6
    )


def test_where_in_their_groups_two_layouts_are_does_not_matter() -> None:
    """``StepPrices`` and the evaluator keep one price for all; messages say the same."""
    costs = model_of(ppo(two_groups(rates=(10.0, 40.0), memory=(1e9, 2e9)), PPO))
    found = {
        reallocation_seconds(
            Layout(spec=SPEC, mesh=DeviceMesh(a, 2), tp=2),
            Layout(spec=SPEC, mesh=DeviceMesh(b, 4), dp=4),
            bytes_per_value=4, model=costs,
        )
        for a in (0, 2, 4, 6) for b in (8, 12)
    }  # fmt: skip
    assert len(found) == 1


# ---- the evaluator ----------------------------------------------------------------------------


def problem_of(algorithm: str, cluster: Cluster, rng: random.Random) -> Problem:
    name, *overrides = algorithm.split()
    spec = replace(SPEC, num_kv_heads=rng.choice([1, 2, 4]), num_layers=rng.choice([2, 3, 5]))
    found = find_algorithm(name)
    overrides += [f"batch_size={rng.choice([12, 24])}", "prompt_len=16", "response_len=16"]
    config = make_config(found.config_class, overrides)
    return make_problem(found, config, model=spec, critic=spec, cluster=cluster)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("algorithm", sorted(CALLS))
def test_the_evaluator_agrees_with_the_simulator_and_the_memory_model(
    algorithm: str, seed: int
) -> None:
    """step_s to 1e-9 and the fullest share of a device's memory, of ten random plans each."""
    rng = random.Random(seed)
    problem = problem_of(algorithm, random_mixed_cluster(rng), rng)
    space = space_of(problem)
    evaluator = Evaluator(space)
    had = [RESERVE_BYTES["cpu"] + rng.choice([50, 200, 1000]) * 1024 for _ in range(3)]
    meshes = evaluator.tables.meshes
    for group, memory_bytes in enumerate(had):
        inside = meshes["group"] == group
        meshes["memory_bytes"][inside] = memory_bytes
        meshes["free_bytes"][inside] = memory_bytes - evaluator.tables.reserve_bytes
    apart = 0
    for _ in range(10):
        assignment = random_assignment(rng, space)
        apart += len({problem.cluster.group_index(o.mesh.first) for o in assignment}) > 1
        plan = evaluator.plan(assignment)
        validate_plan(plan)
        score = evaluator.score(assignment)
        expected_s = run_program(plan, compile_plan(plan), space.prices, num_steps=1).step_s
        assert score.step_s == pytest.approx(expected_s, rel=1e-9)
        needs = plan_memory(plan, kept=frozenset())
        fullest = max(need.total / had[problem.cluster.group_index(d)] for d, need in needs.items())
        assert score.overshoot == pytest.approx(max(0.0, fullest - 1.0), rel=1e-9, abs=1e-12)
        assert evaluator.floor_s(assignment) <= score.step_s * (1 + 1e-9)
    assert apart or len(space.calls) == 1


def test_two_halves_of_equal_nodes_are_what_these_are_together() -> None:
    """A plan that keeps its calls in the halves takes as long and as much on the whole cluster."""
    rng = random.Random(1)
    half = make_test_cluster(2, 4)
    mixed, whole = (
        ppo(c, PPO) for c in (make_mixed_cluster(half, half), replace(half, num_nodes=4))
    )
    spaces = [space_of(problem) for problem in (mixed, whole)]
    scores = [Evaluator(space) for space in spaces]
    for _ in range(40):
        plan = scores[0].plan(random_assignment(rng, spaces[0]))
        other = replace(plan, problem=whole)
        validate_plan(other)
        found = [
            run_program(p, compile_plan(p), s.prices).step_s for p, s in zip((plan, other), spaces)
        ]
        assert found[0] == pytest.approx(found[1], rel=1e-12)
        assert plan_memory(plan) == plan_memory(other)


def test_the_fullest_device_is_that_with_the_largest_share() -> None:
    """Not the one with most bytes; where it lacks some the error says which kind it is."""
    tight = RESERVE_BYTES["cpu"] + 300 * 1024
    groups = make_test_cluster(1, 1), make_test_cluster(1, 1, memory_bytes=tight)
    named = replace(groups[1], device=replace(groups[1].device, name="small"))
    problem = ppo(make_mixed_cluster(groups[0], named), PPO)
    roomy = ppo(make_mixed_cluster(groups[0], groups[0]), PPO)
    space = space_of(roomy)
    rng = random.Random(3)
    seen = 0
    for _ in range(60):
        plan = replace(Evaluator(space).plan(random_assignment(rng, space)), problem=problem)
        full, needs = fullest_device(plan), plan_memory(plan)
        shares = [needs[0].total / groups[0].device.memory_bytes, needs[1].total / tight]
        assert full.device == max(range(2), key=shares.__getitem__)
        assert full.headroom_bytes == full.has_bytes - needs[full.device].total
        if shares[1] > 1:
            seen += needs[0].total > needs[1].total
            with pytest.raises(InfeasibleError, match=r"device 1 \(small\) needs .* too little"):
                check_memory(plan)
        else:
            check_memory(plan)
    assert seen


# ---- the search -------------------------------------------------------------------------------


def tiny(groups: Sequence[ClusterSpec], rng: random.Random) -> Problem:
    """Any graph on one or two devices of each group."""
    name, *overrides = rng.choice(sorted(CALLS)).split()
    spec = replace(
        SPEC, num_layers=rng.choice([1, 2, 3]), ffn=rng.choice([32, 128]),
        num_kv_heads=rng.choice([1, 2, 4]), tied_embedding=rng.random() < 0.3,
    )  # fmt: skip
    overrides += [f"batch_size={rng.choice([1, 2])}", "prompt_len=16", "response_len=16"]
    if name == "ppo":
        overrides.append("ppo.num_mini_batches=1")
    found = find_algorithm(name)
    config = make_config(found.config_class, overrides)
    critic = replace(spec, num_layers=rng.choice([1, 2]))
    cluster = groups[0] if len(groups) == 1 else make_mixed_cluster(*groups)
    return make_problem(found, config, model=spec, critic=critic, cluster=cluster)


def draw(rng: random.Random) -> Problem:
    """Two groups, or three of one device; each roomy or tight, with a fast or very slow network;

    now and then GPUs, which may offload.
    """
    shapes = rng.choice([[(1, 1), (1, 1)], [(1, 2), (1, 1)], [(2, 1), (1, 1)], [(1, 1)] * 3])
    groups = []
    for shape in shapes:
        extra = rng.choice([40, 120, 300, 500, 900, 9000]) * 1024
        groups.append(random_group(rng, shape, RESERVE_BYTES["cpu"] + extra))
    if rng.random() < 0.5:  # moving weights costs as much as a call
        groups = [
            replace(g, inter_link=replace(g.inter_link, bytes_per_s=rng.choice([1e6, 1e7, 1e8])))
            for g in groups
        ]
    if rng.random() < 0.3:
        more = RESERVE_BYTES["cuda"] - RESERVE_BYTES["cpu"]
        groups = [
            replace(g, device=replace(g.device, kind="cuda",
                                      memory_bytes=g.device.memory_bytes + more))
            for g in groups
        ]  # fmt: skip
    return tiny(groups, rng)


MOST_PLANS = 1_000_000


@lru_cache(maxsize=64)
def instance(seed: int) -> tuple[Problem, SearchResult | None]:
    """A problem of at most ``MOST_PLANS`` plans and its best by brute force; None: nothing fits."""
    rng = random.Random(seed)
    while True:
        problem = draw(rng)
        try:
            if space_of(problem).num_plans > MOST_PLANS:
                continue
            return problem, search(problem, model_of(problem), engine="brute", time_limit_s=600)
        except InfeasibleError:
            if rng.random() < 0.2:
                return problem, None


SEEDS = range(32)


@pytest.mark.parametrize("seed", SEEDS)
def test_engines_find_the_best_plan_and_the_bound_is_not_above_it(seed: int) -> None:
    """As ``test_optimum.py`` for equal nodes; the bound of the root box as well."""
    problem, best = instance(seed)
    costs = model_of(problem)
    if best is None:
        for engine in ("mcmc", "exact", "auto"):
            with pytest.raises(InfeasibleError, match=r"role|device \d+ .*too little"):
                search(problem, costs, engine=engine, max_evaluations=5000)
        return
    assert lower_bound_s(Evaluator(space_of(problem))) <= best.step_s * (1 + 1e-9)
    for engine in ("mcmc", "exact"):
        found = search(
            problem, costs, engine=engine, seed=seed, gap=0.0, max_evaluations=20_000,
            time_limit_s=600,
        )  # fmt: skip
        assert found.step_s == pytest.approx(best.step_s, rel=1e-9)
        assert found.lower_bound_s <= best.step_s * (1 + 1e-9)
        assert engine == "mcmc" or found.gap <= 1e-9
        assert all(seconds >= best.step_s * (1 - 1e-9) for seconds in found.baselines.values())
        validate_plan(found.plan)
        check_memory(found.plan)
        check_program(found.plan, compile_plan(found.plan))


def test_the_instances_are_of_every_kind() -> None:
    """Of several graphs; plans on both groups, and on one; some that do not fit."""
    found = [instance(seed) for seed in SEEDS]
    solved = [(problem, best) for problem, best in found if best is not None]
    assert 20 <= len(solved) < len(found)
    assert len({problem.graph.name for problem, _ in solved}) >= 5
    used = [
        {problem.cluster.group_index(a.mesh.first) for a in best.plan.allocations.values()}
        for problem, best in solved
    ]
    assert sum(len(groups) > 1 for groups in used) >= 5
    assert sum(len(groups) == 1 for groups in used) >= 5


@pytest.mark.parametrize("seed", range(6))
def test_a_box_bounds_its_assignments(seed: int) -> None:
    """Halving towards a random assignment the bound never exceeds its seconds, nor falls."""
    rng = random.Random(seed)
    shapes = ((1, 2), (2, 1), (2, 2))
    problem = ppo(random_mixed_cluster(rng, shapes=shapes, most_groups=2), ["batch_size=8"])
    evaluator = Evaluator(space_of(problem))
    relaxation = Relaxation(evaluator)
    for _ in range(15):
        box = relaxation.pools.root()
        last_s = relaxation.bound_s(box)
        while relaxation.pools.assignment(box) is None:
            i = rng.choice(
                [i for i, pool in enumerate(box) if not relaxation.pools.is_single(pool)]
            )
            half = relaxation.pools.split(box[i])[rng.randrange(2)]
            box = (*box[:i], half, *box[i + 1 :])
            bound_s = relaxation.bound_s(box, price=True)
            assert bound_s >= last_s * (1 - 1e-9)
            last_s = bound_s
        assignment = relaxation.pools.assignment(box)
        assert assignment is not None
        score = evaluator.score(assignment)
        assert last_s <= score.step_s * (1 + 1e-9) or score.overshoot > 0


def test_weights_of_devices_share_out_all_of_them() -> None:
    """What bound 1 is proven for; equal nodes have one weight, 1 / N."""
    cluster = make_groups("h100:16+a100:8+l40s:8")
    weights = device_weights(cluster)
    counts = [group.num_devices for group in cluster.groups]
    assert (weights @ counts).tolist() == pytest.approx([1.0] * len(weights))
    assert (weights >= 0).all()
    for alone in np.eye(3) / counts:
        assert any(np.allclose(row, alone) for row in weights)
    assert device_weights(cluster.groups[0]).tolist() == [[1 / 16]]


# ---- common sense -----------------------------------------------------------------------------


def optimum_s(problem: Problem) -> float:
    try:
        found = search(
            problem, model_of(problem), engine="exact", gap=0.0, max_evaluations=20_000,
            time_limit_s=600,
        )  # fmt: skip
    except InfeasibleError:
        return float("inf")
    assert found.gap <= 1e-9
    return found.step_s


def groups_of(seed: int, shapes: Sequence[tuple[int, int]]) -> tuple[list[ClusterSpec], int]:
    rng = random.Random(seed)
    extra = [rng.choice([800, 1200, 4000]) * 1024 for _ in shapes]
    groups = [random_group(rng, s, RESERVE_BYTES["cpu"] + more) for s, more in zip(shapes, extra)]
    return groups, rng.randrange(1 << 30)


@pytest.mark.parametrize("seed", range(6))
def test_one_more_group_is_never_worse(seed: int) -> None:
    """Every plan of before is still there; and so it is on either group alone."""
    groups, seed = groups_of(seed, [(1, 1), (1, 1), (1, 1)])
    found_s = [optimum_s(tiny(groups[:n], random.Random(seed))) for n in (1, 2, 3)]
    assert found_s[1] <= found_s[0] * (1 + 1e-9)
    assert found_s[2] <= found_s[1] * (1 + 1e-9)
    assert found_s[1] <= optimum_s(tiny(groups[1:2], random.Random(seed))) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_groups_does_not_matter(seed: int) -> None:
    groups, seed = groups_of(seed, [(1, 2), (1, 1)])
    problems = [tiny(order, random.Random(seed)) for order in (groups, groups[::-1])]
    forth, back = (optimum_s(problem) for problem in problems)
    assert forth == pytest.approx(back, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_two_equal_groups_are_never_better_than_their_nodes_together(seed: int) -> None:
    """These have every plan of theirs, and layouts over all nodes as well."""
    (half,), seed = groups_of(seed, [(1, 1)])
    apart = optimum_s(tiny([half, half], random.Random(seed)))
    together = optimum_s(tiny([replace(half, num_nodes=2)], random.Random(seed)))
    assert together <= apart * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_faster_devices_in_one_group_are_never_worse(seed: int) -> None:
    groups, seed = groups_of(seed, [(1, 1), (1, 1)])
    device = groups[1].device
    faster = replace(
        device, peak_flops=3 * device.peak_flops, memory_bytes=2 * device.memory_bytes,
        memory_bytes_per_s=3 * device.memory_bytes_per_s,
    )  # fmt: skip
    before, after = (
        optimum_s(tiny([groups[0], replace(groups[1], device=d)], random.Random(seed)))
        for d in (device, faster)
    )
    assert after <= before * (1 + 1e-9)


# ---- baselines --------------------------------------------------------------------------------


def test_baselines_are_one_group_and_groups_side_by_side() -> None:
    """``symmetric`` is the best of the groups' own, ``split`` has a group on either side."""
    rng = random.Random(4)
    groups = [random_group(rng, (1, 4)), random_group(rng, (2, 2))]
    problem = ppo(make_mixed_cluster(*groups), PPO)
    evaluator = Evaluator(space_of(problem))
    found = baselines(evaluator)
    meshes = {
        name: {o.mesh for o in found[name].assignment if o.layout}
        for name in ("symmetric", "split")
    }
    (whole,) = meshes["symmetric"]
    assert whole in (DeviceMesh(0, 4), DeviceMesh(4, 4))
    assert meshes["split"] == {DeviceMesh(0, 4), DeviceMesh(4, 4)}
    alone = [baselines(Evaluator(space_of(ppo(group, PPO)))) for group in groups]
    assert found["symmetric"].score.step_s == pytest.approx(
        min(own["symmetric"].score.step_s for own in alone), rel=1e-12
    )


def test_real_devices_generate_where_memory_is_fast_and_train_where_products_are() -> None:
    """A search over H100 and A100 nodes uses both, and beats each group alone."""
    spec = MODELS["llama-7b"]
    words = ["batch_size=128", "prompt_len=512", "response_len=512"]
    seconds = {}
    for text in ("h100:8", "a100:8", "h100:8+a100:8"):
        problem = ppo(make_groups(text), words, spec)
        costs = model_of(problem)
        found = search(problem, costs, gap=0.05, time_limit_s=20.0, max_evaluations=300_000)
        assert found.lower_bound_s <= found.step_s
        seconds[text] = found.step_s
        check_memory(found.plan)
    assert seconds["h100:8+a100:8"] < 0.95 * seconds["h100:8"] < seconds["a100:8"]


def test_a_call_that_fits_nowhere_is_told_where_it_lacks_least() -> None:
    """The kind of device that comes nearest, with its own memory."""
    spec = MODELS["llama-70b"]
    problem = ppo(make_groups("l40s:1+a100:1"), ["batch_size=64"], spec)
    with pytest.raises(
        InfeasibleError, match=r"each a100 needs .* and has 80.* GiB, .* too little"
    ):
        OptionSpace(problem, StepPrices(problem, model_of(problem)))


def test_waves_and_options_are_of_the_group_s_own_memory() -> None:
    """The same call has other generation batches to try on a device with more memory."""
    spec = MODELS["llama-7b"]
    problem = ppo(
        make_groups("h200:8+l40s:8"),
        ["batch_size=4096", "prompt_len=512", "response_len=512"],
        spec,
    )
    call = problem.graph.call("actor_gen")
    least = [
        min(a.generation_batch for layout in ways(problem, call, mesh) for a in layout
            if a.generation_batch)
        for mesh in (DeviceMesh(0, 8), DeviceMesh(8, 8))
    ]  # fmt: skip
    assert least[0] > least[1]
