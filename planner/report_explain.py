"""What people read of ``explain`` and ``compare``: tables and sentences for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from planner.compare import Comparison, Side
from planner.console import make_table, say
from planner.cost.pipeline import PARTS
from planner.explain import CriticalCycle, CycleStep, Explanation, RankGroup
from planner.plan import ExecutionPlan
from planner.report import confidence_text, ranges_text, strategy_text
from profiles.units import format_bytes, format_seconds

_SHORT_PARTS = {
    "tensor_parallel": "tp", "pipeline_bubble": "bubble", "pipeline_p2p": "p2p",
    "data_parallel": "dp", "optimizer": "optim",
}  # fmt: skip
_LEAST_SHARE = 0.001  # of a step: what is shorter is told as a sum


def print_explanation(plan: ExecutionPlan, found: Explanation, console: Console) -> None:
    """Cycle, idle, parts of calls, memory, levers."""
    say(console, f"{format_seconds(found.step_s)} per step")
    console.print(cycle_table(found.cycle))
    console.print(parts_table(found))
    console.print(idle_table(found.groups))
    for line in memory_lines(found):
        say(console, line)
    console.print(lever_table(found))


def cycle_table(cycle: CriticalCycle) -> Table:
    """The chain that sets the pace, in order; what is below a thousandth of it is one row."""
    steps = "one step" if cycle.num_steps == 1 else f"{cycle.num_steps} steps"
    title = f"what sets the pace: each waits for the one before it ({steps})"
    numbers = ("seconds", "share")
    table = make_table(title, ("what", "ranks", *numbers), whole=numbers)
    brief_s = 0.0
    for step in cycle.steps:
        if step.seconds < _LEAST_SHARE * cycle.seconds:
            brief_s += step.seconds
            continue
        table.add_row(*_cycle_row(step, cycle.seconds))
    if brief_s > 0:
        table.add_row("transfers and others", "", format_seconds(brief_s), "", style="dim")
    return table


def _cycle_row(step: CycleStep, whole_s: float) -> tuple[str, str, str, str]:
    later = f" of step +{step.step}" if step.step else ""
    share = f"{step.seconds / whole_s:.0%}" if whole_s > 0 else ""
    return step.label + later, ranges_text(step.ranks), format_seconds(step.seconds), share


def parts_table(found: Explanation) -> Table:
    """Seconds of each call by what they are spent on."""
    known = [part for part in PARTS if any(c.parts.get(part) for c in found.calls.values())]
    others = dict.fromkeys(part for cost in found.calls.values() for part in cost.parts)
    parts = [*known, *(part for part in others if part not in PARTS)]
    numbers = [_SHORT_PARTS.get(part, part) for part in parts]
    longest_s = max((s for cost in found.calls.values() for s in cost.parts.values()), default=0.0)
    unit, each_s = ("seconds", 1.0) if longest_s >= 1.0 else ("milliseconds", 1e-3)
    table = make_table(f"{unit} of each call alone", ("call", *numbers), whole=numbers)
    for name, cost in found.calls.items():
        seconds = (cost.parts.get(part, 0.0) for part in parts)
        table.add_row(name, *(f"{s / each_s:,.3f}" if s > 0 else "-" for s in seconds))
    return table


def idle_table(groups: Sequence[RankGroup], *, most_rows: int = 12) -> Table:
    """Groups of ranks, those that wait most first."""
    table = make_table("who waits", ("ranks", "idle", "busy with"), whole=("idle",))
    ordered = sorted(groups, key=lambda group: -group.idle_share)
    for group in ordered[:most_rows]:
        busy = sorted(group.busy_s.items(), key=lambda item: -item[1])
        texts = [f"{label} {format_seconds(s)}" for label, s in busy[:4]]
        names = ", ".join(texts) + (f" and {len(busy) - 4} more" if len(busy) > 4 else "")
        table.add_row(ranges_text(group.ranks), f"{group.idle_share:.0%}", names or "nothing")
    if len(ordered) > most_rows:
        rest = sum(len(group.ranks) for group in ordered[most_rows:])
        table.add_row(f"… {rest} more", "", "")
    return table


def memory_lines(found: Explanation) -> list[str]:
    """The fullest device, its largest items, and what is left."""
    full = found.fullest
    items = sorted(full.need.items().items(), key=lambda item: -item[1])
    texts = ", ".join(f"{name} {format_bytes(size)}" for name, size in items[:3] if size)
    left = full.headroom_bytes
    state = f"{format_bytes(left)} left" if left >= 0 else f"{format_bytes(-left)} too little"
    return [
        f"memory: device {full.device} is the fullest, {format_bytes(full.need.total)} of "
        f"{format_bytes(full.has_bytes)} ({state}); most is {texts}"
    ]


def lever_table(found: Explanation, *, most_rows: int = 12) -> Table:
    """Where the next gain is: the same plan with one thing faster."""
    numbers = ("a step", "saved")
    table = make_table("the same plan, were one thing faster", ("what", *numbers), whole=numbers)
    useful = [a for a in found.levers if a.step_s < found.step_s * (1.0 - _LEAST_SHARE)]
    for lever in useful[:most_rows]:
        saved = 1.0 - lever.step_s / found.step_s
        table.add_row(lever.what, format_seconds(lever.step_s), f"{saved:.1%}")
    if len(found.levers) > len(useful):
        rest = len(found.levers) - len(useful)
        table.add_row(f"{rest} others save less than 0.1%", "", "", style="dim")
    return table


# ---- comparison -------------------------------------------------------------------------------


def print_comparison(found: Comparison, console: Console) -> None:
    """Side by side, then what makes the difference."""
    console.print(comparison_table(found))
    for line in comparison_lines(found):
        say(console, line)


def comparison_table(found: Comparison) -> Table:
    """A row for each call and move, then step, memory; columns of both plans."""
    columns = [f"{side}\n{what}" for side in "AB" for what in ("devices", "strategy", "alone")]
    numbers = [name for name in columns if name.endswith("alone")]
    table = make_table(f"A: {found.a.name}   B: {found.b.name}", ("", *columns), whole=numbers)
    for call in found.a.plan.problem.graph.calls:
        cells = [cell for side in (found.a, found.b) for cell in _call_cells(side, call.name)]
        same = found.a.plan.allocations[call.name] == found.b.plan.allocations[call.name]
        table.add_row(call.name, *cells, style="dim" if same else "")
    moves = dict.fromkeys(
        name for side in (found.a, found.b) for name in _per_call(side) if " " in name
    )
    for name in moves:
        table.add_row(name, *(c for s in (found.a, found.b) for c in ("", "", _alone(s, name))))
    table.add_row(
        "a step", "", "", format_seconds(found.a.step_s), "", "", format_seconds(found.b.step_s)
    )
    memory = [f"{format_bytes(side.fullest.need.total)}" for side in (found.a, found.b)]
    table.add_row("fullest device", "", "", memory[0], "", "", memory[1])
    return table


def _per_call(side: Side) -> Mapping[str, float]:
    assert side.plan.estimate is not None
    return side.plan.estimate.per_call_s


def _alone(side: Side, name: str) -> str:
    seconds = _per_call(side).get(name)
    return "-" if seconds is None else format_seconds(seconds)


def _call_cells(side: Side, name: str) -> tuple[str, str, str]:
    allocation = side.plan.allocations[name]
    strategy = f"{strategy_text(allocation)} x{allocation.num_micro_batches}"
    return str(allocation.mesh).strip("[]"), strategy, _alone(side, name)


def comparison_lines(found: Comparison) -> list[str]:
    """Which is faster and why, in sentences."""
    lines = []
    for field, (a, b) in found.clusters_differ.items():
        lines.append(f"clusters differ in {field}: {a} and {b}")
    fast, slow = found.faster, found.slower
    if fast.step_s == slow.step_s:
        return [*lines, "both take equally long"]
    lines.append(
        f"{fast.name} is faster: {format_seconds(fast.step_s)} instead of "
        f"{format_seconds(slow.step_s)} a step, {1 - fast.step_s / slow.step_s:.1%} less"
    )
    if found.confidence is not None:
        lines.append(f"{fast.name} is {confidence_text(found.confidence, slow.name)}")
    for side in (fast, slow):
        if side.fullest.headroom_bytes < 0:
            lacks = format_bytes(-side.fullest.headroom_bytes)
            lines.append(f"{side.name} does not fit: device {side.fullest.device} lacks {lacks}")
        lines.append(f"the pace of {side.name}: {_pace(side.cycle)}")
    for swap in found.swaps:
        change = swap.step_s - slow.step_s
        way = f"{format_seconds(abs(change))} {'less' if change < 0 else 'more'}"
        effect = "changes nothing" if abs(change) < _LEAST_SHARE * slow.step_s else f"is {way}"
        unfit = "" if swap.headroom_bytes >= 0 else (
            f", but lacks {format_bytes(-swap.headroom_bytes)} on a device"
        )  # fmt: skip
        lines.append(
            f"{slow.name} with {swap.call} as in {fast.name} ({swap.allocation}) {effect}{unfit}"
        )
    return lines


def _pace(cycle: CriticalCycle) -> str:
    """The longest steps of a cycle in order of time."""
    shown = [step for step in cycle.steps if step.seconds >= 0.02 * cycle.seconds]
    whole = "" if cycle.num_steps == 1 else f" (over {cycle.num_steps} steps)"
    return " → ".join(f"{s.label} {format_seconds(s.seconds)}" for s in shown) + whole


def comparison_to_dict(found: Comparison) -> dict[str, Any]:
    """For ``--json``: seconds, bytes, and the effect of each swap."""
    sides = {
        key: {
            "name": side.name,
            "step_s": side.step_s,
            "per_call_s": dict(_per_call(side)),
            "peak_bytes": side.fullest.need.total,
            "headroom_bytes": side.fullest.headroom_bytes,
            "allocations": {name: str(a) for name, a in side.plan.allocations.items()},
            "cycle": asdict(side.cycle),
        }
        for key, side in (("a", found.a), ("b", found.b))
    }
    swaps = [
        {"call": s.call, "allocation": str(s.allocation), "step_s": s.step_s,
         "headroom_bytes": s.headroom_bytes}
        for s in found.swaps
    ]  # fmt: skip
    clusters = {field: list(values) for field, values in found.clusters_differ.items()}
    sure = None if found.confidence is None else asdict(found.confidence)
    return {
        **sides, "faster": found.faster.name, "clusters_differ": clusters, "swaps": swaps,
        "confidence": sure,
    }  # fmt: skip
