"""Figures of a plan, of a search and of a run, drawn with plotly (extra ``notebook``).

    from planner import figures, load_plan

    plan = load_plan("plan.json")
    figures.timeline(plan)       # who does what when, in one steady step
    figures.memory(plan)         # of the fullest device, over that step
    figures.meshes(plan)         # which devices each call uses
    figures.search(plan)         # the course of the search, and its bound
    figures.levers(explanation)  # what would be gained were one thing faster
    figures.executed(spans)      # a run's trace

Figures of many scenarios are in ``figures_sweep``. Every function returns a plotly ``Figure``. The
page of ``realplan report`` is made of the same figures. Colours are Okabe and Ito's (2008), which
the colour-blind tell apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from planner.explain import Explanation, rank_groups
from planner.memory import MemoryBreakdown
from planner.mesh import node_edges
from planner.plan import ExecutionPlan
from planner.plan_memory import alike, fullest_device, memory_bytes_of, memory_over_time
from planner.report import ranges_text, strategy_text
from planner.resolve import make_costs
from planner.search import estimate_plan
from planner.simulate import StepPrices, Timeline
from planner.trace import TraceSpan, first_warm_step
from profiles.errors import ConfigError
from profiles.units import GIB, MIB, format_bytes, format_seconds

try:
    import plotly.graph_objects as go
except ModuleNotFoundError as missing:
    raise ConfigError(
        "figures need plotly", where="planner.figures", remedy="pip install 'realplan[notebook]'"
    ) from missing

# Okabe and Ito, "Color Universal Design" (2008), without black; as in report_html.
PALETTE = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999",
)  # fmt: skip
_MOVES, _TRANSFERS, _IDLE = "#000000", "#bbbbbb", "#eeeeee"
_MOST_ROWS = 32
_ROW_PIXELS = 26


def empty() -> Any:
    """A plotly figure with nothing in it yet."""
    return go.Figure()


def styled(figure: Any, *, title: str, height: int, **layout: Any) -> Any:
    """One look for all figures: white, one font, thin lines, the legend above."""
    figure.update_layout(
        title={"text": title, "font": {"size": 15}, "x": 0.0, "xref": "paper", "y": 0.98,
               "yanchor": "top"},
        font={"family": "system-ui, sans-serif", "size": 12, "color": "#222"},
        paper_bgcolor="#fff", plot_bgcolor="#fff", height=height, width=1040,
        margin={"l": 130, "r": 90, "t": 78, "b": 48},
        legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "title": {"text": ""}},
        **layout,
    )  # fmt: skip
    figure.update_xaxes(gridcolor="#ddd", linecolor="#888", zeroline=False, ticks="outside")
    figure.update_yaxes(gridcolor="#eee", linecolor="#888", zeroline=False, automargin=True)
    return figure


# ---- who does what when -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """Something that a row of a timeline is busy with, in seconds from the figure's left edge."""

    row: str
    label: str
    start_s: float
    end_s: float
    tip: str
    kind: str  # call, reallocation (all that moves weights) or transfer


def timeline(plan: ExecutionPlan, steps: Timeline | None = None) -> Any:
    """One steady step: a row for each group of ranks that do the same, idle time in grey.

    ``steps``: as simulated; without, under the costs of the plan's devices with no profile.
    """
    steps = steps or _simulated(plan)
    groups = rank_groups(steps)
    shown = groups[:_MOST_ROWS]
    start_s, end_s = _window(steps)
    # Words, for plotly takes the text "3" on an axis for the third row.
    names = {
        group.ranks[0]: f"rank{'s' * (len(group.ranks) > 1)} {ranges_text(group.ranks, most=2)}"
        for group in shown
    }
    bars = [
        Bar(row=names[span.rank], label=span.label, start_s=max(span.start_s, start_s) - start_s,
            end_s=min(span.end_s, end_s) - start_s, tip=format_seconds(span.seconds),
            kind=_kind(span.kind))
        for span in steps.spans
        if span.rank in names and span.end_s > start_s and span.start_s < end_s
    ]  # fmt: skip
    more = len(groups) - len(shown)
    title = f"One steady step: {format_seconds(steps.step_s)}"
    title += f" (and {more} more groups of ranks)" if more > 0 else ""
    idle = {names[group.ranks[0]]: group.idle_share for group in shown}
    return _gantt(bars, list(steps.call_order), idle, title=title)


