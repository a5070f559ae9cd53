"""``RankContext``: one rank's place in one layout, and the process groups of that place.

A context is built once for each layout of a plan, passed to everything that communicates, and
never stored globally. Ranks outside a layout's mesh take part in building its groups (torch
asks every process to create every group, in one order) and get no context.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from math import gcd

import torch
import torch.distributed as dist

from planner.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class RankContext:
    """Where this rank stands in ``layout``; a group of one member is None.

    ``tp_group``: ranks that hold the other shards of the same layers for the same data.
    ``kv_group``: of the tp group, ranks that hold the same kv heads.
    ``dp_group``: ranks that hold the same shard and work on other data.
    ``ep_group``: of the dp group, neighbours that hold the other experts.
    ``expert_group``: where experts are split, of the dp group those that hold the same ones.
    ``embedding_group``: first and last stage of a tied embedding under pp > 1.
    ``mesh_group``: all ranks of the layout.
    """

    layout: Layout
    rank: int  # in the world: the device's number in the cluster
    device: torch.device
    tp_group: dist.ProcessGroup | None = None
    kv_group: dist.ProcessGroup | None = None
    dp_group: dist.ProcessGroup | None = None
    ep_group: dist.ProcessGroup | None = None
    expert_group: dist.ProcessGroup | None = None
    embedding_group: dist.ProcessGroup | None = None
    mesh_group: dist.ProcessGroup | None = None

    @property
    def groups(self) -> tuple[dist.ProcessGroup, ...]:
        """Those that this rank is in; one may be here twice, and in other contexts."""
        found = (
            self.tp_group, self.kv_group, self.dp_group, self.ep_group, self.expert_group,
            self.embedding_group, self.mesh_group,
        )  # fmt: skip
        return tuple(group for group in found if group is not None)

    @property
    def pp_rank(self) -> int:
        return self.layout.coordinates(self.rank)[0]

    @property
    def dp_rank(self) -> int:
        return self.layout.coordinates(self.rank)[1]

    @property
    def tp_rank(self) -> int:
        return self.layout.coordinates(self.rank)[2]

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.layout.pp - 1

    def stage_rank(self, pp_rank: int) -> int:
        """The world rank at another stage with this rank's dp and tp place."""
        return self.layout.device(pp_rank, self.dp_rank, self.tp_rank)


def single_process(layout: Layout, device: torch.device | str = "cpu") -> RankContext:
    """The context of a layout of one device: no groups, no communication."""
    assert layout.mesh.num_devices == 1, layout
    return RankContext(layout=layout, rank=layout.mesh.first, device=torch.device(device))


def _groups(layout: Layout) -> list[tuple[str, list[int]]]:
    """(axis, world ranks) of every group of a layout, in one order on all ranks."""
    pp, tp, dp, ep = range(layout.pp), range(layout.tp), range(layout.dp), range(layout.ep)
    found = [("tp", [layout.device(p, d, t) for t in tp]) for p in pp for d in dp]
    repeats = layout.tp // gcd(layout.tp, layout.spec.num_kv_heads)
    found += [
        ("kv", [layout.device(p, d, first + t) for t in range(repeats)])
        for p in pp
        for d in dp
        for first in range(0, layout.tp, repeats)
    ]
    found += [("dp", [layout.device(p, d, t) for d in dp]) for p in pp for t in tp]
    if layout.ep > 1:
        firsts = range(0, layout.dp, layout.ep)
        found += [
            ("ep", [layout.device(p, first + e, t) for e in ep])
            for p in pp for first in firsts for t in tp
        ]  # fmt: skip
        found += [
            ("expert", [layout.device(p, first + e, t) for first in firsts])
            for p in pp for e in ep for t in tp
        ]  # fmt: skip
    if layout.spec.tied_embedding and layout.pp > 1:
        ends = (0, layout.pp - 1)
        found += [("embedding", [layout.device(p, d, t) for p in ends]) for d in dp for t in tp]
    found.append(("mesh", list(layout.mesh.devices)))
    return [(axis, ranks) for axis, ranks in found if len(ranks) > 1]


def build_contexts(
    layouts: Iterable[Layout],
    *,
    rank: int,
    device: torch.device,
    timeout: timedelta | None = None,
) -> dict[Layout, RankContext]:
    """The contexts of the layouts that ``rank`` belongs to; collective over the whole world.

    Layouts that need the same set of ranks share one process group. ``timeout``: after which a
    collective in one of them fails (torch's default, if None).
    """
    # Of a world with two backends a group would have both.
    backend = "nccl" if device.type == "cuda" else None
    known: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
    contexts: dict[Layout, RankContext] = {}
    for layout in layouts:
        mine: dict[str, dist.ProcessGroup | None] = {}
        for axis, ranks in _groups(layout):
            members = tuple(ranks)
            if members not in known:
                known[members] = dist.new_group(ranks, timeout=timeout, backend=backend)
            if rank in members:
                mine[f"{axis}_group"] = known[members]
        if rank in layout.mesh:
            contexts[layout] = RankContext(layout=layout, rank=rank, device=device, **mine)
    if device.type == "cuda":
        for context in contexts.values():
            connect_stages(context)
    return contexts


def connect_stages(ctx: RankContext) -> None:
    """A value from every stage to its neighbours; all ranks of the layout together.

    NCCL connects two ranks when a batch brings the first message from the one to the other, and
    begins nothing of the batch before both are there. So a stage that posts its only micro-batch
    together with the receipt of its gradient would wait for a stage that waits for that batch.
    """
    stages = (ctx.pp_rank - 1, ctx.pp_rank + 1)
    peers = [ctx.stage_rank(stage) for stage in stages if 0 <= stage < ctx.layout.pp]
    values = torch.zeros(2, len(peers), 1, device=ctx.device)
    operations = [dist.P2POp(dist.isend, *pair) for pair in zip(values[0], peers)]
    operations += [dist.P2POp(dist.irecv, *pair) for pair in zip(values[1], peers)]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
