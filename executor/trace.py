"""What a rank did and when: one line of JSON per instruction. ``planner/trace.py`` reads it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

import torch

from planner.trace import TraceSpan


class TraceWriter:
    """Appends spans to ``trace/rank{r}.jsonl`` as they end.

    ``device``: whose peak memory the spans say; None for none.
    """

    def __init__(self, folder: Path, rank: int, device: torch.device | None = None) -> None:
        self.folder, self.rank = folder, rank
        self.peak = _peak_memory(device)
        self.open()

    def open(self) -> None:
        """Begin the file; also anew, after ``close`` and when somebody has put it away."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = (self.folder / f"rank{self.rank}.jsonl").open("w", encoding="utf-8")

    def close(self) -> None:
        self.file.close()

    @contextmanager
    def span(self, *, step: int, index: int, kind: str, label: str) -> Iterator[dict[str, int]]:
        """Time the body; it may set ``num_bytes`` and ``num_tokens`` in what is yielded."""
        counts: dict[str, int] = {}
        self.peak()
        start_s = time.time()
        yield counts
        span = TraceSpan(
            rank=self.rank, step=step, index=index, kind=kind, label=label, start_s=start_s,
            end_s=time.time(), peak_bytes=self.peak(), **counts,
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
        self.close()


def _peak_memory(device: torch.device | None) -> Callable[[], int]:
    """A function that says the most bytes held since it was last asked.

    On CUDA what its allocator gave out. On a CPU the process's resident memory, where the kernel
    forgets its peak on request (Linux: 5 written to ``/proc/self/clear_refs``, proc(5)); else 0.
    """
    if device is not None and device.type == "cuda":
        return lambda: _cuda_peak(device)
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if device is None or not os.access(clear, os.W_OK):
        return lambda: 0

    def resident() -> int:
        lines = status.read_text(encoding="ascii").splitlines()
        clear.write_text("5", encoding="ascii")
        return next((1024 * int(x.split()[1]) for x in lines if x.startswith("VmHWM")), 0)

    return resident


def _cuda_peak(device: torch.device) -> int:
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file so that it is whole or absent; of several writers the last stays."""
    temporary = name_beside(path)
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def name_beside(path: Path) -> Path:
    """A hidden name in the same folder that no other process of any host uses."""
    return path.with_name(f".{path.name}.{uuid4().hex}")
