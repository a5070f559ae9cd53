"""What people read of a plan: its table, its estimate, a terminal timeline, memory by device.

``print_plan`` writes all of it to a rich ``Console``. Numbers come from the plan's estimate, the
simulator's timeline and the memory model; nothing is computed here but shares.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.confidence import Confidence
from planner.console import make_table
from planner.layout import Layout
from planner.memory import MemoryBreakdown
from planner.mesh import DeviceMesh
from planner.plan import Allocation, Estimate, ExecutionPlan
from planner.plan_memory import alike, fullest_device, memory_bytes_of, memory_over_time
from planner.program import (
    Average,
    Free,
    Generate,
    Instruction,
    Load,
    Offload,
    Reallocate,
    Reload,
    Reserve,
    Transfer,
    compile_plan,
    home_layouts,
)
from planner.simulate import Span, Timeline, sample_bytes
from profiles.errors import ConfigError
from profiles.hardware import Cluster
from profiles.units import GIB, MIB, format_bytes, format_seconds

_COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red", "bright_cyan", "bright_yellow")


def ranges_text(numbers: Iterable[int], *, most: int = 3) -> str:
    """Numbers as runs, cut after ``most`` of them.

    >>> ranges_text([0, 1, 2, 5, 8, 9])
    '0-2, 5, 8-9'
    >>> ranges_text([0, 2, 4, 6, 8])
    '0, 2, 4, …'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    return ", ".join(texts[:most] + (["…"] if len(texts) > most else []))


def strategy_text(allocation: Allocation) -> str:
    """``d4p8m4 sp zero recompute``: the axes, then what is switched on; ``sp`` splits tokens."""
    s = allocation.strategy
    again = {"none": "", "selective": " selective", "full": " recompute"}[s.recompute]
    return s.short + (" sp" if s.sequence_parallel else "") + (" zero" if s.zero else "") + again


def devices_text(mesh: DeviceMesh, cluster: Cluster) -> str:
    """``0-31``; where devices are of several kinds ``0-31 h100``."""
    several = len({group.device.name for group in cluster.groups}) > 1
    name = f" {cluster.group_of(mesh.first).device.name}" if several else ""
    return str(mesh).strip("[]") + name


# ---- the plan and its estimate ----------------------------------------------------------------


def plan_table(plan: ExecutionPlan) -> Table:
    """One row a call: model, mesh, strategy, micro-batches, seconds alone, share of a step."""
    estimate, problem = plan.estimate, plan.problem
    title = f"{problem.graph.name} on {problem.cluster.name}"
    numbers = ("micro", "alone", "of a\nstep")
    table = make_table(title, ("call", "model", "devices", "strategy", *numbers), whole=numbers)
    for call in problem.graph.calls:
        allocation, spec = plan.allocations[call.name], problem.spec_of(call.name)
        table.add_row(
            call.name,
            spec.name if spec else "function",
            devices_text(allocation.mesh, problem.cluster),
            strategy_text(allocation),
            str(allocation.num_micro_batches),
            *_seconds_and_share(estimate, call.name),
        )
    for label in _moves(estimate):
        table.add_row(label, "", "", "", "", *_seconds_and_share(estimate, label), style="dim")
    return table


def _moves(estimate: Estimate | None) -> list[str]:
    """Reallocations of the estimate: ``reallocate actor``."""
    return [name for name in (estimate.per_call_s if estimate else ()) if " " in name]


def _seconds_and_share(estimate: Estimate | None, label: str) -> tuple[str, str]:
    if estimate is None or label not in estimate.per_call_s:
        return "-", "-"
    seconds = estimate.per_call_s[label]
    share = seconds / estimate.step_s if estimate.step_s > 0 else 0.0
    return format_seconds(seconds), f"{share:.0%}"


