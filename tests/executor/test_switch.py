"""Protects ``realexec switch``: a running job goes on under another plan, with the curve that it
would have had; a plan that it cannot have is refused in a sentence, and nothing happens to the run.

Oracle: a run that was left alone.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from executor.cli import main
from executor.launch.job import load_job
from executor.run import Run, one_layout_plan
from executor.switch import past_folder, switched
from planner.algorithm import make_config
from planner.calibrate import observe
from planner.graph import CallKind
from planner.mesh import DeviceMesh
from planner.plan import Allocation, ExecutionPlan
from planner.plan_schema import load_plan, save_plan
from planner.strategy import parse_strategy
from planner.trace import read_trace
from profiles.errors import PlanError
from tests.executor.test_resume import curve, finish, kill_a_worker, start
from tests.executor.test_resume import run as run_to_its_end
from tests.executor.test_staleness import ahead
from tests.planner.test_calibrate import bare_table
from tests.runs import ALGORITHMS, OVERRIDES, SMALL, make_plan

STEPS = 8
WORDS = (f"total_steps={STEPS}", "checkpoint_every=7")
# A reward that waits in its second, fourth and sixth call for somebody to say that it may go on.
REWARD = """
import time
from pathlib import Path

calls = 0

def score(prompts, answers, records):
    global calls
    calls += 1
    here = Path(__file__).parent
    if calls in (2, 4, 6):
        (here / f"waits{calls}").touch()
        deadline = time.monotonic() + 120
        while not (here / f"go{calls}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    return [sum(i % 3 for i in r["answer_ids"]) / 10 for r in records]

score.takes_lists = True
"""


def reward(folder: Path, *, waits: bool) -> str:
    folder.mkdir()
    (folder / "reward.py").write_text(REWARD)
    for number in () if waits else (2, 4, 6):
        (folder / f"go{number}").touch()
    return f"reward.source={folder / 'reward.py'}:score"


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not file.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, file
        time.sleep(0.05)


def apart(plan: ExecutionPlan) -> ExecutionPlan:
    """The actor trained on device 0, the critic on 1, generation on both; functions where they
    were."""
    one, both = parse_strategy("d1p1m1"), Allocation(
        mesh=DeviceMesh(0, 2), strategy=parse_strategy("d1p1m2")
    )  # fmt: skip
    found = dict(plan.allocations)
    for call in plan.problem.graph.calls:
        device = int(call.role in ("critic", "ref"))
        if call.kind is CallKind.GENERATE:
            found[call.name] = both
        elif call.kind is not CallKind.FUNCTION:
            found[call.name] = Allocation(mesh=DeviceMesh(device, 1), strategy=one)
    return replace(plan, allocations=found)


def alone(plan: ExecutionPlan) -> ExecutionPlan:
    """All on one device."""
    cluster = replace(plan.problem.cluster, devices_per_node=1)
    problem = replace(plan.problem, cluster=cluster)
    return one_layout_plan(problem, parse_strategy("d1p1m1"), seed=1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_to_its_end(folder / "out", *WORDS, reward(folder / "reward", waits=False))
    return folder / "out"


@pytest.fixture(scope="module")
def disturbed(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that is refused one plan, then goes over to one device, then to two meshes.

    While one device does everything, the other rank must not say for all steps that they go on.
    """
    folder = tmp_path_factory.mktemp("disturbed")
    output, waits = folder / "out", folder / "reward"
    plan = load_plan(undisturbed / "plan.json")
    plans = {
        "alone": alone(plan),
        "apart": apart(plan),
    }
    for name, other in plans.items():
        save_plan(other, folder / f"{name}.json")
    process = start(output, *WORDS, reward(waits, waits=True))
    wait_for(waits / "waits2", process)
    job = load_job(output)
    larger = make_plan(4, "0:d4p1m1:1")
    save_plan(larger, folder / "larger.json")
    codes = [main(["switch", str(output), str(folder / "larger.json")])]
    job.ask_switch(larger)  # past what the command looks at
    (waits / "go2").touch()
    wait_for(waits / "waits4", process)
    refused = job.told("switched")
    for number, name in ((4, "alone"), (6, "apart")):
        wait_for(waits / f"waits{number}", process)
        codes.append(main(["switch", str(output), str(folder / f"{name}.json"), "--timeout", "0"]))
        (waits / f"go{number}").touch()
    code, printed = finish(process)
    assert code == 0, printed
    return {
        "output": output, "codes": codes, "refused": refused, "printed": printed, "plans": plans,
        "told": job.told("switched"),
    }  # fmt: skip


def test_a_switched_run_has_the_curve_of_one_that_was_left_alone(
    undisturbed: Path, disturbed: dict[str, Any]
) -> None:
    found, expected = curve(disturbed["output"]), curve(undisturbed)
    assert [line["step"] for line in found] == list(range(STEPS))
    for mine, reference in zip(found, expected, strict=True):
        assert mine == pytest.approx(reference, rel=1e-4, abs=1e-4)
    assert expected[0]["actor_train/loss"] != expected[-1]["actor_train/loss"]


def test_a_plan_that_cannot_be_is_refused_and_the_run_goes_on(disturbed: dict[str, Any]) -> None:
    assert disturbed["codes"] == [2, 0, 0]
    assert "the plan is for" in disturbed["refused"]["refused"]
    assert "step" not in disturbed["refused"]
    assert "goes on under its plan: " in disturbed["printed"]
    assert not past_folder(disturbed["output"], 2).exists()


def test_every_step_can_be_told_from_which_plan_it_ran_under(disturbed: dict[str, Any]) -> None:
    """A folder's plan and trace belong together, for the summary and ``realplan calibrate``."""
    output = disturbed["output"]
    folders = [past_folder(output, 4), past_folder(output, 6), output]
    assert sorted(p.name for p in (output / "before").iterdir()) == ["step00000004", "step00000006"]
    steps = [sorted({span.step for span in read_trace(f / "trace")}) for f in folders]
    assert steps == [[0, 1, 2, 3], [4, 5], [6, 7]]
    plans = [load_plan(folder / "plan.json").allocations for folder in folders]
    assert plans[0]["actor_train"].strategy.dp == 2
    assert plans[1] == disturbed["plans"]["alone"].allocations
    assert plans[2] == disturbed["plans"]["apart"].allocations
    assert len((folders[0] / "metrics.jsonl").read_text().splitlines()) == 4
    for folder in folders:  # a run by itself to ``realplan calibrate``
        plan = load_plan(folder / "plan.json")
        record = observe(folder, bare_table(plan))
        assert record.plan.allocations == plan.allocations
        assert {"actor_gen", "actor_train"} <= {o.label for o in record.observations}
    calls = {row["call"] for row in json.loads((output / "summary.json").read_text())["calls"]}
    assert "reallocate actor" in calls, "of the last plan: under the first nothing moved"
    summary = json.loads((output / "summary.json").read_text())
    assert summary["before"] == [str(folder) for folder in folders[:2]]
    assert disturbed["told"]["step"] == 6
    assert "step 7 and later under another plan" in disturbed["printed"]


def test_a_checkpoint_after_a_switch_goes_on_under_any_plan(
    undisturbed: Path, disturbed: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(disturbed["output"], output)
    run_to_its_end(output, *WORDS, "--resume", reward(tmp_path / "reward", waits=False))
    found, expected = curve(output), curve(undisturbed)
    assert len(found) == STEPS
    assert found[-1] == pytest.approx(expected[-1], rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_a_killed_worker_restarts_under_the_plan_that_was_gone_over_to(
    undisturbed: Path, tmp_path: Path
) -> None:
    output, waits = tmp_path / "out", tmp_path / "reward"
    problem = load_plan(undisturbed / "plan.json").problem
    plan = one_layout_plan(problem, parse_strategy("d1p1m2"), seed=1)
    save_plan(plan, tmp_path / "tp2.json")
    words = (*WORDS, "--max-restarts", "1", "checkpoint_every=1")
    process = start(output, *words, reward(waits, waits=True))
    wait_for(waits / "waits2", process)
    assert main(["switch", str(output), str(tmp_path / "tp2.json"), "--timeout", "0"]) == 0
    (waits / "go2").touch()
    wait_for(waits / "waits4", process)
    for number in (4, 6):
        (waits / f"go{number}").touch()
    kill_a_worker(process, random.Random(1))
    code, printed = finish(process)
    assert code == 0, printed
    assert "restarting from" in printed
    assert load_plan(output / "plan.json").allocations == plan.allocations
    found, expected = curve(output), curve(undisturbed)
    assert len(found) == STEPS
    for mine, reference in zip(found, expected, strict=True):
        assert mine == pytest.approx(reference, rel=1e-4, abs=1e-4)


def test_a_run_that_has_ended_is_told(
    disturbed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    output = disturbed["output"]
    assert main(["switch", str(output), str(output / "plan.json")]) == 2
    assert "no run goes on here: done; go on with realexec run" in capsys.readouterr().err


# ---- which plans a run may have -----------------------------------------------------------------


def run_of(plan: ExecutionPlan) -> Run:
    algorithm = ALGORITHMS[plan.problem.algorithm]
    config = make_config(algorithm.config_class, [], base=plan.problem.config)
    return Run(plan=plan, algorithm=algorithm, config=config)


MINE = make_plan(2, "0:d2p1m1:1")
BATCH = [*OVERRIDES, "batch_size=16"]


@pytest.mark.parametrize(
    "plan,sentence",
    [
        (make_plan(4, "0:d4p1m1:1"), "cluster: the plan is for 4 devices, the run has 2 ranks"),
        (
            make_plan(2, "0:d2p1m1:1", overrides=BATCH),
            "batch_size: the plan is for 16, the run has 8; search with batch_size=8",
        ),
        (
            make_plan(2, "0:d2p1m1:1", spec=replace(SMALL, ffn=128)),
            "models.actor: the plan's actor has ffn 128, the run's 64; search a plan for the run's",
        ),
        (
            make_plan(2, "0:d2p1m1:1", algorithm="sft", overrides=["init=random"]),
            "algorithm: the plan is for sft, the run is ppo",
        ),
        (ahead(make_plan(2, "0:d2p1m1:1")), "max_staleness: the plan's is 1, the run's 0"),
    ],
)
def test_why_a_plan_is_refused(plan: ExecutionPlan, sentence: str) -> None:
    with pytest.raises(PlanError) as error:
        switched(run_of(MINE), plan, num_ranks=2, ranks_per_node=2)
    assert sentence in str(error.value)


def test_nodes_of_another_size_are_refused() -> None:
    """Eight ranks on two nodes of four: a plan for other nodes would cross them unawares."""
    for num_nodes, per_node in ((4, 2), (1, 8)):
        cluster = replace(MINE.problem.cluster, num_nodes=num_nodes, devices_per_node=per_node)
        plan = replace(MINE, problem=replace(MINE.problem, cluster=cluster))
        with pytest.raises(PlanError, match=f"nodes have {per_node} devices, the run's 4"):
            switched(run_of(MINE), plan, num_ranks=8, ranks_per_node=4)
    assert switched(run_of(MINE), MINE, num_ranks=8, ranks_per_node=4).plan.num_devices == 2


def test_the_runs_options_stay() -> None:
    """A plan that was searched with another seed or rate is only a plan."""
    other = make_plan(2, "0:d1p1m2:1", overrides=[*OVERRIDES, "seed=9", "actor.lr=0.5"])
    found = switched(run_of(MINE), other, num_ranks=2, ranks_per_node=2)
    assert found.config == run_of(MINE).config
    assert found.plan.problem.config == MINE.problem.config
    assert found.plan.allocations == other.allocations


@pytest.mark.parametrize("words", [("switch",), ("switch", "folder")])
def test_what_is_missing_is_told(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(list(words))
    assert "required" in capsys.readouterr().err
