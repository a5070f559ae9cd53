"""What people do without a search: one layout for everything, or two halves.

A baseline is a start of the walk and a yardstick in the report; it respects memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from planner.graph import CallKind
from planner.mesh import DeviceMesh
from planner.search.evaluate import Evaluator, Score
from planner.search.options import Assignment, Choice, Option, OptionSpace

Axes = tuple[int, int, int]  # (pp, tp, dp)


@dataclass(frozen=True, slots=True)
class Baseline:
    """An assignment that fits, and its score."""

    assignment: Assignment
    score: Score


def symmetric(evaluator: Evaluator) -> Baseline | None:
    """The best single layout: every call on all devices under one (pp, tp, dp).

    Each call has its own micro-batches, each training its own ZeRO stage and recomputation; all
    are tried that matter. None where no single layout fits.
    """
    space = evaluator.space
    whole = DeviceMesh(0, space.problem.cluster.num_devices)
    everything = range(len(space.calls))
    found: list[Baseline] = []
    for axes in _axes(space, everything, whole):
        options = _fill(space, everything, whole, axes)
        if options is not None:
            found += _fitting(evaluator, [options])
    return min(found, key=lambda b: b.score.step_s, default=None)


def split(evaluator: Evaluator) -> Baseline | None:
    """Trained language models and their references on one half, the rest on the other.

    The halves run side by side, each under one layout: roles are divided by the model they run,
    so that the actor and its reference are together. None where nothing fits or there is one
    device, or all roles run one model.
    """
    space = evaluator.space
    num_devices = space.problem.cluster.num_devices
    left, right = DeviceMesh(0, num_devices // 2), DeviceMesh(num_devices // 2, num_devices // 2)
    sizes = space.meshes_by_size.get(num_devices // 2, [])
    if num_devices % 2 or left not in sizes or right not in sizes:
        return None
    heads = [space.problem.spec_of(call.name) for call in space.calls]
    first = [i for i, spec in enumerate(heads) if spec is not None and spec.head == "lm"]
    second = [i for i in range(len(heads)) if i not in first]
    if not first or not second:
        return None
    found: list[Baseline] = []
    for a, b in product(_axes(space, first, left), _axes(space, second, right)):
        halves = [_fill(space, first, left, a), _fill(space, second, right, b)]
        if None not in halves:
            found += _fitting(evaluator, [half for half in halves if half is not None])
    return min(found, key=lambda b: b.score.step_s, default=None)


def _axes(space: OptionSpace, calls: Sequence[int], mesh: DeviceMesh) -> list[Axes]:
    """Layouts that every call with a model has an option for on ``mesh``."""
    sets = [
        {choice.axes for choice in space.choices[space.calls[i].name].get(mesh.num_devices, ())}
        for i in calls
        if space.calls[i].role is not None
    ]
    return sorted(set.intersection(*sets)) if sets else [(1, 1, mesh.num_devices)]


def _fill(
    space: OptionSpace, calls: Sequence[int], mesh: DeviceMesh, axes: Axes
) -> dict[int, list[Option]] | None:
    """Options of each call in one layout, fastest first; a FUNCTION has its own dp."""
    found: dict[int, list[Option]] = {}
    for i in calls:
        call = space.calls[i]
        choices: Sequence[Choice] = space.choices[call.name].get(mesh.num_devices, ())
        place = mesh
        if call.kind is CallKind.FUNCTION and not choices:
            place = DeviceMesh(mesh.first, max(n for n in space.choices[call.name]))
            choices = space.choices[call.name][place.num_devices]
        fitting = [c for c in choices if call.role is None or c.axes == axes]
        if not fitting:
            return None
        found[i] = [space.option(call.name, place, choice) for choice in fitting]
    return found


def _fitting(evaluator: Evaluator, parts: Sequence[Mapping[int, list[Option]]]) -> list[Baseline]:
    """For each way to keep trained state, the fastest options that fit beside it."""
    space = evaluator.space
    by_call = {i: options for part in parts for i, options in part.items()}
    trains = [i for i in by_call if space.calls[i].kind is CallKind.TRAIN]
    found = []
    for zeros in product(*({o.choice.strategy.zero for o in by_call[i]} for i in trains)):
        pools = {i: list(options) for i, options in by_call.items()}
        for i, zero in zip(trains, zeros):
            pools[i] = [o for o in pools[i] if o.choice.strategy.zero == zero]
        assignment = _fastest_that_fits(evaluator, pools)
        if assignment is not None:
            found.append(Baseline(assignment, evaluator.score(assignment)))
    return found


def _fastest_that_fits(
    evaluator: Evaluator, pools: Mapping[int, Sequence[Option]]
) -> Assignment | None:
    """Each call's fastest option with which a device is not over its memory.

    What stays resident does not depend on the choice within a pool, and calls do not run
    together on a device, so calls can be chosen one by one.
    """
    order = sorted(pools)
    smallest = [min(pools[i], key=lambda o: int(o.running.max())) for i in order]
    if evaluator.overshoot(tuple(smallest)) > 0:
        return None
    chosen = list(smallest)
    for position, i in enumerate(order):
        for option in pools[i]:
            trial = (*chosen[:position], option, *chosen[position + 1 :])
            if evaluator.overshoot(trial) == 0:
                chosen[position] = option
                break
    return tuple(chosen)


BASELINES = {"symmetric": symmetric, "split": split}