def estimate_lines(plan: ExecutionPlan) -> list[str]:
    """Seconds per step, how far from the bound, against baselines, and what it rests on."""
    estimate, workload = plan.estimate, plan.problem.workload
    if estimate is None:
        return ["no estimate in this plan; realplan estimate makes one"]
    tokens = workload.num_sequences * workload.expected_tokens
    rate = f", {tokens / estimate.step_s:,.0f} tokens/s" if estimate.step_s > 0 else ""
    lines = [f"{format_seconds(estimate.step_s)} per step{rate}"]
    if estimate.lower_bound_s > 0:
        lines.append(
            f"lower bound {format_seconds(estimate.lower_bound_s)}: at most {estimate.gap:.1%} "
            "of a step can be saved by another plan under these costs"
        )
    for name, seconds in plan.baselines.items():
        ratio = seconds / estimate.step_s if estimate.step_s > 0 else 1.0
        lines.append(f"{ratio:.2f}x as fast as {BASELINE_NAMES.get(name, name)}: "
                     f"{format_seconds(seconds)}")  # fmt: skip
    shares = ", ".join(f"{share:.0%} {name}" for name, share in estimate.provenance.items())
    lines.append(f"costs: {shares or 'unknown'}")
    had = _had_bytes(plan)
    lines.append(
        f"fullest device: {format_bytes(estimate.peak_bytes)} of {format_bytes(had)} "
        f"({estimate.peak_bytes / had:.0%})"
    )
    return lines


def _had_bytes(plan: ExecutionPlan) -> int:
    """What the device has that is the fullest; which one is asked only where they are unlike."""
    sizes = {group.device.memory_bytes for group in plan.problem.cluster.groups}
    return sizes.pop() if len(sizes) == 1 else fullest_device(plan).has_bytes


def confidence_text(found: Confidence, other: str) -> str:
    """How sure it is that a plan beats ``other``, after what calibration saw of its estimates."""
    return (
        f"{found.faster:.0%} sure to beat {other}: {found.ratio_low:.2f}x to "
        f"{found.ratio_high:.2f}x as fast (90% interval)"
    )


BASELINE_NAMES = {
    "symmetric": "the best single layout of all calls",
    "split": "the best of two parts, each under one layout",
    "greedy": "call by call the fastest that fits",
}


# ---- timeline ---------------------------------------------------------------------------------


def timeline_text(timeline: Timeline, *, width: int = 100, most_rows: int = 16) -> Text:
    """One steady step as bars: a row for each group of ranks that do the same.

    The window is one period before the last step, so that what runs over its ends is seen.
    """
    ends = timeline.step_ends_s
    end_s = ends[-2] if len(ends) > 1 else ends[-1]
    start_s = end_s - timeline.step_s
    rows = _rows(timeline, start_s, end_s)
    names = [ranges_text(ranks) for ranks, _ in rows]
    margin = max(5, *(len(name) for name in names)) + 2
    bar = max(20, width - margin - 7)
    text = Text(f"{'ranks':<{margin}}{'one steady step':<{bar}} idle\n", style="bold")
    colours = _colours(timeline)
    for name, (ranks, spans) in list(zip(names, rows))[:most_rows]:
        text.append(f"{name:<{margin}}")
        text.append(_bar(spans, start_s, end_s, bar, colours))
        idle = sum(timeline.idle_share[rank] for rank in ranks) / len(ranks)
        text.append(f" {idle:>5.0%}\n")
    if len(rows) > most_rows:
        text.append(f"… and {len(rows) - most_rows} more groups of ranks\n", style="dim")
    text.append(f"{'':<{margin}}0{format_seconds(end_s - start_s):>{bar - 1}}\n", style="dim")
    return text


def _colours(timeline: Timeline) -> Mapping[str, str]:
    names = list(timeline.call_order)
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}


def _rows(
    timeline: Timeline, start_s: float, end_s: float
) -> list[tuple[list[int], Sequence[Span]]]:
    """(ranks, spans of one of them) for every group of ranks with the same visible spans."""
    length_s = end_s - start_s
    spans: dict[int, list[Span]] = defaultdict(list)
    for span in timeline.spans:
        if span.end_s > start_s and span.start_s < end_s and span.kind != "transfer":
            spans[span.rank].append(span)
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for rank in range(timeline.num_ranks):
        # A thousandth of a step is no difference that a bar can show.
        key = tuple(
            (s.label, round(s.start_s / length_s, 3), round(s.end_s / length_s, 3))
            for s in spans[rank]
        )
        groups[key].append(rank)
    return [(ranks, spans[ranks[0]]) for ranks in groups.values()]


