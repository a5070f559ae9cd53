"""A run from its first start to its end, under any launcher: restarts, outcome, what is shown.

``launch`` is the entry. A launcher (``local``, ``ray``, ``slurm``) only sees to it that
``agent.run_node`` runs on every node, and returns when all have ended.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from executor.launch.agent import Interrupted
from executor.launch.display import showing
from executor.launch.job import Job, load_job, plan_job
from executor.launch.worker import NO_ROOM
from executor.resume import checkpoint_root
from executor.run import Run, equal_nodes
from executor.run_checkpoint import latest
from executor.switch import with_newest_plan
from executor.watchdog import SILENCE_S, read_position
from profiles.errors import CheckpointError, ConfigError, UserError

log = logging.getLogger(__name__)

Launcher = Callable[[Job, Run, Mapping[str, str]], None]


class WorkerError(RuntimeError):
    """A worker failed by a mistake of ours, or was killed, in ``step``; the message is why."""

    def __init__(self, message: str, *, step: int = -1) -> None:
        super().__init__(message)
        self.step = step

    @property
    def reason(self) -> str:
        return str(self).strip().splitlines()[-1]


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
        UserError: a worker refused its input, or another run goes on in the output folder.
        WorkerError: a worker failed otherwise, once more than ``max_restarts`` times, or twice
            alike in one step with no newer checkpoint in between.
        Interrupted: the run was stopped from outside; what it had written stays.
    """
    with holding(run.output):
        before = None
        for restarts_left in range(max_restarts, -1, -1):
            try:
                return _launch_once(run, launcher, name, options or {})
            except WorkerError as error:
                newest = latest(checkpoint_root(run))
                failure = (error.reason, error.step, newest)
                if restarts_left and failure == before:
                    log.warning("the same failure in the same step again: not restarted")
                if not restarts_left or failure == before:
                    raise
                log.warning(
                    "%s; restarting from %s, %d restarts left",
                    error.reason, newest or "the beginning", restarts_left - 1,
                )  # fmt: skip
                before = failure
                run = replace(with_newest_plan(run), resume_from=newest)


def _launch_once(run: Run, launcher: Launcher, name: str, options: Mapping[str, str]) -> None:
    job = plan_job(run, launcher=name, ranks_per_node=ranks_per_node(run, name), options=options)
    try:
        prepare_output(run.output, goes_on=run.resume_from is not None)
        job.save(run.plan)
    except OSError as error:
        raise _unwritable(run.output, error) from None
    with showing(job, run.config.total_steps):
        launcher(job, run, options)
    check_outcome(job)


def _unwritable(output: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot be written ({error.strerror})", where=f"output {output}",
        remedy="name a folder with -o",
    )  # fmt: skip


# ---- one run a folder -------------------------------------------------------------------------

# A run is lost whose ranks are all silent for longer than one may be: who ran them was killed.
LOST_S = 2 * SILENCE_S
# What a file system says that has no locks, as some shared ones.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@contextmanager
def holding(output: Path) -> Iterator[None]:
    """No other run starts in ``output`` meanwhile; the kernel ends this with the process.

    Raises:
        ConfigError: one goes on there, or the folder cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = (output / ".lock").open("w")
    except OSError as error:
        raise _unwritable(output, error) from None
    with file:
        locked = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _goes_on(output) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise _unwritable(output, error) from None
            locked = False
        if _works_by_itself(output, locked=locked):
            raise _goes_on(output)
        yield


def _works_by_itself(output: Path, *, locked: bool) -> bool:
    """Ranks of an earlier start are at work: SLURM's outlive who has submitted them."""
    try:
        job = load_job(output)
    except ConfigError:
        return False
    if locked and job.launcher != "slurm":
        return False
    nodes = [f"node{node}" for node in range(job.num_nodes)]
    ended = job.told("failed") is not None or all(job.told(node) is not None for node in nodes)
    quiet_s = job.quiet_s()
    return not ended and quiet_s is not None and quiet_s <= LOST_S


def _goes_on(output: Path) -> ConfigError:
    return ConfigError(
        "a run goes on here", where=f"output {output}",
        remedy=f"end it with realexec stop {output}, or name another folder with -o",
    )  # fmt: skip


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
    rank, position = failed["rank"], read_position(job.heartbeat_of(failed["rank"]))
    step = -1 if position is None else position.step
    if "hang" in failed:
        return WorkerError(failed["hang"], step=step)
    code = failed["code"]
    if code == NO_ROOM:
        return CheckpointError(
            "no room is left on its file system", where=job.output,
            remedy="make room and go on with --resume",
        )  # fmt: skip
    if code < 0:
        at = f" in {position.describe()}" if position is not None else ""
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return WorkerError(f"rank {rank} was ended by {name}{hint}{at}", step=step)
    own = [record for record in records if record["rank"] == rank]
    if not own:
        return WorkerError(
            f"rank {rank} ended with code {code} without a word; its log is {job.log_of(rank)}",
            step=step,
        )
    return WorkerError(f"rank {rank} failed:\n{own[0]['traceback']}", step=step)


def read_errors(output: Path) -> list[dict[str, Any]]:
    """What workers left of their ends, the earliest first."""
    files = (output / "errors").glob("rank*.json")
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return sorted(found, key=lambda record: float(record["time"]))
