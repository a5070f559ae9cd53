"""The run's numbers: collected from the ranks that know them, written as JSONL and TensorBoard.

The last stage of a call's first replica knows its statistics. It leaves them in the key-value
store that the process group was built with; rank 0 reads them one step later, so that nobody
waits for a number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist


def post(
    store: dist.Store,
    step: int,
    call: str,
    values: Mapping[str, float],
    *,
    part: int = 0,
    weight: float = 1.0,
) -> None:
    """Leave a call's statistics of a step for rank 0; the mean over its parts is by weight."""
    store.set(f"metrics/{step}/{call}/{part}", json.dumps([weight, dict(values)]))


class MetricsWriter:
    """On rank 0: ``metrics.jsonl``, one line a step, and TensorBoard events if it is installed."""

    def __init__(
        self, folder: Path, store: dist.Store, parts: Mapping[str, int], *, first_step: int = 0
    ) -> None:
        """``parts``: for every call, how many ranks tell of it.

        What an earlier run wrote of steps before ``first_step`` stays.
        """
        self.store = store
        self.parts = dict(parts)
        path = folder / "metrics.jsonl"
        kept = _lines_before(path, first_step)
        self.file = path.open("w", encoding="utf-8")
        self.file.writelines(kept)
        self.file.flush()
        self.board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        except ImportError:
            pass  # TensorBoard is an extra; JSONL has the same numbers

    def collect(self, step: int, seconds: float) -> dict[str, float]:
        """Write a finished step's numbers; waits for ranks that are still at it."""
        values: dict[str, float] = {"step_s": seconds}
        for call, num_parts in self.parts.items():
            told = [self._read(f"metrics/{step}/{call}/{part}") for part in range(num_parts)]
            total = sum(weight for weight, _ in told)
            for name in told[0][1]:
                mean = sum(weight * found[name] for weight, found in told) / total
                values[f"{call}/{name}"] = mean
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        return values

    def _read(self, key: str) -> tuple[float, dict[str, float]]:
        # A step may last longer than any default; a dead peer ends this process anyway.
        self.store.wait([key], timedelta(days=1))
        weight, values = json.loads(self.store.get(key))
        return weight, values

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def _lines_before(path: Path, first_step: int) -> list[str]:
    """Whole lines of steps before ``first_step``; one that was cut off by a kill is left out."""
    if first_step == 0 or not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [ln for ln in lines if ln.endswith("\n") and json.loads(ln)["step"] < first_step]