def _bar(
    spans: Sequence[Span], start_s: float, end_s: float, width: int, colours: Mapping[str, str]
) -> Text:
    """Spans as blocks with the call's name in front; a dot where a rank is idle."""
    cells, styles = ["·"] * width, ["dim"] * width
    scale = width / (end_s - start_s) if end_s > start_s else 0.0
    for span in spans:
        first = max(0, round((span.start_s - start_s) * scale))
        last = min(width, round((span.end_s - start_s) * scale))
        room = last - first
        if room <= 0:
            continue
        moves = span.kind in ("reallocate", "reload", "offload", "average")
        fill = "░" if moves else "█"
        name = "" if moves else span.label
        shown = f"▌{name[: room - 2]} " if room > 3 else "▌"
        for offset in range(room):
            cells[first + offset] = shown[offset] if offset < len(shown) else fill
            styles[first + offset] = colours.get(span.label, "white")
    text = Text()
    for cell, style in zip(cells, styles):
        text.append(cell, style=style)
    return text


# ---- memory -----------------------------------------------------------------------------------


def memory_table(plan: ExecutionPlan, *, most_rows: int = 12) -> Table:
    """Groups of devices with equal needs at their fullest moment, the fullest first."""
    ordered = alike(plan)
    rows = [(ranges_text(devices), need, has) for devices, need, has in ordered[:most_rows]]
    table = _needs_table("on a device at its fullest moment", "devices", rows)
    if len(ordered) > most_rows:
        rest = sum(len(devices) for devices, _, _ in ordered[most_rows:])
        table.add_row(f"… {rest} more", *["" for _ in range(len(table.columns) - 1)])
    return table


def moments_table(plan: ExecutionPlan, device: int) -> Table:
    """One device's bytes over a step, in the order of its calls."""
    moments, has = memory_over_time(plan)[device], memory_bytes_of(device, plan)
    rows = [(moment.after or moment.call or "between calls", moment.need, has)
            for moment in moments]  # fmt: skip
    return _needs_table(f"on device {device} over a step", "while", rows)


def _needs_table(what: str, first: str, rows: Sequence[tuple[str, MemoryBreakdown, int]]) -> Table:
    """A row for each (what, need, bytes that there are), with the items that any has.

    Red where it is more than there is.
    """
    items = [n for n in MemoryBreakdown().items() if any(need.items()[n] for _, need, _ in rows)]
    most = max(need.total for _, need, _ in rows)
    factor, unit = (GIB, "GiB") if most >= 8 * GIB else (MIB, "MiB")
    sizes = dict.fromkeys(f"{had / factor:,.1f}" for _, _, had in rows)
    numbers = [*(_SHORT.get(item, item) for item in items), "total", "used"]
    title = f"{unit} {what}, of {' or '.join(sizes)}"
    table = make_table(title, (first, *numbers), whole=numbers)
    for label, need, had in rows:
        values = [*(need.items()[item] for item in items), need.total]
        table.add_row(
            label, *(f"{value / factor:.1f}" if value else "-" for value in values),
            f"{need.total / had:.0%}", style="red" if need.total > had else "",
        )  # fmt: skip
    return table


_SHORT = {"gradients": "grads", "optimizer": "optim", "activations": "activ", "kv_cache": "kv"}


# ---- a rank's program -------------------------------------------------------------------------


def program_table(plan: ExecutionPlan, rank: int) -> Table:
    """Everything that ``rank`` does: before the first step, then in every step.

    Raises:
        ConfigError: there is no such rank.
    """
    if not 0 <= rank < plan.num_devices:
        raise ConfigError(
            f"{rank} is not a rank of this plan", where="--rank",
            remedy=f"use 0 to {plan.num_devices - 1}",
        )  # fmt: skip
    program = compile_plan(plan)
    table = make_table(f"rank {rank}", ("#", "instruction", "what"), whole=("#",))
    for instruction in program.setup.get(rank, ()):
        table.add_row("once", *_describe(plan, rank, instruction))
    for instruction in program.ahead.first.get(rank, ()) if program.ahead else ():
        table.add_row("before", *_describe(plan, rank, instruction))
    table.add_section()
    steps = program.step.get(rank, ())
    for instruction in steps:
        table.add_row(str(instruction.index), *_describe(plan, rank, instruction))
    if not steps:
        table.add_row("", "nothing", "no call runs on this device")
    return table


