"""How good and how fast is the search? Plans for PPO from 7B on 8 to 70B on 8,192 GPUs.

    python scripts/bench_search.py [--device h100] [--cases 7B@8 70B@128 ...] [-o search.json]

Prompt 1024, response 1024, batch 512; critic and reward are of 7B, or with ``--critic same`` of
the actor's size. For each case, engine ``auto``: seconds until the options are costed, until a
plan within 1% of the final one (from the start, costing included), in all, and of CPU time, which
other work on the machine does not stretch as much; the plan's seconds per step, the lower bound,
the gap, and seconds until it was 5% and 1%, costing included; plans looked at; how much slower
the best symmetric and the best split placement are; peak memory of the process. Then with equal
seconds: ``mcmc`` against ``descent``. plans/s: full evaluations of random assignments in a second
of one core's CPU time. Every case has a process of its own, and kernels are compiled before the
clock starts; ``--cold`` prints what compiling takes.
Prints a table; ``-o`` writes the same as JSON, or as CSV if the name ends so.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from experiments.ppo.graph import ALGORITHM
from planner.algorithm import make_config, make_problem
from planner.cost import Costs
from planner.plan import Problem
from planner.resolve import make_costs
from planner.search import SearchResult, search
from planner.search.descent import fastest
from planner.search.engine import News
from planner.search.evaluate import Evaluator
from planner.search.options import OptionSpace
from planner.search.warm import warm_up
from planner.simulate import StepPrices
from profiles.catalogue import MODELS
from profiles.clusters import make_cluster

CASES = ("7B@8", "13B@16", "34B@32", "70B@64", "70B@128", "70B@512", "70B@1024", "70B@8192")
WORKLOAD = ("prompt_len=1024", "response_len=1024", "batch_size=512")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One case; seconds of wall clock but for ``step_s`` and ``bound_s``, which are the plan's."""

    case: str
    critic: str
    costing_s: float
    within_1_percent_s: float
    total_s: float
    cpu_s: float
    step_s: float
    bound_s: float
    gap: float
    gap_of_5_percent_s: float  # inf: never
    gap_of_1_percent_s: float
    evaluations: int
    per_second: float
    peak_mib: float
    symmetric: float
    split: float
    mcmc_s: float
    descent_s: float


def case_name(text: str) -> str:
    size, _, gpus = text.lower().partition("@")
    if f"llama-{size}" not in MODELS or not gpus.isdecimal():
        raise argparse.ArgumentTypeError(
            f"'{text}' is not like 70B@128; several are words of their own"
        )
    return text


def make_case(name: str, critic: str, device: str) -> Problem:
    """``name``: SIZE@GPUS."""
    size, gpus = name.lower().split("@")
    actor = MODELS[f"llama-{size}"]
    return make_problem(
        ALGORITHM, make_config(ALGORITHM.config_class, list(WORKLOAD)), model=actor,
        critic=actor if critic == "same" else MODELS[f"llama-{critic.lower()}"],
        cluster=make_cluster(device, int(gpus)),
    )  # fmt: skip


def timed_search(
    problem: Problem, costs: Costs, time_limit_s: float, seed: int
) -> tuple[SearchResult, list[tuple[float, News]]]:
    """The default search, and its news with the seconds since the start, costing included."""
    seen: list[tuple[float, News]] = []
    began_s = time.monotonic()
    result = search(
        problem, costs, seed=seed, time_limit_s=time_limit_s,
        progress=lambda news: seen.append((time.monotonic() - began_s, news)),
    )  # fmt: skip
    return result, seen


def first_s(seen: Sequence[tuple[float, News]], reached: Callable[[News], bool]) -> float:
    """Seconds of the first news of which ``reached`` is true; inf where there is none."""
    return next((at_s for at_s, news in seen if reached(news)), math.inf)


def evaluations_per_second(evaluator: Evaluator, *, count: int = 200_000) -> float:
    """Full evaluations (seconds and memory, nothing cut short) of random assignments."""
    rng = np.random.default_rng(1)
    tables = evaluator.tables
    num_calls = len(evaluator.calls)
    mesh, row = np.zeros((2, count, num_calls), dtype=np.int64)
    for i, call in enumerate(tables.calls):
        options = tables.call_meshes[call["mesh_start"] : call["mesh_stop"]]
        mesh[:, i] = rng.choice(options, count)
        ranges = tables.row_ranges[i, tables.meshes["kind"][mesh[:, i]]]
        row[:, i] = ranges["start"] + rng.integers(0, ranges["count"])
    evaluator.score_many(mesh[:10], row[:10])
    best = math.inf
    for _ in range(3):
        began_s = time.thread_time()
        evaluator.score_many(mesh, row)
        best = min(best, time.thread_time() - began_s)
    return count / best


