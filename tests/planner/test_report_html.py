"""Protects the page: it needs nothing from a network, its marks are the plan's, and a
browser draws it.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from planner.explain import explain
from planner.plan import ExecutionPlan
from planner.plan_memory import fullest_device, memory_over_time
from planner.report_html import report_page
from planner.resolve import hardware_levers, make_costs
from planner.search import estimate_plan
from planner.simulate import StepPrices, Timeline
from profiles.units import format_bytes
from tests.planner.plans import random_plan

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def page(seed: int) -> tuple[str, ExecutionPlan, Timeline]:
    plan = random_plan(random.Random(seed))
    costs = make_costs(plan.problem.cluster, None)
    plan, timeline = estimate_plan(plan, StepPrices(plan.problem, costs), lower_bound=1e-6)
    links, device = hardware_levers(None)
    found = explain(plan, costs, links=links, device=device)
    return report_page(plan, timeline, found), plan, timeline


class _Tags(HTMLParser):
    """Every opened tag is closed in order; void ones and self-closed ones apart."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("seed", range(8))
def test_a_page_is_whole_and_asks_nobody(seed: int) -> None:
    text, plan, _ = page(seed)
    tags = _Tags()
    tags.feed(text)
    assert not tags.open
    assert tags.counts["svg"] >= 3
    assert "script" not in tags.counts
    assert not re.search(r"https?://|src=|@import|url\(", text)
    assert "nan" not in re.findall(r'(?:x|y|width|height)="([^"]*)"', text)
    for name in plan.allocations:
        assert name in text


def test_bars_of_the_timeline_are_as_long_as_the_spans() -> None:
    """Oracle: seconds of each call in the window, at the figure's scale."""
    text, _, timeline = page(3)
    svg = text[text.index('aria-label="timeline') : text.index("Which devices")]
    bars = re.findall(r'<rect x="([\d.]+)"[^>]* width="([\d.]+)"[^>]*><title>(\w+): ', svg)
    assert bars
    scale = (1080 - 120 - 60) / timeline.step_s
    longest: dict[str, float] = {}
    for _, width, name in bars:
        longest[name] = max(longest.get(name, 0.0), float(width))
    for span in timeline.last_step:
        if span.label in longest and span.label in timeline.call_order:
            assert longest[span.label] <= max(0.31, span.seconds * scale + 0.02)


@pytest.mark.parametrize("seed", range(3))
def test_the_fullest_device_is_told_call_by_call(seed: int) -> None:
    """Oracle: its moments' totals, in their order, beside their bars."""
    text, plan, _ = page(seed)
    device = fullest_device(plan).device
    svg = text[
        text.index(f'aria-label="memory of device {device} ') : text.index("The same plan, were")
    ]
    words = re.findall(r">([^<>]+)</text>", svg)[:-1]  # the last is what the device has
    moments = memory_over_time(plan)[device]
    assert words[1::2] == [format_bytes(moment.need.total) for moment in moments]
    assert words[::2] == [m.after or m.call or "between calls" for m in moments]


def browse(file: Path, *arguments: str) -> str:
    """What Chromium prints of a page, with no network at all."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000",
         "--window-size=1200,2600", "--host-resolver-rules=MAP * ~NOTFOUND", *arguments,
         file.as_uri()],
        check=True, capture_output=True, timeout=180, text=True,
    )  # fmt: skip
    return done.stdout


def colours_of(picture: Path) -> set[tuple[int, int, int]]:
    """Colours that more than 300 pixels have."""
    image = pytest.importorskip("PIL.Image").open(picture).convert("RGB")
    return {colour for count, colour in image.getcolors(1 << 24) if count > 300}


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
PALETTE = {(0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167)}


@needs_browser
def test_a_browser_draws_the_static_figures(tmp_path: Path) -> None:
    """The screenshot has the palette's colours: the figures are not empty."""
    file, picture = tmp_path / "report.html", tmp_path / "report.png"
    file.write_text(page(2)[0])
    browse(file, f"--screenshot={picture}")
    assert colours_of(picture) >= PALETTE


def drawn_page(seed: int) -> tuple[str, ExecutionPlan]:
    """A page with the figures of plotly, and the course of a search."""
    pytest.importorskip("plotly", reason="these figures need the extra notebook")
    from planner.report_figures import draw

    _, plan, timeline = page(seed)
    assert plan.estimate is not None
    step_s = plan.estimate.step_s
    course = [[0.0, 1, 2 * step_s, step_s / 2], [0.5, 10, step_s, step_s / 2]]
    plan = replace(plan, provenance={"progress": course})
    costs = make_costs(plan.problem.cluster, None)
    links, device = hardware_levers(None)
    return draw(plan, timeline, explain(plan, costs, links=links, device=device)), plan


def test_a_page_with_a_script_asks_nobody_either() -> None:
    text, _ = drawn_page(2)
    heads = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", re.sub(
        r"<script>.*?</script>", "<script>", text, count=1, flags=re.DOTALL))  # fmt: skip
    assert heads
    assert not [head for head in heads if "src=" in head or "href=" in head]
    assert text.count("plotly.js v") == 1


@needs_browser
def test_a_browser_draws_the_figures_of_plotly(tmp_path: Path) -> None:
    """Oracle: as many bars as the figures have, a label for every row, and colours to see."""
    text, plan = drawn_page(2)
    from planner import figures

    file, picture = tmp_path / "report.html", tmp_path / "report.png"
    file.write_text(text)
    dom = browse(file, "--dump-dom")
    _, _, timeline = page(2)
    bars = [
        *figures.timeline(plan, timeline).data, *figures.meshes(plan).data,
        *figures.fullest_moments(plan).data,
    ]  # fmt: skip
    assert dom.count('class="point"') >= sum(len(trace.y) for trace in bars)
    figures_drawn = re.findall(r'class="[^"]*plotly-graph-div', dom)
    assert len(figures_drawn) == 6
    assert dom.count('class="xtitle"') == dom.count('class="xaxislayer-above"') == 6
    ticks = set(re.findall(r'class="ytick"><text[^>]*>([^<]+)<', dom))
    assert {*plan.allocations, *figures.timeline(plan, timeline).data[0].y} <= ticks
    browse(file, f"--screenshot={picture}")
    assert colours_of(picture) >= PALETTE
