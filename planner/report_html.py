"""``realplan report``: a plan as one HTML page that needs no network.

Here are its tables, and figures that need no script and no plotting library: SVG with a tooltip on
every mark. Where plotly is installed the figures are those of ``report_figures``.

The timeline of a steady step by group of ranks, memory over a step's calls by item, a map of the
meshes, and what binds. Colours are Okabe and Ito's (2008), which the colour-blind tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from planner.explain import Explanation, RankGroup
from planner.memory import MemoryBreakdown
from planner.mesh import node_edges
from planner.plan import ExecutionPlan
from planner.plan_memory import alike, memory_bytes_of, memory_over_time
from planner.report import estimate_lines, ranges_text, strategy_text
from planner.simulate import Span, Timeline
from profiles.units import GIB, MIB, format_bytes, format_seconds

# Okabe and Ito, "Color Universal Design" (2008), without black.
_PALETTE = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999",
)  # fmt: skip
_WIDTH, _MARGIN, _ROW, _MOST_ROWS = 1080, 120, 26, 32
_CHARACTER = 6.6  # pixels of one at 11 px, on average

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2em auto;
       max-width: 1120px; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; } th, td { padding: 3px 12px; text-align: left; }
th { border-bottom: 2px solid #888; } td { border-bottom: 1px solid #ddd; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
svg { display: block; font: 11px system-ui, sans-serif; max-width: 100%; height: auto; }
.legend span { margin-right: 1.2em; white-space: nowrap; }
.legend i { display: inline-block; width: 12px; height: 12px; margin-right: 5px; }
"""


Section = tuple[str, str]  # heading, HTML


def report_page(
    plan: ExecutionPlan, timeline: Timeline, found: Explanation, *,
    drawn: Sequence[Section] | None = None, script: str = "",
) -> str:  # fmt: skip
    """The page; ``plan`` has its estimate, ``timeline`` and ``found`` are of this plan.

    ``drawn``: figures to have instead of the static ones, with the ``script`` that they need.
    """
    title = f"{plan.problem.graph.name} on {plan.problem.cluster.name}"
    lines = "".join(f"<li>{escape(line)}</li>" for line in estimate_lines(plan))
    sections = [
        ("Calls", _calls(plan)),
        *(_static(plan, timeline, found) if drawn is None else drawn),
        ("What sets the pace", _cycle(found)),
    ]
    body = "\n".join(f"<h2>{escape(heading)}</h2>\n{html}" for heading, html in sections)
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>{script}'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><h1>{escape(title)}</h1>'
        f"<ul>{lines}</ul>\n{body}</body></html>\n"
    )


def _static(plan: ExecutionPlan, timeline: Timeline, found: Explanation) -> list[Section]:
    device = found.fullest.device
    return [
        ("One steady step", _timeline_figure(plan, timeline, found.groups)),
        ("Which devices each call uses", _mesh_figure(plan)),
        ("Memory of a device at its fullest moment", _memory_figure(plan)),
        (f"Memory of device {device}, the fullest, call by call", _moments_figure(plan, device)),
        ("The same plan, were one thing faster", _lever_figure(found)),
    ]


# ---- tables -----------------------------------------------------------------------------------


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int) -> str:
    """A table whose last ``numbers`` columns are right-aligned."""
    first = len(headings) - numbers

    def line(tag: str, cells: Sequence[str]) -> str:
        marks = ((' class="n"' if i >= first else "") for i in range(len(cells)))
        inner = "".join(f"<{tag}{m}>{escape(c)}</{tag}>" for m, c in zip(marks, cells))
        return f"<tr>{inner}</tr>"

    return f"<table>{line('th', headings)}{''.join(line('td', row) for row in rows)}</table>"


def _calls(plan: ExecutionPlan) -> str:
    seconds = plan.estimate.per_call_s if plan.estimate else {}
    rows = []
    for call in plan.problem.graph.calls:
        allocation, spec = plan.allocations[call.name], plan.problem.spec_of(call.name)
        rows.append([
            call.name, spec.name if spec else "function", str(allocation.mesh).strip("[]"),
            strategy_text(allocation), str(allocation.num_micro_batches),
            format_seconds(seconds[call.name]) if call.name in seconds else "-",
        ])  # fmt: skip
    moves = [name for name in seconds if " " in name]
    rows += [[name, "", "", "", "", format_seconds(seconds[name])] for name in moves]
    return _table(
        ["call", "model", "devices", "strategy", "micro-batches", "alone"], rows, numbers=2
    )


