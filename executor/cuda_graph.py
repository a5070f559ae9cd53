"""An action as a CUDA graph: its kernels without what starting them costs the host.

Read ``graph_capture``. A graph is the kernels with the addresses that they had: what is to change
from replay to replay must lie in tensors that stay, and nothing in it may ask the device for a
value. Decode turns are run so (``generate/static_step.py``), and measured (``profile_graph.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch

Action = Callable[[], object]
# From an action to what does the same again, by the tensors' values at that time.
Capture = Callable[[Action], Action]


def graph_capture(device: torch.device) -> Capture:
    """A ``Capture`` on ``device``; its graphs share their memory, so that only one may run at once.

    What an action returns is the pool's, and another replay writes over it: results go into
    tensors from outside. The memory is free again when all graphs and this function are gone. An
    action must have run before, so that its kernels are loaded and their libraries set up; while
    it is captured it does not run. Shards capture and replay alike, for whether a collective is
    in a graph must be the same on all its ranks (NVIDIA, "Using NCCL with CUDA Graphs"). Errors of
    this thread only end a capture: NCCL's watchdog calls CUDA at all times.

    Raises (the capture):
        RuntimeError: something in the action waits for the device, or no memory is left.
    """
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)

    def capture(action: Action) -> Action:
        # Not ``torch.cuda.graph``, which collects garbage and empties the allocator's cache first:
        # some tenths of a second for every graph.
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                action()
            except BaseException:
                with suppress(RuntimeError):  # it says again that the capture failed
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)
        return graph.replay

    return capture
