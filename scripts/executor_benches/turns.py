"""``take_turns``: ours and its peer one after the other; a ``Row`` says how they did."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch.distributed as dist

WORLD = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Median seconds of ours and of the peer, over turns taken one after the other."""

    subject: str
    peer: str
    ours_s: float
    peer_s: float
    note: str

    @property
    def text(self) -> str:
        ratio = self.peer_s / self.ours_s
        return (
            f"{self.subject:<24} {self.ours_s:8.3f} s   {self.peer:<34} {self.peer_s:8.3f} s   "
            f"{ratio:5.2f}x   {self.note}"
        )


def take_turns(subjects: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each, all ranks together, after one turn that is not counted."""
    seconds: list[list[float]] = [[] for _ in subjects]
    for turn in range(repeats + 1):
        for subject, found in zip(subjects, seconds, strict=True):
            dist.barrier()
            start_s = time.perf_counter()
            subject()
            dist.barrier()
            if turn:
                found.append(time.perf_counter() - start_s)
    return [median(found) for found in seconds]