def executed(spans: Sequence[TraceSpan], *, steps: int = 1) -> Any:
    """The first ``steps`` warm steps of a run as its ranks executed them.

    A transfer is also the wait for what is received, and counts as idle; so does a ``wait``, for
    weights that leave.

    Raises:
        ConfigError: the trace has no step.
    """
    first = first_warm_step(spans)
    if first is None:
        raise ConfigError("the trace has no step", where="figures.executed")
    shown = [span for span in spans if first <= span.step < first + steps]
    begin_s = min(span.start_s for span in shown)
    bars = [
        Bar(row=f"rank {span.rank}", label=span.label, start_s=span.start_s - begin_s,
            end_s=span.end_s - begin_s, tip=format_seconds(span.end_s - span.start_s),
            kind=_kind(span.kind))
        for span in sorted(shown, key=lambda span: (span.rank, span.start_s))
        if span.kind != "free"
    ]  # fmt: skip
    whole_s = max(bar.end_s for bar in bars)
    idle = {bar.row: 1.0 for bar in bars}
    for bar in bars:
        if bar.kind != "transfer":
            idle[bar.row] -= (bar.end_s - bar.start_s) / whole_s
    in_order = sorted((s for s in shown if _kind(s.kind) == "call"), key=lambda s: s.index)
    which = f"steps {first} to {first + steps - 1}" if steps > 1 else f"step {first}"
    title = f"Executed, {which}: {format_seconds(whole_s)}"
    return _gantt(bars, list(dict.fromkeys(s.label for s in in_order)), idle, title=title)


def _kind(kind: str) -> str:
    """Of a bar, from an instruction's."""
    calls = ("generate", "infer", "train", "function")
    if kind in calls:
        return "call"
    return "transfer" if kind in ("transfer", "wait") else "reallocation"


def _simulated(plan: ExecutionPlan) -> Timeline:
    costs = make_costs(plan.problem.cluster, None)
    return estimate_plan(plan, StepPrices(plan.problem, costs))[1]


def _window(steps: Timeline) -> tuple[float, float]:
    """One period before the last step, so that what runs over its ends is seen."""
    ends = steps.step_ends_s
    end_s = ends[-2] if len(ends) > 1 else ends[-1]
    return end_s - steps.step_s, end_s


def _gantt(
    bars: Sequence[Bar], calls: Sequence[str], idle: Mapping[str, float], *, title: str
) -> Any:
    """Rows from top to bottom as in ``idle``, which has each row's share; a legend by label."""
    rows = list(idle)
    whole_s = max((bar.end_s for bar in bars), default=0.0)
    figure = empty()
    figure.add_bar(
        y=rows, x=[whole_s] * len(rows), orientation="h", name="idle", marker_color=_IDLE,
        hovertemplate=[f"idle {share:.0%}<extra></extra>" for share in idle.values()],
    )  # fmt: skip
    colours = call_colours(calls)
    by_name: dict[str, list[Bar]] = {name: [] for name in [*calls, "reallocation", "transfer"]}
    for bar in bars:
        by_name[bar.label if bar.kind == "call" else bar.kind].append(bar)
    for name, found in by_name.items():
        if not found:
            continue
        colour = colours.get(name, _TRANSFERS if name == "transfer" else _MOVES)
        figure.add_bar(
            y=[bar.row for bar in found], base=[bar.start_s for bar in found],
            x=[bar.end_s - bar.start_s for bar in found], orientation="h", name=name,
            marker={"color": colour, "line": {"color": "#fff", "width": 0.5}},
            text=[bar.label if name in colours else "" for bar in found],
            textposition="inside", insidetextanchor="start", textangle=0,
            insidetextfont_color=_ink(colour),
            hovertemplate=[f"{bar.label}: {bar.tip}<extra>{bar.row}</extra>" for bar in found],
        )  # fmt: skip
    for row, share in idle.items():
        figure.add_annotation(
            x=1.0, xref="paper", y=row, text=f"{share:.0%} idle", showarrow=False,
            xanchor="left", xshift=8,
        )  # fmt: skip
    styled(
        figure, title=title, height=130 + _ROW_PIXELS * len(rows), barmode="overlay", bargap=0.2,
        uniformtext={"minsize": 10, "mode": "hide"},
    )  # fmt: skip
    figure.update_xaxes(title_text="seconds", range=[0, whole_s])
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=rows[::-1])
    return figure


def _ink(colour: str) -> str:
    """Of text on a colour."""
    return "#fff" if colour in (PALETTE[0], PALETTE[2], PALETTE[5], _MOVES) else "#222"


