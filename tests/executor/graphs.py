"""A CUDA graph without CUDA: the operators that an action ran, run again on the same tensors.

As on a device nothing of the action's Python runs again, addresses are those of the capture, and
what would make a capture fail there fails here: asking for a value, and a tensor made of Python's
numbers, which would have to cross to the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
FORBIDDEN = {
    _aten._local_scalar_dense.default, _aten.lift_fresh.default, _aten.nonzero.default,
    _aten.is_nonzero.default, _aten.equal.default, _aten.index.Tensor,
}  # fmt: skip


def tensors_of(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Recorder(TorchDispatchMode):
    """``operations``: (operator, arguments, keyword arguments, results) in order."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in FORBIDDEN:
            raise RuntimeError(f"{func} cannot be captured")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Every result is written where it lay."""
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            for leaf in tree_leaves(again):
                if hasattr(leaf, "wait") and not isinstance(leaf, Tensor):
                    leaf.wait()  # a collective's work
            for old, new in zip(tensors_of(out), tensors_of(again), strict=True):
                if old.is_mkldnn or old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Graphs:
    """A ``Capture``. ``captures`` and ``replays`` so far, the latter by the capture's number."""

    def __init__(self) -> None:
        self.replays: list[int] = []
        self.recorders: list[Recorder] = []

    @property
    def captures(self) -> int:
        return len(self.recorders)

    def __call__(self, action: Callable[[], object]) -> Callable[[], object]:
        recorder = Recorder()
        with recorder:
            action()
        number = len(self.recorders)
        self.recorders.append(recorder)

        def replay() -> None:
            self.replays.append(number)
            recorder.replay()

        return replay
