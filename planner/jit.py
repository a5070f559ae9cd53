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

# Every file that has kernels or their records, below this one's folder.
KERNELS = (
    "jit.py", "cost/crossings.py", "cost/lanes.py", "search/records.py", "search/pace.py",
    "search/kernels.py", "search/moves.py", "search/chain.py", "search/patterns.py",
    "search/cycles.py", "search/boxes.py",
)  # fmt: skip


def _digest() -> str:
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / k).read_bytes() for k in KERNELS)).hexdigest()[:12]


DIGEST = _digest()


def entry(function: Function) -> Function:
    """``function`` in machine code, for Python to call; it holds no lock of the interpreter.

    It must not make arrays: with ``_nrt`` off numba counts no references, which between kernels
    that pass tables to each other takes longer than all they do.
    """
    return _compiled(function, cache=True)


def brief(function: Function) -> Function:
    """As ``entry``, for what takes microseconds: it keeps the interpreter's lock.

    To give it up and get it back, while another thread waits for it, takes longer.
    """
    return _compiled(function, cache=True, nogil=False)


def compiled(function: Function) -> Function:
    """As ``entry``, for other kernels only: to unpack Python's arguments takes long to compile.

    Python must not call it: numba 0.68 has nothing to call then, and does not look.
    """
    return _compiled(function, cache=True, no_cpython_wrapper=True)


def inlined(function: Function) -> Function:
    """As ``compiled``, for a line or two: copied into its callers, not compiled by itself."""
    return _compiled(function, inline="always", no_cpython_wrapper=True)


def _compiled(function: Function, **options: Any) -> Function:
    function.__qualname__ += f"-{DIGEST}"
    always = {"_nrt": False, "no_cfunc_wrapper": True, "error_model": "numpy"}
    options = {"nogil": True, **options, **always}
    try:
        return cast(Function, njit(**options)(function))
    except RuntimeError:  # no folder that can be written: compiled anew in every process
        return cast(Function, njit(**{**options, "cache": False})(function))
