"""One worker of a profile: the components in their order, in lockstep with its peers.

Read ``run_worker`` first. Every worker runs the same program on the same decisions, because all
that these rest on is agreed between them (``profile_measure.Lockstep``); rank 0 tells the parent
what was found. Files and the progress bar are the parent's, ``profiler.py``.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from executor.allocator import keep_freed_memory
from executor.cross_memory import CrossMemory
from executor.profile_device import (
    COLLECTIVE_BYTES,
    COLLECTIVES,
    PAIRWISE,
    build_groups,
    collective_action,
    group_sizes,
    measure_device,
)
from executor.profile_graph import capture
from executor.profile_grid import Allowance, Grid, HeldOut, Point, Target, explore
from executor.profile_layers import LayerBench
from executor.profile_measure import Lockstep, Measurement, Probe
from executor.profile_rows import collective_row, layer_rows, optimizer_rows, predict_seconds
from profiles.models import ModelSpec
from profiles.table import CostRow

Kind = Literal["device", "block", "embedding", "head", "optimizer", "collective"]
# Adam's update is linear in the parameters from a few million on.
LARGEST_OPTIMIZER = 64 * 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Largest values of the grids, and seconds for all components at one tp."""

    tokens: int
    head_tokens: int
    length: int
    sequences: int
    budget_s: float


