"""Protects runs on other people's engines: a real Ray cluster of two nodes and a real SLURM of two
emulated ones give the curve that this machine gives alone, and what is submitted can be read."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from executor.cli import main
from executor.launch import on_slurm
from executor.run import one_layout_plan
from planner.algorithm import find_algorithm, make_config, make_problem
from planner.plan_schema import save_plan
from planner.strategy import parse_strategy
from profiles.catalogue import resolve_model
from profiles.clusters import make_cluster

OVERRIDES = (
    "init=random", "batch_size=4", "prompt_len=4", "response_len=6", "total_steps=3",
    "ppo.num_mini_batches=1", "actor.lr=1e-3", "critic.lr=1e-3",
)  # fmt: skip


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PPO on two nodes of one CPU worker each."""
    algorithm = find_algorithm("ppo")
    config = make_config(algorithm.config_class, OVERRIDES)
    cluster = replace(make_cluster("cpu", 2), num_nodes=2, devices_per_node=1)
    model = resolve_model("tiny")
    problem = make_problem(algorithm, config, model=model, critic=model, cluster=cluster)
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    save_plan(one_layout_plan(problem, parse_strategy("d2p1m1"), seed=1), path)
    return path


def curve(output: Path) -> list[Mapping[str, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: v for name, v in line.items() if name != "step_s"} for line in lines]


