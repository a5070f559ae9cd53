"""An action as a CUDA graph: its kernels without what starting them costs the host.

``realexec profile --device cuda`` times decode steps both ways (``decode`` and ``decode_graph``):
the difference is what a generation engine with graphs would save.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from executor.profile_measure import Action

logger = logging.getLogger(__name__)

# From an action to its replay, or None where it cannot be captured.
Capture = Callable[[Action], Action | None]

_WARM_UPS = 3


def capture(action: Action) -> Action | None:
    """``action``, whose tensors keep their places, as one replay on the current CUDA device.

    Warmed up on a stream of its own, as capturing asks for (PyTorch's notes on CUDA graphs). None
    where something in it waits for the device or allocates out of turn, which is said.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            action()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            action()
    except RuntimeError as error:
        logger.warning("decode steps are measured without CUDA graphs: %s", error)
        return None
    return graph.replay
