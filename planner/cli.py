"""``realplan``: searches plans, shows them, estimates edited ones.

realplan search --model llama-70b --gpus 128
realplan show plan.json

Messages of what goes on are on stderr, results on stdout; ``--json`` prints them for machines.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from planner.arguments import parse_with_words
from planner.cli_calibrate import run_calibrate
from planner.cli_plans import (
    run_compare,
    run_devices,
    run_doctor,
    run_estimate,
    run_explain,
    run_export,
    run_models,
    run_report,
    run_show,
)
from planner.cli_search import run_baselines, run_search
from planner.export import EXPORTERS
from planner.search import ENGINES
from profiles.errors import ConfigError, UserError

_DESCRIPTION = "Search how to run an RLHF training step on a cluster, and see how good that is."
_SEARCH_EXAMPLES = """examples:
  realplan search --model llama-70b --gpus 128
  realplan search --model llama-13b --gpus 16 --response-len 2048 batch_size=256 ppo.kl_coef=0.05
  realplan search --model models/sft --cluster local --gpus 2 --profile profile.json
  realplan search --model llama-70b --device h100:64+l40s:32    # groups of unlike nodes

Everything after the flags is key=value: any option of the algorithm (see its config), and

  memory_limit=70GiB              of each device
  gap=0.02                        stop at 2% from the lower bound
  cluster.inter_link.bytes_per_s=12.5GB    any field of the cluster
  cluster.groups.0.device.memory_bytes=40GiB    of groups of unlike nodes, any field of one
"""
_SHOW_EXAMPLES = """examples:
  realplan show plan.json              # table, timeline, memory by device
  realplan show plan.json --rank 5     # what rank 5 does in a step
"""
_COMPARE_EXAMPLES = """examples:
  realplan compare plan.json mine.json       # which is faster, and which call makes it so
  realplan compare a100.json h100.json       # one problem on two clusters
"""
_EXPLAIN_EXAMPLES = """examples:
  realplan explain plan.json                       # what binds, and where the next gain is
  realplan explain plan.json --against mine.json   # why not this plan of mine
"""
_REPORT_EXAMPLES = """examples:
  realplan report plan.json -o report.html --trace predicted.json
  realplan report plan.json -o report.html --what-if     # and other clusters, and what matters
  realplan report plan.json --trace both.json --run runs/ppo    # predicted above executed
"""
_CALIBRATE_EXAMPLES = """examples:
  realplan calibrate profile.json runs/ppo runs/ppo2 -o calibrated.json
  realplan search --model models/sft --cluster local --gpus 2 --profile calibrated.json
"""
_EXPORT_EXAMPLES = """examples:
  realplan export plan.json --to verl -o run_verl.sh
"""
_BASELINES_EXAMPLES = """examples:
  realplan baselines --model llama-13b --gpus 16
  realplan baselines --model llama-13b --gpus 16 -o plans     # plans/symmetric.json, …
