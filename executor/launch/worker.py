"""The one main of a worker, whatever started it: ``python -m executor.launch.worker FOLDER``.

``FOLDER`` is the run's output with ``launch/job.json``; the rank comes from ``RANK`` and
``LOCAL_RANK``. A worker that fails leaves its reason in ``<output>/errors/`` and in its log.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from executor.allocator import keep_freed_memory
from executor.launch.job import Job, load_job, run_of
from executor.launch.network import choose_interface, meet
from executor.run import Run
from executor.session import message_deadline, run_worker
from executor.trace import write_json
from executor.watchdog import Heart
from profiles.errors import UserError

NO_ROOM = 74  # EX_IOERR of sysexits.h: a full disk leaves no room for a reason in words
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with_parent(parent: int) -> None:
    """The kernel kills this process when ``parent`` ends, also if it already has."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:
        os._exit(1)


class StopRequest:
    """Set by SIGTERM; looked at between steps."""

    def __init__(self) -> None:
        self.wanted = False
        signal.signal(signal.SIGTERM, self._set)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True

    def __call__(self) -> bool:
        return self.wanted


def main(folder: str) -> int:
    die_with_parent(int(os.environ["REALEXEC_PARENT"]))
    stop_wanted = StopRequest()
    job, rank = load_job(folder), int(os.environ["RANK"])
    interval_s = min(5.0, job.hang_timeout_s / 5)
    with Heart(job.heartbeat_of(rank), rank, interval_s=interval_s) as heart:
        try:
            _work(job, rank, heart, stop_wanted)
        except Exception as error:
            code = _leave_reason(Path(job.output), rank, error)
            traceback.print_exc()  # into the log; what is shown is the reason
            if not isinstance(error, UserError):
                # The cause may be a killed peer: its end must be seen first.
                time.sleep(1.0)
            os._exit(code)  # peers may hang in a collective: do not wait for them in destructors
    return 0


def _work(job: Job, rank: int, heart: Heart, stop_wanted: StopRequest) -> None:
    run = run_of(job)
    interface, address = choose_interface(job.bind)
    os.environ.update(GLOO_SOCKET_IFNAME=interface, NCCL_SOCKET_IFNAME=f"={interface}")
    torch.set_num_threads(job.num_threads)
    device = device_of(run)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    store = meet(job, rank, address)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("world", store),
        rank=rank,
        world_size=job.num_ranks,
        timeout=message_deadline(run),
    )
    # NCCL makes the world's communicator at its first collective, not at a send; the barrier of a
    # world that has gloo too is gloo's.
    dist.all_reduce(torch.zeros(1, device=device))
    stopped_after = run_worker(
        run, rank=rank, device=device, store=dist.PrefixStore("run", store), heart=heart,
        stop_wanted=stop_wanted, job=job,
    )  # fmt: skip
    if stopped_after is not None and rank == 0:
        job.tell("stopped", step=stopped_after)
    dist.barrier()
    dist.destroy_process_group()


def device_of(run: Run) -> torch.device:
    if run.plan.problem.cluster.kind == "cuda":
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device("cpu")


def _leave_reason(output: Path, rank: int, error: Exception) -> int:
    """Write the reason of a worker's end; its exit code."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NO_ROOM
    try:
        record_error(output, rank, error)
    except OSError:
        return NO_ROOM
    return 1


def record_error(output: Path, rank: int, error: Exception) -> None:
    """Leave the reason of a worker's end for whoever started it."""
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
