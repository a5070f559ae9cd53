"""A measured action as a CUDA graph.

``realexec profile --device cuda`` times decode steps both ways (``decode`` and ``decode_graph``):
generation runs them as graphs where it can (``generate/static_step.py``), and eagerly elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from executor.cuda_graph import GraphCapture
from executor.profile_measure import Action

logger = logging.getLogger(__name__)

# From an action to its replay, or None where it cannot be captured.
TryCapture = Callable[[Action], Action | None]

_WARM_UPS = 3


def capture(action: Action) -> Action | None:
    """``action``, whose tensors keep their places, as one replay on the current CUDA device.

    None where something in it waits for the device or allocates out of turn, which is said.
    """
    for _ in range(_WARM_UPS):
        action()
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        return GraphCapture(device, torch.cuda.Stream(device))(action)
    except RuntimeError as error:
        logger.warning("decode steps are measured without CUDA graphs: %s", error)
        return None
