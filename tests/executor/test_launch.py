"""Protects the ends of a run that nobody wished for: a killed worker is named, a signal ends all
processes, and what was written stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ARGUMENTS = (
    "run", "--layout", "d2p1m1", "--model", "tiny", "init=random", "batch_size=4", "prompt_len=4",
    "response_len=4", "total_steps=100000", "ppo.num_mini_batches=1",
)  # fmt: skip


def descendants(pid: int) -> list[int]:
    """Processes that ``pid`` started, and theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def is_worker(pid: int) -> bool:
    return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run that has done its first step."""
    process = subprocess.Popen(
        [sys.executable, "-m", "executor.cli", *ARGUMENTS, "-o", str(tmp_path / "out")],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no step in two minutes"
        time.sleep(0.2)
    yield process
    process.kill()
    process.wait()


def ends(process: subprocess.Popen[str], children: list[int]) -> tuple[int, str]:
    """(exit code, last line of stderr), once none of its processes is left."""
    _, printed = process.communicate(timeout=60)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline, "processes are left over"
        time.sleep(0.1)
    assert "Traceback" not in printed
    return process.returncode, printed.strip().splitlines()[-1]


def test_a_killed_worker_is_named(running: subprocess.Popen[str]) -> None:
    children = descendants(running.pid)
    os.kill([pid for pid in children if is_worker(pid)][-1], signal.SIGKILL)
    code, sentence = ends(running, children)
    assert code == 1
    assert "was ended by SIGKILL" in sentence


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_process_and_leaves_what_was_written(
    running: subprocess.Popen[str], number: signal.Signals, tmp_path: Path
) -> None:
    children = descendants(running.pid)
    running.send_signal(number)
    code, sentence = ends(running, children)
    assert code == 128 + number
    assert "what was written stays" in sentence
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(len(lines)))