LIMITS = {
    "cpu": Limits(tokens=4096, head_tokens=1024, length=1024, sequences=64, budget_s=90.0),
    "cuda": Limits(tokens=32768, head_tokens=8192, length=4096, sequences=512, budget_s=55.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A component's operations at one tp; ``share`` of the budget.

    ``alone``: by the first worker while the others rest.
    """

    kind: Kind
    phase: Literal["train", "decode", "step", ""] = ""
    tp: int = 1
    spec: ModelSpec | None = None
    grid: Grid = field(default_factory=lambda: Grid(sizes=(), lengths=()))
    share: float = 0.0
    alone: bool = False

    @property
    def name(self) -> str:
        return f"{self._component} alone" if self.alone else self._component

    @property
    def _component(self) -> str:
        head = f" {self.spec.head}" if self.kind == "head" and self.spec is not None else ""
        return f"{self.kind}{head} {self.phase} tp {self.tp}" if self.phase else self.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJob:
    """What a worker is started with. ``done``: names of tasks that need no measuring."""

    spec: ModelSpec
    tps: tuple[int, ...]
    kind: Literal["cpu", "cuda"]
    workers: int
    num_threads: int
    limits: Limits
    done: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """From rank 0 to the parent: a step of the work, a finished task, or the end."""

    kind: Literal["step", "task", "end", "error"]
    text: str = ""
    device: dict[str, Any] | None = None
    rows: tuple[CostRow, ...] = ()
    held_out: tuple[HeldOut, ...] = ()


PROBES: Mapping[tuple[str, str], Callable[[LayerBench, int, int], Probe]] = {
    ("block", "train"): LayerBench.block_train,
    ("block", "decode"): LayerBench.block_decode,
    ("embedding", "train"): LayerBench.embedding_train,
    ("embedding", "decode"): LayerBench.embedding_decode,
    ("head", "train"): LayerBench.head_train,
    ("head", "decode"): LayerBench.head_decode,
    ("optimizer", "step"): LayerBench.optimizer_step,
}


def tasks_of(job: WorkerJob) -> list[Task]:
    """In the order in which they are measured."""
    spec, limits = job.spec, job.limits
    lengths = tuple(n for n in (8, 32, 256, 1024, 4096) if n <= limits.length)
    tokens = tuple(4**i for i in range(2, 10) if 4**i <= limits.tokens)
    head_tokens = tuple(n for n in tokens if n <= limits.head_tokens)
    sequences = tuple(4**i for i in range(8) if 4**i <= limits.sequences)
    found = [Task(kind="device", share=0.05)]
    for tp in job.tps:

        def task(
            kind: Kind, phase: Literal["train", "decode"], sizes: tuple[int, ...], share: float,
            *, over: tuple[int, ...] = (0,), of: ModelSpec = spec, tp: int = tp,
            alone: bool = False,
        ) -> Task:  # fmt: skip
            grid = Grid(sizes=sizes, lengths=over, whole=phase == "train")
            return Task(kind=kind, phase=phase, tp=tp, spec=of, grid=grid, share=share, alone=alone)

        found += [
            task("block", "train", tokens, 0.40, over=lengths),
            task("block", "decode", sequences, 0.16, over=lengths),
            task("embedding", "train", tokens, 0.06),
            task("embedding", "decode", sequences, 0.01),
        ]
        for head in dict.fromkeys((spec.head, "lm", "scalar")):
            share = 0.16 if head == "lm" else 0.01
            found.append(task("head", "train", head_tokens, share, of=spec.with_head(head)))
            if head == "lm":
                found.append(task("head", "decode", sequences, share / 4, of=spec.with_head("lm")))
        if tp == 1 and job.workers > 1 and job.kind == "cpu":
            found += [
                task("block", "decode", sequences, 0.16, over=lengths, alone=True),
                task("head", "decode", sequences, 0.04, of=spec.with_head("lm"), alone=True),
            ]
    blocks = max(1, min(spec.num_layers, LARGEST_OPTIMIZER // spec.block_parameters))
    sizes = tuple(dict.fromkeys(min(blocks, 4**i) for i in range(blocks.bit_length())))
    grid = Grid(sizes=sizes, lengths=(0,))
    found.append(Task(kind="optimizer", phase="step", spec=spec, grid=grid, share=0.05))
    if job.workers > 1:
        found.append(Task(kind="collective", share=0.07))
    return found


def run_worker(rank: int, job: WorkerJob, folder: str, reports: Any) -> None:
    """Entry of a worker process; ``reports`` is a queue to the parent."""
    # An interrupt from the terminal reaches the workers as well; the parent ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        torch.set_num_threads(job.num_threads)
        device = torch.device("cpu")
        if job.kind == "cuda":
            device = torch.device("cuda", rank)
            torch.cuda.set_device(device)
        else:
            keep_freed_memory()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if job.kind == "cuda" else "gloo",
            init_method=(Path(folder) / "rendezvous").as_uri(),
            rank=rank,
            world_size=job.workers,
            timeout=timedelta(minutes=10),
        )
        worker = _Worker(job, rank, device, reports.put if rank == 0 else lambda report: None)
        for task in tasks_of(job):
            if task.name not in job.done:
                worker.run(task)
        dist.destroy_process_group()
        if rank == 0:
            reports.put(Report(kind="end"))
    except BaseException:
        reports.put(Report(kind="error", text=f"worker {rank}:\n{traceback.format_exc()}"))
        raise


class _Worker:
    def __init__(
        self, job: WorkerJob, rank: int, device: torch.device, report: Callable[[Report], None]
    ) -> None:
        self.job, self.rank, self.device, self.report = job, rank, device, report
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.lockstep = Lockstep(device, world_size=job.workers)
        self.benches: dict[tuple[ModelSpec, int], LayerBench] = {}

    def run(self, task: Task) -> None:
        self.report(Report(kind="step", text=task.name))
        budget_s = self.job.limits.budget_s * task.share
        if task.kind == "device":
            self._device(task, budget_s)
        elif task.kind == "collective":
            self._collectives(task, budget_s)
        elif task.alone:
            if self.rank == 0:
                self._layers(task, budget_s, Lockstep(self.device, world_size=1))
            self.lockstep.barrier()
        else:
            self._layers(task, budget_s, self.lockstep)

    def _device(self, task: Task, budget_s: float) -> None:
        spec = self.job.spec
        device = measure_device(
            self.lockstep, hidden=spec.hidden, ffn=spec.ffn, dtype=self.dtype,
            workers=self.job.workers, cap_s=budget_s,
        )  # fmt: skip
        self.report(Report(kind="task", text=task.name, device=asdict(device)))

    def _layers(self, task: Task, budget_s: float, lockstep: Lockstep) -> None:
        assert task.spec is not None, task
        bench = self._bench(task.spec, task.tp)
        make_probe = PROBES[task.kind, task.phase]

        def measure(point: Point, cap_s: float) -> dict[str, Measurement]:
            return lockstep.measure(make_probe(bench, *point), cap_s=cap_s)

        def depth(point: Point) -> int:
            tokens, length = point[0], point[1] if task.phase == "decode" else 0
            return bench.depth(tokens, context=length) if task.kind == "block" else 1

        def tick(point: Point) -> None:
            size, length = point
            over = f" x {length}" if length else ""
            self.report(Report(kind="step", text=f"{task.name}: {size}{over}"))

        found, held_out = explore(
            task.grid,
            Target(measure=measure, predict=predict_seconds, depth=depth),
            Allowance(budget_s, lockstep.maximum),
            tick=tick,
        )
        rows = (
            optimizer_rows(task.spec, found)
            if task.kind == "optimizer"
            else layer_rows(task.spec, task.kind, task.tp, found)
        )
        if task.alone:
            rows = [replace(row, operation=f"{row.operation}_alone") for row in rows]
        self.report(Report(kind="task", text=task.name, rows=tuple(rows), held_out=tuple(held_out)))

    def _bench(self, spec: ModelSpec, tp: int) -> LayerBench:
        """Kept while tasks ask for the same: they share the weights."""
        if (spec, tp) not in self.benches:
            self.benches.clear()
            # After a capture that fails, torch's allocator takes it for one that goes on.
            captures = self.device.type == "cuda" and spec.decode_is_static
            self.benches[spec, tp] = LayerBench(
                spec, tp=tp, device=self.device, dtype=self.dtype,
                capture=capture if captures else None,
            )  # fmt: skip
        return self.benches[spec, tp]

    def _collectives(self, task: Task, budget_s: float) -> None:
        groups = build_groups(self.job.workers, self.rank)
        memory = CrossMemory.between_workers() if self.device.type == "cpu" else None
        sizes = group_sizes(self.job.workers)
        points = [
            (operation, size, num_bytes)
            for size in sizes
            for operation in COLLECTIVES
            for num_bytes in COLLECTIVE_BYTES
            if size == 2 or operation not in PAIRWISE
            if operation != "read" or (memory is not None and memory.all_readable)
        ]
        rows: list[CostRow] = []
        for operation, size, num_bytes in points:
            self.report(Report(kind="step", text=f"{operation} of {size}: {num_bytes} bytes"))
            ranks, group = groups[size]
            action = collective_action(
                operation, num_bytes, ranks=ranks, group=group, device=self.device, memory=memory
            )
            # There and back: two messages.
            weight = 0.5 if operation == "p2p" else 1.0
            probe = Probe(actions=(action,), readings={operation: (weight,)})
            measured = self.lockstep.measure(probe, cap_s=budget_s / len(points))[operation]
            rows.append(collective_row(operation, size, num_bytes, measured))
        self.report(Report(kind="task", text=task.name, rows=tuple(rows)))
