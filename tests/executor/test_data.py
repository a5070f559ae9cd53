"""Protects: gradients are summed (not averaged) over replicas, and shards come back whole.

Oracle: sums of integers, exact in fp32, computed without communication.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from executor.parallel import data
from tests.spawn import spawn


def of_rank(rank: int, count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float32) * (rank + 1) + rank


def collectives(rank: int, world_size: int) -> None:
    pair = dist.new_group([1, 2])  # world ranks differ from ranks in the group
    group, members = (pair, (1, 2)) if rank in (1, 2) else (None, (rank,))
    for count in (12, 1200):
        total = sum((of_rank(r, count) for r in members), torch.zeros(count))
        size = count // len(members)
        mine = slice(members.index(rank) * size, (members.index(rank) + 1) * size)
        for bucket_bytes in (1, 20, 10**6):
            flat = of_rank(rank, count)
            data.all_reduce(flat, group, bucket_bytes=bucket_bytes)
            assert torch.equal(flat, total)
        flat = of_rank(rank, count)
        part = data.reduce_scatter(flat, group)
        assert torch.equal(part, total[mine])
        assert part.data_ptr() == flat[mine].data_ptr(), "summed in place"
        whole = torch.full((count,), -1.0)
        data.shard(whole, group).copy_(total[mine])
        data.all_gather(whole, group)
        assert torch.equal(whole, total)


def test_sums_and_shards_over_a_group() -> None:
    spawn(3, collectives)
