"""What people do without a search: one layout for everything, two parts, or call by call.

A baseline is a start of the walk and a yardstick in the report; it respects memory, and what a
user has locked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from operator import add

from planner.graph import CallKind
from planner.mesh import DeviceMesh, MeshKind, kind_of
from planner.search.choices import Choice
from planner.search.evaluate import Evaluator, Score
from planner.search.options import Assignment, Option, OptionSpace

Axes = tuple[int, int, int, int]  # (pp, tp, dp, ep)


@dataclass(frozen=True, slots=True)
class Baseline:
    """An assignment that fits, and its score."""

    assignment: Assignment
    score: Score


def symmetric(evaluator: Evaluator) -> Baseline | None:
    """The best single layout: every call on all devices under one (pp, tp, dp, ep).

    Of unlike groups on all devices of one of them, the best of these: no layout spans two.
    Each call has its own micro-batches and its own offload, each training its own ZeRO stage and
    recomputation; all are tried that matter. None where no single layout fits.
    """
    space = evaluator.space
    everything = range(len(space.calls))
    best: Baseline | None = None
    for whole in _whole_groups(space):
        for axes in _axes(space, everything, whole):
            options = _fill(space, everything, whole, axes)
            if options is not None:
                best = _better(evaluator, [options], best)
    return best


def _whole_groups(space: OptionSpace) -> list[DeviceMesh]:
    cluster = space.problem.cluster
    return [
        DeviceMesh(start, group.num_devices)
        for start, group in zip(cluster.starts, cluster.groups, strict=True)
    ]


def split(evaluator: Evaluator) -> Baseline | None:
    """The best of two parts side by side, each under one layout.

    Parts are what people take: trained language models with their references on one and the rest
    on the other, or training on one and everything else on the other (OpenRLHF, separate
    engines); with a quarter, a half or three quarters of the devices, or of unlike groups with all
    of one and all of another. None where nothing fits, there is one device, or nothing is on one
    side.
    """
    space = evaluator.space
    calls = range(len(space.calls))
    specs = [space.problem.spec_of(call.name) for call in space.calls]
    language = [i for i in calls if (spec := specs[i]) is not None and spec.head == "lm"]
    trained = [i for i in calls if space.calls[i].kind is CallKind.TRAIN]
    pairs: list[tuple[_Part, _Part]] = []
    for first, (left, right) in product((language, trained), _cuts(space)):
        second = [i for i in calls if i not in first]
        if first and second:
            pairs += product(_parts(evaluator, first, left), _parts(evaluator, second, right))
    best: Baseline | None = None
    for a, b in sorted(pairs, key=lambda pair: pair[0].floor_s(pair[1])):
        if best is not None and a.floor_s(b) >= best.score.step_s:
            break
        best = _better(evaluator, [a.options, b.options], best)
    return best


@dataclass(frozen=True, slots=True)
class _Part:
    """Options of some calls in one layout on one mesh, and what they take at least.

    ``busy_s``: together; ``chains_s``: those of each of the evaluator's chains.
    """

    options: Mapping[int, list[Option]]
    busy_s: float
    chains_s: tuple[float, ...]

    def floor_s(self, other: _Part) -> float:
        """Seconds of a step at least, with the rest of the calls in ``other`` beside this."""
        chains_s = map(add, self.chains_s, other.chains_s)
        return max(self.busy_s, other.busy_s, max(chains_s, default=0.0))


def _parts(evaluator: Evaluator, calls: Sequence[int], mesh: DeviceMesh) -> list[_Part]:
    found = []
    for axes in _axes(evaluator.space, calls, mesh):
        options = _fill(evaluator.space, calls, mesh, axes)
        if options is None:
            continue
        least_s = {i: min(o.seconds for o in options[i]) for i in calls}
        busy_s = sum(min(o.choice.busy_s for o in options[i]) for i in calls)
        chains_s = tuple(sum(least_s.get(i, 0.0) for i in c) for c in evaluator.chains)
        found.append(_Part(options, busy_s, chains_s))
    return found


def _cuts(space: OptionSpace) -> list[tuple[DeviceMesh, DeviceMesh]]:
    """The cluster in two meshes: at a quarter, a half and three quarters; or two groups of it."""
    groups = _whole_groups(space)
    if len(groups) > 1:
        return list(permutations(groups, 2))
    count = space.problem.cluster.num_devices
    pairs = (
        (DeviceMesh(0, n), DeviceMesh(n, count - n))
        for n in sorted({count // 4, count // 2, count - count // 4})
        if 0 < n < count
    )
    return [
        pair
        for pair in pairs
        if all(mesh in space.meshes_by_kind.get(MeshKind(0, mesh.num_devices), ()) for mesh in pair)
    ]


def greedy(evaluator: Evaluator, start: Baseline) -> Baseline:
    """Call by call, the slowest first, the fastest option that fits beside what the others have.

    ``start``: what they have at first.
    """
    chosen = start.assignment
    for i in sorted(range(len(chosen)), key=lambda i: -start.assignment[i].seconds):
        for option in _faster(evaluator.space, chosen[i]):
            trial = (*chosen[:i], option, *chosen[i + 1 :])
            if evaluator.overshoot(trial) == 0:
                chosen = trial
                break
    return Baseline(chosen, evaluator.score(chosen))


def _faster(space: OptionSpace, than: Option) -> Iterator[Option]:
    """Options of the same call that take less time, fastest first, on every mesh of their kind."""
    by_kind = space.choices[than.call].items()
    choices = sorted(
        ((choice, kind) for kind, choices in by_kind for choice in choices),
        key=lambda pair: pair[0].seconds,
    )
    for choice, kind in choices:
        if choice.seconds >= than.seconds:
            return
        for mesh in space.meshes_of(than.call, kind):
            yield space.option(than.call, mesh, choice)


def _floor_s(evaluator: Evaluator, pools: Mapping[int, Sequence[Option]]) -> float:
    """Seconds of a step at least, every call at its fastest."""
    return evaluator.floor_s(tuple(pools[i][0] for i in sorted(pools)))


def _seconds(baseline: Baseline) -> float:
    return baseline.score.step_s


def _axes(space: OptionSpace, calls: Sequence[int], mesh: DeviceMesh) -> list[Axes]:
    """Layouts that every call with a model has an option for on ``mesh``."""
    sets = [
        {choice.axes for choice in space.choices_on(space.calls[i].name, mesh)}
        for i in calls
        if space.calls[i].role is not None
    ]
    return sorted(set.intersection(*sets)) if sets else [(1, 1, mesh.num_devices, 1)]


def _fill(
    space: OptionSpace, calls: Sequence[int], mesh: DeviceMesh, axes: Axes
) -> dict[int, list[Option]] | None:
    """Options of each call in one layout, fastest first; a FUNCTION has its own dp."""
    found: dict[int, list[Option]] = {}
    for i in calls:
        call = space.calls[i]
        choices: Sequence[Choice] = space.choices_on(call.name, mesh)
        place = mesh
        if call.kind is CallKind.FUNCTION and not choices:
            group = kind_of(mesh, space.problem.cluster).group
            sizes = [kind.num_devices for kind in space.choices[call.name] if kind.group == group]
            place = DeviceMesh(mesh.first, max(sizes, default=0))
            choices = space.choices_on(call.name, place)
        fitting = [c for c in choices if call.role is None or c.axes == axes]
        if not fitting or place not in space.meshes[call.name]:
            return None
        found[i] = [space.option(call.name, place, choice) for choice in fitting]
    return found


def _better(
    evaluator: Evaluator, parts: Sequence[Mapping[int, list[Option]]], best: Baseline | None
) -> Baseline | None:
    """For each way to keep what is resident the fastest options that fit beside it; or ``best``."""
    by_call = {i: options for part in parts for i, options in part.items()}
    ways = product(*(sorted({_way(o) for o in options}) for options in by_call.values()))
    for way in sorted(ways, key=lambda way: sum(offload for offload, _ in way)):
        pools = {
            i: [o for o in options if _way(o) == own]
            for (i, options), own in zip(by_call.items(), way, strict=True)
        }
        if best is not None and _floor_s(evaluator, pools) >= best.score.step_s:
            continue
        assignment = _fastest_that_fits(evaluator, pools)
        if assignment is not None:
            score = evaluator.score(assignment)
            if best is None or score.step_s < best.score.step_s:
                best = Baseline(assignment, score)
    return best


def _way(option: Option) -> tuple[bool, int]:
    """What of the call's role stays on its devices: (is it offloaded, ZeRO stage)."""
    return option.choice.offload, option.choice.strategy.zero


def _fastest_that_fits(
    evaluator: Evaluator, pools: Mapping[int, Sequence[Option]]
) -> Assignment | None:
    """Each call's fastest option with which a device is not over its memory.

    What stays resident does not depend on the choice within a pool, and calls do not run
    together on a device, so calls can be chosen one by one.
    """
    order = sorted(pools)
    smallest = [min(pools[i], key=lambda o: max(o.choice.running)) for i in order]
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


def baselines(evaluator: Evaluator) -> dict[str, Baseline]:
    """The baselines that fit, by name: symmetric, split, and greedy from the better of these."""
    found = {
        name: baseline
        for name, find in (("symmetric", symmetric), ("split", split))
        if (baseline := find(evaluator)) is not None
    }
    if found:
        found["greedy"] = greedy(evaluator, min(found.values(), key=_seconds))
    return found
