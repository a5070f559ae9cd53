"""A worker's whole life in a run: set up, steps, metrics, saved models.

``run_worker`` is the one entry of every launcher: the process group exists, the run is resolved.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from executor.boards import open_boards
from executor.cross_memory import CrossMemory
from executor.dataset import Prompts
from executor.handover import go_over
from executor.inputs import model_folder, open_data, open_evaluation
from executor.launch.job import Job
from executor.metrics import REWARDS, MetricsWriter, shows_samples
from executor.resume import restore, save_run
from executor.run import Run, functions_of
from executor.run_checkpoint import Checkpoint
from executor.switch import put_away, switched
from executor.text import TextCodec
from executor.trace import TraceWriter
from executor.watchdog import IDLE, Heart
from executor.worker import Worker
from planner.graph import CallKind
from planner.plan import ExecutionPlan
from planner.program import compile_plan
from profiles.errors import UserError

# What a line about a step shows, where the algorithm reports it.
_SHOWN = ("rewards", "approx_kl", "response_tokens", "loss", "grad_norm")


def print_step(step: int, total_steps: int, values: dict[str, float]) -> None:
    """A step's line in the log: its seconds and what people look at."""
    parts = [
        f"{name} {value:.4g}" for name, value in values.items() if name.rpartition("/")[2] in _SHOWN
    ]
    say(f"step {step + 1}/{total_steps}  {values['step_s']:.1f} s  " + "  ".join(parts))


def say(text: str) -> None:
    """A line in the log."""
    Console(stderr=True, file=sys.stderr).print(text, highlight=False, soft_wrap=True, markup=False)


def checkpoint_name(step: int, steps_per_epoch: int | None) -> str:
    """The prior system's name of what is saved after ``step`` steps; all three count from 1.

    >>> checkpoint_name(12, 5)
    'epoch3epochstep2globalstep12'
    """
    epoch, place = divmod(step - 1, steps_per_epoch) if steps_per_epoch else (0, step - 1)
    return f"epoch{epoch + 1}epochstep{place + 1}globalstep{step}"


def run_worker(
    run: Run,
    *,
    rank: int,
    device: torch.device,
    store: dist.Store,
    heart: Heart,
    stop_wanted: Callable[[], bool] = lambda: False,
    job: Job | None = None,
) -> int | None:
    """All steps of a run on one rank.

    ``stop_wanted`` on any rank stops all of them after one and the same step, with a checkpoint;
    returns after how many steps, None if the run came to its end. ``job``: through which somebody
    may ask for another plan between steps (``realexec switch``).
    """
    text = TextCodec(model_folder(run))
    data = open_data(run, text)
    evaluation = open_evaluation(run, text)
    functions = functions_of(run)
    memory = CrossMemory.between_workers() if device.type == "cpu" else None
    first = Checkpoint(run.resume_from).step if run.resume_from is not None else 0
    metrics = None
    if rank == 0:
        boards = open_boards(run.output, run.config, first_step=first)
        parts = parts_of(run.plan)
        metrics = MetricsWriter(run.output, store, parts, boards=boards, first_step=first)
    with TraceWriter(run.output / "trace", rank, device) as trace:

        def worker_of(run: Run) -> Worker:
            return Worker(
                run, compile_plan(run.plan), rank=rank, device=device, functions=functions,
                data=data, text=text, store=store, trace=trace, on_instruction=heart.at,
                message_deadline=message_deadline(run), memory=memory,
            )  # fmt: skip

        steps = _Steps(run, worker_of, metrics, heart, first, evaluation, job)
        try:
            steps.worker.setup()
            if run.resume_from is not None:
                heart.at(first, 0, -1, "reading a checkpoint")
                restore(steps.worker, run.resume_from)
            return steps.go(stop_wanted)
        finally:
            # Graphs before their communicators, whose end waits for them (NCCL, commDestroySync).
            steps.worker.generation.kept.clear()
            if metrics:
                metrics.close()


def parts_of(plan: ExecutionPlan) -> dict[str, int]:
    """How many ranks tell of each call: of a function's every replica its own share."""
    return {
        call.name: plan.allocations[call.name].strategy.dp if call.kind is CallKind.FUNCTION else 1
        for call in plan.problem.graph.calls
    }


# A message fails by itself later than the watchdog speaks, which knows more of it.
_LATER = 1.25


def message_deadline(run: Run) -> timedelta:
    """After which a message or a collective fails by itself."""
    return timedelta(seconds=run.config.hang_timeout_s * _LATER + 5)


