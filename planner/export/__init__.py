"""A plan as settings of other systems: verl, OpenRLHF and NeMo-RL, with what these cannot say.

Read ``draft.Exported``, then an exporter. Each names the version of the options that it writes.
What a plan says and a system has no word for is in ``lost``, a sentence each: the plan's estimate
does not hold for what is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from planner.export.draft import Exported
from planner.export.nemo_rl import to_nemo_rl
from planner.export.openrlhf import to_openrlhf
from planner.export.verl import to_verl
from planner.plan import ExecutionPlan

EXPORTERS: Mapping[str, Callable[[ExecutionPlan], Exported]] = {
    "verl": to_verl, "openrlhf": to_openrlhf, "nemo-rl": to_nemo_rl,
}  # fmt: skip
