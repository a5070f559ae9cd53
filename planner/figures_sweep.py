"""Figures of many scenarios, from the DataFrames of ``WhatIf``, drawn with plotly.

``WhatIf.draw`` and ``WhatIf.draw_tornado`` come here; ``pareto`` and ``lines`` take any frame of
``WhatIf.sweep``. See ``figures`` for how they look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from planner.figures import PALETTE, empty, styled
from profiles.units import GIB

# Column -> what an axis says, and by what its values are divided.
_AXES: Mapping[str, tuple[str, float]] = {
    "seconds": ("seconds of a step", 1.0),
    "dollars": ("dollars of a step", 1.0),
    "tokens_per_s": ("tokens per second", 1.0),
    "peak_memory": ("GiB of the fullest device", float(GIB)),
    "headroom": ("GiB left on the fullest device", float(GIB)),
    "gap": ("gap to the lower bound", 1.0),
    "lower_bound": ("lower bound, seconds of a step", 1.0),
    "vs_symmetric": ("times as fast as the best single layout", 1.0),
    "gpus": ("devices", 1.0),
    "response_len": ("tokens of an answer, at most", 1.0),
    "batch_size": ("prompts of a step", 1.0),
}
_MARKS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon")


def _axis(name: str) -> tuple[str, float]:
    return _AXES.get(name, (name.replace("_", " "), 1.0))


def _named(row: Mapping[Any, Any], axes: Sequence[str]) -> str:
    values = [(axis, row[axis]) for axis in axes]
    return ", ".join(v if isinstance(v, str) else f"{v:g} {axis}" for axis, v in values)


def pareto(
    frame: pd.DataFrame, front: pd.DataFrame, x: str, y: str, *, axes: Sequence[str]
) -> Any:  # fmt: skip
    """All scenarios of ``frame``, those of ``front`` joined by a line and named by ``axes``."""
    (x_text, x_unit), (y_text, y_unit) = _axis(x), _axis(y)
    known = frame.dropna(subset=[x, y])
    figure = empty()
    figure.add_scatter(
        x=known[x] / x_unit, y=known[y] / y_unit, mode="markers", name="scenarios",
        marker={"color": PALETTE[7], "size": 8},
        hovertext=[_named(row, axes) for row in known.to_dict("records")], hoverinfo="text",
    )  # fmt: skip
    ends = front.dropna(subset=[x, y]).sort_values(x)
    names = [_named(row, axes) for row in ends.to_dict("records")]
    figure.add_scatter(
        x=ends[x] / x_unit, y=ends[y] / y_unit, mode="lines+markers+text", name="not beaten",
        line={"color": PALETTE[0], "width": 1.5}, marker={"size": 10, "symbol": "diamond"},
        text=names, textposition="top right", hovertext=names, hoverinfo="text", cliponaxis=False,
    )  # fmt: skip
    styled(figure, title=f"{x_text[0].upper()}{x_text[1:]} against {y_text}", height=420)
    figure.update_layout(margin_r=170)
    figure.update_xaxes(title_text=x_text, rangemode="tozero")
    figure.update_yaxes(title_text=y_text, rangemode="tozero")
    return figure


def lines(frame: pd.DataFrame, x: str, y: str, *, by: str | None = None) -> Any:
    """``y`` over ``x``, a line for each value of ``by``; of several scenarios the least ``y``."""
    (x_text, x_unit), (y_text, y_unit) = _axis(x), _axis(y)
    known = frame.dropna(subset=[y])
    parts = [("", known)] if by is None else list(known.groupby(by, sort=False))
    figure = empty()
    for i, (name, part) in enumerate(parts):
        best = part.groupby(x)[y].min()
        figure.add_scatter(
            x=best.index / x_unit, y=best / y_unit, mode="lines+markers",
            name=str(name) if by is None or isinstance(name, str) else f"{by} {name!r}",
            line={"color": PALETTE[i % len(PALETTE)]}, showlegend=by is not None,
            marker={"symbol": _MARKS[i % len(_MARKS)], "size": 8},
        )  # fmt: skip
    styled(figure, title=f"{y_text[0].upper()}{y_text[1:]} over {x_text}", height=380)
    figure.update_layout(margin_t=78 if by else 46)
    figure.update_xaxes(title_text=x_text, tickvals=sorted(known[x].unique()))
    figure.update_yaxes(title_text=y_text, rangemode="tozero")
    return figure


def tornado(frame: pd.DataFrame, measure: str, *, factor: float) -> Any:
    """``measure`` with each lever divided and multiplied, the largest swing on top."""
    text, unit = _axis(measure)
    base = float(frame["base"].iloc[0]) / unit
    levers = list(frame["lever"])
    figure = empty()
    for column, name, colour in (
        ("divided", f"divided by {factor:g}", PALETTE[5]),
        ("multiplied", f"multiplied by {factor:g}", PALETTE[0]),
    ):
        values = frame[column] / unit
        figure.add_bar(
            y=levers, x=values - base, base=[base] * len(levers), orientation="h", name=name,
            marker_color=colour, text=[f"{value:.3g}" for value in values],
            textposition="outside", cliponaxis=False,
            hovertemplate=[
                f"{lever} {name}: {value:.4g}<extra></extra>"
                for lever, value in zip(levers, values)
            ],
        )  # fmt: skip
    figure.add_vline(x=base, line_color="#000", line_width=1)
    ends = pd.concat([frame["divided"], frame["multiplied"]]) / unit
    room = 0.08 * (ends.max() - ends.min() or 1.0)
    styled(
        figure, title=f"What matters most for {text}: {base:.3g} as it is",
        height=130 + 34 * len(levers), barmode="overlay", bargap=0.3,
    )  # fmt: skip
    figure.update_xaxes(title_text=text, range=[min(ends.min(), base) - room, ends.max() + room])
    figure.update_yaxes(categoryorder="array", categoryarray=levers[::-1])
    return figure
