"""Protects pp, tp and dp: the order of ranks, the stages, and which splits are legal."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.mesh import DeviceMesh, enumerate_meshes
from planner.strategy import (
    ParallelStrategy,
    legal_strategies,
    parse_strategy,
    stage_layers,
    strategy_problem,
)
from profiles.errors import PlanError
from tests.planner.plans import SPEC, make_test_cluster

axes = st.integers(1, 5)


@given(axes, axes, axes)
def test_ranks_and_coordinates_are_inverse(pp: int, tp: int, dp: int) -> None:
    s = ParallelStrategy(pp=pp, tp=tp, dp=dp)
    places = [s.coordinates(rank) for rank in range(s.num_devices)]
    assert len(set(places)) == s.num_devices
    assert [s.rank(*place) for place in places] == list(range(s.num_devices))
    assert parse_strategy(s.short) == s


def test_tensor_parallel_ranks_are_neighbours() -> None:
    s = ParallelStrategy(pp=2, tp=2, dp=2)
    assert [s.rank(1, 0, t) for t in range(2)] == [4, 5]


@given(st.integers(1, 40), st.data())
def test_stages_cover_all_layers_evenly(num_layers: int, data: st.DataObject) -> None:
    pp = data.draw(st.integers(1, num_layers))
    stages = stage_layers(num_layers, pp)
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    sizes = [len(stage) for stage in stages]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(st.integers(1, 3), st.sampled_from([1, 2, 3, 4, 6, 8]), st.integers(1, 30))
def test_legal_strategies_are_all_products_without_a_problem(
    num_nodes: int, devices: int, max_dp: int
) -> None:
    """Oracle: every (pp, tp, dp) tried one by one; tp never leaves a node.

    More nodes forbid nothing: in one node a mesh may what it may on a cluster of that node.
    """
    cluster = make_test_cluster(num_nodes, devices)
    for mesh in enumerate_meshes(cluster):
        count = mesh.num_devices
        expected = {
            ParallelStrategy(pp=pp, tp=tp, dp=count // (pp * tp))
            for pp in range(1, count + 1)
            for tp in range(1, count + 1)
            if count % (pp * tp) == 0 and count // (pp * tp) <= max_dp
        }
        expected = {s for s in expected if strategy_problem(SPEC, s, mesh, cluster) is None}
        found = list(legal_strategies(SPEC, mesh, cluster, max_dp=max_dp))
        assert len(found) == len(set(found))
        assert set(found) == expected
        if count <= devices:
            own = DeviceMesh(mesh.first % devices, count)
            alone = legal_strategies(SPEC, own, make_test_cluster(1, devices), max_dp=max_dp)
            assert found == list(alone)
        for s in found:
            for start in range(mesh.first, mesh.first + count, s.tp):
                assert cluster.node_of(start) == cluster.node_of(start + s.tp - 1)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (ParallelStrategy(dp=4), r"pp 1 x tp 1 x dp 4 = 4 devices, but mesh \[0-7\] has 8"),
        (ParallelStrategy(pp=8), "pp 8 for 4 layers of x"),
        (ParallelStrategy(tp=8), "tp 8 does not divide the 4 heads of x"),
        (ParallelStrategy(dp=8, ep=2), "ep 2, but x has no experts"),
    ],
)
def test_what_cannot_run_is_said(strategy: ParallelStrategy, message: str) -> None:
    reason = strategy_problem(SPEC, strategy, DeviceMesh(0, 8), make_test_cluster(1, 8))
    assert reason is not None
    with pytest.raises(PlanError, match=message):
        raise PlanError(reason)


def test_tensor_parallelism_need_not_divide_kv_heads_and_vocabulary() -> None:
    grouped = replace(SPEC, num_kv_heads=2, vocab=SPEC.vocab + 1)
    mesh, cluster = DeviceMesh(0, 4), make_test_cluster(1, 4)
    assert strategy_problem(grouped, ParallelStrategy(tp=4), mesh, cluster) is None


def test_experts_are_split_over_data_parallel_ranks() -> None:
    mixture = replace(SPEC, num_experts=6, experts_per_token=2)
    mesh, cluster = DeviceMesh(0, 8), make_test_cluster(1, 8)
    strategy = parse_strategy("p1e2d8m1")
    assert strategy.ep == 2
    assert parse_strategy(strategy.short) == strategy
    assert strategy_problem(mixture, strategy, mesh, cluster) is None
    unequal = ParallelStrategy(dp=8, ep=4)
    reason = strategy_problem(mixture, unequal, mesh, cluster)
    assert reason == "ep 4 does not divide the 6 experts of x"
    with pytest.raises(PlanError, match="--layout: ep 4 does not divide dp 2; experts are split"):
        parse_strategy("d2p1m1e4")


@pytest.mark.parametrize(
    "text", ["d4p2", "d4p2m1m1", "d4p2x1", "", "d4p2m", "d4p2e2", "d4p2m1e2e2"]
)
def test_a_layout_is_three_letters(text: str) -> None:
    with pytest.raises(PlanError, match="is not a layout; write dp, pp and tp like d4p2m1"):
        parse_strategy(text)


def test_axes_and_zero_are_checked() -> None:
    with pytest.raises(PlanError, match="pp is 0"):
        ParallelStrategy(pp=0)
    with pytest.raises(PlanError, match="ZeRO stage 3 is not supported; use 0 or 1"):
        ParallelStrategy(zero=3)
