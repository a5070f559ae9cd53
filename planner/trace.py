"""What a run did and when: spans of instructions, read back from ``<output>/trace/rank*.jsonl``.

``realexec run`` writes one line of JSON an instruction (``executor/trace.py``). Here they become
seconds of calls and of steps, for the comparison with an estimate and for ``calibrate``.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median

from profiles.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSpan:
    """One instruction of one rank; wall-clock seconds since the epoch.

    Of kind ``wait``: what a rank waited, later, for weights that it had given away to leave.
    ``peak_bytes``: the most memory that the rank held in it (allocated on its GPU, resident on a
    CPU); 0 where it is not known.
    """

    rank: int
    step: int
    index: int
    kind: str
    label: str
    start_s: float
    end_s: float
    num_bytes: int = 0
    num_tokens: int = 0
    peak_bytes: int = 0


_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "kind": str, "label": str, "start_s": (int, float), "end_s": (int, float),
}  # fmt: skip
# No rank, step, number of bytes or second since 1970 is as large.
MOST = 1 << 50
_NEEDED = frozenset(f.name for f in fields(TraceSpan)[:7])


def trace_of_run(folder: str | Path) -> list[TraceSpan]:
    """All spans of a run by its output folder, or by the ``trace`` folder in it.

    Raises:
        ConfigError: there is no trace, or it is damaged.
    """
    folder = Path(folder)
    spans = read_trace(folder) or read_trace(folder / "trace")
    if not spans:
        raise ConfigError(
            "no trace here", where=str(folder), remedy="name the output folder of realexec run"
        )
    return spans


def read_trace(folder: Path) -> list[TraceSpan]:
    """All spans of a run, by rank; a last line cut off by a kill is left out.

    Raises:
        ConfigError: a line is no span; names the file and the line.
    """
    spans: list[TraceSpan] = []
    for file in sorted(folder.glob("rank*.jsonl")):
        text = file.read_bytes().decode("utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(keepends=True), start=1):
            if line.endswith("\n"):
                spans.append(_span(line, f"{file}:{number}"))
    return spans


def _span(line: str, where: str) -> TraceSpan:
    remedy = "name the output folder of a run as realexec wrote it"
    try:
        values = json.loads(line)
    except ValueError:
        raise ConfigError("not a line of JSON", where=where, remedy=remedy) from None
    names = {f.name for f in fields(TraceSpan)}
    if not isinstance(values, dict) or not _NEEDED <= set(values) <= names:
        raise ConfigError("not a span of a trace", where=where, remedy=remedy)
    for name, value in values.items():
        known = _TYPES.get(name, int)
        if not isinstance(value, known) or isinstance(value, bool):
            raise ConfigError(f"{name} is {value!r}", where=where, remedy=remedy)
        if isinstance(value, int) and not 0 <= value < MOST:
            raise ConfigError(f"{name} is {value!r}", where=where, remedy=remedy)
    span = TraceSpan(**values)
    if not 0 <= span.start_s <= span.end_s < MOST:
        raise ConfigError(
            f"from {span.start_s!r} s to {span.end_s!r} s is no time", where=where, remedy=remedy
        )
    return span


def measured_seconds(spans: Sequence[TraceSpan], *, first_step: int = 0) -> Mapping[str, float]:
    """Median over steps of each label's seconds, from its last rank's start to its last end.

    A call starts when the last rank of its mesh reaches it: what comes before is waiting. What has
    one label twice in a step (a role moved twice) counts as the sum.
    """
    groups: dict[tuple[str, int, int], list[TraceSpan]] = defaultdict(list)
    for span in spans:
        if span.step >= first_step:
            groups[(span.label, span.step, span.index)].append(span)
    by_step: dict[tuple[str, int], float] = defaultdict(float)
    for (label, step, _), members in groups.items():
        start_s = max(span.start_s for span in members)
        by_step[label, step] += max(span.end_s for span in members) - start_s
    by_label: dict[str, list[float]] = defaultdict(list)
    for (label, _), seconds in by_step.items():
        by_label[label].append(seconds)
    return {label: median(values) for label, values in by_label.items()}


def step_seconds(spans: Sequence[TraceSpan], *, first_step: int = 0) -> float:
    """Mean seconds between the ends of successive steps from ``first_step`` on."""
    ends: dict[int, float] = defaultdict(float)
    starts: dict[int, float] = {}
    for span in spans:
        ends[span.step] = max(ends[span.step], span.end_s)
        starts[span.step] = min(starts.get(span.step, span.start_s), span.start_s)
    steps = sorted(step for step in ends if step >= first_step)
    if not steps:
        return 0.0
    begin = ends[first_step - 1] if first_step - 1 in ends else starts[steps[0]]
    return (ends[steps[-1]] - begin) / len(steps)


def first_warm_step(spans: Sequence[TraceSpan]) -> int | None:
    """The second step of a trace, or its only one: the first holds warm-up. None without steps."""
    steps = sorted({span.step for span in spans if span.kind != "load"})
    return steps[min(1, len(steps) - 1)] if steps else None
