"""Expert parallelism: tokens go to the ranks that hold their experts, and their answers come back.

Read ``on_holders``. All ranks of an expert group call it together, in every layer, in the same
order and with any number of rows: a rank that has no tokens still computes for the others
(``DecoderStage.serve``). How experts lie is ``planner.layout``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# (rows [n, hidden] sorted by expert, how many each of the own experts has) -> [n, hidden].
Compute = Callable[[Tensor, Tensor], Tensor]


def on_holders(rows: Tensor, counts: Tensor, group: dist.ProcessGroup, compute: Compute) -> Tensor:
    """``compute`` of every row on the rank that holds its expert -> [n, hidden] in rows' order.

    ``rows`` [n, hidden] sorted by expert, ``counts`` [num_experts] of them. Two exchanges of
    n * hidden values each way, and before them one of the counts; backward as many.
    Source: Lepikhin et al. 2021 (GShard), section 3.2, without capacities: no token is dropped.
    """
    num_ranks = dist.get_world_size(group)
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts, group=group)
    arriving = arriving.view(num_ranks, -1)  # [from rank, own expert]
    sends = counts.view(num_ranks, -1).sum(1).tolist()
    receives = arriving.sum(1).tolist()
    arrived = _Exchange.apply(rows, sends, receives, group)
    # They come by rank and then expert; experts want theirs side by side.
    own = torch.arange(arriving.shape[1], device=rows.device).repeat(num_ranks)
    order = own.repeat_interleave(arriving.flatten()).argsort(stable=True)
    done = compute(arrived[order], arriving.sum(0))
    back = torch.empty_like(done).index_copy(0, order, done)
    answers: Tensor = _Exchange.apply(back, receives, sends, group)
    return answers


class _Exchange(torch.autograd.Function):
    """The first ``sends[0]`` rows to rank 0 of the group and so on; backward the other way."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sends, ctx.receives, ctx.group = sends, receives, group
        return _exchanged(rows, sends, receives, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grad, ctx.receives, ctx.sends, ctx.group), None, None, None


def _exchanged(
    rows: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup
) -> Tensor:
    arrived = rows.new_empty(sum(receives), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), receives, sends, group=group)
    return arrived


def anyone(condition: bool, group: dist.ProcessGroup | None, device: torch.device) -> bool:
    """Whether ``condition`` holds on any rank of ``group``, of which None is one rank."""
    if group is None:
        return condition
    found = torch.tensor([int(condition)], device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return bool(found.item())