def call_colours(calls: Iterable[str]) -> dict[str, str]:
    """A colour for each call, the same in every figure."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(calls)}


# ---- who holds what ---------------------------------------------------------------------------


def memory(plan: ExecutionPlan, steps: Timeline | None = None, *, device: int | None = None) -> Any:
    """Bytes of one device over a steady step, by item; without ``device`` the fullest one's.

    Sequences at their longest, as everywhere in ``planner.memory``.
    """
    steps = steps or _simulated(plan)
    device = fullest_device(plan).device if device is None else device
    needs = {(m.after or m.call): m.need for m in memory_over_time(plan)[device]}
    start_s, end_s = _window(steps)
    spans = [
        span for span in steps.spans
        if span.rank == device and span.label in needs
        and span.end_s > start_s and span.start_s < end_s
    ]  # fmt: skip
    edges: list[tuple[float, str]] = [(0.0, "")]
    for span in sorted(spans, key=lambda span: span.start_s):
        edges.append((max(span.start_s - start_s, 0.0), span.label))
        edges.append((min(span.end_s, end_s) - start_s, ""))
    edges.append((end_s - start_s, edges[-1][1]))
    had = memory_bytes_of(device, plan)
    figure = empty()
    factor, unit = (GIB, "GiB") if had >= GIB else (MIB, "MiB")
    for i, item in enumerate(MemoryBreakdown().items()):
        values = [needs[label].items()[item] for _, label in edges]
        if not any(values):
            continue
        figure.add_scatter(
            x=[at_s for at_s, _ in edges], y=[value / factor for value in values],
            name=item.replace("_", " "), stackgroup="bytes", mode="lines",
            line={"shape": "hv", "width": 0.5, "color": PALETTE[i % len(PALETTE)]},
            fillcolor=PALETTE[i % len(PALETTE)],
            hovertemplate=[
                f"{item}: {format_bytes(value)}<extra>{label or 'between calls'}</extra>"
                for value, (_, label) in zip(values, edges)
            ],
        )  # fmt: skip
    _add_limit(figure, had / factor, f"has {had / factor:.1f} {unit}", "h")
    top = max([had, *(needs[label].total for _, label in edges)]) / factor
    styled(figure, title=f"Memory of device {device} over a step", height=380)
    figure.update_xaxes(title_text="seconds", range=[0, end_s - start_s])
    figure.update_yaxes(title_text=unit, range=[0, 1.08 * top])
    return figure


def fullest_moments(plan: ExecutionPlan) -> Any:
    """Bytes of each group of devices with equal needs at their fullest moment, by item."""
    ordered = alike(plan)
    rows = {ranges_text(devices, most=2): need for devices, need, _ in ordered[:_MOST_ROWS]}
    limits = sorted({has for _, _, has in ordered})
    had = limits[-1]
    factor, unit = (GIB, "GiB") if had >= GIB else (MIB, "MiB")
    figure = empty()
    for i, item in enumerate(MemoryBreakdown().items()):
        values = [need.items()[item] for need in rows.values()]
        if any(values):
            figure.add_bar(
                y=list(rows), x=[value / factor for value in values], orientation="h",
                name=item.replace("_", " "), marker_color=PALETTE[i % len(PALETTE)],
                hovertemplate=[f"{item}: {format_bytes(value)}<extra></extra>" for value in values],
            )  # fmt: skip
    for limit in limits:
        kind = "" if len(limits) == 1 else f"{_named(limit, plan)} "
        _add_limit(figure, limit / factor, f"{kind}has {limit / factor:.1f} {unit}", "v")
    more = len(ordered) - len(rows)
    title = "Memory of devices at their fullest moment"
    title += f" (and {more} more groups)" if more > 0 else ""
    styled(figure, title=title, height=150 + _ROW_PIXELS * len(rows), barmode="stack", bargap=0.2)
    top = max([had, *(need.total for need in rows.values())]) / factor
    figure.update_xaxes(title_text=unit, range=[0, 1.05 * top])
    figure.update_yaxes(
        title_text="devices", type="category", categoryorder="array", categoryarray=[*rows][::-1]
    )
    return figure


def _named(memory_bytes: int, plan: ExecutionPlan) -> str:
    """The devices that have so much."""
    groups = plan.problem.cluster.groups
    names = (g.device.name for g in groups if g.device.memory_bytes == memory_bytes)
    return " and ".join(dict.fromkeys(names))


def _add_limit(figure: Any, at: float, text: str, way: str) -> None:
    line = {"line_dash": "dash", "line_color": "#000", "line_width": 1, "annotation_text": text}
    if way == "h":
        figure.add_hline(y=at, annotation_position="top left", **line)
    else:
        figure.add_vline(x=at, annotation_position="top right", **line)


def meshes(plan: ExecutionPlan) -> Any:
    """A row for each call, the cluster from left to right; lines divide nodes."""
    cluster = plan.problem.cluster
    calls = [call.name for call in plan.problem.graph.calls]
    colours = call_colours(calls)
    figure = empty()
    for name in calls:
        allocation = plan.allocations[name]
        text = f"{strategy_text(allocation)} x{allocation.num_micro_batches}"
        figure.add_bar(
            y=[name], base=[allocation.mesh.first], x=[allocation.mesh.num_devices],
            orientation="h", marker_color=colours[name], showlegend=False, text=[text],
            textposition="inside", insidetextanchor="start", textangle=0,
            insidetextfont_color=_ink(colours[name]),
            hovertemplate=f"{name}: {allocation}<extra></extra>",
        )  # fmt: skip
    edges = node_edges(cluster)
    for edge in edges:
        figure.add_vline(x=edge, line_color="#888", line_width=0.6, layer="above")
    styled(
        figure, title="Devices of each call", height=120 + _ROW_PIXELS * len(calls), bargap=0.2,
        barmode="overlay", uniformtext={"minsize": 10, "mode": "show"},
    )  # fmt: skip
    figure.update_layout(margin_t=46)
    figure.update_xaxes(
        title_text="device", range=[0, cluster.num_devices], tickvals=edges, showgrid=False
    )
    figure.update_yaxes(categoryorder="array", categoryarray=calls[::-1])
    return figure


# ---- how good it is ---------------------------------------------------------------------------


def search(plan: ExecutionPlan) -> Any:
    """The best plan and the lower bound while the search went on.

    Raises:
        ConfigError: the plan does not hold the course of its search.
    """
    rows = plan.provenance.get("progress")
    if not rows:
        raise ConfigError(
            "the plan has no course of a search", where="provenance.progress",
            remedy="plans of realplan search and of WhatIf have",
        )  # fmt: skip
    at_s, plans, best_s, bound_s = (list(column) for column in zip(*rows))
    figure = empty()
    for name, values, colour, dash in (
        ("best plan", best_s, PALETTE[0], "solid"), ("lower bound", bound_s, PALETTE[5], "dash"),
    ):  # fmt: skip
        figure.add_scatter(
            x=at_s, y=values, name=name, mode="lines+markers",
            line={"shape": "hv", "color": colour, "dash": dash}, marker_size=5,
            hovertemplate=[
                f"{value:.4g} s after {count:,.0f} plans<extra>{name}</extra>"
                for value, count in zip(values, plans)
            ],
        )  # fmt: skip
    gap = 1.0 - bound_s[-1] / best_s[-1]
    title = f"The search: {plans[-1]:,.0f} plans looked at, gap {gap:.1%}"
    styled(figure, title=title, height=330)
    figure.update_xaxes(title_text="seconds of search", rangemode="tozero")
    figure.update_yaxes(title_text="seconds of a step")
    return figure


def levers(found: Explanation, *, most_rows: int = 12) -> Any:
    """Seconds of a step saved were one thing faster and the plan the same, the largest first."""
    kept = [lever for lever in found.levers if lever.step_s < found.step_s * 0.999][:most_rows]
    saved_s = [found.step_s - lever.step_s for lever in kept]
    figure = empty()
    figure.add_bar(
        y=[lever.what for lever in kept], x=saved_s, orientation="h", marker_color=PALETTE[0],
        text=[f"{format_seconds(s)} ({s / found.step_s:.1%})" for s in saved_s],
        textposition="outside", cliponaxis=False, hoverinfo="skip",
    )  # fmt: skip
    styled(
        figure, title="Saved of a step, were one thing faster", bargap=0.25,
        height=120 + _ROW_PIXELS * max(1, len(kept)),
    )  # fmt: skip
    figure.update_layout(margin_t=46)
    figure.update_xaxes(title_text="seconds", range=[0, 1.15 * max(saved_s, default=1.0)])
    figure.update_yaxes(categoryorder="array", categoryarray=[lever.what for lever in kept][::-1])
    return figure
