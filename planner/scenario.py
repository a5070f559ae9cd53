"""One scenario of a what-if analysis: a problem with some things changed, solved and remembered.

``scenario_problem`` changes a problem by named axes; ``solve`` searches its plan in this process
or another one; ``Answers`` keeps what was found, in memory and in a folder. Read ``Task`` first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from planner.algorithm import config_to_dict, find_algorithm, make_config, planned_workload
from planner.cluster_file import is_cluster_file
from planner.cost import Costs
from planner.lock import Lock
from planner.overrides import parse_overrides
from planner.plan import ExecutionPlan, Problem
from planner.plan_schema import load_plan, plan_to_dict, save_plan
from planner.resolve import is_of, make_costs, resolve_cluster
from planner.search import search
from planner.search.engine import Course
from planner.search.options import OptionSpace
from planner.simulate import StepPrices
from profiles.catalogue import resolve_model
from profiles.clusters import make_cluster, make_groups
from profiles.devices import DEVICES
from profiles.errors import ConfigError, InfeasibleError, UserError
from profiles.hardware import Cluster, ClusterSpec, MixedCluster
from profiles.table import CostTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be searched, and how: equal tasks have equal answers, but for the clock.

    ``table``: measured costs, used on the device that they are of. ``offload``: as in ``search``.
    """

    problem: Problem
    table: CostTable | None
    seed: int
    gap: float
    time_limit_s: float
    locks: Mapping[str, Lock] = field(default_factory=dict)
    offload: bool = True

    @property
    def key(self) -> str:
        """Of the cache: a digest of everything that the answer depends on, our code included."""
        table = None if self.table is None else self.table.to_dict()
        return _digest([*self._question, table, self.gap, self.time_limit_s, _code()])

    @property
    def family(self) -> str:
        """Equal for tasks that differ in the number of nodes at most: they share prices.

        Of unlike groups all nodes count: what is shared is known by the group's place.
        """
        cluster = self.problem.cluster
        one_node: Cluster = replace(cluster, name="")
        if isinstance(cluster, ClusterSpec):
            one_node = replace(cluster, name="", num_nodes=1)
        return _digest(replace(self, problem=replace(self.problem, cluster=one_node))._question)

    @property
    def _question(self) -> list[Any]:
        plan = plan_to_dict(ExecutionPlan(problem=self.problem, allocations={}))
        locks = {name: asdict(lock) for name, lock in self.locks.items()}
        return [plan, self.seed, locks, self.offload]