"""


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
    _add_baselines(verbs)
    show = _verb(
        verbs, "show", "print a plan: table, timeline, memory", _SHOW_EXAMPLES,
        "Print a plan. Costs are those of the profile that the plan names.",
    )  # fmt: skip
    show.add_argument("plan", metavar="plan.json")
    show.add_argument("--rank", metavar="N", help="instead: what rank N does in a step")
    show.add_argument(
        "--provenance", action="store_true",
        help="instead: share of the calls' seconds that rests on each measured table or formula",
    )  # fmt: skip
    estimate = _verb(
        verbs, "estimate", "estimate an edited plan anew", None,
        "Estimate a plan's seconds and memory, and write them into it with -o.",
    )  # fmt: skip
    estimate.add_argument("plan", metavar="plan.json")
    estimate.add_argument("-o", "--output", metavar="FILE", help="write the plan with its estimate")
    compare = _verb(
        verbs, "compare", "two plans side by side", _COMPARE_EXAMPLES,
        "Compare plans of one problem, or of one problem on two clusters.",
    )  # fmt: skip
    compare.add_argument("plan", metavar="a.json")
    compare.add_argument("other", metavar="b.json")
    explain = _verb(
        verbs, "explain", "what binds, and where the next gain is", _EXPLAIN_EXAMPLES,
        "Say what binds a plan: the critical cycle, idle devices, parts of calls, memory.",
    )  # fmt: skip
    explain.add_argument("plan", metavar="plan.json")
    explain.add_argument("--against", metavar="FILE", help="another plan: why not that one")
    report = _verb(
        verbs, "report", "a plan as a page, or as a trace for Perfetto", _REPORT_EXAMPLES,
        "Write a plan's timeline, meshes, memory and levers as a page that needs no network.",
    )  # fmt: skip
    report.add_argument("plan", metavar="plan.json")
    report.add_argument("-o", "--output", metavar="FILE", help="the page: report.html")
    report.add_argument("--trace", metavar="FILE", help="the predicted steps, for ui.perfetto.dev")
    report.add_argument("--run", metavar="FOLDER", help="a run's: its steps as well")
    report.add_argument(
        "--what-if", action="store_true",
        help="search other clusters, and what matters most: minutes at 128 devices",
    )  # fmt: skip
    export = _verb(
        verbs, "export", "a plan as options of verl, OpenRLHF or NeMo-RL", _EXPORT_EXAMPLES,
        "Write a plan as options of another system, and say what these cannot express.",
    )  # fmt: skip
    export.add_argument("plan", metavar="plan.json")
    export.add_argument("--to", required=True, choices=sorted(EXPORTERS), help="the system")
    export.add_argument("-o", "--output", metavar="FILE", help="a shell script (default: stdout)")
    _add_calibrate(verbs)
    models = verbs.add_parser("models", help="models of the catalogue")
    devices = verbs.add_parser("devices", help="devices of the catalogue")
    doctor = verbs.add_parser(
        "doctor", help="is this installation whole?",
        description="Check versions, packages, devices, and search a tiny plan; exit 0 or 1.",
    )  # fmt: skip
    for verb in (show, estimate, compare, explain, report):
        _add_profile(verb)
    for verb in (show, estimate, compare, explain, export, models, devices, doctor):
        verb.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_calibrate(verbs: Any) -> None:
    calibrate = _verb(
        verbs, "calibrate", "correct a profile by what runs have measured", _CALIBRATE_EXAMPLES,
        "Compare traces of runs with their estimates, fit a factor for each phase of a step with "
        "its interval, and write a profile that has them.",
    )  # fmt: skip
    add = calibrate.add_argument
    add("profile", metavar="profile.json", help="that the runs' plans are priced with")
    add("runs", nargs="+", metavar="FOLDER", help="output folders of realexec run")
    add("-o", "--output", default="calibrated.json", metavar="FILE", help="calibrated.json")
    add("--json", action="store_true", help="print JSON")


def _verb(
    verbs: Any, name: str, summary: str, examples: str | None, description: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=summary, epilog=examples, description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    return parser


def _add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile", metavar="FILE",
        help="measured costs (realexec profile); without: those of the plan, else peak rates",
    )  # fmt: skip


def _add_search(verbs: Any) -> None:
    search = _verb(
        verbs, "search", "search a plan", _SEARCH_EXAMPLES,
        "Search the fastest plan that fits, with a lower bound.",
    )  # fmt: skip
    _add_problem(search)
    add = search.add_argument
    add(
        "--engine",
        default="auto",
        choices=sorted(ENGINES),
        help="auto (default): a walk, then a proof; mcmc, exact: one of them; descent; brute: all",
    )
    add(
        "--time-limit",
        default="10",
        metavar="SECONDS",
        help="cap on the search, after options were costed (default 10)",
    )
    add("--seed", default="1", metavar="N", help="of the walk (default 1)")
    add("-o", "--output", default="plan.json", metavar="FILE", help="default plan.json")
    add("--json", action="store_true", help="print the plan as JSON instead of tables")


def _add_baselines(verbs: Any) -> None:
    baselines = _verb(
        verbs, "baselines", "what people do without a search", _BASELINES_EXAMPLES,
        "Estimate the best plans of three simple kinds: one layout for all, two halves, and every "
        "call at its fastest alone.",
    )  # fmt: skip
    _add_problem(baselines)
    baselines.add_argument("-o", "--output", metavar="FOLDER", help="write their plans there")
    baselines.add_argument("--json", action="store_true", help="print the plans as JSON")


def _add_problem(parser: argparse.ArgumentParser) -> None:
    """What is to be planned: the flags of ``search`` and ``baselines``."""
    add = parser.add_argument
    add("words", nargs="*", metavar="key=value", help="options of the algorithm and the planner")
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
    add(
        "--device",
        metavar="NAME",
        help="device kind (default a100), see realplan devices; h100:64+l40s:32: groups of unlike "
        "nodes, each call on devices of one of them",
    )
    add(
        "--cluster",
        metavar="local|NAME|FILE",
        help="local: CPU workers of this machine, or the GPUs of --profile; NAME: dgx-h100, p4d, "
        "laptop, … (see realplan devices), or as --device; FILE: a cluster.yaml, also with groups "
        "of unlike nodes (see planner/cluster_file.py)",
    )
    add(
        "--profile",
        metavar="FILE",
        help="measured costs (realexec profile); without: shipped tables of the device",
    )
    add("--algorithm", "--experiment", default="ppo", metavar="NAME|FILE.py", help="default ppo")
    add(
        "--prompt-len",
        metavar="N",
        help="longest prompt, in tokens: prompt_len=N; seconds are for prompts of that length, or "
        "of data.prompt_mean=N",
    )
    add("--response-len", metavar="N", help="longest answer, in tokens: response_len=N")
    add("--batch-size", metavar="N", help="sequences per step: batch_size=N")


class _Once(logging.Filter):
    """Lets a message pass once: several costs of one table each warn of it."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        known = text in self._told
        self._told.add(text)
        return not known


_VERBS = {
    "search": run_search, "baselines": run_baselines, "show": run_show, "estimate": run_estimate,
    "compare": run_compare, "explain": run_explain, "report": run_report, "export": run_export,
    "calibrate": run_calibrate, "models": run_models, "devices": run_devices, "doctor": run_doctor,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a mistake in the input, 1 a mistake of ours, 130 interrupted."""
    handler = logging.StreamHandler()
    handler.addFilter(_Once())
    logging.basicConfig(format="%(levelname)s: %(message)s", handlers=[handler])
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
