"""``Offloadable``: tensors of one owner that are on the device or in the host's memory.

Read ``offload`` and ``reload``. Only the storages come and go, the tensors stay: views of them (the
slices of a buffer, the ``.grad`` of every weight) are right again when the storage is back. When
that happens is the program's (``Offload``, ``Reload``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from profiles.units import MIB

# Of one buffer in the host's memory: for a pinned one torch takes the next power of two.
PIECE_BYTES = 256 * MIB


class Offloadable:
    """``kept`` tensors come back with their values, ``cleared`` ones with zeros.

    Each must be the whole of its storage. ``constant``: nobody writes ``kept`` ones, so that they
    cross to the host once. In the host's memory they lie in pinned buffers, which stay for the next
    time; a CPU's are pageable, and are there only while the tensors are not.
    """

    def __init__(
        self, kept: Sequence[Tensor], cleared: Sequence[Tensor] = (), *, constant: bool = False
    ) -> None:
        self.kept, self.cleared = tuple(kept), tuple(cleared)
        self.constant = constant
        self.host: list[tuple[Tensor, ...]] = []  # of every kept tensor, in pieces
        self.away = False
        for tensor in (*self.kept, *self.cleared):
            assert _num_bytes(tensor) == tensor.untyped_storage().nbytes(), tensor.shape

    def offload(self) -> int:
        """Give up the device's memory; returns the bytes that cross to the host.

        A GPU's cross beside what it does next: its allocator gives their memory to nobody before
        they have left, and lets who needs it wait until then.
        """
        assert not self.away
        moved = 0
        if not (self.constant and self.host):
            self.host = self.host or [_like(tensor) for tensor in self.kept]
            for there, here in zip(self.host, self.kept, strict=True):
                with _beside(here):
                    _copy(there, _pieces(here))
                moved += _num_bytes(here)
        for tensor in (*self.kept, *self.cleared):
            tensor.untyped_storage().resize_(0)
        self.away = True
        return moved

    def reload(self) -> int:
        """Have everything on the device again; returns the bytes that crossed from the host."""
        assert self.away
        for tensor in (*self.kept, *self.cleared):
            tensor.untyped_storage().resize_(_num_bytes(tensor))
        for there, here in zip(self.host, self.kept, strict=True):
            if here.is_cuda:  # what has left last may be on its way still
                torch.cuda.current_stream(here.device).wait_stream(_side_stream(here.device))
            _copy(_pieces(here), there)
        for tensor in self.cleared:
            tensor.zero_()
        if not any(tensor.is_cuda for tensor in self.kept):
            self.host = []
        self.away = False
        return sum(_num_bytes(tensor) for tensor in self.kept)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.view(-1).split(PIECE_BYTES // tensor.element_size())


def _like(tensor: Tensor) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty(piece.shape, dtype=piece.dtype, pin_memory=piece.is_cuda)
        for piece in _pieces(tensor)
    )


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)


@contextmanager
def _beside(tensor: Tensor) -> Iterator[None]:
    """Within, ``tensor`` on a GPU is read when all that was begun is done, beside what follows."""
    if not tensor.is_cuda:
        yield
        return
    side = _side_stream(tensor.device)
    side.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(side):
        yield
    tensor.record_stream(side)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