def run(
    plan: Path, output: Path, *words: str, environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "executor.cli", "run", str(plan), "-o", str(output), *words],
        capture_output=True, text=True, timeout=280, env={**os.environ, **(environment or {})},
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def local_curve(plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Sequence[Any]:
    output = tmp_path_factory.mktemp("local")
    code, printed = run(plan, output)
    assert code == 0, printed
    return curve(output)


def hosts(output: Path) -> list[str]:
    files = sorted((output / "launch" / "heartbeat").iterdir())
    return [json.loads(file.read_text())["host"] for file in files]


# ---- Ray --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """A cluster of two node processes with one CPU each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(**{k: v for k, v in node.items() if k != "include_dashboard"})
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_two_ray_nodes_give_the_curve_of_one_machine(
    plan: Path, local_curve: Sequence[Any], ray_address: str, tmp_path: Path
) -> None:
    words = ("--launcher", "ray", "--set", f"address={ray_address}", "--set", "bind=lo")
    code, printed = run(plan, tmp_path, *words)
    assert code == 0, printed
    assert curve(tmp_path) == local_curve
    assert "step 3/3" in printed
    assert {p.name for p in (tmp_path / "logs").iterdir()} == {"rank00000.log", "rank00001.log"}


@pytest.mark.slow
def test_a_plan_for_more_than_ray_has_is_refused_in_time(
    plan: Path, ray_address: str, tmp_path: Path
) -> None:
    whole = json.loads(plan.read_text())
    whole["cluster"].update(num_nodes=1, devices_per_node=2)  # two workers on one machine
    (tmp_path / "plan.json").write_text(json.dumps(whole))
    words = ("--launcher", "ray", "--set", f"address={ray_address}")
    code, printed = run(
        tmp_path / "plan.json", tmp_path / "o", *words, "--set", "placement_timeout_s=3"
    )
    assert code == 2, printed
    assert "Ray found no place for [{'CPU': 2.0}] within 3 s" in printed


@pytest.mark.slow
def test_a_rank_killed_on_a_ray_node_is_named_and_the_run_goes_on(
    plan: Path, ray_address: str, tmp_path: Path
) -> None:
    words = ("--launcher", "ray", "--set", f"address={ray_address}", "--set", "bind=lo")
    process = subprocess.Popen(
        [
            sys.executable, "-m", "executor.cli", "run", str(plan), "-o", str(tmp_path), *words,
            "total_steps=40", "checkpoint_every=5", "--max-restarts", "1",
        ],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    heartbeat = tmp_path / "launch" / "heartbeat" / "rank00001.json"
    deadline = time.monotonic() + 120
    while not list((tmp_path / "checkpoints").glob("step*")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(json.loads(heartbeat.read_text())["pid"], 9)
    _, printed = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    assert "rank 1 was ended by SIGKILL" in printed
    assert [line["step"] for line in curve(tmp_path)] == list(range(40))


def test_what_ray_is_asked_for_is_a_bundle_a_node(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    code = main(["run", str(plan), "-o", str(tmp_path / "o"), "--launcher", "ray", "--dry-run"])
    assert code == 0
    printed = capsys.readouterr().out
    assert printed.count("{'CPU': 1.0},") == 2
    assert re.search(r"actor realexec-\w+-node1 in bundle 1: ranks 1,", printed)
    assert not (tmp_path / "o").exists()


def test_no_ray_cluster_is_told(plan: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    code, printed = run(plan, tmp_path, "--launcher", "ray", "--set", "address=127.0.0.1:9")
    assert code == 2, printed
    assert "no Ray cluster can be reached" in printed
    assert "Traceback" not in printed


# ---- SLURM ------------------------------------------------------------------------------------


def free_ports() -> dict[str, str]:
    """Of the controller and the two nodes."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        numbers = [str(s.getsockname()[1]) for s in sockets]
    return dict(zip(("", "1", "2"), numbers, strict=True))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a SLURM of two emulated nodes; skips with a reason."""
    pytest.importorskip("submitit")
    script = Path(__file__).parents[2] / "scripts" / "setup_slurm.sh"
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    started = subprocess.run(
        ["bash", str(script), "start", str(folder)], capture_output=True, text=True, timeout=280,
        env={**os.environ, **{f"SLURM_TEST_PORT{n}": port for n, port in free_ports().items()}},
    )  # fmt: skip
    try:
        if started.returncode != 0:
            pytest.skip(f"no SLURM here: {started.stderr.strip()[-300:]}")
        name, _, value = started.stdout.strip().splitlines()[-1].partition("=")
        yield {name: value}
    finally:
        subprocess.run(["bash", str(script), "stop", str(folder)], timeout=60)


WORDS = ("--launcher", "slurm", "--set", "bind=lo", "--set", "partition=test")


@pytest.mark.slow
def test_two_slurm_nodes_give_the_curve_of_one_machine(
    plan: Path, local_curve: Sequence[Any], slurm: dict[str, str], tmp_path: Path
) -> None:
    code, printed = run(plan, tmp_path, *WORDS, environment=slurm)
    assert code == 0, printed
    assert curve(tmp_path) == local_curve
    assert len(list((tmp_path / "slurm").glob("*_log.out"))) == 2  # a task a node


@pytest.mark.slow
def test_what_slurm_cancels_stops_with_a_checkpoint(
    plan: Path, slurm: dict[str, str], tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [
            sys.executable, "-m", "executor.cli", "run", str(plan), "-o", str(tmp_path), *WORDS,
            "total_steps=100000",
        ],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, **slurm},
    )  # fmt: skip
    metrics, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    job_id = json.loads((tmp_path / "launch" / "submitted.json").read_text())["job_id"]
    subprocess.run(["scancel", job_id], check=True, env={**os.environ, **slurm})
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 128 + 15, printed
    found = re.search(r"interrupted after step (\d+), with a checkpoint", printed)
    assert found is not None, printed
    assert (tmp_path / "checkpoints" / f"step{int(found[1]):08}").is_dir()


def test_what_slurm_is_given_can_be_read(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("submitit")
    words = ["--set", "partition=gpu", "--set", "setup=module load cuda", "--set", "time=30"]
    words += ["--set", "nodelist=n[1-2]", "--set", "reservation=mine"]
    output = tmp_path / "o"
    code = main(["run", str(plan), "-o", str(output), "--launcher", "slurm", "--dry-run", *words])
    assert code == 0
    printed = capsys.readouterr().out
    for line in (
        "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --partition=gpu",
        "#SBATCH --time=30", "#SBATCH --nodelist='n[1-2]'", "#SBATCH --reservation=mine",
        "module load cuda",
    ):  # fmt: skip
        assert line in printed.splitlines()
    assert not output.exists()


def test_no_slurm_is_told(
    plan: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    pytest.importorskip("submitit")
    code = main(["run", str(plan), "-o", str(tmp_path), "--launcher", "slurm"])
    assert code == 2
    assert "SLURM cannot be used here" in capsys.readouterr().err


def test_submitit_without_slurm_takes_the_same_path(
    plan: Path, local_curve: Sequence[Any], tmp_path: Path
) -> None:
    """Its local engine: one task, so both ranks on one node."""
    pytest.importorskip("submitit")
    whole = json.loads(plan.read_text())
    whole["cluster"].update(num_nodes=1, devices_per_node=2)
    one_node = tmp_path / "plan.json"
    one_node.write_text(json.dumps(whole))
    code, printed = run(
        one_node,
        tmp_path / "o",
        "--launcher",
        "slurm",
        "--set",
        "cluster=local",
        "--set",
        "bind=lo",
    )
    assert code == 0, printed
    assert curve(tmp_path / "o") == local_curve


def test_a_wrong_time_is_refused(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("submitit")
    assert on_slurm.OPTIONS is None
    assert main(["run", str(plan), "--launcher", "slurm", "--dry-run", "--set", "time=1h"]) == 2
    assert "--set time: '1h' is not a positive whole number" in capsys.readouterr().err
