"""``Proof``: seconds per step that no plan is below, by branch and bound over boxes of options.

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
import random
from collections.abc import Callable, Iterator

from planner.search.boxes import ROUNDING
from planner.search.engine import Record
from planner.search.evaluate import Evaluator, Score
from planner.search.options import Assignment
from planner.search.pools import Box
from planner.search.relaxation import Relaxation


def lower_bound_s(evaluator: Evaluator, *, max_boxes: int = 200) -> float:
    """Seconds per step that no plan is below, after halving ``max_boxes`` boxes.

    Reallocations are not priced: that is what takes longest. inf where surely nothing fits.
    """
    proof = Proof(Relaxation(evaluator), best_s=lambda: math.inf, visit=None)
    return proof.run(lambda proof: proof.boxes >= max_boxes).lower_bound_s


Visit = Callable[[Assignment], Score]
# So many boxes a search follows down (``dives``), each for as long as it takes to halve so many.
DIVES, DEEPEST = 40, 100


class Proof:
    """A branch and bound that can be stopped and continued.

    ``best_s()``: seconds of the best plan so far; it may fall. ``visit`` scores an assignment, and
    may so lower it; without it single assignments keep their boxes' bounds and end the search.
    ``lower_bound_s`` so far; ``boxes`` that were halved; ``closed``: the best is optimal. Same
    answers of ``best_s`` at the same boxes: same proof, as there is no randomness.
    """

    def __init__(
        self, relaxation: Relaxation, *, best_s: Callable[[], float], visit: Visit | None
    ) -> None:
        self.relaxation, self.best_s, self.visit = relaxation, best_s, visit
        self.lower_bound_s = 0.0
        self.boxes = 0
        self.closed = False
        root = relaxation.pools.root()
        # (bound, order, box, were its reallocations priced)
        self.heap = [(relaxation.bound_s(root, best_s=best_s()), 0, root, False)]
        self.count = 0

    @classmethod
    def of(cls, record: Record) -> Proof:
        """About a search's best plan, which takes over what single assignments score."""
        return cls(
            Relaxation(record.evaluator), best_s=lambda: record.best_score.step_s,
            visit=record.score,
        )  # fmt: skip

    def run(self, stop: Callable[[Proof], bool]) -> Proof:
        """Raise the bound until it meets ``best_s()`` or ``stop`` says so."""
        while self.heap:
            bound_s, _, box, priced = self.heap[0]
            self.lower_bound_s = max(
                self.lower_bound_s, min(bound_s * (1 - ROUNDING), self.best_s())
            )
            if self._is_closed() or stop(self):
                break
            heapq.heappop(self.heap)
            self.boxes += 1
            if not self._halve(box, bound_s, priced):
                return self
        self.closed = self._is_closed()
        if self.closed:
            self.lower_bound_s = self.best_s()
        return self

    def dives(self, rng: random.Random, count: int, *, most: int) -> Iterator[Assignment]:
        """From ``count`` of the boxes of least bound: depth first, the half of lesser bound first.

        Nothing of a dive that has found no assignment after ``most`` boxes.
        """
        near = heapq.nsmallest(10 * count, self.heap)
        for bound_s, _, box, _ in rng.sample(near, min(count, len(near))):
            open_boxes = [(bound_s, box)]
            for _ in range(most):
                if not open_boxes:
                    break
                bound_s, box = open_boxes.pop()
                assignment = self.relaxation.pools.assignment(box)
                if assignment is not None:
                    yield assignment
                    break
                halves = self.relaxation.branch(box, bound_s, self.best_s())
                open_boxes += sorted(halves, key=lambda half: -half[0])

    def _is_closed(self) -> bool:
        return not self.heap or self.heap[0][0] * (1 - ROUNDING) >= self.best_s()

    def _halve(self, box: Box, bound_s: float, priced: bool) -> bool:
        """Put what is left of a box back; False at an assignment that is not to be visited."""
        if not priced:
            price = self.visit is not None
            exact_s = self.relaxation.bound_s(box, price=price, best_s=self.best_s())
            if exact_s > bound_s:
                self._push(exact_s, box, True)
                return True
        assignment = self.relaxation.pools.assignment(box)
        if assignment is None:
            for half_s, half in self.relaxation.branch(box, bound_s, self.best_s()):
                self._push(half_s, half, False)
            return True
        if self.visit is None:
            return False
        self.visit(assignment)
        return True

    def _push(self, bound_s: float, box: Box, priced: bool) -> None:
        self.count += 1
        heapq.heappush(self.heap, (bound_s, self.count, box, priced))
