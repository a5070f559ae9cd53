"""``realexec profile``: measures what this executor's layers cost on this machine.

Read ``profile`` first. It starts the workers (``profile_worker.py``), which measure together what
a run would do at the same time, and gathers their rows into a ``CostTable``. After every
component the partial result is written beside the output, so that a profile that was interrupted
goes on where it stopped. What is measured is ``profile_layers.py``'s and ``profile_device.py``'s,
how is ``profile_measure.py``'s, and where on the grid ``profile_grid.py``'s.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.multiprocessing as mp
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from executor.profile_device import versions
from executor.profile_worker import LIMITS, Limits, Report, WorkerJob, run_worker, tasks_of
from executor.trace import write_json
from planner.strategy import tensor_parallel_problem
from profiles.catalogue import resolve_model
from profiles.errors import ConfigError
from profiles.hardware import DeviceSpec
from profiles.models import ModelSpec
from profiles.table import CostRow, CostTable
from profiles.units import format_bytes

# Relative inter-quartile range above which a row is called noisy.
NOISY = 0.2

# A line about what is measured now, and the share of the work that is done.
Tell = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRequest:
    """What to measure. ``tps``: tensor-parallel degrees; ``output``: the table's file.

    ``workers`` share the machine and measure at the same time. ``limits``: the grids' ends and
    the seconds to spend; None: as the device's kind has them in ``profile_worker.LIMITS``.

    Raises:
        ConfigError: tp does not divide the model, or there are not so many devices.
    """

    spec: ModelSpec
    output: Path
    tps: tuple[int, ...] = (1,)
    device: Literal["cpu", "cuda"] = "cpu"
    workers: int = 1
    limits: Limits | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"{self.workers} is not at least 1", where="--workers")
        for tp in self.tps:
            problem = tensor_parallel_problem(self.spec, tp) if tp > 0 else f"tp is {tp}"
            if problem is not None:
                raise ConfigError(problem, where="--tp", remedy="leave it out")
        if self.device == "cuda" and torch.cuda.device_count() < self.workers:
            raise ConfigError(
                f"{self.workers} workers, but torch sees {torch.cuda.device_count()} CUDA devices",
                where="--workers", remedy="lower it, or use --device cpu",
            )  # fmt: skip

    @property
    def num_threads(self) -> int:
        """Of each worker: as the launcher of a run gives them."""
        return max(1, torch.get_num_threads() // self.workers)


@dataclass(slots=True)
class Partial:
    """What is measured so far; ``header`` says under which conditions."""

    header: Mapping[str, Any]
    done: list[str] = field(default_factory=list)
    device: dict[str, Any] | None = None
    rows: list[CostRow] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)

    def add(self, report: Report) -> None:
        self.done.append(report.text)
        self.device = report.device or self.device
        self.rows += report.rows
        self.held_out += [{"task": report.text, **asdict(h)} for h in report.held_out]


def header_of(request: ProfileRequest) -> dict[str, Any]:
    """All that a measurement depends on: a partial file of another header is not continued."""
    device = torch.device(request.device)
    return {
        "spec": {**request.spec.to_dict(), "source": ""},
        "device": request.device,
        "tps": list(request.tps),
        "workers": request.workers,
        "threads": request.num_threads,
        "limits": asdict(request.limits or LIMITS[request.device]),
        "versions": versions(device),
    }


def partial_path(output: Path) -> Path:
    return output.with_name(output.name + ".partial.json")


def load_partial(request: ProfileRequest) -> Partial:
    """What an interrupted profile left, where that was of the same header; else nothing."""
    header, path = header_of(request), partial_path(request.output)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["header"] == header:
            rows = [CostRow(**row) for row in data.pop("rows")]
            return Partial(**data, rows=rows)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent, or cut off, or of an older version: measured anew
    return Partial(header=header)


def profile(request: ProfileRequest, progress: Tell = lambda text, share: None) -> CostTable:
    """Measures, writes ``request.output`` and returns the table.

    Continues from ``<output>.partial.json``, which every finished component is added to, and
    removes it at the end.

    Raises:
        RuntimeError: a worker failed; the message holds its traceback.
    """
    partial = load_partial(request)
    job = WorkerJob(
        spec=request.spec,
        tps=request.tps,
        kind=request.device,
        workers=request.workers,
        num_threads=request.num_threads,
        limits=request.limits or LIMITS[request.device],
        done=frozenset(partial.done),
    )
    total = sum(task.share for task in tasks_of(job))
    shares = {task.name: task.share / total for task in tasks_of(job)}
    with closing(_reports(job)) as reports:
        for report in reports:
            if report.kind == "task":
                partial.add(report)
                write_json(partial_path(request.output), asdict(partial))
            progress(report.text, sum(shares[name] for name in partial.done))
    table = make_table(request, partial)
    table.save(request.output)
    partial_path(request.output).unlink(missing_ok=True)
    return table


def _reports(job: WorkerJob) -> Generator[Report, None, None]:
    """What rank 0 says, until the end; the workers do not outlive the iteration."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        channel = context.Queue()
        workers = [
            context.Process(target=run_worker, args=(rank, job, folder, channel), daemon=True)
            for rank in range(job.workers)
        ]
        try:
            for worker in workers:
                worker.start()
            while (report := _next(channel, workers)).kind != "end":
                yield report
        finally:
            for worker in workers:
                worker.join(2.0 if sys.exc_info()[0] is None else 0.0)
                if worker.is_alive():
                    worker.kill()
                worker.join()


