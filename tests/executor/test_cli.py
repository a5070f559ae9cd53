"""Protects what a user of ``realexec`` meets: a run from one command, and one clear sentence for
every mistake, with exit code 2 and no traceback."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from executor.cli import main
from executor.run import one_layout_plan
from planner.mesh import DeviceMesh
from planner.plan import ExecutionPlan
from planner.plan_schema import save_plan
from planner.strategy import ParallelStrategy, parse_strategy
from tests.runs import SMALL, make_plan, ppo_problem

TWO_LAYOUTS = {"actor_gen": "0:d1p1m2:1", "critic_inf": "1:d1p1m1:1"}


@pytest.fixture
def plan() -> ExecutionPlan:
    return make_plan(2, "0:d2p1m1:2", **TWO_LAYOUTS)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one sentence that a wrong command line gets."""
    assert main(["run", *argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    *started, line = printed.err.strip().splitlines()
    assert all(text.startswith("ppo: ") for text in started), started
    return line


def test_a_run_leaves_metrics_a_trace_a_comparison_and_models_for_transformers(
    plan: ExecutionPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "plan.json", tmp_path / "out"
    save_plan(plan, file)
    assert main(["run", str(file), "-o", str(output), "total_steps=2", "save_every=1"]) == 0
    assert "predicted and measured" in capsys.readouterr().out
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert all(line["actor_train/grad_norm"] > 0 for line in lines)
    assert list((output / "tensorboard").iterdir())
    assert {f.name for f in (output / "trace").iterdir()} == {"rank0.jsonl", "rank1.jsonl"}
    calls = {row["call"] for row in json.loads((output / "summary.json").read_text())["calls"]}
    assert {"actor_gen", "actor_train", "reallocate actor", "step"} <= calls
    for step in (1, 2):
        (folder,) = (output / "actor").glob(f"epoch*globalstep{step}")
        assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 96
        (folder,) = (output / "critic").glob(f"epoch*globalstep{step}")
        assert AutoModelForSequenceClassification.from_pretrained(folder).config.num_labels == 1


def test_one_layout_needs_no_plan(tmp_path: Path) -> None:
    argv = ["run", "--layout", "d2p1m1", "--model", "tiny", "init=random", "batch_size=4"]
    argv += ["prompt_len=4", "response_len=4", "total_steps=1", "ppo.num_mini_batches=1"]
    assert main([*argv, "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "plan.json").exists()


@pytest.mark.parametrize(
    "layout, batch_size, devices", [("d1p1m4", 1, 1), ("d1p2m2", 3, 2), ("d2p1m2", 4, 4)]
)
def test_functions_of_one_layout_have_no_more_devices_than_samples(
    layout: str, batch_size: int, devices: int
) -> None:
    overrides = [*OVERRIDES, "reward.source=vader", f"batch_size={batch_size}"]
    problem = ppo_problem(4, overrides, replace(SMALL, num_kv_heads=4))
    plan = one_layout_plan(problem, parse_strategy(layout), seed=1)
    assert plan.allocations["rew_inf"].mesh == DeviceMesh(0, devices)
    assert plan.allocations["rew_inf"].strategy == ParallelStrategy(dp=devices)


def test_a_worker_s_refusal_is_one_sentence_and_its_crash_a_traceback(
    plan: ExecutionPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    save_plan(plan, file)
    argv = [str(file), "-o", str(tmp_path / "out"), "data.path=/no/such/file.jsonl"]
    assert "/no/such/file.jsonl" in refused(capsys, *argv)
    argv[-1] = "reward.source=tests.executor.test_cli:crash"
    function = make_plan(2, "0:d2p1m1:2", overrides=[*OVERRIDES, argv[-1]])
    save_plan(function, file)
    assert main(["run", *argv]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def crash(prompt: str, answer: str, record: dict[str, object]) -> float:
    return 1 / 0


OVERRIDES = ["batch_size=4", "prompt_len=4", "response_len=4", "init=random", "total_steps=1",
             "ppo.num_mini_batches=1"]  # fmt: skip


def test_a_plan_for_gpus_names_what_is_here_and_what_works(
    plan: ExecutionPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = plan.problem.cluster
    gpu = replace(cluster, device=replace(cluster.device, kind="cuda", name="a100"))
    file = tmp_path / "plan.json"
    save_plan(replace(plan, problem=replace(plan.problem, cluster=gpu)), file)
    sentence = refused(capsys, str(file), "init=random")
    assert "2 a100 devices" in sentence
    assert "--cluster local" in sentence


def test_weights_must_be_named_exist_and_fit(
    plan: ExecutionPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    save_plan(plan, file)
    assert "actor.path" in refused(capsys, str(file), "init=checkpoint")
    argv = [str(file), "init=checkpoint", f"actor.path={tmp_path}/absent"]
    assert "no folder" in refused(capsys, *argv)
    config = {
        "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4,
        "num_hidden_layers": 4, "intermediate_size": 64, "vocab_size": 96,
        "max_position_embeddings": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    argv[-1] = f"actor.path={tmp_path}"
    assert "hidden 64 instead of 32" in refused(capsys, *argv)


def test_mistakes_on_the_command_line(
    plan: ExecutionPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    save_plan(plan, file)
    assert "No such file" in refused(capsys, "absent.json")
    assert "'extra' is not an override" in refused(capsys, str(file), "extra")
    assert "'lrr'" in refused(capsys, str(file), "actor.lrr=1")
    assert "not at least 1" in refused(capsys, str(file), "total_steps=0")
    assert "output: is empty; name a folder" in refused(capsys, str(file), "-o", "")
    assert "actor.lr: inf is not a finite" in refused(capsys, str(file), "actor.lr=inf")
    assert "is not a layout" in refused(capsys, "--layout", "d2x1", "--model", "tiny")
    assert "tp 3 does not divide" in refused(capsys, "--layout", "d1p1m3", "--model", "tiny")
    assert "--model" in refused(capsys, "--layout", "d1p1m1")
    assert "not both" in refused(capsys, str(file), "--layout", "d1p1m1", "--model", "tiny")
    file.write_text(file.read_text()[:-40])
    assert str(file) in refused(capsys, str(file))
