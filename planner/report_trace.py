"""Predicted and executed steps as a Chrome trace, for Perfetto (ui.perfetto.dev).

One process for what was predicted and one for what was executed, so that a viewer shows them one
below the other; one thread a rank, one complete event a span, in microseconds. Ranks that do the
same are many on a large cluster, so ``most_ranks`` bounds the file: of each group the first rank.
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
from planner.trace import TraceSpan, first_warm_step
from profiles.errors import ConfigError
from profiles.units import US


def trace_events(timeline: Timeline, *, most_ranks: int = 256) -> list[dict[str, Any]]:
    """Events of all simulated steps: names of threads first, then spans by start.

    Every rank where there are at most ``most_ranks``; else one of each group of ranks that do the
    same, up to that many, with the group in the thread's name.
    """
    names = _threads(timeline, most_ranks)
    events = [_named("process_name", "predicted", pid=0)]
    events += [_named("thread_name", name, pid=0, tid=rank) for rank, name in names.items()]
    spans = sorted((s for s in timeline.spans if s.rank in names), key=lambda s: s.start_s)
    for span in spans:
        events.append(
            {
                "ph": "X", "pid": 0, "tid": span.rank, "name": span.label, "cat": span.kind,
                "ts": span.start_s / US, "dur": span.seconds / US, "args": {"step": span.step},
            }
        )  # fmt: skip
    return events


def executed_events(spans: Sequence[TraceSpan]) -> list[dict[str, Any]]:
    """Events of a run's trace from its first warm step on, which begins at time zero."""
    first = first_warm_step(spans)
    shown = [span for span in spans if first is not None and span.step >= first]
    ranks = sorted({span.rank for span in shown})
    events = [_named("process_name", "executed", pid=1)]
    events += [_named("thread_name", f"rank {rank}", pid=1, tid=rank) for rank in ranks]
    begin_s = min((span.start_s for span in shown), default=0.0)
    for span in sorted(shown, key=lambda span: span.start_s):
        counts = {
            "bytes": span.num_bytes, "tokens": span.num_tokens, "peak_bytes": span.peak_bytes,
        }  # fmt: skip
        events.append(
            {
                "ph": "X", "pid": 1, "tid": span.rank, "name": span.label, "cat": span.kind,
                "ts": (span.start_s - begin_s) / US, "dur": (span.end_s - span.start_s) / US,
                "args": {"step": span.step} | {k: v for k, v in counts.items() if v},
            }
        )  # fmt: skip
    return events


def _named(what: str, name: str, **where: int) -> dict[str, Any]:
    return {"ph": "M", "name": what, "args": {"name": name}, **where}


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


def save_trace(timeline: Timeline, path: str | Path, executed: Sequence[TraceSpan] = ()) -> None:
    """Write the predicted steps, and what a run executed, so that the file is whole or absent.

    Raises:
        ConfigError: the file cannot be written.
    """
    events = trace_events(timeline) + (executed_events(executed) if executed else [])
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
