"""Workers on this machine under torch elastic: one process a device, CPU over gloo or CUDA.

``launch`` starts them and returns when the run is done. A worker that fails leaves its reason in
``<output>/errors/``; the first of them is raised here, a user's mistake as a ``UserError``, one
of ours with its traceback.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import time
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from executor.resume import checkpoint_root
from executor.run import Run
from executor.run_checkpoint import latest
from executor.session import run_worker
from executor.trace import write_json
from planner.plan import ExecutionPlan
from planner.plan_schema import save_plan
from profiles.errors import UserError

log = logging.getLogger(__name__)


class WorkerError(RuntimeError):
    """A worker failed by a mistake of ours; the message is its traceback."""


class Interrupted(KeyboardInterrupt):
    """The run was ended from outside, by ``signal_number``."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


def launch(run: Run, *, max_restarts: int = 0) -> None:
    """Run to the end; after a worker's failure go on from the last checkpoint.

    Raises:
        UserError: a worker refused its input.
        WorkerError: a worker failed otherwise, once more than ``max_restarts`` times.
        Interrupted: a signal ended the run; what it had written stays.
    """
    for restarts_left in range(max_restarts, -1, -1):
        try:
            return _launch_once(run)
        except WorkerError as error:
            if restarts_left == 0:
                raise
            newest = latest(checkpoint_root(run))
            log.warning(
                "%s; restarting from %s, %d restarts left",
                str(error).strip().splitlines()[-1], newest or "the beginning", restarts_left - 1,
            )  # fmt: skip
            run = replace(run, resume_from=newest)


def _launch_once(run: Run) -> None:
    output = run.output
    prepare_output(output, keep_curves=run.resume_from is not None)
    save_plan(run.plan, output / "plan.json")
    workers = run.plan.num_devices
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        run_id=f"realexec-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        rdzv_configs={"is_host": True},
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
        local_addr="127.0.0.1",
        logs_specs=DefaultLogsSpecs(log_dir=str(output / "logs")),
    )
    # Elastic logs its own traceback of a worker's death; the launcher tells the worker's reason.
    for name in (
        "torch.distributed.elastic", "torch.distributed.elastic.agent.server.api",
        "torch.multiprocessing",
    ):  # fmt: skip
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        elastic_launch(config, _worker_process)(run, torch.get_num_threads())
    except ChildFailedError as error:
        raise _first_error(output, error) from None
    except SignalException as error:
        raise Interrupted(int(error.sigval)) from None


def prepare_output(output: Path, *, keep_curves: bool = False) -> None:
    """An output folder without what an earlier run left of its own progress.

    ``keep_curves``: the run goes on from a checkpoint, and so do its curves.
    """
    output.mkdir(parents=True, exist_ok=True)
    for name in ("errors", "trace", "logs", *(() if keep_curves else ("tensorboard",))):
        shutil.rmtree(output / name, ignore_errors=True)
    (output / "errors").mkdir()


def _worker_process(run: Run, num_threads: int) -> None:
    """Entry of one worker; its place comes from the environment that elastic sets."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # An interrupt from the terminal reaches the workers as well: only the parent speaks of it.
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    try:
        torch.set_num_threads(max(1, num_threads // world_size))
        device = device_of(run.plan, rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store, _, _ = next(dist.rendezvous("env://"))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("world", store),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=30),
        )
        dist.barrier()  # NCCL makes the world's communicator at its first collective, not at a send
        run_worker(run, rank=rank, device=device, store=dist.PrefixStore("run", store))
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:
        record_error(run.output, rank, error)
        if not isinstance(error, UserError):
            # The cause may be a killed peer: the launcher must see that one's end first.
            time.sleep(1.0)
        os._exit(1)  # peers may hang in a collective: do not wait for them in destructors


def device_of(plan: ExecutionPlan, rank: int) -> torch.device:
    if plan.problem.cluster.device.kind == "cuda":
        return torch.device("cuda", rank % plan.problem.cluster.devices_per_node)
    return torch.device("cpu")


def record_error(output: Path, rank: int, error: Exception) -> None:
    """Leave the reason of a worker's end for the launcher."""
    user = isinstance(error, UserError)
    write_json(
        output / "errors" / f"rank{rank}.json",
        {
            "time": time.time(),
            "rank": rank,
            "user": user,
            "where": error.where if isinstance(error, UserError) else "",
            "problem": error.problem if isinstance(error, UserError) else repr(error),
            "remedy": error.remedy if isinstance(error, UserError) else "",
            "traceback": traceback.format_exc(),
        },
    )


def _first_error(output: Path, error: ChildFailedError) -> Exception:
    """The cause: a killed worker, else the earliest recorded failure.

    Peers of a dead worker fail too, with lost connections, but later.
    """
    killed = {r: failure for r, failure in error.failures.items() if failure.exitcode < 0}
    records = [json.loads(file.read_text()) for file in (output / "errors").glob("rank*.json")]
    first = min(records, key=lambda record: (not record["user"], record["time"]), default=None)
    if first is not None and first["user"]:
        return UserError(first["problem"], where=first["where"], remedy=first["remedy"])
    for rank, failure in killed.items():
        if failure.exitcode != -signal.SIGTERM:  # that is how elastic ends the others
            name = signal.Signals(-failure.exitcode).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return WorkerError(f"rank {rank} was ended by {name}{hint}")
    if first is None:
        return WorkerError(f"a worker ended without a word; logs in {output / 'logs'}")
    return WorkerError(f"rank {first['rank']} failed:\n{first['traceback']}")
