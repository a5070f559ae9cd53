"""A trained role's state from one (layout, ZeRO) to another, rank to rank, state by state.

Which boxes go where is ``planner.optimizer_state``'s, how they cross ``reallocate.py``'s. Read
``move_states``; that weights follow from masters is ``Adam.go_on``'s.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from executor.buffers import Range, row_in
from executor.cross_memory import CrossMemory
from executor.parallel.optimizer import Adam
from executor.reallocate import carry_out
from executor.reallocation_rounds import make_schedule
from planner.layout import ParameterSlice
from planner.optimizer_state import StateReallocation, StateSection

# Masters last: where these are the weights themselves, the old buffer is needed until then.
STATES = ("exp_avg", "exp_avg_sq", "weight")

# By name of a state a tensor [own values], fp32, for each section.
States = dict[str, list[Tensor]]


class StateBuffer:
    """One state of a rank: for each section a tensor [own values] that its boxes lie in."""

    def __init__(self, sections: Sequence[StateSection], tensors: Sequence[Tensor]) -> None:
        self.flat = tensors[0]  # tells type and device; places are within the box's own tensor
        self.lent: frozenset[str] = frozenset()
        self._tensors: dict[str, Tensor] = {}
        self._boxes: dict[str, list[tuple[int, ParameterSlice]]] = defaultdict(list)
        for section, tensor in zip(sections, tensors, strict=True):
            assert tensor.shape == (section.own[1] - section.own[0],), (tensor.shape, section.own)
            for start, box in section.boxes:
                self._tensors[box.name] = tensor
                self._boxes[box.name].append((start, box))

    def _around(self, piece: ParameterSlice) -> tuple[int, ParameterSlice]:
        """The box that ``piece`` is inside of, and where it begins."""
        for start, box in self._boxes[piece.name]:
            if all(
                o <= p and p + n <= o + have
                for o, have, p, n in zip(
                    box.offset, box.length, piece.offset, piece.length, strict=True
                )
            ):
                return start, box
        raise AssertionError(f"no box around {piece}")

    def row(self, piece: ParameterSlice) -> Range | None:
        """Where the values of ``piece`` lie side by side, if they do."""
        start, box = self._around(piece)
        inside = row_in(box, piece)
        return None if inside is None else (start + inside, start + inside + piece.num_values)

    def of_row(self, name: str, row: Range) -> Tensor:
        """The values [stop - start] of a ``row`` of parameter ``name``."""
        return self._tensors[name][row[0] : row[1]]

    def box(self, piece: ParameterSlice) -> Tensor:
        """The values of ``piece``, in its shape."""
        start, box = self._around(piece)
        whole = self._tensors[piece.name][start : start + box.num_values].view(box.length)
        return whole[piece.relative_to(box)]


def states_of(adam: Adam) -> States:
    """What an optimizer keeps, to be moved; it must not take a step any more."""
    return {name: [section.state()[name] for section in adam.sections] for name in STATES}


def move_states(
    plan: StateReallocation,
    states: States | None,
    allocate: Callable[[str, StateSection], Tensor],
    *,
    rank: int,
    staging_bytes: int,
    memory: CrossMemory | None = None,
) -> tuple[States | None, int]:
    """This rank's states under ``plan.dst`` (None outside), and the bytes that it received.

    All ranks of both meshes together; ``states`` are those under ``plan.src``, None outside. They
    are taken out one by one, so that where nobody else holds them never more than one is in memory
    twice. ``allocate`` makes a tensor of a state, whose padding is zero.
    """
    there = plan.dst.sections(rank)
    if states is None and not there:
        return None, 0
    schedule = make_schedule(plan, rank, staging_bytes // torch.float32.itemsize)
    found: States = {}
    received = 0
    for name in STATES:
        old = None if states is None else states.pop(name)
        source = None if old is None else StateBuffer(plan.src.sections(rank), old)
        destination = None
        if there:
            found[name] = [allocate(name, section) for section in there]
            destination = StateBuffer(there, found[name])
        received += carry_out(schedule, source, destination, memory=memory)
    return (found if there else None), received
