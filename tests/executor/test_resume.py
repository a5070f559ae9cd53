"""Protects a run's continuation: after any end it goes on to the curve of a run that never ended.

The oracle is an undisturbed run. Under the same plan the numbers are equal to the last bit, under
another plan to 1e-4, as for any two plans.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from executor.cli import main
from executor.run_checkpoint import latest
from tests.executor.test_launch import descendants, is_worker

OPTIONS = (
    "--model", "tiny", "init=random", "batch_size=4", "prompt_len=4", "response_len=6",
    "total_steps=5", "ppo.num_mini_batches=2", "actor.lr=1e-3", "critic.lr=1e-3",
    "actor.schedule=linear",
    # What functions keep over steps.
    "ppo.num_epochs=2", "ppo.normalize_values=true", "ppo.normalize_rewards=true",
    "ppo.kl_target=0.01", "ppo.kl_horizon=20", "ppo.ref_average=0.2",
)  # fmt: skip

Curve = list[Mapping[str, float]]


def start(
    output: Path, *words: str, layout: str = "d2p1m1", stderr: int = subprocess.PIPE
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "executor.cli", "run", "--layout", layout, *OPTIONS]
    return subprocess.Popen(
        [*command, "-o", str(output), *words], stdout=subprocess.DEVNULL, stderr=stderr, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, printed = process.communicate(timeout=600)
    return process.returncode, printed


def run(output: Path, *words: str, layout: str = "d2p1m1") -> str:
    code, printed = finish(start(output, *words, layout=layout))
    assert code == 0, printed
    return printed


def curve(output: Path) -> Curve:
    """Metrics of every step, without what is a time."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: v for name, v in line.items() if name != "step_s"} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an undisturbed run with checkpoints after steps 2 and 4."""
    output = tmp_path_factory.mktemp("finished")
    run(output, "checkpoint_every=2")
    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert names == ["step00000002", "step00000004"]
    return output


@pytest.fixture
def interrupted(finished: Path, tmp_path: Path) -> Path:
    """As if the run had been killed in its fourth step, while it wrote a line of metrics."""
    output = tmp_path / "interrupted"
    shutil.copytree(finished, output)
    shutil.rmtree(output / "checkpoints" / "step00000004")
    metrics = output / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)[:3]
    metrics.write_text("".join(lines) + '{"step": 3, "cut o')
    return output


def test_a_resumed_run_repeats_the_curve_to_the_last_bit(finished: Path, interrupted: Path) -> None:
    assert "going on from" in run(interrupted, "--resume")
    assert curve(interrupted) == curve(finished)


@pytest.mark.parametrize("layout", ["d1p2m1", "d1p1m2"])
def test_another_plan_goes_on_from_the_same_checkpoint(
    layout: str, finished: Path, interrupted: Path
) -> None:
    run(interrupted, "--resume", layout=layout)
    found, expected = curve(interrupted), curve(finished)
    assert len(found) == len(expected)
    for mine, reference in zip(found, expected, strict=True):
        assert mine == pytest.approx(reference, rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_experts_go_on_where_another_layout_puts_them(tmp_path: Path) -> None:
    """Their state is written by dp / ep ranks, and read by shards of all of them."""
    config = {
        "model_type": "mixtral", "num_hidden_layers": 1, "hidden_size": 16, "vocab_size": 64,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24,
        "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ("--model", str(tmp_path), "checkpoint_every=2", "total_steps=4")
    whole, again = tmp_path / "whole", tmp_path / "again"
    run(whole, *words, layout="d2p1m1e2")
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step00000004")
    run(again, *words, "--resume", layout="d1p1m2")
    found, expected = curve(again), curve(whole)
    assert len(found) == len(expected) == 4
    for mine, reference in zip(found, expected, strict=True):
        assert mine == pytest.approx(reference, rel=1e-4, abs=1e-4)


def kill_a_worker(
    process: subprocess.Popen[str], rng: random.Random, number: int = signal.SIGKILL
) -> None:
    workers = [pid for pid in descendants(process.pid) if is_worker(pid)]
    if workers:
        os.kill(rng.choice(workers), number)


def wait_for_step(process: subprocess.Popen[str], output: Path, step: int) -> None:
    metrics, deadline = output / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > step):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    "number,told",
    [
        (signal.SIGKILL, "was ended by SIGKILL"),
        pytest.param(signal.SIGSTOP, "its process is stopped", marks=pytest.mark.slow),
    ],
)
def test_a_killed_or_frozen_worker_costs_no_more_than_the_steps_since_the_checkpoint(
    finished: Path, tmp_path: Path, number: signal.Signals, told: str
) -> None:
    process = start(tmp_path, "checkpoint_every=1", "--max-restarts", "2", "hang_timeout_s=10")
    wait_for_step(process, tmp_path, 1)
    kill_a_worker(process, random.Random(1), number)
    code, printed = finish(process)
    assert code == 0, printed
    assert told in printed
    assert "restarting from" in printed
    assert curve(tmp_path) == curve(finished)


def test_sigterm_of_the_job_loses_nothing(finished: Path, tmp_path: Path) -> None:
    """No checkpoint was asked for: the one at its end is the signal's."""
    process = start(tmp_path)
    wait_for_step(process, tmp_path, 1)
    process.send_signal(signal.SIGTERM)
    code, printed = finish(process)
    if code == 0:
        pytest.skip("the run was faster than the signal")
    assert code == 128 + signal.SIGTERM, printed
    stopped = re.search(r"interrupted after step (\d+), with a checkpoint", printed)
    assert stopped is not None, printed
    assert len(curve(tmp_path)) == int(stopped[1])
    run(tmp_path, "--resume")
    assert curve(tmp_path) == curve(finished)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    """Also while a checkpoint is written, which is most of the time here: none is ever half."""
    reference, disturbed, rng = tmp_path / "reference", tmp_path / "disturbed", random.Random(7)
    run(reference, "total_steps=60")
    process = start(
        disturbed, "total_steps=60", "checkpoint_every=1", "--max-restarts", "20",
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for _ in range(20):
        before = steps_done(disturbed)
        while process.poll() is None and steps_done(disturbed) <= before:
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 0.3))
        kill_a_worker(process, rng)
    code, _ = finish(process)
    assert code == 0
    assert curve(disturbed) == curve(reference)


def steps_done(output: Path) -> int:
    """Of the newest checkpoint."""
    newest = latest(output / "checkpoints")
    return 0 if newest is None else int(newest.name.removeprefix("step"))


@pytest.mark.parametrize(
    "words,sentence",
    [
        ((), "holds checkpoints of an earlier run, the newest step00000004"),
        (("--resume", "total_steps=4"), "has all of total_steps=4 done"),
        (("--resume", "seed=2"), "was written with seed=1, not 2"),
        (("resume=none",), "none: is not a complete checkpoint"),
        (("--resume", "--model", "smollm2-135m"), "its actor has num_layers 4"),
        (("--max-restarts", "-1"), "--max-restarts: -1 is below 0"),
    ],
)
def test_what_cannot_go_on_is_told(
    words: Sequence[str], sentence: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["run", "--layout", "d2p1m1", *OPTIONS, "-o", str(finished), *words])
    assert code == 2
    assert sentence in capsys.readouterr().err
    assert len(curve(finished)) == 5
