"""``StorageCount``: the bytes that tensors hold, counted as they come and go.

It counts real tensors and fake ones alike: what a run holds (tests) and what a plan's rank would
(``fake.py``).
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from executor.cuda_graph import Action


class StorageCount(TorchDispatchMode):
    """Counts the bytes of all storages that come about under it.

    ``peaks``: most bytes at once, by what ``begin`` said was under way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self.seen: dict[int, weakref.ref[Any]] = {}
        self.peaks: dict[str, int] = {}
        self.label = "setup"

    def begin(self, label: str) -> None:
        self.label = label
        self.peaks[label] = max(self.held, self.peaks.get(label, 0))

    def most_during(self, action: Action) -> int:
        """Bytes that are held at most while ``action`` runs, beyond those held before it."""
        label, held = self.label, self.held
        self.begin("apart")
        action()
        most = self.peaks.pop("apart")
        self.begin(label)
        return most - held

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = self._run(func, args, kwargs or {})
        if isinstance(out, Tensor):
            self._count(out)
        elif isinstance(out, tuple | list):
            for part in out:
                if isinstance(part, Tensor):
                    self._count(part)
        return out

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def _count(self, tensor: Tensor) -> None:
        if tensor.is_mkldnn:  # opaque, but as large
            num_bytes = tensor.numel() * tensor.element_size()
            weakref.finalize(tensor, self.hold, -num_bytes)
            self.hold(num_bytes)
            return
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self.seen:
            return

        def gone(_: object) -> None:
            self.seen.pop(key)
            self.held -= num_bytes

        self.seen[key] = weakref.ref(storage, gone)
        self.hold(num_bytes)

    def hold(self, num_bytes: int) -> None:
        """So many bytes more are held from now on."""
        self.held += num_bytes
        self.peaks[self.label] = max(self.held, self.peaks.get(self.label, 0))
