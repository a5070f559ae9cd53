"""The verbs that read: of plans ``show``, ``estimate``, ``compare``, ``explain``, ``report`` and
``export``, of the catalogue ``models`` and ``devices``, of the installation ``doctor``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.table import Table

from planner.arguments import whole
from planner.compare import compare
from planner.console import make_table, note, output_console, say
from planner.cost import Costs
from planner.doctor import examine
from planner.explain import explain
from planner.export import EXPORTERS
from planner.plan import ExecutionPlan
from planner.plan_schema import load_plan, plan_to_dict, save_plan
from planner.report import moments_table, print_plan, program_table
from planner.report_explain import comparison_to_dict, print_comparison, print_explanation
from planner.report_html import report_page
from planner.report_trace import save_trace, write_whole
from planner.resolve import costs_of_plan, hardware_levers, make_costs, table_of_plan
from planner.search import estimate_plan
from planner.simulate import StepPrices, Timeline
from planner.sources import shares_by_source
from planner.trace import trace_of_run
from planner.whatif import WhatIf
from profiles.catalogue import MODELS
from profiles.clusters import LAPTOP, SYSTEMS
from profiles.devices import DEVICES
from profiles.errors import ConfigError
from profiles.units import format_bytes


def _timeline(plan: ExecutionPlan, costs: Costs) -> tuple[ExecutionPlan, Timeline]:
    """The plan with a fresh estimate, and its timeline."""
    return estimate_plan(plan, StepPrices(plan.problem, costs))


def run_show(args: argparse.Namespace) -> int:
    """``realplan show``: today's numbers of a plan, or what one rank does."""
    plan = load_plan(args.plan)
    if args.rank is not None:
        rank = whole(args.rank, "--rank", least=0)
        output_console().print(program_table(plan, rank))
        output_console().print(moments_table(plan, rank))
        return 0
    if args.provenance:
        costs = costs_of_plan(plan, args.profile, note)
        shares = [asdict(row) for row in shares_by_source(plan, costs)]
        rows = [
            {**row, "share": f"{row['share']:.1%}", "provenance": row["provenance"].value}
            for row in shares
        ]
        return _print_rows(shares if args.json else rows, SHARE_COLUMNS, args.json)
    if args.json:
        print(json.dumps(plan_to_dict(plan)))
        return 0
    plan, timeline = _timeline(plan, costs_of_plan(plan, args.profile, note))
    print_plan(plan, timeline, output_console())
    return 0


def run_estimate(args: argparse.Namespace) -> int:
    """``realplan estimate``: an edited plan's seconds and memory, written into it with -o."""
    plan = load_plan(args.plan)
    plan, timeline = _timeline(plan, costs_of_plan(plan, args.profile, note))
    if args.output is not None:
        save_plan(plan, args.output)
    if args.json:
        print(json.dumps(plan_to_dict(plan)["estimate"]))
        return 0
    print_plan(plan, timeline, output_console())
    return 0


def run_compare(args: argparse.Namespace) -> int:
    """``realplan compare``: two plans of one problem, or of two clusters."""
    a, b = load_plan(args.plan), load_plan(args.other)
    costs = [costs_of_plan(plan, args.profile, note) for plan in (a, b)]
    found = compare(a, b, *costs, names=(args.plan, args.other))
    if args.json:
        print(json.dumps(comparison_to_dict(found)))
        return 0
    print_comparison(found, output_console())
    return 0


def run_explain(args: argparse.Namespace) -> int:
    """``realplan explain``: what binds, where the next gain is, why not another plan."""
    plan = load_plan(args.plan)
    table = table_of_plan(plan, args.profile, note)
    links, device = hardware_levers(table)
    found = explain(plan, make_costs(plan.problem.cluster, table), links=links, device=device)
    against = None
    if args.against is not None:
        other = load_plan(args.against)
        costs = [costs_of_plan(p, args.profile, note) for p in (plan, other)]
        against = compare(plan, other, *costs, names=(args.plan, args.against))
    if args.json:
        data: dict[str, Any] = asdict(found)
        if against is not None:
            data["against"] = comparison_to_dict(against)
        print(json.dumps(data))
        return 0
    print_explanation(plan, found, output_console())
    if against is not None:
        say(output_console(), f"\nwhy not {args.against}?")
        print_comparison(against, output_console())
    return 0


