"""``prove``: seconds per step that no plan is below, by branch and bound over boxes of options.

The box with the least bound (``relaxation.py`` has the proofs) is halved again and again; so at
any moment the least bound of the open boxes, or the best plan where that is faster, is proven for
the whole ``OptionSpace``: its meshes as in ``considered_meshes``, its micro-batches as in
``micro_batch_counts``. What its pruning dropped is no faster than what it kept on that mesh.

Every call's pool is tried for the split. A half that cannot hold a better plan is cut off at once,
and of the others the call whose two halves have the highest bounds is the one to branch on.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass

from planner.search.evaluate import Evaluator, Score
from planner.search.options import Assignment
from planner.search.relaxation import Box, Relaxation

ROUNDING = 1e-9  # relative: sums in another order than the evaluator's


def lower_bound_s(evaluator: Evaluator, *, max_boxes: int = 200) -> float:
    """Seconds per step that no plan is below, after halving ``max_boxes`` boxes.

    Reallocations are not priced: that is what takes longest. inf where surely nothing fits.
    """
    return prove(
        Relaxation(evaluator),
        best_s=lambda: math.inf,
        visit=None,
        stop=lambda proof: proof.boxes >= max_boxes,
    ).lower_bound_s


@dataclass(kw_only=True)
class Proof:
    """``lower_bound_s`` so far; ``boxes`` that were halved; ``closed``: the best is optimal."""

    lower_bound_s: float = 0.0
    boxes: int = 0
    closed: bool = False


def prove(
    relaxation: Relaxation,
    *,
    best_s: Callable[[], float],
    visit: Callable[[Assignment], Score] | None,
    stop: Callable[[Proof], bool],
    proof: Proof | None = None,
) -> Proof:
    """Raise the bound until it meets ``best_s()`` or ``stop`` says so.

    ``visit`` scores an assignment, and may so lower ``best_s``; without it single assignments
    keep their boxes' bounds and end the search. Same answers of ``best_s`` and ``stop``: same
    proof, as there is no randomness.
    """
    proof = Proof() if proof is None else proof
    root = relaxation.root()
    heap = [(relaxation.bound_s(root), 0, root, False)]
    count = 0
    while heap:
        bound_s, _, box, priced = heap[0]
        proof.lower_bound_s = max(proof.lower_bound_s, min(bound_s * (1 - ROUNDING), best_s()))
        if bound_s * (1 - ROUNDING) >= best_s() or stop(proof):
            break
        heapq.heappop(heap)
        proof.boxes += 1
        if not priced:
            exact_s = max(bound_s, relaxation.bound_s(box, price=visit is not None))
            if exact_s > bound_s:
                count += 1
                heapq.heappush(heap, (exact_s, count, box, True))
                continue
        assignment = relaxation.assignment(box)
        if assignment is not None:
            if visit is None:
                return proof
            visit(assignment)
            continue
        for half_s, half in _branch(relaxation, box, bound_s, best_s()):
            count += 1
            heapq.heappush(heap, (half_s, count, half, False))
    proof.closed = not heap or heap[0][0] * (1 - ROUNDING) >= best_s()
    if proof.closed:
        proof.lower_bound_s = best_s()
    return proof


def _branch(
    relaxation: Relaxation, box: Box, bound_s: float, best_s: float
) -> list[tuple[float, Box]]:
    """Parts of ``box``, each with its bound, that may hold a plan below ``best_s``."""
    tried: dict[int, tuple[float, float]] = {}
    todo = [i for i, pool in enumerate(box) if not pool.is_single]
    best: tuple[tuple[float, float], int] | None = None
    halves: dict[int, list[tuple[float, Box]]] = {}
    for i in todo:
        parts = []
        for half in relaxation.split(box[i]):
            part = (*box[:i], half, *box[i + 1 :])
            parts.append((max(bound_s, relaxation.bound_s(part)), part))
        bounds = sorted(b for b, _ in parts)
        if bounds[0] * (1 - ROUNDING) >= best_s:
            return []
        if bounds[1] * (1 - ROUNDING) >= best_s:
            return [min(parts, key=lambda p: p[0])]
        tried[i] = (bounds[0], min(bounds[1], 1e300))
        halves[i] = parts
        if best is None or tried[i] > best[0]:
            best = (tried[i], i)
    assert best is not None, bound_s
    return halves[best[1]]
