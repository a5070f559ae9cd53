"""All ranks of a group go on, or all stop with the same sentence."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from profiles.errors import CheckpointError


def written_by_all(
    problem: OSError | None, *, group: dist.ProcessGroup | None, device: torch.device, where: Path
) -> None:
    """Wait for every rank of ``group`` (None: this process alone) to have written its part.

    Raises:
        CheckpointError: one of them had a problem; on all of them.
    """
    failed = torch.tensor([0 if problem is None else 1], device=device)
    if group is not None:
        dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
    if failed.item():
        raise CheckpointError(
            f"could not be written ({problem or 'by another rank'})",
            where=str(where),
            remedy="check the room and the rights on that file system",
        ) from problem
