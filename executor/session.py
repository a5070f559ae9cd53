"""A worker's whole life in a run: set up, steps, metrics, saved models.

``run_worker`` is the one entry of every launcher: the process group exists, the run is resolved.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from executor.boards import open_boards
from executor.dataset import Prompts
from executor.inputs import model_folder, open_data, open_evaluation
from executor.metrics import REWARDS, MetricsWriter, shows_samples
from executor.resume import restore, save_run
from executor.run import Run, functions_of
from executor.run_checkpoint import Checkpoint
from executor.text import TextCodec
from executor.trace import TraceWriter
from executor.worker import Worker
from planner.graph import CallKind
from planner.program import compile_plan

# What a line about a step shows, where the algorithm reports it.
_SHOWN = ("rewards", "approx_kl", "response_tokens", "loss", "grad_norm")


class StepDisplay:
    """Rank 0's progress: a live bar with the instruction under way, a line for every step."""

    def __init__(self, total_steps: int, *, first: int) -> None:
        self.console = Console(stderr=True, file=sys.stderr)
        self.progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.total_steps = total_steps
        self.task = self.progress.add_task("loading", total=total_steps, completed=first)
        self.progress.start()

    def instruction(self, label: str) -> None:
        self.progress.update(self.task, description=label)

    def step_done(self) -> None:
        self.progress.advance(self.task)

    def line(self, step: int, values: dict[str, float]) -> None:
        parts = [
            f"{name} {value:.4g}"
            for name, value in values.items()
            if name.rpartition("/")[2] in _SHOWN
        ]
        self.console.print(
            f"step {step + 1}/{self.total_steps}  {values['step_s']:.1f} s  " + "  ".join(parts),
            highlight=False,
            soft_wrap=True,
        )

    def close(self) -> None:
        self.progress.stop()


def checkpoint_name(step: int, steps_per_epoch: int | None) -> str:
    """The prior system's name of what is saved after ``step`` steps; all three count from 1.

    >>> checkpoint_name(12, 5)
    'epoch3epochstep2globalstep12'
    """
    epoch, place = divmod(step - 1, steps_per_epoch) if steps_per_epoch else (0, step - 1)
    return f"epoch{epoch + 1}epochstep{place + 1}globalstep{step}"


def run_worker(run: Run, *, rank: int, device: torch.device, store: dist.Store) -> None:
    """All steps of a run on one rank."""
    text = TextCodec(model_folder(run))
    data = open_data(run, text)
    evaluation = open_evaluation(run, text)
    graph = run.plan.problem.graph
    first = Checkpoint(run.resume_from).step if run.resume_from is not None else 0
    display = StepDisplay(run.config.total_steps, first=first) if rank == 0 else None
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
    with TraceWriter(run.output / "trace", rank) as trace:
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
            on_instruction=display.instruction if display else lambda label: None,
        )
        try:
            worker.setup()
            if run.resume_from is not None:
                restore(worker, run.resume_from)
            _steps(run, worker, metrics, display, first=first, evaluation=evaluation)
        finally:
            if display:
                display.close()
            if metrics:
                metrics.close()


def _steps(
    run: Run,
    worker: Worker,
    metrics: MetricsWriter | None,
    display: StepDisplay | None,
    *,
    first: int,
    evaluation: Prompts | None,
) -> None:
    """Steps ``first`` to the last.

    Rank 0 writes a step's numbers after the next step, so that it never waits for a peer.
    """
    config, has_rewards = run.config, run.plan.problem.graph.producer(REWARDS) is not None
    total, waiting = config.total_steps, list[tuple[int, float, int]]()
    eval_batches = evaluation.num_prompts // config.batch_size if evaluation else 0
    num_prompts = worker.data.num_prompts
    steps_per_epoch = max(1, num_prompts // config.batch_size) if num_prompts else None

    def write(until: int) -> None:
        while metrics and display and waiting and waiting[0][0] < until:
            step, seconds, batches = waiting.pop(0)
            samples = has_rewards and shows_samples(config, step)
            display.line(
                step, metrics.collect(step, seconds, eval_batches=batches, samples=samples)
            )

    for step in range(first, total):
        start_s = time.time()
        worker.run_step(step)
        seconds = time.time() - start_s
        if display:
            display.step_done()
        batches = eval_batches if eval_batches and (step + 1) % config.eval_every == 0 else 0
        for index in range(batches):
            assert evaluation is not None
            worker.evaluate(step, evaluation, index)
        waiting.append((step, seconds, batches))
        write(step)
        every = config.save_every
        if step + 1 == total or (every and (step + 1) % every == 0):
            if display:
                display.instruction("saving")
            worker.save(Path(checkpoint_name(step + 1, steps_per_epoch)))
        every = config.checkpoint_every
        if every and (step + 1) % every == 0:
            if display:
                display.instruction("writing a checkpoint")
            write(step + 1)  # a run that goes on from here repeats no line
            save_run(worker, step + 1, keep=config.keep_checkpoints)
    write(total)