def _cycle(found: Explanation) -> str:
    whole_s = found.cycle.seconds
    rows = [
        [s.label, ranges_text(s.ranks), f"+{s.step}", format_seconds(s.seconds),
         f"{s.seconds / whole_s:.1%}"]
        for s in found.cycle.steps
        if s.seconds >= whole_s / 1000
    ]  # fmt: skip
    return _table(["what", "ranks", "step", "seconds", "share"], rows, numbers=2)


# ---- drawing ----------------------------------------------------------------------------------


def _svg(height: float, marks: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" height="{height:.0f}" '
        f'role="img" aria-label="{escape(label)}">{"".join(marks)}</svg>'
    )


def _rect(x: float, y: float, width: float, height: float, colour: str, tip: str) -> str:
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(width, 0.3):.2f}" height="{height:.2f}" '
        f'fill="{colour}" stroke="#fff" stroke-width="0.4"><title>{escape(tip)}</title></rect>'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", colour: str = "#222") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">'
        f"{escape(text)}</text>"
    )


def _inside(x: float, y: float, width: float, text: str, fill: str) -> str:
    """A label within a mark, where there is room for it."""
    if len(text) * _CHARACTER + 6 > width:
        return ""
    dark = fill in ("#0072B2", "#009E73", "#D55E00", "#999999")
    return _text(x + 4, y, text, colour="#fff" if dark else "#222")


def _colours(plan: ExecutionPlan) -> Mapping[str, str]:
    names = [call.name for call in plan.problem.graph.calls]
    return {name: _PALETTE[i % len(_PALETTE)] for i, name in enumerate(names)}


def _legend(colours: Mapping[str, str]) -> str:
    items = (f'<span><i style="background:{c}"></i>{escape(n)}</span>' for n, c in colours.items())
    return f'<p class="legend">{"".join(items)}</p>'


def _more(count: int, what: str) -> str:
    return f"<p>… and {count} more {what}</p>" if count > 0 else ""


# ---- figures ----------------------------------------------------------------------------------


def _timeline_figure(
    plan: ExecutionPlan, timeline: Timeline, groups: Sequence[RankGroup]
) -> str:  # fmt: skip
    """A row for each group of ranks; the window is one period before the last step."""
    ends, colours = timeline.step_ends_s, dict(_colours(plan))
    end_s = ends[-2] if len(ends) > 1 else ends[-1]
    start_s, whole_s = end_s - timeline.step_s, timeline.step_s or 1.0
    scale = (_WIDTH - _MARGIN - 60) / whole_s
    shown = groups[:_MOST_ROWS]
    rows = {group.ranks[0]: index for index, group in enumerate(shown)}
    marks = []
    for index, group in enumerate(shown):
        y = index * _ROW
        marks.append(_text(_MARGIN - 8, y + 16, ranges_text(group.ranks, most=2), anchor="end"))
        marks.append(
            f'<rect x="{_MARGIN}" y="{y + 3}" width="{whole_s * scale:.1f}" height="{_ROW - 6}" '
            f'fill="#eee"><title>idle {group.idle_share:.1%}</title></rect>'
        )
        marks.append(_text(_WIDTH - 52, y + 16, f"{group.idle_share:.0%} idle"))
    for span in timeline.spans:
        if span.rank in rows and span.end_s > start_s and span.start_s < end_s:
            marks.append(_span(span, rows[span.rank], (start_s, end_s, scale), colours))
    marks += _axis(len(shown) * _ROW, whole_s, scale)
    legend = {**colours, "reallocation": "#000000", "transfer": "#666666", "idle": "#eeeeee"}
    figure = _svg(len(shown) * _ROW + 34, marks, "timeline of one steady step by ranks")
    return _legend(legend) + figure + _more(len(groups) - len(shown), "groups of ranks")


def _span(
    span: Span, row: int, window: tuple[float, float, float], colours: Mapping[str, str]
) -> str:
    start_s, end_s, scale = window
    x = _MARGIN + (max(span.start_s, start_s) - start_s) * scale
    width = (min(span.end_s, end_s) - max(span.start_s, start_s)) * scale
    other = "#000000" if span.kind == "reallocate" else "#666666"
    colour, y = colours.get(span.label, other), row * _ROW + 3
    tip = f"{span.label}: {format_seconds(span.seconds)}, rank {span.rank}"
    inside = _inside(x, y + 14, width, span.label, colour) if span.label in colours else ""
    return _rect(x, y, width, _ROW - 6, colour, tip) + inside


def _axis(y: float, whole_s: float, scale: float) -> list[str]:
    """Five ticks of time below a figure."""
    marks = []
    for i in range(5):
        at_s = whole_s * i / 4
        x = _MARGIN + at_s * scale
        marks.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{y + 4}" stroke="#bbb"/>')
        marks.append(_text(x, y + 18, format_seconds(at_s) if i else "0", anchor="middle"))
    return marks