class _Steps:
    """Steps ``first`` to the last, with what is written between them.

    Rank 0 writes a step's numbers after the next step, so that it never waits for a peer.
    """

    def __init__(
        self, run: Run, worker_of: Callable[[Run], Worker], metrics: MetricsWriter | None,
        heart: Heart, first: int, evaluation: Prompts | None, job: Job | None,
    ) -> None:  # fmt: skip
        self.run = run
        self.worker_of = worker_of
        self.worker = worker_of(run)
        self.metrics = metrics
        self.heart = heart
        self.first = first
        self.has_rewards = run.plan.problem.graph.producer(REWARDS) is not None
        self.evaluation = evaluation
        self.job = job
        self.since = first  # the first step under the plan
        self.answered: set[str] = set()  # plans that were asked for, taken or refused
        self.waiting: list[tuple[int, float, int]] = []  # step, seconds, batches evaluated
        num_prompts = self.worker.data.num_prompts
        self.steps_per_epoch = max(1, num_prompts // run.config.batch_size) if num_prompts else None

    def go(self, stop_wanted: Callable[[], bool]) -> int | None:
        total = self.run.config.total_steps
        for step in range(self.first, total):
            word = self._word(step, stop=stop_wanted())
            if word == "stop":
                if step > self.first and not _is_due(self.run.config.checkpoint_every, step):
                    self._checkpoint(step)
                self._write_metrics(step)
                return step
            if word != "go":
                self._switch(step, word)
            start_s = time.time()
            self.worker.run_step(step, last=step + 1 == total)
            seconds = time.time() - start_s
            self.waiting.append((step, seconds, self._evaluate(step)))
            self._write_metrics(step)
            self._save(step + 1)
        self._write_metrics(total)
        return None

    def _word(self, step: int, *, stop: bool) -> str:
        """What all do before ``step``: stop, go, or a plan's name. Who comes first says it."""
        asked = self.job.asked_switch() if self.job is not None else ""
        own = asked if asked and asked not in self.answered else "go"
        if stop:
            own = "stop"
        key, store = f"begin/{step}", self.worker.store
        if not self.worker.program.step.get(self.worker.rank):
            # Nothing would hold it back: it would say for all steps to come that they go on.
            self.heart.at(step, 0, -1, IDLE)
            store.wait([key], timedelta(days=1))  # a step may last longer than any default
        return str(store.compare_set(key, "", own).decode())

    # ---- another plan -------------------------------------------------------------------------

    def _switch(self, step: int, name: str) -> None:
        """All ranks go over to the plan of that name before ``step``, unless it is refused."""
        assert self.job is not None
        self.answered.add(name)
        self._write_metrics(step)  # of the steps so far as many ranks told as this plan has
        self.heart.at(step, 0, -1, "going over to another plan")
        rank, store = self.worker.rank, self.worker.store
        if rank == 0:
            try:
                self._run_under(name)
                refusal = ""
            except UserError as error:
                refusal = str(error)
                self.job.tell("switched", id=name, refused=refusal)
                say(f"goes on under its plan: {refusal}")
            store.set(f"switch/{name}", json.dumps(refusal))
        store.wait([f"switch/{name}"], timedelta(days=1))  # rank 0 may be a step behind
        if json.loads(store.get(f"switch/{name}")):
            return
        run = self._run_under(name)
        self._put_away(step, run.plan)
        start_s, old = time.time(), self.worker
        self.worker = self.worker_of(run)
        received = go_over(old, self.worker, step)
        self.run, self.since = run, step
        if rank == 0:
            assert self.metrics is not None
            self.metrics.parts = parts_of(run.plan)
            seconds = time.time() - start_s
            self.job.tell("switched", id=name, refused="", step=step)
            say(
                f"step {step + 1} and later under another plan; gone over in {seconds:.1f} s, "
                f"{received / 1e6:.1f} MB came to rank 0"
            )

    def _run_under(self, name: str) -> Run:
        assert self.job is not None
        return switched(
            self.run, self.job.plan_asked(name), num_ranks=self.job.num_ranks,
            ranks_per_node=self.job.ranks_per_node,
        )  # fmt: skip

    def _put_away(self, step: int, plan: ExecutionPlan) -> None:
        """The trace so far is the old plan's; what comes is the new one's."""
        self.worker.trace.close()
        dist.barrier()
        if self.worker.rank == 0:
            put_away(self.run.output, step, plan, any_steps=step > self.since)
        dist.barrier()
        self.worker.trace.open()

    def _evaluate(self, step: int) -> int:
        """Evaluate where that is due after ``step``; on how many batches."""
        config, data = self.run.config, self.evaluation
        if data is None or not _is_due(config.eval_every, step + 1):
            return 0
        batches = data.num_prompts // config.batch_size
        for index in range(batches):
            self.worker.evaluate(step, data, index)
        return batches

    def _save(self, done: int) -> None:
        """What is due after ``done`` steps."""
        config = self.run.config
        if done == config.total_steps or _is_due(config.save_every, done):
            self.heart.at(done, 0, -1, "writing models")
            self.worker.save(Path(checkpoint_name(done, self.steps_per_epoch)))
        if _is_due(config.checkpoint_every, done):
            self._checkpoint(done)

    def _checkpoint(self, done: int) -> None:
        self._write_metrics(done)  # a run that goes on from here repeats no line
        self.heart.at(done, 0, -1, "writing a checkpoint")
        save_run(self.worker, done, keep=self.run.config.keep_checkpoints)

    def _write_metrics(self, until: int) -> None:
        while self.metrics and self.waiting and self.waiting[0][0] < until:
            step, seconds, batches = self.waiting.pop(0)
            self.heart.at(until, 0, -1, f"writing the numbers of step {step + 1}")
            samples = self.has_rewards and shows_samples(self.run.config, step)
            values = self.metrics.collect(step, seconds, eval_batches=batches, samples=samples)
            print_step(step, self.run.config.total_steps, values)


def _is_due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0
