"""``realexec check plan.json``: would it run, and in how much memory? Needs none of its devices."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from executor.fake import RankReport, check_rank, rank_kinds
from executor.run import Run, configure
from planner.console import make_table
from planner.cost.stage import VALUE_BYTES
from planner.memory import RESERVE_BYTES
from planner.mesh import node_grid
from planner.plan_schema import load_plan
from planner.program import Program, Reallocate, compile_plan
from planner.reallocation import reallocate
from planner.report import ranges_text
from profiles.errors import InfeasibleError, PlanError
from profiles.units import format_bytes

_DESCRIPTION = """Carry out one step of a plan's ranks on fake tensors and fake process groups, in
this process: 70B for 128 GPUs needs a laptop. Says what each kind of rank holds at its fullest
moment beside what the planner had said, and what crosses which links."""


def add_parser(verbs: Any) -> None:
    """The verb's arguments."""
    check = verbs.add_parser(
        "check", help="dry-run a plan's ranks without its devices", description=_DESCRIPTION
    )
    check.add_argument("words", nargs="+", metavar="plan.json | key=value")
    check.add_argument(
        "--ranks", metavar="0,5,…", help="these ranks alone (default: one of every kind)"
    )
    check.add_argument("--json", action="store_true", help="print the reports as JSON")


def run_from_args(args: argparse.Namespace) -> int:
    """Exit code 0 where every rank fits.

    Raises:
        InfeasibleError: a rank holds more than its device has.
        PlanError: the plan cannot run at all, or has no such rank.
    """
    paths = [word for word in args.words if "=" not in word]
    if len(paths) != 1:
        raise PlanError("give one plan.json", where="realexec check")
    overrides = [word for word in args.words if "=" in word]
    run = configure(load_plan(paths[0]), [*overrides, "init=random", "generation_backend=own"])
    program = compile_plan(run.plan)
    console = Console(stderr=args.json)
    _print_program(console, run, program)
    ranks = _ranks(args.ranks, run.plan.num_devices)
    kinds = [(rank,) for rank in ranks] or rank_kinds(run.plan, program)
    reports = list(_with_progress(check_kinds(Path(paths[0]), overrides, kinds), len(kinds)))
    if args.json:
        print(json.dumps([_as_json(report) for report in reports], indent=2))
    console.print(_table(reports))
    _check_fit(run, reports)
    return 0


def _ranks(text: str | None, num_devices: int) -> list[int]:
    if text is None:
        return []
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) < num_devices for part in parts):
        raise PlanError(
            f"'{text}' does not name ranks", where="--ranks",
            remedy=f"write numbers from 0 to {num_devices - 1} like 0,5",
        )  # fmt: skip
    return [int(part) for part in parts]


def check_kinds(
    path: Path, overrides: Sequence[str], kinds: Sequence[Sequence[int]]
) -> Iterator[RankReport]:
    """A report for each of ``kinds`` in their order, as many at once as there are cores."""
    workers = min(len(kinds), os.cpu_count() or 1)
    if workers <= 1:
        yield from (_check_kind(path, overrides, kind) for kind in kinds)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(partial(_check_kind, path, overrides), kinds)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _check_kind(path: Path, overrides: Sequence[str], ranks: Sequence[int]) -> RankReport:
    run = configure(load_plan(path), [*overrides, "init=random", "generation_backend=own"])
    with tempfile.TemporaryDirectory() as folder:
        return check_rank(run, compile_plan(run.plan), ranks, Path(folder))


def _with_progress(reports: Iterable[RankReport], total: int) -> Iterator[RankReport]:
    console = Console(stderr=True)
    start_s = time.monotonic()
    for number, report in enumerate(reports, start=1):
        console.print(
            f"{number}/{total} kinds of ranks, {time.monotonic() - start_s:.0f} s", highlight=False
        )
        yield report


def _print_program(console: Console, run: Run, program: Program) -> None:
    """What ``check_program`` has proven, and the bytes of the step's reallocations by link."""
    instructions = sum(len(own) for own in program.step.values())
    ahead = program.ahead is not None
    console.print(
        f"{run.plan.problem.graph.name}: {instructions} instructions on {len(program.step)} ranks; "
        "every send has its receive, no wait is circular, weights are there when they are read"
        + (", generation a step ahead reads them at most one version old" * ahead),
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for role, moved in _reallocated(run, program).items():
        inside, between, copied = (format_bytes(moved[k]) for k in ("intra", "inter", "copied"))
        console.print(
            f"reallocate {role}: {inside} inside nodes, {between} between nodes, {copied} copied "
            "or lent in place",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def _reallocated(run: Run, program: Program) -> dict[str, Mapping[str, int]]:
    """Bytes of every reallocation of a step, by the role and the two layouts."""
    cluster = run.plan.problem.cluster
    width = VALUE_BYTES[cluster.kind]
    found: dict[str, Mapping[str, int]] = {}
    for own in program.step.values():
        for i in own:
            if not isinstance(i, Reallocate):
                continue
            name = f"{i.role} {i.source.key} to {i.destination.key}"
            if name in found:
                continue
            first, per_node = node_grid(i.source.mesh, i.destination.mesh, cluster)
            plan = reallocate(
                i.source, i.destination, devices_per_node=per_node, first_device=first
            )
            moved = dict.fromkeys(("intra", "inter", "copied"), 0)
            for m in plan.messages:
                near = cluster.node_of(m.src) == cluster.node_of(m.dst)
                moved["intra" if near else "inter"] += m.slice.num_values * width
            moved["copied"] = sum(c.slice.num_values for c in plan.copies) * width
            found[name] = moved
    return found


def _table(reports: Sequence[RankReport]) -> Table:
    title = "bytes of a rank at its fullest moment, without the framework's reserve"
    numbers = ("held", "planned", "planned / held")
    table = make_table(title, ("ranks", "fullest at", *numbers), whole=numbers)
    for report in reports:
        table.add_row(
            ranges_text(report.ranks, most=8), report.peak_at, format_bytes(report.peak_bytes),
            format_bytes(report.planned_bytes), f"{report.error:+.1%}",
        )  # fmt: skip
    return table


def _as_json(report: RankReport) -> dict[str, Any]:
    return {
        "ranks": list(report.ranks),
        "peak_bytes": report.peak_bytes,
        "planned_bytes": report.planned_bytes,
        "peak_at": report.peak_at,
        "instructions": dict(report.by),
    }


def _check_fit(run: Run, reports: Sequence[RankReport]) -> None:
    cluster = run.plan.problem.cluster
    reserve = RESERVE_BYTES[cluster.kind]

    def left_bytes(report: RankReport) -> int:
        device = cluster.group_of(report.ranks[0]).device
        return device.memory_bytes - report.peak_bytes

    fullest = min(reports, key=left_bytes)
    device, need = cluster.group_of(fullest.ranks[0]).device, fullest.peak_bytes + reserve
    if need > device.memory_bytes:
        raise InfeasibleError(
            f"rank {fullest.ranks[0]} holds {format_bytes(need)} at {fullest.peak_at}, "
            f"{format_bytes(reserve)} of it for the framework; {device.name} has "
            f"{format_bytes(device.memory_bytes)}",
            where=f"rank {fullest.ranks[0]}",
            remedy=f"search with memory_limit={int(0.95 * device.memory_bytes / 2**30)}GiB or less",
        )
