"""``realplan``: searches plans, shows them, estimates edited ones.

realplan search --model llama-70b --gpus 128
realplan show plan.json

Messages of what goes on are on stderr, results on stdout; ``--json`` prints them for machines.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from planner.algorithm import Algorithm, find_algorithm, make_config, make_problem
from planner.arguments import parse_with_words, seconds, whole
from planner.cost import CostModel
from planner.plan import ExecutionPlan, Problem
from planner.plan_schema import load_plan, plan_to_dict, save_plan
from planner.report import print_plan, program_table
from planner.resolve import costs_of_plan, load_table, make_costs, resolve_cluster
from planner.search import ENGINES, estimate_plan, search
from planner.simulate import StepPrices, Timeline
from profiles.catalogue import MODELS, resolve_model
from profiles.clusters import DEVICES
from profiles.errors import ConfigError, UserError
from profiles.table import CostTable
from profiles.units import format_bytes, format_seconds

_DESCRIPTION = "Search how to run an RLHF training step on a cluster, and see how good that is."
_SEARCH_EXAMPLES = """examples:
  realplan search --model llama-70b --gpus 128
  realplan search --model llama-13b --gpus 16 --response-len 2048 batch_size=256 ppo.kl_coef=0.05
  realplan search --model models/sft --cluster local --gpus 2 --profile profile.json

Everything after the flags is key=value: any option of the algorithm, see its config.
"""
_SHOW_EXAMPLES = """examples:
  realplan show plan.json              # table, timeline, memory by device
  realplan show plan.json --rank 5     # what rank 5 does in a step
"""
# With --model of this family the critic is llama-7b, as in published RLHF experiments.
_LLAMA_ACTORS = ("llama-7b", "llama-13b", "llama-34b", "llama-70b")
# Flags that stand for an option of every algorithm.
_SUGAR = {"prompt_len": "prompt_len", "response_len": "response_len", "batch_size": "batch_size"}


class _Parser(argparse.ArgumentParser):
    """Mistakes on the command line are ``ConfigError``s: one sentence, exit code 2."""

    def error(self, message: str) -> NoReturn:
        verb = self.prog.removeprefix("realplan").strip()
        raise ConfigError(message, where=verb, remedy=f"see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """All verbs and flags."""
    parser = _Parser(
        prog="realplan", description=_DESCRIPTION, epilog=_SEARCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_search(verbs)
    show = verbs.add_parser(
        "show", help="print a plan: table, timeline, memory", epilog=_SHOW_EXAMPLES,
        description="Print a plan. Costs are those of the profile that the plan names.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    show.add_argument("plan", metavar="plan.json")
    show.add_argument("--rank", metavar="N", help="instead: what rank N does in a step")
    _add_profile(show)
    estimate = verbs.add_parser(
        "estimate", help="estimate an edited plan anew",
        description="Estimate a plan's seconds and memory, and write them into it with -o.",
    )  # fmt: skip
    estimate.add_argument("plan", metavar="plan.json")
    estimate.add_argument("-o", "--output", metavar="FILE", help="write the plan with its estimate")
    _add_profile(estimate)
    models = verbs.add_parser("models", help="models of the catalogue")
    devices = verbs.add_parser("devices", help="devices of the catalogue")
    for verb in (show, estimate, models, devices):
        verb.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile", metavar="FILE",
        help="measured costs (realexec profile); without: those of the plan, else peak rates",
    )  # fmt: skip


def _add_search(verbs: Any) -> None:
    add = verbs.add_parser(
        "search", help="search a plan", epilog=_SEARCH_EXAMPLES,
        description="Search the fastest plan that fits, with a lower bound.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).add_argument  # fmt: skip
    add("words", nargs="*", metavar="key=value", help="options of the algorithm")
    add(
        "--model",
        required=True,
        metavar="NAME|FOLDER",
        help="the actor's: a catalogue name, a Hugging Face folder or its config.json",
    )
    add(
        "--critic",
        metavar="NAME|FOLDER",
        help="the critic's and reward's (default: llama-7b for llama-7b to -70b, else as --model)",
    )
    add("--gpus", metavar="N", help="number of devices (default 8; 2 with --cluster local)")
    add("--device", metavar="NAME", help="device kind (default a100); see realplan devices")
    add(
        "--cluster",
        metavar="local|NAME",
        help="local: CPU workers of this machine, or the GPUs of --profile; NAME: as --device",
    )
    add(
        "--profile",
        metavar="FILE",
        help="measured costs (realexec profile); without: peak rates of the device",
    )
    add("--algorithm", default="ppo", metavar="NAME", help="default ppo")
    add("--prompt-len", metavar="N", help="longest prompt, in tokens: prompt_len=N")
    add("--response-len", metavar="N", help="longest answer, in tokens: response_len=N")
    add("--batch-size", metavar="N", help="sequences per step: batch_size=N")
    add(
        "--engine",
        default="mcmc",
        choices=sorted(ENGINES),
        help="mcmc (default), or brute for very small problems",
    )
    add(
        "--time-limit",
        default="10",
        metavar="SECONDS",
        help="cap on the walk, after options were costed (default 10)",
    )
    add("--seed", default="1", metavar="N", help="of the walk (default 1)")
    add("-o", "--output", default="plan.json", metavar="FILE", help="default plan.json")
    add("--json", action="store_true", help="print the plan as JSON instead of tables")


def _output() -> Console:
    """For results on stdout: as wide as the terminal; in a file or a pipe 100 columns."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=100) if piped else Console()


