"""Protects the loop from trace to profile: factors that were put into a trace come out of it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from planner.calibrate import (
    Observation,
    as_run,
    corrected,
    fit,
    judge,
    observe,
    phase_of,
)
from planner.cli import main
from planner.confidence import confidence
from planner.plan import ExecutionPlan
from planner.plan_schema import save_plan
from planner.program import Average, compile_plan
from planner.resolve import make_costs
from planner.simulate import StepPrices, list_events, play_step, steady_step_s
from planner.trace import TraceSpan
from profiles.calibration import Calibration, Correction
from profiles.errors import ConfigError
from profiles.table import CostRow, CostTable
from tests.planner.plans import make_test_cluster, ppo, random_plan

FACTORS = {"generate": 1.5, "infer": 0.8, "train": 1.25, "function": 2.0, "reallocate": 3.0}


def bare_table(plan: ExecutionPlan) -> CostTable:
    """A profile that knows nothing of layers: all costs are from peak rates."""
    row = CostRow(component="optimizer", operation="step", size=1000, seconds=1e-3)
    return CostTable(
        device=plan.problem.cluster.device, rows=(row,), dtype="fp32", date="2026-01-01",
        source="test",
    )  # fmt: skip


def leave_run(
    folder: Path, plan: ExecutionPlan, factors: Mapping[str, float], *, noise: float = 0.0,
    seed: int = 0, num_steps: int = 4,
) -> Path:  # fmt: skip
    """The output folder of a run in which every phase takes ``factors`` times its prediction."""
    rng = random.Random(seed)
    prices = StepPrices(plan.problem, make_costs(plan.problem.cluster, bare_table(plan)))
    events = [
        replace(e, seconds=e.seconds * factors[phase_of(e)] * math.exp(noise * rng.gauss(0, 1)))
        for e in list_events(plan, compile_plan(plan), prices)
    ]
    (folder / "trace").mkdir(parents=True)
    save_plan(plan, folder / "plan.json")
    clock_s = dict.fromkeys(range(plan.num_devices), 1e9)
    lines: dict[int, list[str]] = {rank: [] for rank in clock_s}
    for step in range(num_steps):

        def draw(event: object, label: str, start_s: float, end_s: float, step: int = step) -> None:
            index = event.instruction.index  # type: ignore[attr-defined]
            kind = type(event.instruction).__name__.lower()  # type: ignore[attr-defined]
            receives = label.startswith("receive ")
            for rank in event.ranks:  # type: ignore[attr-defined]
                span = TraceSpan(
                    rank=rank, step=step, index=index,
                    kind="transfer" if receives else kind, label=label, start_s=start_s,
                    end_s=end_s,
                )  # fmt: skip
                lines[rank].append(json.dumps(asdict(span)) + "\n")

        play_step(events, clock_s, draw)
    for rank, text in lines.items():
        (folder / "trace" / f"rank{rank}.jsonl").write_text("".join(text))
    return folder


def plans(count: int, *words: str) -> list[ExecutionPlan]:
    """Plans of one problem."""
    rng = random.Random(7)
    problem = ppo(make_test_cluster(1, 4), ["batch_size=24", "reward.source=vader", *words])
    return [random_plan(rng, problem) for _ in range(count)]


def test_factors_of_a_trace_are_found(tmp_path: Path) -> None:
    runs = [leave_run(tmp_path / str(n), plan, FACTORS) for n, plan in enumerate(plans(3))]
    records = [observe(run, bare_table(plan)) for run, plan in zip(runs, plans(3), strict=True)]
    found = fit([o for r in records for o in r.observations], source="s", date="d")
    for phase, factor in found.factors.items():
        assert factor == pytest.approx(FACTORS[phase], rel=1e-4), phase
        correction = found.of(phase)
        assert correction is not None
        if correction.observations > 1:
            assert correction.spread == pytest.approx(0.0, abs=1e-4)  # of clocks since 1970
    assert {"generate", "infer", "train"} <= set(found.factors)
    for verdict in judge(records):
        assert verdict.after == pytest.approx(0.0, abs=0.01), verdict
        assert verdict.held_out == pytest.approx(0.0, abs=0.01), verdict
        assert verdict.before > 0.1, verdict


def test_an_average_of_weights_is_of_no_phase(tmp_path: Path) -> None:
    """It takes no part in a correction, and does not hide the rest of its run."""
    (plan,) = plans(1, "ppo.ref_average=0.1")
    assert any(isinstance(i, Average) for i in compile_plan(plan).step[0])
    record = observe(leave_run(tmp_path / "run", plan, {**FACTORS, "": 9.0}), bare_table(plan))
    assert {o.phase for o in record.observations} <= set(FACTORS)
    assert {"actor_train", "ref_inf"} <= {o.label for o in record.observations}


def test_costs_with_the_corrections_predict_the_run(tmp_path: Path) -> None:
    plan = plans(1)[0]
    record = observe(leave_run(tmp_path / "run", plan, FACTORS), bare_table(plan))
    found = fit(record.observations, source="s", date="d")
    table = replace(bare_table(plan), calibration=found)
    bare, prices = (
        StepPrices(plan.problem, make_costs(plan.problem.cluster, t))
        for t in (table.uncorrected, table)
    )
    program = compile_plan(plan)
    for before, after in zip(
        list_events(plan, program, bare), list_events(plan, program, prices), strict=True
    ):
        factor = found.factors.get(phase_of(before), 1.0)
        assert after.seconds == pytest.approx(before.seconds * factor)
        assert corrected(before, found.factors).seconds == pytest.approx(after.seconds)
        assert after.arrivals == before.arrivals
    for call in plan.problem.graph.calls:
        cost = prices.call(call.name, plan.allocations[call.name])
        assert sum(cost.parts.values()) == pytest.approx(cost.seconds)
        assert sum(cost.provenance.values()) == pytest.approx(cost.seconds)


def test_nine_intervals_of_ten_hold_the_truth() -> None:
    rng, held = random.Random(3), 0
    for _ in range(400):
        logs = [math.log(1.3) + 0.2 * rng.gauss(0, 1) for _ in range(4)]
        observations = [
            Observation(run="r", label="a", phase="train", predicted_s=1.0, measured_s=math.exp(x))
            for x in logs
        ]
        (correction,) = fit(observations, source="s", date="d").corrections
        assert correction.low is not None
        assert correction.high is not None
        held += correction.low <= 1.3 <= correction.high
    assert held / 400 == pytest.approx(0.9, abs=0.05)


def test_one_observation_has_no_interval() -> None:
    once = Observation(run="r", label="a", phase="train", predicted_s=2.0, measured_s=3.0)
    (correction,) = fit([once], source="s", date="d").corrections
    assert (correction.factor, correction.low, correction.spread) == (1.5, None, None)


def test_lengths_are_those_of_the_run() -> None:
    plan = plans(1)[0]
    strategy = plan.allocations["actor_gen"].strategy
    ranks = [plan.allocations["actor_gen"].mesh.first + i for i in range(strategy.num_devices)]
    workload = plan.problem.workload
    whole = workload.num_sequences * (10 + 4)
    spans = [
        TraceSpan(
            rank=rank, step=step, index=1, kind="generate", label="actor_gen", start_s=0.0,
            end_s=1.0, num_tokens=whole // strategy.dp,
        )
        for rank in ranks for step in (1, 2)
    ]  # fmt: skip
    found = as_run(plan, spans, 1, 4.0)
    assert found.expected_prompt_tokens == pytest.approx(10, rel=0.05)
    assert found.expected_response_tokens == 4
    assert as_run(plan, spans, 1, None) == workload
    # What a run has seen is heard before what its plan was told.
    told = replace(workload, mean_prompt_tokens=15.0, response_lengths=(7,))
    plan = replace(plan, problem=replace(plan.problem, workload=told))
    assert as_run(plan, spans, 1, 4.0) == replace(
        told, mean_prompt_tokens=found.mean_prompt_tokens, response_lengths=(4,)
    )


# ---- how sure -----------------------------------------------------------------------------------


def made_calibration(spread: float, observations: int = 10) -> Calibration:
    return Calibration(
        corrections=tuple(
            Correction(
                phase=phase, factor=1.0, low=0.9, high=1.1, spread=spread,
                observations=observations,
            )
            for phase in ("generate", "infer", "train", "reallocate")
        ),
        source="s", date="d",
    )  # fmt: skip


def prices_with(plan: ExecutionPlan, calibration: Calibration | None) -> StepPrices:
    table = replace(bare_table(plan), calibration=calibration)
    return StepPrices(plan.problem, make_costs(plan.problem.cluster, table))


def step_s(plan: ExecutionPlan, prices: StepPrices) -> float:
    return steady_step_s(list_events(plan, compile_plan(plan), prices))


def test_a_plan_does_not_beat_itself() -> None:
    plan = plans(1)[0]
    found = confidence(plan, plan, prices_with(plan, made_calibration(0.3)))
    assert found is not None
    assert (found.faster, found.ratio_low, found.ratio_high) == (0.5, 1.0, 1.0)
    assert found.step_low_s < step_s(plan, prices_with(plan, None)) < found.step_high_s


def test_the_less_is_known_the_less_is_sure() -> None:
    prices = prices_with(plans(1)[0], None)
    fast, slow = sorted(plans(2), key=lambda plan: step_s(plan, prices))
    ratio = step_s(slow, prices) / step_s(fast, prices)
    assert ratio > 1.01
    sure = []
    for spread in (1e-9, 0.1, 3.0):
        found = confidence(fast, slow, prices_with(fast, made_calibration(spread)))
        assert found is not None
        assert found.ratio_low <= ratio * 1.001
        assert found.ratio_high >= ratio * 0.999
        back = confidence(slow, fast, prices_with(fast, made_calibration(spread)))
        assert back is not None
        assert back.faster == pytest.approx(1 - found.faster, abs=0.15)
        sure.append(found.faster)
    assert sure[0] == 1.0
    assert sure[0] >= sure[1] >= sure[2]


@pytest.mark.parametrize("calibration", [None, made_calibration(0.1, observations=2)])
def test_nothing_is_said_of_what_was_hardly_seen(calibration: Calibration | None) -> None:
    plan = plans(1)[0]
    assert confidence(plan, plan, prices_with(plan, calibration)) is None


# ---- the command --------------------------------------------------------------------------------


def test_the_command_writes_a_profile_that_search_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = plans(3)
    runs = [leave_run(tmp_path / f"run{n}", p, FACTORS, noise=0.1, seed=n) for n, p in
            enumerate(some)]  # fmt: skip
    profile, output = tmp_path / "profile.json", tmp_path / "calibrated.json"
    bare_table(some[0]).save(profile)
    words = ["calibrate", str(profile), *map(str, runs), "-o", str(output)]
    assert main(words) == 0
    text = capsys.readouterr().out
    for word in ("actor_train", "step", "90% interval", "left out", str(output)):
        assert word in text, word
    calibration = CostTable.load(output).calibration
    assert calibration is not None
    assert calibration.factors["train"] == pytest.approx(FACTORS["train"], rel=0.2)
    assert "3 runs" in calibration.source
    assert main([*words[:2], str(runs[0] / "trace"), "-o", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["calibration"]["corrections"]
    for n, plan in enumerate(some[:2]):
        save_plan(plan, tmp_path / f"{n}.json")
    plan_files = [str(tmp_path / f"{n}.json") for n in range(2)]
    assert main(words) == 0
    capsys.readouterr()
    assert main(["compare", *plan_files, "--profile", str(output)]) == 0
    assert "sure to beat" in capsys.readouterr().out


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    plan = plans(1)[0]
    with pytest.raises(ConfigError, match=r"no plan\.json"):
        observe(tmp_path, bare_table(plan))
    save_plan(plan, tmp_path / "plan.json")
    with pytest.raises(ConfigError, match="no trace here"):
        observe(tmp_path, bare_table(plan))


def test_a_run_named_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plans(1)[0]
    run = leave_run(tmp_path / "run", plan, FACTORS)
    bare_table(plan).save(tmp_path / "p.json")
    words = ["calibrate", str(tmp_path / "p.json"), str(run), str(run)]
    assert main([*words, "-o", str(tmp_path / "c.json")]) == 2
    assert "named twice" in capsys.readouterr().err
    assert not (tmp_path / "c.json").exists()
