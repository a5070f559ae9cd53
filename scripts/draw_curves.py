"""Learning curves of runs as one SVG: a panel for each number that is asked for.

    python scripts/draw_curves.py curves.svg runs/sft:actor_train/loss runs/ppo:rew_inf/rewards

Each word is a run's output folder and a name of its metrics.jsonl; where the run has evaluated,
``eval/`` of the name is drawn into the same panel. Prints the first and the last value of each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 420, 240, 58, 34, 16, 34
COLOURS = {"": "#1f6feb", "eval/": "#d1242f"}  # training, evaluation
Points = list[tuple[int, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A number of a run over its steps; ``lines`` by prefix of its name."""

    title: str
    lines: dict[str, Points]


def read_panel(word: str) -> Panel:
    """The panel of ``FOLDER:NAME``; exits where there is no such number."""
    folder, _, name = word.partition(":")
    file = Path(folder) / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    lines = {
        prefix: [(row["step"] + 1, row[prefix + name]) for row in rows if prefix + name in row]
        for prefix in COLOURS
    }
    if not lines[""]:
        raise SystemExit(f"draw_curves: {file} has no {name}; it has {', '.join(rows[0])}")
    title = f"{Path(folder).name}: {name}"
    return Panel(title=title, lines={prefix: points for prefix, points in lines.items() if points})


def draw(panel: Panel, x: int) -> list[str]:
    """SVG elements of a panel whose left edge is at ``x`` pixels."""
    every = [point for points in panel.lines.values() for point in points]
    first, last = min(s for s, _ in every), max(s for s, _ in every)
    low, high = min(v for _, v in every), max(v for _, v in every)
    span_x, span_y = max(1, last - first), (high - low) or 1.0

    def place(step: float, value: float) -> tuple[float, float]:
        across = (step - first) / span_x * (WIDTH - LEFT - RIGHT)
        down = (high - value) / span_y * (HEIGHT - TOP - BOTTOM)
        return x + LEFT + across, TOP + down

    def text(at: tuple[float, float], words: str, anchor: str) -> str:
        return (
            f'<text x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    out = [text((x + LEFT, TOP - 14), panel.title, "start")]
    for share in (0.0, 0.5, 1.0):
        value = low + share * span_y
        (x0, y), (x1, _) = place(first, value), place(last, value)
        out.append(f'<path d="M{x0:.1f} {y:.1f}H{x1:.1f}" stroke="#d0d7de"/>')
        out.append(text((x0 - 6, y + 4), f"{value:.3g}", "end"))
    bottom = HEIGHT - BOTTOM + 18
    for step, anchor in ((first, "start"), (last, "end")):
        out.append(text((place(step, low)[0], bottom), f"step {step}", anchor))
    for prefix, points in panel.lines.items():
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(s, v) for s, v in points))
        style = f'fill="none" stroke="{COLOURS[prefix]}" stroke-width="1.6"'
        out.append(f'<polyline points="{path}" {style}/>')
    if "eval/" in panel.lines:
        words = text((x + WIDTH - RIGHT, TOP - 14), "evaluation", "end")
        out.append(f'<g fill="{COLOURS["eval/"]}">{words}</g>')
    return out


def svg(panels: Sequence[Panel]) -> str:
    """All panels beside each other."""
    size = f'width="{WIDTH * len(panels)}" height="{HEIGHT}"'
    parts = [element for i, panel in enumerate(panels) for element in draw(panel, i * WIDTH)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" '
            'font-size="12" fill="#24292f">',
            '<rect width="100%" height="100%" fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw learning curves of runs as SVG.")
    parser.add_argument("output", type=Path)
    parser.add_argument("numbers", nargs="+", metavar="FOLDER:NAME")
    args = parser.parse_args(argv)
    panels = [read_panel(word) for word in args.numbers]
    args.output.write_text(svg(panels), encoding="utf-8")
    for panel in panels:
        for prefix, points in panel.lines.items():
            print(f"{prefix}{panel.title}  {points[0][1]:.4g} -> {points[-1][1]:.4g}")
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
