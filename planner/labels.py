"""What people call an instruction."""

from __future__ import annotations

from planner.program import Function, Generate, Infer, Instruction, Train, Transfer


def label_of(instruction: Instruction) -> str:
    """What people call an instruction: ``actor_gen``, ``reallocate actor``."""
    if isinstance(instruction, Generate | Infer | Train | Function):
        return instruction.call
    if isinstance(instruction, Transfer):
        half = "send" if instruction.sends else "receive"
        return f"{half} {instruction.producer} to {instruction.consumer}"
    return f"{type(instruction).__name__.lower()} {instruction.role}"
