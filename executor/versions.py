"""``Versions``: how many steps have trained the weights that a rank holds, as their source says.

A borrowed layout's version is told by the rank that trains the role, through the run's store, when
the weights are brought; so a step's staleness is what was read and not what was planned.
"""

from __future__ import annotations

import torch.distributed as dist

from planner.layout import Layout
from planner.program import Reallocate


class Versions:
    """By (role, layout) of trained roles; ``first``: steps that were done when the run began."""

    def __init__(self, store: dist.Store, rank: int, *, first: int = 0) -> None:
        self.store = store
        self.rank = rank
        self.first = first
        self.held: dict[tuple[str, Layout], int] = {}

    def of(self, role: str, layout: Layout) -> int:
        """Steps that have trained these weights."""
        return self.held.get((role, layout), self.first)

    def trained(self, role: str, layout: Layout, done: int) -> None:
        """So many steps have trained the role now."""
        self.held[role, layout] = done

    def tell(self, instruction: Reallocate, *, step: int) -> None:
        """Before the weights move: the source's first rank leaves which they are."""
        if self.rank == instruction.source.mesh.first:
            version = self.of(instruction.role, instruction.source)
            self.store.set(_key(instruction, step), str(version))

    def hear(self, instruction: Reallocate, *, step: int) -> None:
        """After they have come: that rank has left it by then, or is about to."""
        if self.rank in instruction.destination.mesh:
            version = int(self.store.get(_key(instruction, step)))
            self.held[instruction.role, instruction.destination] = version


def _key(instruction: Reallocate, step: int) -> str:
    return f"version/{step}/{instruction.index}"
