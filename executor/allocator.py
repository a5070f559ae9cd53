"""How a CPU worker's memory is allocated."""

from __future__ import annotations

import ctypes

from profiles.units import MIB

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>


def keep_freed_memory() -> None:
    """glibc hands freed tensors of up to 32 MiB, the most that it takes, to those of the next step.

    By default a heap's end goes back to the kernel, which clears every page again when it is next
    touched. Elsewhere than on glibc nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * MIB)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