def _mesh_figure(plan: ExecutionPlan) -> str:
    """A row for each call, the cluster from left to right, nodes divided by lines."""
    cluster, colours = plan.problem.cluster, _colours(plan)
    width = _WIDTH - _MARGIN - 60
    unit = width / cluster.num_devices
    marks = []
    for index, (name, colour) in enumerate(colours.items()):
        allocation, y = plan.allocations[name], index * _ROW
        x = _MARGIN + allocation.mesh.first * unit
        wide = allocation.mesh.num_devices * unit
        text = f"{strategy_text(allocation)} x{allocation.num_micro_batches}"
        marks.append(_text(_MARGIN - 8, y + 16, name, anchor="end"))
        marks.append(_rect(x, y + 3, wide, _ROW - 6, colour, f"{name}: {allocation}"))
        marks.append(_inside(x, y + 17, wide, text, colour))
    bottom = len(colours) * _ROW
    for edge in node_edges(cluster):
        x = _MARGIN + edge * unit
        marks.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom + 4}" stroke="#888"/>')
        marks.append(_text(x, bottom + 18, str(edge), anchor="middle"))
    marks.append(_text(_MARGIN + width + 12, bottom + 18, "device"))
    return _svg(bottom + 30, marks, "devices of each call")


def _memory_figure(plan: ExecutionPlan) -> str:
    """A bar for each group of devices with equal needs."""
    ordered = alike(plan)
    rows = [
        (ranges_text(devices, most=2), need, has) for devices, need, has in ordered[:_MOST_ROWS]
    ]
    figure = _needs_figure(rows, "memory by device and item")
    return figure + _more(len(ordered) - _MOST_ROWS, "groups of devices")


def _moments_figure(plan: ExecutionPlan, device: int) -> str:
    """A bar for each call of one device, in their order."""
    moments, has = memory_over_time(plan)[device], memory_bytes_of(device, plan)
    rows = [(m.after or m.call or "between calls", m.need, has) for m in moments]
    return _needs_figure(rows, f"memory of device {device} over a step")


def _needs_figure(rows: Sequence[tuple[str, MemoryBreakdown, int]], title: str) -> str:
    """Items of each row side by side, and its limit."""
    most = max(has for _, _, has in rows)
    items = list(MemoryBreakdown().items())
    colours = {name: _PALETTE[i % len(_PALETTE)] for i, name in enumerate(items)}
    scale = (_WIDTH - _MARGIN - 110) / max(most, *(need.total for _, need, _ in rows))
    marks = []
    for index, (label, need, had) in enumerate(rows):
        x, y = float(_MARGIN), index * _ROW
        marks.append(_text(_MARGIN - 8, y + 16, label, anchor="end"))
        for name, num_bytes in need.items().items():
            if num_bytes:
                tip = f"{name}: {format_bytes(num_bytes)}"
                marks.append(_rect(x, y + 3, num_bytes * scale, _ROW - 6, colours[name], tip))
                x += num_bytes * scale
        limit = _MARGIN + had * scale
        marks.append(_text(max(x, _MARGIN + most * scale) + 8, y + 16, format_bytes(need.total)))
        marks.append(
            f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="{y}" y2="{y + _ROW}" stroke="#000" '
            'stroke-dasharray="4 3"/>'
        )
    bottom = len(rows) * _ROW
    unit, name = (GIB, "GiB") if most >= GIB else (MIB, "MiB")
    for had in sorted({has for _, _, has in rows}):
        text = f"has {had / unit:.1f} {name}"
        marks.append(_text(_MARGIN + had * scale, bottom + 18, text, anchor="middle"))
    return _legend(colours) + _svg(bottom + 30, marks, title)


def _lever_figure(found: Explanation, *, most_rows: int = 12) -> str:
    """Seconds saved of a step, the largest first."""
    levers = [lever for lever in found.levers if lever.step_s < found.step_s * 0.999][:most_rows]
    if not levers:
        return "<p>nothing alone saves a thousandth of a step</p>"
    left = 260
    scale = (_WIDTH - left - 150) / (found.step_s - levers[0].step_s)
    marks = []
    for index, lever in enumerate(levers):
        saved_s, y = found.step_s - lever.step_s, index * _ROW
        share = f"{format_seconds(saved_s)} ({saved_s / found.step_s:.1%})"
        marks.append(_text(left - 8, y + 16, lever.what, anchor="end"))
        marks.append(_rect(left, y + 3, saved_s * scale, _ROW - 6, _PALETTE[0], lever.what))
        marks.append(_text(left + saved_s * scale + 6, y + 16, share))
    return _svg(len(levers) * _ROW + 6, marks, "seconds of a step saved by each lever")
