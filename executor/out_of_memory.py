"""An allocation that failed, as a sentence that a user can act on."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from pathlib import Path

import torch

from planner.labels import label_of
from planner.memory import call_memory
from planner.plan import ExecutionPlan
from planner.plan_memory import REMEDIES, plan_memory
from planner.program import Function, Generate, Infer, Instruction, Train
from profiles.errors import InfeasibleError
from profiles.units import format_bytes

_SIGNS = ("can't allocate memory", "out of memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Torch has one class for GPUs and a plain ``RuntimeError`` for the host's memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def out_of_memory(
    plan: ExecutionPlan,
    instruction: Instruction,
    *,
    rank: int,
    step: int,
    device: torch.device,
    asked: str,
) -> InfeasibleError:
    """Call, rank and instruction, the itemised estimate against what was there, and the knob.

    ``asked``: the allocator's own words.
    """
    if isinstance(instruction, Generate | Infer | Train | Function):
        allocation = plan.allocations[instruction.call]
        need = call_memory(plan.problem, instruction.call, allocation)
        where = f"allocations.{instruction.call}"
    else:
        need, where = plan_memory(plan)[rank], label_of(instruction)
    items = {name: count for name, count in need.items().items() if count}
    knob = max((name for name in items if name != "reserve"), key=items.__getitem__, default="")
    listed = ", ".join(f"{name} {format_bytes(count)}" for name, count in items.items())
    there = ", ".join(f"{name} {format_bytes(count)}" for name, count in room(device).items())
    when = f"step {step + 1}" if step >= 0 else "setup"
    return InfeasibleError(
        f"rank {rank} ran out of memory in {label_of(instruction)} (instruction "
        f"{instruction.index} of {when}): estimated {format_bytes(need.total)} ({listed}), "
        f"there was {there}; the allocator says: {asked.strip().splitlines()[0]}",
        where=where,
        remedy=REMEDIES[knob] if knob else "use devices with more memory",
    )


def room(device: torch.device) -> Mapping[str, int]:
    """Bytes of the device's memory, those in use by this process, and a limit if there is one."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_allocated(device)
        return {"device": total, "of it free": free, "held by this rank's tensors": held}
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    found = {
        "memory": _kib(fields["MemTotal"]),
        "available": _kib(fields["MemAvailable"]),
        "held by this rank": _kib(status["VmRSS"]),
    }
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        found["limit of its address space"] = limit
    return found


def _kib(text: str) -> int:
    return int(text.split()[0]) * 1024
