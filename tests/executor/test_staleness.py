"""Protects generation a step ahead: it reads the weights that one step less has trained, whatever
the plan, and nothing else is other than in turns.

The oracle is one process that generates in turns and puts the old weights back for it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from executor.run import configure
from executor.run_checkpoint import Checkpoint, latest
from executor.worker import Worker
from planner.plan import ExecutionPlan
from planner.plan_schema import save_plan
from planner.program import Generate, compile_plan
from planner.program_check import check_program
from planner.trace import read_trace
from profiles.errors import CheckpointError
from tests.executor.test_resume import curve
from tests.runs import OVERRIDES, Outcome, make_plan, run_plans, run_rank
from tests.spawn import spawn

STEPS = 4
WORDS = [
    *OVERRIDES, f"total_steps={STEPS}", "actor.lr=3e-3", "ppo.ref_average=0.3", "ppo.num_epochs=2",
]  # fmt: skip


def ahead(plan: ExecutionPlan) -> ExecutionPlan:
    graph = dataclasses.replace(plan.problem.graph, max_staleness=1)
    found = dataclasses.replace(plan, problem=dataclasses.replace(plan.problem, graph=graph))
    check_program(found, compile_plan(found))
    return found


# Generation on a device of its own; in another layout on all devices, which train as well.
PLANS = {
    "beside": ahead(make_plan(2, "0:d1p1m1:1", overrides=WORDS, actor_gen="1:d1p1m1:1")),
    "beside many": ahead(
        make_plan(
            4, "0:d2p1m1:1", overrides=WORDS, actor_gen="2:d1p1m2:1", critic_train="0:d1p1m2:2",
            ref_inf="0:d1p2m1:2", rew_inf="1:d1p1m1:1",
        )
    ),
    "over": ahead(
        make_plan(2, "0:d2p1m1:1", overrides=WORDS, actor_gen="0:d1p2m1:2", ref_inf="1:d1p1m1:2")
    ),
}  # fmt: skip


REFERENCE = make_plan(1, "0:d1p1m1:1", overrides=WORDS)


class Evaluating(Worker):
    """Evaluates on the first batch between any two steps, and leaves the answers in a file."""

    def run_step(self, step: int, *, last: bool = False) -> None:
        if step:
            self.evaluate(step - 1, self.data, 0)
            answers = self.samples.values.get("sequences", {})
            told = {sample: ids.tolist() for sample, ids in answers.items()}
            file = Path(self.trace.file.name).parent / f"eval{step - 1}.rank{self.rank}.json"
            file.write_text(json.dumps(told))
            self.samples.values.clear()  # ``run_rank`` has taken over ``clear``
        super().run_step(step, last=last)


class OneVersionOld(Evaluating):
    """Generates in turns, with the weights that the step before began with."""

    old: torch.Tensor | None = None

    def _generate(self, instruction: Generate, counts: dict[str, int]) -> None:
        if self.evaluating:
            super()._generate(instruction, counts)
            return
        flat = self.weights.trainers["actor"].stage.buffer.flat
        new = flat.detach().clone()
        with torch.no_grad():
            flat.copy_(new if self.old is None else self.old)
            super()._generate(instruction, counts)
            flat.copy_(new)
        self.old = new


def run_evaluating(rank: int, world_size: int, folder: str) -> dict[str, Outcome]:
    """The reference, and one of the plans."""
    found = {}
    for name, worker_class in (("reference", OneVersionOld), ("evaluating", Evaluating)):
        plan = REFERENCE if name == "reference" else PLANS["beside"]
        own = Path(folder) / name
        own.mkdir(exist_ok=True)
        found[name] = run_rank(rank, world_size, plan, str(own), worker_class=worker_class)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, list[Outcome]]:
    found = run_plans({name: (plan, None) for name, plan in PLANS.items()}, folder)
    evaluated = spawn(2, run_evaluating, str(folder))
    return found | {
        name: [outcomes[name] for outcomes in evaluated] for name in ("reference", "evaluating")
    }


def tokens(outcomes: list[Outcome]) -> dict[tuple[int, int], list[int]]:
    return {place: ids for outcome in outcomes for place, ids in outcome.tokens.items()}


@pytest.mark.parametrize("name", PLANS)
def test_answers_and_curve_are_those_of_weights_one_version_old(
    name: str, outcomes: dict[str, list[Outcome]]
) -> None:
    expected = outcomes["reference"][0]
    assert len(expected.tokens) == STEPS * 8
    assert tokens(outcomes[name]) == expected.tokens
    for place, values in expected.metrics.items():
        found = dict(outcomes[name][0].metrics[place])
        if place.endswith("actor_gen"):
            assert found.pop("staleness") == float(place != "0/actor_gen")
        if name == "beside":  # the reference's layout: to the last bit
            assert found == values, place
        assert found == pytest.approx(values, rel=1e-4, abs=1e-4), place


def test_old_weights_give_other_answers(outcomes: dict[str, list[Outcome]], folder: Path) -> None:
    """Else nothing above could fail; and the ratio begins away from 1 where it was 1 in turns."""
    turns = run_plans({"turns": (REFERENCE, None)}, folder)["turns"][0]
    old = tokens(outcomes["beside"])
    assert {place for place in old if place[0] == 0 and old[place] != turns.tokens[place]} == set()
    assert {place for place in old if place[0] > 0 and old[place] != turns.tokens[place]}


def test_an_evaluation_has_the_newest_weights_and_leaves_what_was_made_ahead(
    outcomes: dict[str, list[Outcome]], folder: Path
) -> None:
    assert tokens(outcomes["evaluating"]) == tokens(outcomes["beside"])
    assert outcomes["evaluating"][0].metrics == outcomes["beside"][0].metrics
    for step in range(STEPS - 1):
        by_run = [
            json.loads((folder / run / "trace" / f"eval{step}.rank0.json").read_text())
            for run in ("reference", "evaluating")
        ]
        assert len(by_run[0]) == 8
        assert by_run[0] == by_run[1]


def test_the_trace_shows_generation_beside_training(
    outcomes: dict[str, list[Outcome]], folder: Path
) -> None:
    spans = read_trace(folder / "beside" / "trace")
    found = {(s.label, s.step): s for s in spans if s.label in ("actor_gen", "actor_train")}
    for step in range(STEPS - 1):
        generation, training = found["actor_gen", step], found["actor_train", step]
        assert (generation.rank, training.rank) == (1, 0)
        assert generation.start_s < training.end_s
        assert all(s.step != STEPS - 1 for s in spans if s.label == "actor_gen")


def test_max_staleness_of_the_plan_reaches_the_run() -> None:
    """A run makes the graph anew from its configuration, which does not have the word."""
    run = configure(PLANS["beside"], ["init=random"])
    assert run.plan.problem.graph.max_staleness == 1
    assert compile_plan(run.plan).ahead is not None


# ---- as users run it ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plans(folder: Path) -> dict[str, Path]:
    """Files of plans with generation on device 1, which both devices share in the second."""
    words = [*WORDS, "total_steps=5", "actor.schedule=linear"]
    found = {
        "beside": make_plan(2, "0:d1p1m1:1", overrides=words, actor_gen="1:d1p1m1:1"),
        "over": make_plan(2, "0:d2p1m1:1", overrides=words, actor_gen="0:d1p1m2:1"),
    }
    for name, plan in found.items():
        save_plan(ahead(plan), folder / f"{name}.json")
    return {name: folder / f"{name}.json" for name in found}


def run(plan: Path, output: Path, *words: str) -> None:
    command = [sys.executable, "-m", "executor.cli", "run", str(plan), "-o", str(output), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def finished(plans: dict[str, Path], folder: Path) -> Path:
    run(plans["beside"], folder / "finished", "checkpoint_every=2")
    return folder / "finished"


@pytest.mark.parametrize("name", ["beside", pytest.param("over", marks=pytest.mark.slow)])
def test_a_resumed_run_trains_on_the_answers_that_were_made_ahead(
    name: str, plans: dict[str, Path], finished: Path, tmp_path: Path
) -> None:
    """To the last bit under its plan; under another plan other ranks hold them."""
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    shutil.rmtree(again / "checkpoints" / "step00000004")
    run(plans[name], again, "--resume")
    mine, expected = curve(again), curve(finished)
    assert len(expected) == 5
    assert [line["actor_gen/staleness"] for line in mine] == [0, 1, 1, 1, 1]
    for found, reference in zip(mine, expected, strict=True):
        assert found == (
            reference if name == "beside" else pytest.approx(reference, rel=1e-3, abs=1e-3)
        )


def test_answers_that_are_not_in_a_checkpoint_are_told(finished: Path) -> None:
    checkpoint = Checkpoint(latest(finished / "checkpoints") or finished)
    assert set(checkpoint.header["ahead"]) == {"actor_gen"}
    assert checkpoint.tensors("made-ahead.actor_gen.", ["sequences@7"])["sequences@7"].ndim == 1
    with pytest.raises(CheckpointError, match="sequences@8 is missing of made-ahead"):
        checkpoint.tensors("made-ahead.actor_gen.", ["sequences@7", "sequences@8"])
