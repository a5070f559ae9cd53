"""A worker's whole life in a run: set up, steps, metrics, saved models.

``run_worker`` is the one entry of every launcher: the process group exists, the run is resolved.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from executor.boards import open_boards
from executor.dataset import Prompts
from executor.inputs import model_folder, open_data, open_evaluation
from executor.metrics import REWARDS, MetricsWriter, shows_samples
from executor.resume import restore, save_run
from executor.run import Run, functions_of
from executor.run_checkpoint import Checkpoint
from executor.text import TextCodec
from executor.trace import TraceWriter
from executor.watchdog import Heart
from executor.worker import Worker
from planner.graph import CallKind
from planner.program import compile_plan

# What a line about a step shows, where the algorithm reports it.
_SHOWN = ("rewards", "approx_kl", "response_tokens", "loss", "grad_norm")


def print_step(step: int, total_steps: int, values: dict[str, float]) -> None:
    """A step's line in the log: its seconds and what people look at."""
    parts = [
        f"{name} {value:.4g}" for name, value in values.items() if name.rpartition("/")[2] in _SHOWN
    ]
    Console(stderr=True, file=sys.stderr).print(
        f"step {step + 1}/{total_steps}  {values['step_s']:.1f} s  " + "  ".join(parts),
        highlight=False,
        soft_wrap=True,
    )


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
) -> int | None:
    """All steps of a run on one rank.

    ``stop_wanted`` on any rank stops all of them after one and the same step, with a checkpoint;
    returns after how many steps, None if the run came to its end.
    """
    text = TextCodec(model_folder(run))
    data = open_data(run, text)
    evaluation = open_evaluation(run, text)
    graph = run.plan.problem.graph
    first = Checkpoint(run.resume_from).step if run.resume_from is not None else 0
    parts = {
        call.name: run.plan.allocations[call.name].strategy.dp
        if call.kind is CallKind.FUNCTION
        else 1
        for call in graph.calls
    }
    metrics = None
    if rank == 0:
        boards = open_boards(run.output, run.config, first_step=first)
        metrics = MetricsWriter(run.output, store, parts, boards=boards, first_step=first)
    with TraceWriter(run.output / "trace", rank, device) as trace:
        worker = Worker(
            run,
            compile_plan(run.plan),
            rank=rank,
            device=device,
            functions=functions_of(run),
            data=data,
            text=text,
            store=store,
            trace=trace,
            on_instruction=heart.at,
            message_deadline=message_deadline(run),
        )
        try:
            worker.setup()
            if run.resume_from is not None:
                heart.at(first, 0, -1, "reading a checkpoint")
                restore(worker, run.resume_from)
            return _Steps(run, worker, metrics, heart, first, evaluation).go(stop_wanted)
        finally:
            if metrics:
                metrics.close()


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
        self, run: Run, worker: Worker, metrics: MetricsWriter | None, heart: Heart, first: int,
        evaluation: Prompts | None,
    ) -> None:  # fmt: skip
        self.run = run
        self.worker = worker
        self.metrics = metrics
        self.heart = heart
        self.first = first
        self.has_rewards = run.plan.problem.graph.producer(REWARDS) is not None
        self.evaluation = evaluation
        self.waiting: list[tuple[int, float, int]] = []  # step, seconds, batches evaluated
        num_prompts = worker.data.num_prompts
        self.steps_per_epoch = max(1, num_prompts // run.config.batch_size) if num_prompts else None

    def go(self, stop_wanted: Callable[[], bool]) -> int | None:
        total = self.run.config.total_steps
        for step in range(self.first, total):
            if self._all_stop(step, stop_wanted()):
                if step > self.first and not _is_due(self.run.config.checkpoint_every, step):
                    self._checkpoint(step)
                self._write_metrics(step)
                return step
            start_s = time.time()
            self.worker.run_step(step, last=step + 1 == total)
            seconds = time.time() - start_s
            self.waiting.append((step, seconds, self._evaluate(step)))
            self._write_metrics(step)
            self._save(step + 1)
        self._write_metrics(total)
        return None

    def _all_stop(self, step: int, wanted: bool) -> bool:
        """Whoever comes to a step first decides for all whether it is begun."""
        word = self.worker.store.compare_set(f"begin/{step}", "", "stop" if wanted else "go")
        return bool(word == b"stop")

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
