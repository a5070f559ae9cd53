"""What every engine takes and gives: ``Engine``, its ``Budget`` and its ``Record``.

An engine starts from assignments that others found, puts all that it finds into a ``Record``, and
may prove that no plan is faster than some ``lower_bound_s``. It looks at ``Record.spent`` often.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from planner.search.evaluate import Evaluator, Score
from planner.search.options import Assignment


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What a search has reached: seconds per step of its best plan, and of no plan less."""

    evaluations: int
    best_s: float
    lower_bound_s: float

    @property
    def gap(self) -> float:
        """At most this share of the step can be saved."""
        return gap_of(self.best_s, self.lower_bound_s)


Progress = Callable[[News], None]


@dataclass(kw_only=True)
class Course:
    """The course of a search, for ``provenance`` and figures: ``add`` is a ``Progress``.

    ``rows``: [seconds since the first news, evaluations, best_s, lower_bound_s], one for each
    news but those that lie between others of nearly the same time (3%).
    """

    rows: list[list[float]] = field(default_factory=list)
    began_s: float | None = None

    def add(self, news: News) -> None:
        now_s = time.monotonic()
        self.began_s = now_s if self.began_s is None else self.began_s
        at_s = round(now_s - self.began_s, 4)
        if len(self.rows) > 1 and self.rows[-2][0] >= 0.97 * at_s:
            self.rows.pop()
        seconds = [float(f"{value:.6g}") for value in (news.best_s, news.lower_bound_s)]
        self.rows.append([at_s, news.evaluations, *seconds])


def gap_of(best_s: float, lower_bound_s: float) -> float:
    """(best - bound) / best; 1 where nothing fits yet."""
    return max(0.0, 1.0 - lower_bound_s / best_s) if math.isfinite(best_s) else 1.0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """When to stop: evaluations, a clock, or a plan that is within ``gap`` of the bound.

    ``lower_bound_s``: what is proven before the engine starts.
    """

    max_evaluations: int
    deadline_s: float  # on time.monotonic's clock
    gap: float = 0.0
    lower_bound_s: float = 0.0
    progress: Progress | None = None


@dataclass(kw_only=True)
class Record:
    """The best assignment that fits so far; and the least unfit, for the error message.

    ``lower_bound_s``: no assignment of the space is faster. ``cut_by_time``: the time limit ended
    the search, so that the same seed may give another plan. ``interrupted``: the user did.
    """

    evaluator: Evaluator
    budget: Budget
    best: Assignment | None = None
    best_score: Score = field(default_factory=lambda: Score(math.inf, math.inf))
    least_unfit: tuple[float, Assignment] | None = None
    evaluations: int = 0
    lower_bound_s: float = 0.0
    cut_by_time: bool = False
    interrupted: bool = False

    def __post_init__(self) -> None:
        self.raise_bound(self.budget.lower_bound_s)

    def score(self, assignment: Assignment) -> Score:
        """Score and remember."""
        score = self.evaluator.score(assignment)
        self.evaluations += 1
        self.remember(assignment, score)
        return score

    def remember(self, assignment: Assignment, score: Score) -> None:
        """Keep what is better than all before; tell progress of it."""
        if score.overshoot > 0:
            if self.least_unfit is None or score.overshoot < self.least_unfit[0]:
                self.least_unfit = (score.overshoot, assignment)
        elif self.best is None or score.step_s < self.best_score.step_s:
            self.best, self.best_score = assignment, score
            self._tell()

    def raise_bound(self, lower_bound_s: float) -> None:
        """An engine has proven that no assignment takes less."""
        before_s, self.lower_bound_s = self.lower_bound_s, max(self.lower_bound_s, lower_bound_s)
        if self.best is not None and self.lower_bound_s > before_s:
            self._tell()

    def learn(self, other: Record) -> None:
        """Keep what another record has found that is better."""
        if other.best is not None:
            self.remember(other.best, other.best_score)
        if other.least_unfit is not None:
            self.remember(other.least_unfit[1], Score(math.inf, other.least_unfit[0]))

    def _tell(self) -> None:
        if self.budget.progress is not None:
            self.budget.progress(
                News(
                    evaluations=self.evaluations, best_s=self.best_score.step_s,
                    lower_bound_s=self.lower_bound_s,
                )
            )  # fmt: skip

    def interrupt(self) -> None:
        """Ctrl-C: to be called in the handler; raises it again where there is no plan yet."""
        if self.best is None:
            raise KeyboardInterrupt
        self.interrupted = True

    @property
    def gap(self) -> float:
        """(best - bound) / best; 1 where nothing fits yet."""
        return gap_of(self.best_score.step_s, self.lower_bound_s)

    @property
    def spent(self) -> bool:
        """Is the budget used up, the gap small enough, or the user impatient?"""
        if self.interrupted or self.evaluations >= self.budget.max_evaluations:
            return True
        if self.best is not None and self.gap <= self.budget.gap:
            return True
        self.look_at_clock()
        return self.cut_by_time

    @property
    def late(self) -> bool:
        """Is the time up?"""
        return time.monotonic() >= self.budget.deadline_s

    def look_at_clock(self) -> None:
        self.cut_by_time = self.late


Engine = Callable[[Evaluator, list[Assignment], Budget, int], Record]
