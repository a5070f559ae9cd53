"""The figures of ``realplan report`` as they are where plotly is installed: they zoom and tell.

plotly's script is in the page once, so that it needs no network. Without plotly the page has the
static figures of ``report_html``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plotly.offline import get_plotlyjs

from planner import figures
from planner.explain import Explanation
from planner.plan import ExecutionPlan
from planner.report_html import Section, report_page
from planner.simulate import Timeline
from planner.trace import TraceSpan
from planner.whatif import WhatIf
from profiles.clusters import PLATFORMS
from profiles.hardware import ClusterSpec

# Devices that a report puts beside the plan's own, where that is one of the catalogue's.
_BESIDE = ("a100", "h100", "h200")
# Without plotly's buttons, which lie over legends: drag to zoom, double-click to go back.
_CONFIG = {"displayModeBar": False, "responsive": True}


def draw(
    plan: ExecutionPlan, steps: Timeline, found: Explanation, *,
    executed: Sequence[TraceSpan] = (), what: WhatIf | None = None,
) -> str:  # fmt: skip
    """The page of ``report_page``; ``executed``: a run's trace, ``what``: scenarios to search."""
    sections = plan_sections(plan, steps, found)
    if executed:
        sections.insert(1, _section(figures.executed(executed)))
    if what is not None:
        sections += scenario_sections(what)
    script = f"<script>{get_plotlyjs()}</script>"
    return report_page(plan, steps, found, drawn=sections, script=script)


def _section(figure: Any) -> Section:
    """The figure's title becomes a heading of the page."""
    heading: str = figure.layout.title.text
    figure.update_layout(title_text="", height=figure.layout.height - 26)
    figure.layout.margin.t -= 26
    return heading, figure.to_html(full_html=False, include_plotlyjs=False, config=_CONFIG)


def plan_sections(plan: ExecutionPlan, steps: Timeline, found: Explanation) -> list[Section]:
    """What ``report_html`` draws of a plan, and the course of its search where it is known."""
    drawn = [
        figures.timeline(plan, steps),
        figures.meshes(plan),
        figures.memory(plan, steps),
        figures.fullest_moments(plan),
        figures.levers(found),
    ]
    if plan.provenance.get("progress"):
        drawn.append(figures.search(plan))
    return [_section(figure) for figure in drawn]


def scenario_sections(what: WhatIf) -> list[Section]:
    """Half, equal and double the devices, beside other devices; and what matters most.

    Of unlike groups all of them beside each of them alone.
    """
    cluster = what.problem.cluster
    axes: dict[str, Sequence[object]] = {"cluster": [cluster, *cluster.groups]}
    if isinstance(cluster, ClusterSpec):
        counts = [cluster.num_devices // 2, cluster.num_devices, 2 * cluster.num_devices]
        per_node = min(cluster.devices_per_node, *(count for count in counts if count))
        axes = {"gpus": [count for count in counts if count and count % per_node == 0]}
        if cluster.device.name in PLATFORMS:
            axes["device"] = list(dict.fromkeys([cluster.device.name, *_BESIDE]))
    priced = what.sweep(**axes)["dollars"].notna().any()
    other = "dollars" if priced else "peak_memory"
    return [_section(what.draw("seconds", other)), _section(what.draw_tornado())]