def _note(line: str) -> None:
    """A message of what goes on, on stderr."""
    _say(Console(stderr=True), line)


# ---- verbs ------------------------------------------------------------------------------------


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def make_search_problem(args: argparse.Namespace, table: CostTable | None) -> Problem:
    """The problem that the flags of ``search`` describe."""
    algorithm = find_algorithm(args.algorithm)
    sugar = [
        f"{key}={whole(getattr(args, flag), '--' + flag.replace('_', '-'), least=1)}"
        for flag, key in _SUGAR.items()
        if getattr(args, flag) is not None
    ]
    config = make_config(algorithm.config_class, [*sugar, *args.words])
    critic = args.critic or ("llama-7b" if args.model in _LLAMA_ACTORS else args.model)
    return make_problem(
        algorithm, config, model=resolve_model(args.model),
        critic=_resolve_critic(critic), paths=_paths(args, algorithm, config),
        cluster=resolve_cluster(args.cluster, args.device, args.gpus, table),
    )  # fmt: skip


def _paths(args: argparse.Namespace, algorithm: Algorithm, config: Any) -> Mapping[str, str]:
    """Each role's folder, where a flag names one.

    A critic without ``--critic`` starts from the actor's weights; a reward model does not, for
    it needs a head that was trained.
    """
    graph, found = algorithm.graph(config), {}
    folders = {"model": args.model, "critic": args.critic or args.model}
    for role, spec in algorithm.roles(config).items():
        frozen_scalar = spec.head == "scalar" and graph.train_call(role) is None
        if Path(folders[spec.source]).is_dir() and (args.critic or not frozen_scalar):
            found[role] = folders[spec.source]
    return found


def _resolve_critic(name: str) -> Any:
    try:
        return resolve_model(name)
    except ConfigError as error:
        where = "--critic" if error.where == "--model" else error.where
        raise ConfigError(error.problem, where=where, remedy=error.remedy) from None


def _provenance(args: argparse.Namespace, evaluations: int) -> Mapping[str, Any]:
    """Where a plan comes from: tool, date, profile, engine."""
    try:
        tool = version("realplan")
    except PackageNotFoundError:  # a bare checkout
        tool = "unknown"
    return {
        "tool": f"realplan {tool}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "profile": args.profile,
        "engine": args.engine,
        "evaluations": evaluations,
    }


