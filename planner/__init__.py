"""What to do: from a dataflow graph, models and a cluster to a plan. Imports no torch.

Belongs to the distribution ``realplan``. In a notebook start with ``load_plan``, ``search`` and
``WhatIf``.
"""

from __future__ import annotations

from typing import Any

from planner.plan_schema import load_plan, save_plan
from planner.search import search

__all__ = ["WhatIf", "load_plan", "save_plan", "search"]


def __getattr__(name: str) -> Any:
    """``WhatIf`` on first use: it needs pandas, which takes longer to import than all of this."""
    if name == "WhatIf":
        from planner.whatif import WhatIf

        return WhatIf
    raise AttributeError(f"module 'planner' has no attribute '{name}'")
