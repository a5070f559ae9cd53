"""``WhatIf``: a plan or a problem, and what becomes of it when the world is another.

    from planner import WhatIf, load_plan

    what = WhatIf(load_plan("plan.json"))
    what.sweep(gpus=[32, 64, 128], device=["a100", "h100"])
    what.pareto("seconds", "dollars")
    what.lock("actor_gen", strategy="d16p1m8").best(gpus=128)

Every scenario is searched once and then remembered, on request in a folder too. New ones run in
parallel processes, those that differ in the number of nodes only one after another in one of
them: they share prices (``scenario.solve``). A script that calls ``sweep`` needs
``if __name__ == "__main__":``, as always with processes that Python spawns.
"""

from __future__ import annotations

import copy
import gc
import logging
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from planner.compare import Comparison, compare
from planner.explain import Explanation, explain
from planner.lock import Lock
from planner.mesh import DeviceMesh
from planner.plan import Allocation, ExecutionPlan, Problem
from planner.plan_memory import fullest_device
from planner.resolve import hardware_levers, is_of, load_table
from planner.scenario import (
    Answer,
    Answers,
    Task,
    changes_cluster,
    scenario_problem,
    solve,
    task_costs,
)
from planner.strategy import ParallelStrategy, parse_strategy
from profiles.costs import Provenance
from profiles.errors import ConfigError, unknown_name
from profiles.hardware import Cluster, DeviceSpec

# Measures of a row, and whether more of it is better.
_MEASURES: Mapping[str, bool] = {
    "seconds": False, "dollars": False, "peak_memory": False, "gap": False, "lower_bound": False,
    "tokens_per_s": True, "headroom": True, "vs_symmetric": True,
    "extrapolated": False,
}  # fmt: skip

# What ``tornado`` turns: label -> axis of the sweep.
_HARDWARE: Mapping[str, str] = {
    "FLOP/s": "cluster.device.peak_flops",
    "memory bandwidth": "cluster.device.memory_bytes_per_s",
    "links inside nodes": "cluster.intra_link.bytes_per_s",
    "network between nodes": "cluster.inter_link.bytes_per_s",
}
_WORKLOAD: Mapping[str, str] = {"response length": "response_len", "batch size": "batch_size"}


def _hardware(cluster: Cluster) -> Mapping[str, str]:
    """As ``_HARDWARE``; of a cluster of groups, of each of them."""
    if len(cluster.groups) == 1:
        return _HARDWARE
    return {
        f"{label} of {group.name}": axis.replace("cluster.", f"cluster.groups.{index}.")
        for index, group in enumerate(cluster.groups)
        for label, axis in _HARDWARE.items()
    }


def _prepare_process() -> None:
    """Rows have a column ``extrapolated``, which says more than warnings from every process.

    Costing makes a million tuples that all stay: to look for garbage among them takes a seventh
    of the time.
    """
    logging.disable(logging.WARNING)
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


def _headroom_bytes(plan: ExecutionPlan, peak_bytes: int) -> int:
    """What is left of the fullest device; which one it is, is asked where they are unlike."""
    sizes = {group.device.memory_bytes for group in plan.problem.cluster.groups}
    has_bytes = sizes.pop() if len(sizes) == 1 else fullest_device(plan).has_bytes
    return has_bytes - peak_bytes


