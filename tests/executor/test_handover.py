"""Protects: a run that goes over to another plan between two steps goes on as if it had not.

Oracle: runs under one plan from the first step to the last. Tokens must be identical, metrics and
weights after the last step equal to 1e-4, as for any two plans.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from executor.run import Run
from executor.weights import Weights
from executor.worker import Worker
from planner.plan import ExecutionPlan
from planner.program import Program
from planner.transfers import handed_over, producing_ranks, samples_of
from tests.executor.test_plan_independence import FAMILIES, compare
from tests.executor.test_staleness import PLANS as AHEAD
from tests.executor.test_staleness import STEPS, WORDS
from tests.runs import Outcome, make_plan, run_rank
from tests.spawn import spawn

# What functions keep over steps, and an average; 4 steps as in ``AHEAD``.
KEEPS = [*WORDS, "ppo.normalize_values=true", "ppo.normalize_rewards=true", "ppo.kl_target=0.01",
         "ppo.kl_horizon=20"]  # fmt: skip


def plan(num_devices: int, default: str, **calls: str) -> ExecutionPlan:
    return make_plan(num_devices, default, overrides=KEEPS, **calls)


def experts(num_devices: int, default: str, **calls: str) -> ExecutionPlan:
    return make_plan(
        num_devices, default, overrides=KEEPS, spec=FAMILIES["experts"], **calls
    )  # fmt: skip


D2, T2, P2 = plan(2, "0:d2p1m1:1"), plan(2, "0:d1p1m2:1"), plan(2, "0:d1p2m1:2")
APART = plan(
    4, "0:d1p1m2:1", actor_gen="0:d4p1m1:1", critic_train="2:d2p1m1:1:zero",
    critic_inf="2:d1p2m1:2", ref_inf="2:d1p1m2:1", rew_inf="3:d1p1m1:1",
)  # fmt: skip
ZERO = plan(
    4,
    "0:d4p1m1:1",
    actor_train="0:d4p1m1:1:zero",
    critic_train="0:d4p1m1:1:zero",
    actor_gen="0:d2p1m2:1",
    ref_inf="0:d2p2m1:2",
    rew_inf="0:d1p1m2:1",
)
AWAY = plan(
    2, "0:d1p1m2:1", ref_inf="0:d2p1m1:1", rew_inf="0:d2p1m1:1:offload",
    actor_train="0:d2p1m1:1:zero:offload", critic_train="0:d1p1m2:2:offload",
)  # fmt: skip
# The first plan, and before which steps over to which.
Case = tuple[ExecutionPlan, Mapping[int, Sequence[ExecutionPlan]]]
CASES: Mapping[str, Case] = {
    "d2 to t2": (D2, {2: (T2,)}),
    "at the beginning, and on": (D2, {0: (P2,), 1: (T2,), 3: (D2,)}),
    "to meshes of their own": (D2, {2: (APART,)}),
    "to fewer devices and back": (ZERO, {1: (T2,), 3: (APART,)}),
    "what was offloaded": (AWAY, {1: (D2,), 3: (AWAY,)}),
    "to the same plan": (ZERO, {2: (ZERO,)}),
}  # fmt: skip
EXPERT_CASES: Mapping[str, Case] = {
    "experts": (
        experts(4, "0:d4p1m1e2:1", actor_train="0:d4p1m1e2:1:zero", actor_gen="0:d2p1m1e2:1"),
        {
            1: (experts(4, "0:d2p1m2e2:1"),),
            3: (experts(2, "0:d1p1m2:1", actor_train="0:d2p1m1e2:1"),),
        },
    ),
}  # fmt: skip
AHEAD_CASES: Mapping[str, Case] = {
    "answers made ahead, to other ranks": (AHEAD["beside"], {2: (AHEAD["over"],)}),
    "and to many": (AHEAD["over"], {1: (AHEAD["beside many"],), 3: (AHEAD["beside"],)}),
}
# By kind the plan that the others are held against, and the others.
KINDS: Mapping[str, tuple[ExecutionPlan, Mapping[str, Case]]] = {
    "dense": (plan(1, "0:d1p1m1:1"), CASES),
    "experts": (experts(1, "0:d1p1m1:1"), EXPERT_CASES),
    "ahead": (AHEAD["beside"], AHEAD_CASES),
}


def run_all(rank: int, world_size: int, kind: str, folder: str) -> dict[str, Outcome]:
    found = {}
    reference, cases = KINDS[kind]
    runs: Mapping[str, Case] = {"reference": (reference, {}), **cases}
    for name, (first, then) in runs.items():
        own = Path(folder) / name.replace(" ", "_")
        own.mkdir(exist_ok=True)
        found[name] = run_rank(rank, world_size, first, str(own), then=then)
    return found


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_a_run_that_went_over_is_as_one_that_did_not(kind: str, tmp_path: Path) -> None:
    by_rank = spawn(4, run_all, kind, str(tmp_path), timeout_s=280.0)
    reference = by_rank[0]["reference"]
    assert len(reference.tokens) == STEPS * 8
    for name in KINDS[kind][1]:
        compare(name, [outcomes[name] for outcomes in by_rank], reference)


def test_answers_that_were_made_ahead_go_over(tmp_path: Path) -> None:
    """To the ranks that would have made them; they are of old weights, and cannot be made again."""
    by_rank = spawn(4, run_all, "ahead", str(tmp_path), timeout_s=280.0)
    whole = [outcomes["reference"] for outcomes in by_rank]
    for name in AHEAD_CASES:
        mine = [outcomes[name] for outcomes in by_rank]
        made, expected = (
            {place: ids for outcome in outcomes for place, ids in outcome.tokens.items()}
            for outcomes in (mine, whole)
        )
        assert len(expected) == STEPS * 8
        assert made == expected, name
        assert mine[0].metrics["3/actor_gen"]["staleness"] == 1.0
        for call, values in whole[0].metrics.items():
            assert mine[0].metrics[call] == pytest.approx(values, rel=1e-4, abs=1e-4), (name, call)


# ---- there and back -----------------------------------------------------------------------------


def all_values(worker: Worker) -> dict[str, Tensor]:
    """Copies of weights, averages and optimizer state of this rank."""
    weights = worker.weights
    with weights.all_here():
        found = {f"{role} {at.key}": buffer.flat for (role, at), buffer in weights.buffers.items()}
        found |= {f"average {role} {at.key}": a for (role, at), a in weights.averages.items()}
        for role, trainer in weights.trainers.items():
            found[f"{role} count"] = trainer.optimizer.count
            for number, section in enumerate(trainer.optimizer.sections):
                states = section.state().items()
                found |= {f"{role} {name} {number}": values for name, values in states}
        return {name: values.clone() for name, values in found.items()}


class Returning(Worker):
    """Before the second step the worker holds what that of the first step did, bit by bit."""

    dtype = torch.float32
    first: dict[str, Tensor]
    num_compared = 0

    def __init__(self, run: Run, program: Program, **rest: Any) -> None:
        super().__init__(run, program, **rest)
        self.weights = Weights(
            run, self.contexts, rank=self.rank, device=self.device, dtype=Returning.dtype
        )

    def run_step(self, step: int, *, last: bool = False) -> None:
        if step == 1:
            found = all_values(self)
            assert found.keys() == Returning.first.keys()
            for name, values in found.items():
                assert torch.equal(values, Returning.first[name]), name
            Returning.num_compared = len(found)
        super().run_step(step, last=last)
        Returning.first = all_values(self)


def run_there_and_back(rank: int, world_size: int, folder: str) -> list[int]:
    counts = []
    low, high = torch.bfloat16, torch.float32
    for dtype, home, away in ((low, ZERO, APART), (low, APART, T2), (high, AWAY, ZERO)):
        Returning.dtype = dtype
        own = Path(folder) / str(len(counts))
        own.mkdir(exist_ok=True)
        config = {**home.problem.config, "total_steps": 2}
        short = replace(home, problem=replace(home.problem, config=config))
        run_rank(rank, world_size, short, str(own), worker_class=Returning, then={1: (away, short)})
        counts.append(Returning.num_compared)
    return counts


def test_there_and_back_is_the_same_bit_by_bit(tmp_path: Path) -> None:
    """Also of bf16 weights, which have fp32 masters and averages beside them."""
    counts = spawn(4, run_there_and_back, str(tmp_path), timeout_s=240.0)
    assert min(counts[0]) >= 5, "of a trained role four tensors and a count"


# ---- memory -------------------------------------------------------------------------------------


class Watched(Worker):
    """Knows at its first step what the worker before it held."""

    last: Watched | None = None
    held: tuple[weakref.ref[Tensor], ...] = ()
    num_checked = 0

    def run_step(self, step: int, *, last: bool = False) -> None:
        if Watched.last not in (None, self):
            alive = sum(ref() is not None for ref in Watched.held)
            assert not alive, f"{alive} of {len(Watched.held)} tensors of the old plan are here"
            Watched.num_checked = len(Watched.held)
        super().run_step(step, last=last)
        tensors = [buffer.flat for buffer in self.weights.buffers.values()]
        for trainer in self.weights.trainers.values():
            tensors += [trainer.gradients, *trainer.optimizer.own_state]
        Watched.held = tuple(weakref.ref(tensor) for tensor in tensors)
        Watched.last = self


def run_watched(rank: int, world_size: int, folder: str) -> int:
    run_rank(rank, world_size, D2, folder, worker_class=Watched, then={2: (T2,)})
    return Watched.num_checked


def test_nothing_of_the_old_plan_stays_in_memory(tmp_path: Path) -> None:
    counts = spawn(2, run_watched, str(tmp_path))
    assert min(counts) >= 2 * 4 + 2, "of two trained roles four tensors each, and two frozen ones"


# ---- integers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("beside", "over"), ("over", "beside many")])
def test_every_answer_that_a_rank_lacks_comes_from_a_rank_that_has_it(
    names: tuple[str, str],
) -> None:
    before, after = (AHEAD[name] for name in names)
    (call,) = before.problem.graph.ahead

    def held(plan: ExecutionPlan) -> dict[int, set[int]]:
        allocation = plan.allocations[call.name]
        ranks = producing_ranks(call, allocation.strategy, allocation.mesh.first)
        owned = samples_of(plan.problem, call, allocation.strategy.dp)
        return {r: set(samples) for of, samples in zip(ranks, owned, strict=True) for r in of}

    have, want = held(before), held(after)
    arrivals = handed_over(before, after, call)
    for rank in range(4):
        came: list[int] = []
        for parcel in arrivals.get(rank, ()):
            assert set(parcel.samples) <= have[parcel.peer]
            came += parcel.samples
        assert len(came) == len(set(came))
        assert set(came) == want.get(rank, set()) - have.get(rank, set())
