"""How long does a what-if analysis take? Fifty scenarios of PPO with a 70B actor, to 128 GPUs.

    python scripts/bench_sweep.py [--model llama-70b] [--critic llama-7b] [--workers 2] [-o FILE]

Sweeps five sizes of cluster, two devices and five lengths of answer (prompts of 1024 tokens,
batches of 512), in an empty memory: seconds by the clock and of CPU time, of all processes; then
the same sweep again, which is read from memory, and one new scenario at 128 GPUs. Prints them with
the distribution of the gaps that the searches proved. ``-o`` writes the scenarios as CSV.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import pandas as pd

from experiments.ppo.graph import ALGORITHM
from planner import WhatIf
from planner.algorithm import make_config, make_problem
from profiles.catalogue import resolve_model
from profiles.clusters import make_cluster

WORKLOAD = ("prompt_len=1024", "response_len=1024", "batch_size=512")
AXES = {
    "gpus": [32, 48, 64, 96, 128],
    "device": ["a100", "h100"],
    "response_len": [512, 1024, 2048, 4096, 8192],
}


def cpu_s() -> float:
    """CPU seconds, user and system, of this process and of all that it has ended."""
    return sum(os.times()[:4])


def timed_sweep(what: WhatIf, **axes: object) -> tuple[pd.DataFrame, float, float]:
    """The scenarios, seconds by the clock, CPU seconds."""
    began_s, began_cpu_s = time.perf_counter(), cpu_s()
    frame = what.sweep(**axes)
    return frame, time.perf_counter() - began_s, cpu_s() - began_cpu_s


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-70b")
    parser.add_argument("--critic", default="llama-7b")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE")
    args = parser.parse_args()
    problem = make_problem(
        ALGORITHM, make_config(ALGORITHM.config_class, list(WORKLOAD)),
        model=resolve_model(args.model), critic=resolve_model(args.critic),
        cluster=make_cluster("h100", 128),
    )  # fmt: skip
    what = WhatIf(problem, workers=args.workers)
    frame, wall_s, used_s = timed_sweep(what, **AXES)
    gaps = frame["gap"].dropna()
    print(f"{len(frame)} scenarios, {args.workers} processes: {wall_s:.1f} s, CPU {used_s:.1f} s")
    print(
        f"{len(gaps)} have a plan; gaps: median {gaps.median():.1%}, 9 of 10 below "
        f"{gaps.quantile(0.9):.1%}, largest {gaps.max():.1%}"
    )
    _, again_s, _ = timed_sweep(what, **AXES)
    print(f"again, from memory: {again_s:.2f} s")
    _, new_s, new_cpu_s = timed_sweep(what, batch_size=256)
    print(f"one new scenario at 128 GPUs: {new_s:.1f} s, CPU {new_cpu_s:.1f} s")
    if args.output is not None:
        frame.drop(columns="plan").to_csv(args.output, index=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
