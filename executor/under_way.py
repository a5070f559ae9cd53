"""``UnderWay``: sends of a reallocation that a rank has left behind, to go on with other work.

A rank that only gives weights away (it holds the source and nothing of the destination) has
nothing to wait for but that they have left, or been read, before it changes them. Its sends are
posted in the program's order, so that between two ranks every message still matches. All that it
may not do meanwhile is in ``holds_back``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from planner.graph import DataflowGraph
from planner.program import Average, Instruction, Offload, Reallocate, Train


class UnderWay:
    """At most one reallocation's: ``instruction``, None where nothing is under way."""

    def __init__(self, graph: DataflowGraph) -> None:
        self.graph = graph
        self.instruction: Reallocate | None = None
        self._waits: Sequence[Callable[[], None]] = ()

    def begin(self, instruction: Reallocate, waits: Sequence[Callable[[], None]]) -> None:
        """Sends of ``instruction`` have been posted; each of ``waits`` is for some of them."""
        assert self.instruction is None, self.instruction
        if waits:
            self.instruction, self._waits = instruction, waits

    def holds_back(self, instruction: Instruction) -> bool:
        """It may write what is being sent, or needs the staging that has a part of it."""
        if self.instruction is None:
            return False
        if isinstance(instruction, Train):
            return self.graph.call(instruction.call).role == self.instruction.role
        if isinstance(instruction, Average | Offload):
            return instruction.role == self.instruction.role
        return isinstance(instruction, Reallocate)

    def finish(self) -> None:
        """Returns when all has left or been read.

        Raises:
            RuntimeError: a receiver is gone, or did not come before the messages' deadline.
        """
        for wait in self._waits:
            wait()
        self.instruction, self._waits = None, ()
