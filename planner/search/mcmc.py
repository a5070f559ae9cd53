"""The walk: several Metropolis chains with cooling, each started and ended by descent.

Energy is ``Score.energy``: seconds per step, dearer where memory lacks, so the walk may cross
what does not fit; only what fits is returned. The temperature is relative to the energy: a worse
proposal is taken with probability ``exp(-(E' / E - 1) / temperature)``.

Everything random comes from one seed and the budget counts evaluations, so that a search is
repeatable; the time limit is only a cap. Read ``walk``.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from planner.search.evaluate import Evaluator, Score
from planner.search.moves import propose, replaced, together, with_layout
from planner.search.options import Assignment, Option, OptionSpace

Progress = Callable[[int, float], None]  # (evaluations, best seconds per step so far)


@dataclass(kw_only=True)
class Budget:
    """When to stop: evaluations, a clock, or a plan that is within ``gap`` of the bound."""

    max_evaluations: int
    deadline_s: float  # on time.monotonic's clock
    target_s: float = 0.0
    gap: float = 0.0
    progress: Progress | None = None


@dataclass(kw_only=True)
class Record:
    """The best assignment that fits so far; and the least unfit, for the error message."""

    evaluator: Evaluator
    budget: Budget
    best: Assignment | None = None
    best_score: Score = field(default_factory=lambda: Score(math.inf, math.inf))
    least_unfit: tuple[float, Assignment] | None = None
    looked_at: int = 0
    interrupted: bool = False
    lower_bound_s: float = 0.0  # what an engine has proven

    def energy_below(self, assignment: Assignment, threshold: float) -> float | None:
        """The energy where it is at most ``threshold``; remembers what it saw."""
        score = self.evaluator.worth(assignment, threshold)
        self.looked_at += 1
        if score is None:
            return None
        self._remember(assignment, score)
        return score.energy if score.energy <= threshold else None

    def score(self, assignment: Assignment) -> Score:
        """Score and remember."""
        score = self.evaluator.score(assignment)
        self.looked_at += 1
        self._remember(assignment, score)
        return score

    def _remember(self, assignment: Assignment, score: Score) -> None:
        if score.overshoot > 0:
            if self.least_unfit is None or score.overshoot < self.least_unfit[0]:
                self.least_unfit = (score.overshoot, assignment)
        elif self.best is None or score.step_s < self.best_score.step_s:
            self.best, self.best_score = assignment, score
            if self.budget.progress is not None:
                self.budget.progress(self.looked_at, score.step_s)

    def within_gap(self, lower_bound_s: float) -> bool:
        """Is the best plan within the budget's gap of a bound?"""
        return self.best_score.step_s * (1.0 - self.budget.gap) <= lower_bound_s

    @property
    def spent(self) -> bool:
        return (
            self.looked_at >= self.budget.max_evaluations
            or self.best_score.step_s <= self.budget.target_s
            or time.monotonic() >= self.budget.deadline_s
        )


def walk(
    evaluator: Evaluator,
    starts: Sequence[Assignment],
    budget: Budget,
    *,
    seed: int,
    num_chains: int = 4,
    hot: float = 0.05,
    cold: float = 5e-4,
) -> Record:
    """The record of a search from ``starts``; an interrupt (Ctrl-C) ends it with what it has.

    First a descent from every start, then ``num_chains`` chains from the best ones and the
    greedy start, whose temperature falls from ``hot`` to ``cold`` (shares of the energy: 0.05
    takes a plan 5% slower in 37 of 100 cases) and which end in a descent.
    """
    record = Record(evaluator=evaluator, budget=budget)
    rng = random.Random(seed)
    try:
        found = []
        for start in [*starts, greedy(evaluator)]:
            record.score(start)
        for start in [*starts, greedy(evaluator)]:
            if not record.spent:
                found.append(_descend(record, start, rng))
        found.sort(key=lambda a: evaluator.score(a).energy)
        chain_steps = max(1, (budget.max_evaluations - record.looked_at) // num_chains)
        for chain in range(num_chains):
            if record.spent:
                break
            start = found[min(chain // 2, len(found) - 1)]
            end = _chain(record, start, rng, chain_steps, hot, cold)
            _descend(record, end, rng)
    except KeyboardInterrupt:
        if record.best is None:
            raise
        record.interrupted = True
    return record


def greedy(evaluator: Evaluator) -> Assignment:
    """Every call takes its fastest option, one after another sharing layouts where free."""
    space = evaluator.space
    return tuple(
        min(
            (
                space.option(call.name, space.meshes_of(call.name, size)[0], choices[0])
                for size, choices in space.choices[call.name].items()
            ),
            key=lambda option: option.seconds,
        )
        for call in space.calls
    )


def _chain(
    record: Record, start: Assignment, rng: random.Random, steps: int, hot: float, cold: float
) -> Assignment:
    """One Metropolis chain of ``steps`` proposals; its best assignment."""
    evaluator = record.evaluator
    here, energy = start, record.score(start).energy
    best, best_energy = here, energy
    last = record.looked_at + steps
    cooling = (cold / hot) ** (1.0 / max(1, steps))
    temperature = hot
    while record.looked_at < last and not record.spent:
        temperature *= cooling
        proposal = propose(here, evaluator.space, rng)
        if proposal is None:
            record.looked_at += 1
            continue
        # The threshold is drawn first: a proposal whose floor is above it need not be scored.
        threshold = energy * (1.0 - temperature * math.log(1.0 - rng.random()))
        proposed = record.energy_below(proposal, threshold)
        if proposed is not None:
            here, energy = proposal, proposed
            if energy < best_energy:
                best, best_energy = here, energy
    return best


def _descend(record: Record, start: Assignment, rng: random.Random) -> Assignment:
    """Iterated coordinate descent: each call, or all calls of its role, take the best candidate."""
    evaluator = record.evaluator
    here, energy = start, record.score(start).energy
    improved = True
    while improved and not record.spent:
        improved = False
        order = list(range(len(here)))
        rng.shuffle(order)
        for i in order:
            for trial in _neighbours(evaluator.space, here, i):
                found = record.energy_below(trial, energy * (1.0 - 1e-9))
                if found is not None:
                    here, energy, improved = trial, found, True
                if record.spent:
                    return here
    return here


def _neighbours(space: OptionSpace, here: Assignment, i: int) -> Iterator[Assignment]:
    """Assignments with another option for call i, then with another layout for its whole role."""
    role = space.calls[i].role
    options = list(_candidates(space, here, i))
    for option in options:
        if space.allows((option,)):
            yield replaced(here, i, option)
    for option in options if role is not None else ():
        trial = together(here, space, role or "", option)
        if trial is not None and space.allows(trial):
            yield trial


def _candidates(
    space: OptionSpace, assignment: Assignment, i: int, *, per_mesh: int = 3
) -> Iterator[Option]:
    """Options of call i worth a look: all on its mesh, layouts of the others, a few elsewhere."""
    call = space.calls[i].name
    for choice in space.choices[call][assignment[i].mesh.num_devices]:
        yield space.option(call, assignment[i].mesh, choice)
    for other in assignment:
        same = with_layout(space, call, other)
        if same is not None:
            yield same
    for mesh in space.meshes[call]:
        for choice in space.choices[call][mesh.num_devices][:per_mesh]:
            yield space.option(call, mesh, choice)
