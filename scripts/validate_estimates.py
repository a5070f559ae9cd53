"""Are estimates true? Plans of PPO on this machine, predicted beside measured.

    realexec profile --model models/smollm2-135m --device cpu --workers 2 -o profile.json
    python scripts/validate_estimates.py profile.json [--model models/smollm2-135m] [--plans 20]

Searches a plan, draws others that fit at random, estimates all with the one profile, runs each
for ``--steps`` steps (random weights, mock prompts, a reward by code) and leaves the first step
out. Writes ``runs/estimates/estimates.csv``, one row a call and a plan, and ``estimates.svg``.
Prints the median errors, the rank correlation over plans and the searched plan's place, and how the
errors are after calibration: each plan's, with factors of the other plans' traces. What is measured
is kept: interrupted, it goes on where it was. Exits 1 where a limit is missed by the estimates as
they were before any run: 15 % a call, 10 % a step (medians), correlation 0.9, searched within 5 %
of the best.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import get_args

import pandas as pd

from planner.calibrate import RunRecord, judge, observe
from planner.graph import CallKind
from planner.mesh import enumerate_meshes
from planner.plan import Allocation, ExecutionPlan, largest_dp, validate_plan
from planner.plan_memory import check_memory
from planner.plan_schema import load_plan, save_plan
from planner.resolve import costs_of_plan
from planner.search import estimate_plan
from planner.simulate import StepPrices
from planner.strategy import Recompute, legal_strategies
from profiles.errors import InfeasibleError, UserError
from profiles.table import CostTable

SIZES = ("prompt_len=48", "response_len=24", "batch_size=8", "ppo.num_mini_batches=2")
REWARD = "reward.source=experiments.rewards:share_of_even_tokens"
LIMITS = {"call": 0.15, "step": 0.10, "correlation": 0.9, "searched": 1.05}


def searched_plan(args: argparse.Namespace) -> Path:
    path: Path = args.output / "searched.json"
    if not path.exists():
        command = [
            sys.executable, "-m", "planner.cli", "search", "--model", str(args.model), "--cluster",
            "local", "--gpus", "2", "--profile", str(args.profile), "--time-limit", "20", "-o",
            str(path), REWARD, *SIZES,
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def random_plan(like: ExecutionPlan, rng: random.Random) -> ExecutionPlan:
    """A plan of the same problem that can run and fits; drawn until one does."""
    problem, allocations = like.problem, dict[str, Allocation]()
    for call in problem.graph.calls:
        most, spec = largest_dp(problem, call.name), problem.spec_of(call.name)
        legal = [
            (mesh, strategy)
            for mesh in enumerate_meshes(problem.cluster)
            for strategy in legal_strategies(spec, mesh, problem.cluster, max_dp=most)
        ]
        mesh, strategy = rng.choice(legal)
        if call.kind is CallKind.TRAIN:
            recompute = rng.choice(get_args(Recompute))
            strategy = replace(strategy, zero=rng.choice((0, 1)), recompute=recompute)
        micro = rng.choice([m for m in (1, 2, 4) if m <= max(1, most // strategy.dp)])
        allocations[call.name] = Allocation(mesh=mesh, strategy=strategy, num_micro_batches=micro)
    plan = replace(like, allocations=allocations, estimate=None)
    try:
        validate_plan(plan)
        check_memory(plan)
    except InfeasibleError:
        return random_plan(like, rng)
    return plan


def make_plans(args: argparse.Namespace) -> list[Path]:
    """The searched plan, and random ones, all with estimates of the profile."""
    first = searched_plan(args)
    plan = load_plan(first)
    costs = costs_of_plan(plan, str(args.profile), lambda words: None)
    prices, rng = StepPrices(plan.problem, costs), random.Random(args.seed)
    paths = [first]
    for number in range(1, args.plans):
        path = args.output / f"plan{number:02}.json"
        drawn = random_plan(plan, rng)
        if not path.exists():
            save_plan(estimate_plan(drawn, prices)[0], path)
        paths.append(path)
    return paths


def measure(path: Path, steps: int) -> pd.DataFrame:
    """One row a call: predicted and measured seconds."""
    folder = path.with_suffix("")
    summary = folder / "summary.json"
    if not summary.exists():
        command = [
            sys.executable, "-m", "executor.cli", "run", str(path), "init=random",
            f"total_steps={steps}", "-o", str(folder), "--json",
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = json.loads(summary.read_text(encoding="utf-8"))["calls"]
    return pd.DataFrame(rows).assign(plan=path.stem)


def report(table: pd.DataFrame) -> list[str]:
    """What is printed, and at the end which limits are missed."""
    table = table[table.predicted_s.notna() & (table.measured_s > 0)]
    error = (table.predicted_s / table.measured_s - 1.0).abs()
    steps = table[table.call == "step"].set_index("plan")
    moves = table.call.str.startswith("reallocate")
    calls = (table.call != "step") & ~moves
    by_call = error[calls].groupby(table.call[calls]).median()
    ranks = steps.predicted_s.rank().corr(steps.measured_s.rank())
    searched = steps.measured_s["searched"] / steps.measured_s.min()
    found = {
        "call": float(error[calls].median()),
        "step": float(error[table.call == "step"].median()),
        "correlation": float(ranks),
        "searched": float(searched),
    }
    lines = [f"{name:<18} median error {value:6.1%}" for name, value in by_call.items()]
    lines += [
        f"{'reallocations':<18} median error {error[moves].median():6.1%}",
        f"{'all calls':<18} median error {found['call']:6.1%}, limit {LIMITS['call']:.0%}",
        f"{'step':<18} median error {found['step']:6.1%}, limit {LIMITS['step']:.0%}, "
        f"{len(steps)} plans",
        f"rank correlation of predicted with measured steps {ranks:.3f}, "
        f"limit {LIMITS['correlation']}",
        f"the searched plan took {searched:.3f} times the fastest measured step, "
        f"limit {LIMITS['searched']}",
    ]
    missed = [name for name in ("call", "step", "searched") if found[name] > LIMITS[name]]
    missed += ["correlation"] if found["correlation"] < LIMITS["correlation"] else []
    return [*lines, *(f"missed: {name}" for name in missed)]


def after_calibration(runs: Sequence[RunRecord]) -> list[str]:
    """Medians of the same errors with factors of the other runs."""
    if len(runs) < 2:
        return []
    found = ", ".join(
        f"{verdict.what} {verdict.held_out:.1%}" for verdict in judge(runs)
        if verdict.held_out is not None
    )  # fmt: skip
    return [f"median errors after calibration by the other plans' traces: {found}"]


def scatter(table: pd.DataFrame) -> str:
    """Predicted against measured steps as SVG, both axes from 0; on the line they are equal."""
    steps = table[table.call == "step"]
    most = 1.1 * max(steps.predicted_s.max(), steps.measured_s.max())
    size, left, low = 320, 56, 364

    def at(measured: float, predicted: float) -> tuple[float, float]:
        return left + size * measured / most, low - size * predicted / most

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="420" height="420" '
        'font-family="sans-serif" font-size="12"><rect width="420" height="420" fill="white"/>',
        f'<path d="M{left} {low - size}V{low}H{left + size}" fill="none" stroke="#444"/>',
        f'<path d="M{left} {low}L{left + size} {low - size}" stroke="#999" stroke-dasharray="4"/>',
        f'<text x="{left + size / 2}" y="{low + 40}" text-anchor="middle">measured step, s</text>',
        f'<text transform="translate(16 {low - size / 2}) rotate(-90)" text-anchor="middle">'
        "predicted step, s</text>",
    ]
    for share in (0.25, 0.5, 0.75, 1.0):
        x, y = at(share * most, share * most)
        parts.append(f'<text x="{x}" y="{low + 18}" text-anchor="middle">{share * most:.1f}</text>')
        parts.append(
            f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{share * most:.1f}</text>'
        )
    for name, measured, predicted in zip(
        steps.plan, steps.measured_s.astype(float), steps.predicted_s.astype(float), strict=True
    ):
        x, y = at(measured, predicted)
        colour = "#d55e00" if name == "searched" else "#0072b2"
        title = escape(f"{name}: {predicted:.2f} s, measured {measured:.2f} s")
        circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}">'
        parts.append(f"{circle}<title>{title}</title></circle>")
    return "\n".join([*parts, "</svg>", ""])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("profile", type=Path)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/estimates"))
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    tables: list[pd.DataFrame] = []
    try:
        paths = make_plans(args)
        for number, path in enumerate(paths, start=1):
            tables.append(measure(path, args.steps))
            step = tables[-1].set_index("call").loc["step"]
            print(
                f"{number}/{len(paths)} {path.stem}: predicted {step.predicted_s:.2f} s, measured "
                f"{step.measured_s:.2f} s", flush=True,
            )  # fmt: skip
    except UserError as error:
        print(f"validate_estimates: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what is measured is kept", file=sys.stderr)
        if not tables:
            return 130
    table = pd.concat(tables)
    table.to_csv(args.output / "estimates.csv", index=False)
    (args.output / "estimates.svg").write_text(scatter(table), encoding="utf-8")
    profile = CostTable.load(args.profile)
    runs = [observe(path.with_suffix(""), profile) for path in paths[: len(tables)]]
    lines = [*report(table), *after_calibration(runs)]
    print("\n".join(lines))
    return int(any(line.startswith("missed") for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