def run_report(args: argparse.Namespace) -> int:
    """``realplan report``: a page, a trace for Perfetto, or both."""
    plan = load_plan(args.plan)
    if args.output is None and args.trace is None:
        raise ConfigError("nothing to write", where="report", remedy="give -o FILE or --trace FILE")
    _check_figures(args)
    executed = [] if args.run is None else trace_of_run(args.run)
    table = table_of_plan(plan, args.profile, note)
    costs = make_costs(plan.problem.cluster, table)
    plan, timeline = _timeline(plan, costs)
    if args.output is not None:
        links, device = hardware_levers(table)
        found = explain(plan, costs, links=links, device=device)
        if find_spec("plotly") is None:
            page = report_page(plan, timeline, found)
        else:
            from planner.report_figures import draw

            profile = args.profile or plan.provenance.get("profile")
            what = WhatIf(plan, profile=profile if table else None) if args.what_if else None
            page = draw(plan, timeline, found, executed=executed, what=what)
        write_whole(args.output, page)
    if args.trace is not None:
        save_trace(timeline, args.trace, executed)
    for path in (args.output, args.trace):
        if path is not None:
            say(output_console(), f"wrote {path}")
    return 0


def run_export(args: argparse.Namespace) -> int:
    """``realplan export``: a plan as another system's options, and what these cannot say."""
    found = EXPORTERS[args.to](load_plan(args.plan))
    if args.output is not None:
        write_whole(args.output, found.text)
        say(output_console(), f"wrote {args.output}")
        for sentence in found.lost:
            note(f"{found.system} cannot: {sentence}")
    elif args.json:
        print(json.dumps({"settings": dict(found.settings), "lost": found.lost}))
    else:
        print(found.text, end="")
    return 0


def _check_figures(args: argparse.Namespace) -> None:
    """What only figures of plotly show is refused where there is none; else it is said."""
    if args.output is None or find_spec("plotly") is not None:
        return
    remedy = "pip install 'realplan[notebook]'"
    if args.what_if or (args.run is not None and args.trace is None):
        flag = "--what-if" if args.what_if else "--run"
        raise ConfigError("this figure needs plotly", where=flag, remedy=remedy)
    note(f"without plotly the page's figures are static: {remedy}")


SHARE_COLUMNS = ("share", "provenance", "source")

# ---- catalogue and installation ---------------------------------------------------------------


def _print_rows(rows: Sequence[Mapping[str, Any]], headings: Iterable[str], as_json: bool) -> int:
    if as_json:
        print(json.dumps(list(rows)))
        return 0
    output_console().print(_table(rows, headings))
    return 0


def _table(rows: Sequence[Mapping[str, Any]], headings: Iterable[str]) -> Table:
    table = make_table(None, headings)
    for row in rows:
        table.add_row(*(str(row[heading]) for heading in headings))
    return table


def _print_catalogue(rows: Sequence[Mapping[str, Any]], as_json: bool) -> int:
    """A line for each name; sources, which are sentences, below where they do not fit beside."""
    all_columns = Console(width=10_000).measure(_table(rows, rows[0])).maximum
    if as_json or all_columns <= output_console().width:
        return _print_rows(rows, rows[0], as_json)
    _print_rows(rows, [heading for heading in rows[0] if heading != "source"], as_json)
    return _print_rows(rows, ("name", "source"), as_json)


def run_models(args: argparse.Namespace) -> int:
    """``realplan models``."""
    rows = [
        {"name": s.name, "parameters": f"{s.num_parameters / 1e9:.2f}B", "layers": s.num_layers,
         "hidden": s.hidden, "heads": s.num_heads, "kv heads": s.num_kv_heads, "vocab": s.vocab,
         "source": s.source}
        for s in MODELS.values()
    ]  # fmt: skip
    return _print_catalogue(rows, args.json)


def run_devices(args: argparse.Namespace) -> int:
    """``realplan devices``."""
    homes = {d: [s.name for s in SYSTEMS.values() if s.device == d] for d in DEVICES}
    homes["cpu"] = ["local", LAPTOP]
    rows = [
        {"name": d.name, "TFLOP/s": f"{d.peak_flops / 1e12:g}",
         "memory": format_bytes(d.memory_bytes), "GB/s": f"{d.memory_bytes_per_s / 1e9:g}",
         "$/hour": f"{d.dollars_per_hour:g}" if d.dollars_per_hour else "-",
         "--cluster": ", ".join(homes[d.name]),
         "source": d.source + (f"; price: {d.price_source}" if d.price_source else "")}
        for d in DEVICES.values()
    ]  # fmt: skip
    return _print_catalogue(rows, args.json)


def run_doctor(args: argparse.Namespace) -> int:
    """``realplan doctor``: 0 where the installation is whole, else 1."""
    found = examine()
    wrong = any(finding.state == "wrong" for finding in found)
    if args.json:
        print(json.dumps({"ok": not wrong, "findings": [asdict(finding) for finding in found]}))
        return int(wrong)
    console = output_console()
    for finding in found:
        mark = {"ok": "ok    ", "absent": "absent", "wrong": "WRONG "}[finding.state]
        remedy = f"; {finding.remedy}" if finding.remedy else ""
        say(console, f"{mark}  {finding.what}: {finding.text}{remedy}")
    return int(wrong)
