"""``ParameterBuffer``: a rank's share of a role's weights in one flat tensor, and views into it.

One flat tensor makes the whole of a layout one message, one gradient all-reduce and one
optimizer update; the views carry the shapes. A layout that is there for a part of the step only
does not copy what the rank holds anyway: such slices are views of the other buffer. Which slice
lies where is ``planner.layout``'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from planner.layout import Layout, ParameterSlice
from planner.lending import lent

Range = tuple[int, int]


class FlatBoxes(Protocol):
    """Values of one type that lie flat, found by box: what a reallocation reads and fills."""

    @property
    def flat(self) -> Tensor: ...

    @property
    def lent(self) -> frozenset[str]: ...

    def row(self, piece: ParameterSlice) -> Range | None: ...

    def of_row(self, name: str, row: Range) -> Tensor: ...

    def box(self, piece: ParameterSlice) -> Tensor: ...


class ParameterBuffer:
    """Flat storage [num_values + padding] of ``slices``, in their order.

    ``flat`` holds no values yet; it is padded with zeros to a multiple of ``multiple`` so that it
    can be cut evenly over data-parallel ranks. ``expert_multiple``: experts, which come last, are
    held by fewer ranks; they begin at ``experts_start``, padded before to ``multiple`` and after
    to this. ``lender``: slices that it covers are not stored but lent, as views that may be
    strided; neither side may be written while both are in use.
    """

    def __init__(
        self,
        slices: Sequence[ParameterSlice],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        multiple: int = 1,
        expert_multiple: int | None = None,
        lender: ParameterBuffer | None = None,
    ) -> None:
        self.slices = tuple(slices)
        self.lender = lender
        self.lent = frozenset() if lender is None else lent(self.slices, lender.slices)
        self.starts: dict[str, int] = {}
        self.by_name = {piece.name: piece for piece in self.slices}
        assert len(self.by_name) == len(self.slices), "one slice of a parameter on a rank"
        stored = [piece for piece in self.slices if piece.name not in self.lent]
        experts = [piece for piece in stored if expert_multiple is not None and piece.is_expert]
        assert stored[len(stored) - len(experts) :] == experts, "experts come last"
        rest = stored[: len(stored) - len(experts)]
        self.num_values = sum(piece.num_values for piece in stored)
        rest_end = self._place(rest, 0)
        self.experts_start = -(-rest_end // multiple) * multiple
        end = self._place(experts, self.experts_start)
        padded = -(-(end - self.experts_start) // (expert_multiple or 1)) * (expert_multiple or 1)
        self.flat = torch.empty(self.experts_start + padded, dtype=dtype, device=device)
        self.flat[rest_end : self.experts_start] = 0
        self.flat[end:] = 0

    def _place(self, pieces: Sequence[ParameterSlice], start: int) -> int:
        """Slices one after the other from ``start`` on; returns where the last one ends."""
        for piece in pieces:
            self.starts[piece.name] = start
            start += piece.num_values
        return start

    @classmethod
    def for_rank(
        cls, layout: Layout, rank: int, *, dtype: torch.dtype, device: torch.device | str,
        multiple: int = 1, lender: ParameterBuffer | None = None,
    ) -> ParameterBuffer:  # fmt: skip
        expert_multiple = max(1, multiple // layout.ep) if layout.ep > 1 else None
        return cls(
            layout.slices(rank), dtype=dtype, device=device, multiple=multiple,
            expert_multiple=expert_multiple, lender=lender,
        )  # fmt: skip

    def with_values(self, flat: Tensor) -> ParameterBuffer:
        """The same slices of another flat tensor, in the same order and with the same padding."""
        assert self.lender is None, "what is lent lies elsewhere"
        assert flat.shape == self.flat.shape, (flat.shape, self.flat.shape)
        found = copy(self)
        found.flat = flat
        return found

    def view(self, name: str, *, of: Tensor | None = None) -> Tensor:
        """The tensor of one slice, in its local shape; ``of``: another flat tensor, same order."""
        piece = self.by_name[name]
        if self.lender is not None and name in self.lent:
            return self.lender.box(piece)
        start = self.starts[name]
        flat = self.flat if of is None else of
        return flat[start : start + piece.num_values].view(piece.length)

    def fused(self, names: Sequence[str], *, of: Tensor | None = None) -> Tensor:
        """Neighbouring slices as one tensor [sum of rows, …] without a copy: q, k, v at once."""
        if self.lender is not None and names[0] in self.lent:
            return self.lender.fused(names) if len(names) > 1 else self.view(names[0])
        pieces = [self.by_name[name] for name in names]
        for before, after in pairwise(names):
            expected = self.starts[before] + self.by_name[before].num_values
            assert self.starts[after] == expected, f"{before} and {after} are not neighbours"
        rows = sum(piece.length[0] for piece in pieces)
        start = self.starts[names[0]]
        count = sum(piece.num_values for piece in pieces)
        flat = self.flat if of is None else of
        return flat[start : start + count].view(rows, *pieces[0].length[1:])

    def row(self, piece: ParameterSlice) -> Range | None:
        """Where the values of ``piece``, a box inside one slice, lie side by side; else None.

        ``of_row`` makes the tensor: most rows are asked for long before they are needed.
        """
        if self.lender is not None and piece.name in self.lent:
            return self.lender.row(piece)
        inside = row_in(self.by_name[piece.name], piece)
        if inside is None:
            return None
        start = self.starts[piece.name] + inside
        return start, start + piece.num_values

    def of_row(self, name: str, row: Range) -> Tensor:
        """The values [stop - start] of a ``row`` of slice ``name``."""
        if self.lender is not None and name in self.lent:
            return self.lender.of_row(name, row)
        return self.flat[row[0] : row[1]]

    def box(self, piece: ParameterSlice) -> Tensor:
        """The part of this buffer that holds ``piece``, a box inside one of its slices."""
        return self.view(piece.name)[piece.relative_to(self.by_name[piece.name])]


def row_in(whole: ParameterSlice, piece: ParameterSlice) -> int | None:
    """Where in ``whole``, laid out by rows, ``piece`` begins if its values lie side by side."""
    start, stride, broken = 0, 1, False
    for have, first, o, n in zip(
        reversed(whole.length), reversed(whole.offset), reversed(piece.offset),
        reversed(piece.length), strict=True,
    ):  # fmt: skip
        if broken and n > 1:
            return None
        broken = broken or n < have
        start += (o - first) * stride
        stride *= have
    return start
