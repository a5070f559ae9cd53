"""``realplan calibrate``: what runs teach of a profile, shown and written into a new one."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from rich.table import Table

from planner.calibrate import Judgement, RunRecord, fit, judge, observe
from planner.console import make_table, note, output_console, say
from profiles.calibration import Calibration
from profiles.errors import ConfigError
from profiles.table import CostTable
from profiles.units import format_seconds


def run_calibrate(args: argparse.Namespace) -> int:
    """Fit, show before and after, write."""
    table = CostTable.load(args.profile)
    names = [str(Path(folder)) for folder in args.runs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError("is named twice", where=name, remedy="name every run once")
    output = Path(args.output)
    if not output.absolute().parent.is_dir():
        raise ConfigError(
            f"no folder for {args.output}", where="-o", remedy="name a file in one that exists"
        )
    runs = [observe(folder, table) for folder in names]
    observations = [o for run in runs for o in run.observations]
    if not observations:
        raise ConfigError(
            "no call took a millisecond or more", where=names[0],
            remedy="calibrate with runs of real size",
        )  # fmt: skip
    for run in runs:
        cluster = run.plan.problem.cluster
        device = ", ".join(dict.fromkeys(group.device.name for group in cluster.groups))
        if device != table.device.name:
            note(f"{run.name} was planned for {device}, the profile is of {table.device.name}")
    calibration = fit(
        observations,
        source=f"realplan calibrate {args.profile}, {len(runs)} runs: {', '.join(names)}",
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    verdicts = judge(runs)
    dataclasses.replace(table, calibration=calibration).save(output)
    if args.json:
        shown = {
            "calibration": calibration.to_dict(),
            "errors": [asdict(verdict) for verdict in verdicts],
            "observations": [asdict(o) for o in observations],
        }
        print(json.dumps(shown))
        return 0
    console = output_console()
    console.print(_observation_table(runs, calibration))
    console.print(_correction_table(calibration, verdicts))
    say(console, f"written to {output}; realplan search --profile {output} uses it")
    return 0


def _observation_table(runs: Sequence[RunRecord], calibration: Calibration) -> Table:
    numbers = ("predicted", "corrected", "measured", "error", "corrected")
    table = make_table("predicted and measured seconds", ("run", "call", *numbers), whole=numbers)
    for run in runs:
        rows = [
            (o.label, o.predicted_s, o.predicted_s * calibration.factors[o.phase], o.measured_s)
            for o in run.observations
        ]
        rows.append(
            (
                "step", run.predicted_step_s({}), run.predicted_step_s(calibration.factors),
                run.step_s,
            )
        )  # fmt: skip
        for number, (label, before_s, after_s, measured_s) in enumerate(rows):
            table.add_row(
                run.name if number == 0 else "", label, format_seconds(before_s),
                format_seconds(after_s), format_seconds(measured_s),
                f"{before_s / measured_s - 1.0:+.0%}", f"{after_s / measured_s - 1.0:+.0%}",
                end_section=number == len(rows) - 1,
            )  # fmt: skip
    return table


def _correction_table(calibration: Calibration, verdicts: Sequence[Judgement]) -> Table:
    title = "factors, and median errors before, after, and with the run itself left out"
    numbers = ("factor", "90% interval", "seen", "before", "after", "left out")
    table = make_table(title, ("phase", *numbers), whole=numbers)
    for verdict in verdicts:
        found = calibration.of(verdict.what)
        interval = factor = ""
        if found is not None:
            factor = f"{found.factor:.3f}"
            known = found.low is not None and found.high is not None
            interval = f"{found.low:.3f} to {found.high:.3f}" if known else "seen once"
        table.add_row(
            verdict.what, factor, interval, str(verdict.count), f"{verdict.before:.1%}",
            f"{verdict.after:.1%}",
            "" if verdict.held_out is None else f"{verdict.held_out:.1%}",
        )  # fmt: skip
    return table
