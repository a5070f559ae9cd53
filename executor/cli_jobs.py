"""``realexec`` around a run: which launcher; ``status``, ``logs``, ``switch`` and ``stop``."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table

from executor.launch.job import Job, load_job, plan_job, run_of
from executor.launch.supervise import LOST_S, first_error, ranks_per_node, read_errors
from executor.run import Run
from executor.switch import switched
from executor.watchdog import read_position
from planner.plan_schema import load_plan
from profiles.errors import ConfigError

# A launcher is a module with ``OPTIONS``, ``start(job, run, options)`` and ``describe`` likewise.
LAUNCHERS: Mapping[str, str] = {
    "local": "executor.launch.local",
    "ray": "executor.launch.on_ray",
    "slurm": "executor.launch.on_slurm",
}


def add_launch_arguments(run: argparse.ArgumentParser) -> None:
    run.add_argument(
        "--launcher", choices=tuple(LAUNCHERS), default="local",
        help="who starts the workers: this machine (default), a Ray cluster, SLURM",
    )  # fmt: skip
    run.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="launcher_words",
        help="of the launcher: bind=INTERFACE, address=… (ray), partition=…, setup=… (slurm)",
    )  # fmt: skip
    run.add_argument(
        "--dry-run", action="store_true", help="print what would be started or submitted"
    )


def add_verbs(verbs: Any) -> None:
    texts = {
        "status": "where every rank of a run is",
        "logs": "what the ranks of a run have printed; that of a failed one first",
        "switch": "have a run go on under another plan from its next step on, without a restart",
        "stop": "stop a run after its step, with a checkpoint",
    }
    for name, text in texts.items():
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("output", metavar="FOLDER", help="the output folder of the run")
        if name == "logs":
            verb.add_argument("--rank", type=int, metavar="N", help="of this rank only")
        if name == "switch":
            verb.add_argument(
                "plan", metavar="plan.json",
                help="of the same problem, on as many devices as the run has or fewer",
            )  # fmt: skip
        if name in ("stop", "switch"):
            verb.add_argument(
                "--timeout", type=float, default=600.0, metavar="SECONDS",
                help="wait so long for it, 0: do not wait (default 600)",
            )  # fmt: skip


def launcher_of(name: str) -> ModuleType:
    return importlib.import_module(LAUNCHERS[name])


def launcher_options(args: argparse.Namespace) -> dict[str, str]:
    """``--set`` words by name.

    Raises:
        ConfigError: not NAME=VALUE, or the launcher has no such option.
    """
    known = launcher_of(args.launcher).OPTIONS
    found = {}
    for word in args.launcher_words:
        name, equals, value = word.partition("=")
        if not equals or not value:
            raise ConfigError(f"'{word}' is not NAME=VALUE", where="--set")
        if known is not None and name not in known:
            raise ConfigError(
                f"{args.launcher} has no option '{name}'", where="--set",
                remedy=f"it has {', '.join(known)}",
            )  # fmt: skip
        found[name] = value
    return found


def describe(run: Run, launcher: str, options: Mapping[str, str]) -> str:
    """What ``launch`` would start, without a trace on any disk."""
    job = plan_job(
        run, launcher=launcher, ranks_per_node=ranks_per_node(run, launcher), options=options
    )
    text: str = launcher_of(launcher).describe(job, run, options)
    return text


# ---- verbs ------------------------------------------------------------------------------------


def _status(args: argparse.Namespace) -> int:
    job = load_job(args.output)
    table = Table(box=None, pad_edge=False)
    for column in ("rank", "host", "pid", "log", "last sign", "where"):
        table.add_column(column)
    now = time.time()
    for rank in range(job.num_ranks):
        file = job.heartbeat_of(rank)
        position = read_position(file)
        if position is None:
            table.add_row(str(rank), "", "", str(job.log_of(rank)), "", "not started")
            continue
        age_s = max(0.0, now - file.stat().st_mtime)
        table.add_row(
            str(rank), position.host, str(position.pid), str(job.log_of(rank)),
            f"{age_s:.0f} s ago", position.describe(),
        )  # fmt: skip
    print(f"{job.launcher}: {state_of(job)}")
    Console().print(table)
    return 0


def state_of(job: Job) -> str:
    """One line: running, stopping, stopped, failed (why), lost, or done."""
    error = first_error(job)
    ended = all(job.told(f"node{node}") is not None for node in range(job.num_nodes))
    stopped = job.told("stopped")
    if stopped is not None:
        return f"stopped after step {stopped['step']}"
    if job.told("failed") is not None or (ended and error is not None):
        return f"failed: {str(error).strip().splitlines()[-1]}"
    if ended:
        return "done"
    if is_lost(job):
        return "lost: no rank has given a sign of life for a while; go on with --resume"
    return "stopping" if job.told("stop") is not None else "running"


def is_lost(job: Job) -> bool:
    """Every rank is silent for longer than one may be: whoever ran them was killed.

    A job that a scheduler has not begun is not lost.
    """
    quiet_s = job.quiet_s()
    return quiet_s is not None and quiet_s > LOST_S


def _logs(args: argparse.Namespace) -> int:
    job = load_job(args.output)
    failed = [record["rank"] for record in read_errors(Path(job.output))]
    told = job.told("failed")
    first = [told["rank"]] if told is not None else []
    ranks = dict.fromkeys([*first, *failed, *range(job.num_ranks)])
    if args.rank is not None:
        if args.rank not in ranks:
            raise ConfigError(f"the run has ranks 0 to {job.num_ranks - 1}", where="--rank")
        ranks = {args.rank: None}
    for rank in ranks:
        file = job.log_of(rank)
        if len(ranks) > 1:
            print(f"==> {file} <==")
        if file.exists():
            sys.stdout.write(file.read_text(encoding="utf-8", errors="replace"))
    return 0


def _stop(args: argparse.Namespace) -> int:
    job = load_job(args.output)
    nodes = [f"node{node}" for node in range(job.num_nodes)]
    if all(job.told(node) is not None for node in nodes):
        print(f"it has ended: {state_of(job)}")
        return 0
    if is_lost(job):
        print(state_of(job))
        return 0
    job.tell("stop", signal=int(signal.SIGTERM))
    deadline = time.monotonic() + args.timeout
    while time.monotonic() < deadline:
        if all(job.told(node) is not None for node in nodes):
            print(state_of(job))
            return 0
        time.sleep(0.2)
    print("asked to stop after its step")
    return 0


def _switch(args: argparse.Namespace) -> int:
    job = load_job(args.output)
    state = state_of(job)
    if state != "running":
        raise ConfigError(
            f"no run goes on here: {state}", where=args.output,
            remedy=f"go on with realexec run {args.plan} -o {args.output} --resume",
        )  # fmt: skip
    plan = load_plan(args.plan)
    ranks = {"num_ranks": job.num_ranks, "ranks_per_node": job.ranks_per_node}
    switched(run_of(job), plan, **ranks)  # a sentence at once, before any rank hears of it
    name, deadline = job.ask_switch(plan), time.monotonic() + args.timeout
    while time.monotonic() < deadline:
        told = job.told("switched")
        if told is not None and told["id"] == name:
            if told["refused"]:
                raise ConfigError(f"the run refused it ({told['refused']})", where=args.plan)
            print(f"under {args.plan} from step {told['step'] + 1} on")
            return 0
        if job.asked_switch() not in ("", name):
            raise ConfigError("another plan was asked for since", where=args.output)
        state = state_of(job)
        if state != "running":
            raise ConfigError(f"too late: {state}", where=args.output)
        time.sleep(0.2)
    print("asked to go over to it before its next step")
    return 0


VERBS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "status": _status,
    "logs": _logs,
    "switch": _switch,
    "stop": _stop,
}
