"""``CrossMemory``: a worker reads another's tensors on the same machine, in one copy.

A message between two processes of a machine is copied into the kernel and out again, and through
a staging buffer at both ends where rows are cut. Linux can do it at once (``process_vm_readv``, the
"cross memory attach" of MPI libraries): strided at either end, and the owner has nothing to do.
Containers and security modules may forbid it, so ``between_workers`` tries it out; whoever cannot
be read sends messages. For CPUs; between GPUs this is NCCL's.
"""

from __future__ import annotations

import ctypes
import os
import secrets
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from executor.parallel.data import gather

Ints = npt.NDArray[np.int64]

PLACE_VALUES = 5  # of ``place_of``: experts have four dimensions
_MOST_VECTORS = 1024  # of one call: IOV_MAX
_PIECE_BYTES = 1 << 20  # so that a call has at most 1 GiB; Linux would cut it at 2
_PR_SET_PTRACER = 0x59616D61  # <linux/prctl.h>

_libc = ctypes.CDLL(None, use_errno=True)
# Linux has it; elsewhere nobody is read.
_readv = getattr(_libc, "process_vm_readv", None)
if _readv is not None:
    _readv.restype = ctypes.c_ssize_t
    _readv.argtypes = (
        ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong,
        ctypes.c_ulong,
    )  # fmt: skip


def place_of(tensor: Tensor) -> list[int]:
    """Where a tensor of at most four dimensions lies: its address, and strides in bytes.

    Of the shape the reader knows; a tensor of fewer dimensions has strides of 0 before its own.
    """
    strides = [stride * tensor.element_size() for stride in tensor.stride()]
    assert len(strides) < PLACE_VALUES, tensor.shape
    return [tensor.data_ptr(), *[0] * (PLACE_VALUES - 1 - len(strides)), *strides]


class CrossMemory:
    """``pids`` by rank; ``readable``: pairs of ranks that read each other, both ways round."""

    def __init__(self, pids: Sequence[int], readable: frozenset[tuple[int, int]]) -> None:
        assert all((b, a) in readable for a, b in readable), readable
        self.pids = tuple(pids)
        self.readable = readable

    @property
    def all_readable(self) -> bool:
        """Everybody may read everybody's."""
        return len(self.readable) == len(self.pids) * (len(self.pids) - 1)

    @classmethod
    def between_workers(cls) -> CrossMemory:
        """All processes of the group together: each tries to read what every other one shows."""
        rank, world = dist.get_rank(), dist.get_world_size()
        shown = torch.tensor([secrets.randbits(62)])
        if _readv is not None:
            # Yama lets a process be read by its ancestors only, and by whom it names: whoever
            # started it, and with that all that the same one started. Without Yama it is refused.
            _libc.prctl(_PR_SET_PTRACER, os.getppid(), 0, 0, 0)
        own = torch.tensor([_process_space(), os.getpid(), int(shown), *place_of(shown)])
        told = [one.tolist() for one in gather(own, dist.group.WORLD)]
        pids = [pid for _, pid, *_ in told]
        alone = cls(pids, frozenset())
        reads = torch.zeros(world, dtype=torch.uint8)
        for owner, (space, _, value, *place) in enumerate(told):
            if owner != rank and space == int(own[0]):
                reads[owner] = alone._reads(owner, place, value)
        every = torch.stack(gather(reads, dist.group.WORLD))  # after which what is shown may go
        return cls(pids, frozenset((a, b) for a, b in (every & every.T).nonzero().tolist()))

    def _reads(self, owner: int, place: Sequence[int], value: int) -> bool:
        """It may, and it is the process that shows ``value``."""
        seen = torch.zeros(1, dtype=torch.int64)
        try:
            self.read(owner, [place], [seen])
        except OSError:
            return False
        return int(seen) == value

    def read(self, owner: int, places: Sequence[Sequence[int]], targets: Sequence[Tensor]) -> None:
        """Fill ``targets`` from where the owner's tensors of the same shapes and type lie.

        Raises:
            OSError: the owner has ended, or may not be read.
        """
        for place, target in zip(places, targets, strict=True):
            ends = _side_by_side(place, target), _side_by_side(place_of(target), target)
            # The longer run is so many of the shorter: the pieces are alike at both ends.
            shorter = min(int(runs[0, 1]) for runs in ends)
            self._read(owner, *(_cut(_cut(runs, shorter), _PIECE_BYTES) for runs in ends))

    def _read(self, owner: int, there: Ints, here: Ints) -> None:
        """Pieces [pieces, address and bytes], alike in bytes at both ends."""
        for first in range(0, len(here), _MOST_VECTORS):
            pieces = slice(first, first + _MOST_VECTORS)
            mine, theirs = _joined(here[pieces]), _joined(there[pieces])
            wanted, count = int(mine[:, 1].sum()), -1
            if _readv is not None:
                count = _readv(
                    self.pids[owner], mine.ctypes.data, len(mine), theirs.ctypes.data,
                    len(theirs), 0,
                )  # fmt: skip
            if count < 0:
                code = ctypes.get_errno()
                raise OSError(code, f"cannot read the memory of rank {owner}: {os.strerror(code)}")
            if count != wanted:
                raise OSError(f"{count} of {wanted} bytes could be read of rank {owner}")


def _process_space() -> int:
    """Where a process's number means the same, one kernel and one namespace of it: 62 bits."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        name = f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return secrets.randbits(62)  # nobody else's
    return int.from_bytes(sha256(name.encode()).digest(), "big") >> 194


def _side_by_side(place: Sequence[int], like: Tensor) -> Ints:
    """What of a tensor lies side by side, in its order: [runs, address and bytes]."""
    num_bytes = like.element_size()
    dims = list(zip(like.shape, place[PLACE_VALUES - like.dim() :], strict=True))
    while dims and (dims[-1][0] == 1 or dims[-1][1] == num_bytes):
        num_bytes *= dims.pop()[0]
    starts = np.array([place[0]], dtype=np.int64)
    for length, stride in dims:
        starts = (starts[:, None] + stride * np.arange(length)).ravel()
    return np.stack((starts, np.full_like(starts, num_bytes)), axis=1)


def _cut(runs: Ints, most: int) -> Ints:
    """The same bytes in pieces of ``most``, and the rest of each run."""
    whole = int(runs[0, 1])
    if whole <= most:
        return runs
    offsets = np.arange(0, whole, most)
    lengths = np.minimum(most, whole - offsets)
    starts = (runs[:, :1] + offsets).ravel()
    return np.stack((starts, np.tile(lengths, len(runs))), axis=1)


def _joined(pieces: Ints) -> Ints:
    """The same bytes with neighbours as one."""
    apart = pieces[1:, 0] != pieces[:-1].sum(axis=1)
    firsts = np.flatnonzero(np.concatenate(([True], apart)))
    lengths = np.add.reduceat(pieces[:, 1], firsts)
    return np.ascontiguousarray(np.stack((pieces[firsts, 0], lengths), axis=1))