def run_case(case: str, critic: str, args: argparse.Namespace) -> Row:
    """One row of the table, in a process of its own."""
    warm_up().join()
    problem = make_case(case, critic, args.device)
    costs = make_costs(problem.cluster, None)
    began_cpu_s = time.process_time()
    result, seen = timed_search(problem, costs, args.time_limit, args.seed)
    cpu_s = time.process_time() - began_cpu_s
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    space = OptionSpace(problem, StepPrices(problem, costs))
    duel = {
        engine: search(
            problem, costs, engine=engine, seed=args.seed, gap=0.0, time_limit_s=args.duel
        ).step_s
        for engine in ("mcmc", "descent")
    }  # fmt: skip
    evaluator = Evaluator(space)
    evaluator.score(fastest(evaluator))
    return Row(
        case=case, critic=critic, costing_s=seen[0][0],
        within_1_percent_s=first_s(seen, lambda news: news.best_s <= result.step_s * 1.01),
        gap_of_5_percent_s=first_s(seen, lambda news: news.gap <= 0.05),
        gap_of_1_percent_s=result.wall_s if result.gap <= 0.01 else math.inf,
        total_s=result.wall_s, cpu_s=cpu_s, step_s=result.step_s,
        bound_s=result.lower_bound_s, gap=result.gap,
        evaluations=result.evaluations, per_second=evaluations_per_second(evaluator),
        peak_mib=peak_mib,
        symmetric=result.baselines.get("symmetric", math.inf) / result.step_s,
        split=result.baselines.get("split", math.inf) / result.step_s,
        mcmc_s=duel["mcmc"], descent_s=duel["descent"],
    )  # fmt: skip


def cold_start_s() -> tuple[float, float]:
    """Seconds to make all kernels ready without and with a cache, in fresh processes."""
    code = (
        "import time; b = time.perf_counter(); from planner.search.warm import warm_up; "
        "warm_up().join(); print(time.perf_counter() - b)"
    )
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        found = [
            float(subprocess.run([sys.executable, "-c", code], env=environment, check=True,
                                 capture_output=True, text=True).stdout)
            for _ in range(2)
        ]  # fmt: skip
    return found[0], found[1]


HEADINGS = (
    "case", "critic", "costed", "best at", "total", "CPU", "a step", "bound", "gap", "5% at",
    "1% at", "plans",
    "plans/s", "MiB", "sym.", "split", "mcmc", "descent",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    return [
        row.case, row.critic, f"{row.costing_s:.1f} s", f"{row.within_1_percent_s:.1f} s",
        f"{row.total_s:.1f} s", f"{row.cpu_s:.1f} s", f"{row.step_s:.2f} s",
        f"{row.bound_s:.2f} s", f"{row.gap:.1%}",
        *("-" if math.isinf(s) else f"{s:.1f} s"
          for s in (row.gap_of_5_percent_s, row.gap_of_1_percent_s)),
        f"{row.evaluations:,}", f"{row.per_second:,.0f}", f"{row.peak_mib:.0f}",
        f"{row.symmetric:.2f}x", f"{row.split:.2f}x", f"{row.mcmc_s:.2f} s",
        f"{row.descent_s:.2f} s",
    ]  # fmt: skip


def write(rows: Sequence[Row], path: Path) -> None:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
        return
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=CASES, type=case_name, metavar="SIZE@GPUS")
    parser.add_argument("--critic", nargs="+", default=["7B", "same"], metavar="SIZE")
    parser.add_argument("--device", default="h100")
    parser.add_argument("--time-limit", type=float, default=30.0, help="seconds (default 30)")
    parser.add_argument("--duel", type=float, default=10.0, help="mcmc, descent: seconds each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="also time compiling from nothing")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.cold:
        cold_s, warm_s = cold_start_s()
        print(f"kernels ready after {cold_s:.1f} s without a cache, {warm_s:.1f} s with one")
    rows: list[Row] = []
    print("  ".join(f"{heading:>9}" for heading in HEADINGS), flush=True)
    for critic in args.critic:
        for case in args.cases:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(run_case, (case, critic, args)))
            print("  ".join(f"{cell:>9}" for cell in cells(rows[-1])), flush=True)
    if args.output is not None:
        write(rows, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
