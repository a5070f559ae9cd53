"""A number of seconds per step that no plan of the problem is below, under the same costs.

Let every call c choose an option with ``s_c`` seconds on ``n_c`` of the N devices, and let T be
the steady seconds per step.

1. *Work.* A device runs one call at a time, so in one step the devices are busy for
   ``sum over calls of s_c * n_c`` device-seconds: ``T >= sum s_c n_c / N``.
2. *Cycle.* Let t train a role and r read its weights in the same step before it (r = t where no
   other call does). The next step's r waits for this step's t, so T is at least the time from
   r's start to t's end. On a path r -> ... -> t of dependencies this is ``sum of s_c`` over the
   path.
3. *Window.* If every call of a set K runs between r's end and t's start, then
   ``T >= s_r + sum over K of s_c n_c / N + s_t``: the calls of K have at most N devices for
   that long. K is what depends on r and what t depends on.
4. *Both.* For any ``0 <= u <= 1``, T is at least (1 - u) times a bound of 2 or 3 plus u times 1.
   That is a sum over calls of ``s_c * weight_c(n_c)``, which is least when every call for itself
   takes the option with the least such term. The maximum over u of these minima is the bound:
   at u = 0 it is the longest cycle, at u = 1 the work.

Reallocations, transfers and memory shared by calls are left out; they only make T larger.
"Every option" means those of ``OptionSpace``: meshes as in ``considered_meshes``, micro-batches as
in ``micro_batch_counts``. What its pruning dropped is no faster than what it kept on that mesh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.search.evaluate import Evaluator
from planner.search.options import OptionSpace


@dataclass(frozen=True, slots=True)
class _Cycle:
    """``path``: calls one after another; ``window``: calls that share all devices meanwhile."""

    path: tuple[int, ...]
    window: tuple[int, ...] = ()


def _windows(evaluator: Evaluator) -> list[_Cycle]:
    """For each chain's two ends, everything that must run between them."""
    graph = evaluator.space.problem.graph
    calls = evaluator.calls
    position = {call.name: i for i, call in enumerate(calls)}
    before: list[set[int]] = []  # all that a call depends on within a step
    for call in calls:
        direct = {position[p.name] for p in graph.predecessors(call)}
        before.append(direct.union(*(before[i] for i in direct)))
    found = []
    for chain in evaluator.chains:
        first, last = chain[0], chain[-1]
        between = tuple(i for i in sorted(before[last]) if first in before[i])
        if first != last and between:
            found.append(_Cycle((first, last), between))
    return found


def _fronts(space: OptionSpace) -> list[list[tuple[float, float]]]:
    """Of each call the (seconds, device-seconds / N) that no other option beats in both."""
    num_devices = space.problem.cluster.num_devices
    fronts = []
    for call in space.calls:
        points = sorted(
            (choice.seconds, choice.seconds * size / num_devices)
            for size, choices in space.choices[call.name].items()
            for choice in choices
        )
        front: list[tuple[float, float]] = []
        for seconds, work in points:
            if not front or work < front[-1][1]:
                front.append((seconds, work))
        fronts.append(front)
    return fronts


def lower_bound_s(evaluator: Evaluator, *, num_weights: int = 64) -> float:
    """Seconds per step that no plan is below; the proof is the module's docstring.

    ``num_weights``: values of u that are tried; more only tighten the bound.
    """
    fronts = _fronts(evaluator.space)
    cycles = [_Cycle(chain) for chain in evaluator.chains] + _windows(evaluator) or [_Cycle(())]
    return max(
        _mixed(fronts, cycle, step / num_weights)
        for cycle in cycles
        for step in range(num_weights + 1)
    )


def _mixed(fronts: Sequence[Sequence[tuple[float, float]]], cycle: _Cycle, u: float) -> float:
    """Bound 4 with weight ``u`` on the work."""
    total = 0.0
    for i, front in enumerate(fronts):
        on_path, in_window = float(i in cycle.path), float(i in cycle.window)
        total += min(
            (1.0 - u) * (on_path * seconds + in_window * work) + u * work for seconds, work in front
        )
    return total
