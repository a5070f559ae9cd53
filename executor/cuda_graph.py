"""An action as a CUDA graph: its kernels without what starting them costs the host.

Read ``GraphCapture``. A graph is the kernels with the addresses that they had: what is to change
from replay to replay must lie in tensors that stay, and nothing in it may ask the device for a
value. Decode turns are run so (``generate/static_step.py``), and measured (``profile_graph.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import torch

Action = Callable[[], object]
# From an action to what does the same again, by the tensors' values at that time.
Capture = Callable[[Action], Action]


class GraphPool:
    """Memory that graphs share, as long as one of them is there."""

    def __init__(self) -> None:
        self.graphs: WeakSet[_Replay] = WeakSet()
        self._handle: Any = None

    def handle(self) -> Any:
        """For one more graph; torch takes none again whose graphs are all gone."""
        if not self.graphs:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle


class _Replay:
    """A graph that was captured; it is gone with this."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph

    def __call__(self) -> None:
        self._graph.replay()


class GraphCapture:
    """A ``Capture`` on ``device``, for one generation.

    Graphs of one ``pool`` share their memory, so that only one may run at once. What an action
    returns is that memory's, and another replay writes over it: results go into tensors from
    outside. It is free again when all graphs are gone. An action must have run before, so that its
    kernels are loaded and their libraries set up; while it is captured it does not run. Shards
    capture and replay alike, for whether a collective is in a graph must be the same on all its
    ranks (NVIDIA, "Using NCCL with CUDA Graphs"). Only this thread's errors end a capture: NCCL's
    watchdog calls CUDA at all times. ``stream``: where kernels are captured, not run; each has
    workspaces of cuBLAS's for good, so that one should do for all.
    """

    def __init__(
        self, device: torch.device, stream: torch.cuda.Stream, pool: GraphPool | None = None
    ) -> None:
        self.device, self.stream = device, stream
        self.pool = GraphPool() if pool is None else pool
        self.is_first = True

    def __call__(self, action: Action) -> Action:
        """The replay of ``action``.

        Raises:
            RuntimeError: something in the action waits for the device, or no memory is left.
        """
        # Not ``torch.cuda.graph``, which collects garbage and gives back the allocator's unused
        # memory before every graph: some tenths of a second. Once is needed: all that the device
        # has may be the allocator's, for tensors that are gone, and a capture gives nothing back.
        if self.is_first:
            torch.cuda.empty_cache()
            self.is_first = False
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool.handle(), capture_error_mode="thread_local")
            try:
                action()
            except BaseException:
                with suppress(RuntimeError):  # it says again that the capture failed
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        replay = _Replay(graph)
        self.pool.graphs.add(replay)
        return replay