class WhatIf:
    """Scenarios around one problem; remembers all that it was asked."""

    def __init__(
        self,
        start: ExecutionPlan | Problem,
        *,
        profile: str | None = None,
        dollars_per_hour: float | Mapping[str, float] | None = None,
        time_limit_s: float = 5.0,
        gap: float = 0.02,
        cache: str | Path | None = None,
        workers: int | None = None,
    ) -> None:
        """``dollars_per_hour``: of one device, or by a device's name; of others the catalogue's.

        ``time_limit_s`` and ``gap``: of each new scenario's search; 2% is less than any estimate
        is good for, and takes half the time of the 1% of ``realplan search``. ``cache``: a
        folder. ``workers``: processes, default one a core.

        Raises:
            ProfileError: the profile cannot be read.
        """
        self.problem = start.problem if isinstance(start, ExecutionPlan) else start
        self.seed = start.seed if isinstance(start, ExecutionPlan) else 1
        self.table = load_table(profile)
        self.dollars_per_hour = dollars_per_hour
        self.time_limit_s = time_limit_s
        self.gap = gap
        self.locks: dict[str, Lock] = {}
        self.workers = workers or os.cpu_count() or 1
        self.answers = Answers(folder=None if cache is None else Path(cache))
        self._rows: dict[tuple[tuple[str, Any], ...], dict[str, Any]] = {}
        self._problems: dict[str, Problem] = {}  # by the options that were changed

    # ---- scenarios ----

    def sweep(self, **axes: Any) -> pd.DataFrame:
        """One row for each combination of the axes' values; see ``scenario.scenario_problem``.

        ``offload=False`` leaves nothing in the host's memory between calls, whatever would pay.
        Axes with a dot in their name go as ``sweep(**{"ppo.num_mini_batches": [4, 8]})``.
        Columns: the axes, seconds and tokens_per_s of a step, dollars of a step (NaN without a
        price), lower_bound (seconds), gap, peak_memory and headroom (bytes of the fullest
        device), vs_symmetric (how many times as fast as the best single layout), extrapolated
        (share of the calls' seconds that lies outside of what was measured), plan, and reason
        where nothing fits: then all else is NaN.

        Raises:
            ConfigError: an axis that does not exist, or a value that it cannot have.
        """
        values = [v if isinstance(v, list | tuple | range) else [v] for v in axes.values()]
        scenarios = [dict(zip(axes, row)) for row in product(*values)]
        tasks = [self._task(scenario) for scenario in scenarios]
        rows = []
        for scenario, task, answer in zip(scenarios, tasks, self._solve(tasks)):
            row = {**scenario, **self._measures(task.problem, answer)}
            self._rows[tuple(scenario.items())] = row
            rows.append(row)
        return pd.DataFrame(rows)

    def best(self, **changes: Any) -> ExecutionPlan:
        """The plan of one scenario.

        Raises:
            ConfigError: nothing fits, or no such scenario.
        """
        row = self.sweep(**changes).iloc[0]
        if row["plan"] is None:
            raise ConfigError(row["reason"], where="what if")
        plan: ExecutionPlan = row["plan"]
        return plan

    def lock(
        self, call: str, *, mesh: DeviceMesh | tuple[int, int] | None = None,
        strategy: ParallelStrategy | str | None = None, num_micro_batches: int | None = None,
        like: ExecutionPlan | Allocation | None = None,
    ) -> WhatIf:  # fmt: skip
        """The same analysis with parts of one call decided; searches decide the rest.

        ``mesh``: (first device, number of devices). ``strategy``: pp, tp and dp, as ``"d4p1m2"``.
        ``like``: the whole allocation, or that of a plan's call. Locks of other calls stay.

        Raises:
            ConfigError: no such call, or a strategy that cannot be read.
        """
        names = [known.name for known in self.problem.graph.calls]
        if call not in names:
            raise unknown_name("call", call, names, where="lock")
        if isinstance(strategy, str):
            strategy = parse_strategy(strategy, where=f"lock {call}")
        if isinstance(like, ExecutionPlan):
            like = like.allocations[call]
        locked = copy.copy(self)
        locked.locks = {
            **self.locks,
            call: Lock(
                mesh=DeviceMesh(*mesh) if isinstance(mesh, tuple) else mesh, strategy=strategy,
                num_micro_batches=num_micro_batches, allocation=like,
            ),
        }  # fmt: skip
        locked._rows = {}
        return locked

    def _task(self, changes: Mapping[str, Any]) -> Task:
        offload = changes.get("offload", True)
        if not isinstance(offload, bool):
            raise ConfigError(f"{offload!r} is neither True nor False", where="offload")
        options = {k: v for k, v in changes.items() if not changes_cluster(k) and k != "offload"}
        # Resolving an algorithm's options takes longer than all else here: once for all clusters.
        question = repr(sorted(options.items()))
        if question not in self._problems:
            self._problems[question] = scenario_problem(self.problem, options)
        cluster = {k: v for k, v in changes.items() if changes_cluster(k)}
        return Task(
            problem=scenario_problem(self._problems[question], cluster), table=self.table,
            seed=self.seed, gap=self.gap, time_limit_s=self.time_limit_s, locks=self.locks,
            offload=offload,
        )  # fmt: skip

    def _solve(self, tasks: Sequence[Task]) -> list[Answer]:
        """The tasks' answers; those that are not known yet are searched."""
        keys = [task.key for task in tasks]
        new = {key: t for key, t in zip(keys, tasks) if self.answers.find(key) is None}
        families: dict[str, list[str]] = {}
        for key, task in new.items():
            families.setdefault(task.family, []).append(key)
        batches = list(families.values())
        if len(batches) < self.workers:  # shared prices save less than idle cores cost
            batches = [[key] for key in new]
        found = self._run([[new[key] for key in batch] for batch in batches])
        for batch, answers in zip(batches, found):
            for key, answer in zip(batch, answers):
                self.answers.add(key, answer)
        return [self.answers.known[key] for key in keys]

    def _run(self, batches: Sequence[Sequence[Task]]) -> Iterator[list[Answer]]:
        if self.workers == 1 or len(batches) <= 1:
            yield from map(solve, batches)
            return
        # Not forked: a notebook has threads, whose locks a forked child would hold for ever.
        context = multiprocessing.get_context("spawn")
        workers = min(self.workers, len(batches))
        with ProcessPoolExecutor(workers, context, _prepare_process) as pool:
            yield from pool.map(solve, batches)

    def _measures(self, problem: Problem, answer: Answer) -> dict[str, Any]:
        plan = answer.plan
        if plan is None:
            return {**dict.fromkeys(_MEASURES, float("nan")), "plan": None, "reason": answer.reason}
        estimate, workload = plan.estimate, problem.workload
        assert estimate is not None
        symmetric_s = plan.baselines.get("symmetric", float("nan"))
        return {
            "seconds": estimate.step_s,
            "dollars": estimate.step_s / 3600 * self._dollars_per_hour(problem.cluster),
            "peak_memory": estimate.peak_bytes,
            "gap": estimate.gap,
            "lower_bound": estimate.lower_bound_s,
            "tokens_per_s": workload.num_sequences * workload.expected_tokens / estimate.step_s,
            "headroom": _headroom_bytes(plan, estimate.peak_bytes),
            "vs_symmetric": symmetric_s / estimate.step_s,
            "extrapolated": estimate.provenance.get(Provenance.EXTRAPOLATED.value, 0.0),
            "plan": plan,
            "reason": "",
        }

    def _dollars_per_hour(self, cluster: Cluster) -> float:
        """Of all devices, NaN where the price of some is not known."""
        return sum(group.num_devices * self._price(group.device) for group in cluster.groups)

    def _price(self, device: DeviceSpec) -> float:
        """Dollars of one device in an hour, NaN where none is known."""
        given = self.dollars_per_hour
        if isinstance(given, Mapping):
            given = given.get(device.name)
        if given is None:
            return device.dollars_per_hour or float("nan")
        return given

    # ---- answers ----

    def pareto(self, *measures: str) -> pd.DataFrame:
        """Of all scenarios so far those that no other one equals or beats in every measure.

        Raises:
            ConfigError: an unknown measure, dollars without a price, or no sweep yet.
        """
        for measure in measures:
            if measure not in _MEASURES:
                raise ConfigError(
                    f"unknown measure '{measure}'", where="pareto",
                    remedy=f"use {', '.join(_MEASURES)}",
                )  # fmt: skip
        frame = pd.DataFrame(list(self._rows.values()))
        if frame.empty or not measures:
            raise ConfigError("no scenarios yet", where="pareto", remedy="call sweep first")
        if "dollars" in measures and frame["dollars"].isna().all():
            raise ConfigError(
                "no price is known", where="pareto", remedy="give WhatIf dollars_per_hour"
            )
        frame = frame.dropna(subset=list(measures))
        signs = [-1.0 if _MEASURES[measure] else 1.0 for measure in measures]
        points = frame[list(measures)].to_numpy(dtype=float) * signs
        beaten = [
            bool(((points <= point).all(axis=1) & (points < point).any(axis=1)).any())
            for point in points
        ]
        kept = frame[[not lost for lost in beaten]]
        return kept.sort_values(measures[0], ascending=not _MEASURES[measures[0]])

    def tornado(self, measure: str = "seconds", *, factor: float = 2.0) -> pd.DataFrame:
        """What matters most: ``measure`` with each thing divided and multiplied by ``factor``.

        A new plan is searched each time. Columns: divided, base, multiplied, swing (the
        difference); the largest swing first. Hardware is left out where its costs are measured:
        a profile says nothing of a device that was not there.

        Raises:
            ConfigError: an unknown measure, or a factor that is not above 1.
        """
        if measure not in _MEASURES or not factor > 1:
            raise ConfigError(f"cannot turn {measure} by {factor}", where="tornado")
        levers = dict(_WORKLOAD)
        if self.table is None:
            levers = {**_hardware(self.problem.cluster), **_WORKLOAD}
        scenarios: list[dict[str, Any]] = [{}]
        for axis in levers.values():
            value = self._value(axis)
            whole = isinstance(value, int) and axis in _WORKLOAD.values()
            for changed in (value / factor, value * factor):
                scenarios.append({axis: max(1, round(changed)) if whole else changed})
        tasks = [self._task(scenario) for scenario in scenarios]
        answers = self._solve(tasks)
        found = [self._measures(t.problem, a)[measure] for t, a in zip(tasks, answers)]
        rows = [
            {
                "lever": lever,
                "divided": found[1 + 2 * i],
                "base": found[0],
                "multiplied": found[2 + 2 * i],
                "swing": abs(found[2 + 2 * i] - found[1 + 2 * i]),
            }
            for i, lever in enumerate(levers)
        ]
        return pd.DataFrame(rows).sort_values("swing", ascending=False, ignore_index=True)

    def _value(self, axis: str) -> Any:
        """What an axis is now."""
        if not axis.startswith("cluster."):
            return self.problem.config[axis]
        value: Any = self.problem.cluster
        for part in axis.split(".")[1:]:
            value = value[int(part)] if part.isdecimal() else getattr(value, part)
        return value

    def break_even(
        self, axis: str, values: Sequence[float], a: Mapping[str, Any], b: Mapping[str, Any], *,
        measure: str = "dollars",
    ) -> float | None:  # fmt: skip
        """Where on ``axis`` scenario ``a`` and scenario ``b`` are level in ``measure``.

        Linear between the two neighbouring ``values`` where the sign of the difference turns;
        None where one is ahead throughout.
        """
        first = self.sweep(**a, **{axis: list(values)})[measure]
        second = self.sweep(**b, **{axis: list(values)})[measure]
        difference = (first - second).to_list()
        for i in range(len(values) - 1):
            left, right = difference[i], difference[i + 1]
            if left == 0:
                return float(values[i])
            if left * right < 0:
                return float(values[i] + (values[i + 1] - values[i]) * left / (left - right))
        return float(values[-1]) if difference[-1] == 0 else None

    def explain(self, plan: ExecutionPlan) -> Explanation:
        """What binds ``plan``; see ``planner.explain``."""
        cluster = plan.problem.cluster
        same = self.table is not None and any(is_of(self.table, g.device) for g in cluster.groups)
        links, device = hardware_levers(self.table if same else None)
        return explain(plan, task_costs(cluster, self.table), links=links, device=device)

    def compare(
        self, a: ExecutionPlan, b: ExecutionPlan, *, names: tuple[str, str] = ("a", "b")
    ) -> Comparison:
        """Two plans side by side; see ``planner.compare``."""
        costs = [task_costs(plan.problem.cluster, self.table) for plan in (a, b)]
        return compare(a, b, *costs, names=names)

    # ---- figures, with the extra ``notebook`` ----

    def draw(self, x: str, y: str) -> Any:
        """All scenarios so far by two measures, those of ``pareto(x, y)`` joined and named.

        Raises:
            ConfigError: as ``pareto``, or plotly is not installed.
        """
        from planner.figures_sweep import pareto

        front = self.pareto(x, y)
        axes = dict.fromkeys(name for scenario in self._rows for name, _ in scenario)
        return pareto(pd.DataFrame(list(self._rows.values())), front, x, y, axes=list(axes))

    def draw_tornado(self, measure: str = "seconds", *, factor: float = 2.0) -> Any:
        """``tornado`` as a figure; raises ``ConfigError`` where plotly is not installed."""
        from planner.figures_sweep import tornado

        return tornado(self.tornado(measure, factor=factor), measure, factor=factor)