def _describe(plan: ExecutionPlan, rank: int, instruction: Instruction) -> tuple[str, str]:
    name = type(instruction).__name__
    if isinstance(instruction, Reserve):
        return name, f"{instruction.role} in {instruction.destination.key}"
    if isinstance(instruction, Load | Free):
        return name, f"{instruction.role} in {instruction.layout.key}"
    if isinstance(instruction, Offload | Reload):
        way = "to" if isinstance(instruction, Offload) else "from"
        place = f"{instruction.role} in {instruction.layout.key}"
        return name, f"{instruction.what} of {place} {way} the host's memory"
    if isinstance(instruction, Average):
        moved = f"{instruction.rate:g} of the way to {instruction.of}"
        return name, f"{instruction.role} in {instruction.layout.key} moves {moved}"
    if isinstance(instruction, Reallocate):
        side = "gives" if rank not in instruction.destination.mesh else "takes"
        if rank in instruction.source.mesh and rank in instruction.destination.mesh:
            side = "gives and takes"
        moves = f"{instruction.source.key} -> {instruction.destination.key}"
        return name, f"{instruction.role}: {moves} ({side})"
    if isinstance(instruction, Transfer):
        return _describe_transfer(plan, instruction)
    allocation = plan.allocations[instruction.call]
    s = allocation.strategy
    pp_rank, dp_rank, tp_rank = s.coordinates(rank - allocation.mesh.first)
    place = f"pp {pp_rank}/{s.pp} tp {tp_rank}/{s.tp} dp {dp_rank}/{s.dp}"
    if s.ep > 1:
        place += f" ep {dp_rank % s.ep}/{s.ep}"
    if instruction.call in (call.name for call in plan.problem.graph.ahead):
        place += ", for the step that follows"
    if isinstance(instruction, Generate) and instruction.keeps:
        place += ", keeps its cache"
    return name, f"{instruction.call} on {allocation} as {place}"


def _describe_transfer(plan: ExecutionPlan, transfer: Transfer) -> tuple[str, str]:
    parcels = transfer.receives or transfer.sends
    samples = sum(len(parcel.samples) for parcel in parcels)
    num_bytes = format_bytes(samples * sample_bytes(plan.problem, transfer.keys))
    peers = ranges_text({parcel.peer for parcel in parcels})
    keys = ", ".join(transfer.keys)
    if transfer.receives:
        return "Receive", f"{keys} of {samples} samples ({num_bytes}) from rank {peers}"
    return "Send", f"{keys} of {samples} samples ({num_bytes}) to rank {peers}"


# ---- everything -------------------------------------------------------------------------------


def resident_lines(plan: ExecutionPlan) -> list[str]:
    """Where each role's weights stay, and which layouts borrow them."""
    lines = []
    for role, homes in home_layouts(plan).items():
        places = " and ".join(layout.key for layout in homes)
        calls = plan.problem.graph.calls_of(role)
        borrowed = {
            layout.key: call.name
            for call in calls
            for layout in [_layout(plan, call.name)]
            if layout not in homes
        }
        moves = "".join(f"; moves to {key} for {name}" for key, name in borrowed.items())
        lines.append(f"{role}: stays in {places}{moves}")
    return lines


def _layout(plan: ExecutionPlan, call_name: str) -> Layout:
    allocation, spec = plan.allocations[call_name], plan.problem.spec_of(call_name)
    assert spec is not None, call_name
    return Layout.of(spec, allocation.mesh, allocation.strategy)


def print_plan(plan: ExecutionPlan, timeline: Timeline, console: Console) -> None:
    """Table, estimate, timeline and memory."""
    console.print(plan_table(plan))
    for line in estimate_lines(plan):
        console.print(line, highlight=False, soft_wrap=True)
    console.print()
    console.print(timeline_text(timeline, width=min(console.width, 140)), soft_wrap=True)
    for line in resident_lines(plan):
        console.print(line, highlight=False, soft_wrap=True)
    console.print()
    console.print(memory_table(plan))
