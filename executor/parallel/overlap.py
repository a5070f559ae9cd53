"""``EarlySums``: gradients are summed over replicas while backward still goes on.

Backward comes to the last block first. In the last micro-batch of an optimizer step a block's
gradients are whole as soon as backward leaves it, and their sum over replicas is started: in runs
of blocks of about ``BUCKET_BYTES``, last block first, so that every rank of a group starts the same
sums in the same order. A rank whose last micro-batch has no tokens starts them when the step is
taken. What is left then (embedding, final norm, head, padding) is summed as it always is.

``planner.cost.train`` prices it so. On a CPU nothing is started early: the cores that would sum
are those that compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from executor.buffers import ParameterBuffer, Range
from executor.parallel import data
from planner.layout import ParameterSlice


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """A run of blocks, from ``first`` on, that is summed at once: ``names`` in ``within``."""

    first: int
    within: Range
    names: frozenset[str]


def make_buckets(
    buffer: ParameterBuffer, layers: range, *, bucket_bytes: int, value_bytes: int
) -> tuple[Bucket, ...]:
    """The blocks ``layers`` of a stage in runs of at least ``bucket_bytes``, last block first.

    ``first`` counts from 0 within the stage. Together they have every block's parameters once,
    side by side in the buffer; what else the stage has lies before or after them.
    """
    found: list[Bucket] = []
    run: list[ParameterSlice] = []
    for index in reversed(range(len(layers))):
        prefix = f"layers.{layers[index]}."
        run = [piece for piece in buffer.slices if piece.name.startswith(prefix)] + run
        num_values = sum(piece.num_values for piece in run)
        if num_values * value_bytes >= bucket_bytes or index == 0:
            start = buffer.starts[run[0].name]
            stop = buffer.starts[run[-1].name] + run[-1].num_values
            assert stop - start == num_values, f"blocks from {prefix} on are not side by side"
            names = frozenset(piece.name for piece in run)
            found.append(Bucket(first=index, within=(start, stop), names=names))
            run = []
    return tuple(found)


class EarlySums:
    """Sums of ``gradients`` over ``group`` that are under way; ``zero`` 1: each to its owner."""

    def __init__(
        self, gradients: Tensor, buckets: Sequence[Bucket], group: dist.ProcessGroup, *, zero: int
    ) -> None:
        self.gradients, self.buckets, self.group, self.zero = gradients, buckets, group, zero
        self.started = 0
        self._works: list[dist.Work] = []

    def ready(self, block: int) -> Iterator[Bucket]:
        """Buckets that are whole when backward has left ``block``; each is given once."""
        while self.started < len(self.buckets) and self.buckets[self.started].first >= block:
            self.started += 1
            yield self.buckets[self.started - 1]

    def start(self, within: Range) -> None:
        """Begin to sum a range of the flat gradients."""
        part = self.gradients[within[0] : within[1]]
        if self.zero == 0:
            for piece in part.split(max(1, data.BUCKET_BYTES // part.element_size())):
                self._keep(dist.all_reduce(piece, group=self.group, async_op=True))
            return
        size = self.gradients.numel() // dist.get_world_size(self.group)
        for owner in range(dist.get_world_size(self.group)):
            a, b = max(within[0], owner * size), min(within[1], (owner + 1) * size)
            if a < b:
                rank = dist.get_global_rank(self.group, owner)
                piece = self.gradients[a:b]
                self._keep(dist.reduce(piece, rank, group=self.group, async_op=True))

    def _keep(self, work: dist.Work | None) -> None:
        if work is not None:
            self._works.append(work)

    def rest(self) -> tuple[Range, ...]:
        """What no bucket has, before and after them."""
        first, last = self.buckets[-1].within[0], self.buckets[0].within[1]
        return (0, first), (last, self.gradients.numel())

    def wait(self) -> None:
        """Until all that was started is summed; then the next step may begin."""
        for work in self._works:
            work.wait()
        self._works.clear()
        self.started = 0
