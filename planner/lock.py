"""``Lock``: what a user has decided of one call, so that a search decides only the rest."""

from __future__ import annotations

from dataclasses import dataclass

from planner.mesh import DeviceMesh
from planner.plan import Allocation
from planner.strategy import ParallelStrategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """Parts of an allocation that are fixed; None leaves a part to the search.

    ``strategy`` fixes pp, tp, dp and ep. ``allocation`` fixes everything.
    """

    mesh: DeviceMesh | None = None
    strategy: ParallelStrategy | None = None
    num_micro_batches: int | None = None
    offload: bool | None = None
    allocation: Allocation | None = None

    def allows(self, allocation: Allocation) -> bool:
        """Is every fixed part of it as it was fixed?"""
        return self.allows_way(allocation) and self.offload in (None, allocation.offload)

    def allows_way(self, allocation: Allocation) -> bool:
        """The same, whatever is fixed of its offload."""
        if self.allocation is not None and allocation != self.allocation:
            return False
        if self.mesh is not None and allocation.mesh != self.mesh:
            return False
        if self.strategy is not None and allocation.strategy.short != self.strategy.short:
            return False
        return self.num_micro_batches in (None, allocation.num_micro_batches)
