"""``compiled``: a function as machine code that lets other threads run, kept on disk.

numba's cache looks at the date of a function's own file; a kernel that calls one of another file
would not notice a change there. So the name under which a kernel is kept has a digest of all
files with kernels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])

# Every file that has kernels, below this one's folder.
KERNELS = ("cost/lanes.py", "search/kernels.py", "search/moves.py", "search/chain.py")


def _digest() -> str:
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / k).read_bytes() for k in KERNELS)).hexdigest()[:12]


DIGEST = _digest()


def compiled(function: Function) -> Function:
    """``function``, compiled on its first call; it holds no lock of the interpreter.

    It must not make arrays: with ``_nrt`` off numba counts no references, which between kernels
    that pass tables to each other takes longer than all they do.
    """
    function.__qualname__ += f"-{DIGEST}"
    options: dict[str, Any] = {"nogil": True, "_nrt": False}
    try:
        return cast(Function, njit(cache=True, **options)(function))
    except RuntimeError:  # no folder that can be written: compiled anew in every process
        return cast(Function, njit(**options)(function))
