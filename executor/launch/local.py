"""This machine alone: its one node's agent runs in this process."""

from __future__ import annotations

from collections.abc import Mapping

from executor.launch.agent import run_node, stops_by_signal, worker_command, worker_environment
from executor.launch.job import Job
from executor.run import Run

OPTIONS = ("bind",)


def start(job: Job, run: Run, options: Mapping[str, str]) -> None:
    """Run all ranks here, on loopback unless ``bind`` says otherwise."""
    with stops_by_signal(job, insist=False) as signals:
        run_node(job, 0, signals=signals)


def describe(job: Job, run: Run, options: Mapping[str, str]) -> str:
    """What would be started: a command for every rank."""
    lines = []
    for rank in range(job.num_ranks):
        own = worker_environment(job, rank)
        words = " ".join(f"{name}={own[name]}" for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        lines.append(f"{words} {' '.join(worker_command(job))}")
    return "\n".join(lines)