@lru_cache(maxsize=1)
def _code() -> str:
    """A digest of what estimates and searches: an answer of other code is another answer."""
    planner = Path(__file__).parent
    files = sorted([*planner.rglob("*.py"), *(planner.parent / "profiles").rglob("*.py")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _digest(question: Any) -> str:
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A plan with its estimate; or None, and the reason in a sentence."""

    plan: ExecutionPlan | None
    reason: str = ""


def task_costs(cluster: Cluster, table: CostTable | None) -> Costs:
    """Measured costs on the device that was measured, those without a profile on any other."""
    known = table is not None and any(is_of(table, group.device) for group in cluster.groups)
    return make_costs(cluster, table if known else None)


def solve(tasks: Sequence[Task]) -> list[Answer]:
    """Search the plans of tasks of one family; a problem that does not fit is an answer too.

    The largest cluster first: what a call costs on some nodes is the same on a larger cluster,
    and costing is most of a search's time.
    """
    answers: dict[int, Answer] = {}
    larger: OptionSpace | None = None
    for i in sorted(range(len(tasks)), key=lambda i: -tasks[i].problem.cluster.num_nodes):
        answers[i], larger = _solve(tasks[i], larger)
    return [answers[i] for i in range(len(tasks))]


def _solve(task: Task, larger: OptionSpace | None) -> tuple[Answer, OptionSpace | None]:
    """The answer, and the space for the next smaller cluster."""
    problem, course = task.problem, Course()
    if larger is None:
        prices = StepPrices(problem, task_costs(problem.cluster, task.table))
    else:
        prices = larger.prices.on(problem)
    space = None  # with staleness ``search`` makes two
    try:
        if not problem.graph.max_staleness:
            space = OptionSpace(problem, prices, task.locks, offload=task.offload, larger=larger)
        result = search(
            problem, prices.model, seed=task.seed, gap=task.gap, time_limit_s=task.time_limit_s,
            locks=task.locks, offload=task.offload, space=space, progress=course.add,
        )  # fmt: skip
    except InfeasibleError as error:
        return Answer(plan=None, reason=str(error)), larger
    provenance = {"engine": result.engine, "progress": course.rows}
    return Answer(plan=replace(result.plan, provenance=provenance)), space


@dataclass(slots=True, kw_only=True)
class Answers:
    """Answers by key; with ``folder`` also as files, a plan or a reason each."""

    folder: Path | None = None
    known: dict[str, Answer] = field(default_factory=dict)

    def find(self, key: str) -> Answer | None:
        """What is known; a file that cannot be read counts as nothing."""
        if key not in self.known and self.folder is not None:
            read = _read(self.folder, key)
            if read is not None:
                self.known[key] = read
        return self.known.get(key)

    def add(self, key: str, answer: Answer) -> None:
        self.known[key] = answer
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if answer.plan is not None:
            save_plan(answer.plan, self.folder / f"{key}.json")
        else:
            (self.folder / f"{key}.txt").write_text(answer.reason, encoding="utf-8")


def _read(folder: Path, key: str) -> Answer | None:
    plan, reason = folder / f"{key}.json", folder / f"{key}.txt"
    if plan.is_file():
        try:
            return Answer(plan=load_plan(plan))
        except UserError:  # cut off, or of another version: search again
            return None
    if reason.is_file():
        return Answer(plan=None, reason=reason.read_text(encoding="utf-8"))
    return None


# ---- scenarios --------------------------------------------------------------------------------

_CLUSTER_AXES = ("gpus", "device", "cluster", "memory_limit")
_MODEL_AXES = ("model", "critic")


def changes_cluster(axis: str) -> bool:
    """Does an axis of a scenario change the cluster alone?"""
    return axis in _CLUSTER_AXES or axis.startswith("cluster.")


def scenario_problem(base: Problem, changes: Mapping[str, Any]) -> Problem:
    """``base`` with ``changes``.

    ``gpus``, ``device`` and ``memory_limit`` change the cluster, so does ``cluster.FIELD``.
    ``device="h100:32+l40s:32"`` is a cluster of such groups; ``cluster``: a ``ClusterSpec`` or
    ``MixedCluster``, or what ``realplan search --cluster`` takes, a file or a server's name.
    ``model`` and ``critic`` name models; with ``max_staleness`` 1 generation may run a step ahead;
    all other names are options of the algorithm, such as ``batch_size``, ``response_len`` or
    ``ppo.num_mini_batches``.

    Raises:
        ConfigError: an unknown name or a value that it cannot have.
    """
    words, options = [], []
    for name, value in changes.items():
        if name in ("memory_limit", "max_staleness") or name.startswith("cluster."):
            words.append(f"{name}={value}")
        elif not changes_cluster(name) and name not in _MODEL_AXES:
            options.append(f"{name}={value}")
    overrides = parse_overrides(words)
    cluster = overrides.on(_cluster(base.cluster, changes))
    staleness = base.graph.max_staleness
    if "max_staleness" in changes:
        staleness = overrides.max_staleness
    named = {name: str(changes[name]) for name in _MODEL_AXES if name in changes}
    changed = replace(base, cluster=cluster)
    if options or named:
        changed = _with_options(changed, options, named)
    return replace(changed, graph=replace(changed.graph, max_staleness=staleness))


def _cluster(base: Cluster, changes: Mapping[str, Any]) -> Cluster:
    count = changes.get("gpus", base.num_devices)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(f"{count!r} is not a positive whole number", where="gpus")
    if "cluster" in changes:
        return _given_cluster(base, changes)
    device = str(changes.get("device", ""))
    if ":" in device:
        _refuse(("gpus",), changes, beside=device)
        return make_groups(device, where="device")
    if device:
        return make_cluster(device, count)
    if count == base.num_devices:
        return base
    if isinstance(base, MixedCluster):
        raise ConfigError(
            f"{base.name} has groups of its own sizes", where="gpus",
            remedy='give the groups with their numbers: device="h100:32+l40s:32"',
        )  # fmt: skip
    # A small cluster of the catalogue is a part of one server, and grows into a whole one.
    known = base.device.name in DEVICES and base.device.kind != "cpu"
    if known and base == make_cluster(base.device.name, base.num_devices):
        return make_cluster(base.device.name, count)
    per_node = min(base.devices_per_node, count)
    if count % per_node:
        raise ConfigError(f"{count} devices do not fill nodes of {per_node}", where="gpus")
    return replace(
        base, name=f"{count} x {base.device.name}", num_nodes=count // per_node,
        devices_per_node=per_node,
    )  # fmt: skip


def _given_cluster(base: Cluster, changes: Mapping[str, Any]) -> Cluster:
    given = changes["cluster"]
    _refuse(("device",), changes, beside="cluster")
    if isinstance(given, ClusterSpec | MixedCluster):
        _refuse(("gpus",), changes, beside="cluster")
        return given
    name = str(given)
    knows_its_size = ":" in name or is_cluster_file(name)
    count = changes.get("gpus") if knows_its_size else changes.get("gpus", base.num_devices)
    try:
        return resolve_cluster(name, None, None if count is None else str(count), None)
    except ConfigError as error:
        where = error.where.lstrip("-")
        raise ConfigError(error.problem, where=where, remedy=error.remedy) from None


def _refuse(axes: Sequence[str], changes: Mapping[str, Any], *, beside: str) -> None:
    for axis in axes:
        if axis in changes:
            raise ConfigError(f"{beside} says it already", where=axis, remedy="leave it out")


def _with_options(base: Problem, options: list[str], named: Mapping[str, str]) -> Problem:
    """The problem of the algorithm's graph, data and roles under changed options."""
    algorithm = find_algorithm(base.algorithm)
    config = make_config(algorithm.config_class, options, base=base.config)
    graph, roles = algorithm.graph(config), algorithm.roles(config)
    models = {}
    for role in graph.roles:
        spec = roles[role]
        if spec.source in named:
            models[role] = resolve_model(named[spec.source]).with_head(spec.head)
        elif role in base.models:
            models[role] = base.models[role]
        else:
            raise ConfigError("a role that the plan has no model for", where=role)
    return replace(
        base, config=config_to_dict(config), graph=graph, models=models,
        workload=planned_workload(algorithm, config),
    )  # fmt: skip
