"""Data parallelism: sums of flat gradients over replicas, and weights back from their shards.

Sums, never means: a loss is already divided by the token count of the whole mini-batch. Every
function takes a flat tensor whose length all ranks of ``group`` share; ``group`` None is a group
of one. Shard ``i`` of a flat tensor of n values over d ranks is [i n / d, (i + 1) n / d).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from planner.cost.train import BUCKET_BYTES as BUCKET_BYTES


def all_reduce(
    flat: Tensor, group: dist.ProcessGroup | None, *, bucket_bytes: int = BUCKET_BYTES
) -> None:
    """``flat`` [values] becomes its sum over ``group``, in place, bucket by bucket."""
    if group is None:
        return
    values = max(1, bucket_bytes // flat.element_size())
    works = [dist.all_reduce(part, group=group, async_op=True) for part in flat.split(values)]
    for work in works:
        work.wait()


def shard(flat: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's shard of ``flat``, a view [values / ranks]."""
    if group is None:
        return flat
    return flat.chunk(dist.get_world_size(group))[dist.get_rank(group)]


def reduce_scatter(flat: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's shard of the sum of ``flat`` over ``group``: a view that was summed in place.

    The other shards of ``flat`` are undefined afterwards. ``flat`` [values], a multiple of the
    group's size.
    """
    if group is None:
        return flat
    mine, size = shard(flat, group), dist.get_world_size(group)
    assert flat.numel() % size == 0, (flat.numel(), size)
    if dist.get_backend(group) == "gloo":
        # gloo's own reduce-scatter is several times slower than a reduce to each owner.
        works = [
            dist.reduce(part, dist.get_global_rank(group, owner), group=group, async_op=True)
            for owner, part in enumerate(flat.chunk(size))
        ]
        for work in works:
            work.wait()
    else:
        _reduce_scatter(mine, flat, group=group)
    return mine


def all_gather(flat: Tensor, group: dist.ProcessGroup | None) -> None:
    """Every shard of ``flat`` from its owner, in place; a multiple of the group's size."""
    if group is None:
        return
    size = dist.get_world_size(group)
    assert flat.numel() % size == 0, (flat.numel(), size)
    if dist.get_backend(group) == "gloo":
        # As above: broadcasts at once beat gloo's all-gather.
        works = [
            dist.broadcast(part, dist.get_global_rank(group, owner), group=group, async_op=True)
            for owner, part in enumerate(flat.chunk(size))
        ]
        for work in works:
            work.wait()
    else:
        _all_gather(flat, shard(flat, group), group=group)


def gather(values: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Every rank's ``values``, which are alike in shape and type; in the order of the ranks."""
    if group is None:
        return [values]
    found = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, values, group=group)
    return found


def send(values: Tensor, dst: int, group: dist.ProcessGroup | None) -> None:
    """To ``receive`` of world rank ``dst``, over the group's own communicator.

    For ``dist.send`` NCCL would make one of these two ranks, with memory of its own.
    """
    _exchange(dist.P2POp(dist.isend, values, dst, group))


def receive(values: Tensor, src: int, group: dist.ProcessGroup | None) -> None:
    """The other end of ``send``: fills ``values``."""
    _exchange(dist.P2POp(dist.irecv, values, src, group))


def _exchange(operation: dist.P2POp) -> None:
    for work in dist.batch_isend_irecv([operation]):
        work.wait()


# torch 2.13 renamed these two and warns at the old names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