def _search(args: argparse.Namespace) -> int:
    notes = Console(stderr=True)
    seed = whole(args.seed, "--seed", least=0)
    time_limit_s = seconds(args.time_limit, "--time-limit")
    if not Path(args.output).absolute().parent.is_dir():
        raise ConfigError(
            f"no folder for {args.output}", where="-o", remedy="name a file in one that exists"
        )
    table = load_table(args.profile)
    problem = make_search_problem(args, table)
    costs = make_costs(problem.cluster, table)
    if table is None:
        _say(notes, f"no --profile: costs are from {problem.cluster.device.name}'s peak rates")
    with notes.status("costing the options of every call") as status:
        result = search(
            problem, costs, engine=args.engine, seed=seed, time_limit_s=time_limit_s,
            progress=lambda n, s: status.update(f"{n} plans, best {format_seconds(s)} per step"),
        )  # fmt: skip
    plan = dataclasses.replace(result.plan, provenance=_provenance(args, result.evaluations))
    save_plan(plan, args.output)
    if args.json:
        print(json.dumps(plan_to_dict(plan)))
        return 0
    print_plan(plan, result.timeline, _output())
    _say(_output(), f"\n{result.evaluations} plans looked at; the best is in {args.output}")
    return 0


def _timeline(plan: ExecutionPlan, costs: CostModel) -> tuple[ExecutionPlan, Timeline]:
    """The plan with a fresh estimate, and its timeline."""
    return estimate_plan(plan, StepPrices(plan.problem, costs))


def _show(args: argparse.Namespace) -> int:
    plan = load_plan(args.plan)
    if args.rank is not None:
        _output().print(program_table(plan, whole(args.rank, "--rank", least=0)))
        return 0
    if args.json:
        print(json.dumps(plan_to_dict(plan)))
        return 0
    plan, timeline = _timeline(plan, costs_of_plan(plan, args.profile, _note))
    print_plan(plan, timeline, _output())
    return 0


def _estimate(args: argparse.Namespace) -> int:
    plan = load_plan(args.plan)
    plan, timeline = _timeline(plan, costs_of_plan(plan, args.profile, _note))
    if args.output is not None:
        save_plan(plan, args.output)
    if args.json:
        print(json.dumps(plan_to_dict(plan)["estimate"]))
        return 0
    print_plan(plan, timeline, _output())
    return 0


def _print_rows(rows: Sequence[Mapping[str, Any]], headings: Iterable[str], as_json: bool) -> int:
    if as_json:
        print(json.dumps(list(rows)))
        return 0
    table = Table()
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(str(row[heading]) for heading in headings))
    _output().print(table)
    return 0


def _models(args: argparse.Namespace) -> int:
    rows = [
        {"name": s.name, "parameters": f"{s.num_parameters / 1e9:.2f}B", "layers": s.num_layers,
         "hidden": s.hidden, "heads": s.num_heads, "kv heads": s.num_kv_heads, "vocab": s.vocab,
         "source": s.source}
        for s in MODELS.values()
    ]  # fmt: skip
    return _print_rows(rows, rows[0], args.json)


def _devices(args: argparse.Namespace) -> int:
    rows = [
        {"name": d.name, "TFLOP/s": f"{d.peak_flops / 1e12:g}",
         "memory": format_bytes(d.memory_bytes), "GB/s": f"{d.memory_bytes_per_s / 1e9:g}",
         "source": d.source}
        for d in DEVICES.values()
    ]  # fmt: skip
    return _print_rows(rows, rows[0], args.json)


_VERBS = {
    "search": _search, "show": _show, "estimate": _estimate, "models": _models,
    "devices": _devices,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a mistake in the input, 1 a mistake of ours, 130 interrupted."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        args = parse_with_words(build_parser(), argv)
        return _VERBS[args.verb](args)
    except UserError as error:
        if "--json" in (sys.argv[1:] if argv is None else argv):
            print(json.dumps({"error": str(error), "where": error.where}))
        print(f"realplan: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("realplan: interrupted before a plan was found", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
