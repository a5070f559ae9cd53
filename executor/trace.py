"""What a rank did and when: one line of JSON per instruction, read back for the comparison
of predicted with measured seconds."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSpan:
    """One instruction of one rank; wall-clock seconds since the epoch."""

    rank: int
    step: int
    index: int
    kind: str
    label: str
    start_s: float
    end_s: float
    num_bytes: int = 0
    num_tokens: int = 0


class TraceWriter:
    """Appends spans to ``trace/rank{r}.jsonl`` as they end."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.rank = rank
        self.file = (folder / f"rank{rank}.jsonl").open("w", encoding="utf-8")

    @contextmanager
    def span(self, *, step: int, index: int, kind: str, label: str) -> Iterator[dict[str, int]]:
        """Time the body; it may set ``num_bytes`` and ``num_tokens`` in what is yielded."""
        counts: dict[str, int] = {}
        start_s = time.time()
        yield counts
        span = TraceSpan(
            rank=self.rank, step=step, index=index, kind=kind, label=label, start_s=start_s,
            end_s=time.time(), **counts,
        )  # fmt: skip
        self.file.write(json.dumps(asdict(span)) + "\n")
        self.file.flush()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.file.close()


def read_trace(folder: Path) -> list[TraceSpan]:
    """All spans of a run, by rank; a last line cut off by a kill is left out."""
    spans: list[TraceSpan] = []
    for file in sorted(folder.glob("rank*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                spans.append(TraceSpan(**json.loads(line)))
    return spans


def measured_seconds(spans: Sequence[TraceSpan], *, first_step: int = 0) -> Mapping[str, float]:
    """Median over steps of each label's seconds, from its last rank's start to its last end.

    A call starts when the last rank of its mesh reaches it: what comes before is waiting.
    """
    groups: dict[tuple[str, int], list[TraceSpan]] = defaultdict(list)
    for span in spans:
        if span.step >= first_step:
            groups[(span.label, span.step)].append(span)
    by_label: dict[str, list[float]] = defaultdict(list)
    for (label, _), members in groups.items():
        start_s = max(span.start_s for span in members)
        by_label[label].append(max(span.end_s for span in members) - start_s)
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


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file so that it is whole or absent."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
