"""After a run: predicted against measured seconds, call by call, as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from executor.run import Run
from executor.trace import write_json
from planner.console import make_table
from planner.graph import CallKind
from planner.trace import first_warm_step, measured_seconds, read_trace, step_seconds
from profiles.units import format_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One call's seconds (or the whole step's): the plan's estimate, if any, and the run's."""

    call: str
    predicted_s: float | None
    measured_s: float

    @property
    def error(self) -> float | None:
        """(predicted - measured) / measured."""
        if self.predicted_s is None or self.measured_s <= 0:
            return None
        return self.predicted_s / self.measured_s - 1.0


def compare(run: Run) -> list[Comparison]:
    """Every call that runs a model, reallocations, and the step; the first step is left out
    where there are more: it holds warm-up. Nothing where a resumed run had no step left to do."""
    spans = read_trace(run.output / "trace")
    first = first_warm_step(spans)
    if first is None:
        return []
    measured = measured_seconds(spans, first_step=first)
    estimate = run.plan.estimate
    per_call = estimate.per_call_s if estimate else {}
    rows = [
        Comparison(
            call=call.name, predicted_s=per_call.get(call.name), measured_s=measured[call.name]
        )
        for call in run.plan.problem.graph.calls
        if call.kind is not CallKind.FUNCTION and call.name in measured
    ]
    rows += [
        Comparison(call=label, predicted_s=per_call.get(label), measured_s=seconds)
        for label, seconds in measured.items()
        if label.startswith("reallocate ")
    ]
    whole = step_seconds(spans, first_step=first)
    rows.append(
        Comparison(call="step", predicted_s=estimate.step_s if estimate else None, measured_s=whole)
    )
    return rows


def print_comparison(rows: list[Comparison], console: Console) -> None:
    numbers = ("predicted", "measured", "error")
    title = "predicted and measured seconds of a step"
    table = make_table(title, ("call", *numbers), whole=numbers)
    for row in rows:
        table.add_row(
            row.call,
            "-" if row.predicted_s is None else format_seconds(row.predicted_s),
            format_seconds(row.measured_s),
            "-" if row.error is None else f"{row.error:+.0%}",
            end_section=row is rows[-2] if len(rows) > 1 else False,
        )
    console.print(table)


def saved_models(output: Path) -> list[Path]:
    """Folders of saved models under a run's output, oldest step first."""
    folders = [file.parent for file in output.glob("*/epoch*globalstep*/config.json")]
    return sorted(folders, key=lambda f: (f.parent.name, int(f.name.rpartition("globalstep")[2])))


def write_summary(rows: list[Comparison], run: Run) -> None:
    """``summary.json``: the comparison, of the steps under the last plan, the saved models, who
    generated, and whether other plans would have drawn the same answers."""
    write_json(
        run.output / "summary.json",
        {
            "calls": [{**asdict(row), "error": row.error} for row in rows],
            # What ran under other plans before: each with its plan and trace.
            "before": [str(path) for path in sorted((run.output / "before").glob("step*"))],
            "models": [str(path) for path in saved_models(run.output)],
            "generation_backend": run.config.generation_backend,
            "plan_independent": answers_are_plan_independent(run),
        },
    )


def answers_are_plan_independent(run: Run) -> bool:
    """Whether every plan gives this run's answers: vLLM's noise is its own, unless it is greedy."""
    generates = any(c.kind is CallKind.GENERATE for c in run.plan.problem.graph.calls)
    if not generates or run.config.generation_backend == "own":
        return True
    options = getattr(run.config, "generation", None)
    return bool(getattr(options, "greedy", False))
