"""The run's numbers: collected from the ranks that know them, written as JSONL and to boards.

The last stage of a call's first replica knows its statistics. It leaves them in the key-value
store that the process group was built with; rank 0 reads them one step later, so that nobody
waits for a number. Tables of answers go the same way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from executor.boards import Board, Row

REWARDS = "rewards"  # the data key of answers' rewards, in every algorithm's graph


def post(
    store: dist.Store,
    moment: str,
    call: str,
    values: Mapping[str, float],
    *,
    part: int = 0,
    weight: float = 1.0,
) -> None:
    """Leave a call's statistics of a step for rank 0; the mean over its parts is by weight."""
    store.set(_key(moment, call, part), json.dumps([weight, dict(values)]))


def _key(moment: str, call: str, part: int) -> str:
    return f"metrics/{moment}/{call}/{part}"


def posted(store: dist.Store, moment: str, call: str) -> list[Any]:
    """What a call of one part has left of a step: its weight and its values; waits for it."""
    found: list[Any] = json.loads(store.get(_key(moment, call, 0)))
    return found


def post_samples(store: dist.Store, step: int, table: Sequence[Row]) -> None:
    """Leave a step's table of answers for rank 0."""
    store.set(f"samples/{step}", json.dumps(list(table)))


def evaluation_moment(step: int, index: int) -> str:
    """What the numbers of an evaluation's batch, done after ``step``, are posted under."""
    return f"eval{step}.{index}"


def shows_samples(config: Any, step: int) -> bool:
    """A table of answers is due after ``step``."""
    return config.samples_every > 0 and step % config.samples_every == 0


class MetricsWriter:
    """On rank 0: ``metrics.jsonl``, one line a step, ``samples.jsonl``, one line an answer, and
    the boards."""

    def __init__(
        self,
        folder: Path,
        store: dist.Store,
        parts: Mapping[str, int],
        *,
        boards: Sequence[Board] = (),
        first_step: int = 0,
    ) -> None:
        """``parts``: for every call, how many ranks tell of it.

        What an earlier run wrote of steps before ``first_step`` stays.
        """
        self.store = store
        self.parts = dict(parts)
        self.boards = boards
        self.file = _continued(folder / "metrics.jsonl", first_step)
        self.samples = _continued(folder / "samples.jsonl", first_step)

    def collect(
        self, step: int, seconds: float, *, eval_batches: int = 0, samples: bool = False
    ) -> dict[str, float]:
        """Write a finished step's numbers; waits for ranks that are still at it.

        ``eval_batches``: how many an evaluation after it had; ``samples``: it has a table.
        """
        values: dict[str, float] = {"step_s": seconds, **self._means([str(step)])}
        if eval_batches:
            moments = [evaluation_moment(step, index) for index in range(eval_batches)]
            values |= {f"eval/{name}": v for name, v in self._means(moments).items()}
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for board in self.boards:
            board.scalars(step, values)
        if samples:
            self._table(step)
        return values

    def _table(self, step: int) -> None:
        rows = json.loads(self._read(f"samples/{step}"))
        self.samples.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.samples.flush()
        for board in self.boards:
            board.table(step, rows)

    def _means(self, moments: Sequence[str]) -> dict[str, float]:
        """Weighted means over moments and parts, as ``call/name``."""
        found: dict[str, float] = {}
        for call, num_parts in self.parts.items():
            told = [
                json.loads(self._read(_key(moment, call, part)))
                for moment in moments
                for part in range(num_parts)
            ]
            total = sum(weight for weight, _ in told)
            for name in told[0][1]:
                found[f"{call}/{name}"] = sum(w * values[name] for w, values in told) / total
        return found

    def _read(self, key: str) -> bytes:
        # A step may last longer than any default; a dead peer ends this process anyway.
        self.store.wait([key], timedelta(days=1))
        value: bytes = self.store.get(key)
        return value

    def close(self) -> None:
        self.file.close()
        self.samples.close()
        for board in self.boards:
            board.close()


def _continued(path: Path, first_step: int) -> Any:
    """The file, open behind its lines of steps before ``first_step``."""
    kept = _lines_before(path, first_step)
    file = path.open("w", encoding="utf-8")
    file.writelines(kept)
    file.flush()
    return file


def _lines_before(path: Path, first_step: int) -> list[str]:
    """Whole lines of steps before ``first_step``; one that was cut off by a kill is left out."""
    if first_step == 0 or not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [ln for ln in lines if ln.endswith("\n") and json.loads(ln)["step"] < first_step]
