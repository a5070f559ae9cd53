"""``realexec``: runs plans and measures devices.

realexec run plan.json actor.path=models/sft data.path=prompts.jsonl
realexec profile --model models/sft --device cpu --workers 2 -o profile.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from executor import check_command, cli_jobs, profiler
from executor.inputs import check_inputs
from executor.launch.agent import Interrupted
from executor.launch.supervise import WorkerError, launch
from executor.resume import checkpoint_root, find_checkpoint
from executor.run import Run, equal_nodes, one_layout_plan, resolve
from executor.run_checkpoint import latest
from executor.summary import (
    answers_are_plan_independent,
    compare,
    print_comparison,
    saved_models,
    write_summary,
)
from executor.switch import with_newest_plan
from planner.algorithm import find_algorithm, make_config, make_problem, role_paths
from planner.arguments import parse_with_words
from planner.plan import ExecutionPlan
from planner.plan_schema import load_plan
from planner.strategy import parse_strategy
from profiles.catalogue import resolve_model
from profiles.clusters import make_cluster
from profiles.errors import ConfigError, UserError

_RUN_EXAMPLES = """examples:
  realexec run plan.json actor.path=models/sft data.path=prompts.jsonl total_steps=100
  realexec run plan.json init=random      # a benchmark: random weights, mock prompts
  realexec run --layout d2p1m1 --model models/sft data.path=prompts.jsonl    # no search
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="realexec", description="Run RLHF plans and measure what layers cost."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    run = verbs.add_parser(
        "run",
        help="run a plan",
        description="Run a plan on this machine: GPUs over NCCL, CPU workers over gloo.",
        epilog=_RUN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument(
        "words", nargs="*", metavar="plan.json | key=value",
        help="the plan, then options of the run (see the algorithm's config)",
    )  # fmt: skip
    run.add_argument("-o", "--output", metavar="FOLDER", help="where results go (default runs/…)")
    run.add_argument("--layout", metavar="d2p1m1", help="no plan: one layout for every call")
    run.add_argument("--model", metavar="NAME|FOLDER", help="with --layout: the actor's model")
    run.add_argument(
        "--critic", metavar="NAME|FOLDER", help="with --layout: the critic's (default: as --model)"
    )
    run.add_argument(
        "--device", default="cpu", metavar="NAME", help="with --layout: cpu (default), a100, …"
    )
    run.add_argument(
        "--algorithm",
        "--experiment",
        default="ppo",
        metavar="NAME|FILE.py",
        help="with --layout (default ppo)",
    )
    run.add_argument(
        "--resume", action="store_true",
        help="go on from the newest checkpoint in the output, if there is one (resume=auto)",
    )  # fmt: skip
    run.add_argument(
        "--max-restarts", type=int, default=0, metavar="N",
        help="after a worker's failure go on from the last checkpoint, at most N times (default 0)",
    )  # fmt: skip
    run.add_argument("--json", action="store_true", help="print the summary as JSON")
    cli_jobs.add_launch_arguments(run)
    cli_jobs.add_verbs(verbs)
    check_command.add_parser(verbs)
    profile = verbs.add_parser("profile", help="measure this machine's costs of a model's layers")
    profiler.add_arguments(profile)
    return parser


def _split(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The plan's path and the overrides among positional words."""
    overrides = [word for word in words if "=" in word]
    paths = [word for word in words if "=" not in word]
    if len(paths) > 1:
        raise ConfigError(
            f"'{paths[1]}' is not an override", where="realexec run", remedy="write key=value"
        )
    return (paths[0] if paths else None), overrides


def _layout_plan(args: argparse.Namespace, overrides: Sequence[str]) -> ExecutionPlan:
    if args.model is None:
        raise ConfigError("missing", where="--model", remedy="--layout needs --model NAME|FOLDER")
    strategy = parse_strategy(args.layout)
    algorithm = find_algorithm(args.algorithm)
    config = make_config(algorithm.config_class, overrides)
    problem = make_problem(
        algorithm,
        config,
        model=resolve_model(args.model),
        critic=resolve_model(args.critic or args.model),
        cluster=make_cluster(args.device, strategy.num_devices),
        paths=role_paths(algorithm, config, model=args.model, critic=args.critic),
    )
    return one_layout_plan(problem, strategy, seed=config.seed)


def _resolve_run(args: argparse.Namespace) -> Run:
    path, overrides = _split(args.words)
    if args.output is not None:
        overrides.append(f"output={args.output}")
    if args.resume:
        overrides.append("resume=auto")
    if (path is None) == (args.layout is None):
        raise ConfigError(
            "give a plan.json, or --layout with --model, and not both", where="realexec run"
        )
    plan = load_plan(path) if path is not None else _layout_plan(args, overrides)
    run = check_inputs(resolve(plan, overrides, on_this_machine=args.launcher == "local"))
    return replace(run, resume_from=find_checkpoint(run))


def _run(args: argparse.Namespace) -> int:
    if args.max_restarts < 0:
        raise ConfigError(f"{args.max_restarts} is below 0", where="--max-restarts")
    launcher = cli_jobs.launcher_of(args.launcher)
    options = cli_jobs.launcher_options(args)
    run = _resolve_run(args)
    if args.dry_run:
        print(cli_jobs.describe(run, args.launcher, options))
        return 0
    console, device = Console(stderr=True), equal_nodes(run.plan).device
    console.print(
        f"{run.plan.problem.graph.name}: {run.config.total_steps} steps of "
        f"{run.plan.problem.workload.num_sequences} sequences on {run.plan.num_devices} "
        f"{'CPU workers' if device.kind == 'cpu' else device.name}; results in {run.output}",
        highlight=False,
        soft_wrap=True,
    )
    if not answers_are_plan_independent(run):
        console.print(
            "answers are vLLM's: under another plan they are others",
            highlight=False,
            soft_wrap=True,
        )
    if run.resume_from is not None:
        console.print(f"going on from {run.resume_from}", highlight=False, soft_wrap=True)
    try:
        launch(
            run, launcher.start, name=args.launcher, options=options,
            max_restarts=args.max_restarts,
        )  # fmt: skip
    except Interrupted as error:
        return _interrupted(error, run)
    run = with_newest_plan(run)
    rows = compare(run)
    write_summary(rows, run)
    if args.json:
        print((run.output / "summary.json").read_text(encoding="utf-8"), end="")
        return 0
    print_comparison(rows, Console())
    for folder in saved_models(run.output):
        print(f"saved {folder}")
    return 0


def _interrupted(error: Interrupted, run: Run) -> int:
    done = "" if error.step is None else f" after step {error.step}, with a checkpoint"
    stays = "what was written stays, --resume goes on from it"
    if latest(checkpoint_root(run)) is None:
        stays = "there is no checkpoint to go on from"
    print(f"realexec: interrupted{done}; {stays}", file=sys.stderr)
    return 128 + error.signal_number


VERBS = {
    "run": _run, "check": check_command.run_from_args, "profile": profiler.run_from_args,
    **cli_jobs.VERBS,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a mistake in the input, 1 a mistake of ours, 128 + signal if ended."""
    # Torch's workers ask for huge pages: a large tensor's first touch takes a third of the time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    parser = build_parser()
    args = parse_with_words(parser, argv)
    try:
        return VERBS[args.verb](args)
    except UserError as error:
        if getattr(args, "json", False):
            print(json.dumps({"error": str(error), "where": error.where}))
        print(f"realexec: {error}", file=sys.stderr)
        return 2
    except WorkerError as error:
        print(f"realexec: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("realexec: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
