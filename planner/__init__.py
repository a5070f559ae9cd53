"""What to do: from a dataflow graph, models and a cluster to a plan. Imports no torch.

Belongs to the distribution ``realplan``. In a notebook start with ``load_plan`` and ``search``.
"""

from __future__ import annotations

from planner.plan_schema import load_plan, save_plan
from planner.search import search

__all__ = ["load_plan", "save_plan", "search"]