def _next(channel: Any, workers: Sequence[Any]) -> Report:
    """The next report; raises ``RuntimeError`` when a worker failed or died without a word."""
    while True:
        try:
            report: Report = channel.get(timeout=1.0)
        except queue.Empty:
            dead = [i for i, w in enumerate(workers) if w.exitcode not in (None, 0)]
            if dead:
                raise RuntimeError(
                    f"worker {dead[0]} died without a word (killed, or out of memory?)"
                ) from None
            continue
        if report.kind == "error":
            raise RuntimeError(report.text)
        return report


def make_table(request: ProfileRequest, partial: Partial) -> CostTable:
    """The finished table; how well held-out points were predicted goes into its source."""
    assert partial.device is not None, "the device is the first task"
    spec = request.spec
    return CostTable(
        device=DeviceSpec(**partial.device),
        rows=tuple(partial.rows),
        dtype="bf16" if request.device == "cuda" else "fp32",
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        source=(
            f"realexec profile of {spec.name}'s layers at tp {list(request.tps)}: "
            f"{request.workers} workers at once, {request.num_threads} threads each; "
            f"{held_out_text(partial.held_out)}"
        ),
        versions=partial.header["versions"],
    )


def held_out_text(held_out: Sequence[Mapping[str, Any]]) -> str:
    """How well points were predicted before they were measured."""
    if not held_out:
        return "no point was held out"
    errors = sorted(abs(h["predicted_s"] / h["measured_s"] - 1) for h in held_out)
    return (
        f"{len(errors)} times held out between measured points were predicted with a median "
        f"error of {median(errors):.1%}, at worst {errors[-1]:.1%}, before their points were added"
    )


def summary(table: CostTable, output: Path) -> str:
    """What a user wants to see of a profile."""
    counts = Counter(row.component for row in table.rows)
    noisy = sum(row.spread > NOISY for row in table.rows)
    device = table.device
    lines = [
        f"{output}: " + ", ".join(f"{count} {name}" for name, count in counts.items()) + " rows",
        f"{device.name}: {device.peak_flops / 1e9:.0f} GFLOP/s, "
        f"{device.memory_bytes_per_s / 1e9:.1f} GB/s, {format_bytes(device.memory_bytes)} a worker",
        table.source,
    ]
    saved = graph_share(table.rows)
    if saved is not None:
        lines.append(
            f"a decode step of blocks as a CUDA graph takes {saved:.0%} of one without, in the "
            "median; runs use graphs, and plans count with them"
        )
    if noisy:
        lines.append(
            f"{noisy} of {len(table.rows)} rows scatter by more than {NOISY:.0%} between "
            "quartiles: was the machine busy with something else?"
        )
    return "\n".join(lines)


def graph_share(rows: Sequence[CostRow]) -> float | None:
    """Seconds of blocks' decode steps as CUDA graphs over those without, or None: not measured."""

    def at(row: CostRow) -> tuple[str, int, int, int]:
        return row.shape, row.tp, row.size, row.length

    rows = [row for row in rows if row.component == "block"]
    plain = {at(row): row.seconds for row in rows if row.operation == "decode"}
    graphs = [row for row in rows if row.operation == "decode_graph" and at(row) in plain]
    return median(row.seconds / plain[at(row)] for row in graphs) if graphs else None


# ---- command line ---------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``realexec profile``."""
    parser.add_argument(
        "--model", required=True, metavar="NAME|FOLDER",
        help="whose shapes: a catalogue name or a Hugging Face folder; weights are not read",
    )  # fmt: skip
    parser.add_argument(
        "--tp", metavar="1,2",
        help="tensor-parallel degrees (default: powers of two up to --workers that fit the model)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument(
        "--workers", type=int, metavar="N",
        help="processes that share this machine in a run, and measure at the same time "
        "(default: 1 on a CPU, all GPUs on CUDA)",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", default="profile.json", metavar="FILE",
        help="the table (default profile.json); FILE.partial.json holds what an interrupted "
        "profile had measured, and the same command goes on from it",
    )  # fmt: skip


def request_from_args(args: argparse.Namespace) -> ProfileRequest:
    """Raises ``ConfigError`` that names the flag."""
    workers = args.workers
    if workers is None:
        workers = max(1, torch.cuda.device_count()) if args.device == "cuda" else 1
    spec = resolve_model(args.model)
    if args.tp is None:
        degrees = [2**i for i in range(max(workers, 1).bit_length()) if 2**i <= workers]
        tps = [tp for tp in degrees if tensor_parallel_problem(spec, tp) is None]
    else:
        try:
            tps = sorted({int(word) for word in args.tp.split(",")})
        except ValueError:
            raise ConfigError(
                f"'{args.tp}' is not a list of degrees", where="--tp", remedy="write it like 1,2"
            ) from None
    return ProfileRequest(
        spec=spec, output=Path(args.output), tps=tuple(tps), device=args.device, workers=workers
    )


def run_from_args(args: argparse.Namespace) -> int:
    """Profile with a progress bar on stderr; 130 where it was interrupted."""
    request = request_from_args(args)
    console = Console(stderr=True)
    kept = load_partial(request).done
    if kept:
        console.print(f"continuing from {partial_path(request.output)}: {len(kept)} parts are done")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True) as bar:
            line = bar.add_task("starting workers", total=1.0)
            table = profile(
                request, lambda text, share: bar.update(line, description=text, completed=share)
            )
    except KeyboardInterrupt:
        left = partial_path(request.output)
        console.print(
            f"interrupted; what was measured is in {left}, and the same command goes on from there"
            if left.exists()
            else "interrupted before the first part was done; nothing is left",
            soft_wrap=True,
        )
        return 130
    print(summary(table, request.output))
    return 0
