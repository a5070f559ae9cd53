"""A predicted step as a Chrome trace, for Perfetto (ui.perfetto.dev) and chrome://tracing.

One process, one thread a rank, one complete event a span, in microseconds. Ranks that do the same
are many on a large cluster, so ``most_ranks`` bounds the file: of each group the first rank.
Format: "Trace Event Format", Google 2016.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planner.explain import rank_groups
from planner.simulate import Timeline
from profiles.errors import ConfigError
from profiles.units import US


def trace_events(timeline: Timeline, *, most_ranks: int = 256) -> list[dict[str, Any]]:
    """Events of all simulated steps: names of threads first, then spans by start.

    Every rank where there are at most ``most_ranks``; else one of each group of ranks that do the
    same, up to that many, with the group in the thread's name.
    """
    names = _threads(timeline, most_ranks)
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": "predicted"}}
    ]
    for rank, name in names.items():
        events.append(
            {"ph": "M", "pid": 0, "tid": rank, "name": "thread_name", "args": {"name": name}}
        )
    spans = sorted((s for s in timeline.spans if s.rank in names), key=lambda s: s.start_s)
    for span in spans:
        events.append(
            {
                "ph": "X", "pid": 0, "tid": span.rank, "name": span.label, "cat": span.kind,
                "ts": span.start_s / US, "dur": span.seconds / US, "args": {"step": span.step},
            }
        )  # fmt: skip
    return events


def _threads(timeline: Timeline, most_ranks: int) -> dict[int, str]:
    """Shown ranks with the names of their threads."""
    if timeline.num_ranks <= most_ranks:
        return {rank: f"rank {rank}" for rank in range(timeline.num_ranks)}
    groups = rank_groups(timeline)[:most_ranks]
    return {
        group.ranks[0]: f"rank {group.ranks[0]}" + _others(group.ranks) for group in groups
    }  # fmt: skip


def _others(ranks: Sequence[int]) -> str:
    return f" and {len(ranks) - 1} like it" if len(ranks) > 1 else ""


def save_trace(timeline: Timeline, path: str | Path) -> None:
    """Write the trace so that the file is whole or absent.

    Raises:
        ConfigError: the file cannot be written.
    """
    events = trace_events(timeline)
    write_whole(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file under another name first; raises ``ConfigError`` where it cannot be."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(
            f"cannot be written ({error.strerror})", where=str(target),
            remedy="name a file in a folder that exists",
        ) from None  # fmt: skip
