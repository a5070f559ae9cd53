"""One node's part of a run: starts the node's ranks, watches them, ends them.

``run_node`` is what every launcher runs on every node: in this process (local), in a Ray actor,
in a task of a SLURM job. Agents and workers speak through the files of ``job.py``. Whatever ends
an agent ends its ranks: they are killed on every way out of ``run_node``, and by the kernel if the
agent itself is killed (``worker.die_with_parent``).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from executor.launch.job import Job, run_of
from executor.watchdog import Watch
from planner.program import compile_plan

POLL_S = 0.1
# Between looks at files that other nodes write: few on a shared file system, where many look.
SHARED_POLL_S = 1.0
# Between the first end of a rank that failed and the kill of the others: enough for those that
# failed of themselves to leave their reason.
GRACE_S = 1.5
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)  # submitit announces by the last


class Interrupted(KeyboardInterrupt):
    """The run was ended from outside by ``signal_number``; ``step``: it stopped after so many.

    ``step`` is None where it was cut off within one.
    """

    def __init__(self, signal_number: int, *, step: int | None = None) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number
        self.step = step


def worker_command(job: Job) -> list[str]:
    return [sys.executable, "-m", "executor.launch.worker", job.output]


def worker_environment(job: Job, rank: int) -> dict[str, str]:
    """What a worker's environment has beyond the agent's."""
    first = job.ranks_of(rank // job.ranks_per_node).start
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank - first),
        "WORLD_SIZE": str(job.num_ranks),
        "PYTHONPATH": os.pathsep.join(job.python_path),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


class Ranks:
    """The worker processes of one node."""

    def __init__(self, job: Job, ranks: Sequence[int]) -> None:
        self.job = job
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.codes: dict[int, int] = {}  # of those that have ended, in the order of their ends
        job.logs.mkdir(parents=True, exist_ok=True)
        for rank in ranks:
            self.processes[rank] = self._start(rank)

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        own = {**worker_environment(self.job, rank), "REALEXEC_PARENT": str(os.getpid())}
        with self.job.log_of(rank).open("ab") as log:
            # A session of its own: Ctrl-C at a terminal reaches the agent only.
            return subprocess.Popen(
                worker_command(self.job), env={**os.environ, **own}, cwd=self.job.folder,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    @property
    def running(self) -> list[int]:
        return [rank for rank in self.processes if rank not in self.codes]

    def poll(self) -> int | None:
        """Note who has ended; the first rank that failed, if one has."""
        ended = {rank: self.processes[rank].poll() for rank in self.running}
        # A killed rank makes others fail: of those that ended since the last look it is the cause.
        for rank, code in sorted(ended.items(), key=lambda item: item[1] or 0):
            if code is not None:
                self.codes[rank] = code
        return next((rank for rank, code in self.codes.items() if code != 0), None)

    def signal(self, number: int) -> None:
        for rank in self.running:
            self.processes[rank].send_signal(number)

    def kill(self) -> None:
        """End all that is left, with whatever they started."""
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes.values():
            process.wait()


@contextmanager
def stops_by_signal(job: Job, *, insist: bool = True) -> Iterator[Sequence[int]]:
    """A signal asks the run to stop after its step; the numbers of those that came so far.

    ``insist``: a second one raises ``Interrupted`` wherever this process is, as people mean it and
    schedulers do not, who tell every process more than once. An agent looks at the numbers instead
    (``run_node``): an exception that comes between any two instructions may leave a lock of
    ``subprocess`` taken, and with it ``Ranks.kill`` waiting for ever, or a rank that was just
    started unknown.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            job.tell("stop", signal=number)
        elif insist:
            raise Interrupted(number)

    old = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def run_node(job: Job, node: int, *, signals: Sequence[int] = ()) -> None:
    """Run this node's ranks to their end; leave word of how they ended.

    Returns when all of them have ended, a rank of any node has failed, or the run has stopped.
    Node 0 watches for hangs of all nodes. ``signals``: of ``stops_by_signal``.

    Raises:
        Interrupted: there were two.
    """
    watch = None
    if node == 0:
        run = run_of(job)
        files = {rank: job.heartbeat_of(rank) for rank in range(job.num_ranks)}
        watch = Watch(files, run.plan, compile_plan(run.plan), timeout_s=job.hang_timeout_s)
    ranks = Ranks(job, job.ranks_of(node))
    try:
        _oversee(job, node, ranks, watch, signals)
    finally:
        ranks.kill()
        job.tell(f"node{node}", codes=ranks.codes)


def _oversee(
    job: Job, node: int, ranks: Ranks, watch: Watch | None, signals: Sequence[int]
) -> None:  # fmt: skip
    asked, looked_s, plan_name = False, 0.0, ""
    look_every_s = POLL_S if job.num_nodes == 1 else SHARED_POLL_S
    while ranks.running:
        time.sleep(POLL_S)
        if len(signals) > 1:
            raise Interrupted(signals[-1])
        failed = ranks.poll()
        if failed is not None:
            job.tell_first("failed", node=node, rank=failed, code=ranks.codes[failed])
        elif time.monotonic() - looked_s < look_every_s:
            continue
        looked_s = time.monotonic()
        if job.told("failed") is not None:
            _let_fail(ranks)
            return
        if not asked and job.told("stop") is not None:
            ranks.signal(signal.SIGTERM)
            asked = True
        if watch is not None:
            plan_name = _follow(job, watch, plan_name)
            hang = watch.look(_alive(job, node, ranks))
            if hang is not None:
                job.tell_first("failed", node=node, rank=hang.position.rank, hang=hang.sentence())
                return


def _follow(job: Job, watch: Watch, known: str) -> str:
    """The watch's plan is the one that the run has gone over to; its name."""
    told = job.told("switched")
    if told is None or told["id"] == known:
        return known
    plan = run_of(job).plan
    watch.follow(plan, compile_plan(plan))
    return str(told["id"])


def _let_fail(ranks: Ranks) -> None:
    deadline = time.monotonic() + GRACE_S
    while ranks.running and time.monotonic() < deadline:
        time.sleep(POLL_S)
        ranks.poll()


def _alive(job: Job, node: int, ranks: Ranks) -> list[int]:
    """Ranks of all nodes that may still be running."""
    others = [n for n in range(job.num_nodes) if n != node and job.told(f"node{n}") is None]
    return [*ranks.running, *(rank for n in others for rank in job.ranks_of(n))]
