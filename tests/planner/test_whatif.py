"""Protects ``WhatIf``: a row is what a search of that scenario finds, a scenario is searched once,
and Pareto, tornado and break-even say what brute force over the rows says.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import planner.whatif as module
from experiments.grpo.graph import ALGORITHM as GRPO
from experiments.ppo.graph import ALGORITHM
from planner.algorithm import make_config, make_problem
from planner.plan import Problem
from planner.resolve import make_costs
from planner.scenario import Task, scenario_problem, solve
from planner.search import search
from planner.whatif import WhatIf
from profiles.catalogue import MODELS
from profiles.clusters import DEVICES, make_cluster
from profiles.errors import ConfigError

WORDS = ["batch_size=8", "prompt_len=16", "response_len=16", "ppo.num_mini_batches=2"]


@pytest.fixture(scope="module")
def problem() -> Problem:
    spec, config = MODELS["tiny"], make_config(ALGORITHM.config_class, WORDS)
    cluster = make_cluster("a100", 1)
    return make_problem(ALGORITHM, config, model=spec, critic=spec, cluster=cluster)


@pytest.fixture
def what(problem: Problem) -> WhatIf:
    return WhatIf(problem, dollars_per_hour={"a100": 2.0, "h100": 4.0}, workers=1)


def test_a_row_is_what_a_search_says(problem: Problem, what: WhatIf) -> None:
    frame = what.sweep(gpus=[1, 2], response_len=[8, 16])
    assert list(zip(frame["gpus"], frame["response_len"])) == [(1, 8), (1, 16), (2, 8), (2, 16)]
    row = frame.iloc[3]
    changed = scenario_problem(problem, {"gpus": 2, "response_len": 16})
    costs = make_costs(changed.cluster, None)
    found = search(changed, costs, seed=1, gap=0.02, time_limit_s=5.0).plan
    assert found.estimate is not None
    assert row["seconds"] == found.estimate.step_s
    assert row["plan"].allocations == found.allocations
    assert str(row["plan"]) == f"ppo on 2 x a100, {row['seconds']:.4g} s a step"
    assert row["dollars"] == pytest.approx(row["seconds"] / 3600 * 2 * 2.0)
    assert row["tokens_per_s"] == pytest.approx(8 * 32 / row["seconds"])
    assert row["peak_memory"] + row["headroom"] == changed.cluster.device.memory_bytes


def test_scenarios_change_what_they_name(problem: Problem) -> None:
    changed = scenario_problem(
        problem,
        {"device": "h100", "gpus": 8, "memory_limit": "40GiB", "batch_size": 16,
         "cluster.intra_link.bytes_per_s": 1e9, "ppo.num_mini_batches": 4},
    )  # fmt: skip
    assert changed.cluster.device.name == "h100"
    assert changed.cluster.num_devices == 8
    assert changed.cluster.device.memory_bytes == 40 * 2**30
    assert changed.cluster.intra_link.bytes_per_s == 1e9
    assert changed.workload.batch_size == 16
    assert changed.config["ppo"]["num_mini_batches"] == 4
    assert changed.models == problem.models
    assert scenario_problem(problem, {}) == problem
    with pytest.raises(ConfigError, match="override 'batchsize=3'"):
        scenario_problem(problem, {"batchsize": 3})
    with pytest.raises(ConfigError, match="gpus: 0 is not a positive whole number"):
        scenario_problem(problem, {"gpus": 0})


def test_a_sweep_asks_what_each_scenario_is_alone(problem: Problem, what: WhatIf) -> None:
    """Options are resolved once for all clusters: the problems are those of both at once."""
    for changes in (
        {"gpus": 8, "response_len": 8, "memory_limit": "40GiB"}, {"gpus": 8, "response_len": 16},
        {"device": "h100", "response_len": 8, "max_staleness": 1}, {"response_len": 8},
    ):  # fmt: skip
        assert what._task(changes).problem == scenario_problem(problem, changes)


def test_a_scenario_is_searched_once(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[str] = []

    def counted(tasks: Sequence[Task]) -> object:
        searched.extend(task.key for task in tasks)
        return solve(tasks)

    monkeypatch.setattr(module, "solve", counted)
    first = WhatIf(problem, workers=1, cache=tmp_path)
    before = first.sweep(response_len=[8, 16, 8])
    again = first.sweep(response_len=[16])
    other = WhatIf(problem, workers=1, cache=tmp_path).sweep(response_len=[8, 16, 8])
    assert len(searched) == len(set(searched)) == 2
    pd.testing.assert_series_equal(before["seconds"], other["seconds"])
    assert again["seconds"][0] == before["seconds"][1]
    for file in tmp_path.iterdir():  # a damaged answer is searched again
        file.write_text(file.read_text()[:100])
    WhatIf(problem, workers=1, cache=tmp_path).sweep(response_len=[16])
    assert len(searched) == 3


def test_shared_prices_are_those_of_each_cluster_alone(problem: Problem) -> None:
    """Oracle: a search of each number of nodes that shares nothing."""
    tasks = [WhatIf(problem)._task({"gpus": gpus, "model": "llama-7b"}) for gpus in (16, 8, 24)]
    assert len({task.family for task in tasks}) == 1
    assert len({task.key for task in tasks}) == 3
    for task, answer in zip(tasks, solve(tasks)):
        costs = make_costs(task.problem.cluster, None)
        alone = search(task.problem, costs, seed=1, gap=0.02, time_limit_s=5.0)
        assert answer.plan is not None
        assert answer.plan.allocations == alone.plan.allocations
        assert answer.plan.estimate == alone.plan.estimate
        course = answer.plan.provenance["progress"]
        assert course[-1][2:] == pytest.approx([alone.step_s, alone.lower_bound_s], rel=1e-5)


def test_other_nodes_or_data_share_no_prices(problem: Problem) -> None:
    what = WhatIf(problem)
    changes = [{}, {"gpus": 8}, {"device": "h100"}, {"response_len": 8}, {"memory_limit": "9GiB"}]
    assert len({what._task(change).family for change in changes}) == len(changes)
    locked = what.lock("actor_gen", num_micro_batches=2)
    assert locked._task({}).family != what._task({}).family
    assert locked._task({}).key != what._task({}).key


def test_a_locked_call_is_as_it_is_locked(problem: Problem, what: WhatIf) -> None:
    free = what.best(gpus=2)
    locked = what.lock("actor_gen", strategy="d1p2m1").lock("ref_inf", mesh=(1, 1))
    plan = locked.best(gpus=2)
    assert plan.allocations["actor_gen"].strategy.short == "d1p2m1"
    assert str(plan.allocations["ref_inf"].mesh) == "[1]"
    assert free.estimate is not None
    assert plan.estimate is not None
    assert plan.estimate.step_s >= free.estimate.lower_bound_s
    again = what.lock("critic_train", like=plan).best(gpus=2)
    assert again.allocations["critic_train"] == plan.allocations["critic_train"]
    assert not what.locks
    with pytest.raises(ConfigError, match="unknown call 'gen'"):
        what.lock("gen", num_micro_batches=1)


def test_processes_find_what_one_finds(problem: Problem, what: WhatIf) -> None:
    two = WhatIf(problem, workers=2).sweep(response_len=[8, 16])
    assert two["seconds"].tolist() == what.sweep(response_len=[8, 16])["seconds"].tolist()


def test_what_does_not_fit_is_a_row(problem: Problem, what: WhatIf) -> None:
    frame = what.sweep(memory_limit=["3GiB", "40GiB"], model="llama-7b")
    assert math.isnan(frame["seconds"][0])
    assert "does not fit" in frame["reason"][0]
    with pytest.raises(ConfigError, match="does not fit"):
        what.best(memory_limit="3GiB", model="llama-7b")


def test_what_offload_buys_is_a_scenario(problem: Problem, what: WhatIf) -> None:
    """Without it no plan is faster than with it, and none has it."""
    with_it, without = what.sweep(offload=[True, False], memory_limit="2200MiB")["plan"]
    assert not any(a.offload for a in without.allocations.values())
    assert with_it.estimate.lower_bound_s <= without.estimate.step_s
    with pytest.raises(ConfigError, match="offload: 'no' is neither True nor False"):
        what.sweep(offload="no")


def test_generation_a_step_ahead_is_a_scenario(problem: Problem, what: WhatIf) -> None:
    """It is only another way to run: what it allows is never slower than what it has at least."""
    frame = what.sweep(gpus=2, max_staleness=[0, 1], response_len=8)
    assert frame["plan"][0].problem.graph.max_staleness == 0
    bound, step_s = frame["lower_bound"][1], frame["seconds"][0]
    assert bound <= step_s
    assert frame["seconds"][1] <= step_s * 1.02
    ahead = scenario_problem(problem, {"max_staleness": 1})
    assert scenario_problem(ahead, {"response_len": 8}).graph.max_staleness == 1
    with pytest.raises(ConfigError, match="max_staleness"):
        what.sweep(max_staleness=2)


def test_tokens_are_those_of_all_answers() -> None:
    words = ["batch_size=4", "samples_per_prompt=3", "prompt_len=16", "response_len=16",
             "reward.source=vader"]  # fmt: skip
    spec, config = MODELS["tiny"], make_config(GRPO.config_class, words)
    grpo = make_problem(GRPO, config, model=spec, critic=spec, cluster=make_cluster("a100", 1))
    row = WhatIf(grpo, workers=1).sweep().iloc[0]
    assert row["tokens_per_s"] == pytest.approx(4 * 3 * 32 / row["seconds"])


def test_shorter_prompts_take_less_time_and_the_longest_is_no_longer_held(what: WhatIf) -> None:
    frame = what.sweep(**{"data.prompt_mean": [0, 4]}, gpus=1)
    assert frame["seconds"][1] < frame["seconds"][0]
    assert what.sweep(prompt_len=4, gpus=1)["seconds"][0] <= frame["seconds"][1] * 1.02
    with pytest.raises(ConfigError, match=r"data\.prompt_mean: 17 is not from 1 to the longest"):
        what.sweep(**{"data.prompt_mean": 17})


def test_pareto_is_what_no_other_beats(what: WhatIf) -> None:
    frame = what.sweep(gpus=[1, 2, 4], device=["a100", "h100"])
    front = what.pareto("seconds", "dollars")
    rows = list(zip(frame["seconds"], frame["dollars"]))
    expected = sorted(
        a for a in rows if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in rows)
    )
    assert sorted(zip(front["seconds"], front["dollars"])) == expected
    with pytest.raises(ConfigError, match="unknown measure 'cost'"):
        what.pareto("cost")


def test_prices_are_the_users_or_else_the_catalogues(problem: Problem) -> None:
    def dollars(price: float | dict[str, float] | None) -> list[float]:
        frame = WhatIf(problem, dollars_per_hour=price, workers=1).sweep(device=["a100", "h100"])
        return list(frame["dollars"] / frame["seconds"] * 3600)

    known = [DEVICES[name].dollars_per_hour for name in ("a100", "h100")]
    assert dollars(None) == pytest.approx(known)
    assert dollars(5.0) == pytest.approx([5.0, 5.0])
    assert dollars({"h100": 0.0}) == pytest.approx([known[0], 0.0])


def test_pareto_without_a_price_or_a_sweep(problem: Problem) -> None:
    unpriced = replace(problem.cluster.device, dollars_per_hour=0.0)
    cluster = replace(problem.cluster, device=unpriced)
    fresh = WhatIf(replace(problem, cluster=cluster), workers=1)
    with pytest.raises(ConfigError, match="no scenarios yet; call sweep first"):
        fresh.pareto("seconds")
    fresh.sweep(response_len=[8])
    with pytest.raises(ConfigError, match="no price is known; give WhatIf dollars_per_hour"):
        fresh.pareto("dollars")


def test_tornado_turns_one_thing_at_a_time(what: WhatIf) -> None:
    frame = what.tornado()
    assert list(frame["swing"]) == sorted(frame["swing"], reverse=True)
    rows = frame.set_index("lever")
    assert rows.loc["response length", "divided"] == what.sweep(response_len=[8])["seconds"][0]
    for lever in ("FLOP/s", "memory bandwidth"):  # more of it is never worse, but for the gap
        assert rows.loc[lever, "multiplied"] <= rows.loc[lever, "divided"] * 1.02
    with pytest.raises(ConfigError, match=r"cannot turn seconds by 1\.0"):
        what.tornado(factor=1.0)


def test_break_even_is_where_the_lines_cross(what: WhatIf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: 10 + x and 2 x meet at 10; 1 and x + 1 touch at 0."""
    lines = {"a": lambda x: 10.0 + x, "b": lambda x: 2.0 * x, "c": lambda x: 100.0}

    def sweep(name: str, x: list[float]) -> pd.DataFrame:
        return pd.DataFrame({"dollars": [lines[name](value) for value in x]})

    monkeypatch.setattr(what, "sweep", sweep)
    assert what.break_even("x", [0, 8, 16], {"name": "a"}, {"name": "b"}) == pytest.approx(10.0)
    assert what.break_even("x", [0, 8, 16], {"name": "a"}, {"name": "c"}) is None
    assert what.break_even("x", [0, 10], {"name": "a"}, {"name": "b"}) == 10.0


def test_plans_are_explained_and_compared(what: WhatIf) -> None:
    a, b = what.best(gpus=1), what.best(gpus=2)
    assert what.explain(a).step_s > 0
    assert what.compare(a, b).clusters_differ["devices_per_node"] == (1, 2)


def test_importing_the_planner_does_not_import_pandas() -> None:
    code = "import sys, planner; assert 'pandas' not in sys.modules; planner.WhatIf"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
