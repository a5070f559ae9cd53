"""A run from its first start to its end, under any launcher: restarts, outcome, what is shown.

``launch`` is the entry. A launcher (``local``, ``ray``, ``slurm``) only sees to it that
``agent.run_node`` runs on every node, and returns when all have ended.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from executor.launch.agent import Interrupted
from executor.launch.display import showing
from executor.launch.job import Job, plan_job
from executor.launch.worker import NO_ROOM
from executor.resume import checkpoint_root
from executor.run import Run, equal_nodes
from executor.run_checkpoint import latest
from executor.switch import with_newest_plan
from executor.watchdog import read_position
from profiles.errors import CheckpointError, ConfigError, UserError

log = logging.getLogger(__name__)

Launcher = Callable[[Job, Run, Mapping[str, str]], None]


class WorkerError(RuntimeError):
    """A worker failed by a mistake of ours, or was killed; the message is why."""


def launch(
    run: Run,
    launcher: Launcher,
    *,
    name: str = "local",
    options: Mapping[str, str] | None = None,
    max_restarts: int = 0,
) -> None:
    """Run to the end; after a worker's failure or hang go on from the last checkpoint.

    Raises:
        UserError: a worker refused its input.
        WorkerError: a worker failed otherwise, once more than ``max_restarts`` times.
        Interrupted: the run was stopped from outside; what it had written stays.
    """
    for restarts_left in range(max_restarts, -1, -1):
        try:
            return _launch_once(run, launcher, name, options or {})
        except WorkerError as error:
            if restarts_left == 0:
                raise
            newest = latest(checkpoint_root(run))
            log.warning(
                "%s; restarting from %s, %d restarts left",
                str(error).strip().splitlines()[-1], newest or "the beginning", restarts_left - 1,
            )  # fmt: skip
            run = replace(with_newest_plan(run), resume_from=newest)


def _launch_once(run: Run, launcher: Launcher, name: str, options: Mapping[str, str]) -> None:
    job = plan_job(run, launcher=name, ranks_per_node=ranks_per_node(run, name), options=options)
    try:
        prepare_output(run.output, goes_on=run.resume_from is not None)
        job.save(run.plan)
    except OSError as error:
        raise ConfigError(
            f"cannot be written ({error.strerror})", where=f"output {run.output}",
            remedy="name a folder with -o",
        ) from None  # fmt: skip
    with showing(job, run.config.total_steps):
        launcher(job, run, options)
    check_outcome(job)


def ranks_per_node(run: Run, launcher: str) -> int:
    """As the plan's nodes have devices; all of them where there is one machine."""
    cluster = equal_nodes(run.plan)
    return cluster.num_devices if launcher == "local" else cluster.devices_per_node


def prepare_output(output: Path, *, goes_on: bool = False) -> None:
    """An output folder without what an earlier run left of its own progress.

    ``goes_on``: the run continues from a checkpoint, and so do its curves and logs.
    """
    output.mkdir(parents=True, exist_ok=True)
    for name in ("errors", "trace", *(() if goes_on else ("tensorboard", "logs", "before"))):
        shutil.rmtree(output / name, ignore_errors=True)
    (output / "errors").mkdir()


# ---- how it ended -----------------------------------------------------------------------------


def check_outcome(job: Job) -> None:
    """Raise what ended the run, unless it ran to its end; see ``launch``."""
    stopped, stop = job.told("stopped"), job.told("stop")
    if stopped is not None and stop is not None:
        raise Interrupted(stop["signal"], step=stopped["step"])
    error = first_error(job)
    # Told to stop before it could listen: workers that are still loading end by the signal.
    if stop is not None and (error is None or isinstance(error, WorkerError)):
        failed = job.told("failed")
        if failed is None or failed.get("code") == -signal.SIGTERM:
            raise Interrupted(stop["signal"])
    if error is not None:
        raise error


def first_error(job: Job) -> Exception | None:
    """The cause: a user's mistake, else the first rank that failed or hung, on any node.

    Peers of a dead worker fail too, with lost connections, but later.
    """
    records = read_errors(Path(job.output))
    user = next((record for record in records if record["user"]), None)
    if user is not None:
        return UserError(user["problem"], where=user["where"], remedy=user["remedy"])
    failed = job.told("failed")
    if failed is not None:
        return _failure(job, failed, records)
    codes = {node: job.told(f"node{node}") for node in range(job.num_nodes)}
    silent = [node for node, told in codes.items() if told is None]
    if silent:
        return WorkerError(f"node {silent[0]} ended without a word; logs in {job.logs}")
    return None


def _failure(job: Job, failed: Mapping[str, Any], records: list[dict[str, Any]]) -> Exception:
    if "hang" in failed:
        return WorkerError(failed["hang"])
    rank, code = failed["rank"], failed["code"]
    if code == NO_ROOM:
        return CheckpointError(
            "no room is left on its file system", where=job.output,
            remedy="make room and go on with --resume",
        )  # fmt: skip
    if code < 0:
        position = read_position(job.heartbeat_of(rank))
        at = f" in {position.describe()}" if position is not None else ""
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return WorkerError(f"rank {rank} was ended by {name}{hint}{at}")
    own = [record for record in records if record["rank"] == rank]
    if not own:
        return WorkerError(
            f"rank {rank} ended with code {code} without a word; its log is {job.log_of(rank)}"
        )
    return WorkerError(f"rank {rank} failed:\n{own[0]['traceback']}")


def read_errors(output: Path) -> list[dict[str, Any]]:
    """What workers left of their ends, the earliest first."""
    files = (output / "errors").glob("rank*.json")
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return sorted(found, key=lambda record: float(record["time"]))
