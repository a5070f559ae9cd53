"""Protects plan.json: what is saved is what is loaded, and a damaged file is refused by path."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.mesh import DeviceMesh
from planner.plan import Allocation, Estimate, ExecutionPlan
from planner.plan_schema import dumps, load_plan, plan_from_dict, plan_to_dict, save_plan
from planner.strategy import ParallelStrategy
from profiles.errors import PlanError
from tests.planner.plans import random_plan

finite = st.floats(allow_nan=False, allow_infinity=False)


@pytest.fixture
def plan() -> ExecutionPlan:
    return random_plan(random.Random(3))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), number=finite, share=finite, name=st.text(max_size=8))
def test_round_trip_is_exact(seed: int, number: float, share: float, name: str) -> None:
    """Every field comes back equal, floats to the last bit, through the text of the file."""
    plan = random_plan(random.Random(seed))
    plan = ExecutionPlan(
        problem=plan.problem, allocations=plan.allocations, seed=seed,
        estimate=Estimate(
            step_s=number, lower_bound_s=share, per_call_s={name: number}, peak_bytes=seed,
            provenance={"measured": share},
        ),
        baselines={name: share}, provenance={name: [number, None, {"a": True}]},
    )  # fmt: skip
    data = plan_to_dict(plan)
    assert plan_from_dict(json.loads(dumps(data))) == plan
    assert json.loads(dumps(data)) == json.loads(json.dumps(data))


def test_saved_files_are_equal_and_leave_nothing_beside(
    plan: ExecutionPlan, tmp_path: Path
) -> None:
    for name in ("a.json", "b.json"):
        save_plan(plan, tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert load_plan(tmp_path / "a.json") == plan
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_allocations_are_easy_to_edit(plan: ExecutionPlan) -> None:
    allocation = plan_to_dict(plan)["allocations"]["actor_gen"]
    assert set(allocation) == set(Allocation.__slots__)
    assert set(allocation["strategy"]) == set(ParallelStrategy.__slots__) - {"ep"}
    mesh = plan.allocations["actor_gen"].mesh
    assert allocation["mesh"] == [mesh.first, mesh.num_devices]


def _edit(data: Any, path: list[Any], value: Any) -> None:
    for part in path[:-1]:
        data = data[part]
    if value is KeyError:
        del data[path[-1]]
    else:
        data[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["schema"], "other", r"schema: schema is 'other'; a plan has"),
        (["version"], 1, "version is 1; this realplan reads versions 4 and 5"),
        (["version"], KeyError, "version is None"),
        (["workload"], KeyError, "workload: missing field"),
        (["extra"], 1, "extra: unknown field; known: .*allocations"),
        (["cluster", "device", "peak_flops"], "fast", r"cluster.device.peak_flops: is the text"),
        (["cluster", "num_nodes"], 1.5, "cluster.num_nodes: .*must be a whole number"),
        (["cluster", "num_nodes"], True, "cluster.num_nodes: is true; it must be a whole number"),
        (["allocations", "actor_gen", "mesh"], [0], r"actor_gen.mesh: .*\[first device"),
        (["allocations", "actor_gen", "strategy", "tp"], "2", "actor_gen.strategy.tp: is the text"),
        (["allocations", "actor_gen", "strategy", "pp"], KeyError, "strategy.pp: missing field"),
        (["allocations", "actor_gen", "strategy", "zero"], 3, "ZeRO stage 3 is not supported"),
        (["allocations", "actor_gen", "strategy", "ep"], "2", "actor_gen.strategy.ep: is the text"),
        (["allocations", "actor_gen", "strategy", "ep"], 0, "ep is 0, not a positive whole number"),
        (["allocations", "actor_gen", "strategy", "ep"], 3, r"actor_gen.*ep 3 does not divide dp"),
        (["allocations", "actor_gen"], KeyError, "allocations.actor_gen: missing"),
        (["allocations", "rollout"], None, "allocations.rollout: is null; it must be an object"),
        (["graph", "calls", 0, "kind"], "dance", r"graph.calls\[0\].kind: .*generate, infer"),
        (["graph", "calls"], {}, "graph.calls: is an object; it must be a list"),
        (["models", "actor"], KeyError, "models.actor: this role of the graph has no model"),
        (["models", "actor", "hidden"], 0, r"model x\.hidden: 0 is not a positive whole number"),
        (["workload", "batch_size"], 0, "workload.batch_size: 0 is not a positive"),
        (["seed"], None, "seed: is null; it must be a whole number"),
    ],
)
def test_a_bad_field_is_named(
    plan: ExecutionPlan, tmp_path: Path, path: list[Any], value: Any, message: str
) -> None:
    data = copy.deepcopy(plan_to_dict(plan))
    _edit(data, path, value)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message) as caught:
        load_plan(file)
    assert str(file) in str(caught.value)


def test_expert_parallelism_may_be_left_out(plan: ExecutionPlan) -> None:
    """A plan without the field, as older ones are, has ep 1; one that splits experts says so."""
    data = plan_to_dict(plan)
    assert all("ep" not in a["strategy"] for a in data["allocations"].values())
    assert plan_from_dict(data) == plan
    problem = plan.problem
    mixture = {
        role: replace(spec, num_experts=4, experts_per_token=2)
        for role, spec in problem.models.items()
    }
    split = {
        name: replace(
            allocation, strategy=ParallelStrategy(dp=2, ep=2), mesh=DeviceMesh(0, 2),
            num_micro_batches=1, generation_batch=0, offload=False,
        )
        for name, allocation in plan.allocations.items()
        if problem.spec_of(name) is not None
    }  # fmt: skip
    mixed = replace(
        plan, problem=replace(problem, models=mixture), allocations={**plan.allocations, **split}
    )
    data = plan_to_dict(mixed)
    assert data["allocations"]["actor_train"]["strategy"]["ep"] == 2
    assert plan_from_dict(data) == mixed


def test_every_section_is_required(plan: ExecutionPlan) -> None:
    for name in plan_to_dict(plan):
        data = plan_to_dict(plan)
        del data[name]
        with pytest.raises(PlanError, match=name):
            plan_from_dict(data)


def test_every_cut_of_a_file_is_refused(plan: ExecutionPlan, tmp_path: Path) -> None:
    """A file cut off anywhere says so; none is read as a smaller plan."""
    file = tmp_path / "plan.json"
    save_plan(plan, file)
    text = file.read_text()
    for end in range(0, len(text) - 2, max(1, len(text) // 60)):
        file.write_text(text[:end])
        with pytest.raises(PlanError, match="is cut off at line"):
            load_plan(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
        (b"hello", "is not JSON at line 1, column 1"),
        (b"[1, 2]", "holds a list, not a plan's object"),
        (b'{"schema": "realplan-plan", "schema": 1}', "'schema' stands twice"),
        (b'{"schema": NaN}', "NaN is not a number"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    with pytest.raises(PlanError, match=message):
        load_plan(file)


def test_missing_file_and_missing_folder(plan: ExecutionPlan, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot be read .*realplan search"):
        load_plan(tmp_path / "none.json")
    with pytest.raises(PlanError, match="cannot be written"):
        save_plan(plan, tmp_path / "none" / "plan.json")


def test_an_edited_strategy_must_divide_the_heads(plan: ExecutionPlan) -> None:
    data = plan_to_dict(plan)
    data["cluster"].update(num_nodes=1, devices_per_node=8)
    strategy = {**data["allocations"]["ref_inf"]["strategy"], "dp": 1, "pp": 1, "tp": 8}
    data["allocations"]["ref_inf"].update(mesh=[0, 8], strategy=strategy)
    for name, allocation in data["allocations"].items():
        if name != "ref_inf":
            allocation["mesh"] = [0, 1]
            allocation["strategy"] = {**strategy, "tp": 1}
            allocation["num_micro_batches"] = 1
    with pytest.raises(PlanError, match=r"allocations.ref_inf: tp 8 does not divide the 4 heads"):
        plan_from_dict(data)
